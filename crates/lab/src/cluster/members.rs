//! A store of three members, each in a namespace of its own.

use std::path::Path;
use std::process::{Child, Command};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::{addr, link};

use super::wire::{connect, index};
use super::{Lab, START_TIMEOUT};
use crate::plan::StoreKind;
use crate::process::{shell, spawn, tail};

/// The smallest number of which one may be lost.
pub(crate) const MEMBERS: usize = 3;
/// `etcdctl`, with timeouts for a busy machine.
const PLAIN: &str = "ETCDCTL_API=3 etcdctl --command-timeout=60s --dial-timeout=20s";
/// The same as root.
pub(crate) const CTL: &str = "ETCDCTL_API=3 etcdctl --command-timeout=60s --dial-timeout=20s --user root:root";
/// The permission of the daemons.
pub(crate) const ROLE: &str = "--prefix=true readwrite /coreos.com/network/";
/// Small enough for a test to fill it.
const QUOTA: &str = "--quota-backend-bytes=12000000";

/// The address of a member.
pub(super) fn address(member: usize) -> String {
    format!("10.0.0.{}", 251 + member)
}

/// The endpoints for clients.
pub(crate) fn endpoints() -> String {
    (0..MEMBERS).map(|member| format!("http://{}:2379", address(member))).collect::<Vec<_>>().join(",")
}

/// Creates the namespace of a member, on the hosts' first network.
pub(super) fn create(root: &Path, middle: &Netns, member: usize) -> anyhow::Result<Netns> {
    let (netns, own) = (Netns::create()?, format!("e{}", member + 1));
    netns.bind(&root.join("netns").join(&own))?;
    connect(middle, &netns, &own, 0)?;
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
    /// Creates users and passwords at an etcd of several members and enables authentication.
    ///
    /// # Errors
    /// When `etcdctl` fails.
    pub fn enable_auth(&self) -> anyhow::Result<()> {
        let ctl = format!("{PLAIN} --endpoints {}", endpoints());
        let script = format!(
            "{ctl} user add root:root; {ctl} user grant-role root root; {ctl} role add flannel; {ctl} role grant-permission flannel {ROLE}; \
             {ctl} user add flannel:flannel; {ctl} user grant-role flannel flannel; {ctl} auth enable"
        );
        shell(&self.middle, &script).map(drop)
    }

    /// Starts a member; one that was killed continues with its data.
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
    /// When its end cannot be awaited.
    pub fn kill_member(&mut self, member: usize) -> anyhow::Result<()> {
        let child = self.store.get_mut(member).context("the store has no such member")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Restarts a member that was killed.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn restart_member(&mut self, member: usize) -> anyhow::Result<()> {
        let StoreKind::Members(program) = self.plan.store.clone() else { bail!("the store has no members") };
        self.store[member] = self.start_member(&program, member)?;
        Ok(())
    }

    /// Waits until the members have elected a leader.
    pub(super) fn await_members(&mut self) -> anyhow::Result<()> {
        let end = Instant::now() + START_TIMEOUT;
        while self.with_store(async |store| store.config().await).is_err() {
            ensure!(Instant::now() < end, "the members of the store elect no leader:\n{}", tail(&self.root.join("store.log")));
        }
        Ok(())
    }
}
