//! Builds the daemon's parts in order and runs them: the only module that knows all others.

use std::time::Duration;

use anyhow::{Context, bail};
use flannel::backend::device_name;
use flannel::backend::extension::Command;
use flannel::config::BackendConfig;
use flannel::node::Wanted;
use flannel::traffic::{Flavour, TrafficConfig};
use flannel::{Backend, Config, Family, Mac, Node, PerFamily, Picture};
use kernel::iptables::Installed;
use tokio::sync::{mpsc, watch};

use crate::cli::RunArgs;
use crate::http::Http;
use crate::keeper::{AcquireError, Keeper};
use crate::kernel_thread::KernelThread;
use crate::ready::Ready;
use crate::reconcile::{Inputs, Reconciler};
use crate::store::{Access, Store, StoreError};
use crate::subnet_file::SubnetFile;

/// How long to wait before the store is asked again for what it did not give.
const ASK_AGAIN: Duration = Duration::from_secs(1);

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
    let ready = Ready::default();
    let starting = ready.guard("this node's lease and devices");
    let syncing = ready.guard("the first complete list of leases");
    let store = Store::new(&access(args))?;
    let (ask, asks) = mpsc::channel(4);
    if args.healthz_port > 0 {
        tokio::spawn(Http::bind(args.healthz_ip, args.healthz_port, ready.clone(), ask.clone()).await?.serve());
    }
    let kernel = KernelThread::start()?;
    let config = config(&store).await?;
    let node = node(args, &kernel, &config).await?;
    tracing::info!(interface = %node.ext, address = %list(&node.addrs), published = %list(&node.public), mtu = node.mtu, backend = config.backend.name(), "this node");
    let macs = vtep_macs(&store, &kernel, &config, &node).await?;
    let mut backend = Backend::new(&config, &node, macs);
    if let BackendConfig::Extension(extension) = &config.backend
        && let Some(command) = flannel::backend::extension::pre_startup(extension)
    {
        backend = backend.with_output(&run_command(&kernel, "Backend.PreStartupCommand", command).await?);
    }
    let subnet_file = SubnetFile { path: args.subnet_file.clone(), ip_masq: args.ip_masq };
    let margin = Duration::from_secs(args.subnet_lease_renew_margin * 60);
    let keeper = Keeper { store: store.clone(), config: config.clone(), peer: backend.own_peer(&config, &node), margin };
    let held = acquire(&keeper, &subnet_file.previous()).await?;
    tracing::info!(subnet = %held.key, reservation = held.etcd_lease == 0, "acquired the lease");

    let traffic = traffic(args, &config);
    let earlier = subnet_file.previous_networks();
    // The file and the routes have the same life: neither survives a reboot.
    let was_here = config.networks.iter().any(|(_, network)| earlier.contains(&network.network)) && !subnet_file.is_ours();
    let plain_routes = match &config.backend {
        BackendConfig::HostGw => true,
        BackendConfig::Vxlan(vxlan) => vxlan.direct_routing,
        _ => false,
    };
    let adopt = was_here && plain_routes;
    let picture = Picture::new(config, node, backend, traffic, held.key).with(args.ip_blackhole_route, &earlier);
    if let Some(command) = picture.post_startup() {
        run_command(&kernel, "Backend.PostStartupCommand", command).await?;
    }
    let resync = Duration::from_secs(args.iptables_resync);
    let reconciler = Reconciler::start(picture, kernel, subnet_file, resync, adopt, syncing).await?;
    tracing::info!(file = %args.subnet_file.display(), "this node's devices and rules are in place");
    drop(starting);
    notify_ready();

    let (publish_held, held) = watch::channel(held);
    let (lose, lost) = mpsc::channel(1);
    let (publish_connected, connected) = watch::channel(false);
    let (tell, events) = mpsc::channel(16);
    tokio::spawn(keeper.run(publish_held, lost));
    tokio::spawn(async move { store.follow(tell, publish_connected).await });
    // The daemon keeps one sender of questions, so that the loop does not end where there is no health server.
    let _ask = ask;
    reconciler.run(Inputs { events, held, lost: lose, connected, asks }).await?;
    bail!("a part of the daemon ended unexpectedly")
}

/// How the store is reached.
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

