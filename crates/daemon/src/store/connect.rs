//! How the store is reached: endpoints, TLS, and the token that stands for a user and a password (specification,
//! section 3.9).

use std::collections::BTreeMap;
use std::error::Error;
use std::net::IpAddr;
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

use super::client_key;
use super::endpoint::{EndpointList, EndpointUrl, parse_list};
use super::failure::{is_protocol_failure, reason, scheme_mismatch};
use super::{EtcdError, foreign_text};
use crate::etcd::AuthenticateRequest;
use crate::etcd::auth_client::AuthClient;
use crate::settings::Secret;

/// How long an endpoint may take to accept a connection: the kernel sends its first packet twice in this time. Longer waits would
/// delay the end of an outage.
const CONNECT: Duration = Duration::from_secs(2);
/// How often an idle connection is pinged, and how long the answer may take. etcd's servers refuse more than one ping in five
/// seconds.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// How etcd is reached, as the operator says.
#[derive(Clone, Default)]
pub struct Access {
    /// `--etcd-endpoints`: a comma-separated list.
    pub endpoints: String,
    /// Is that the default, which the operator did not name? Then any local user may listen there: no password is sent to it, and
    /// no command is taken from it.
    pub is_default: bool,
    /// `--etcd-prefix`
    pub prefix: String,
    /// `--etcd-cafile`: what the servers' certificates are checked against, instead of the system's roots.
    pub ca: Option<PathBuf>,
    /// `--etcd-certfile`: the client certificate.
    pub cert: Option<PathBuf>,
    /// `--etcd-keyfile`: its key.
    pub key: Option<PathBuf>,
    /// `--etcd-username` and `--etcd-password`.
    pub login: Option<(String, Secret)>,
}

impl std::fmt::Debug for Access {
    // The list of endpoints may have credentials in it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// Carries requests to one endpoint, and answers back: a connection of HTTP/2, or in a simulation a function.
pub type Transport = BoxCloneSyncService<http::Request<Body>, http::Response<Body>, tonic::transport::Error>;

/// A transport that adds the token to each request.
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

/// Makes a transport; nothing is connected until it is used.
pub(super) type Connector = Box<dyn Fn() -> Transport + Send + Sync>;

/// The endpoints, and the user as whom requests are made.
pub(super) struct Endpoints {
    /// As they are shown.
    pub(super) names: Vec<String>,
    /// What is known of each beyond its name; nothing in a simulation.
    urls: Vec<EndpointUrl>,
    connectors: Vec<Connector>,
    transports: Mutex<Vec<Transport>>,
    token: Token,
    login: Option<(String, Secret)>,
    /// Was a password given that must not be sent?
    is_login_withheld: bool,
    /// Is any of them reached by TLS?
    has_tls: bool,
    /// Why an endpoint does not answer, by its place.
    reasons: Mutex<BTreeMap<usize, String>>,
}

impl Endpoints {
    /// Reads the list and the files. Nothing is connected yet.
    pub(super) fn new(access: &Access) -> Result<Endpoints, EtcdError> {
        client_key::accept_version_1();
        let at_start = tls(access)?;
        let has_certificates = access.cert.is_some() || access.ca.is_some();
        let list = parse_list(&access.endpoints, has_certificates)?;
        let mut connectors: Vec<Connector> = Vec::new();
        for url in &list.endpoints {
            let bad = |problem: String| EtcdError::Endpoint(url.url.clone(), problem);
            let mut endpoint = Endpoint::from_shared(url.url.clone()).map_err(|error| bad(error.to_string()))?;
            if url.is_tls {
                endpoint = endpoint.tls_config(at_start.clone()).map_err(|error| unusable_files(access, &error))?;
            }
            let endpoint = endpoint.connect_timeout(CONNECT).tcp_nodelay(true).http2_keep_alive_interval(PING.0).keep_alive_timeout(PING.1);
            let (access, is_tls) = (access.clone(), url.is_tls);
            connectors.push(Box::new(move || {
                // Certificates are renewed on disk. Files that cannot be read, or are half written, count as unchanged.
                let renewed = is_tls.then(|| tls(&access).ok()).flatten();
                let endpoint = renewed.and_then(|tls| endpoint.clone().tls_config(tls).ok()).unwrap_or_else(|| endpoint.clone());
                Transport::new(endpoint.connect_lazy())
            }));
        }
        warn_of_plain_text(access, &list);
        let names = list.endpoints.iter().map(|endpoint| endpoint.url.clone()).collect();
        let login = access.login.clone().filter(|_| !access.is_default);
        let is_login_withheld = access.login.is_some() && login.is_none();
        Ok(Endpoints { urls: list.endpoints, is_login_withheld, ..Endpoints::over(names, connectors, login) })
    }

