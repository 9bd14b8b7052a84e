//! `flanneld install-cni`: installs the CNI plugins and their configuration list for container runtimes. Each file is replaced
//! atomically, so that a runtime never reads an incomplete one. Needs no shell. Under the name `install-conf`, which upstream's image
//! uses, it copies one file in the same way.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use kernel::file::{self, Existing, How};
use serde_json::Value;

use crate::output;

/// The file name of the program that contains all plugins.
const PROGRAM: &str = "flannel-cni";

/// The arguments of `flanneld install-cni`.
#[derive(Debug, Clone, Args)]
pub struct InstallCniArgs {
    /// Plugin folder of the container runtime
    #[arg(long, default_value = "/opt/cni/bin", value_name = "FOLDER")]
    pub bin_dir: PathBuf,
    /// The program with flannel's plugins [default: flannel-cni beside this program]
    #[arg(long, value_name = "FILE")]
    pub plugin: Option<PathBuf>,
    /// The configuration list to install
    #[arg(long, default_value = "/etc/kube-flannel/cni-conf.json", value_name = "FILE")]
    pub conf: PathBuf,
    /// The file to which the configuration list is installed
    #[arg(long, default_value = "/etc/cni/net.d/10-flannel.conflist", value_name = "FILE")]
    pub conf_target: PathBuf,
    /// Install the plugins only
    #[arg(long)]
    pub skip_conf: bool,
    /// Also replace plugins of others (bridge, host-local, portmap, …); `flannel` is replaced in any case
    #[arg(long)]
    pub replace: bool,
}

/// Installs the plugins and the configuration list.
///
/// # Errors
/// When a file cannot be read or written, or the list is invalid; then the installed files are kept.
pub fn run(args: &InstallCniArgs) -> anyhow::Result<()> {
    // The list comes last: a runtime that reads it finds the plugins.
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

/// Marks a file as installed by this program. On a file system without extended attributes `flanneld cleanup` keeps the file.
fn mark(file: &File, text: &str) -> std::io::Result<()> {
    let _ = rustix::fs::fsetxattr(file, MARK, digest(text).as_bytes(), rustix::fs::XattrFlags::empty());
    Ok(())
}

/// Whether this file is unchanged since [`run`] wrote it; `None` if it does not exist.
pub fn wrote(path: &Path) -> Option<bool> {
    let file = File::open(path).ok()?;
    let text = fs::read_to_string(path).ok()?;
    let mut buffer = [0; 64];
    let noted = rustix::fs::fgetxattr(&file, MARK, &mut buffer[..]).ok().and_then(|length| buffer.get(..length));
    Some(noted == Some(digest(&text).as_bytes()))
}

/// 64-bit FNV-1a, which detects an edited file; it is not a protection against forgery.
fn digest(text: &str) -> String {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

/// Checks that a runtime can use the list. Installing a broken one would cut off a working node.
fn check_list(text: &str) -> anyhow::Result<()> {
    let list: Value = serde_json::from_str(text).context("it is not valid JSON")?;
    ensure!(list["name"].is_string(), "name is missing or not a string");
    let plugins = list["plugins"].as_array().context("plugins is missing or not a list")?;
    ensure!(!plugins.is_empty(), "plugins: the list is empty");
    for (at, plugin) in plugins.iter().enumerate() {
        ensure!(plugin["type"].is_string(), "plugins[{at}].type is missing or not a string");
    }
    Ok(())
}

fn install_plugins(args: &InstallCniArgs) -> anyhow::Result<()> {
    let source = match &args.plugin {
        Some(path) => path.clone(),
        None => std::env::current_exe().context("cannot find the path of this program; use --plugin")?.with_file_name(PROGRAM),
    };
    let program = fs::read(&source).with_context(|| format!("cannot read --plugin {}", source.display()))?;
    let folder = &args.bin_dir;
    fs::create_dir_all(folder).with_context(|| format!("cannot create --bin-dir {}", folder.display()))?;
    let main = folder.join(PROGRAM);
    // An earlier run installed one file under many names (hard links).
    let earlier = fs::metadata(&main).ok();
    let is_ours = |path: &Path, meta: &fs::Metadata| {
        let same_file = earlier.as_ref().is_some_and(|earlier| (earlier.dev(), earlier.ino()) == (meta.dev(), meta.ino()));
        same_file || meta.len() == program.len() as u64 && fs::read(path).is_ok_and(|bytes| bytes == program)
    };
    let (mut wanted, mut current, mut foreign) = (Vec::new(), Vec::new(), Vec::new());
    for name in cni::NAMES {
        let path = folder.join(name);
        // A symbolic link is foreign, whatever its target (which may not exist in this container).
        match fs::symlink_metadata(&path) {
            Ok(meta) if name != "flannel" && !args.replace && (meta.is_symlink() || !is_ours(&path, &meta)) => foreign.push(name),
            Ok(meta) if meta.is_file() && fs::read(&path).is_ok_and(|bytes| bytes == program) => current.push(name),
            Ok(_) | Err(_) => wanted.push(name),
        }
    }
    let is_current = fs::read(&main).is_ok_and(|bytes| bytes == program);
    if !is_current || !wanted.is_empty() {
        // All names remain links to one file, by which the next version recognizes them.
        wanted.append(&mut current);
        let temporary = folder.join(format!(".{PROGRAM}.{}", std::process::id()));
        let written = (|| {
            file::put(&temporary, &program, How { mode: 0o755, durable: true, existing: Existing::ReplaceAlone }, |_| Ok(()))?;
            for name in &wanted {
                let link = folder.join(format!(".{name}.{}", std::process::id()));
                let _ = fs::remove_file(&link);
                fs::hard_link(&temporary, &link).and_then(|()| fs::rename(&link, folder.join(name)))?;
            }
            // The program's own name comes last: if this process is killed before, the next run still recognizes the old links.
            fs::rename(&temporary, &main)
        })();
        if let Err(error) = written {
            let _ = fs::remove_file(&temporary);
            return Err(error).with_context(|| format!("cannot install the plugins in {}", folder.display()));
        }
    }
    File::open(folder)?.sync_all().with_context(|| format!("cannot sync {}", folder.display()))?;
    let report = |what: &str, names: &[&str]| {
        if !names.is_empty() {
            output::line(format_args!("{}: {what} {}", folder.display(), names.join(" ")));
        }
    };
    report("installed", &wanted);
    report("up to date:", &current);
    report("kept plugins of others (use --replace to replace them):", &foreign);
    Ok(())
}

/// Whether this program was called by the name under which upstream's image copies a file.
pub fn called_as(program: Option<OsString>) -> bool {
    program.is_some_and(|path| Path::new(&path).file_name().is_some_and(|name| name == "install-conf"))
}

/// Copies a file atomically, with its mode.
///
/// # Errors
/// When there are not two arguments, or when the file cannot be copied; then the old file is kept.
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
    fn invalid_configuration_lists_are_refused() {
        for (text, want) in [
            ("{", "it is not valid JSON"),
            ("{}", "name is missing or not a string"),
            (r#"{"name":"x"}"#, "plugins is missing or not a list"),
            (r#"{"name":"x","plugins":[]}"#, "plugins: the list is empty"),
            (r#"{"name":"x","plugins":[{"type":"flannel"},{}]}"#, "plugins[1].type is missing or not a string"),
        ] {
            assert_eq!(check_list(text).unwrap_err().to_string(), want);
        }
        assert!(check_list(r#"{"name":"cbr0","plugins":[{"type":"flannel"}]}"#).is_ok());
    }
}
