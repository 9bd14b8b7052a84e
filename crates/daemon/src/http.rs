//! `/healthz`, `/readyz`, `/state` and `/metrics`: plain HTTP, no authentication, nothing secret in it.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Context;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Request, Response, StatusCode, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};

use crate::ready::Ready;
use crate::state::State;

/// The health server's listener.
#[derive(Debug)]
pub struct Http {
    listener: TcpListener,
    ready: Ready,
    asks: mpsc::Sender<oneshot::Sender<State>>,
}

impl Http {
    /// Binds the address. The default, `0.0.0.0`, takes IPv6 clients too, as upstream's does.
    ///
    /// # Errors
    /// When the port cannot be had.
    pub async fn bind(ip: IpAddr, port: u16, ready: Ready, asks: mpsc::Sender<oneshot::Sender<State>>) -> anyhow::Result<Http> {
        let wildcard = ip == IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let dual = if wildcard { TcpListener::bind(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)).await.ok() } else { None };
        let listener = match dual {
            Some(listener) => listener,
            None => TcpListener::bind(SocketAddr::new(ip, port))
                .await
                .with_context(|| format!("cannot listen on --healthz-ip {ip} --healthz-port {port}"))?,
        };
        Ok(Http { listener, ready, asks })
    }

    /// Serves for ever.
    pub async fn serve(self) {
        loop {
            // A client that went away before it was accepted, or a moment without descriptors, is no end.
            let Ok((stream, _)) = self.listener.accept().await else {
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            };
            tokio::spawn(connection(stream, self.ready.clone(), self.asks.clone()));
        }
    }
}

async fn connection(stream: TcpStream, ready: Ready, asks: mpsc::Sender<oneshot::Sender<State>>) {
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let (ready, asks) = (ready.clone(), asks.clone());
        async move { Ok::<_, Infallible>(answer(request.uri().path(), &ready, &asks).await) }
    });
    // A client that hangs up in the middle is its own affair.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(path: &str, ready: &Ready, asks: &mpsc::Sender<oneshot::Sender<State>>) -> Response<Full<Bytes>> {
    let (status, kind, body) = match path {
        "/healthz" => (StatusCode::OK, "text/plain", "flanneld is running".to_owned()),
        "/readyz" => match ready.pending().as_slice() {
            [] => (StatusCode::OK, "text/plain", "flanneld is ready".to_owned()),
            pending => {
                (StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("flanneld is not ready yet: waiting for {}\n", pending.join(", ")))
            }
        },
        "/state" => match state(asks).await {
            Some(state) => (StatusCode::OK, "application/json", serde_json::to_string_pretty(&state).unwrap_or_default() + "\n"),
            None => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("starting: waiting for {}\n", ready.pending().join(", "))),
        },
        "/metrics" => match state(asks).await {
            Some(state) => (StatusCode::OK, "text/plain; version=0.0.4", state.metrics(ready.pending().is_empty())),
            None => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", "starting\n".to_owned()),
        },
        _ => (StatusCode::NOT_FOUND, "text/plain", "there is /healthz, /readyz, /state and /metrics\n".to_owned()),
    };
    let response = Response::builder().status(status).header("content-type", kind).body(Full::new(Bytes::from(body)));
    response.expect("the parts are constants")
}

async fn state(asks: &mpsc::Sender<oneshot::Sender<State>>) -> Option<State> {
    let (reply, answer) = oneshot::channel();
    // While the daemon starts nobody reads the channel; the question must not wait for that.
    asks.try_send(reply).ok()?;
    tokio::time::timeout(std::time::Duration::from_secs(5), answer).await.ok()?.ok()
}
