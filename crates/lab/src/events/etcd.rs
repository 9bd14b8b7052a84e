//! Failures of an etcd of three members.

use std::time::{Duration, Instant};

use super::{ClusterEvent, interrupting, unnoticed};
use crate::cluster::members::{CTL, MEMBERS, ROLE, endpoints};
use crate::process::shell;
use crate::stage::{Stage, observe};

/// Failures of an etcd of three members.
pub const ETCD: [ClusterEvent; 6] = [
    unnoticed("a member is killed: a new lease reaches all hosts", member_killed),
    unnoticed("a member is cut off from the other two: a new lease reaches all hosts", member_isolated),
    unnoticed("a member stops answering hosts: a new lease reaches all hosts", member_silent),
    unnoticed("a host is cut off while leases change and are compacted: a new lease reaches all hosts", compacted),
    interrupting("the quota is used up, all routes are flushed: they are back", quota_full),
    interrupting("the daemons' permission is revoked, all routes are flushed: they are back", right_revoked),
];

fn member_killed(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let member = host % MEMBERS;
    stage.lab.kill_member(member)?;
    let took = stage.new_lease_arrives(Instant::now())?;
    stage.lab.restart_member(member)?;
    stage.new_lease_arrives(Instant::now())?;
    Ok(took)
}

/// Drops packets that a rule of a member matches while `f` runs.
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
    stage.new_lease_arrives(Instant::now())?;
    Ok(took)
}

fn member_isolated(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let rule = "nft add rule inet faults in tcp dport 2380 drop; nft add rule inet faults in tcp sport 2380 drop";
    dropping(stage, host, rule, |stage| stage.new_lease_arrives(Instant::now()))
}

fn member_silent(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    dropping(stage, host, "nft add rule inet faults in tcp dport 2379 drop", |stage| stage.new_lease_arrives(Instant::now()))
}

fn compacted(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let chain = "nft add table inet faults; nft add chain inet faults in '{ type filter hook input priority 0; }'";
    stage.lab.hosts[host].shell(&format!("{chain}; nft add rule inet faults in tcp sport 2379 drop"))?;
    let ctl = format!("{CTL} --endpoints {}", endpoints());
    let outcome = shell(
        &stage.lab.middle,
        &format!(
            "for n in 1 2 3; do {ctl} put /coreos.com/network/subnets/10.244.99.0-24 '{{\"PublicIP\":\"10.0.0.99\"}}'; \
             {ctl} del /coreos.com/network/subnets/10.244.99.0-24; done; \
             {ctl} compact $({ctl} get / -w json | sed 's/.*\"revision\":\\([0-9]*\\).*/\\1/')"
        ),
    );
    stage.lab.hosts[host].shell("nft delete table inet faults")?;
    outcome?;
    stage.new_lease_arrives(Instant::now())
}

fn flushed(stage: &Stage, host: usize) -> anyhow::Result<Duration> {
    let whole = observe(&stage.lab, host)?;
    let began = Instant::now();
    stage.lab.hosts[host].shell("ip route flush proto 241")?;
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
    stage.new_lease_arrives(Instant::now())?;
    Ok(took)
}

fn right_revoked(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let ctl = format!("{CTL} --endpoints {}", endpoints());
    shell(&stage.lab.middle, &format!("{ctl} role revoke-permission flannel --prefix=true /coreos.com/network/"))?;
    let took = flushed(stage, host);
    // Long enough for daemons to send a request.
    std::thread::sleep(Duration::from_secs(1));
    shell(&stage.lab.middle, &format!("{ctl} role grant-permission flannel {ROLE}"))?;
    stage.new_lease_arrives(Instant::now())?;
    took
}
