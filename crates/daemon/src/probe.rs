//! Measures the paths to all peers: sends what [`flannel::probe`] asks for, returns the answers to it, answers the messages of peers, and
//! reports paths that break.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use flannel::probe::{Change, Failure, How, PathId, Prober, Report, Summary, Target};
use flannel::{Family, PerFamily};
use kernel::probe::{ECHO_REPLY, datagrams, echo_request, echo_token, echoes};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::notice::Notices;
use crate::ready::Ready;
use crate::view::{PeerState, View};

/// Measurements are published this often; a changed verdict is published at once.
const PUBLISH: Duration = Duration::from_secs(5);
/// The view is followed no more often than this: the cost of a comparison follows the cluster.
const FOLLOW: Duration = Duration::from_millis(500);
/// A connection that is not refused after this time counts as lost.
const CONNECT: Duration = Duration::from_secs(1);
/// Answers that wait; more are left to the kernel's buffers, and then lost.
const ANSWERS: usize = 64;
/// Messages that are read in a second. All peers together send about ten, whatever their number; a flood must not keep the daemon busy.
const MESSAGES: u32 = 500;
/// Pause after a socket's error: they come one by one.
const AFTER_ERROR: Duration = Duration::from_millis(10);
/// Bytes of the largest message that is read.
const MESSAGE: usize = 65_535;
/// Lines about changed paths in the log within [`LOG_EACH`]; the rest is counted.
const LOG_LINES: u32 = 20;
const LOG_EACH: Duration = Duration::from_secs(10);
/// A path that is broken for so long is put into a notice, at most once in [`NOTICE_EACH`].
const NOTICE_AFTER: Duration = Duration::from_secs(10);
const NOTICE_EACH: Duration = Duration::from_secs(60);
/// Peers that a notice names.
const NAMED: usize = 3;

/// All measurements.
#[derive(Debug, Default)]
pub struct Paths {
    /// One report for each path.
    pub reports: BTreeMap<PathId, Report>,
    /// Probes that were sent since the start.
    pub sent: u64,
    /// When this was published, by the clock of [`Report::since`].
    pub at: Duration,
}

impl Paths {
    /// Paths with this verdict's name.
    pub fn count(&self, name: &str) -> usize {
        self.reports.values().filter(|report| report.verdict.name() == name).count()
    }

    /// The broken paths.
    pub fn broken(&self) -> impl Iterator<Item = (&PathId, &Report)> {
        self.reports.iter().filter(|(_, report)| report.verdict.is_broken())
    }
}

/// What the measurement needs.
#[derive(Debug)]
pub struct Measurement {
    /// UDP port of the probes; 0: peers' messages are not answered, and only kernels are asked.
    pub port: u16,
    /// This node.
    pub ready: Ready,
    /// Its peers.
    pub view: watch::Receiver<Arc<View>>,
    /// Where the measurements are published.
    pub paths: watch::Sender<Arc<Paths>>,
    /// Where operators are notified.
    pub notices: Notices,
}

/// An answer, or a message of a peer.
enum Input {
    Token(u64),
    Failed(u64, String),
    Datagram(SocketAddr, Vec<u8>),
}

impl Measurement {
    /// Measures until it is dropped.
    pub async fn run(mut self) {
        let (send, mut inputs) = mpsc::channel(ANSWERS);
        let sockets = Sockets::open(self.port, &send);
        let epoch = Instant::now();
        let mut prober = Prober::default();
        let mut log = Log::default();
        let (mut publish_at, mut follow_at) = (epoch + PUBLISH, epoch);
        loop {
            let due = prober.due().map(|at| epoch + at);
            tokio::select! {
                changed = self.view.changed(), if follow_at <= Instant::now() => {
                    if changed.is_err() {
                        return;
                    }
                    follow_at = Instant::now() + FOLLOW;
                    prober.set_targets(targets(&self.view.borrow_and_update().clone()), epoch.elapsed());
                }
                Some(input) = inputs.recv() => self.take(input, &mut prober, &sockets, epoch.elapsed()).await,
                () = at(due) => {
                    // Unknown to others, so that only who received the probe can answer it.
                    let token = token();
                    if let Some(probe) = prober.next(epoch.elapsed(), token)
                        && let Err(error) = sockets.send(probe.to, probe.how, token, &send)
                    {
                        prober.fail(token, Failure::Unsent(error.to_string()), epoch.elapsed());
                    }
                }
                // Wakes the loop when the view may be looked at again.
                () = tokio::time::sleep_until(follow_at), if follow_at > Instant::now() => {}
                () = tokio::time::sleep_until(publish_at) => {
                    publish_at = Instant::now() + PUBLISH;
                    self.publish(&prober, epoch.elapsed());
                    log.notify(&self.paths.borrow(), &self.notices);
                }
            }
            let changes = prober.take_changes();
            if !changes.is_empty() {
                self.publish(&prober, epoch.elapsed());
                let paths = self.paths.borrow();
                changes.iter().for_each(|change| log.change(change, paths.reports.get(&change.path)));
            }
        }
    }

