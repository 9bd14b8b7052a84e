//! One path: what was measured, what is measured next, and the verdict.

use std::collections::BTreeSet;
use std::time::Duration;

use super::message::Summary;
use super::{Point, Report, Target, Verdict};

/// How long a path that never answered may still be set up by its host.
const GRACE: Duration = Duration::from_secs(3);
/// Pause between two attempts in that time.
const EARLY: Duration = Duration::from_millis(300);
/// The reason for no verdict before the first answer.
const PENDING: &str = "no answer yet";
/// The reason for no verdict about a host that answers no other probe.
const TCP_ONLY: &str = "it answers TCP, but neither pings nor probes (UDP, --probe-port): let its firewall accept one of them";
/// Lost main probes of a broken path between two full diagnoses.
const DIAGNOSE_EACH: u32 = 4;
/// The loss and the round-trip time are those of this many buckets of this length.
const BUCKETS: usize = 6;
const BUCKET: Duration = Duration::from_secs(10);

/// One way to measure a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Measure {
    /// A datagram of the pods' MTU to the peer's daemon, by the data path.
    Message,
    /// An echo of the pods' MTU, by the data path.
    Echo,
    /// A small echo, by the data path.
    Small,
    /// A small echo to the peer's published address.
    Underlay,
    /// A small datagram to the peer's daemon at its published address: it says which messages arrived.
    Control,
    /// A connection to a closed port, by the data path.
    Connect,
    /// The same at the peer's published address.
    ControlConnect,
    /// A small echo to the bridge of the peer's pods.
    Bridge,
    /// An echo of so many bytes by the data path, in search of the largest that passes.
    Size(u32),
}

/// The last result of a measure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Outcome {
    #[default]
    Unknown,
    Ok,
    /// So many times in a row.
    Lost(u32),
}

impl Outcome {
    fn is_lost(self, times: u32) -> bool {
        matches!(self, Outcome::Lost(lost) if lost >= times)
    }
}

/// How far the measurement of a path is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// It has never answered.
    New,
    /// Main probes only.
    Calm,
    /// These measures are under way to find out what is broken.
    Diagnosing(BTreeSet<Measure>),
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    number: u64,
    sent: u32,
    lost: u32,
    rtt: Duration,
}

/// The search for the largest packet that passes.
#[derive(Debug, Clone, Copy)]
struct Search {
    passes: u32,
    fails: u32,
}

/// A measure to take at a time.
pub(super) type Next = (Duration, Measure);

#[derive(Debug)]
pub(super) struct Path {
    pub(super) target: Target,
    appeared: Duration,
    phase: Phase,
    /// Whether the peer's daemon is ours and answers messages.
    is_ours: bool,
    turn: u32,
    outcomes: [Outcome; 8],
    search: Option<Search>,
    buckets: [Bucket; BUCKETS],
    /// Round-trip time of the last main probe.
    rtt: Option<Duration>,
    error: Option<String>,
    summary: Option<Summary>,
    verdict: Verdict,
    since: Duration,
    /// When the present trouble began.
    suspect: Duration,
    /// When the last message of the peer came through the pod network.
    received: Option<Duration>,
    /// Tokens of the last messages, since the present trouble began.
    messages: [u64; 4],
    /// Whether one of them arrived there.
    arrived: bool,
    /// Whether the bridge of the peer's pods has answered. One that never did may not exist yet.
    has_bridge: bool,
}

impl Path {
    pub(super) fn new(target: Target, now: Duration) -> Path {
        let verdict = Verdict::Unmeasured(match target.point {
            Point::Unknown(reason) => reason,
            Point::Device | Point::Bridge => PENDING,
        });
        Path {
            target,
            appeared: now,
            phase: Phase::New,
            is_ours: false,
            turn: 0,
            outcomes: Default::default(),
            search: None,
            buckets: Default::default(),
            rtt: None,
            error: None,
            summary: None,
            verdict,
            since: now,
            suspect: now,
            received: None,
            messages: [0; 4],
            arrived: false,
            has_bridge: false,
        }
    }

    pub(super) fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// How long an answer may take: some round trips; a path that never answered gets more.
    pub(super) fn patience(&self) -> Duration {
        match self.rtt {
            Some(rtt) if !self.verdict.is_broken() => {
                (rtt * 4 + Duration::from_millis(100)).clamp(Duration::from_millis(200), Duration::from_secs(1))
            }
            _ => Duration::from_secs(1),
        }
    }

