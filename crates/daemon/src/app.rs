//! Builds the daemon's parts in order and runs them: the only module that knows all others.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use flannel::backend::device_name;
use flannel::backend::extension::Command;
use flannel::config::BackendConfig;
use flannel::desired::{Link, LinkKind};
use flannel::subnet_env::{previous_networks, previous_subnets};
use flannel::traffic::{Flavour, TrafficConfig};
use flannel::{Backend, Config, Family, Mac, Node, Peer, PerFamily, Picture};
use kernel::iptables::Installed;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::facts::{Facts, list};
use crate::host::Host;
use crate::http::Http;
use crate::kernel_thread::KernelThread;
use crate::notice::{Notice, Notices};
use crate::ready::{Guard, Ready};
use crate::reconcile::{Inputs, Reconciler, Start};
use crate::settings::RunArgs;
use crate::state::State;
use crate::store::{self, Access, Claim, Etcd, Kube, Obstacle, Store, kube};

/// How long to wait before the store is asked again for what it did not give: doubling from the first to the second.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

/// Runs the daemon until `stop` is ready. Forwarding is left in place at the end.
///
/// # Errors
/// When it cannot start, or cannot go on; the text names the flag, field or object and the fix.
pub async fn run(args: &RunArgs, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    tokio::select! {
        ended = daemon(args) => ended,
        () = stop => {
            tracing::info!("stopping; devices, routes and rules stay as they are");
            Ok(())
        }
    }
}

async fn daemon(args: &RunArgs) -> anyhow::Result<()> {
    let _alone = alone(&args.subnet_file)?;
    let ready = Ready::default();
    let starting = ready.guard("this node's lease and devices");
    let syncing = ready.guard("the first complete list of leases");
    let (ask, asks) = mpsc::channel(4);
    if args.healthz_port > 0 {
        tokio::spawn(Http::bind(args.healthz_ip, args.healthz_port, ready.clone(), ask.clone()).await?.serve());
    }
    // The daemon keeps one sender of questions, so that the loop does not end where there is no health server.
    let _ask = ask;
    let (notices, told) = Notices::new();
    let parts = Parts { ready, starting, syncing, notices, asks };
    let host = KernelThread::start()?;
    if !args.kube_subnet_mgr {
        return node_daemon(args, Etcd::new(&access(args))?, host, parts).await;
    }
    let access = kube::Access::new(args, |name| std::env::var(name).ok())?;
    let store =
        persist(&parts.starting, &parts.notices, async || Kube::connect(&access, parts.ready.clone(), parts.notices.clone()).await).await?;
    tokio::spawn(store.clone().post_all(told));
    let ended = node_daemon(args, store.clone(), host, parts).await;
    if let Err(error) = &ended {
        store.post_last(Notice::new("FlannelFailed", format!("{error:#}"))).await;
    }
    ended
}

/// How long a flanneld that is about to end is waited for.
const LEAVING: Duration = Duration::from_secs(2);

/// Two daemons with one file would undo each other's work: the second is refused.
fn alone(subnet_file: &Path) -> anyhow::Result<std::fs::File> {
    let name = subnet_file.file_name().context("--subnet-file: it names no file")?.to_string_lossy();
    let shown = subnet_file.display();
    kernel::lock::alone(&subnet_file.with_file_name(format!(".{name}.lock")), LEAVING).map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => {
            anyhow!("another flanneld ({error}) uses --subnet-file {shown}: stop that one, or give this one a file of its own")
        }
        _ => anyhow!("cannot write beside --subnet-file {shown}: {error}"),
    })
}

/// What is there before the store is.
#[derive(Debug)]
pub struct Parts {
    /// Readiness of the whole.
    pub ready: Ready,
    /// Until this node is set up.
    pub starting: Guard,
    /// Until it has seen all others.
    pub syncing: Guard,
    /// Where an operator is told.
    pub notices: Notices,
    /// Questions after the state.
    pub asks: mpsc::Receiver<oneshot::Sender<State>>,
}