    async fn take(&self, input: Input, prober: &mut Prober, sockets: &Sockets, now: Duration) {
        match input {
            Input::Token(token) => prober.answer(token, now),
            Input::Failed(token, error) => prober.fail(token, Failure::Unsent(error), now),
            Input::Datagram(from, bytes) => {
                let reply = prober.datagram(from.ip(), &bytes, &self.summary(), now);
                if let (Some(reply), Some(socket)) = (reply, sockets.datagrams.get(Family::of(from.ip()))) {
                    // One that cannot be sent is a lost one.
                    let _ = socket.try_send_to(&reply, from);
                }
            }
        }
    }

    /// What this node says about itself.
    fn summary(&self) -> Summary {
        let view = self.view.borrow();
        Summary {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ready: self.ready.pending().is_empty(),
            failures: u32::try_from(view.objects.failed.len()).unwrap_or(u32::MAX),
            mtu: view.node.as_ref().map(|node| node.mtu).unwrap_or_default(),
        }
    }

    fn publish(&self, prober: &Prober, now: Duration) {
        self.paths.send_replace(Arc::new(Paths { reports: prober.reports(now), sent: prober.sent(), at: now }));
    }
}

/// A number that others cannot guess: the standard library's hashers have random keys.
fn token() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => pending().await,
    }
}

/// The paths to measure: each family of each peer that has objects in the kernel.
fn targets(view: &View) -> Vec<Target> {
    let Some(node) = &view.node else { return Vec::new() };
    let Some(point) = node.probe else { return Vec::new() };
    let is_served = |state: &PeerState| !matches!(state, PeerState::Refused(_));
    let peers = view.peers.iter().filter(|peer| is_served(&peer.state));
    peers
        .flat_map(|peer| {
            let paths = peer.subnet.subnets();
            let target = |family| {
                paths.get(family).filter(|_| node.subnet.subnets().get(family).is_some())?;
                let (underlay, mtu) = (*peer.public.get(family)?, *node.path_mtus.get(family)?);
                Some(Target { key: peer.subnet, family, underlay, point, mtu })
            };
            Family::ALL.map(target)
        })
        .flatten()
        .collect()
}

/// The sockets that this host has. What cannot be opened is said once; paths are then measured by the rest.
#[derive(Debug)]
struct Sockets {
    echoes: PerFamily<Arc<UdpSocket>>,
    /// Identifier of this daemon's echoes.
    id: u16,
    datagrams: PerFamily<Arc<UdpSocket>>,
    port: u16,
}

impl Sockets {
    fn open(port: u16, inputs: &mpsc::Sender<Input>) -> Sockets {
        let mut sockets = Sockets { echoes: PerFamily::default(), datagrams: PerFamily::default(), id: fastrand::u16(..), port };
        for family in Family::ALL {
            match echoes(family, sockets.id).and_then(UdpSocket::from_std) {
                Ok(socket) => {
                    let socket = Arc::new(socket);
                    tokio::spawn(receive_echoes(family, Arc::clone(&socket), inputs.clone()));
                    sockets.echoes.set(family, Some(socket));
                }
                Err(error) => tracing::warn!(%family, %error, "cannot ping peers; their paths are not measured (needs CAP_NET_RAW)"),
            }
            if port == 0 {
                continue;
            }
            match datagrams(family, port).and_then(UdpSocket::from_std) {
                Ok(socket) => {
                    let socket = Arc::new(socket);
                    tokio::spawn(receive_datagrams(Arc::clone(&socket), inputs.clone()));
                    sockets.datagrams.set(family, Some(socket));
                }
                Err(error) => {
                    tracing::warn!(%family, port, %error, "cannot answer peers' probes; set --probe-port to a free port on all hosts");
                }
            }
        }
        sockets
    }