    /// Length of a main probe, in bytes.
    pub(super) fn length(&self, measure: Measure) -> u32 {
        match measure {
            Measure::Message | Measure::Echo => self.target.mtu,
            Measure::Size(size) => size,
            Measure::Small | Measure::Underlay | Measure::Control | Measure::Connect | Measure::ControlConnect | Measure::Bridge => SMALL,
        }
    }

    /// The measure of the next regular turn.
    pub(super) fn turn(&mut self) -> Measure {
        let turn = self.turn;
        self.turn = turn.wrapping_add(1);
        match self.target.point {
            Point::Unknown(_) => Measure::Underlay,
            // A daemon of ours may have been started there.
            _ if !self.is_ours && turn % 16 == 1 => Measure::Message,
            Point::Bridge if turn % 2 == 1 => Measure::Bridge,
            Point::Device if !self.is_ours && turn % 4 == 2 => Measure::Connect,
            Point::Device | Point::Bridge => self.main(),
        }
    }

    /// The measure that is taken most: its loss is the path's.
    pub(super) fn main(&self) -> Measure {
        match (self.target.point, self.is_ours) {
            (Point::Unknown(_), _) => Measure::Underlay,
            (_, true) => Measure::Message,
            (_, false) => Measure::Echo,
        }
    }

    /// A message of the peer came through the pod network.
    pub(super) fn receive_message(&mut self, now: Duration) {
        self.received = Some(now);
    }

    /// A message is sent by the data path.
    pub(super) fn send_message(&mut self, token: u64) {
        self.messages.rotate_right(1);
        self.messages[0] = token;
    }

    /// The peer's daemon replied; `arrived` is the last message that arrived there by the data path, or 0.
    pub(super) fn reply(&mut self, summary: Summary, arrived: u64) {
        self.summary = Some(summary);
        self.arrived |= arrived != 0 && self.messages.contains(&arrived);
    }

    /// A measure was taken: its round-trip time, or why there was no answer (`None`: nothing came back in time). Returns what to measure
    /// next, beside the regular turns.
    pub(super) fn conclude(&mut self, measure: Measure, result: Result<Duration, Option<String>>, now: Duration) -> Vec<Next> {
        let is_ok = result.is_ok();
        if let Measure::Size(size) = measure {
            return self.narrow(size, is_ok, now);
        }
        let is_main = measure == self.main();
        let outcome = self.outcome(measure);
        *outcome = match (*outcome, is_ok) {
            (_, true) => Outcome::Ok,
            (Outcome::Lost(times), false) => Outcome::Lost(times.saturating_add(1)),
            (Outcome::Unknown | Outcome::Ok, false) => Outcome::Lost(1),
        };
        match result {
            Ok(rtt) => {
                if is_main || measure == Measure::Message {
                    self.count(now, Some(rtt));
                    self.error = None;
                }
                self.is_ours |= measure == Measure::Message;
                self.has_bridge |= measure == Measure::Bridge;
            }
            Err(error) => {
                if is_main {
                    self.count(now, None);
                    self.error = error;
                }
            }
        }
        match &mut self.phase {
            Phase::New => self.begin(measure, is_ok, now),
            Phase::Calm => self.look_closer(measure, is_ok, now),
            Phase::Diagnosing(open) => {
                open.remove(&measure);
                if is_ok && is_main {
                    self.phase = Phase::Calm;
                } else if !open.is_empty() {
                    return Vec::new();
                }
                self.decide(now)
            }
        }
    }

    fn outcome(&mut self, measure: Measure) -> &mut Outcome {
        let index = match measure {
            Measure::Message => 0,
            Measure::Echo | Measure::Size(_) => 1,
            Measure::Small => 2,
            Measure::Underlay => 3,
            Measure::Control => 4,
            Measure::Connect => 5,
            Measure::ControlConnect => 6,
            Measure::Bridge => 7,
        };
        &mut self.outcomes[index]
    }

