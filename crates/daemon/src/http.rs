//! `/healthz`, `/readyz`, `/state` and `/metrics` by TCP and by the socket, and `/events` by the socket: plain HTTP/1.1, nothing secret in
//! it. TCP has no authentication: clients on other hosts read numbers only. What strangers may use is limited by `limits`, so that probes
//! are answered and repairs have descriptors whatever they do.

mod stream;

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use flannel::check::Severity;
use http_body_util::{Either, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, Response, StatusCode, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::stream::{Events, Streaming};
use crate::newcomers::Newcomers;
use crate::probe::Paths;
use crate::ready::Ready;
use crate::state::{Counts, Process, State, is_ready, metrics};
use crate::view::View;

/// Pause after a connection could not be accepted.
pub(crate) const PAUSE: Duration = Duration::from_millis(100);

/// What a client of the health server, or of the socket, may use.
pub(crate) mod limits {
    use std::time::Duration;

    /// Connections that are served at once; a new one takes the place of the oldest. The loop and its repairs need descriptors, too.
    pub(crate) const CONNECTIONS: usize = 64;
    /// How long a client may take for the head of its request.
    pub(crate) const SENDING: Duration = Duration::from_secs(5);
    /// How long a connection may last: its request, and reading the answer.
    pub(crate) const WHOLE: Duration = Duration::from_secs(10);
    /// Bytes of a request's head.
    pub(crate) const HEAD: usize = 16 << 10;
    /// How long a reader of events may not read while there is something to send.
    pub(crate) const STALLED: Duration = Duration::from_secs(10);
    /// A stream of events without events has an empty line this often.
    pub(crate) const BEAT: Duration = Duration::from_secs(5);
}

/// What the answers are made of.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Readiness.
    pub ready: Ready,
    /// The view.
    pub view: watch::Receiver<Arc<View>>,
    /// The measured paths.
    pub paths: watch::Receiver<Arc<Paths>>,
    /// What does not change while the daemon runs.
    pub process: Arc<Process>,
}

/// Where a client is, which decides what it may read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Client {
    /// On another host: numbers only.
    Elsewhere,
    /// On this host.
    Here,
    /// At the socket, which only root can open.
    Root,
}

/// The health server's listener.
#[derive(Debug)]
pub struct Http {
    listener: TcpListener,
    /// Are only clients on this host served?
    is_local: bool,
    sources: Sources,
}

impl Http {
    /// Binds the address; for `None` all of them, and serves clients on this host only. A probe of the kubelet comes to the node's own
    /// address, so loopback is not enough where a manifest names no host. `0.0.0.0` takes IPv6 clients too, as upstream's does.
    ///
    /// # Errors
    /// When the port cannot be had.
    pub async fn bind(ip: Option<IpAddr>, port: u16, sources: Sources) -> anyhow::Result<Http> {
        let flags = ip.map(|ip| format!("--healthz-ip {ip} ")).unwrap_or_default();
        let (is_local, ip) = (ip.is_none(), ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)));
        let wildcard = ip == IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let dual = if wildcard { TcpListener::bind(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)).await.ok() } else { None };
        let listener = match dual {
            Some(listener) => listener,
            None => TcpListener::bind(SocketAddr::new(ip, port))
                .await
                .with_context(|| format!("cannot listen on {flags}--healthz-port {port}"))?,
        };
        Ok(Http { listener, is_local, sources })
    }

    /// The address that it listens on.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until it is dropped.
    pub async fn serve(self) {
        let mut connections = Connections::new(self.sources);
        loop {
            // A client that went away before it was accepted, or a moment without descriptors, is no end.
            let Ok((stream, from)) = self.listener.accept().await else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            let client = if is_on_this_host(&stream, from.ip()) { Client::Here } else { Client::Elsewhere };
            if !self.is_local || client == Client::Here {
                connections.serve(stream, from.ip(), client).await;
            }
        }
    }
}

/// Connections that are being served. They end with this value.
pub(crate) struct Connections {
    newcomers: Newcomers,
    tasks: JoinSet<()>,
    sources: Sources,
}

impl Connections {
    pub(crate) fn new(sources: Sources) -> Connections {
        Connections { newcomers: Newcomers::new(limits::CONNECTIONS), tasks: JoinSet::new(), sources }
    }

    /// Serves a connection, in the place of another one if there are too many.
    pub(crate) async fn serve<S>(&mut self, stream: S, from: IpAddr, client: Client)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let sources = self.sources.clone();
        let place = self.newcomers.place().await;
        let task = self.tasks.spawn(async move {
            let _place = place;
            connection(stream, client, sources).await;
        });
        self.newcomers.add(from, task);
        while self.tasks.try_join_next().is_some() {}
    }
}

/// Does the client run on this host? Only then it comes from the very address that it connects to; the kernel drops packets from
/// elsewhere with such a source.
fn is_on_this_host(stream: &TcpStream, from: IpAddr) -> bool {
    from.to_canonical().is_loopback() || stream.local_addr().is_ok_and(|to| to.ip() == from)
}

