//! `flanneld install-cni`: puts the CNI plugins and their list where container runtimes look, each file in one step, so
//! that a runtime never reads half of one. Needs no shell. Called `install-conf`, as in upstream's image, it copies one
//! file in the same way.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use kernel::file::{self, Existing, How};
use serde_json::Value;

use crate::output;

/// The program of all plugins, under its own name.
const PROGRAM: &str = "flannel-cni";

/// What `flanneld install-cni` is told.
#[derive(Debug, Clone, Args)]
pub struct InstallCniArgs {
    /// Where runtimes look for plugins
    #[arg(long, default_value = "/opt/cni/bin", value_name = "FOLDER")]
    pub bin_dir: PathBuf,
    /// The program of our plugins [default: flannel-cni beside this program]
    #[arg(long, value_name = "FILE")]
    pub plugin: Option<PathBuf>,
    /// The list of plugins to install
    #[arg(long, default_value = "/etc/kube-flannel/cni-conf.json", value_name = "FILE")]
    pub conf: PathBuf,
    /// Where runtimes look for it
    #[arg(long, default_value = "/etc/cni/net.d/10-flannel.conflist", value_name = "FILE")]
    pub conf_target: PathBuf,
    /// Install the plugins alone
    #[arg(long)]
    pub skip_conf: bool,
    /// Put ours in the place of plugins of others, too (bridge, host-local, portmap, …); `flannel` is replaced in any case
    #[arg(long)]
    pub replace: bool,
}

/// Installs.
///
/// # Errors
/// What cannot be read or written, or is no list of plugins; then the files that were there stand.
pub fn run(args: &InstallCniArgs) -> anyhow::Result<()> {
    // The list last: who finds it finds its plugins.
    install_plugins(args)?;
    if args.skip_conf {
        return Ok(());
    }
    let text = fs::read_to_string(&args.conf).with_context(|| format!("cannot read --conf {}", args.conf.display()))?;
    check_list(&text).with_context(|| format!("--conf {} (key cni-conf.json of ConfigMap kube-flannel-cfg)", args.conf.display()))?;
    let target = &args.conf_target;
    if fs::read_to_string(target).is_ok_and(|now| now == text) {
        output::line(format_args!("{} is up to date", target.display()));
        return Ok(());
    }
    file::replace(target, &text, |file| mark(file, &text)).with_context(|| format!("cannot write --conf-target {}", target.display()))?;
    output::line(format_args!("wrote {}", target.display()));
    Ok(())
}

/// Extended attribute of a CNI configuration that [`run`] wrote: the digest of its text.
const MARK: &str = "user.flannel.install-cni";

/// Marks a file as ours. A file system without extended attributes has no marks; then `flanneld cleanup` leaves the file.
fn mark(file: &File, text: &str) -> std::io::Result<()> {
    let _ = rustix::fs::fsetxattr(file, MARK, digest(text).as_bytes(), rustix::fs::XattrFlags::empty());
    Ok(())
}

/// Is this file as [`run`] wrote it? `None` if there is no such file.
pub fn wrote(path: &Path) -> Option<bool> {
    let file = File::open(path).ok()?;
    let text = fs::read_to_string(path).ok()?;
    let mut buffer = [0; 64];
    let noted = rustix::fs::fgetxattr(&file, MARK, &mut buffer[..]).ok().and_then(|length| buffer.get(..length));
    Some(noted == Some(digest(&text).as_bytes()))
}

