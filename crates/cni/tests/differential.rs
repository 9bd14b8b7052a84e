//! Random sequences of calls to our plugins and to the reference plugins v1.10.0 in twin namespaces: answers, links,
//! addresses, routes, rules, limits, sysctls and files are compared after each step. A seed determines a sequence.
//!
//! `FLANNEL_SEED=7` runs one of them and prints it; `FLANNEL_SEEDS=10000` (and `FLANNEL_SEEDS_FROM=200`) runs as many, and
//! counts the differences by kind.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "differential/life.rs"]
mod life;
#[path = "differential/sequence.rs"]
mod sequence;
#[path = "differential/state.rs"]
mod state;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kernel::netns;
use libtest_mimic::{Arguments, Failed, Trial};

use life::{Implementation, Outcome, play};
use sequence::{Act, Event, Sequence};

/// Sequences in each run of all tests.
const SEEDS: u64 = 200;
/// How many are played at a time: a DEL mostly waits for the kernel.
const THREADS: usize = 6;

fn main() {
    let arguments = Arguments::from_args();
    if !arguments.list {
        netns::isolate(Path::new("/mnt")).expect("these tests need namespaces");
    }
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap_or_else(|_| panic!("{name}: {text:?}")));
    let (from, count) = (number("FLANNEL_SEEDS_FROM").unwrap_or(0), number("FLANNEL_SEEDS").unwrap_or(SEEDS));
    let trial = match number("FLANNEL_SEED") {
        Some(seed) => Trial::test(format!("seed_{seed}"), move || one(seed)),
        None => Trial::test("random_sequences_have_the_reference_outcome", move || many(from, count)),
    };
    libtest_mimic::run(&arguments, vec![trial]).exit();
}

fn reference() -> Implementation {
    let folder = std::env::var_os("FLANNEL_REFERENCE_PLUGINS").map(PathBuf::from);
    Implementation::Reference(folder.expect("FLANNEL_REFERENCE_PLUGINS is not set: run the tests by `cargo xtask test`"))
}

fn one(seed: u64) -> Result<(), Failed> {
    println!("{}", Sequence::new(seed));
    match difference(seed) {
        None => Ok(()),
        Some(difference) => Err(Failed::from(format!("{}\n{}", difference.kind, difference.text))),
    }
}

/// Plays sequences, some at a time.
fn many(from: u64, count: u64) -> Result<(), Failed> {
    let (next, began) = (AtomicU64::new(from), Instant::now());
    let failed: Mutex<BTreeMap<String, Vec<(u64, String)>>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + count {
                        return;
                    }
                    if let Some(difference) = difference(seed) {
                        failed.lock().unwrap().entry(difference.kind).or_default().push((seed, difference.text));
                    }
                }
            });
        }
    });
    println!("{count} sequences in {:.1} s", began.elapsed().as_secs_f64());
    let failed = failed.into_inner().unwrap();
    if failed.is_empty() {
        return Ok(());
    }
    let mut text = String::new();
    for (kind, seeds) in &failed {
        let list: Vec<String> = seeds.iter().take(8).map(|(seed, _)| seed.to_string()).collect();
        text.push_str(&format!("{} of {count}: {kind}; FLANNEL_SEED={}\n{}\n", seeds.len(), list.join(", "), seeds[0].1));
    }
    Err(Failed::from(text))
}

/// The first step of a sequence after which the implementations differ.
struct Difference {
    /// What differs, without names and numbers.
    kind: String,
    text: String,
}

fn difference(seed: u64) -> Option<Difference> {
    let sequence = Sequence::new(seed);
    let root = PathBuf::from(format!("/mnt/seed{seed}"));
    let theirs = play(&sequence, &reference(), &root);
    let ours = play(&sequence, &Implementation::Ours, &root);
    let mut leaks = false;
    ours.iter().zip(&theirs).enumerate().find_map(|(at, (ours, theirs))| {
        // Without the interface or its namespace a DEL of the reference plugins leaves rules and files, which ours removes
        // (docs/departures.md).
        let by_event = [Event::NamespaceGone, Event::InterfaceDeleted, Event::BridgeDeleted].map(Act::Event);
        leaks |= ours.step.act == Act::DelWithoutNamespace || by_event.contains(&ours.step.act);
        compare(at, ours, theirs, leaks)
    })
}

/// Compares what came of a step. Where the reference plugins leave more, rules have other places too.
fn compare(at: usize, ours: &Outcome, theirs: &Outcome, leaks: bool) -> Option<Difference> {
    let step = format!("{:?}", ours.step.act);
    let begin = format!("step {at}, {step} of attachment {}", ours.step.attachment);
    // A chain that the reference plugin left is in its own way when the container is added again.
    let is_stuck = leaks && ours.answer == "deleted" && theirs.answer.ends_with("error 999");
    if ours.answer != theirs.answer && !is_stuck {
        let short = |answer: &str| if answer.starts_with('{') { "result".to_owned() } else { answer.to_owned() };
        let kind = format!("{step} answers {} instead of {}", short(&ours.answer), short(&theirs.answer));
        let lines = |answer: &str| answer.lines().map(ToOwned::to_owned).collect::<Vec<_>>();
        let (mine, others) = (lines(&ours.answer), lines(&theirs.answer));
        let text =
            format!("{begin}: ours {}\nonly ours: {:#?}\nonly theirs: {:#?}", ours.answer, only(&mine, &others), only(&others, &mine));
        return Some(Difference { kind, text });
    }
    let (only_ours, only_theirs) = match leaks {
        true => (only(&without_places(&ours.state), &without_places(&theirs.state)), Vec::new()),
        false => (only(&ours.state, &theirs.state), only(&theirs.state, &ours.state)),
    };
    if only_ours.is_empty() && only_theirs.is_empty() {
        return None;
    }
    let first = only_ours.first().or(only_theirs.first()).unwrap();
    let kind = format!("after {step}: {}", first.split(' ').take(3).collect::<Vec<_>>().join(" "));
    Some(Difference { kind, text: format!("{begin} ({}):\nonly ours: {only_ours:#?}\nonly theirs: {only_theirs:#?}", ours.answer) })
}

/// What is in the one list and not in the other.
fn only(these: &[String], those: &[String]) -> Vec<String> {
    let mut those = those.to_vec();
    let is_missing = |line: &&String| match those.iter().position(|other| other == *line) {
        Some(place) => {
            those.remove(place);
            false
        }
        None => true,
    };
    these.iter().filter(is_missing).cloned().collect()
}

/// Rules without their numbers.
fn without_places(lines: &[String]) -> Vec<String> {
    let is_place = |word: &&str| word.strip_suffix(':').is_some_and(|number| number.parse::<u32>().is_ok());
    lines.iter().map(|line| line.split(' ').filter(|word| !is_place(word)).collect::<Vec<_>>().join(" ")).collect()
}
