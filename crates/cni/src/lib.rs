//! The CNI plugins of [`NAMES`] in one program with several names. The program is synchronous, without an async runtime: a
//! plugin runs for milliseconds.
//!
//! A plugin is a function from a [`Request`] to a [`CniResult`]. Delegation stays in this process if the delegate that
//! `CNI_PATH` leads to is this program, and starts a process otherwise.

mod bandwidth;
mod bridge;
mod chained;
mod chains;
mod delegate;
mod firewall;
mod flannel;
mod host_local;
mod lock;
mod loopback;
mod portmap;
pub mod protocol;
pub mod result;
mod tuning;

pub use host_local::audit as reservations;

use std::ffi::OsString;
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use protocol::{CniError, Command, Environment, Invocation, Request};
use result::CniResult;

/// A plugin of this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plugin {
    /// Reads `subnet.env` and delegates.
    Flannel,
    /// Connects pods by a bridge.
    Bridge,
    /// Allocates addresses of a range, recorded in files.
    HostLocal,
    /// Sets `lo` up.
    Loopback,
    /// Maps ports of the host to containers.
    Portmap,
    /// Limits what containers send and receive.
    Bandwidth,
    /// Accepts the traffic of containers in iptables.
    Firewall,
    /// Sets sysctls and attributes of an interface.
    Tuning,
}

/// The names of all plugins, under which this program is installed.
pub const NAMES: [&str; 8] = ["flannel", "bridge", "host-local", "loopback", "portmap", "bandwidth", "firewall", "tuning"];

impl Plugin {
    /// The plugin of this name.
    pub fn named(name: &str) -> Option<Plugin> {
        match name {
            "flannel" => Some(Plugin::Flannel),
            "bridge" => Some(Plugin::Bridge),
            "host-local" => Some(Plugin::HostLocal),
            "loopback" => Some(Plugin::Loopback),
            "portmap" => Some(Plugin::Portmap),
            "bandwidth" => Some(Plugin::Bandwidth),
            "firewall" => Some(Plugin::Firewall),
            "tuning" => Some(Plugin::Tuning),
            _ => None,
        }
    }

    /// Executes one command. Commands without a result (DEL, CHECK, GC, STATUS) return `None`.
    fn run(self, request: &Request<'_>) -> Result<Option<CniResult>, CniError> {
        match self {
            Plugin::Flannel => flannel::run(request),
            Plugin::Bridge => bridge::run(request),
            Plugin::HostLocal => host_local::run(request),
            Plugin::Loopback => loopback::run(request),
            Plugin::Portmap => portmap::run(request),
            Plugin::Bandwidth => bandwidth::run(request),
            Plugin::Firewall => firewall::run(request),
            Plugin::Tuning => tuning::run(request),
        }
    }

    /// The first version of the specification that the plugin supports. Results of older versions lack fields that it needs.
    fn since(self) -> &'static str {
        match self {
            Plugin::Bandwidth => "0.3.0",
            Plugin::Firewall => "0.4.0",
            _ => "0.1.0",
        }
    }
}

/// The plugin that a program's name (its `argv[0]`, or a first argument) selects.
pub fn called_as(name: Option<OsString>) -> Option<Plugin> {
    Plugin::named(Path::new(&name?).file_name()?.to_str()?)
}

/// Runs the protocol for one plugin: environment and standard input in, JSON on standard output.
pub fn main(plugin: Plugin) -> ExitCode {
    let environment = Environment::from(|name: &str| std::env::var(name).ok());
    let (text, code) = match answer(plugin, &environment, &mut std::io::stdin().lock()) {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => (error.to_json(), ExitCode::FAILURE),
    };
    // One write: Rust's standard output would split the text at lines. If the reader is gone, the error cannot be reported.
    let mut rest = text.as_bytes();
    while let Ok(written @ 1..) = rustix::io::retry_on_intr(|| rustix::io::write(std::io::stdout(), rest)) {
        rest = &rest[written..];
    }
    code
}

/// The maximum length of a configuration, in bytes. A GC lists every attachment of a host.
const MAX_CONFIG: u64 = 16 << 20;

fn answer(plugin: Plugin, environment: &Environment, stdin: &mut impl Read) -> Result<String, CniError> {
    let Some(command) = environment.command()? else {
        eprintln!(
            "CNI plugin of flannel {}\nCNI protocol versions supported: {}",
            env!("CARGO_PKG_VERSION"),
            protocol::VERSIONS.join(", ")
        );
        return Ok(String::new());
    };
    if command == Command::Version {
        return Ok(protocol::version_answer(plugin.since()));
    }
    let mut text = String::new();
    stdin
        .take(MAX_CONFIG)
        .read_to_string(&mut text)
        .map_err(|error| CniError::decode(format!("cannot read the configuration from standard input: {error}")))?;
    let invocation = Invocation::new(command, environment, &text)?;
    let request = invocation.request();
    request.require_version(plugin.since())?;
    if matches!(command, Command::Add | Command::Del) {
        refuse_own_namespace(&request)?;
    }
    let result = plugin.run(&request)?;
    Ok(result.map_or(String::new(), |result| result.render(request.version)))
}

/// Refuses the plugin's own namespace with code 8: the plugin would change the host's interfaces.
fn refuse_own_namespace(request: &Request<'_>) -> Result<(), CniError> {
    use kernel::netns::Netns;
    let id = |netns: std::io::Result<Netns>| netns.and_then(|netns| netns.id()).ok();
    let given = request.netns.and_then(|path| id(Netns::open(path)));
    if given.is_some() && given == id(Netns::current()) && !request.netns_override {
        return Err(CniError::new(8, "CNI_NETNS is the plugin's own network namespace, the host's: it must be the container's"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_without_an_end_is_refused() {
        let environment = Environment::from(|name| Some(if name == "CNI_COMMAND" { "ADD" } else { "c" }.to_owned()));
        let error = answer(Plugin::Loopback, &environment, &mut std::io::repeat(b' ')).unwrap_err();
        assert_eq!(error.code, 6, "{}", error.msg);
    }
}
