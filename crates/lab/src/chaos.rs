//! `lab chaos`: faults and events in an order drawn from a seed; pods must reach each other all the same. Two hosts are spared:
//! between those no packet may be lost at all, whatever happens to the store and to the others.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use daemon::output;
use kernel::netns::Netns;
use serde_json::json;

use crate::cluster::{Lab, Pod};
use crate::events;
use crate::faults::{FAULTS, Fault, Noticed};
use crate::interrupt::Interrupt;
use crate::ping::ping_each;
use crate::plan::Plan;
use crate::process::{shell, tail};
use crate::stage::{PORT, Stage, observe, silent_pairs};

/// The first hosts are spared.
const SPARED: usize = 2;
/// Time limit after a step until all pairs of pods that can reach each other do. A daemon waits at most five and a half seconds
/// between two attempts to reach its store.
const BOUND: Duration = Duration::from_secs(15);
/// The shortest run: less is no test.
const MIN_MINUTES: f64 = 0.1;

/// Arguments of `lab chaos`.
#[derive(Debug, Clone, Args)]
pub struct ChaosArgs {
    /// Seed of the random order: the same seed repeats a run [default: random]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Length of the run
    #[arg(long, default_value_t = 2.0, value_name = "MINUTES")]
    pub minutes: f64,
    /// Number of hosts, 4 to 20
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub hosts: usize,
    /// Backend: host-gw or vxlan
    #[arg(long, default_value = "vxlan", value_name = "TYPE")]
    pub backend: String,
}

/// Refuses arguments that cannot be used.
pub(crate) fn check(args: &ChaosArgs) -> anyhow::Result<()> {
    ensure!((4..=20).contains(&args.hosts), "--hosts: {} is out of range 4 to 20", args.hosts);
    ensure!((MIN_MINUTES..=1440.0).contains(&args.minutes), "--minutes: {} is out of range {MIN_MINUTES} to 1440", args.minutes);
    crate::check::backend(&args.backend)?;
    crate::check::can_inject("chaos", None)
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
    length: Duration,
    steps: u32,
    has_backup: bool,
    worst: (Duration, String),
}

/// Runs it and prints a trace. True if everything held and the run was not interrupted.
///
/// # Errors
/// When something did not hold: the text says what, and names the seed and the step.
pub(crate) fn run(program: &Path, scratch: &Path, args: &ChaosArgs) -> anyhow::Result<bool> {
    let length = Duration::from_secs_f64(args.minutes * 60.0);
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    fastrand::seed(seed);
    output::line(format_args!("chaos --seed {seed} --minutes {} --hosts {} --backend {}", args.minutes, args.hosts, args.backend));
    let interrupt = Interrupt::listen()?;

    let Stage { lab, pods, root, .. } =
        Stage::new(Plan::new(args.hosts, &json!({ "Type": args.backend }), program), &scratch.join("chaos"))?;
    for host in &lab.hosts {
        // A foreign route, which must still exist at the end.
        host.shell("ip route add 10.244.251.0/24 via 10.0.0.254 dev lo onlink proto static metric 77")?;
    }
    let (from, to) = (Netns::open(&pods[0].path)?, pods[1].address);
    let began = Instant::now();
    let worst = (Duration::ZERO, "none".to_owned());
    let mut chaos = Chaos { lab, root, backend: args.backend.clone(), pods, began, length, steps: 0, has_backup: false, worst };
    let mut outcome = Ok(());
    // Sequence numbers of requests have 16 bits.
    let every = (length / 60_000).max(Duration::from_millis(5));
    let (sent, lost) = ping_each(every, &from, to, || outcome = chaos.all(&interrupt))?;
    let failed = outcome.is_err() || lost > 0;
    output::line(format_args!(
        "{}: {} steps in {:.0} s; the longest recovery took {:.2} s ({}); {lost} of {sent} pings between spared hosts were lost",
        if failed { "failed" } else { "held" },
        chaos.steps,
        began.elapsed().as_secs_f64(),
        chaos.worst.0.as_secs_f64(),
        chaos.worst.1
    ));
    outcome.with_context(|| format!("--seed {seed}, step {}", chaos.steps))?;
    ensure!(lost == 0, "--seed {seed}: {lost} of {sent} pings between spared hosts were lost");
    Ok(began.elapsed() >= length)
}

