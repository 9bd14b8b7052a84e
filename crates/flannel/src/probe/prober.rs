//! All paths: when each is probed, within the budget, and which answer belongs to which probe.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use super::message::{self, Message, Summary};
use super::path::{Measure, Path, SMALL};
use super::{PathId, Point, Report, Target, Verdict};
use crate::net::Family;

/// Between two probes of this host, whatever the number of its peers: ten in a second.
const SPACING: Duration = Duration::from_millis(100);
/// A path is measured no more often than this.
const OFTEN: Duration = Duration::from_secs(1);
/// One probe in this many is a regular turn, even while many paths are being diagnosed.
const TURN_EACH: u64 = 4;
/// Requests of one peer that are answered in a second: a diagnosis takes two.
const ANSWERS: u32 = 20;

/// A probe to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Names it in the answer.
    pub token: u64,
    /// Where it is sent.
    pub to: IpAddr,
    /// What is sent.
    pub how: How,
}

/// What a probe is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    /// An ICMP echo of so many bytes with its IP header, not to be fragmented, that carries the token.
    Echo(u32),
    /// A datagram with this content to the peer's daemon, not to be fragmented.
    Datagram(Vec<u8>),
    /// A TCP connection to a port that is likely closed: to be refused is an answer.
    Connect,
}

/// Why a probe has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// Nothing came back.
    Lost,
    /// This host could not send it.
    Unsent(String),
}

/// A probe that was sent.
#[derive(Debug)]
struct Flight {
    path: PathId,
    measure: Measure,
    sent: Duration,
    deadline: Duration,
}

/// A peer, as the responder knows it.
#[derive(Debug, Default)]
struct Caller {
    /// The second in which it was answered last, and how often.
    answered: (u64, u32),
}

/// A change of a path's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The path.
    pub path: PathId,
    /// Its state before.
    pub before: Verdict,
    /// Its state now.
    pub now: Verdict,
}

/// Measures all paths. Time is a duration since some start.
#[derive(Debug, Default)]
pub struct Prober {
    paths: BTreeMap<PathId, Path>,
    /// Regular turns.
    turns: BTreeSet<(Duration, PathId)>,
    /// Other measures, in the order in which they were asked for.
    urgent: BTreeSet<(Duration, u64, PathId, Measure)>,
    asked: u64,
    flights: BTreeMap<u64, Flight>,
    next_slot: Duration,
    sent: u64,
    /// Addresses from which messages are answered.
    callers: BTreeMap<IpAddr, (PathId, Caller)>,
    /// The last message of each path that arrived by the data path.
    arrived: BTreeMap<PathId, u64>,
    changes: Vec<Change>,
}

impl Prober {
    /// Measures these paths from now on. Those that are the same as before go on.
    pub fn set_targets(&mut self, targets: impl IntoIterator<Item = Target>, now: Duration) {
        let mut old = std::mem::take(&mut self.paths);
        let (mut changed, mut new) = (BTreeSet::new(), Vec::new());
        for target in targets {
            let id = (target.key, target.family);
            let path = match old.remove(&id) {
                Some(path) if path.target == target => path,
                gone => {
                    if gone.is_some() {
                        changed.insert(id);
                    }
                    let path = Path::new(target, now);
                    new.push((id, path.main()));
                    path
                }
            };
            self.paths.insert(id, path);
        }
        changed.extend(old.into_keys());
        self.forget(&changed);
        for (id, main) in new {
            self.ask(id, main, now);
            self.turns.insert((now + OFTEN, id));
        }
        let addresses = self.paths.iter().flat_map(|(id, path)| [Some(path.target.underlay), path.target.device()].map(|ip| (*id, ip)));
        let mut callers = BTreeMap::new();
        for (id, ip) in addresses.filter_map(|(id, ip)| Some((id, ip?))) {
            let caller = self.callers.remove(&ip).map(|(_, caller)| caller).unwrap_or_default();
            callers.insert(ip, (id, caller));
        }
        self.callers = callers;
    }

    /// Forgets what was planned and sent for these paths, in one pass for all of them.
    fn forget(&mut self, gone: &BTreeSet<PathId>) {
        if gone.is_empty() {
            return;
        }
        self.turns.retain(|(_, path)| !gone.contains(path));
        self.urgent.retain(|(_, _, path, _)| !gone.contains(path));
        self.flights.retain(|_, flight| !gone.contains(&flight.path));
        self.arrived.retain(|path, _| !gone.contains(path));
    }

    fn ask(&mut self, path: PathId, measure: Measure, at: Duration) {
        self.asked += 1;
        self.urgent.insert((at, self.asked, path, measure));
    }

    /// When [`Prober::next`] has something to do, unless an answer comes before.
    pub fn due(&self) -> Option<Duration> {
        let wanted = self.urgent.first().map(|(at, ..)| *at).into_iter().chain(self.turns.first().map(|(at, _)| *at)).min();
        let slot = wanted.map(|at| at.max(self.next_slot));
        self.flights.values().map(|flight| flight.deadline).chain(slot).min()
    }

