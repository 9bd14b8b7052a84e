//! `lab exec`: runs a command in a host or pod of the lab that stays up by `--keep`. The two find each other by an
//! abstract socket (unix(7)), which is gone with the process that has it.

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail};
use kernel::netns;

fn address() -> std::io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("flannel-lab/{}", rustix::process::getuid().as_raw()))
}

/// Takes the name of this user's lab. Must be called before [`crate::isolate`]: the name is one of the outer network
/// namespace.
pub(super) fn claim() -> anyhow::Result<UnixListener> {
    UnixListener::bind_addr(&address()?).context("a lab of yours is up already: end it first (Ctrl-C where it runs)")
}

/// Tells everybody who asks where the namespaces are: a line each with name and path.
pub(super) fn tell(listener: &UnixListener, places: &[(String, PathBuf)]) {
    let text: String = places.iter().map(|(name, path)| format!("{name} {}\n", path.display())).collect();
    for mut stream in listener.incoming().flatten() {
        let _ = stream.write_all(text.as_bytes());
    }
}

/// Runs a command in a place of the running lab, in the place of this process.
pub(super) fn run(place: &str, command: &[String]) -> anyhow::Result<()> {
    let mut text = String::new();
    let mut stream = UnixStream::connect_addr(&address()?).context("no lab of yours is up: start one with `flanneld lab --keep`")?;
    stream.read_to_string(&mut text)?;
    // Anybody may take the name: only a process of this user is followed, and who that is says the kernel.
    let peer = rustix::net::sockopt::socket_peercred(&stream)?;
    anyhow::ensure!(peer.uid == rustix::process::getuid(), "the lab that is up under this name is another user's");
    let pid = peer.pid.as_raw_nonzero().get().cast_unsigned();
    let places: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once(' ')).collect();
    let Some((_, path)) = places.iter().find(|(name, _)| *name == place) else {
        let names: Vec<&str> = places.iter().map(|(name, _)| *name).collect();
        bail!("there is no {place:?} in the lab: it has {}", names.join(", "));
    };
    netns::join(pid, path.as_ref()).with_context(|| format!("cannot enter {place}"))?;
    let (program, args) = command.split_first().context("name the command after --")?;
    Err(Command::new(program).args(args).exec()).with_context(|| format!("cannot run {program}"))
}
