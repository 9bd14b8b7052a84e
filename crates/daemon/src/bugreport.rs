//! `flanneld bugreport`: one archive with what a maintainer asks for, without secrets.

mod archive;
mod redact;

use std::fmt::{Debug, Display};
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::Args;
use flannel::scope::Scope;
use flannel::subnet_env::previous_networks;
use flannel::{Family, Subnet};
use kernel::child::{self, Limits};
use kernel::netlink::{Protocol, Socket};
use kernel::route::{self, Filter};
use kernel::{Kernel, addr, link};

use self::archive::{Archive, CUT, FILE};
use self::redact::Redactor;
use crate::ipam::IpamDirs;
use crate::status::{DaemonArgs, StatusArgs};
use crate::{app, clock, doctor, ipam, output, socket, status};

/// How long a program of the host may take.
const PROGRAM: Duration = Duration::from_secs(5);

/// Programs that are asked if the host has them. All they do is print.
const PROGRAMS: [(&str, &[&str]); 15] = [
    ("ip-link.txt", &["ip", "-d", "-s", "link"]),
    ("ip-address.txt", &["ip", "address"]),
    ("ip-route.txt", &["ip", "route", "show", "table", "all"]),
    ("ip-route-6.txt", &["ip", "-6", "route", "show", "table", "all"]),
    ("ip-rule.txt", &["ip", "rule"]),
    ("ip-rule-6.txt", &["ip", "-6", "rule"]),
    ("ip-neighbour.txt", &["ip", "neighbour"]),
    ("bridge-fdb.txt", &["bridge", "fdb"]),
    ("nft.txt", &["nft", "list", "ruleset"]),
    ("iptables.txt", &["iptables-save"]),
    ("ip6tables.txt", &["ip6tables-save"]),
    ("iptables-legacy.txt", &["iptables-legacy-save"]),
    ("sockets.txt", &["ss", "-ulnp"]),
    ("journal.txt", &["journalctl", "-u", "flanneld", "-u", "flanneld-store", "-n", "5000", "--no-pager", "-o", "short-iso"]),
    ("modules.txt", &["lsmod"]),
];

/// Files of the host.
const FILES: [&str; 6] = [
    "/etc/os-release",
    "/etc/kube-flannel/net-conf.json",
    "/etc/default/flanneld",
    "/etc/default/flanneld-store",
    "/etc/systemd/system/flanneld.service",
    "/etc/systemd/system/flanneld-store.service",
];

const README: &str = "\
A report about flannel on one host, made by flanneld bugreport.

status.txt, doctor.txt, ipam.txt   what the commands of these names print
state.json, metrics.txt            the daemon's documents, if it runs (docs/state.md)
process.txt                        its command line and environment
kernel/                            links, addresses, routes and flannel's objects, read by flanneld
host/                              what the host's own programs print, as far as they exist
files/                             configuration, subnet.env

Removed: private keys, passwords, tokens, user and password in URLs. Addresses and names of hosts are in it: read it before you send it.
";

const EXAMPLES: &str = "\
Secrets are removed: keys, passwords, tokens, user and password in URLs. Addresses and names of hosts stay. The archive is
smaller than 10 MB.

Examples:
  flanneld bugreport                     write flanneld-bugreport-HOST-TIME.tar.gz to the present folder
  flanneld bugreport /tmp/report.tar.gz  … to this file";

/// Arguments of `flanneld bugreport`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct BugreportArgs {
    /// The archive; it must not exist yet [default: flanneld-bugreport-HOST-TIME.tar.gz]
    #[arg(value_name = "FILE")]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub daemon: DaemonArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub dirs: IpamDirs,
    /// The container runtime's folder for configurations
    #[arg(long, default_value = "/etc/cni/net.d", value_name = "FOLDER")]
    pub cni_conf_dir: PathBuf,
}

/// Writes the archive.
///
/// # Errors
/// When it cannot be written. What cannot be read is noted in it.
pub fn run(args: &BugreportArgs) -> anyhow::Result<()> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let host: String = host.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' }).take(40).collect();
    let time = clock::now().replace([':', '-'], "").split('.').next().unwrap_or_default().to_owned();
    let folder = format!("flanneld-bugreport-{host}-{time}");
    let path = args.file.clone().unwrap_or_else(|| PathBuf::from(format!("{folder}.tar.gz")));
    // It is made first: whatever takes long would be in vain.
    let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&path);
    let file = file.as_mut().map_err(|error| anyhow::anyhow!("cannot create {}: {error}", path.display()))?;
    let bytes = Report::gather(args, &folder)?;
    file.write_all(&bytes).with_context(|| format!("cannot write {}", path.display()))?;
    output::line(format_args!("wrote {} ({} kB); secrets are removed, but read it before you send it", path.display(), bytes.len() / 1000));
    Ok(())
}

