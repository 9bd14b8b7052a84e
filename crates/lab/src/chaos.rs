//! `lab chaos`: everything goes wrong, in an order drawn from a seed, and pods must reach each other all the same. Two hosts are
//! never struck themselves: between those no packet may be lost at all, whatever happens to the store and to the others.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use kernel::netns::Netns;
use serde_json::json;

use crate::faults::{FAULTS, Fault, Noticed, PORT, observe, shell, silent_pairs};
use crate::ping::ping_each;
use crate::{Lab, Plan, Pod, Topology, world};

/// Hosts that nobody strikes: the first ones.
const SPARED: usize = 2;
/// How soon after a step all pairs that can must carry again. The longest wait of a daemon between two tries to reach its store
/// is five seconds and a half.
const BOUND: Duration = Duration::from_secs(15);

/// What `lab chaos` is told.
#[derive(Debug, Clone, Args)]
pub struct ChaosArgs {
    /// What everything is drawn from: the same seed does the same things again [default: another each time]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// How long it goes on
    #[arg(long, default_value_t = 10.0, value_name = "MINUTES")]
    pub minutes: f64,
    /// Number of hosts, 4 to 20
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub hosts: usize,
    /// Backend: host-gw or vxlan
    #[arg(long, default_value = "vxlan", value_name = "TYPE")]
    pub backend: String,
}

/// One thing that is done.
#[derive(Debug, Clone, Copy)]
enum Step {
    Fault(&'static Fault),
    VtepMac,
    Mtu,
    Address,
    NewInterface,
    KillDaemon,
    SecondDaemon,
    Pod,
    Cut,
    KillStore,
    PauseStore,
    RestoreStore,
    EmptyStore,
    Backup,
    Partition,
    DeleteLease,
    Junk,
}

impl Step {
    fn draw(backend: &str) -> Step {
        const OTHERS: [Step; 16] = [
            Step::VtepMac,
            Step::Mtu,
            Step::Address,
            Step::NewInterface,
            Step::KillDaemon,
            Step::SecondDaemon,
            Step::Pod,
            Step::Cut,
            Step::KillStore,
            Step::PauseStore,
            Step::RestoreStore,
            Step::EmptyStore,
            Step::Backup,
            Step::Partition,
            Step::DeleteLease,
            Step::Junk,
        ];
        let faults: Vec<&Fault> = FAULTS.iter().filter(|fault| fault.fits(backend, true)).collect();
        match fastrand::usize(..2 * OTHERS.len()) {
            at if at < OTHERS.len() => OTHERS[at],
            _ => Step::Fault(faults[fastrand::usize(..faults.len())]),
        }
    }
}

struct Chaos {
    lab: Lab,
    root: PathBuf,
    backend: String,
    pods: Vec<Pod>,
    began: Instant,
    seed: u64,
    steps: u32,
    backup: bool,
    worst: (Duration, String),
}

/// Runs it, and prints a trace. True if all held.
///
/// # Errors
/// When something did not hold: the text says what, and the seed.
pub fn run(program: &Path, scratch: &Path, args: &ChaosArgs) -> anyhow::Result<bool> {
    ensure!((4..=20).contains(&args.hosts), "--hosts: {} is out of range: chaos wants 4 to 20", args.hosts);
    ensure!(matches!(args.backend.as_str(), "host-gw" | "vxlan"), "--backend {}: chaos knows host-gw and vxlan", args.backend);
    let length = Duration::try_from_secs_f64(args.minutes * 60.0).ok().filter(|length| *length < Duration::from_secs(86_400));
    let length = length.with_context(|| format!("--minutes: {} is no number of minutes under a day", args.minutes))?;
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    fastrand::seed(seed);
    println!("chaos --seed {seed} --minutes {} --hosts {} --backend {}", args.minutes, args.hosts, args.backend);

    let plan = Plan { topology: Topology::Switch, ..Plan::new(args.hosts, &json!({ "Type": args.backend }), program) };
    let root = scratch.join("chaos");
    let mut lab = Lab::start(plan, &root)?;
    lab.settle()?;
    let pods: Vec<Pod> = (0..args.hosts).map(|host| lab.add_pod(host)).collect::<anyhow::Result<_>>()?;
    pods.iter().try_for_each(|pod| lab.map_port(pod, "ADD", PORT))?;
    for host in &lab.hosts {
        // Somebody else's route, which must be there at the end.
        shell(&host.netns, "ip route add 10.244.251.0/24 via 10.0.0.254 dev lo onlink proto static metric 77")?;
    }
    let (from, to) = (Netns::open(&pods[0].path)?, pods[1].address);
    let began = Instant::now();
    let mut chaos = Chaos {
        lab,
        root,
        backend: args.backend.clone(),
        pods,
        began,
        seed,
        steps: 0,
        backup: false,
        worst: (Duration::ZERO, String::new()),
    };
    let mut outcome = Ok(());
    // A number for each request is 16 bits wide.
    let every = (length / 60_000).max(Duration::from_millis(5));
    let (sent, lost) = ping_each(every, &from, to, || {
        outcome = (|| {
            while began.elapsed() < length {
                chaos.step()?;
            }
            chaos.end()
        })();
    })?;
    outcome.with_context(|| format!("--seed {seed}, step {}", chaos.steps))?;
    println!(
        "held: {} steps in {:.0} s; the longest until all carried again was {:.2} s ({}); of {sent} pings between spared hosts {lost} lost",
        chaos.steps,
        began.elapsed().as_secs_f64(),
        chaos.worst.0.as_secs_f64(),
        chaos.worst.1
    );
    ensure!(lost == 0, "--seed {seed}: {lost} of {sent} pings between hosts that nobody struck were lost");
    Ok(true)
}

impl Chaos {
    fn step(&mut self) -> anyhow::Result<()> {
        self.steps += 1;
        let mut texts = Vec::new();
        let mut cut = None;
        for _ in 0..fastrand::u32(1..=3) {
            let host = fastrand::usize(SPARED..self.lab.hosts.len());
            let step = Step::draw(&self.backend);
            let text = self.act(step, host, &mut cut).with_context(|| format!("{}: {step:?}", self.lab.hosts[host].name))?;
            texts.push(text);
        }
        let what = texts.join("; ");
        let took = self.all_carry(cut.map(|(host, _)| host)).with_context(|| what.clone())?;
        if let Some((host, length)) = cut {
            std::thread::sleep(length);
            let name = self.lab.hosts[host].name.clone();
            shell(&self.lab.middle, &format!("ip link set {name} up"))?;
            self.all_carry(None).with_context(|| format!("{what}; {name} is there again"))?;
        }
        println!("{:8.2} step {}: {what}: all carry after {:.3} s", self.began.elapsed().as_secs_f64(), self.steps, took.as_secs_f64());
        if took > self.worst.0 {
            self.worst = (took, format!("step {}: {what}", self.steps));
        }
        std::thread::sleep(Duration::from_millis(fastrand::u64(..300)));
        Ok(())
    }