/// Runs a node on any store and any host, until something ends that must not. All that it starts ends with it.
///
/// # Errors
/// As [`run`].
pub async fn node_daemon<S: Store, H: Host>(args: &RunArgs, store: S, host: H, parts: Parts) -> anyhow::Result<()> {
    let Parts { ready, starting, syncing, notices, asks } = parts;
    let config = persist(&starting, &notices, async || store.config().await).await?;
    let public = persist(&starting, &notices, async || store.node_public().await).await?;
    let facts = Facts::new(args, &public);
    let node = facts.node(&host, &config, PerFamily::default()).await?;
    if let BackendConfig::Vxlan(vxlan) = &config.backend
        && let Some(mtu) = vxlan.mtu.filter(|mtu| *mtu > node.mtu)
    {
        tracing::warn!("network config: Backend.MTU: {mtu} is more than {} carries: using its {}", node.ext, node.mtu);
    }
    tracing::info!(interface = %node.ext, address = %list(&node.addrs), published = %list(&node.public), mtu = node.mtu, backend = config.backend.name(), "this node");
    let macs =
        vtep_macs(&host, &config, &node, async || persist(&starting, &notices, async || store.published(&config, node.public).await).await)
            .await?;
    let mut backend = Backend::new(&config, &node, macs);
    if let BackendConfig::Extension(extension) = &config.backend
        && let Some(command) = flannel::backend::extension::pre_startup(extension)
    {
        backend = backend.with_output(&run_command(&host, "Backend.PreStartupCommand", command).await?);
    }
    // The file that a run before this one left.
    let before = host.env_file(&args.subnet_file);
    let claim = Claim {
        config: config.clone(),
        peer: backend.own_peer(&config, &node),
        addrs: node.addrs,
        previous: before.as_ref().map(|file| previous_subnets(&file.text)).unwrap_or_default(),
        previous_leases: before.as_ref().map(|file| file.etcd_leases.clone()).unwrap_or_default(),
        margin: Duration::from_secs(args.subnet_lease_renew_margin * 60),
    };
    let held = persist(&starting, &notices, async || store.acquire(&claim).await).await?;
    tracing::info!(subnet = %held.key, "acquired the lease");

    let traffic = traffic(args, &config);
    let earlier = before.as_ref().map(|file| previous_networks(&file.text)).unwrap_or_default();
    // The file and the routes have the same life: neither survives a reboot.
    // A store that does not know the lease that this node had before, and could still have, may have lost all others' as well.
    let knew = before.as_ref().is_some_and(|file| file.ours && !file.etcd_leases.is_empty());
    let has_forgotten = held.is_new && knew && flannel::alloc::is_admitted(&config, &claim.previous);
    let was_here = config.networks.iter().any(|(_, network)| earlier.contains(&network.network)) && before.is_none_or(|file| !file.ours);
    let plain_routes = match &config.backend {
        BackendConfig::HostGw => true,
        BackendConfig::Vxlan(vxlan) => vxlan.direct_routing,
        _ => false,
    };
    let adopt = was_here && plain_routes;
    let picture = Picture::new(config.clone(), node, backend, traffic, held.key).with(args.ip_blackhole_route, &earlier);
    let mut picture = picture.with_file(args.subnet_file.clone(), args.ip_masq, claim.previous_leases.clone());
    picture.add_etcd_lease(held.etcd_lease);
    if let Some(command) = picture.post_startup() {
        run_command(&host, "Backend.PostStartupCommand", command).await?;
    }
    let resync = Duration::from_secs(args.iptables_resync);
    let start = Start { picture, host, facts, resync, adopt, has_forgotten, syncing, notices: notices.clone() };
    let reconciler = Reconciler::start(start).await?;
    tracing::info!(file = %args.subnet_file.display(), "this node's devices and rules are in place");
    drop(starting);
    notify_ready();

    let (publish_held, held) = watch::channel(held);
    let (lose, lost) = mpsc::channel(1);
    let (publish_connected, connected) = watch::channel(false);
    let (tell, events) = mpsc::channel(16);
    let (publish_claim, claims) = watch::channel(claim);
    let mut tasks = JoinSet::new();
    tasks.spawn(store.clone().keep(claims, publish_held, lost));
    tasks.spawn(store.follow(config, tell, store::Link::new(publish_connected, ready, notices)));
    reconciler.run(Inputs { events, held, lost: lose, claim: publish_claim, connected, asks }).await?;
    bail!("a part of the daemon ended unexpectedly")
}

/// Asks until there is an answer. What is in the way is logged once, is on `/readyz` for as long as it lasts, and becomes a
/// notice if it is still there the next time: a Node that waits a moment for its pod CIDR is nobody's concern.
async fn persist<T>(guard: &Guard, notices: &Notices, ask: impl AsyncFn() -> Result<T, Obstacle>) -> anyhow::Result<T> {
    let mut said = String::new();
    let mut untold = None;
    let mut wait = ASK_AGAIN.0;
    loop {
        match ask().await {
            Ok(answer) => {
                guard.say("");
                return Ok(answer);
            }
            Err(Obstacle::Lasting(error)) => return Err(error),
            Err(Obstacle::Passing(notice)) if notice.text != said => {
                tracing::warn!("waiting: {}", notice.text);
                guard.say(&notice.text);
                said.clone_from(&notice.text);
                untold = Some(notice);
            }
            Err(Obstacle::Passing(_)) => untold.take().into_iter().for_each(|notice| notices.put(notice)),
        }
        tokio::time::sleep(wait.mul_f64(0.75 + 0.5 * fastrand::f64())).await;
        wait = (wait * 2).min(ASK_AGAIN.1);
    }
}

