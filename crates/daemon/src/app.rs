//! Builds the daemon's parts in order and runs them: the only module that knows all others.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use flannel::alloc::previous_by_devices;
use flannel::backend::extension::Command;
use flannel::backend::{Identity, Local, published_mac};
use flannel::object::{EnvFile, Link, LinkKind};
use flannel::subnet_env::{previous_networks, previous_subnets};
use flannel::traffic::{Flavour, TrafficConfig};
use flannel::{Config, Family, Mac, Node, Peer, PerFamily, Picture, Subnet, store_trust};
use kernel::iptables::Installed;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::facts::{Facts, FactsError, list};
use crate::host::Host;
use crate::http::{Http, Sources};
use crate::kernel_thread::KernelThread;
use crate::notice::{Notice, Notices};
use crate::probe::Measurement;
use crate::ready::{Guard, Ready};
use crate::reconcile::{Inputs, Reconciler, Start};
use crate::settings::RunArgs;
use crate::socket::{self, Listener};
use crate::state::Process;
use crate::store::{self, Access, Claim, Etcd, Kube, Store, StoreError, kube};
use crate::systemd;
use crate::view::View;

/// How long to wait before the store is asked again for what it did not give: doubling from the first to the second.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

/// How long the batch that is being written at the end may take.
const LAST_BATCH: Duration = Duration::from_secs(5);
/// The start timeout of a service manager is extended to this, from each attempt on.
const START_EXTENSION: Duration = Duration::from_secs(60);
/// How long an IPv6 address is waited for while there is an IPv4 one: pods that are added meanwhile would lack the family for life.
const FAMILY_PATIENCE: Duration = Duration::from_secs(10);
/// Name of the guard that is held until this node is set up.
const STARTING: &str = "this node's lease and devices";

/// Runs the daemon until `stop` is ready. A batch that is being written then is finished; forwarding is left in place.
///
/// # Errors
/// When it cannot start, or cannot go on; the text names the flag, field or object and the fix.
pub async fn run(args: &RunArgs, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let _lock = acquire_instance_lock(&args.subnet_file)?;
    let host = KernelThread::start()?;
    tokio::select! {
        ended = daemon(args, host.clone()) => ended,
        () = stop => {
            host.finish(LAST_BATCH).await;
            tracing::info!("stopping; devices, routes and rules stay");
            Ok(())
        }
    }
}

async fn daemon(args: &RunArgs, host: KernelThread) -> anyhow::Result<()> {
    let ready = Ready::default();
    let starting = ready.guard(STARTING);
    let syncing = ready.guard("the first complete list of leases");
    let (publish, view) = watch::channel(Arc::default());
    let (publish_paths, paths) = watch::channel(Arc::default());
    let sources = Sources { ready: ready.clone(), view: view.clone(), paths, process: Arc::new(Process::now(args.probe)) };
    if args.healthz_port > 0 {
        tokio::spawn(Http::bind(args.healthz_ip, args.healthz_port, sources.clone()).await?.serve());
    }
    if let Some(path) = socket::path(args.socket.as_deref(), &args.subnet_file) {
        match Listener::bind(&path) {
            Ok(listener) => drop(tokio::spawn(listener.serve(sources))),
            // Pods do not need it.
            Err(error) => tracing::warn!(socket = %path.display(), %error, "cannot serve flanneld status and monitor"),
        }
    }
    let (notices, queue) = Notices::new();
    if args.probe {
        let (ready, notices) = (ready.clone(), notices.clone());
        tokio::spawn(Measurement { port: args.probe_port, ready, view, paths: publish_paths, notices }.run());
    }
    let parts = Parts { ready, starting, syncing, notices, view: publish };
    if !args.kube_subnet_mgr {
        let access = access(args);
        let store = retry_until_ready(&parts.starting, &parts.notices, async || Ok(Etcd::new(&access)?)).await?;
        return node_daemon(args, store, host, parts).await;
    }
    let access = kube::Access::new(args, |name| std::env::var(name).ok())?;
    let store = retry_until_ready(&parts.starting, &parts.notices, async || {
        Kube::connect(&access, parts.ready.clone(), parts.notices.clone()).await
    })
    .await?;
    tokio::spawn(store.clone().post_all(queue));
    let ended = node_daemon(args, store.clone(), host, parts).await;
    if let Err(error) = &ended {
        store.post_last(Notice::new("FlannelFailed", format!("{error:#}"))).await;
    }
    ended
}

/// How long a flanneld that is about to end is waited for.
const LEAVING: Duration = Duration::from_secs(2);

/// The folder beside `subnet.env` that has its lock. Only the daemon's user can enter it: every user who can open a lock can hold it.
pub(crate) const LOCKS: &str = ".locks";