    /// Endpoints by their names and connectors.
    pub(super) fn over(names: Vec<String>, connectors: Vec<Connector>, login: Option<(String, Secret)>) -> Endpoints {
        let transports = Mutex::new(connectors.iter().map(|connect| connect()).collect());
        let has_tls = names.iter().any(|name| name.starts_with("https:"));
        let urls = Vec::new();
        Endpoints {
            names,
            urls,
            connectors,
            transports,
            token: Token::default(),
            login,
            is_login_withheld: false,
            has_tls,
            reasons: Mutex::default(),
        }
    }

    /// Replaces all connections: the present ones begin at an address that this host no longer has, or use certificates that have
    /// expired.
    pub(super) fn renew(&self) {
        *self.transports.lock().unwrap_or_else(PoisonError::into_inner) = self.connectors.iter().map(|connect| connect()).collect();
    }

    /// No endpoint answers. The certificates may have expired and may have been renewed on disk.
    pub(super) fn renew_certificates(&self) {
        if self.has_tls {
            self.renew();
        }
    }

    pub(super) fn len(&self) -> usize {
        self.connectors.len()
    }

    /// The user as whom requests are made, and whether a password is withheld.
    pub(super) fn user(&self) -> (Option<&str>, bool) {
        (self.login.as_ref().map(|(name, _)| name.as_str()), self.is_login_withheld)
    }

    /// Why requests to the endpoint at this place fail. A server that refuses a certificate says why and closes the connection, and
    /// either may be seen first; the reason that says more stands until the endpoint answers.
    pub(super) async fn explain(&self, at: usize, status: &Status) -> String {
        let is_ambiguous = is_protocol_failure(status);
        let mismatch = match self.urls.get(at).filter(|_| is_ambiguous) {
            Some(url) => scheme_mismatch(url).await,
            None => None,
        };
        let mut reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        let text = match (mismatch, reasons.get(&at)) {
            (Some(text), _) => text.to_owned(),
            (None, Some(known)) if is_ambiguous => known.clone(),
            _ => reason(status),
        };
        if !is_ambiguous || mismatch.is_some() {
            reasons.insert(at, text.clone());
        }
        text
    }

    /// The endpoint at this place answered.
    pub(super) fn answered(&self, at: usize) {
        self.reasons.lock().unwrap_or_else(PoisonError::into_inner).remove(&(at % self.connectors.len()));
    }

    /// A connection to one of the endpoints, counted round. Logs in first, where there is a user and no token.
    pub(super) async fn connection(&self, at: usize) -> Result<Connection, Status> {
        let transport = self.transports.lock().unwrap_or_else(PoisonError::into_inner)[at % self.connectors.len()].clone();
        if let Some((name, password)) = self.login.as_ref().filter(|_| self.token.get().is_none()) {
            let request = AuthenticateRequest { name: name.clone(), password: password.0.clone() };
            match AuthClient::new(transport.clone()).authenticate(request).await {
                Ok(answer) => {
                    let token = answer.into_inner().token.parse().map_err(|_| Status::internal("etcd's token is not ASCII text"))?;
                    self.token.set(Some(token));
                }
                // Without authentication no token is needed.
                Err(status) if status.code() == Code::FailedPrecondition && status.message().contains("not enabled") => {}
                Err(status) if status.code() == Code::InvalidArgument => {
                    return Err(Status::unauthenticated(format!("--etcd-username, --etcd-password: {}", foreign_text(status.message()))));
                }
                Err(status) => return Err(status),
            }
        }
        Ok(InterceptedService::new(transport, self.token.clone()))
    }