    /// A result of a path that never answered.
    fn begin(&mut self, measure: Measure, is_ok: bool, now: Duration) -> Vec<Next> {
        if is_ok {
            // The next turn asks whether the peer's daemon is ours.
            self.turn = 1;
            return self.decide(now);
        }
        if measure != self.main() {
            return Vec::new();
        }
        if now < self.appeared + GRACE {
            return vec![(now + EARLY, measure)];
        }
        self.diagnose(now)
    }

    /// A result while nothing is wrong, or nothing new.
    fn look_closer(&mut self, measure: Measure, is_ok: bool, now: Duration) -> Vec<Next> {
        let is_known = self.verdict != Verdict::Reachable;
        let times = match *self.outcome(measure) {
            Outcome::Lost(times) => times,
            Outcome::Unknown | Outcome::Ok => 0,
        };
        match (measure, is_ok) {
            (Measure::Connect, false) if !is_known => self.open([Measure::Connect, Measure::ControlConnect, Measure::Echo], now),
            (Measure::Bridge, false) if !is_known && self.has_bridge && times % DIAGNOSE_EACH == 1 => {
                self.open([Measure::Bridge, Measure::Underlay], now)
            }
            (measure, false) if measure == self.main() => match is_known && !times.is_multiple_of(DIAGNOSE_EACH) {
                true => Vec::new(),
                false => self.diagnose(now),
            },
            _ => self.decide(now),
        }
    }

    /// Takes all measures that tell the parts of the path apart.
    fn diagnose(&mut self, now: Duration) -> Vec<Next> {
        // The control message comes last: it says which message arrived.
        let all = [Measure::Message, Measure::Echo, Measure::Small, Measure::Connect, Measure::Underlay, Measure::Control];
        let point = self.target.point;
        // It counts how often it was lost in a row, for the checksum's sake; here only an answer counts.
        *self.outcome(Measure::Connect) = Outcome::Unknown;
        let has_sense = |measure: &Measure| match point {
            Point::Device => true,
            Point::Bridge => matches!(measure, Measure::Message | Measure::Echo | Measure::Connect | Measure::Underlay),
            Point::Unknown(_) => *measure == Measure::Underlay,
        };
        self.open(all.into_iter().filter(has_sense), now)
    }

    fn open(&mut self, measures: impl IntoIterator<Item = Measure>, now: Duration) -> Vec<Next> {
        let main = self.main();
        let measures: Vec<Measure> = measures.into_iter().collect();
        // Those that must be lost twice in a row go on counting.
        let counts = |measure: &Measure| *measure == main || matches!(measure, Measure::Connect | Measure::Bridge);
        for measure in measures.iter().filter(|measure| !counts(measure)) {
            *self.outcome(*measure) = Outcome::Unknown;
        }
        (self.suspect, self.arrived, self.messages) = (now, false, [0; 4]);
        self.phase = Phase::Diagnosing(measures.iter().copied().collect());
        measures.into_iter().map(|measure| (now, measure)).collect()
    }

    /// Sets the verdict by what is known.
    fn decide(&mut self, now: Duration) -> Vec<Next> {
        self.phase = Phase::Calm;
        let mut next = Vec::new();
        let verdict = self.judge(&mut next, now);
        if let Some(verdict) = verdict {
            self.set_verdict(verdict, now);
        }
        next
    }

