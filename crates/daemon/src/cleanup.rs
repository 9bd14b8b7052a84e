//! `flanneld cleanup`: removes from a host what flannel left there, for an operator who stops using it. Foreign objects stay.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use clap::Args;
use flannel::Desired;
use flannel::backend;
use flannel::diff::{Prune, diff};
use flannel::object::Object;
use flannel::pod::note::Rules;
use flannel::pod::ports::{self, Holder, Ports};
use flannel::pod::{Attachment, Table, masquerade};
use flannel::scope::Scope;
use flannel::subnet_env::{previous_networks, previous_subnets};
use flannel::{Family, IfName, Subnet};
use kernel::link::LinkInfo;
use kernel::netlink::{Protocol, Socket};
use kernel::pod_table::{self, PORTS};
use kernel::{Kernel, addr, link, pod_rules};

use crate::{app, install_cni, output, socket};

/// Locks of the plugins, a file for each network namespace.
const LOCKS: &str = "/run/flannel-locks";
/// The pods' bridge, unless the CNI configuration names another.
const BRIDGE: &str = "cni0";

/// Arguments of `flanneld cleanup`.
#[derive(Debug, Clone, Args)]
pub struct CleanupArgs {
    /// Only list what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// The daemon's file: it names the pod network, and its lock tells whether the daemon runs
    #[arg(long, default_value = "/run/flannel/subnet.env", value_name = "FILE")]
    pub subnet_file: PathBuf,
    /// A pod network, if the file is gone; repeatable [default: every route with flannel's protocol number counts]
    #[arg(long, value_name = "CIDR")]
    pub network: Vec<Subnet>,
    /// CNI configuration, removed if `install-cni` wrote it and it has not changed since
    #[arg(long, default_value = "/etc/cni/net.d/10-flannel.conflist", value_name = "FILE")]
    pub conf_target: PathBuf,
}

/// Removes everything of flannel's, or lists it.
///
/// # Errors
/// When a daemon runs, the kernel cannot be read, or something could not be removed.
pub fn run(args: &CleanupArgs) -> anyhow::Result<()> {
    let lock = lock(&args.subnet_file)?;
    let text = fs::read_to_string(&args.subnet_file).unwrap_or_default();
    let mut cleanup = Cleanup { dry_run: args.dry_run, removed: 0, failed: 0 };
    let mut networks = args.network.clone();
    networks.extend(previous_networks(&text));
    cleanup.pod_rules()?;
    cleanup.kernel(&networks)?;
    cleanup.bridge(&text)?;
    cleanup.conf(&args.conf_target);
    cleanup.files(&args.subnet_file);
    drop(lock);
    match (cleanup.removed, cleanup.failed) {
        (0, 0) => output::line("nothing of flannel's is left on this host"),
        (removed, 0) if args.dry_run => output::line(format_args!("{removed} objects would be removed")),
        (removed, 0) => output::line(format_args!("{removed} objects removed")),
        (removed, failed) => return Err(anyhow!("{removed} objects removed, {failed} could not be: see above")),
    }
    Ok(())
}

/// Takes the daemon's lock, if the daemon has ever run here.
fn lock(subnet_file: &Path) -> anyhow::Result<Option<fs::File>> {
    let path = lock_file(subnet_file)?;
    if !path.exists() {
        return Ok(None);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match kernel::lock::alone(&subnet_file.with_file_name(app::LOCKS), &name, Duration::ZERO) {
        Ok(held) => Ok(Some(held)),
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            Err(anyhow!("flanneld ({error}) is running with --subnet-file {}: stop it first", subnet_file.display()))
        }
        Err(error) => Err(error).with_context(|| format!("cannot take {}", path.display())),
    }
}

fn lock_file(subnet_file: &Path) -> anyhow::Result<PathBuf> {
    let name = subnet_file.file_name().context("--subnet-file: it names no file")?;
    Ok(subnet_file.with_file_name(app::LOCKS).join(name))
}

/// The daemon's hidden files beside `subnet.env`.
fn beside(subnet_file: &Path, kind: &str) -> anyhow::Result<PathBuf> {
    let name = subnet_file.file_name().context("--subnet-file: it names no file")?.to_string_lossy();
    Ok(subnet_file.with_file_name(format!(".{name}.{kind}")))
}

struct Cleanup {
    dry_run: bool,
    removed: usize,
    failed: usize,
}