/// The report while it is made.
struct Report {
    archive: Archive,
    redactor: Redactor,
}

impl Report {
    fn gather(args: &BugreportArgs, folder: &str) -> anyhow::Result<Vec<u8>> {
        #[expect(clippy::disallowed_methods, reason = "files have the wall clock's time")]
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let process = pid(&args.daemon.subnet_file).map(Process::read);
        let redactor = Redactor::new(secrets(process.as_ref()));
        let mut report = Report { archive: Archive::new(folder, time), redactor };
        report.add("README.txt", README)?;
        report.add("version.txt", &version())?;
        report.commands(args)?;
        for (name, path) in [("state.json", "/state"), ("ready.txt", "/readyz"), ("metrics.txt", "/metrics")] {
            report.add(name, &socket::ask(&args.daemon.socket(), path).unwrap_or_else(|error| error.to_string()))?;
        }
        report.add("process.txt", &process.map_or_else(|| "no daemon has the lock\n".to_owned(), |process| process.text()))?;
        report.kernel(&args.daemon.subnet_file)?;
        let confs = fs::read_dir(&args.cni_conf_dir).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut confs: Vec<PathBuf> = confs.filter(|path| path.is_file()).collect();
        confs.sort();
        let files = FILES.iter().map(PathBuf::from).chain([args.daemon.subnet_file.clone()]);
        for path in files.chain(confs.into_iter().take(20)) {
            if let Some(text) = read(&path) {
                let name: String = path.display().to_string().trim_start_matches('/').replace('/', "_").chars().take(40).collect();
                report.add(&format!("files/{name}"), &text)?;
            }
        }
        for (name, words) in PROGRAMS {
            if let Some(text) = ask(words) {
                report.add(&format!("host/{name}"), &text)?;
            }
        }
        let omitted = std::mem::take(&mut report.archive.omitted);
        if !omitted.is_empty() {
            output::error_line(format_args!("left out because the archive is full: {}", omitted.join(", ")));
        }
        report.archive.finish().context("cannot compress the archive")
    }

    fn add(&mut self, name: &str, text: &str) -> anyhow::Result<()> {
        self.archive.add(name, &self.redactor.clean(text)).context("cannot compress the archive")
    }

    /// What the other commands print.
    fn commands(&mut self, args: &BugreportArgs) -> anyhow::Result<()> {
        let status = StatusArgs { json: false, wait: None, all: true, daemon: args.daemon.clone(), dirs: args.dirs.clone() };
        self.add("status.txt", &status::plain(&status).unwrap_or_else(|error| format!("{error:#}")))?;
        self.add("doctor.txt", &doctor::plain(&args.daemon).unwrap_or_else(|error| format!("{error:#}")))?;
        self.add("ipam.txt", &ipam::plain(&args.daemon.subnet_file, &args.dirs).unwrap_or_else(|error| format!("{error:#}")))
    }

    /// The kernel's state, read by our own code: a container may have no other programs.
    fn kernel(&mut self, subnet_file: &Path) -> anyhow::Result<()> {
        let networks = previous_networks(&fs::read_to_string(subnet_file).unwrap_or_default());
        for (name, text) in [
            ("objects", objects(&networks)),
            ("links", list(link::list)),
            ("addresses", list(|socket| addr::list(socket, 0))),
            ("routes", list(|socket| route::list(socket, Family::V4, Filter::All))),
            ("routes-6", list(|socket| route::list(socket, Family::V6, Filter::All))),
            ("facts", doctor::facts(subnet_file)),
        ] {
            self.add(&format!("kernel/{name}.txt"), &text.unwrap_or_else(|error| format!("{error:#}")))?;
        }
        Ok(())
    }
}

/// Flannel's objects in the kernel.
fn objects(networks: &[Subnet]) -> anyhow::Result<String> {
    let mut kernel = Kernel::open()?;
    let all = link::list(&mut Socket::open(Protocol::Route)?)?;
    let links = all.iter().map(|link| link.name).filter(|name| name.as_str().starts_with("flannel")).collect();
    let scope =
        Scope { links, networks: networks.to_vec(), rulesets: Family::ALL.to_vec(), iptables: Family::ALL.to_vec(), ..Scope::default() };
    let observed = kernel.observe(&scope)?;
    let trouble = kernel.take_read_error().map(|error| format!("cannot read {error}\n")).unwrap_or_default();
    Ok(lines(observed.iter().map(|(_, object)| object)) + &trouble)
}

fn lines(items: impl Iterator<Item = impl Display>) -> String {
    items.map(|item| format!("{item}\n")).collect()
}

/// A line for each item of a list of the kernel's.
fn list<T: Debug, E: std::error::Error + Send + Sync + 'static>(
    read: impl FnOnce(&mut Socket) -> Result<Vec<T>, E>,
) -> anyhow::Result<String> {
    let found = read(&mut Socket::open(Protocol::Route)?)?;
    Ok(found.iter().map(|item| format!("{item:?}\n")).collect())
}