/// Serves one request. A client that hangs up in the middle, or takes too long, is disconnected.
async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin, client: Client, sources: Sources) {
    let streaming = Arc::new(Streaming::default());
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let is_stream = client == Client::Root && request.method() == Method::GET && request.uri().path() == "/events";
        let response = match is_stream {
            true => response(StatusCode::OK, "application/x-ndjson", Either::Right(stream::begin(sources.clone(), streaming.clone()))),
            false => answer(request.method(), request.uri().path(), client, &sources),
        };
        async move { Ok::<_, Infallible>(response) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits::SENDING).max_buf_size(limits::HEAD).keep_alive(false);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    if tokio::time::timeout(limits::WHOLE, &mut connection).await.is_err() && streaming.has_begun() {
        tokio::select! {
            _ = connection => {}
            () = streaming.stalled() => {}
        }
    }
}

type Body = Either<Full<Bytes>, Events>;

fn response(status: StatusCode, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

fn answer(method: &Method, path: &str, client: Client, sources: &Sources) -> Response<Body> {
    let Sources { ready, view, paths, process } = sources;
    let (view, paths, pending) = (view.borrow().clone(), paths.borrow().clone(), ready.pending());
    const TEXT: &str = "text/plain";
    const JSON: &str = "application/json";
    let starting = || (StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("flanneld is starting: waiting for {}\n", pending.join(", ")));
    let document = |json: Result<String, serde_json::Error>| (StatusCode::OK, JSON, json.unwrap_or_default() + "\n");
    let (status, kind, body) = match path {
        _ if !matches!(*method, Method::GET | Method::HEAD) => {
            (StatusCode::METHOD_NOT_ALLOWED, TEXT, format!("{path} answers GET and HEAD only\n"))
        }
        "/healthz" => (StatusCode::OK, TEXT, "flanneld is running".to_owned()),
        "/readyz" if client == Client::Elsewhere => readiness_elsewhere(&pending, &view),
        "/readyz" => readiness(&pending, &view, &paths),
        "/state" if client == Client::Elsewhere => match Counts::new(&view, &paths, &pending) {
            Some(counts) => document(serde_json::to_string_pretty(&counts)),
            None => (StatusCode::SERVICE_UNAVAILABLE, TEXT, "flanneld is starting\n".to_owned()),
        },
        "/state" => match State::new(&view, &paths, process, pending.clone()) {
            Some(state) => document(serde_json::to_string_pretty(&state)),
            None => starting(),
        },
        "/metrics" => match metrics(&view, &paths, pending.is_empty()) {
            Some(text) => (StatusCode::OK, "text/plain; version=0.0.4", text),
            None => starting(),
        },
        "/events" if client != Client::Root => (StatusCode::FORBIDDEN, TEXT, "/events is served at flanneld.sock only\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, TEXT, "there is /healthz, /readyz, /state and /metrics; at flanneld.sock /events, too\n".to_owned()),
    };
    response(status, kind, Either::Left(Full::new(Bytes::from(body))))
}

/// Readiness without the texts, which describe this host.
fn readiness_elsewhere(pending: &[String], view: &View) -> (StatusCode, &'static str, String) {
    match is_ready(view, pending) {
        true => (StatusCode::OK, "text/plain", "flanneld is ready".to_owned()),
        false => (
            StatusCode::SERVICE_UNAVAILABLE,
            "text/plain",
            "flanneld is not ready; its /readyz says why to clients on its host\n".to_owned(),
        ),
    }
}

/// Ready when nothing is pending; problems that leave the node working are noted.
fn readiness(pending: &[String], view: &View, paths: &Paths) -> (StatusCode, &'static str, String) {
    if !pending.is_empty() {
        let text = format!("flanneld is not ready yet: waiting for {}\n", pending.join(", "));
        return (StatusCode::SERVICE_UNAVAILABLE, "text/plain", text);
    }
    let of = |severity: Severity| view.findings.iter().filter(move |finding| finding.severity == severity);
    let errors: Vec<String> = of(Severity::Error).map(ToString::to_string).collect();
    if !errors.is_empty() {
        return (StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("flanneld is not ready: {}\n", errors.join("\n")));
    }
    let failed = &view.objects.failed;
    // Where a family is down its objects fail, which says nothing more.
    let is_explained = view.findings.iter().any(|finding| finding.code == "family-down");
    let failed = failed.first().filter(|_| !is_explained).map(|first| {
        let objects = if failed.len() == 1 { "1 object is".to_owned() } else { format!("{} objects are", failed.len()) };
        format!("{objects} not applied, see /state: {}: {}", first.object, first.error)
    });
    let mut notes: String = of(Severity::Warning).map(ToString::to_string).chain(failed).map(|note| format!("\nnote: {note}")).collect();
    if let broken @ 1.. = paths.broken().count() {
        notes.push_str(&format!("\nnote: {broken} of {} paths to peers are broken; /state names them", paths.reports.len()));
    }
    (StatusCode::OK, "text/plain", format!("flanneld is ready{notes}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flannel::check::Finding;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn server() -> (SocketAddr, watch::Sender<Arc<View>>) {
        let (publish, view) = watch::channel(Arc::default());
        let sources =
            Sources { ready: Ready::default(), view, paths: watch::channel(Arc::default()).1, process: Arc::new(Process::now(true)) };
        let http = Http::bind(Some(IpAddr::V4(Ipv4Addr::LOCALHOST)), 0, sources).await.unwrap();
        let address = http.address().unwrap();
        tokio::spawn(http.serve());
        (address, publish)
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // A server that refuses early may reset the connection while it is written to.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[tokio::test]
    async fn only_reading_is_answered_and_findings_are_noted() {
        let (address, publish) = server().await;
        assert!(ask(address, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.ends_with("flanneld is running"));
        for method in ["POST", "PUT", "DELETE", "BREW"] {
            assert!(ask(address, &format!("{method} /healthz HTTP/1.1\r\nHost: x\r\n\r\n")).await.starts_with("HTTP/1.1 405 "), "{method}");
        }
        assert!(ask(address, "GET /state HTTP/1.1\r\nHost: x\r\n\r\n").await.starts_with("HTTP/1.1 503 "));
        let mut findings = vec![Finding::warning("x", "IPv6 is down".to_owned(), "")];
        publish.send_replace(Arc::new(View { findings: findings.clone(), ..View::default() }));
        assert!(ask(address, "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await.ends_with("flanneld is ready\nnote: IPv6 is down"));
        let failed = crate::view::Failed { object: "route 10.244.2.0/24 metric 2".to_owned(), error: "no".to_owned(), attempts: 1 };
        let objects = crate::view::Objects { failed: vec![failed], ..Default::default() };
        publish.send_replace(Arc::new(View { objects, ..View::default() }));
        let answer = ask(address, "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(answer.ends_with("\nnote: 1 object is not applied, see /state: route 10.244.2.0/24 metric 2: no"), "{answer}");
        findings.push(Finding::error("y", "a route hides all pods".to_owned(), "delete it"));
        publish.send_replace(Arc::new(View { findings, ..View::default() }));
        let answer = ask(address, "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("not ready: a route hides all pods; fix: delete it\n"), "{answer}");
    }

    #[tokio::test]
    async fn clients_elsewhere_read_numbers_and_no_events() {
        let mut view = View::default();
        view.findings.push(Finding::error("y", "a route hides all pods".to_owned(), "delete it"));
        let (view, paths) = (watch::channel(Arc::new(view)).1, watch::channel(Arc::default()).1);
        let ready = Ready::default();
        let _guard = ready.guard("the secret plan");
        let sources = Sources { ready, view, paths, process: Arc::new(Process::now(true)) };
        for (path, client, status) in [
            ("/healthz", Client::Elsewhere, 200),
            ("/readyz", Client::Elsewhere, 503),
            ("/state", Client::Elsewhere, 503),
            ("/events", Client::Elsewhere, 403),
            ("/events", Client::Here, 403),
        ] {
            let answer = answer(&Method::GET, path, client, &sources);
            assert_eq!(answer.status(), status, "{path}");
            let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
            let text = String::from_utf8_lossy(&body).into_owned();
            assert!(!text.contains("plan") && !text.contains("hides"), "{path}: {text}");
        }
        assert_eq!(answer(&Method::GET, "/readyz", Client::Here, &sources).status(), 503);
    }

    #[tokio::test]
    async fn a_large_head_is_refused() {
        let (address, _publish) = server().await;
        let head = |bytes: usize| format!("GET /healthz HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "a".repeat(bytes));
        assert!(ask(address, &head(limits::HEAD - 200)).await.ends_with("flanneld is running"));
        for bytes in [limits::HEAD + 1, 400_000] {
            let answer = ask(address, &head(bytes)).await;
            assert!(!answer.contains("flanneld is running"), "{answer}");
        }
    }

    #[tokio::test]
    async fn one_connection_answers_one_request() {
        let (address, _publish) = server().await;
        let two = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2);
        assert_eq!(ask(address, &two).await.matches("flanneld is running").count(), 1);
    }

    #[tokio::test]
    async fn half_sent_requests_delay_no_other_and_end_by_themselves() {
        let (address, _publish) = server().await;
        let mut held = Vec::new();
        for _ in 0..limits::CONNECTIONS * 3 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /healthz").await.unwrap();
            held.push(stream);
        }
        let began = std::time::Instant::now();
        assert!(ask(address, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.ends_with("flanneld is running"));
        assert!(began.elapsed() < limits::SENDING / 2, "{:?}", began.elapsed());
        let mut open = 0;
        for stream in &mut held {
            let end = tokio::time::timeout(Duration::from_millis(5), stream.read(&mut [0; 64])).await;
            open += usize::from(end.is_err());
        }
        assert!((1..=limits::CONNECTIONS).contains(&open), "{open} are open");
        for stream in &mut held {
            let mut rest = Vec::new();
            let _ = tokio::time::timeout(limits::WHOLE, stream.read_to_end(&mut rest)).await.expect("it is closed in time");
        }
        assert!(began.elapsed() < limits::WHOLE, "{:?}", began.elapsed());
    }
}
