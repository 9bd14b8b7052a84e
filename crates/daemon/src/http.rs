//! `/healthz`, `/readyz`, `/state` and `/metrics`: plain HTTP/1.1, no authentication, nothing secret in it. What strangers may use is limited:
//! see the constants.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Method, Request, Response, StatusCode, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::probe::Paths;
use crate::ready::Ready;
use crate::state::{State, metrics};
use crate::view::View;

/// Connections that are served at once; others wait in the kernel's queue. The loop and its repairs need descriptors, too.
const CONNECTIONS: usize = 64;
/// How long a client may take for its request, and then for reading the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a request's head.
const HEAD: usize = 16 << 10;

/// The health server's listener.
#[derive(Debug)]
pub struct Http {
    listener: TcpListener,
    sources: Sources,
}

/// What the answers are made of.
#[derive(Debug, Clone)]
struct Sources {
    ready: Ready,
    view: watch::Receiver<Arc<View>>,
    paths: watch::Receiver<Arc<Paths>>,
}

impl Http {
    /// Binds the address. The default, `0.0.0.0`, takes IPv6 clients too, as upstream's does.
    ///
    /// # Errors
    /// When the port cannot be had.
    pub async fn bind(
        ip: IpAddr,
        port: u16,
        ready: Ready,
        view: watch::Receiver<Arc<View>>,
        paths: watch::Receiver<Arc<Paths>>,
    ) -> anyhow::Result<Http> {
        let wildcard = ip == IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let dual = if wildcard { TcpListener::bind(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)).await.ok() } else { None };
        let listener = match dual {
            Some(listener) => listener,
            None => TcpListener::bind(SocketAddr::new(ip, port))
                .await
                .with_context(|| format!("cannot listen on --healthz-ip {ip} --healthz-port {port}"))?,
        };
        Ok(Http { listener, sources: Sources { ready, view, paths } })
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
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let place = Arc::clone(&places).acquire_owned().await;
            // A client that went away before it was accepted, or a moment without descriptors, is no end.
            let Ok((stream, _)) = self.listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let sources = self.sources.clone();
            tokio::spawn(async move {
                let _place = place;
                // A client that hangs up in the middle, or takes too long, is disconnected.
                let _ = tokio::time::timeout(PATIENCE * 2, connection(stream, sources)).await;
            });
        }
    }
}

async fn connection(stream: TcpStream, sources: Sources) -> hyper::Result<()> {
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let response = answer(request.method(), request.uri().path(), &sources);
        async move { Ok::<_, Infallible>(response) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(HEAD).keep_alive(false);
    http.serve_connection(TokioIo::new(stream), service).await
}

fn answer(method: &Method, path: &str, sources: &Sources) -> Response<Full<Bytes>> {
    let Sources { ready, view, paths } = sources;
    let paths = paths.borrow().clone();
    const TEXT: &str = "text/plain";
    let pending = || ready.pending().join(", ");
    let starting = || (StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("flanneld is starting: waiting for {}\n", pending()));
    let (status, kind, body) = match path {
        _ if !matches!(*method, Method::GET | Method::HEAD) => {
            (StatusCode::METHOD_NOT_ALLOWED, TEXT, format!("{path} answers GET and HEAD only\n"))
        }
        "/healthz" => (StatusCode::OK, TEXT, "flanneld is running".to_owned()),
        "/readyz" => readiness(&ready.pending(), &view.borrow().clone(), &paths),
        "/state" => match State::new(&view.borrow().clone(), &paths) {
            Some(state) => (StatusCode::OK, "application/json", serde_json::to_string_pretty(&state).unwrap_or_default() + "\n"),
            None => starting(),
        },
        "/metrics" => match metrics(&view.borrow().clone(), &paths, ready.pending().is_empty()) {
            Some(text) => (StatusCode::OK, "text/plain; version=0.0.4", text),
            None => starting(),
        },
        _ => (StatusCode::NOT_FOUND, TEXT, "there is /healthz, /readyz, /state and /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

/// Ready when nothing is pending; problems that leave the node working are noted.
fn readiness(pending: &[String], view: &View, paths: &Paths) -> (StatusCode, &'static str, String) {
    if !pending.is_empty() {
        let text = format!("flanneld is not ready yet: waiting for {}\n", pending.join(", "));
        return (StatusCode::SERVICE_UNAVAILABLE, "text/plain", text);
    }
    if let Some(condition) = view.conditions.iter().find(|condition| condition.blocks_ready) {
        return (StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("flanneld is not ready: {}\n", condition.text));
    }
    let mut notes: String = view.conditions.iter().map(|condition| format!("\nnote: {}", condition.text)).collect();
    if let broken @ 1.. = paths.broken().count() {
        notes.push_str(&format!("\nnote: {broken} of {} paths to peers are broken; /state names them", paths.reports.len()));
    }
    (StatusCode::OK, "text/plain", format!("flanneld is ready{notes}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::Condition;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn server() -> (SocketAddr, watch::Sender<Arc<View>>) {
        let (publish, view) = watch::channel(Arc::default());
        let http = Http::bind(IpAddr::V4(Ipv4Addr::LOCALHOST), 0, Ready::default(), view, watch::channel(Arc::default()).1).await.unwrap();
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
    async fn only_reading_is_answered_and_conditions_are_noted() {
        let (address, publish) = server().await;
        assert!(ask(address, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.ends_with("flanneld is running"));
        for method in ["POST", "PUT", "DELETE", "BREW"] {
            assert!(ask(address, &format!("{method} /healthz HTTP/1.1\r\nHost: x\r\n\r\n")).await.starts_with("HTTP/1.1 405 "), "{method}");
        }
        assert!(ask(address, "GET /state HTTP/1.1\r\nHost: x\r\n\r\n").await.starts_with("HTTP/1.1 503 "));
        let conditions = vec![Condition { code: "x", text: "IPv6 is down".to_owned(), blocks_ready: false }];
        publish.send_replace(Arc::new(View { conditions, ..View::default() }));
        assert!(ask(address, "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await.ends_with("flanneld is ready\nnote: IPv6 is down"));
    }

    #[tokio::test]
    async fn a_large_head_is_refused() {
        let (address, _publish) = server().await;
        let head = format!("GET /healthz HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "a".repeat(400_000));
        let answer = ask(address, &head).await;
        assert!(!answer.contains("flanneld is running"), "{answer}");
    }

    #[tokio::test]
    async fn half_sent_requests_block_others_for_a_moment_only() {
        let (address, _publish) = server().await;
        let mut held = Vec::new();
        for _ in 0..CONNECTIONS * 2 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /healthz").await.unwrap();
            held.push(stream);
        }
        let began = std::time::Instant::now();
        assert!(ask(address, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.ends_with("flanneld is running"));
        assert!(began.elapsed() < PATIENCE * 6, "{:?}", began.elapsed());
    }
}
