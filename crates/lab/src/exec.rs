//! `lab exec`: runs a command in a host or pod of a lab that is kept up by `--keep`. The two processes find each other by an
//! abstract socket (unix(7)), which ends with the process that has it.

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail, ensure};
use kernel::netns;

/// A host or pod that can be entered.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// `h1`, `h1-pod`, …
    pub(crate) name: String,
    /// The file of its network namespace.
    pub(crate) netns: PathBuf,
    /// The descriptor of its mount namespace in the lab's process.
    pub(crate) mounts: i32,
}

/// What a process that enters a lab must know.
#[derive(Debug, Clone, Default)]
pub(crate) struct Directory {
    /// Hosts and pods.
    pub(crate) places: Vec<Place>,
    /// Environment variables for the command.
    pub(crate) env: Vec<(String, String)>,
    /// A folder with programs for it.
    pub(crate) tools: Option<PathBuf>,
}

impl Directory {
    fn render(&self) -> String {
        let mut text = String::new();
        for place in &self.places {
            text.push_str(&format!("place {} {} {}\n", place.name, place.mounts, place.netns.display()));
        }
        self.env.iter().for_each(|(name, value)| text.push_str(&format!("env {name} {value}\n")));
        self.tools.iter().for_each(|tools| text.push_str(&format!("tools {}\n", tools.display())));
        text
    }

    fn parse(text: &str) -> anyhow::Result<Directory> {
        let mut directory = Directory::default();
        for line in text.lines() {
            match line.splitn(4, ' ').collect::<Vec<_>>().as_slice() {
                ["place", name, mounts, netns] => {
                    directory.places.push(Place { name: (*name).to_owned(), netns: netns.into(), mounts: mounts.parse()? });
                }
                ["env", name, value] => directory.env.push(((*name).to_owned(), (*value).to_owned())),
                ["tools", folder] => directory.tools = Some(folder.into()),
                _ => bail!("the lab that is up is of another version: end it and start it again"),
            }
        }
        Ok(directory)
    }
}

fn address() -> std::io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("flannel-lab/{}", rustix::process::getuid().as_raw()))
}

/// Claims the name of this user's lab. Must be called before [`crate::isolate`]: the name belongs to the outer network
/// namespace.
pub(crate) fn claim() -> anyhow::Result<UnixListener> {
    UnixListener::bind_addr(&address()?).context("a lab of yours is up already: end it first (Ctrl-C where it runs)")
}

/// Answers every client with the directory, for the rest of the process's life.
pub(crate) fn serve(listener: &UnixListener, directory: &Directory) {
    let text = directory.render();
    for mut stream in listener.incoming().flatten() {
        let _ = stream.write_all(text.as_bytes());
    }
}

/// Replaces this process by a command in a place of the running lab.
///
/// # Errors
/// When no lab is up, it has no such place, or the command cannot be started.
pub(crate) fn run(place: &str, command: &[String]) -> anyhow::Result<()> {
    let mut text = String::new();
    let mut stream = UnixStream::connect_addr(&address()?).context("no lab of yours is up: start one with `flanneld lab --keep`")?;
    stream.read_to_string(&mut text)?;
    // Any user may claim the name. The kernel says whose process this is; another user's is not trusted.
    let peer = rustix::net::sockopt::socket_peercred(&stream)?;
    ensure!(peer.uid == rustix::process::getuid(), "the lab that is up under this name is another user's");
    let pid = peer.pid.as_raw_nonzero().get().cast_unsigned();
    let directory = Directory::parse(&text)?;
    let Some(found) = directory.places.iter().find(|other| other.name == place) else {
        let names: Vec<&str> = directory.places.iter().map(|place| place.name.as_str()).collect();
        bail!("there is no {place:?} in the lab: it has {}", names.join(", "));
    };
    netns::join(pid, found.mounts, &found.netns).with_context(|| format!("cannot enter {place}"))?;
    let (program, args) = command.split_first().context("name the command after --")?;
    let mut command = Command::new(program);
    command.args(args).envs(directory.env);
    if let Some(tools) = directory.tools {
        let path = std::env::var_os("PATH").unwrap_or_default();
        command.env("PATH", std::env::join_paths(std::iter::once(tools).chain(std::env::split_paths(&path)))?);
    }
    Err(command.exec()).with_context(|| format!("cannot run {program}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_survives_the_socket() {
        let place = Place { name: "h1-pod".to_owned(), netns: "/mnt/a b/netns".into(), mounts: 7 };
        let env = vec![("KUBECONFIG".to_owned(), "/mnt/admin.kubeconfig".to_owned())];
        let directory = Directory { places: vec![place], env, tools: Some("/mnt/bin".into()) };
        let text = directory.render();
        assert_eq!(Directory::parse(&text).unwrap().render(), text);
        assert!(Directory::parse("h1 /mnt/h1\n").unwrap_err().to_string().contains("another version"));
    }
}