impl Chaos {
    fn all(&mut self, interrupt: &Interrupt) -> anyhow::Result<()> {
        while self.began.elapsed() < self.length && !interrupt.is_set() {
            self.step()?;
        }
        self.end()
    }

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
        let took = self.await_recovery(cut.map(|(host, _)| host)).with_context(|| what.clone())?;
        if let Some((host, length)) = cut {
            std::thread::sleep(length);
            let name = self.lab.hosts[host].name.clone();
            shell(&self.lab.middle, &format!("ip link set {name} up"))?;
            self.await_recovery(None).with_context(|| format!("{what}; {name} is reconnected"))?;
        }
        let (elapsed, length) = (self.began.elapsed().as_secs_f64(), self.length.as_secs_f64());
        output::line(format_args!(
            "{elapsed:6.1} of {length:.0} s, step {}: {what}: recovered after {:.3} s",
            self.steps,
            took.as_secs_f64()
        ));
        if took > self.worst.0 {
            self.worst = (took, format!("step {}: {what}", self.steps));
        }
        std::thread::sleep(Duration::from_millis(fastrand::u64(..300)));
        Ok(())
    }

    /// Waits until all pods reach each other, except those of a host that is cut off.
    fn await_recovery(&mut self, cut: Option<usize>) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let silent = silent_pairs(&self.pods, BOUND, |from, to| Some(from) != cut && Some(to) != cut)?;
        if !silent.is_empty() {
            let host = silent[0].split('-').next().and_then(|name| self.lab.hosts.iter().position(|host| host.name == name)).unwrap_or(0);
            let state = self.lab.hosts[host].state().map(|state| state.to_string()).unwrap_or_else(|error| error.to_string());
            let log = tail(&self.lab.hosts[host].log());
            bail!("pods do not reach each other within {} s: {}\n{state}\n{log}", BOUND.as_secs(), silent.join(", "));
        }
        Ok(began.elapsed())
    }

    fn act(&mut self, step: Step, host: usize, cut: &mut Option<(usize, Duration)>) -> anyhow::Result<String> {
        let pause = Duration::from_millis(fastrand::u64(..3_000));
        match step {
            Step::Cut if cut.is_none() => {
                let name = self.lab.hosts[host].name.clone();
                shell(&self.lab.middle, &format!("ip link set {name} down"))?;
                *cut = Some((host, pause));
                Ok(format!("{name}: cut off for {:.1} s", pause.as_secs_f64()))
            }
            Step::Cut
            | Step::KillStore
            | Step::PauseStore
            | Step::RestoreStore
            | Step::EmptyStore
            | Step::Backup
            | Step::Partition
            | Step::DeleteLease
            | Step::Junk => self.act_on_store(step, host, pause),
            _ => {
                let text = self.act_on_host(step, host, pause)?;
                Ok(format!("{}: {text}", self.lab.hosts[host].name))
            }
        }
    }

    fn act_on_host(&mut self, step: Step, host: usize, pause: Duration) -> anyhow::Result<String> {
        let target = &self.lab.hosts[host];
        Ok(match step {
            Step::Fault(fault) => {
                // The daemon may repair the first half before the second is done, or another step has taken the object.
                let done = fault.inject(&self.lab, host).is_ok_and(|began| began.is_some());
                format!("{}{}", fault.name, if done { "" } else { " (in part)" })
            }
            Step::VtepMac if self.backend == "vxlan" => {
                let mac = flannel::Mac::local(std::array::from_fn(|_| fastrand::u8(..)));
                // The device may be about to be created again.
                let done = target.shell(&format!("ip link set flannel.1 address {mac}")).is_ok();
                format!("flannel.1 gets the MAC {mac}{}", if done { "" } else { " (no such device)" })
            }
            Step::Mtu | Step::VtepMac => {
                let mtu = fastrand::u32(1_300..=1_500);
                target.shell(&format!("ip link set eth0 mtu {mtu}"))?;
                format!("eth0 gets the MTU {mtu}")
            }
            Step::Address => format!("eth0 gets the address {}", events::move_host(&self.lab, host)?),
            Step::NewInterface => {
                events::new_interface(&self.lab, &self.root, host)?;
                "eth0 is deleted and created again".to_owned()
            }
            Step::KillDaemon => {
                let kill = fastrand::bool();
                self.lab.stop_daemon(host, kill)?;
                std::thread::sleep(pause);
                self.lab.start_daemon(host, &[])?;
                format!("the daemon is {} for {:.1} s", if kill { "killed" } else { "stopped" }, pause.as_secs_f64())
            }
            Step::SecondDaemon => {
                events::refuse_second(&self.lab, host)?;
                "a second daemon is refused".to_owned()
            }
            _ => {
                let pod = self.lab.add_pod(host)?;
                self.lab.map_port(&pod, "ADD", PORT + 1)?;
                self.lab.map_port(&pod, "DEL", PORT + 1)?;
                self.lab.cni(host, "flannel", "DEL", &pod.name, &pod.path, "eth0")?;
                kernel::netns::unbind(&pod.path)?;
                format!("{} is added and deleted", pod.name)
            }
        })
    }

    fn act_on_store(&mut self, step: Step, host: usize, pause: Duration) -> anyhow::Result<String> {
        Ok(match step {
            Step::PauseStore => {
                self.lab.pause_store(pause * 3)?;
                format!("the store hangs for {:.1} s", (pause * 3).as_secs_f64())
            }
            Step::Backup => {
                events::copy_store(&mut self.lab, &self.root, "store", "backup")?;
                self.has_backup = true;
                "the store is saved".to_owned()
            }
            Step::RestoreStore if self.has_backup => {
                events::copy_store(&mut self.lab, &self.root, "backup", "store")?;
                "the store is restored from its backup".to_owned()
            }
            Step::EmptyStore => {
                events::empty_store(&mut self.lab, &self.root)?;
                "the store comes back empty".to_owned()
            }
            Step::Partition | Step::RestoreStore => {
                let hosts: Vec<usize> = (SPARED..self.lab.hosts.len()).filter(|_| fastrand::bool()).collect();
                events::cut_from_store(&self.lab, &hosts, pause * 3)?;
                format!("{} hosts are cut off from the store for {:.1} s", hosts.len(), (pause * 3).as_secs_f64())
            }
            Step::DeleteLease => {
                let done = events::delete_lease(&self.lab, host)?;
                format!("{}: its lease is deleted{}", self.lab.hosts[host].name, if done { "" } else { " (no such lease)" })
            }
            Step::Junk => {
                let n = fastrand::u8(200..240);
                let key = flannel::wire::parse_key(&format!("10.244.{n}.0-24"))?;
                let public = flannel::PerFamily { v4: format!("192.0.2.{n}").parse().ok(), v6: None };
                let data = flannel::PerFamily { v4: Some(r#"{"VNI":1,"VtepMAC":"zz"}"#.into()), v6: None };
                let peer = flannel::Peer { public, backend_type: self.backend.as_str().into(), backend_data: data };
                self.lab.with_store(async |store| store.put_lease(&flannel::Lease { key, peer: peer.clone() }, 0, 0).await)?;
                format!("a lease of 10.244.{n}.0/24 with unusable data appears")
            }
            _ => {
                self.lab.kill_store()?;
                std::thread::sleep(pause);
                self.lab.start_store()?;
                format!("the store is killed for {:.1} s", pause.as_secs_f64())
            }
        })
    }

    /// Waits until each host has exactly the routes that it should have, and checks that the foreign ones still exist.
    fn end(&mut self) -> anyhow::Result<()> {
        let timeout = FAULTS.iter().find(|fault| fault.noticed == Noticed::Audit).map_or(BOUND, Fault::timeout);
        for at in 0..self.lab.hosts.len() {
            let host = &self.lab.hosts[at];
            let end = Instant::now() + timeout;
            loop {
                let state = host.state()?;
                let whole = observe(&self.lab, at)?;
                let routes = whole.iter().filter(|(key, _)| matches!(key, flannel::object::Key::Route(..))).count();
                let healthy = state["objects"]["failed"].as_array().is_some_and(Vec::is_empty) && state["store"]["connected"] == true;
                if healthy && routes == self.lab.hosts.len() - 1 {
                    break;
                }
                ensure!(Instant::now() < end, "{} does not recover: {state}, {routes} routes", host.name);
                std::thread::sleep(Duration::from_millis(20));
            }
            let routes = host.shell("ip route show 10.244.251.0/24")?;
            ensure!(routes.contains("proto static"), "{} lost a foreign route: {routes}", host.name);
        }
        output::line(format_args!("{:6.1} s: all hosts have recovered", self.began.elapsed().as_secs_f64()));
        Ok(())
    }
}