impl Cleanup {
    /// Removes one object, or says that it would be.
    fn remove(&mut self, object: &str, remove: impl FnOnce() -> anyhow::Result<()>) {
        if self.dry_run {
            output::line(format_args!("would remove {object}"));
            self.removed += 1;
            return;
        }
        let outcome = remove();
        self.report(object, outcome);
    }

    fn report(&mut self, object: &str, outcome: anyhow::Result<()>) {
        match outcome {
            Ok(()) => {
                output::line(format_args!("removed {object}"));
                self.removed += 1;
            }
            Err(error) => {
                output::error_line(format_args!("cannot remove {object}: {error:#}"));
                self.failed += 1;
            }
        }
    }

    /// Rules that the plugins wrote for pods, and the notes of them.
    fn pod_rules(&mut self) -> anyhow::Result<()> {
        for (path, rules) in pod_rules::notes().context("cannot read the plugins' notes")? {
            let name = match &rules {
                Rules::Ports(Ports { holder: Holder::Attachment(of), .. }) => {
                    format!("host ports of container {} in network {}", of.container, of.network)
                }
                Rules::Ports(Ports { holder: Holder::Container(id), .. }) => format!("host ports of container {id}"),
                Rules::Masquerade(of) => {
                    format!("masquerading of container {} in network {}", of.attachment.container, of.attachment.network)
                }
            };
            self.remove(&name, || {
                fs::remove_file(&path)?;
                let removal = match &rules {
                    Rules::Ports(mapped) => {
                        let of = match &mapped.holder {
                            Holder::Attachment(of) => of.clone(),
                            Holder::Container(id) => Attachment { network: String::new(), container: id.clone(), ifname: String::new() },
                        };
                        pod_table::remove(&PORTS, |rule| ports::is_of(rule, &of, &[mapped.address.addr]))
                    }
                    Rules::Masquerade(of) => pod_table::remove(&[Table::Masquerade], |rule| masquerade::is_of(rule, &of.attachment)),
                };
                Ok(removal.map(drop)?)
            });
        }
        Ok(())
    }

    /// Devices with all that belongs to them, routes, nftables tables and iptables chains.
    fn kernel(&mut self, networks: &[Subnet]) -> anyhow::Result<()> {
        let mut kernel = Kernel::open().context("cannot open a netlink socket")?;
        let scope = scope(networks)?;
        let observed = kernel.observe(&scope).context("cannot read the kernel's objects")?;
        if let Some(trouble) = kernel.take_read_error() {
            output::error_line(format_args!("cannot read {trouble}"));
            self.failed += 1;
        }
        let ops = diff(&Desired::default(), &observed, Prune::Yes);
        if self.dry_run {
            ops.iter().for_each(|op| output::line(format_args!("would remove {}", shown(op.object()))));
            self.removed += ops.len();
            return Ok(());
        }
        for (op, outcome) in ops.iter().zip(kernel.apply(&ops)) {
            self.report(&shown(op.object()), outcome.map_err(anyhow::Error::new));
        }
        Ok(())
    }

    /// The pods' bridge, if it has this host's gateway address and no ports.
    fn bridge(&mut self, env: &str) -> anyhow::Result<()> {
        let mut socket = Socket::open(Protocol::Route)?;
        let links = link::list(&mut socket)?;
        let name: IfName = BRIDGE.parse()?;
        let Some(bridge) = links.iter().find(|link| link.name == name && link.kind == "bridge") else { return Ok(()) };
        let subnets = previous_subnets(env);
        let found = addr::list(&mut socket, bridge.index)?;
        let is_ours = found.iter().filter(|found| found.index == bridge.index).any(|found| {
            let ip = found.addr.cidr.addr;
            subnets.get(Family::of(ip)).is_some_and(|subnet| subnet.first_host() == ip)
        });
        let ports = links.iter().filter(|link| link.master == bridge.index).count();
        match (is_ours, ports) {
            (true, 0) => self.remove(&format!("bridge {name}"), || Ok(link::delete(&mut socket, name)?)),
            (true, _) => output::line(format_args!("kept bridge {name}: it has {ports} ports; delete this host's pods first")),
            (false, _) => output::line(format_args!("kept bridge {name}: it does not have the gateway address of a subnet of this host")),
        }
        Ok(())
    }