    /// Waits until all pairs carry that the wire can carry.
    fn all_carry(&mut self, cut: Option<usize>) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let silent = silent_pairs(&self.pods, BOUND, |from, to| Some(from) != cut && Some(to) != cut)?;
        if !silent.is_empty() {
            let host = silent[0].split('-').next().and_then(|name| self.lab.hosts.iter().position(|host| host.name == name)).unwrap_or(0);
            let state = self.lab.hosts[host].state().map(|state| state.to_string()).unwrap_or_else(|error| error.to_string());
            let log = crate::tail(&self.lab.hosts[host].log());
            bail!("not within {} s: {}\n{state}\n{log}", BOUND.as_secs(), silent.join(", "));
        }
        Ok(began.elapsed())
    }

    fn act(&mut self, step: Step, host: usize, cut: &mut Option<(usize, Duration)>) -> anyhow::Result<String> {
        let name = self.lab.hosts[host].name.clone();
        let netns = &self.lab.hosts[host].netns;
        let pause = Duration::from_millis(fastrand::u64(..3_000));
        Ok(match step {
            Step::Fault(fault) => {
                // The daemon may put right the first half before the second is done; or another step has taken what would be changed.
                let done = fault.strike(&self.lab, host).is_ok_and(|began| began.is_some());
                format!("{name}: {}{}", fault.name, if done { "" } else { " (in part)" })
            }
            Step::VtepMac if self.backend == "vxlan" => {
                let mac = flannel::Mac::local(std::array::from_fn(|_| fastrand::u8(..)));
                // It may be about to be made anew.
                let done = shell(netns, &format!("ip link set flannel.1 address {mac}")).is_ok();
                format!("{name}: flannel.1 has the MAC {mac}{}", if done { "" } else { " (not there)" })
            }
            Step::Mtu | Step::VtepMac => {
                let mtu = fastrand::u32(1_300..=1_500);
                shell(netns, &format!("ip link set eth0 mtu {mtu}"))?;
                format!("{name}: eth0 has the MTU {mtu}")
            }
            Step::Address => {
                let other = world::move_host(&self.lab, host)?;
                format!("{name}: eth0 has the address {other}")
            }
            Step::NewInterface => {
                world::new_interface(&self.lab, &self.root, host)?;
                format!("{name}: eth0 is deleted and made anew")
            }
            Step::KillDaemon => {
                let kill = fastrand::bool();
                self.lab.stop_daemon(host, kill)?;
                std::thread::sleep(pause);
                self.lab.start_daemon(host, &[])?;
                format!("{name}: the daemon is {} for {:.1} s", if kill { "killed" } else { "ended" }, pause.as_secs_f64())
            }
            Step::SecondDaemon => {
                world::refuse_second(&self.lab, host)?;
                format!("{name}: a second daemon is refused")
            }
            Step::Pod => {
                let pod = self.lab.add_pod(host)?;
                self.lab.map_port(&pod, "ADD", PORT + 1)?;
                self.lab.map_port(&pod, "DEL", PORT + 1)?;
                self.lab.cni(host, "flannel", "DEL", &pod.name, &pod.path, "eth0")?;
                kernel::netns::unbind(&pod.path)?;
                format!("{name}: {} came and went", pod.name)
            }
            Step::Cut if cut.is_none() => {
                shell(&self.lab.middle, &format!("ip link set {name} down"))?;
                *cut = Some((host, pause));
                format!("{name}: cut off for {:.1} s", pause.as_secs_f64())
            }
            Step::KillStore | Step::Cut => {
                self.lab.kill_store()?;
                std::thread::sleep(pause);
                self.lab.start_store()?;
                format!("the store is killed for {:.1} s", pause.as_secs_f64())
            }
            Step::PauseStore => {
                let pause = pause * 3;
                self.lab.pause_store(pause)?;
                format!("the store hangs for {:.1} s", pause.as_secs_f64())
            }
            Step::Backup => {
                world::copy_store(&mut self.lab, &self.root, "store", "backup")?;
                self.backup = true;
                "the store is saved".to_owned()
            }
            Step::RestoreStore if self.backup => {
                world::copy_store(&mut self.lab, &self.root, "backup", "store")?;
                "the store is restored from its backup".to_owned()
            }
            Step::EmptyStore => {
                world::empty_store(&mut self.lab, &self.root)?;
                "the store comes back empty".to_owned()
            }
            Step::Partition | Step::RestoreStore => {
                let hosts: Vec<usize> = (SPARED..self.lab.hosts.len()).filter(|_| fastrand::bool()).collect();
                world::cut_from_store(&self.lab, &hosts, pause * 3)?;
                format!("{} hosts lose the store for {:.1} s", hosts.len(), (pause * 3).as_secs_f64())
            }
            Step::DeleteLease => {
                let done = world::delete_lease(&self.lab, host)?;
                format!("{name}: its lease is deleted{}", if done { "" } else { " (not there)" })
            }
            Step::Junk => {
                let n = fastrand::u8(200..240);
                let key = flannel::wire::parse_key(&format!("10.244.{n}.0-24"))?;
                let public = flannel::PerFamily { v4: format!("192.0.2.{n}").parse().ok(), v6: None };
                let data = flannel::PerFamily { v4: Some(r#"{"VNI":1,"VtepMAC":"zz"}"#.into()), v6: None };
                let peer = flannel::Peer { public, backend_type: self.backend.as_str().into(), backend_data: data };
                self.lab.with_store(async |store| store.put_lease(&flannel::Lease { key, peer: peer.clone() }, 0, 0).await)?;
                format!("a lease of 10.244.{n}.0/24 that says nonsense")
            }
        })
    }

    /// After all of it, everything is as it should be.
    fn end(&mut self) -> anyhow::Result<()> {
        for host in 0..self.lab.hosts.len() {
            let audit = FAULTS.iter().find(|fault| fault.noticed == Noticed::Audit).map_or(BOUND, Fault::patience);
            let end = Instant::now() + audit;
            loop {
                let state = self.lab.hosts[host].state()?;
                let whole = observe(&self.lab, host)?;
                let routes = whole.iter().filter(|(key, _)| matches!(key, flannel::object::Key::Route(..))).count();
                let well = state["objects"]["failed"].as_array().is_some_and(Vec::is_empty) && state["store"]["connected"] == true;
                if well && routes == self.lab.hosts.len() - 1 {
                    break;
                }
                ensure!(Instant::now() < end, "{} does not come to rest: {state}, {routes} routes", self.lab.hosts[host].name);
                std::thread::sleep(Duration::from_millis(20));
            }
            let routes = shell(&self.lab.hosts[host].netns, "ip route show 10.244.251.0/24")?;
            ensure!(routes.contains("proto static"), "{} lost a route that is none of ours: {routes}", self.lab.hosts[host].name);
        }
        println!("{:8.2} seed {} ends: all hosts are at rest", self.began.elapsed().as_secs_f64(), self.seed);
        Ok(())
    }
}