/// Two daemons with one file would replace each other's work: the second is refused.
fn acquire_instance_lock(subnet_file: &Path) -> anyhow::Result<std::fs::File> {
    let name = subnet_file.file_name().context("--subnet-file: it names no file")?.to_string_lossy();
    let shown = subnet_file.display();
    kernel::lock::alone(&subnet_file.with_file_name(LOCKS), &name, LEAVING).map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => {
            anyhow!("another flanneld ({error}) uses --subnet-file {shown}: stop that one, or give this one a file of its own")
        }
        _ => anyhow!("cannot write beside --subnet-file {shown}: {error}"),
    })
}

/// The parts that exist before the store does.
#[derive(Debug)]
pub struct Parts {
    /// Readiness of the whole.
    pub ready: Ready,
    /// Until this node is set up.
    pub starting: Guard,
    /// Until it has seen all others.
    pub syncing: Guard,
    /// Where operators are notified.
    pub notices: Notices,
    /// Where the view is published.
    pub view: watch::Sender<Arc<View>>,
}

/// Runs a node on any store and any host, until something ends that must not. All that it starts ends with it.
///
/// # Errors
/// As [`run`].
pub async fn node_daemon<S: Store, H: Host + 'static>(args: &RunArgs, store: S, host: H, parts: Parts) -> anyhow::Result<()> {
    let Parts { ready, starting, syncing, notices, view } = parts;
    // The configuration is read again at each attempt: it may be the reason why the interface does not fit.
    let began = tokio::time::Instant::now();
    let (config, facts, node, data, public_key) = retry_until_ready(&starting, &notices, async || {
        let config = store.config().await?;
        store::check_commands(&config, store.config_source(), args.allow_commands)?;
        let facts = Facts::new(args, &store.node_public().await?).map_err(StoreError::Lasting)?;
        let partial = began.elapsed() >= FAMILY_PATIENCE || has_no_ipv6(&config);
        let node = facts.node(&host, &config, PerFamily::default(), partial).await.map_err(|error| match error {
            FactsError::Flags(text) => StoreError::Lasting(anyhow!(text)),
            FactsError::Passing(text) => passing("NoInterface", text),
        })?;
        let data = match config.backend.before_lease() {
            Some((field, command)) => Some(run_command(&host, field, command).await?),
            None => None,
        };
        let public_key = match config.backend.needs_key() {
            true => Some(host.wireguard_key(&wireguard_key_file()).await.map_err(|text| passing("WireGuardKey", text))?),
            false => None,
        };
        Ok((config, facts, node, data, public_key))
    })
    .await?;
    for note in config.backend.notes(&node) {
        tracing::warn!(note, "network config adjusted");
    }
    tracing::info!(
        interface = %node.ext, address = %list(&node.addrs), published = %list(&node.public), mtu = node.mtu,
        backend = config.backend.name(), "interface chosen"
    );
    let published = async || retry_until_ready(&starting, &notices, async || store.published(&config, node.public).await).await;
    let macs = vtep_macs(&host, &config, &node, published).await?;
    let identity = Identity { macs, public_key, ..Identity::default() }.with_output(data.as_deref().unwrap_or_default());
    // The file that an earlier run left.
    let before = host.env_file(&args.subnet_file);
    let claim = Claim {
        config: config.clone(),
        peer: config.backend.own_peer(Local { config: &config, node: &node, identity: &identity }),
        addrs: node.addrs,
        previous: previous(&host, before.as_ref(), &config).await?,
        previous_leases: before.as_ref().map(|file| file.etcd_leases.clone()).unwrap_or_default(),
        margin: Duration::from_secs(args.subnet_lease_renew_margin * 60),
    };
    let held = retry_until_ready(&starting, &notices, async || store.acquire(&claim).await).await?;
    match held.is_new {
        true => tracing::info!(subnet = %held.key, "lease acquired"),
        false => tracing::info!(subnet = %held.key, "lease reused"),
    }

    let earlier = before.as_ref().map(|file| previous_networks(&file.text)).unwrap_or_default();
    let has_forgotten = store_trust::has_forgotten(held.is_new, before.as_ref(), &config, &claim.previous);
    // The file and the routes have the same life: neither survives a reboot.
    let was_here = config.networks.iter().any(|(_, network)| earlier.contains(&network.network)) && before.is_none_or(|file| !file.ours);
    let adopt = was_here && config.backend.has_plain_routes();
    let picture = Picture::new(config.clone(), node, identity, traffic(args, &config), held.key).with(args.ip_blackhole_route, &earlier);
    let mut picture = picture.with_file(args.subnet_file.clone(), args.ip_masq, claim.previous_leases.clone());
    picture.add_etcd_lease(held.etcd_lease);
    if let Some((field, command)) = picture.after_lease() {
        retry_until_ready(&starting, &notices, async || run_command(&host, field, command.clone()).await).await?;
    }
    let resync = Duration::from_secs(args.iptables_resync);
    let about = Box::new({
        let store = store.clone();
        move || store.about()
    });
    let start = Start { picture, host, facts, resync, adopt, has_forgotten, starting, syncing, notices: notices.clone(), view, about };
    let reconciler = Reconciler::start(start).await?;

    let (publish_held, held) = watch::channel(held);
    let (lose, lost) = mpsc::channel(1);
    let (publish_following, following) = watch::channel(store::Following::default());
    let (send, events) = mpsc::channel(16);
    let (publish_claim, claims) = watch::channel(claim);
    let mut tasks = JoinSet::new();
    tasks.spawn(store.clone().keep(claims, publish_held, lost));
    tasks.spawn(store.follow(config, send, store::Link::new(publish_following, ready.clone(), notices)));
    tasks.spawn(async move {
        ready.passed(STARTING).await;
        systemd::notify_ready();
    });
    reconciler.run(Inputs { events, held, lost: lose, claim: publish_claim, following }).await?;
    bail!("a part of the daemon ended unexpectedly")
}

