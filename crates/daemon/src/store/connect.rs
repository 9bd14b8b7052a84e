//! How the store is reached: endpoints, TLS, and the token that stands for a user and a password (specification,
//! section 3.9).

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tonic::body::Body;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};
use tower::util::BoxCloneSyncService;

use super::EtcdError;
use crate::etcd::AuthenticateRequest;
use crate::etcd::auth_client::AuthClient;
use crate::settings::Secret;

/// How long an endpoint may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// How often the life of a connection is asked for. etcd's servers refuse more than one ping in five seconds.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// What the operator says about the store.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// `--etcd-endpoints`: a comma list.
    pub endpoints: String,
    /// `--etcd-prefix`
    pub prefix: String,
    /// `--etcd-cafile`: what the servers' certificates are checked against, instead of the system's roots.
    pub ca: Option<PathBuf>,
    /// `--etcd-certfile`: our own certificate.
    pub cert: Option<PathBuf>,
    /// `--etcd-keyfile`: its key.
    pub key: Option<PathBuf>,
    /// `--etcd-username` and `--etcd-password`.
    pub login: Option<(String, Secret)>,
}

/// What carries requests to one endpoint, and answers back: a connection of HTTP/2, or in a simulation a function.
pub type Transport = BoxCloneSyncService<http::Request<Body>, http::Response<Body>, tonic::transport::Error>;

/// A wire that adds the token to each request.
pub(super) type Connection = InterceptedService<Transport, Token>;

/// The token that etcd gave for the password; none before the first login, or where there is no user.
#[derive(Debug, Clone, Default)]
pub(super) struct Token(Arc<Mutex<Option<AsciiMetadataValue>>>);

impl Token {
    fn get(&self) -> Option<AsciiMetadataValue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, token: Option<AsciiMetadataValue>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = token;
    }
}

impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = self.get() {
            request.metadata_mut().insert("token", token);
        }
        Ok(request)
    }
}

/// Makes a wire; nothing is connected until it is used.
pub(super) type Connector = Box<dyn Fn() -> Transport + Send + Sync>;

/// The endpoints and who we are to them.
pub(super) struct Endpoints {
    pub(super) names: Vec<String>,
    /// Makes a new wire to each.
    lay: Vec<Connector>,
    wires: Mutex<Vec<Transport>>,
    token: Token,
    login: Option<(String, Secret)>,
    /// Is any of them reached by TLS?
    is_secure: bool,
}

impl Endpoints {
    /// Reads the comma list and the files. Nothing is connected yet.
    pub(super) fn new(access: &Access) -> Result<Endpoints, EtcdError> {
        let at_start = tls(access)?;
        let mut lay: Vec<Connector> = Vec::new();
        let mut names = Vec::new();
        for text in access.endpoints.split(',') {
            let bad = |problem: String| EtcdError::Endpoint(text.to_owned(), problem);
            // Without a scheme, the files say whether it is TLS.
            let scheme = if access.cert.is_some() || access.ca.is_some() { "https" } else { "http" };
            let url = if text.contains("://") { text.to_owned() } else { format!("{scheme}://{text}") };
            let mut endpoint = Endpoint::from_shared(url.clone()).map_err(|error| bad(error.to_string()))?;
            let scheme = endpoint.uri().scheme_str().map(ToOwned::to_owned);
            if !matches!(scheme.as_deref(), Some("http" | "https")) || endpoint.uri().port_u16().is_none() {
                return Err(bad("an endpoint looks like http://127.0.0.1:2379 or https://etcd.example:2379".to_owned()));
            }
            if scheme.as_deref() == Some("https") {
                endpoint = endpoint.tls_config(at_start.clone()).map_err(|error| bad(describe(&error)))?;
            } else if access.cert.is_some() || access.ca.is_some() {
                tracing::warn!(
                    endpoint = text,
                    "this endpoint is http: the certificate files are not used, and whoever is on the way can read and write"
                );
            }
            let endpoint = endpoint.connect_timeout(CONNECT).tcp_nodelay(true).http2_keep_alive_interval(PING.0).keep_alive_timeout(PING.1);
            let (access, is_secure) = (access.clone(), scheme.as_deref() == Some("https"));
            lay.push(Box::new(move || {
                // Certificates are renewed on disk. What cannot be read, or is half written, is as it was.
                let renewed = is_secure.then(|| tls(&access).ok()).flatten();
                let endpoint = renewed.and_then(|tls| endpoint.clone().tls_config(tls).ok()).unwrap_or_else(|| endpoint.clone());
                Transport::new(endpoint.connect_lazy())
            }));
            names.push(url);
        }
        Ok(Endpoints::over(names, lay, access.login.clone()))
    }

