//! The prober against a network that is broken on purpose.

use super::*;
use crate::net::PerFamily;
use std::collections::BTreeMap;

const MTU: u32 = 1450;
const ROUND_TRIP: Duration = Duration::from_millis(1);

/// What is wrong with a path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Fault {
    /// The host itself does not answer.
    host: bool,
    /// Packets to the peer's end of the pod network are lost.
    requests: bool,
    /// Packets from there are lost.
    answers: bool,
    /// Larger packets are lost on the data path.
    mtu: Option<u32>,
    /// TCP and UDP are lost on the data path.
    checksum: bool,
    /// The peer's daemon does not run.
    daemon: bool,
    /// The peer's firewall drops pings.
    pings: bool,
}

/// A network of peers, and a prober that measures it.
struct Network {
    prober: Prober,
    targets: Vec<Target>,
    faults: Vec<Fault>,
    are_ours: bool,
    arrived: BTreeMap<usize, u64>,
    now: Duration,
    token: u64,
    /// When each probe was sent.
    sent: Vec<Duration>,
}

impl Network {
    fn new(peers: usize, point: Point, are_ours: bool) -> Network {
        let target = |i: usize| {
            let [a, b] = u16::try_from(i + 1).unwrap().to_be_bytes();
            let subnet = format!("10.{a}.{b}.0/24").parse().unwrap();
            let key = LeaseKey::new(PerFamily { v4: Some(subnet), v6: None }).unwrap();
            Target { key, family: Family::V4, underlay: format!("192.168.{a}.{b}").parse().unwrap(), point, mtu: MTU }
        };
        let targets: Vec<Target> = (0..peers).map(target).collect();
        let mut prober = Prober::default();
        prober.set_targets(targets.clone(), Duration::ZERO);
        let faults = vec![Fault::default(); peers];
        Network { prober, targets, faults, are_ours, arrived: BTreeMap::new(), now: Duration::ZERO, token: 0, sent: Vec::new() }
    }

    /// Whether the probe is answered, and by which datagram.
    fn carry(&mut self, probe: &Probe) -> Option<Vec<u8>> {
        let of = |target: &Target| [Some(target.underlay), target.data(), target.bridge()].contains(&Some(probe.to));
        let peer = self.targets.iter().position(of).unwrap();
        let (target, fault) = (&self.targets[peer], self.faults[peer]);
        let by_data = target.point == Point::Device && Some(probe.to) == target.data();
        let (length, is_transport) = match &probe.how {
            How::Echo(length) => (*length, false),
            How::Datagram(bytes) => (u32::try_from(bytes.len()).unwrap() + 28, true),
            How::Connect => (60, true),
        };
        let is_for_pods = by_data || target.point == Point::Bridge;
        let is_lost = fault.host
            || (by_data && fault.requests)
            || (is_for_pods && fault.mtu.is_some_and(|mtu| length > mtu))
            || (by_data && fault.checksum && is_transport)
            || (fault.pings && matches!(probe.how, How::Echo(_)));
        if is_lost {
            return None;
        }
        let answer = match &probe.how {
            How::Datagram(bytes) if self.are_ours && !fault.daemon => {
                if bytes[6] == 1 {
                    self.arrived.insert(peer, probe.token);
                }
                let summary = Summary { version: "1".to_owned(), ready: true, failures: 0, mtu: MTU };
                message::reply(bytes, self.arrived.get(&peer).copied().unwrap_or_default(), &summary)
            }
            How::Datagram(_) => return None,
            How::Echo(_) | How::Connect => Vec::new(),
        };
        (!(by_data && fault.answers)).then_some(answer)
    }

    /// Runs until a time, and returns at once when `until` is true.
    fn run(&mut self, end: Duration, until: impl Fn(&Network) -> bool) -> bool {
        while self.now < end {
            if until(self) {
                return true;
            }
            self.token += 1;
            if let Some(probe) = self.prober.next(self.now, self.token) {
                self.sent.push(self.now);
                if let Some(answer) = self.carry(&probe) {
                    let now = self.now + ROUND_TRIP;
                    match answer.is_empty() {
                        true => self.prober.answer(probe.token, now),
                        false => assert_eq!(self.prober.datagram(probe.to, &answer, &Summary::default(), now), None),
                    }
                }
            }
            let due = self.prober.due().unwrap_or(end);
            self.now = due.max(self.now + Duration::from_millis(1)).min(end);
        }
        until(self)
    }

    fn verdict(&self, peer: usize) -> Verdict {
        let target = &self.targets[peer];
        self.prober.reports(self.now)[&(target.key, target.family)].verdict.clone()
    }