fn version() -> String {
    let uname = rustix::system::uname();
    let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
    let kernel = [uname.sysname(), uname.release(), uname.version(), uname.machine()].map(text).join(" ");
    let program = std::env::current_exe().map(|path| path.display().to_string()).unwrap_or_default();
    format!("flanneld {}\nprogram {program}\nkernel {kernel}\ntime {}\n", env!("CARGO_PKG_VERSION"), clock::now())
}

/// A file's text, up to the size of a file in the archive.
fn read(path: &Path) -> Option<String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(u64::try_from(FILE).ok()?).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// What a program of the host prints; `None` if the host does not have it.
fn ask(words: &[&str]) -> Option<String> {
    let (program, arguments) = words.split_first()?;
    let limits = Limits { time: PROGRAM, output: FILE };
    let ended = child::run(Command::new(program).args(arguments), "", limits).ok()?;
    let outcome = match ended.status {
        _ if ended.is_cut => CUT.to_owned(),
        Some(status) if status.success() => String::new(),
        Some(status) => format!("\n{status}\n"),
        None => format!("\nended after {PROGRAM:?}\n"),
    };
    Some(format!("{}{}{outcome}", String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr)))
}

/// The process that has the lock of a subnet file, if it lives.
fn pid(subnet_file: &Path) -> Option<u32> {
    let lock = subnet_file.with_file_name(app::LOCKS).join(subnet_file.file_name()?);
    let pid = fs::read_to_string(lock).ok()?.split_whitespace().nth(1)?.parse().ok()?;
    Path::new(&format!("/proc/{pid}/cmdline")).exists().then_some(pid)
}

/// A daemon's command line and its settings in the environment.
struct Process {
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
}

impl Process {
    fn read(pid: u32) -> Process {
        let parts = |name: &str| -> Vec<String> {
            let bytes = fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
            String::from_utf8_lossy(&bytes).split('\0').filter(|part| !part.is_empty()).map(ToOwned::to_owned).collect()
        };
        let variables = parts("environ").into_iter().filter_map(|part| part.split_once('=').map(|(n, v)| (n.to_owned(), v.to_owned())));
        let is_ours = |name: &str| name.starts_with("FLANNELD_") || matches!(name, "NODE_NAME" | "POD_NAME" | "POD_NAMESPACE" | "PATH");
        Process { arguments: parts("cmdline"), variables: variables.filter(|(name, _)| is_ours(name)).collect() }
    }

    fn text(&self) -> String {
        let variables: String = self.variables.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        format!("{}\n{variables}", self.arguments.join(" "))
    }

    /// The values of settings that are secrets.
    fn secrets(&self) -> Vec<String> {
        let mut secrets = Vec::new();
        let mut rest = self.arguments.iter();
        while let Some(argument) = rest.next() {
            let flag = argument.trim_start_matches('-');
            match flag.split_once('=') {
                Some(("etcd-password", value)) => secrets.push(value.to_owned()),
                None if flag == "etcd-password" => secrets.extend(rest.next().cloned()),
                _ => {}
            }
        }
        let is_secret = |name: &str| ["PASSWORD", "SECRET", "TOKEN"].iter().any(|word| name.contains(word));
        secrets.extend(self.variables.iter().filter(|(name, _)| is_secret(name)).map(|(_, value)| value.clone()));
        secrets
    }
}

/// Secrets of which the value is known: wherever it appears, it is removed.
fn secrets(process: Option<&Process>) -> Vec<String> {
    let token = fs::read_to_string("/var/run/secrets/kubernetes.io/serviceaccount/token").unwrap_or_default();
    let mut secrets = process.map(Process::secrets).unwrap_or_default();
    secrets.push(token.trim().to_owned());
    secrets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_the_daemon_are_known_by_their_flags_and_variables() {
        let words = |text: &str| text.split(' ').map(ToOwned::to_owned).collect();
        let process = Process {
            arguments: words("flanneld --etcd-password one -etcd-password=two --iface eth0"),
            variables: vec![("FLANNELD_ETCD_PASSWORD".to_owned(), "three".to_owned()), ("NODE_NAME".to_owned(), "h1".to_owned())],
        };
        assert_eq!(process.secrets(), ["one", "two", "three"]);
        assert!(process.text().ends_with("--iface eth0\nFLANNELD_ETCD_PASSWORD=three\nNODE_NAME=h1\n"));
    }

    #[test]
    fn programs_that_the_host_lacks_are_left_out() {
        assert_eq!(ask(&["no-such-program-of-flannel"]), None);
        assert_eq!(ask(&["sh", "-c", "echo out; exit 3"]).unwrap(), "out\n\nexit status: 3\n");
    }
}