/// The variable of the environment that names the file with this host's WireGuard key.
pub(crate) const WIREGUARD_KEY_FILE: &str = "WIREGUARD_KEY_FILE";

/// The file with this host's WireGuard key: as upstream's, also in the meaning of an empty variable.
pub(crate) fn wireguard_key_file() -> PathBuf {
    std::env::var_os(WIREGUARD_KEY_FILE).map_or_else(|| PathBuf::from("/run/flannel/wgkey"), PathBuf::from)
}

/// The subnets that this host had before: by the file that an earlier run left, else by its devices.
async fn previous(host: &impl Host, before: Option<&EnvFile>, config: &Config) -> anyhow::Result<PerFamily<Subnet>> {
    Ok(match before {
        Some(file) => previous_subnets(&file.text),
        None => previous_by_devices(config, &host.network(None).await?.interfaces),
    })
}

/// Whether the network has IPv6, but the host has it switched off: there is no address to wait for.
fn has_no_ipv6(config: &Config) -> bool {
    let is_off = |file: &str| kernel::sysctl::read(file).is_ok_and(|value| value.is_none_or(|value| value == "1"));
    config.network(Family::V6).is_some() && is_off("net/ipv6/conf/all/disable_ipv6")
}

fn passing(reason: &'static str, text: String) -> StoreError {
    StoreError::Passing(Notice::new(reason, text))
}

/// Asks until there is an answer. An obstacle is logged once, is on `/readyz` for as long as it lasts, and becomes a notice if it is
/// still there the next time: a Node that waits a moment for its pod CIDR concerns no operator.
async fn retry_until_ready<T>(guard: &Guard, notices: &Notices, ask: impl AsyncFn() -> Result<T, StoreError>) -> anyhow::Result<T> {
    let mut logged = String::new();
    let mut unsent = None;
    let mut wait = ASK_AGAIN.0;
    loop {
        match ask().await {
            Ok(answer) => {
                guard.say("");
                return Ok(answer);
            }
            Err(StoreError::Lasting(error)) => return Err(error),
            Err(StoreError::Passing(notice)) if notice.text != logged => {
                tracing::warn!(reason = notice.text, "waiting; trying again");
                guard.say(&notice.text);
                logged.clone_from(&notice.text);
                unsent = Some(notice);
            }
            Err(StoreError::Passing(_)) => unsent.take().into_iter().for_each(|notice| notices.put(notice)),
        }
        systemd::extend_start(START_EXTENSION);
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
        is_default: !args.etcd_endpoints_named,
        prefix: args.etcd_prefix.clone(),
        ca: args.etcd_cafile.clone(),
        cert: args.etcd_certfile.clone(),
        key: args.etcd_keyfile.clone(),
        login,
    }
}

/// Runs a command of the operator; one that fails may succeed next time.
async fn run_command(host: &impl Host, field: &str, command: Command) -> Result<String, StoreError> {
    host.run(command).await.map_err(|error| passing("CommandFailed", format!("network config: {field}: {error:#}")))
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
    for (family, _) in config.networks.iter() {
        let Some(device) = config.backend.vtep(family) else { continue };
        let link = host.link(device).await?;
        // A device of another address has published its MAC with that: peers would have two hosts for one MAC.
        let local = node.addrs.get(family).copied();
        let is_ours = |link: &Link| matches!(link.kind, LinkKind::Vxlan { local: at, .. } if Some(at) == local);
        let mac = match link.filter(is_ours).map(|link| link.mac).filter(|mac| mac.is_unicast()) {
            Some(mac) => mac,
            None => {
                let known = published().await?.and_then(|peer| published_mac(&peer, family));
                known.unwrap_or_else(|| Mac::local(std::array::from_fn(|_| fastrand::u8(..))))
            }
        };
        macs.set(family, Some(mac));
    }
    Ok(macs)
}
