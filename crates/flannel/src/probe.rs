//! Path probes: which peer is probed when, and the meaning of the answers. What is reported about a peer's path is measured here or called
//! unmeasured.
//!
//! A path is one family of one peer. Its main probe has the size of the pods' MTU and may not be fragmented. Toward a host of ours it is a
//! datagram that the peer's daemon returns ([`message`]), which covers the encapsulation, the MTU and the transport checksum at once. Toward
//! any other flannel host it is an ICMP echo, which the kernel answers, and now and then a TCP connection to a closed port, which the kernel
//! refuses. When a main probe is lost, the other measures follow at once and the [`Verdict`] says which part of the path is broken.

pub mod message;
mod path;
mod prober;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crate::lease::LeaseKey;
use crate::net::Family;

pub use message::Summary;
pub use prober::{Change, Failure, How, Probe, Prober};

/// The identity of a path.
pub type PathId = (LeaseKey, Family);

/// Where the data path to a peer's pods can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// The backend's device at the peer has the first address of the peer's subnet, and the kernel there answers for it.
    Device,
    /// Packets are not encapsulated: the peer's own address is on the same way. The bridge of its pods, with the second address of its
    /// subnet, answers once the peer has had a pod.
    Bridge,
    /// No address there is known to answer, for this reason.
    Unknown(&'static str),
}

/// One path to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The peer's lease.
    pub key: LeaseKey,
    /// The family.
    pub family: Family,
    /// The peer's published address.
    pub underlay: IpAddr,
    /// Where the data path is measured.
    pub point: Point,
    /// MTU of the data path, in bytes.
    pub mtu: u32,
}

impl Target {
    /// The address that stands for the peer's pods, if there is one.
    fn data(&self) -> Option<IpAddr> {
        match self.point {
            Point::Device => self.nth(0),
            Point::Bridge => Some(self.underlay),
            Point::Unknown(_) => None,
        }
    }

    /// The address of the bridge of the peer's pods.
    fn bridge(&self) -> Option<IpAddr> {
        (self.point == Point::Bridge).then(|| self.nth(1)).flatten()
    }

    fn nth(&self, n: u128) -> Option<IpAddr> {
        let subnet = self.key.subnets().get(self.family)?;
        Some(self.family.address(crate::net::bits_of(subnet.network()) + n))
    }
}

/// The state of a path, measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is not measured, for this reason.
    Unmeasured(&'static str),
    /// Packets of the pods' full MTU arrive and come back.
    Reachable,
    /// The host itself does not answer.
    UnderlayDown,
    /// The host answers, its end of the pod network does not.
    OverlayBroken,
    /// Small packets pass, those of the pods' MTU do not.
    MtuTooLarge {
        /// The MTU of this host's end, in bytes.
        mtu: u32,
        /// The largest packet that passed, in bytes, once it is known.
        passes: Option<u32>,
    },
    /// Pings pass, TCP or UDP does not, though it does without the encapsulation.
    ChecksumBroken,
    /// Packets arrive there, the answers are lost.
    AnswersLost,
    /// Packets from there arrive, those to it are lost.
    RequestsLost,
}

impl Verdict {
    /// Its name, for machines.
    pub fn name(&self) -> &'static str {
        match self {
            Verdict::Unmeasured(_) => "unmeasured",
            Verdict::Reachable => "reachable",
            Verdict::UnderlayDown => "underlay-down",
            Verdict::OverlayBroken => "overlay-broken",
            Verdict::MtuTooLarge { .. } => "mtu-too-large",
            Verdict::ChecksumBroken => "checksum-broken",
            Verdict::AnswersLost | Verdict::RequestsLost => "one-way",
        }
    }

    /// All names that [`Verdict::name`] returns.
    pub const NAMES: [&str; 7] =
        ["unmeasured", "reachable", "underlay-down", "overlay-broken", "mtu-too-large", "checksum-broken", "one-way"];

    /// Whether packets of pods are lost.
    pub fn is_broken(&self) -> bool {
        !matches!(self, Verdict::Unmeasured(_) | Verdict::Reachable)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Unmeasured(reason) => write!(f, "not measured: {reason}"),
            Verdict::Reachable => f.write_str("packets of the pods' MTU arrive and come back"),
            Verdict::UnderlayDown => f.write_str("the host does not answer: it is down, or the network between the hosts is"),
            Verdict::OverlayBroken => f.write_str(
                "the host answers, but its end of the pod network does not: its flanneld never ran, or the encapsulated packets are dropped",
            ),
            Verdict::MtuTooLarge { mtu, passes: None } => {
                write!(f, "small packets pass, those of {mtu} bytes do not: the path has a smaller MTU than the pods")
            }
            Verdict::MtuTooLarge { mtu, passes: Some(passes) } => {
                write!(f, "the path carries packets of {passes} bytes, pods send up to {mtu}: lower the MTU by {} bytes", mtu - passes)
            }
            Verdict::ChecksumBroken => f.write_str(
                "pings pass, TCP and UDP do not: a broken checksum offload (ethtool -K DEVICE tx-checksum-ip-generic off), or a firewall at \
                 the peer's end of the pod network",
            ),
            Verdict::AnswersLost => f.write_str("packets arrive there, the answers are lost on the way back"),
            Verdict::RequestsLost => f.write_str("packets from there arrive, those to it are lost"),
        }
    }
}

/// A path with its measurements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Its state.
    pub verdict: Verdict,
    /// When that state began, by the prober's clock.
    pub since: Duration,
    /// The mean round-trip time of the last minute's main probes.
    pub rtt: Option<Duration>,
    /// Main probes of the last minute that were concluded.
    pub sent: u32,
    /// Those of them that were lost.
    pub lost: u32,
    /// Why this host could not even send, if it could not.
    pub error: Option<String>,
    /// What the peer's daemon says about itself, if it is one of ours and answers.
    pub summary: Option<Summary>,
}