    /// Was a request refused because the token is too old? Then it is forgotten, and the next attempt logs in again.
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

/// Warns of a password that is sent unencrypted or not sent, and of settings that are not used.
fn warn_of_plain_text(access: &Access, list: &EndpointList) {
    if list.had_credentials {
        tracing::warn!("credentials in --etcd-endpoints are not used; give --etcd-username and --etcd-password");
    }
    let is_local = |endpoint: &&EndpointUrl| {
        let host = endpoint.authority.rsplit_once(':').map_or("", |(host, _)| host);
        host == "localhost" || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    };
    if access.login.is_some() && access.is_default {
        tracing::warn!("the etcd password is not sent to the default endpoints; name etcd's by --etcd-endpoints");
    }
    for endpoint in list.endpoints.iter().filter(|endpoint| !endpoint.is_tls) {
        if access.cert.is_some() || access.ca.is_some() {
            tracing::warn!(endpoint = endpoint.url, "endpoint is http: certificate files are not used for it");
        }
        if access.login.is_some() && !access.is_default && !is_local(&endpoint) {
            tracing::warn!(endpoint = endpoint.url, "endpoint is http: the etcd password is sent unencrypted");
        }
    }
}

impl std::fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoints").field("names", &self.names).finish_non_exhaustive()
    }
}

/// The TLS settings that the files give. They are read each time, because they are renewed on disk.
fn tls(access: &Access) -> Result<ClientTlsConfig, EtcdError> {
    let read = |flag: &'static str, path: &PathBuf, kind: &str| {
        let file = |problem: String| EtcdError::File(flag, path.display().to_string(), problem);
        let text = std::fs::read(path).map_err(|error| file(error.to_string()))?;
        let has_block = String::from_utf8_lossy(&text).lines().any(|line| line.starts_with("-----BEGIN ") && line.contains(kind));
        has_block.then_some(text).ok_or_else(|| file(format!("it has no {kind} in PEM form")))
    };
    let mut tls = ClientTlsConfig::new();
    match &access.ca {
        Some(path) => tls = tls.ca_certificate(Certificate::from_pem(read("--etcd-cafile", path, "CERTIFICATE")?)),
        None => tls = tls.with_native_roots(),
    }
    match (&access.cert, &access.key) {
        (Some(cert), Some(key)) => {
            let cert = read("--etcd-certfile", cert, "CERTIFICATE")?;
            let pem = read("--etcd-keyfile", key, "PRIVATE KEY")?;
            let unusable = |problem| EtcdError::File("--etcd-keyfile", key.display().to_string(), problem);
            client_key::check_pair(&cert, &pem).map_err(unusable)?;
            tls = tls.identity(Identity::from_pem(cert, pem));
        }
        (None, None) => {}
        (Some(_), None) => return Err(EtcdError::Flags("--etcd-certfile needs --etcd-keyfile")),
        (None, Some(_)) => return Err(EtcdError::Flags("--etcd-keyfile needs --etcd-certfile")),
    }
    Ok(tls)
}

/// The files were read, and the TLS library does not take them.
fn unusable_files(access: &Access, error: &dyn Error) -> EtcdError {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let (flag, path) = match (&access.cert, &access.ca) {
        (Some(path), _) => ("--etcd-certfile", path.display().to_string()),
        (None, Some(path)) => ("--etcd-cafile", path.display().to_string()),
        (None, None) => ("--etcd-cafile", "(the system's certificates)".to_owned()),
    };
    EtcdError::File(flag, path, cause.to_string())
}
