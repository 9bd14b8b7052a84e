//! A cluster without a kernel, a network or a clock: real daemons (`app::node_daemon`), the real client of etcd and the real
//! embedded store, on model kernels, joined by wires that delay, lose and break, in virtual time. A seed is a whole life of
//! faults; at its end all must be as it should, and on the way no route may have been taken from a peer that was there.
//!
//! `cargo xtask simulate COUNT [FROM]` runs seeds, and prints those that fail. One of them, with its log:
//! `FLANNEL_SEED=7 cargo test -p daemon --test simulation`.

#![expect(clippy::unwrap_used, reason = "a failed test has nobody to report an error to")]

#[path = "simulation/model.rs"]
mod model;
#[path = "simulation/wire.rs"]
mod wire;
#[path = "simulation/world.rs"]
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};

/// Seeds that failed once. What they found stays found.
const FAILED_ONCE: &str = include_str!("simulation/seeds.txt");
/// How long `cargo xtask test` looks for new ones.
const LOOKING: Duration = Duration::from_secs(40);

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
            Trial::test("a_seed_is_a_life_that_repeats", || {
                let differ = |seed: &u64| world::run(*seed).unwrap() != world::run(*seed).unwrap();
                (0..100).find(differ).map_or(Ok(()), |seed| Err(Failed::from(format!("two runs of seed {seed} differ"))))
            }),
            Trial::test("a_start_asks_six_times_whatever_the_number_of_leases", || match [0, 3, 250].map(world::requests_at_start) {
                // The configuration, all leases, an etcd lease, the put, who came since, and the watch.
                [6, 6, 6] => Ok(()),
                other => Err(Failed::from(format!("{other:?}"))),
            }),
            // Others each day, so that all runs together see more than any one of them.
            Trial::test("new_seeds", || {
                #[expect(clippy::disallowed_methods, reason = "other seeds each day")]
                let day = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() / 86_400;
                many(day << 32, |_, time| time < LOOKING)
            }),
        ],
    };
    libtest_mimic::run(&arguments, trials).exit();
}

/// One seed with its log.
fn one(seed: u64) -> Result<(), Failed> {
    tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_timer(world::VirtualTime).with_writer(std::io::stderr).init();
    check(seed).map_err(Failed::from)
}

fn check(seed: u64) -> Result<(), String> {
    let life = std::panic::catch_unwind(|| world::run(seed)).unwrap_or_else(|_| Err("it panicked".to_owned()));
    life.map(drop).map_err(|error| format!("seed {seed}: {error}"))
}

/// Seeds from `from` on, on all processors, for as long as `go_on` says of the number that were begun and the time.
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
