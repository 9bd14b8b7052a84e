//! The project's commands: check, test, build, measure. Each command installs the programs that it needs, or names the one that
//! cannot be installed and fails.

mod bench;
mod check;
mod cni_suite;
mod deny;
mod dist;
mod fuzz;
mod go_module;
mod limits;
mod mutants;
mod pending;
mod programs;
mod sources;
mod test;
mod tools;
mod vm;
mod words;

use std::process::ExitCode;

const HELP: &str = "\
Usage: cargo xtask COMMAND

Test
  check                   formatting, lints, docs, words, limits, dependencies, pure tests and laws, instruction count;
                          needs no root; under three minutes once everything is built
  test [FILTER]           everything: `check`, then all tests against real kernels, etcd, Kubernetes and runtimes.
                          With FILTER only the tests with that text in their name, and only the programs they need;
                          options of `cargo test` work too: `test -p kernel --test netns route -- --nocapture`
  test cni-suite [SUITE]  the reference CNI plugins' own test suites with our plugins, compared spec by spec
                          (tests/cni-suite/departures.txt lists the intended differences)
  vm [FILTER]             tests in a virtual machine, whose kernel has what this machine's may lack: those marked `[vm]`;
                          with FILTER all tests with that text in their name. Options as for `test`
  words                   only the check of words (language of code, logs and docs)
  mutants [PACKAGE [ARGS]]  change the code of PACKAGE (default: flannel) and see whether its tests notice;
                          ARGS are cargo-mutants': `mutants flannel -f alloc.rs`
  simulate [COUNT [FROM]] run COUNT simulated clusters (default: 10000), one for each seed, and print the seeds that fail
  fuzz [SECONDS]          run each fuzz target for SECONDS (default: 30); needs a nightly compiler

Build
  dist                    build the installed files into target/dist: flanneld, the CNI plugins, completions and the man page
  image                   build the container image, target/image/flannel.tar, for `ctr image import`
  kubernetes              build the Kubernetes control plane of the tests and of `flanneld lab --kube` (ten minutes, once)

Measure
  bench [quick|pods|etcd|kubernetes|idle|LEASES]
                          measure beside the kernel's own cost and print tables (docs/performance.md);
                          writes docs/bench/ unless `quick`

Programs built or downloaded for this are kept in ~/.cache/flannel-tests.";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = args.split_first().map_or(("", &[][..]), |(command, rest)| (command.as_str(), rest));
    match tools::enter_root().and_then(|()| run(command, rest)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &str, rest: &[String]) -> anyhow::Result<()> {
    match command {
        "check" => check::check(),
        "test" => test::test(rest),
        "vm" => vm::run(rest),
        "words" => words::check(),
        "mutants" => mutants::mutants(rest),
        "simulate" => fuzz::simulate(rest),
        "fuzz" => fuzz::fuzz(rest),
        "dist" => dist::dist().map(|folder| println!("{}", folder.display())),
        "image" => dist::image().map(|file| println!("{}", file.display())),
        "kubernetes" => programs::kubernetes().map(|program| println!("{}", program.display())),
        "bench" => bench::bench(rest),
        "" | "help" | "--help" | "-h" => {
            println!("{HELP}");
            Ok(())
        }
        other => anyhow::bail!("unknown command {other:?}\n\n{HELP}"),
    }
}