/// How etcd is reached.
fn access(args: &RunArgs) -> Access {
    let login = match (&args.etcd_username, &args.etcd_password) {
        (Some(name), Some(password)) => Some((name.clone(), password.clone())),
        (None, None) => None,
        _ => {
            tracing::warn!("--etcd-username and --etcd-password: only one of them is given, so neither is used");
            None
        }
    };
    Access {
        endpoints: args.etcd_endpoints.clone(),
        prefix: args.etcd_prefix.clone(),
        ca: args.etcd_cafile.clone(),
        cert: args.etcd_certfile.clone(),
        key: args.etcd_keyfile.clone(),
        login,
    }
}

async fn run_command(host: &impl Host, field: &str, command: Command) -> anyhow::Result<String> {
    host.run(command).await.with_context(|| format!("network config: {field}"))
}

/// What the traffic rules shall be, and in which flavour: `EnableNFTables` says, and what the host has.
fn traffic(args: &RunArgs, config: &Config) -> TrafficConfig {
    let wanted = !args.ip_masq_fully_random_disable;
    let mut traffic =
        TrafficConfig { masquerade: args.ip_masq, fully_random: wanted, forward: args.iptables_forward_rules, flavour: Flavour::Nftables };
    if args.kube_subnet_mgr {
        look_for_br_netfilter(config);
    }
    if config.nftables || !(traffic.masquerade || traffic.forward) {
        return traffic;
    }
    let programs: Option<Vec<Installed>> = config.networks.iter().map(|(family, _)| kernel::iptables::installed(family)).collect();
    match programs.as_deref() {
        Some([first, ..]) => {
            traffic.flavour = Flavour::Iptables(first.variant);
            traffic.fully_random = wanted && first.random_fully;
            if !args.kube_subnet_mgr {
                look_for_br_netfilter(config);
            }
        }
        _ => tracing::warn!("iptables is not installed: the traffic rules are written to nftables, as if EnableNFTables were true"),
    }
    traffic
}

/// Says so when packets between pods of one host pass by the host's rules.
fn look_for_br_netfilter(config: &Config) {
    for (family, file) in [(Family::V4, "bridge-nf-call-iptables"), (Family::V6, "bridge-nf-call-ip6tables")] {
        if config.network(family).is_some() && !std::path::Path::new("/proc/sys/net/bridge").join(file).exists() {
            tracing::warn!(
                missing = file,
                "br_netfilter is not loaded: what pods of one host send each other by a service's address will miss kube-proxy's rules (modprobe br_netfilter)"
            );
        }
    }
}

/// The link-layer addresses of this host's VTEPs: that of the device that is there, else that of the lease that this
/// host published before (peers know it), else a random one.
async fn vtep_macs(
    host: &impl Host,
    config: &Config,
    node: &Node,
    published: impl AsyncFn() -> anyhow::Result<Option<Peer>>,
) -> anyhow::Result<PerFamily<Mac>> {
    let mut macs = PerFamily::default();
    let BackendConfig::Vxlan(vxlan) = &config.backend else { return Ok(macs) };
    for (family, _) in config.networks.iter() {
        let name = device_name(family, vxlan.vni);
        let link = host.link(name).await?;
        // A device of another address has published its MAC with that: peers would have two hosts for one MAC.
        let local = node.addrs.get(family).copied();
        let is_ours = |link: &Link| matches!(link.kind, LinkKind::Vxlan { local: at, .. } if Some(at) == local);
        let device = link.filter(is_ours).map(|link| link.mac).filter(|mac| mac.is_unicast());
        let mac = match device {
            Some(mac) => mac,
            None => {
                let before = published().await?.filter(|peer| &*peer.backend_type == "vxlan");
                let known = before.and_then(|peer| flannel::backend::vtep_mac(&peer, family).ok());
                known.unwrap_or_else(|| Mac::local(std::array::from_fn(|_| fastrand::u8(..))))
            }
        };
        macs.set(family, Some(mac));
    }
    Ok(macs)
}

/// Tells systemd that the node is set up (sd_notify(3)); without `NOTIFY_SOCKET` there is nobody to tell.
fn notify_ready() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&name),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "cannot tell the service manager that this node is ready");
    }
}
