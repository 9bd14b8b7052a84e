//! A host of a lab: a network namespace, and a mount namespace with a `/run` of its own.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, ensure};
use flannel::Cidr;
use kernel::mounts::{self, Mounts};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::{addr, link, route, sysctl};
use serde_json::Value;

use super::HEALTH;
use super::wire::{connect, index, name};
use crate::plan::Families;
use crate::process::run_script;

/// Files in `/run` that belong to one host: each host of the lab has its own.
const PRIVATE: [&str; 5] = ["flannel", "flannel-locks", "machine", "netns", "xtables.lock"];

/// A host of a lab.
#[derive(Debug)]
pub struct Host {
    /// `h1`, `h2`, …
    pub name: String,
    /// Its network namespace.
    pub netns: Netns,
    /// Its mount namespace: `/run/flannel` is its own.
    pub mounts: Mounts,
    /// Its address on the wire.
    pub address: Ipv4Addr,
    /// Its IPv6 address on the wire, in a lab with IPv6 pods.
    pub address6: Option<Ipv6Addr>,
    /// The subnet that it asks for by its previous `subnet.env`.
    pub subnet: String,
    /// Its files: the daemon's log, the CNI plugins' state, and what it sees as `/run/flannel`.
    pub directory: PathBuf,
    pub(super) daemon: Option<Child>,
}

pub(super) fn create(root: &Path, middle: &Netns, i: usize, network: usize, families: Families) -> anyhow::Result<Host> {
    let netns = Netns::create()?;
    let host_name = format!("h{i}");
    netns.bind(&root.join("netns").join(&host_name))?;
    let address = Ipv4Addr::new(10, 0, u8::try_from(network)?, u8::try_from(i)?);
    let address6 = if families.v6 { Some(format!("fd00:10:0:{network}::{i:x}").parse()?) } else { None };
    connect(middle, &netns, &host_name, network)?;
    netns.run(|| {
        let mut socket = Socket::open(Protocol::Route)?;
        link::set_up(&mut socket, 1, true)?;
        let eth0 = index(&mut socket, "eth0")?;
        sysctl::write("net/ipv6/conf/eth0/accept_dad", "0")?;
        link::set_up(&mut socket, eth0, true)?;
        addr::add(&mut socket, eth0, Cidr { addr: address.into(), len: 24 })?;
        route::add(&mut socket, "0.0.0.0/0".parse()?, Some(format!("10.0.{network}.254").parse()?), eth0)?;
        if let Some(address6) = address6 {
            addr::add(&mut socket, eth0, Cidr { addr: IpAddr::V6(address6), len: 64 })?;
            route::add(&mut socket, "::/0".parse()?, Some(format!("fd00:10:0:{network}::fe").parse()?), eth0)?;
        }
        anyhow::Ok(())
    })??;
    let directory = root.join(&host_name);
    let run_flannel = directory.join("run-flannel");
    std::fs::create_dir_all(&run_flannel)?;
    // A host that comes back asks for the subnet that it had: so the lab's hosts have subnets with the numbers of their names.
    let mut subnets = Vec::new();
    let mut previous = String::new();
    if families.v4 {
        subnets.push(format!("10.244.{i}.0/24"));
        previous.push_str(&format!("FLANNEL_SUBNET=10.244.{i}.1/24\n"));
    }
    if families.v6 {
        subnets.push(format!("fd00:244:0:{i:x}::/64"));
        previous.push_str(&format!("FLANNEL_IPV6_SUBNET=fd00:244:0:{i:x}::1/64\n"));
    }
    let mounts = Mounts::create(|| mount_run(&run_flannel)).context("cannot create a mount namespace")?;
    let host = Host { name: host_name, netns, mounts, address, address6, subnet: subnets.join(","), directory, daemon: None };
    std::fs::write(host.subnet_file(), previous)?;
    Ok(host)
}

/// Mounts a `/run` of the host's own, with `flannel` as `/run/flannel`. The machine's other entries stay reachable by links,
/// because programs may live there.
///
/// The machine's `/run` is mounted below the new one only, where no other mount namespace sees it: a program that removes the lab's
/// files must not come across it.
fn mount_run(flannel: &Path) -> io::Result<()> {
    let run = Path::new("/run");
    let machine = mounts::detached(run)?;
    mounts::tmpfs(run)?;
    let below = run.join("machine");
    std::fs::create_dir(&below)?;
    mounts::attach(&machine, &below)?;
    for entry in std::fs::read_dir(&below)? {
        let name = entry?.file_name();
        if !PRIVATE.iter().any(|private| name == *private) {
            std::os::unix::fs::symlink(below.join(&name), run.join(&name))?;
        }
    }
    let target = run.join("flannel");
    std::fs::create_dir(&target)?;
    mounts::bind(flannel, &target)
}

impl Host {
    /// Runs a function in the host's network and mount namespaces.
    ///
    /// # Errors
    /// When they cannot be entered.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        self.mounts.run(|| self.netns.run(f))?
    }

    /// Runs a shell script on the host and returns its output.
    ///
    /// # Errors
    /// When it fails; the text has its standard error.
    pub fn shell(&self, script: &str) -> anyhow::Result<String> {
        self.run(|| run_script(script))?
    }

    /// Its `/run/flannel/subnet.env`, as the lab sees it.
    pub fn subnet_file(&self) -> PathBuf {
        self.directory.join("run-flannel/subnet.env")
    }

    /// Its addresses on the wire, IPv4 first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        std::iter::once(IpAddr::V4(self.address)).chain(self.address6.map(IpAddr::V6)).collect()
    }

    /// The daemon's log.
    pub fn log(&self) -> PathBuf {
        self.directory.join("flanneld.log")
    }

    /// The daemon's process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Child::id)
    }

    /// The daemon's `/state`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn state(&self) -> anyhow::Result<Value> {
        let (status, body) = self.get("/state")?;
        ensure!(status == 200, "{}", body.trim());
        Ok(serde_json::from_str(&body)?)
    }

    /// Asks the daemon's health server, and returns status and body.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn get(&self, path: &str) -> anyhow::Result<(u16, String)> {
        let mut stream = self.netns.run(|| TcpStream::connect_timeout(&HEALTH, Duration::from_secs(1)))??;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no HTTP status")?;
        Ok((status, body.to_owned()))
    }

    /// The MAC address of its interface on the wire.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn mac(&self) -> anyhow::Result<flannel::Mac> {
        let found = self.netns.run(|| link::get(&mut Socket::open(Protocol::Route)?, name("eth0")))??;
        found.and_then(|link| link.mac).context("the host has no eth0")
    }
}