    /// Sends a probe.
    fn send(&self, to: IpAddr, how: How, token: u64, inputs: &mpsc::Sender<Input>) -> io::Result<()> {
        let family = Family::of(to);
        let absent = || io::Error::other("no socket for probes");
        match how {
            How::Echo(length) => {
                let socket = self.echoes.get(family).ok_or_else(absent)?;
                socket.try_send_to(&echo_request(family, self.id, length, token), SocketAddr::new(to, 0)).map(drop)
            }
            How::Datagram(bytes) => {
                let socket = self.datagrams.get(family).ok_or_else(absent)?;
                socket.try_send_to(&bytes, SocketAddr::new(to, self.port)).map(drop)
            }
            How::Connect => {
                let (to, inputs) = (SocketAddr::new(to, self.port.max(1)), inputs.clone());
                tokio::spawn(async move {
                    let input = match tokio::time::timeout(CONNECT, TcpStream::connect(to)).await {
                        Ok(Ok(_)) => Input::Token(token),
                        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Input::Token(token),
                        Ok(Err(error)) => Input::Failed(token, error.to_string()),
                        Err(_) => return,
                    };
                    let _ = inputs.send(input).await;
                });
                Ok(())
            }
        }
    }
}

async fn receive_echoes(family: Family, socket: Arc<UdpSocket>, inputs: mpsc::Sender<Input>) {
    let mut buffer = [0; ECHO_REPLY];
    loop {
        match socket.recv(&mut buffer).await {
            Ok(length) => {
                if let Some(token) = echo_token(family, &buffer[..length])
                    && inputs.send(Input::Token(token)).await.is_err()
                {
                    return;
                }
            }
            // An ICMP error for an earlier request, which counts as lost.
            Err(_) => tokio::time::sleep(AFTER_ERROR).await,
        }
    }
}

async fn receive_datagrams(socket: Arc<UdpSocket>, inputs: mpsc::Sender<Input>) {
    let mut buffer = vec![0; MESSAGE];
    let (mut second, mut count) = (Instant::now(), 0);
    loop {
        if second.elapsed() >= Duration::from_secs(1) {
            (second, count) = (Instant::now(), 0);
        }
        count += 1;
        if count > MESSAGES {
            tokio::time::sleep_until(second + Duration::from_secs(1)).await;
            continue;
        }
        match socket.recv_from(&mut buffer).await {
            Ok((length, from)) => {
                if inputs.send(Input::Datagram(from, buffer[..length].to_vec())).await.is_err() {
                    return;
                }
            }
            Err(_) => tokio::time::sleep(AFTER_ERROR).await,
        }
    }
}

/// What is written to the log and to operators, with limits.
#[derive(Debug, Default)]
struct Log {
    since: Option<Instant>,
    lines: u32,
    noticed: BTreeSet<PathId>,
    notice_at: Option<Instant>,
}

impl Log {
    fn change(&mut self, change: &Change, report: Option<&Report>) {
        let Change { path: (peer, family), before, now } = change;
        if self.since.is_none_or(|since| since.elapsed() > LOG_EACH) {
            let suppressed = self.lines.saturating_sub(LOG_LINES);
            if suppressed > 0 {
                tracing::warn!(suppressed, "more paths to peers changed");
            }
            (self.since, self.lines) = (Some(Instant::now()), 0);
        }
        self.lines += 1;
        if self.lines > LOG_LINES {
            return;
        }
        let error = report.and_then(|report| report.error.as_deref());
        match (before.is_broken(), now.is_broken()) {
            (_, true) => tracing::warn!(%peer, %family, verdict = now.name(), reason = %now, error, "path to peer broken"),
            (true, false) => tracing::info!(%peer, %family, verdict = now.name(), "path to peer works again"),
            (false, false) => tracing::debug!(%peer, %family, verdict = now.name(), "path to peer measured"),
        }
    }

    /// Tells operators of paths that stay broken.
    fn notify(&mut self, paths: &Paths, notices: &Notices) {
        let broken: BTreeMap<&PathId, &Report> =
            paths.broken().filter(|(_, report)| paths.at.saturating_sub(report.since) >= NOTICE_AFTER).collect();
        self.noticed.retain(|path| broken.contains_key(path));
        let is_new = broken.keys().any(|path| !self.noticed.contains(path));
        if !is_new || self.notice_at.is_some_and(|at| at > Instant::now()) {
            return;
        }
        self.notice_at = Some(Instant::now() + NOTICE_EACH);
        self.noticed = broken.keys().map(|path| **path).collect();
        notices.warn("PeersUnreachable", unreachable(&broken, paths.reports.len()));
    }
}

/// A sentence that names some of the broken paths.
fn unreachable(broken: &BTreeMap<&PathId, &Report>, all: usize) -> String {
    let named = broken.iter().take(NAMED).map(|((peer, family), report)| format!("{peer} by {family}: {}", report.verdict));
    let named = named.collect::<Vec<_>>().join("; ");
    let more = broken.len().saturating_sub(NAMED);
    let rest = if more > 0 { format!("; and {more} more") } else { String::new() };
    format!("{} of {all} paths to peers are broken: {named}{rest}", broken.len())
}