/// FNV-1a in 64 bits: it tells an edited file from the installed one, and protects from nothing else.
fn digest(text: &str) -> String {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

/// Is this what a runtime can use? To install anything else would take the network from a node that has one.
fn check_list(text: &str) -> anyhow::Result<()> {
    let list: Value = serde_json::from_str(text).context("it is no JSON")?;
    ensure!(list["name"].is_string(), "name: there is none");
    let plugins = list["plugins"].as_array().context("plugins: there is no list of them")?;
    ensure!(!plugins.is_empty(), "plugins: the list is empty");
    for (at, plugin) in plugins.iter().enumerate() {
        ensure!(plugin["type"].is_string(), "plugins[{at}].type: there is none");
    }
    Ok(())
}

fn install_plugins(args: &InstallCniArgs) -> anyhow::Result<()> {
    let source = match &args.plugin {
        Some(path) => path.clone(),
        None => std::env::current_exe().context("cannot tell where this program is")?.with_file_name(PROGRAM),
    };
    let program = fs::read(&source).with_context(|| format!("cannot read --plugin {}", source.display()))?;
    let folder = &args.bin_dir;
    fs::create_dir_all(folder).with_context(|| format!("cannot make --bin-dir {}", folder.display()))?;
    let main = folder.join(PROGRAM);
    // What was installed by an earlier run is one file under many names.
    let earlier = fs::metadata(&main).ok();
    let is_ours = |path: &Path, meta: &fs::Metadata| {
        let same_file = earlier.as_ref().is_some_and(|earlier| (earlier.dev(), earlier.ino()) == (meta.dev(), meta.ino()));
        same_file || meta.len() == program.len() as u64 && fs::read(path).is_ok_and(|bytes| bytes == program)
    };
    let (mut wanted, mut stays, mut left) = (Vec::new(), Vec::new(), Vec::new());
    for name in cni::NAMES {
        let path = folder.join(name);
        // A link is somebody's own doing, wherever it leads (here it may lead nowhere: this may be a container).
        match fs::symlink_metadata(&path) {
            Ok(meta) if name != "flannel" && !args.replace && (meta.is_symlink() || !is_ours(&path, &meta)) => left.push(name),
            Ok(meta) if meta.is_file() && fs::read(&path).is_ok_and(|bytes| bytes == program) => stays.push(name),
            Ok(_) | Err(_) => wanted.push(name),
        }
    }
    let is_current = fs::read(&main).is_ok_and(|bytes| bytes == program);
    if !is_current || !wanted.is_empty() {
        // All of ours stay one file: by that the next version knows them.
        wanted.append(&mut stays);
        let temporary = folder.join(format!(".{PROGRAM}.{}", std::process::id()));
        let written = (|| {
            file::put(&temporary, &program, How { mode: 0o755, durable: true, existing: Existing::ReplaceAlone }, |_| Ok(()))?;
            for name in &wanted {
                let link = folder.join(format!(".{name}.{}", std::process::id()));
                let _ = fs::remove_file(&link);
                fs::hard_link(&temporary, &link).and_then(|()| fs::rename(&link, folder.join(name)))?;
            }
            // Its own name last: by that, a run after one that was killed in between still recognises the rest as ours.
            fs::rename(&temporary, &main)
        })();
        if let Err(error) = written {
            let _ = fs::remove_file(&temporary);
            return Err(error).with_context(|| format!("cannot install the plugins in {}", folder.display()));
        }
    }
    File::open(folder)?.sync_all().with_context(|| format!("cannot sync {}", folder.display()))?;
    let say = |what: &str, names: &[&str]| {
        if !names.is_empty() {
            output::line(format_args!("{}: {what} {}", folder.display(), names.join(" ")));
        }
    };
    say("installed", &wanted);
    say("up to date:", &stays);
    say("left as they are, because they are programs of others (see --replace):", &left);
    Ok(())
}

/// Is this program called by the name that upstream's image has for copying a file?
pub fn called_as(program: Option<OsString>) -> bool {
    program.is_some_and(|path| Path::new(&path).file_name().is_some_and(|name| name == "install-conf"))
}

/// Copies a file in one step, with the mode that it has.
///
/// # Errors
/// When there are not two arguments, or when the file cannot be copied; then the old one stands.
pub fn copy(args: &[String]) -> anyhow::Result<()> {
    let [source, target] = args else { anyhow::bail!("usage: install-conf SOURCE TARGET") };
    let text = fs::read_to_string(source).with_context(|| format!("cannot read {source}"))?;
    let mode = fs::metadata(source)?.permissions();
    file::replace(Path::new(target), &text, |file| file.set_permissions(mode)).with_context(|| format!("cannot write {target}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_file_as_installed_counts_as_ours() {
        let folder = std::env::temp_dir().join(format!("flannel-install-cni-{}", std::process::id()));
        let path = folder.join("10-flannel.conflist");
        assert_eq!(wrote(&path), None);
        file::replace(&path, "{}", |file| mark(file, "{}")).unwrap();
        assert_eq!(wrote(&path), Some(true), "the temporary folder has extended attributes");
        fs::write(&path, "{ }").unwrap();
        assert_eq!(wrote(&path), Some(false));
        fs::remove_file(&path).unwrap();
        file::write(&path, "{}").unwrap();
        assert_eq!(wrote(&path), Some(false));
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_list_that_no_runtime_could_use_is_refused() {
        for (text, want) in [
            ("{", "it is no JSON"),
            ("{}", "name: there is none"),
            (r#"{"name":"x"}"#, "plugins: there is no list of them"),
            (r#"{"name":"x","plugins":[]}"#, "plugins: the list is empty"),
            (r#"{"name":"x","plugins":[{"type":"flannel"},{}]}"#, "plugins[1].type: there is none"),
        ] {
            assert_eq!(check_list(text).unwrap_err().to_string(), want);
        }
        assert!(check_list(r#"{"name":"cbr0","plugins":[{"type":"flannel"}]}"#).is_ok());
    }
}