    /// Concludes the probes whose time is over, and returns the probe to send now, if one is due and the budget has room. `token` must not
    /// be known to others: who knows it can answer in the peer's place.
    pub fn next(&mut self, now: Duration, token: u64) -> Option<Probe> {
        let late: Vec<u64> = self.flights.iter().filter(|(_, flight)| flight.deadline <= now).map(|(token, _)| *token).collect();
        late.into_iter().for_each(|token| self.fail(token, Failure::Lost, now));
        if now < self.next_slot {
            return None;
        }
        let (id, measure) = self.choose(now)?;
        let path = self.paths.get_mut(&id)?;
        self.next_slot = now + SPACING;
        self.sent += 1;
        let Some((to, how)) = probe(&path.target, measure, path.length(measure), token) else {
            path.conclude(measure, Err(None), now);
            return None;
        };
        if measure == Measure::Message {
            path.send_message(token);
        }
        self.flights.insert(token, Flight { path: id, measure, sent: now, deadline: now + path.patience() });
        Some(Probe { token, to, how })
    }

    fn choose(&mut self, now: Duration) -> Option<(PathId, Measure)> {
        let turn = self.turns.first().copied().filter(|(at, _)| *at <= now);
        let urgent = self.urgent.first().copied().filter(|(at, ..)| *at <= now);
        match (urgent, turn) {
            (Some(entry), _) if turn.is_none() || !self.sent.is_multiple_of(TURN_EACH) => {
                self.urgent.remove(&entry);
                Some((entry.2, entry.3))
            }
            (_, Some((at, id))) => {
                self.turns.remove(&(at, id));
                let all = SPACING * u32::try_from(self.paths.len()).unwrap_or(u32::MAX);
                self.turns.insert((now + all.max(OFTEN), id));
                Some((id, self.paths.get_mut(&id)?.turn()))
            }
            (_, None) => None,
        }
    }

    /// An echo or a connection was answered. Tokens that are not under way are ignored.
    pub fn answer(&mut self, token: u64, now: Duration) {
        if let Some(flight) = self.flights.remove(&token) {
            self.conclude(flight.path, flight.measure, Ok(now.saturating_sub(flight.sent)), now);
        }
    }

    /// A probe has no answer.
    pub fn fail(&mut self, token: u64, failure: Failure, now: Duration) {
        if let Some(flight) = self.flights.remove(&token) {
            let error = match failure {
                Failure::Lost => None,
                Failure::Unsent(error) => Some(error),
            };
            self.conclude(flight.path, flight.measure, Err(error), now);
        }
    }

    fn conclude(&mut self, id: PathId, measure: Measure, result: Result<Duration, Option<String>>, now: Duration) {
        let Some(path) = self.paths.get_mut(&id) else { return };
        let before = path.verdict().clone();
        let next = path.conclude(measure, result, now);
        if *path.verdict() != before {
            self.changes.push(Change { path: id, before, now: path.verdict().clone() });
        }
        next.into_iter().for_each(|(at, measure)| self.ask(id, measure, at));
    }

    /// A datagram came from this address. Returns the reply, if it is a request of a known peer that has not had its share of this second.
    pub fn datagram(&mut self, from: IpAddr, bytes: &[u8], own: &Summary, now: Duration) -> Option<Vec<u8>> {
        match message::parse(bytes)? {
            Message::Reply { token, arrived, summary } => {
                let id = self.flights.get(&token)?.path;
                self.paths.get_mut(&id)?.reply(summary, arrived);
                self.answer(token, now);
                None
            }
            Message::Request { token, overlay } => {
                let (id, caller) = self.callers.get_mut(&from)?;
                if caller.answered.0 != now.as_secs() {
                    caller.answered = (now.as_secs(), 0);
                }
                if caller.answered.1 >= ANSWERS {
                    return None;
                }
                caller.answered.1 += 1;
                if overlay {
                    self.arrived.insert(*id, token);
                    self.paths.get_mut(id)?.receive_message(now);
                }
                let arrived = self.arrived.get(id).copied().unwrap_or_default();
                Some(message::reply(bytes, arrived, own))
            }
        }
    }

    /// The changes of paths since the last call.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// Probes that were sent since the start.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// All paths with their measurements.
    pub fn reports(&self, now: Duration) -> BTreeMap<PathId, Report> {
        self.paths.iter().map(|(id, path)| (*id, path.report(now))).collect()
    }
}

impl Target {
    /// The address of the backend's device at the peer: it sends from there.
    fn device(&self) -> Option<IpAddr> {
        (self.point == Point::Device).then(|| self.data()).flatten()
    }
}

/// Where and what to send for a measure.
fn probe(target: &Target, measure: Measure, length: u32, token: u64) -> Option<(IpAddr, How)> {
    let headers = match target.family {
        Family::V4 => 28,
        Family::V6 => 48,
    };
    let datagram = |overlay| How::Datagram(message::request(token, overlay, usize::try_from(length.saturating_sub(headers)).unwrap_or(0)));
    Some(match measure {
        Measure::Message => (target.data()?, datagram(target.point == Point::Device)),
        Measure::Echo | Measure::Small | Measure::Size(_) => (target.data()?, How::Echo(length)),
        Measure::Underlay => (target.underlay, How::Echo(SMALL)),
        Measure::Control => (target.underlay, datagram(false)),
        Measure::Connect => (target.data()?, How::Connect),
        Measure::ControlConnect => (target.underlay, How::Connect),
        Measure::Bridge => (target.bridge()?, How::Echo(SMALL)),
    })
}