    fn are_all(&self, verdict: &Verdict) -> bool {
        (0..self.targets.len()).all(|peer| self.verdict(peer) == *verdict)
    }
}

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Breaks the path to one of ten peers, and returns the verdict after five seconds and after another five without the fault.
fn broken(point: Point, are_ours: bool, fault: Fault) -> (Verdict, Verdict) {
    let mut network = Network::new(10, point, are_ours);
    assert!(network.run(seconds(20), |network| network.now > seconds(15) && network.are_all(&Verdict::Reachable)));
    network.faults[3] = fault;
    let at = network.now;
    network.run(at + seconds(9), |_| false);
    let found = network.verdict(3);
    for peer in (0..10).filter(|peer| *peer != 3) {
        assert_eq!(network.verdict(peer), Verdict::Reachable);
    }
    network.faults[3] = Fault::default();
    network.run(at + seconds(19), |_| false);
    (found, network.verdict(3))
}

#[test]
fn each_fault_has_its_verdict_and_ends() {
    let host = Fault { host: true, ..Fault::default() };
    let both = Fault { requests: true, answers: true, ..Fault::default() };
    let answers = Fault { answers: true, ..Fault::default() };
    let mtu = Fault { mtu: Some(1387), ..Fault::default() };
    let checksum = Fault { checksum: true, ..Fault::default() };
    let daemon = Fault { daemon: true, ..Fault::default() };
    let pings = Fault { pings: true, ..Fault::default() };
    let tcp_only =
        Verdict::Unmeasured("it answers TCP, but neither pings nor probes (UDP, --probe-port): let its firewall accept one of them");
    let too_large = Verdict::MtuTooLarge { mtu: MTU, passes: Some(1387) };
    for (fault, ours, other) in [
        (host, Verdict::UnderlayDown, Verdict::UnderlayDown),
        (both, Verdict::OverlayBroken, Verdict::OverlayBroken),
        // Another flannel does not say what arrives.
        (answers, Verdict::AnswersLost, Verdict::OverlayBroken),
        (mtu, too_large.clone(), too_large.clone()),
        (checksum, Verdict::ChecksumBroken, Verdict::ChecksumBroken),
        (daemon, Verdict::Reachable, Verdict::Reachable),
        (pings, Verdict::Reachable, tcp_only),
    ] {
        for (are_ours, wanted) in [(true, ours), (false, other)] {
            assert_eq!(broken(Point::Device, are_ours, fault), (wanted, Verdict::Reachable), "{fault:?}, ours: {are_ours}");
        }
    }
    for are_ours in [true, false] {
        assert_eq!(broken(Point::Bridge, are_ours, host), (Verdict::UnderlayDown, Verdict::Reachable), "ours: {are_ours}");
        assert_eq!(broken(Point::Bridge, are_ours, mtu), (too_large.clone(), Verdict::Reachable), "ours: {are_ours}");
    }
    assert_eq!(broken(Point::Bridge, true, pings), (Verdict::Reachable, Verdict::Reachable));
}

#[test]
fn a_limit_that_changes_is_found_again() {
    let mut network = Network::new(2, Point::Device, true);
    assert!(network.run(seconds(9), |network| network.now > seconds(5) && network.are_all(&Verdict::Reachable)));
    for mtu in [700, 1300, 437, 1449] {
        network.faults[1].mtu = Some(mtu);
        network.run(network.now + seconds(30), |_| false);
        assert_eq!(network.verdict(1), Verdict::MtuTooLarge { mtu: MTU, passes: Some(mtu) });
    }
}

#[test]
fn messages_that_arrive_from_a_peer_tell_the_direction() {
    let mut network = Network::new(2, Point::Device, true);
    assert!(network.run(seconds(9), |network| network.now > seconds(5) && network.are_all(&Verdict::Reachable)));
    network.faults[1] = Fault { requests: true, ..Fault::default() };
    let end = network.now + seconds(6);
    while network.now < end {
        // The peer's own probes arrive.
        let request = message::request(99, true, 60);
        let from = network.targets[1].data().unwrap();
        let reply = network.prober.datagram(from, &request, &Summary::default(), network.now).unwrap();
        assert!(matches!(message::parse(&reply), Some(message::Message::Reply { arrived: 99, .. })));
        let next = network.now + Duration::from_millis(200);
        network.run(next, |_| false);
    }
    assert_eq!(network.verdict(1), Verdict::RequestsLost);
}

