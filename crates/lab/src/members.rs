//! A store of three members, each in a namespace of its own.

use std::path::Path;
use std::process::{Child, Command};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::{addr, link};

use crate::{Lab, PATIENCE, index, name, spawn, tail};

/// How many: the least of which one may be lost.
pub(super) const MEMBERS: usize = 3;
/// So small that a test can fill it.
const QUOTA: &str = "--quota-backend-bytes=12000000";

/// Where a member is.
pub(super) fn address(member: usize) -> String {
    format!("10.0.0.{}", 251 + member)
}

/// Where clients find them.
pub(super) fn endpoints() -> String {
    (0..MEMBERS).map(|member| format!("http://{}:2379", address(member))).collect::<Vec<_>>().join(",")
}

/// Makes the namespace of a member, on the hosts' first network.
pub(super) fn make(root: &Path, middle: &Netns, member: usize) -> anyhow::Result<Netns> {
    use std::os::fd::AsFd;
    let (netns, own) = (Netns::create()?, format!("e{}", member + 1));
    netns.bind(&root.join("netns").join(&own))?;
    middle.run(|| {
        let mut socket = Socket::open(Protocol::Route)?;
        let this = link::VethEnd { name: name(&own), mac: None, netns: None };
        let peer = link::VethEnd { name: name("eth0"), mac: None, netns: Some(netns.as_fd()) };
        link::create_veth(&mut socket, 1500, this, peer)?;
        let (port, bridge) = (index(&mut socket, &own)?, index(&mut socket, "lan0")?);
        anyhow::Ok(link::enslave(&mut socket, port, bridge, flannel::object::bridge::Port::default())?)
    })??;
    netns.run(|| {
        let mut socket = Socket::open(Protocol::Route)?;
        link::set_up(&mut socket, 1, true)?;
        let eth0 = index(&mut socket, "eth0")?;
        link::set_up(&mut socket, eth0, true)?;
        anyhow::Ok(addr::add(&mut socket, eth0, format!("{}/24", address(member)).parse()?)?)
    })??;
    Ok(netns)
}

impl Lab {
    /// Starts a member, or starts it again with the data that it had.
    pub(super) fn start_member(&self, program: &Path, member: usize) -> anyhow::Result<Child> {
        let (own, log) = (format!("e{}", member + 1), self.root.join("store.log"));
        let url = |member: usize, port: u16| format!("http://{}:{port}", address(member));
        let all: Vec<String> = (0..MEMBERS).map(|other| format!("e{}={}", other + 1, url(other, 2380))).collect();
        let mut command = Command::new(program);
        command.arg("--data-dir").arg(self.root.join("store").join(&own)).args(["--name", &own, QUOTA, "--log-outputs", "stderr"]);
        command.args(["--listen-client-urls", &url(member, 2379), "--advertise-client-urls", &url(member, 2379)]);
        command.args(["--listen-peer-urls", &url(member, 2380), "--initial-advertise-peer-urls", &url(member, 2380)]);
        command.args(["--initial-cluster", &all.join(",")]);
        let child = self.members[member].run(|| spawn(&mut command, &log))?;
        child.with_context(|| format!("cannot start {}", program.display()))
    }

    /// Kills one member, as a power cut would.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill_member(&mut self, member: usize) -> anyhow::Result<()> {
        let child = self.store.get_mut(member).context("the store has no such member")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Starts a member again that was killed.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn restart_member(&mut self, member: usize) -> anyhow::Result<()> {
        let crate::StoreKind::Members(program) = self.plan.store.clone() else { bail!("the store has no members") };
        self.store[member] = self.start_member(&program, member)?;
        Ok(())
    }

    /// Waits until the members have found each other.
    pub(super) fn await_members(&mut self) -> anyhow::Result<()> {
        let end = Instant::now() + PATIENCE;
        while self.with_store(async |store| store.config().await).is_err() {
            ensure!(Instant::now() < end, "the members do not find each other:\n{}", tail(&self.root.join("store.log")));
        }
        Ok(())
    }
}
