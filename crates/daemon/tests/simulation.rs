//! Simulates clusters without a kernel, a network or a clock: real daemons (`app::node_daemon`), the real etcd client and the real
//! embedded store run in virtual time on model kernels, connected by model connections that delay, lose and break. A seed determines
//! a sequence of faults. At its end every host must be in the desired state, and until then no daemon may have removed the route to
//! an existing peer.
//!
//! `cargo xtask simulate COUNT [FROM]` runs seeds, and prints those that fail. To run one of them with its log:
//! `FLANNEL_SEED=7 cargo test -p daemon --test simulation`.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "simulation/cluster.rs"]
mod cluster;
#[path = "simulation/model.rs"]
mod model;
#[path = "simulation/wire.rs"]
mod wire;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};

/// Seeds that failed once, kept as regression tests.
const FAILED_ONCE: &str = include_str!("simulation/seeds.txt");
/// How long `cargo xtask test` tries new seeds.
const NEW_SEEDS_TIME: Duration = Duration::from_secs(40);

fn main() {
    let arguments = Arguments::from_args();
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap_or_else(|_| panic!("{name}: {text:?}")));
    let trials = match (number("FLANNEL_SEED"), number("FLANNEL_SEEDS")) {
        (Some(seed), _) => vec![Trial::test(format!("seed_{seed}"), move || one(seed))],
        (None, Some(count)) => {
            let from = number("FLANNEL_SEEDS_FROM").unwrap_or(0);
            vec![Trial::test("seeds", move || many(from, |done, _| done < count))]
        }
        (None, None) => vec![
            Trial::test("seeds_that_failed_once", || {
                let seeds = FAILED_ONCE.lines().filter(|line| !line.starts_with('#'));
                seeds.map(|line| line.split(' ').next().unwrap().parse().unwrap()).try_for_each(|seed| check(seed).map_err(Failed::from))
            }),
            Trial::test("seed_determines_the_run", || {
                let differ = |seed: &u64| cluster::run(*seed).unwrap() != cluster::run(*seed).unwrap();
                (0..100).find(differ).map_or(Ok(()), |seed| Err(Failed::from(format!("two runs of seed {seed} differ"))))
            }),
            Trial::test("start_sends_six_requests_for_any_number_of_leases", || match [0, 3, 250].map(cluster::requests_at_start) {
                // The configuration, all leases, an etcd lease, the put, leases added since, and the watch.
                [6, 6, 6] => Ok(()),
                other => Err(Failed::from(format!("{other:?}"))),
            }),
            // Other seeds each day, so that all runs together cover more than any one of them.
            Trial::test("new_seeds", || {
                #[expect(clippy::disallowed_methods, reason = "other seeds each day")]
                let day = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() / 86_400;
                many(day << 32, |_, time| time < NEW_SEEDS_TIME)
            }),
        ],
    };
    libtest_mimic::run(&arguments, trials).exit();
}

/// Runs one seed with its log.
fn one(seed: u64) -> Result<(), Failed> {
    tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_timer(cluster::VirtualTime).with_writer(std::io::stderr).init();
    check(seed).map_err(Failed::from)
}

fn check(seed: u64) -> Result<(), String> {
    let outcome = std::panic::catch_unwind(|| cluster::run(seed)).unwrap_or_else(|_| Err("it panicked".to_owned()));
    outcome.map(drop).map_err(|error| format!("seed {seed}: {error}"))
}

/// Runs seeds from `from` on, on all processors, as long as `go_on` returns true for the number of started seeds and the time.
fn many(from: u64, go_on: impl Fn(u64, Duration) -> bool + Sync) -> Result<(), Failed> {
    let (next, failed, began) = (AtomicU64::new(0), Mutex::new(Vec::new()), Instant::now());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if !go_on(at, began.elapsed()) || stop.load(Ordering::Relaxed) {
                        next.fetch_sub(1, Ordering::Relaxed);
                        return;
                    }
                    if let Err(error) = check(from + at) {
                        eprintln!("{error}");
                        let mut failed = failed.lock().unwrap();
                        failed.push(error);
                        stop.fetch_or(failed.len() >= 10, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let (count, failed) = (next.into_inner(), failed.into_inner().unwrap());
    eprintln!("{count} seeds from {from} on in {:.1} s, {} failed", began.elapsed().as_secs_f64(), failed.len());
    if failed.is_empty() { Ok(()) } else { Err(Failed::from(failed.join("\n"))) }
}