#[test]
fn a_break_is_seen_in_time_and_the_budget_holds() {
    for (peers, limit) in [(2, 3), (30, 4), (1000, 120)] {
        let mut network = Network::new(peers, Point::Device, true);
        let settled = seconds(10 + u64::try_from(peers).unwrap() / 2);
        assert!(network.run(settled * 4, |network| network.now > settled && network.are_all(&Verdict::Reachable)), "{peers}");
        let at = network.now;
        network.faults[0].host = true;
        let seen = |network: &Network| network.verdict(0) == Verdict::UnderlayDown;
        assert!(network.run(at + seconds(limit), seen), "{peers}: not within {limit} s");
        for window in network.sent.windows(11) {
            assert!(window[10] - window[0] >= seconds(1), "{peers}: more than ten probes in a second");
        }
    }
}

#[test]
fn all_paths_break_and_come_back() {
    let mut network = Network::new(50, Point::Device, true);
    assert!(network.run(seconds(60), |network| network.are_all(&Verdict::Reachable)));
    network.faults.iter_mut().for_each(|fault| fault.host = true);
    assert!(network.run(network.now + seconds(60), |network| network.are_all(&Verdict::UnderlayDown)));
    network.faults.iter_mut().for_each(|fault| fault.host = false);
    assert!(network.run(network.now + seconds(30), |network| network.are_all(&Verdict::Reachable)));
}

#[test]
fn one_lost_probe_changes_no_verdict_and_counts_as_loss() {
    let mut network = Network::new(1, Point::Device, true);
    network.run(seconds(10), |_| false);
    let sent = network.sent.len();
    network.faults[0].host = true;
    network.run(seconds(15), |network| network.sent.len() > sent);
    network.faults[0].host = false;
    network.prober.take_changes();
    network.run(seconds(40), |_| false);
    assert_eq!(network.prober.take_changes(), Vec::new());
    let report = network.prober.reports(network.now).into_values().next().unwrap();
    assert_eq!((report.lost, report.verdict), (1, Verdict::Reachable));
    assert_eq!(report.rtt, Some(ROUND_TRIP));
    assert_eq!(report.summary.unwrap().version, "1");
    network.run(seconds(110), |_| false);
    assert_eq!(network.prober.reports(network.now).into_values().next().unwrap().lost, 0, "it is over a minute ago");
}

#[test]
fn strangers_get_no_answer_and_peers_a_limited_number() {
    let mut network = Network::new(1, Point::Device, true);
    let request = message::request(5, true, 60);
    let mut ask = |from: IpAddr, at| network.prober.datagram(from, &request, &Summary::default(), at).is_some();
    assert!(!ask("10.0.1.7".parse().unwrap(), seconds(1)));
    assert!(!ask("203.0.113.1".parse().unwrap(), seconds(1)));
    let peer = "192.168.0.1".parse().unwrap();
    assert_eq!((0..100).filter(|_| ask(peer, seconds(1))).count(), 20);
    assert!(ask(peer, seconds(2)));
}

#[test]
fn answers_with_other_tokens_are_ignored() {
    let mut network = Network::new(1, Point::Device, true);
    let probe = network.prober.next(Duration::ZERO, 7).unwrap();
    network.prober.answer(8, ROUND_TRIP);
    let forged = message::reply(&message::request(8, true, 60), 0, &Summary::default());
    assert_eq!(network.prober.datagram(probe.to, &forged, &Summary::default(), ROUND_TRIP), None);
    assert!(matches!(network.verdict(0), Verdict::Unmeasured(_)));
    network.prober.answer(7, ROUND_TRIP);
    assert_eq!(network.verdict(0), Verdict::Reachable);
}

#[test]
fn peers_that_are_new_or_changed_are_probed_at_once_and_gone_ones_no_more() {
    let mut network = Network::new(20, Point::Device, true);
    assert!(network.run(seconds(30), |network| network.are_all(&Verdict::Reachable)));
    let new = Network::new(21, Point::Device, true).targets.pop().unwrap();
    network.targets.push(new);
    network.faults.push(Fault::default());
    network.targets.remove(0);
    network.faults.remove(0);
    network.targets[5].underlay = "192.168.99.1".parse().unwrap();
    network.prober.set_targets(network.targets.clone(), network.now);
    let until = network.now + Duration::from_millis(500);
    assert!(network.run(until, |network| network.are_all(&Verdict::Reachable)));
    assert_eq!(network.prober.reports(network.now).len(), 20);
    network.prober.set_targets([], network.now);
    assert_eq!(network.prober.due(), None);
}