    fn judge(&mut self, next: &mut Vec<Next>, now: Duration) -> Option<Verdict> {
        let [message, echo, small, underlay, control, connect, control_connect, bridge] = self.outcomes;
        if let Point::Unknown(reason) = self.target.point {
            return if underlay.is_lost(2) { Some(Verdict::UnderlayDown) } else { Some(Verdict::Unmeasured(reason)) };
        }
        let is_through = match self.is_ours {
            true => message == Outcome::Ok,
            false => echo == Outcome::Ok,
        };
        if is_through {
            let is_cut = connect.is_lost(2) && control_connect == Outcome::Ok && !self.is_ours;
            return Some(match () {
                () if is_cut => Verdict::ChecksumBroken,
                // A host that answers no ping says nothing about its bridge.
                () if bridge.is_lost(2) && self.has_bridge && underlay == Outcome::Ok => Verdict::OverlayBroken,
                () => Verdict::Reachable,
            });
        }
        let lost = if self.is_ours { message.is_lost(2) } else { echo.is_lost(2) };
        if !lost {
            return None;
        }
        if self.is_ours && echo == Outcome::Ok {
            if control == Outcome::Ok {
                return Some(Verdict::ChecksumBroken);
            }
            // Its daemon does not answer by any way: what the kernel there answers counts.
            self.is_ours = false;
            self.summary = None;
            next.extend(self.open([Measure::Connect, Measure::ControlConnect], now));
            return Some(Verdict::Reachable);
        }
        let is_direct = self.target.point == Point::Bridge;
        if small == Outcome::Ok || (is_direct && underlay == Outcome::Ok) {
            if self.search.is_some() {
                return None;
            }
            self.search = Some(Search { passes: SMALL, fails: self.target.mtu });
            if let Verdict::MtuTooLarge { passes: Some(passes), .. } = self.verdict {
                // The limit that was found may have changed: it is confirmed, or the search begins again.
                next.extend([(now, Measure::Size(passes)), (now, Measure::Size(passes + 1))]);
                return None;
            }
            next.extend(self.search_step(now));
            return Some(Verdict::MtuTooLarge { mtu: self.target.mtu, passes: None });
        }
        let is_up = underlay == Outcome::Ok || control == Outcome::Ok;
        Some(match () {
            () if connect == Outcome::Ok => Verdict::Unmeasured(TCP_ONLY),
            () if is_up && self.error.is_some() => Verdict::OverlayBroken,
            () if self.arrived => Verdict::AnswersLost,
            () if self.received.is_some_and(|at| at >= self.suspect) => Verdict::RequestsLost,
            () if is_up => Verdict::OverlayBroken,
            () => Verdict::UnderlayDown,
        })
    }

    fn set_verdict(&mut self, verdict: Verdict, now: Duration) {
        // A host that comes back has no bridge before its first pod.
        self.has_bridge &= verdict != Verdict::UnderlayDown;
        if verdict.name() != self.verdict.name() {
            self.since = now;
        }
        if !matches!(verdict, Verdict::MtuTooLarge { .. }) {
            self.search = None;
        }
        self.verdict = verdict;
    }

    fn search_step(&self, now: Duration) -> Option<Next> {
        let Search { passes, fails } = self.search?;
        (fails - passes > 1).then(|| (now, Measure::Size(passes + (fails - passes) / 2)))
    }

    /// An echo of the search was answered, or was not.
    fn narrow(&mut self, size: u32, is_ok: bool, now: Duration) -> Vec<Next> {
        let Some(search) = &mut self.search else { return Vec::new() };
        match is_ok {
            true => search.passes = search.passes.max(size),
            false => search.fails = search.fails.min(size),
        }
        let Search { passes, fails } = *search;
        if fails <= passes + 1 {
            self.search = None;
            self.set_verdict(Verdict::MtuTooLarge { mtu: self.target.mtu, passes: Some(passes) }, now);
        }
        self.search_step(now).into_iter().collect()
    }

    fn count(&mut self, now: Duration, rtt: Option<Duration>) {
        let number = now.as_secs() / BUCKET.as_secs();
        let bucket = &mut self.buckets[usize::try_from(number).unwrap_or(0) % BUCKETS];
        if bucket.number != number {
            *bucket = Bucket { number, ..Bucket::default() };
        }
        bucket.sent += 1;
        match rtt {
            Some(rtt) => {
                bucket.rtt += rtt;
                self.rtt = Some(rtt);
            }
            None => bucket.lost += 1,
        }
    }

    pub(super) fn report(&self, now: Duration) -> Report {
        let first = (now.as_secs() / BUCKET.as_secs()).saturating_sub(BUCKETS as u64 - 1);
        let recent = || self.buckets.iter().filter(|bucket| bucket.number >= first);
        let (sent, lost) = (recent().map(|bucket| bucket.sent).sum(), recent().map(|bucket| bucket.lost).sum());
        let total: Duration = recent().map(|bucket| bucket.rtt).sum();
        Report {
            verdict: self.verdict.clone(),
            since: self.since,
            rtt: (sent > lost).then(|| total / (sent - lost)),
            sent,
            lost,
            error: self.error.clone(),
            summary: self.summary.clone(),
        }
    }
}

/// Bytes of a small probe with its IP header: more than an IPv6 header with the shortest message.
pub(super) const SMALL: u32 = 100;