/// The network configuration. An absent store or configuration is waited for; one that cannot be used is an error.
async fn config(store: &Store) -> anyhow::Result<Config> {
    let mut said = String::new();
    loop {
        let problem = match store.config().await {
            Ok(Some(text)) => {
                let text = String::from_utf8(text).with_context(|| format!("{} in etcd is no UTF-8 text", store.config_key()))?;
                let config = Config::parse(&text).with_context(|| format!("{} in etcd cannot be used", store.config_key()))?;
                return Ok(config);
            }
            Ok(None) => format!("there is no network config in etcd yet: put one at {}", store.config_key()),
            Err(error) => error.to_string(),
        };
        if problem != said {
            tracing::warn!("waiting: {problem}");
            said = problem;
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

async fn run_command(kernel: &KernelThread, field: &str, command: Command) -> anyhow::Result<String> {
    let said = kernel.call(move |_| kernel::command::run(&command)).await;
    said.with_context(|| format!("network config: {field}"))
}

/// What the traffic rules shall be, and in which flavour: `EnableNFTables` says, and what the host has.
fn traffic(args: &RunArgs, config: &Config) -> TrafficConfig {
    let wanted = !args.ip_masq_fully_random_disable;
    let mut traffic =
        TrafficConfig { masquerade: args.ip_masq, fully_random: wanted, forward: args.iptables_forward_rules, flavour: Flavour::Nftables };
    if config.nftables || !(traffic.masquerade || traffic.forward) {
        return traffic;
    }
    let programs: Option<Vec<Installed>> = config.networks.iter().map(|(family, _)| kernel::iptables::installed(family)).collect();
    match programs.as_deref() {
        Some([first, ..]) => {
            traffic.flavour = Flavour::Iptables(first.variant);
            traffic.fully_random = wanted && first.random_fully;
            for (family, file) in [(Family::V4, "bridge-nf-call-iptables"), (Family::V6, "bridge-nf-call-ip6tables")] {
                if config.network(family).is_some() && !std::path::Path::new("/proc/sys/net/bridge").join(file).exists() {
                    tracing::warn!(
                        missing = file,
                        "br_netfilter is not loaded: what pods of one host send each other by a service's address will miss kube-proxy's rules (modprobe br_netfilter)"
                    );
                }
            }
        }
        _ => tracing::warn!("iptables is not installed: the traffic rules are written to nftables, as if EnableNFTables were true"),
    }
    traffic
}

async fn node(args: &RunArgs, kernel: &KernelThread, config: &Config) -> anyhow::Result<Node> {
    let target = args.iface_can_reach;
    let facts = kernel.call(move |kernel| {
        let reach = target.map(|ip| (ip, kernel.reach(ip).map_err(|error| error.to_string())));
        anyhow::Ok((kernel.interfaces()?, kernel.route_facts()?, reach))
    });
    let (interfaces, routes, can_reach) = facts.await.context("cannot read the kernel's interfaces and routes")?;
    let wanted = Wanted {
        iface: args.iface.clone(),
        iface_regex: args.iface_regex.clone(),
        can_reach,
        public: PerFamily { v4: args.public_ip, v6: args.public_ipv6 },
    };
    let node = Node::choose(&interfaces, &routes, &wanted, config)?;
    if let BackendConfig::Vxlan(vxlan) = &config.backend
        && let Some(mtu) = vxlan.mtu.filter(|mtu| *mtu > node.mtu)
    {
        tracing::warn!("network config: Backend.MTU: {mtu} is more than {} carries: using its {}", node.ext, node.mtu);
    }
    if config.backend == BackendConfig::HostGw && node.public.v4 != node.addrs.v4 {
        bail!(
            "--public-ip: {} is not the address of {}: host-gw needs the interface's own, because peers use it as gateway",
            list(&node.public),
            node.ext
        );
    }
    Ok(node)
}

/// The link-layer addresses of this host's VTEPs: that of the device that is there, else that of the lease that this
/// host published before (peers know it), else a random one.
async fn vtep_macs(store: &Store, kernel: &KernelThread, config: &Config, node: &Node) -> anyhow::Result<PerFamily<Mac>> {
    let mut macs = PerFamily::default();
    let BackendConfig::Vxlan(vxlan) = &config.backend else { return Ok(macs) };
    for (family, _) in config.networks.iter() {
        let name = device_name(family, vxlan.vni);
        let link = kernel.call(move |kernel| kernel.link(name)).await?;
        // A device of another address has published its MAC with that: peers would have two hosts for one MAC.
        let local = node.addrs.get(family).copied();
        let device = link
            .filter(|link| link.vxlan.is_some_and(|vxlan| vxlan.local == local))
            .and_then(|link| link.mac)
            .filter(|mac| mac.is_unicast());
        let mac = match device {
            Some(mac) => mac,
            None => match published_mac(store, node, family).await {
                Some(mac) => mac,
                None => Mac::local(std::array::from_fn(|_| fastrand::u8(..))),
            },
        };
        macs.set(family, Some(mac));
    }
    Ok(macs)
}

async fn published_mac(store: &Store, node: &Node, family: Family) -> Option<Mac> {
    let snapshot = store.snapshot().await.ok()?;
    let mut peers = snapshot.entries.iter().filter_map(|entry| entry.peer.as_ref());
    let own = peers.find(|peer| flannel::alloc::is_mine(&peer.public, &node.public) && &*peer.backend_type == "vxlan")?;
    flannel::backend::vtep_mac(own, family).ok()
}

/// Acquires the lease. A store that does not answer is waited for; a full network is an error.
async fn acquire(keeper: &Keeper, previous: &PerFamily<flannel::Subnet>) -> anyhow::Result<crate::keeper::Held> {
    let mut said = String::new();
    loop {
        match keeper.acquire(previous).await {
            Ok(held) => return Ok(held),
            Err(error @ (AcquireError::Store(StoreError::Unreachable { .. }) | AcquireError::Races)) => {
                if error.to_string() != said {
                    said = error.to_string();
                    tracing::warn!("waiting for a lease: {said}");
                }
                tokio::time::sleep(ASK_AGAIN).await;
            }
            Err(error) => return Err(error).context("cannot acquire a lease"),
        }
    }
}

fn list(addrs: &PerFamily<std::net::IpAddr>) -> String {
    addrs.iter().map(|(_, ip)| ip.to_string()).collect::<Vec<_>>().join(",")
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