#[test]
fn a_backend_without_a_known_address_is_measured_as_far_as_its_host() {
    let mut network = Network::new(1, Point::Unknown("commands of the operator"), true);
    network.run(seconds(10), |_| false);
    assert_eq!(network.verdict(0), Verdict::Unmeasured("commands of the operator"));
    network.faults[0].host = true;
    network.run(seconds(20), |_| false);
    assert_eq!(network.verdict(0), Verdict::UnderlayDown);
}

#[test]
fn a_bridge_counts_once_it_has_answered() {
    let mut network = Network::new(1, Point::Bridge, true);
    let bridge = network.targets[0].bridge();
    let silent = |network: &mut Network, until: Duration, is_silent: bool| {
        while network.now < until {
            network.token += 1;
            if let Some(probe) = network.prober.next(network.now, network.token)
                && !(is_silent && Some(probe.to) == bridge)
                && let Some(answer) = network.carry(&probe)
            {
                let now = network.now + ROUND_TRIP;
                match answer.is_empty() {
                    true => network.prober.answer(probe.token, now),
                    false => drop(network.prober.datagram(probe.to, &answer, &Summary::default(), now)),
                }
            }
            network.now = network.prober.due().unwrap().max(network.now + ROUND_TRIP).min(until);
        }
    };
    silent(&mut network, seconds(10), true);
    assert_eq!(network.verdict(0), Verdict::Reachable);
    silent(&mut network, seconds(20), false);
    assert_eq!(network.verdict(0), Verdict::Reachable);
    silent(&mut network, seconds(30), true);
    assert_eq!(network.verdict(0), Verdict::OverlayBroken);
    silent(&mut network, seconds(40), false);
    assert_eq!(network.verdict(0), Verdict::Reachable);
}

mod laws {
    use super::*;
    use proptest::prelude::*;

    fn fault() -> impl Strategy<Value = Fault> {
        let mtu = prop::option::of(200..MTU);
        (any::<bool>(), any::<bool>(), any::<bool>(), mtu, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
            |(host, requests, answers, mtu, checksum, daemon, pings)| Fault { host, requests, answers, mtu, checksum, daemon, pings },
        )
    }

    /// The verdicts that may stand for what is wrong.
    fn is_true(verdict: &Verdict, fault: Fault, point: Point, are_ours: bool) -> bool {
        let messages = are_ours && !fault.daemon;
        let by_device = point == Point::Device;
        // Something that is not visible at all, or not to the measures that are left.
        let is_dead = fault.host || (by_device && (fault.requests || fault.answers));
        let is_blind = fault.pings && !messages;
        match verdict {
            Verdict::Reachable => !is_dead && (fault.mtu.is_none() || is_blind),
            // Nothing answers, or only the host itself, which is not a broken network if its firewall drops all that is sent.
            Verdict::UnderlayDown => fault.host || fault.pings,
            Verdict::OverlayBroken => is_dead || fault.pings || (by_device && fault.checksum) || fault.mtu.is_some_and(|mtu| mtu < 200),
            Verdict::MtuTooLarge { passes, .. } => fault.mtu.is_some() && passes.is_none_or(|passes| Some(passes) == fault.mtu),
            Verdict::ChecksumBroken => by_device && fault.checksum,
            Verdict::AnswersLost => by_device && (fault.answers || fault.mtu.is_some()),
            Verdict::RequestsLost => false,
            Verdict::Unmeasured(_) => fault.pings,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever breaks, and in whatever order, each verdict is true a while later, a healed path is reachable, and the budget holds.
        #[test]
        fn verdicts_become_true(
            faults in prop::collection::vec((0_usize..6, fault(), 1_u64..40), 1..8),
            is_device: bool,
            are_ours: bool,
        ) {
            let point = if is_device { Point::Device } else { Point::Bridge };
            let mut network = Network::new(6, point, are_ours);
            for (peer, fault, wait) in faults {
                network.faults[peer] = fault;
                network.run(network.now + seconds(wait), |_| false);
            }
            network.run(network.now + seconds(60), |_| false);
            for peer in 0..6 {
                let (verdict, fault) = (network.verdict(peer), network.faults[peer]);
                prop_assert!(is_true(&verdict, fault, point, are_ours), "{verdict:?} for {fault:?}, {point:?}, ours: {are_ours}");
            }
            network.faults.fill(Fault::default());
            network.run(network.now + seconds(60), |_| false);
            prop_assert!(network.are_all(&Verdict::Reachable));
            for window in network.sent.windows(11) {
                prop_assert!(window[10] - window[0] >= seconds(1));
            }
        }
    }
}
