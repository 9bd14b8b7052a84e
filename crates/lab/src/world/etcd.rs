//! What happens to an etcd of three members.

use std::time::{Duration, Instant};

use super::{Stage, World, cutting, unnoticed};
use crate::faults::{observe, shell};
use crate::members::{MEMBERS, endpoints};

/// What happens to it.
pub const ETCD: [World; 6] = [
    unnoticed("a member is killed: all hear of a new lease", member_killed),
    unnoticed("a member loses the other two: all hear of a new lease", member_isolated),
    unnoticed("a member does not answer hosts any more: all hear of a new lease", member_silent),
    unnoticed("a host is cut off while leases change and are compacted: all hear of a new lease", compacted),
    cutting("the quota is full, all routes are flushed: they are back", quota_full),
    cutting("the daemons' right is revoked, all routes are flushed: they are back", right_revoked),
];

/// `etcdctl`, with the patience that a busy machine asks for.
const PLAIN: &str = "ETCDCTL_API=3 etcdctl --command-timeout=60s --dial-timeout=20s";
/// The same as root.
const CTL: &str = "ETCDCTL_API=3 etcdctl --command-timeout=60s --dial-timeout=20s --user root:root";
const ROLE: &str = "--prefix=true readwrite /coreos.com/network/";

/// Makes users and passwords, and the etcd ask for them.
///
/// # Errors
/// When `etcdctl` fails.
pub fn enable_auth(lab: &crate::Lab) -> anyhow::Result<()> {
    let ctl = format!("{PLAIN} --endpoints {}", endpoints());
    shell(
        &lab.middle,
        &format!(
            "{ctl} user add root:root; {ctl} user grant-role root root; {ctl} role add flannel; {ctl} role grant-permission flannel {ROLE}; \
             {ctl} user add flannel:flannel; {ctl} user grant-role flannel flannel; {ctl} auth enable"
        ),
    )
    .map(drop)
}

fn member_killed(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let member = host % MEMBERS;
    stage.lab.kill_member(member)?;
    let took = stage.heard(Instant::now())?;
    stage.lab.restart_member(member)?;
    stage.heard(Instant::now())?;
    Ok(took)
}

/// Drops what a member gets by a rule while `f` runs.
fn dropping(
    stage: &mut Stage,
    host: usize,
    rule: &str,
    f: impl FnOnce(&mut Stage) -> anyhow::Result<Duration>,
) -> anyhow::Result<Duration> {
    let member = host % MEMBERS;
    let chain = "nft add table inet faults; nft add chain inet faults in '{ type filter hook input priority 0; }'";
    shell(&stage.lab.members[member], &format!("{chain}; {rule}"))?;
    let outcome = f(stage);
    shell(&stage.lab.members[member], "nft delete table inet faults")?;
    let took = outcome?;
    stage.heard(Instant::now())?;
    Ok(took)
}

fn member_isolated(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let rule = "nft add rule inet faults in tcp dport 2380 drop; nft add rule inet faults in tcp sport 2380 drop";
    dropping(stage, host, rule, |stage| stage.heard(Instant::now()))
}

fn member_silent(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    dropping(stage, host, "nft add rule inet faults in tcp dport 2379 drop", |stage| stage.heard(Instant::now()))
}

fn compacted(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let netns = kernel::netns::Netns::open(&stage.root.join("netns").join(&stage.lab.hosts[host].name))?;
    let chain = "nft add table inet faults; nft add chain inet faults in '{ type filter hook input priority 0; }'";
    shell(&netns, &format!("{chain}; nft add rule inet faults in tcp sport 2379 drop"))?;
    let ctl = format!("{CTL} --endpoints {}", endpoints());
    let outcome = shell(
        &stage.lab.middle,
        &format!(
            "for n in 1 2 3; do {ctl} put /coreos.com/network/subnets/10.244.99.0-24 '{{\"PublicIP\":\"10.0.0.99\"}}'; \
             {ctl} del /coreos.com/network/subnets/10.244.99.0-24; done; \
             {ctl} compact $({ctl} get / -w json | sed 's/.*\"revision\":\\([0-9]*\\).*/\\1/')"
        ),
    );
    shell(&netns, "nft delete table inet faults")?;
    outcome?;
    stage.heard(Instant::now())
}

fn flushed(stage: &Stage, host: usize) -> anyhow::Result<Duration> {
    let whole = observe(&stage.lab, host)?;
    let began = Instant::now();
    shell(&stage.lab.hosts[host].netns, "ip route flush proto 241")?;
    stage.until(began, "the routes are back", |stage| Ok(observe(&stage.lab, host)? == whole))
}

fn quota_full(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let ctl = format!("{CTL} --endpoints {}", endpoints());
    shell(
        &stage.lab.middle,
        &format!(
            "n=0; while head -c 900000 /dev/zero | tr '\\0' x | {ctl} put /fill/$n > /dev/null 2>&1; do n=$((n + 1)); test $n -lt 60; done; {ctl} alarm list | grep -q NOSPACE"
        ),
    )?;
    let took = flushed(stage, host)?;
    shell(
        &stage.lab.middle,
        &format!(
            "{ctl} del --prefix /fill/; {ctl} compact $({ctl} get / -w json | sed 's/.*\"revision\":\\([0-9]*\\).*/\\1/'); {ctl} defrag; {ctl} alarm disarm"
        ),
    )?;
    stage.heard(Instant::now())?;
    Ok(took)
}

fn right_revoked(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let ctl = format!("{CTL} --endpoints {}", endpoints());
    shell(&stage.lab.middle, &format!("{ctl} role revoke-permission flannel --prefix=true /coreos.com/network/"))?;
    let took = flushed(stage, host);
    // Long enough that daemons ask for something.
    std::thread::sleep(Duration::from_secs(1));
    shell(&stage.lab.middle, &format!("{ctl} role grant-permission flannel {ROLE}"))?;
    stage.heard(Instant::now())?;
    took
}