    /// Endpoints by their names and wires.
    pub(super) fn over(names: Vec<String>, lay: Vec<Connector>, login: Option<(String, Secret)>) -> Endpoints {
        let wires = Mutex::new(lay.iter().map(|lay| lay()).collect());
        let is_secure = names.iter().any(|name| name.starts_with("https:"));
        Endpoints { names, lay, wires, token: Token::default(), login, is_secure }
    }

    /// Begins all connections anew: those that there are begin at an address that this host has no more, or with certificates
    /// that have ended.
    pub(super) fn renew(&self) {
        *self.wires.lock().unwrap_or_else(PoisonError::into_inner) = self.lay.iter().map(|lay| lay()).collect();
    }

    /// None of them answers: perhaps because certificates have ended that are others on disk by now.
    pub(super) fn renew_certificates(&self) {
        if self.is_secure {
            self.renew();
        }
    }

    pub(super) fn len(&self) -> usize {
        self.lay.len()
    }

    /// A connection to one of the endpoints, counted round. Logs in first, where there is a user and no token.
    pub(super) async fn connection(&self, at: usize) -> Result<Connection, Status> {
        let wire = self.wires.lock().unwrap_or_else(PoisonError::into_inner)[at % self.lay.len()].clone();
        if let Some((name, password)) = self.login.as_ref().filter(|_| self.token.get().is_none()) {
            let request = AuthenticateRequest { name: name.clone(), password: password.0.clone() };
            match AuthClient::new(wire.clone()).authenticate(request).await {
                Ok(answer) => {
                    let token = answer.into_inner().token.parse().map_err(|_| Status::internal("etcd's token is no ASCII text"))?;
                    self.token.set(Some(token));
                }
                // A store that lets everybody in needs no token.
                Err(status) if status.code() == Code::FailedPrecondition && status.message().contains("not enabled") => {}
                Err(status) if status.code() == Code::InvalidArgument => {
                    return Err(Status::unauthenticated(format!("--etcd-username, --etcd-password: {}", status.message())));
                }
                Err(status) => return Err(status),
            }
        }
        Ok(InterceptedService::new(wire, self.token.clone()))
    }

    /// Was a request refused because the token is too old? Then it is forgotten, and another try logs in again.
    pub(super) fn forget_stale_token(&self, status: &Status) -> bool {
        let stale = status.code() == Code::Unauthenticated
            || ["invalid auth token", "revision of auth store is old", "user name is empty"]
                .iter()
                .any(|text| status.message().contains(text));
        let had_one = self.token.get().is_some();
        if stale && self.login.is_some() {
            self.token.set(None);
        }
        stale && had_one
    }
}

impl std::fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoints").field("names", &self.names).finish_non_exhaustive()
    }
}

fn tls(access: &Access) -> Result<ClientTlsConfig, EtcdError> {
    let read = |flag: &'static str, path: &PathBuf| {
        std::fs::read(path).map_err(|error| EtcdError::File(flag, path.display().to_string(), error.to_string()))
    };
    let mut tls = ClientTlsConfig::new();
    match &access.ca {
        Some(path) => tls = tls.ca_certificate(Certificate::from_pem(read("--etcd-cafile", path)?)),
        None => tls = tls.with_native_roots(),
    }
    match (&access.cert, &access.key) {
        (Some(cert), Some(key)) => {
            tls = tls.identity(Identity::from_pem(read("--etcd-certfile", cert)?, read("--etcd-keyfile", key)?));
        }
        (None, None) => {}
        (Some(path), None) => {
            return Err(EtcdError::File("--etcd-certfile", path.display().to_string(), "it needs --etcd-keyfile".to_owned()));
        }
        (None, Some(path)) => {
            return Err(EtcdError::File("--etcd-keyfile", path.display().to_string(), "it needs --etcd-certfile".to_owned()));
        }
    }
    Ok(tls)
}

/// An error with all that lies beneath it: that says more than "transport error".
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