    fn conf(&mut self, path: &Path) {
        match install_cni::wrote(path) {
            Some(true) => self.remove(&format!("file {}", path.display()), || Ok(fs::remove_file(path)?)),
            Some(false) => output::line(format_args!("kept file {}: install-cni did not write it as it is", path.display())),
            None => {}
        }
    }

    /// `subnet.env`, WireGuard's key, what the daemon keeps beside them, and folders that are empty then. The lock goes last.
    fn files(&mut self, subnet_file: &Path) {
        // Earlier versions had their lock beside the file.
        let hidden = ["writer", "lock"].map(|kind| beside(subnet_file, kind));
        let visible = [subnet_file.to_owned(), socket::beside(subnet_file)].map(Ok);
        // A file that the operator names is the operator's.
        let key = std::env::var_os(app::WIREGUARD_KEY_FILE).is_none().then(|| Ok(app::wireguard_key_file()));
        for path in visible.into_iter().chain(key).chain(hidden).chain([lock_file(subnet_file)]).flatten() {
            if path.exists() {
                self.remove(&format!("file {}", path.display()), || Ok(fs::remove_file(&path)?));
            }
        }
        if self.dry_run {
            return;
        }
        pod_rules::forget_requests();
        let locks = subnet_file.with_file_name(app::LOCKS);
        for folder in
            [Some(Path::new(pod_rules::FOLDER)), Some(&*locks), subnet_file.parent(), Some(Path::new(LOCKS))].into_iter().flatten()
        {
            // Only an empty one goes. The mount of a container, or another user's, stays as well.
            if fs::remove_dir(folder).is_ok() {
                output::line(format_args!("removed folder {}", folder.display()));
            }
        }
    }
}

/// What counts as flannel's. Where no pod network is known, every route with our protocol number does.
fn scope(networks: &[Subnet]) -> anyhow::Result<Scope> {
    let mut socket = Socket::open(Protocol::Route).context("cannot open a netlink socket")?;
    let mut links = Vec::new();
    for info in link::list(&mut socket).context("cannot list the interfaces")? {
        if is_device(&info) && has_address_in(&mut socket, &info, networks)? {
            links.push(info.name);
        }
    }
    let networks = if networks.is_empty() { vec!["0.0.0.0/0".parse()?, "::/0".parse()?] } else { networks.to_vec() };
    for network in &networks {
        ensure!(network.prefix_len() == 0 || network.prefix_len() >= 8, "--network {network}: no pod network is that large");
    }
    Ok(Scope { links, rulesets: Family::ALL.to_vec(), iptables: Family::ALL.to_vec(), networks, ..Scope::default() })
}

/// Is it a VXLAN, IPIP or WireGuard device with a name that flannel gives? (The udp backend's `flannel0` ends with the daemon.)
fn is_device(info: &LinkInfo) -> bool {
    if info.kind == "wireguard" {
        return backend::wireguard::devices().contains(&info.name);
    }
    let name = info.name.as_str();
    let number = name.strip_prefix("flannel.").or_else(|| name.strip_prefix("flannel-v6."));
    let is_vxlan =
        info.vxlan.is_some() && number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()));
    is_vxlan || (info.kind == "ipip" && name == "flannel.ipip")
}

/// Does it belong to one of these networks? Another flanneld on this host has a device and a network of its own. A device
/// without an address, or with no network known, counts.
fn has_address_in(socket: &mut Socket, info: &LinkInfo, networks: &[Subnet]) -> anyhow::Result<bool> {
    let found = addr::list(socket, info.index)?;
    let mut addresses =
        found.iter().filter(|found| found.index == info.index && !found.link_scope).map(|found| found.addr.cidr.addr).peekable();
    let unknown = networks.is_empty() || addresses.peek().is_none();
    Ok(unknown || addresses.any(|ip| networks.iter().any(|network| network.contains(ip))))
}

/// One line for an object: rules are named, not listed.
fn shown(object: &Object) -> String {
    match object {
        Object::Ruleset(_) | Object::Iptables(_) => object.key().to_string(),
        _ => object.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_files_are_beside_the_subnet_file() {
        let file = Path::new("/run/flannel/subnet.env");
        assert_eq!(beside(file, "lock").unwrap(), Path::new("/run/flannel/.subnet.env.lock"));
        assert_eq!(lock_file(file).unwrap(), Path::new("/run/flannel/.locks/subnet.env"));
        assert!(beside(Path::new("/"), "lock").is_err() && lock_file(Path::new("/")).is_err());
    }
}
