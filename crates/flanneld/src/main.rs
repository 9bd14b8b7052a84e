//! `flanneld`: the daemon and the operator's commands in one program. Called by the name of a CNI plugin, it runs as
//! that plugin.

mod cli;
mod pages;

use std::process::ExitCode;

use daemon::{app, bugreport, cleanup, docker_opts, doctor, embedded, install_cni, ipam, monitor, output, settings, status};
use kernel::process::Capabilities;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::time::SystemTime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    // The container runtime calls plugins by their file's name; the lab links this program under those names.
    if let Some(plugin) = cni::called_as(std::env::args_os().next()) {
        return cni::main(plugin);
    }
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if install_cni::called_as(std::env::args_os().next()) {
        return finish(install_cni::copy(&args));
    }
    let is_script = docker_opts::called_as(std::env::args_os().next());
    if is_script {
        args.insert(0, "docker-opts".to_owned());
        args.iter_mut().filter(|arg| *arg == "-?").for_each(|arg| *arg = "-h".to_owned());
    }
    let cli = match Cli::read(args, |name| std::env::var(name).ok()) {
        Ok(cli) => cli,
        // The script ends with 1 whatever its usage is printed for.
        Err(error) if is_script => {
            output::error_line(error);
            return ExitCode::FAILURE;
        }
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    let outcome = match cli.command {
        // On standard error, as Go flannel does.
        None if cli.run.version => {
            output::error_line(version());
            Ok(())
        }
        None => {
            log(cli.run.v, cli.run.vmodule.as_deref().unwrap_or_default());
            kernel::process::one_arena();
            warn_of_environment(&cli.run.complaints);
            // Commands of an operator run with what the operator gave the daemon.
            if !cli.run.allow_commands {
                keep_capabilities(Capabilities::NET_ADMIN | Capabilities::NET_RAW, cli.run.healthz_port);
            }
            return finish_logged(run(async { app::run(&cli.run, stop()).await }));
        }
        Some(Command::Store(args)) => {
            log(0, "");
            kernel::process::one_arena();
            // Its folder may belong to the unit's user.
            keep_capabilities(Capabilities::DAC_OVERRIDE, args.listen.port());
            return finish_logged(run(async {
                let bound = embedded::bind(&args).await?;
                tracing::info!(
                    listen = %bound.address(), tls = bound.is_tls(), data = %args.data_dir.display(),
                    "embedded store serving etcd's v3 API"
                );
                bound.serve(stop()).await
            }));
        }
        // The lab makes its namespaces before there is a second thread, so it starts no runtime here.
        Some(Command::Lab(args)) => return lab::cli::main(args),
        Some(Command::DockerOpts(args)) => docker_opts::run(&args),
        Some(Command::InstallCni(args)) => install_cni::run(&args),
        Some(Command::Completions(args)) => pages::completions(&args),
        Some(Command::Man) => pages::man(),
        Some(Command::Cleanup(args)) => cleanup::run(&args),
        Some(Command::Doctor(args)) => return finish_check(doctor::run(&args)),
        Some(Command::Ipam(args)) => return finish_check(ipam::run(&args)),
        Some(Command::Bugreport(args)) => bugreport::run(&args),
        Some(Command::Monitor(args)) => monitor::run(&args),
        Some(Command::Status(args)) => return finish_status(status::run(&args)),
        Some(Command::Version) => {
            output::line(version());
            Ok(())
        }
    };
    finish(outcome)
}

/// The first port that needs no capability.
const UNPRIVILEGED: u16 = 1024;

/// Gives up what the process does not need: a flaw in it shall not be a flaw of the whole host.
fn keep_capabilities(kept: Capabilities, port: u16) {
    let bind = if (1..UNPRIVILEGED).contains(&port) { Capabilities::NET_BIND_SERVICE } else { Capabilities::empty() };
    if let Err(error) = kernel::process::keep_capabilities(kept | bind) {
        tracing::warn!(%error, "cannot drop capabilities");
    }
}

fn finish(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::error_line(format_args!("flanneld: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// As [`finish`], for commands that look for problems: exit code 1 if there are any.
fn finish_check(outcome: anyhow::Result<bool>) -> ExitCode {
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => finish(Err(error)),
    }
}

/// As [`finish`], for a command with exit codes of its own. That it cannot say is as bad as it gets.
fn finish_status(outcome: anyhow::Result<u8>) -> ExitCode {
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            finish(Err(error));
            ExitCode::from(2)
        }
    }
}

/// As [`finish`], for programs with a log: the last line has a time and a level as every other.
fn finish_logged(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %format_args!("{error:#}"), "flanneld ends");
            ExitCode::FAILURE
        }
    }
}

fn version() -> String {
    format!("flanneld {} (compatible with flannel v0.28.10)", env!("CARGO_PKG_VERSION"))
}

fn warn_of_environment(complaints: &[String]) {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    for warning in complaints.iter().chain(&settings::unknown_variables(names)) {
        tracing::warn!("{warning}");
    }
}

fn run(future: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(future);
    // Do not wait for tasks that wait for the network.
    runtime.shutdown_background();
    outcome
}

/// The log level of `-v` and `--vmodule`.
fn level(verbosity: i32) -> tracing::Level {
    match verbosity {
        ..=0 => tracing::Level::INFO,
        1..=3 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    }
}

/// Begins the log. `modules` is `--vmodule`: libraries (or crates of ours) that log at another level, as `h2=4,hyper=1`.
fn log(verbosity: i32, modules: &str) {
    let level_of = level;
    let level = level(verbosity);
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let named = modules.split(',').filter_map(|part| {
        let (name, number) = part.split_once('=')?;
        // klog takes patterns of file names.
        Some((name.trim().trim_matches('*').to_owned(), level_of(number.trim().parse().ok()?)))
    });
    let named: Vec<(String, tracing::Level)> = named.filter(|(name, _)| !name.is_empty()).collect();
    let most = named.iter().map(|(_, level)| *level).chain([level]).max().unwrap_or(level);
    let ours = Targets::new()
        .with_default(tracing::Level::WARN)
        // The Kubernetes client logs at length what the daemon reports itself, and boringtun calls it an error when a peer is idle.
        .with_targets(["kube_client", "boringtun"].map(|name| (name, LevelFilter::OFF)))
        .with_targets(["flanneld", "daemon", "lab", "flannel", "kernel", "cni"].map(|name| (name, level)))
        .with_targets(named);
    tracing_subscriber::fmt()
        .with_max_level(most)
        .with_writer(std::io::stderr)
        .with_ansi(terminal)
        .with_timer(SystemTime)
        .with_target(false)
        // A standard error that was closed (`2>&1 | head`) must not end the daemon.
        .log_internal_errors(false)
        .finish()
        .with(ours)
        .init();
}

/// Ready at the first SIGTERM or SIGINT; the second ends the process at once.
async fn stop() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return std::future::pending().await;
    };
    tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
        std::process::exit(130);
    });
}
