//! Whom the embedded store serves: clients with a certificate, or on loopback and with `--insecure` every client.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::certificates;

/// How often refused clients are logged.
const REPORT: Duration = Duration::from_secs(60);

/// The arguments of `flanneld store` about certificates; the names are etcd's where etcd has the flag.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct TlsArgs {
    /// The server's certificate, in PEM form [default: one that the store issues, for any address but loopback]
    #[arg(long, value_name = "FILE", requires = "key_file", help_heading = "TLS")]
    pub cert_file: Option<PathBuf>,
    /// Its private key, in PEM form
    #[arg(long, value_name = "FILE", requires = "cert_file", help_heading = "TLS")]
    pub key_file: Option<PathBuf>,
    /// Authorities of the client certificates, in PEM form; clients without one are refused
    #[arg(long, value_name = "FILE", requires = "cert_file", help_heading = "TLS")]
    pub trusted_ca_file: Option<PathBuf>,
    /// Refuse clients without a certificate of --trusted-ca-file: accepted for compatibility with etcd, always so with that flag
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
        action = clap::ArgAction::Set, help_heading = "TLS")]
    pub client_cert_auth: bool,
    /// One more name or address by which clients reach the store, for the certificate that it issues; repeatable
    #[arg(long, value_name = "NAME|IP", conflicts_with = "cert_file", help_heading = "TLS")]
    pub cert_name: Vec<String>,
    /// Serve without TLS and certificates: every host, pod and user that reaches the address can change the routes of all hosts
    #[arg(long, conflicts_with_all = ["cert_file", "cert_name"], help_heading = "TLS")]
    pub insecure: bool,
}

/// The files that a server with client certificates needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Files {
    pub(super) cert: PathBuf,
    pub(super) key: PathBuf,
    pub(super) ca: PathBuf,
}

impl TlsArgs {
    /// How the store listens: with TLS, or for `None` without. Makes certificates where they are needed and none are given.
    pub(super) fn prepare(&self, listen: SocketAddr, data_dir: &Path) -> anyhow::Result<Option<Tls>> {
        let is_local = listen.ip().is_loopback();
        let files = match (&self.cert_file, &self.key_file, &self.trusted_ca_file) {
            (Some(cert), Some(key), Some(ca)) => Files { cert: cert.clone(), key: key.clone(), ca: ca.clone() },
            (Some(_), ..) => bail!(
                "--cert-file needs --trusted-ca-file: the store has no passwords, so a client without a certificate would have every right"
            ),
            _ if self.client_cert_auth => bail!("--client-cert-auth needs --cert-file, --key-file and --trusted-ca-file"),
            _ if self.insecure => {
                if !is_local {
                    tracing::warn!(
                        %listen,
                        meaning = "every host, pod and user that reaches this address can change the routes of all hosts",
                        fix = "restart without --insecure, and copy ca.pem, client.pem and client-key.pem to each host",
                        "serving without TLS and client certificates"
                    );
                }
                return Ok(None);
            }
            _ if is_local && self.cert_name.is_empty() => return Ok(None),
            _ => {
                #[expect(clippy::disallowed_methods, reason = "certificates have dates of the calendar")]
                let now = SystemTime::now();
                let names = certificates::names(listen, &self.cert_name)?;
                certificates::ensure_files(data_dir, &names, now)
                    .with_context(|| format!("cannot make certificates in --data-dir {}", data_dir.display()))?
            }
        };
        Ok(Some(Tls::new(files)?))
    }
}

/// Accepts connections by TLS. Files that were replaced on disk are used from the next connection on.
#[derive(Clone)]
pub(super) struct Tls {
    files: Files,
    current: Arc<Mutex<Current>>,
}

struct Current {
    acceptor: TlsAcceptor,
    /// What the files were when they were read.
    read: Signature,
    /// Clients that were refused since the last report, and when that was.
    refused: u64,
    reported: Option<Instant>,
}

/// Inode, size and time of each file.
type Signature = [Option<(u64, u64, SystemTime)>; 3];

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Tls {
    fn new(files: Files) -> anyhow::Result<Tls> {
        let current = Current { read: files.signature(), acceptor: files.acceptor()?, refused: 0, reported: None };
        Ok(Tls { files, current: Arc::new(Mutex::new(current)) })
    }

    /// For the next connection.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.files.signature();
        if now != current.read {
            current.read = now;
            match self.files.acceptor() {
                Ok(acceptor) => {
                    current.acceptor = acceptor;
                    tracing::info!(certificate = %self.files.cert.display(), "certificates read again");
                }
                Err(error) => tracing::warn!(error = format!("{error:#}"), "cannot read certificates; the earlier ones stay in use"),
            }
        }
        current.acceptor.clone()
    }

    /// A client was refused. Any stranger can cause this, so it is not logged each time.
    pub(super) fn refused(&self, from: SocketAddr, error: &std::io::Error) {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        // It closed the connection: it may be a probe of a load balancer.
        if matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe) {
            return;
        }
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.refused += 1;
        if current.reported.is_none_or(|at| at.elapsed() >= REPORT) {
            let advice =
                if error.to_string().contains("InvalidContentType") { "it does not speak TLS: give it an https:// endpoint" } else { "" };
            tracing::warn!(%from, %error, advice, refused = current.refused, "client refused");
            (current.refused, current.reported) = (0, Some(Instant::now()));
        }
    }
}

impl Files {
    fn signature(&self) -> Signature {
        use std::os::unix::fs::MetadataExt;
        [&self.cert, &self.key, &self.ca].map(|path| {
            let meta = std::fs::metadata(path).ok()?;
            Some((meta.ino(), meta.len(), meta.modified().ok()?))
        })
    }

    fn acceptor(&self) -> anyhow::Result<TlsAcceptor> {
        let certificates = |flag: &str, path: &Path| -> anyhow::Result<Vec<CertificateDer<'static>>> {
            let read = || CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>();
            let found = read().with_context(|| format!("{flag} {} cannot be read", path.display()))?;
            ensure!(!found.is_empty(), "{flag} {} has no certificate in PEM form", path.display());
            Ok(found)
        };
        let mut roots = RootCertStore::empty();
        for authority in certificates("--trusted-ca-file", &self.ca)? {
            roots.add(authority).with_context(|| format!("--trusted-ca-file {} cannot be used", self.ca.display()))?;
        }
        let chain = certificates("--cert-file", &self.cert)?;
        let key = PrivateKeyDer::from_pem_file(&self.key).with_context(|| format!("--key-file {} cannot be read", self.key.display()))?;
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone()).build()?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .with_context(|| format!("--cert-file {} and --key-file {} cannot be used", self.cert.display(), self.key.display()))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}
