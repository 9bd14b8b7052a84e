//! The embedded store's own authority, and the certificates that it signs: made on the first start, beside the store's data.
//!
//! The authority and the client certificate never expire, because an expiry that no operator remembers is an outage of every
//! host: they are replaced by deleting them. The server's certificate is renewed at a start, long before it expires.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use kernel::file::{Existing, How};
use kernel::netlink::{Protocol, Socket};
use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose};
use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::CertifiedKey;

use super::tls::Files;

/// The life of the server's certificate.
const LIFE: Duration = Duration::from_secs(3650 * 86_400);
/// It is renewed at a start if it has less than this left.
const RENEW: Duration = Duration::from_secs(3650 * 86_400 / 3);
/// Certificates begin in 1970: a host whose clock is behind would refuse one that begins today.
const BEGIN: (i32, u8, u8) = (1970, 1, 1);
/// "No well-defined expiration date" (RFC 5280, section 4.1.2.5).
const NEVER: (i32, u8, u8) = (9999, 12, 31);
/// A clock before this is wrong: the certificate's life is counted from here then.
const EARLIEST: u64 = 1_767_225_600;
/// Names and addresses in the server's certificate. kube-proxy alone may give a host thousands of addresses.
const NAMES: usize = 64;

const CA: (&str, &str) = ("ca.pem", "ca-key.pem");
const SERVER: (&str, &str) = ("server.pem", "server-key.pem");
const CLIENT: (&str, &str) = ("client.pem", "client-key.pem");

/// The names and addresses by which clients reach a store that listens here: the address, or all of this host's, and what the
/// operator adds.
pub(super) fn names(listen: SocketAddr, more: &[String]) -> anyhow::Result<BTreeSet<String>> {
    let mut names = BTreeSet::from(["localhost".to_owned()]);
    for name in more {
        ServerName::try_from(name.as_str()).map_err(|_| anyhow::anyhow!("--cert-name {name}: it is neither a DNS name nor an address"))?;
        names.insert(name.clone());
    }
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    names.extend(Some(host).filter(|host| ServerName::try_from(host.as_str()).is_ok()));
    let mut addresses = BTreeSet::from([IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])]);
    if listen.ip().is_unspecified() {
        let found = kernel::addr::list(&mut Socket::open(Protocol::Route)?, 0).context("cannot read this host's addresses")?;
        addresses.extend(found.iter().filter(|found| !found.link_scope).map(|found| found.addr.cidr.addr));
    } else {
        addresses.insert(listen.ip());
    }
    let left = NAMES.saturating_sub(names.len());
    names.extend(addresses.iter().take(left).map(ToString::to_string));
    Ok(names)
}

/// Makes what is missing or cannot be used any more, and returns the files for the server.
pub(super) fn ensure_files(folder: &Path, names: &BTreeSet<String>, now: SystemTime) -> anyhow::Result<Files> {
    let path = |name: &str| folder.join(name);
    let files = Files { cert: path(SERVER.0), key: path(SERVER.1), ca: path(CA.0) };
    let mut authority = None;
    if !files.ca.exists() {
        authority = Some(make_authority(folder)?);
    }
    let ca = read_certificate(&files.ca)?;
    if let Err(reason) = check_client(folder, &ca, now) {
        issue(folder, CLIENT, &mut authority, &[], NEVER_ENDS)?;
        check_client(folder, &ca, now).context("the client certificate does not fit the authority")?;
        tracing::info!(
            folder = %folder.display(), reason = format!("{reason:#}"),
            copy = "ca.pem, client.pem and client-key.pem, for --etcd-cafile, --etcd-certfile and --etcd-keyfile of each host",
            rotate = "delete *.pem in this folder, restart, and copy the three files again",
            "client certificate issued"
        );
    }
    if let Err(reason) = check_server(folder, &ca, names, now) {
        let names: Vec<String> = names.iter().cloned().collect();
        let from = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().max(Duration::from_secs(EARLIEST));
        issue(folder, SERVER, &mut authority, &names, Some(from + LIFE))?;
        check_server(folder, &ca, &names.iter().cloned().collect(), now).context("the server certificate does not fit the authority")?;
        tracing::info!(names = names.join(" "), reason = format!("{reason:#}"), "server certificate issued");
    }
    Ok(files)
}

/// No end of a certificate's life.
const NEVER_ENDS: Option<Duration> = None;

/// An authority: its key, and its certificate as an issuer.
struct Authority {
    key: KeyPair,
    issuer: Certificate,
}

impl Authority {
    /// The certificate is made from the key each time. Name and key identifier are always the same, which is all that a signature refers
    /// to; so nothing needs to read the one in the file.
    fn new(key: KeyPair) -> anyhow::Result<Authority> {
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params.distinguished_name.push(DnType::CommonName, "flanneld store authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = rcgen::date_time_ymd(BEGIN.0, BEGIN.1, BEGIN.2);
        params.not_after = rcgen::date_time_ymd(NEVER.0, NEVER.1, NEVER.2);
        Ok(Authority { issuer: params.self_signed(&key)?, key })
    }

    fn read(folder: &Path) -> anyhow::Result<Authority> {
        let path = folder.join(CA.1);
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!(
                "a certificate must be issued, which needs {} (or delete *.pem there, and copy the new files to all hosts)",
                path.display()
            )
        })?;
        Authority::new(KeyPair::from_pem(&text).with_context(|| format!("{} cannot be used", path.display()))?)
    }
}

/// Makes the authority, or its certificate again if only the key is left.
fn make_authority(folder: &Path) -> anyhow::Result<Authority> {
    let (cert, key) = (folder.join(CA.0), folder.join(CA.1));
    if !key.exists() {
        write(&key, &KeyPair::generate()?.serialize_pem(), 0o600)?;
    }
    let authority = Authority::read(folder)?;
    write(&cert, &authority.issuer.pem(), 0o644)?;
    Ok(authority)
}

/// Issues a certificate: for the server if it has names, else for clients.
fn issue(
    folder: &Path,
    (cert, key): (&str, &str),
    authority: &mut Option<Authority>,
    names: &[String],
    end: Option<Duration>,
) -> anyhow::Result<()> {
    let authority = match authority {
        Some(authority) => authority,
        None => authority.insert(Authority::read(folder)?),
    };
    let mut params = CertificateParams::new(names.to_vec())?;
    let (name, usage) = match names {
        [] => ("flanneld", ExtendedKeyUsagePurpose::ClientAuth),
        _ => ("flanneld store", ExtendedKeyUsagePurpose::ServerAuth),
    };
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    params.not_before = rcgen::date_time_ymd(BEGIN.0, BEGIN.1, BEGIN.2);
    params.not_after = match end {
        Some(end) => params.not_before + end,
        None => rcgen::date_time_ymd(NEVER.0, NEVER.1, NEVER.2),
    };
    let own = KeyPair::generate()?;
    let issued = params.signed_by(&own, &authority.issuer, &authority.key)?;
    write(&folder.join(key), &own.serialize_pem(), 0o600)?;
    write(&folder.join(cert), &issued.pem(), 0o644)
}

fn write(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let how = How { mode, durable: true, existing: Existing::ReplaceAlone };
    kernel::file::put(path, text.as_bytes(), how, |_| Ok(())).with_context(|| format!("cannot write {}", path.display()))
}

fn read_certificate(path: &Path) -> anyhow::Result<CertificateDer<'static>> {
    CertificateDer::from_pem_file(path).with_context(|| format!("cannot read the certificate {}", path.display()))
}

/// A certificate whose key fits it.
fn read_pair(folder: &Path, (cert, key): (&str, &str)) -> anyhow::Result<CertificateDer<'static>> {
    let (cert, key): (PathBuf, PathBuf) = (folder.join(cert), folder.join(key));
    let cert = read_certificate(&cert)?;
    let key = PrivateKeyDer::from_pem_file(&key).with_context(|| format!("cannot read the key {}", key.display()))?;
    CertifiedKey::from_der(vec![cert.clone()], key, &ring::default_provider())?;
    Ok(cert)
}

fn roots(ca: &CertificateDer<'static>) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone())?;
    Ok(roots)
}

fn unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// Why the client certificate cannot be used, if so.
fn check_client(folder: &Path, ca: &CertificateDer<'static>, now: SystemTime) -> anyhow::Result<()> {
    ensure!(folder.join(CLIENT.0).exists(), "there is none yet");
    let cert = read_pair(folder, CLIENT)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(ca)?.into(), ring::default_provider().into()).build()?;
    verifier.verify_client_cert(&cert, &[], unix(now))?;
    Ok(())
}

/// Why the server's certificate cannot be used for long, if so.
fn check_server(folder: &Path, ca: &CertificateDer<'static>, names: &BTreeSet<String>, now: SystemTime) -> anyhow::Result<()> {
    ensure!(folder.join(SERVER.0).exists(), "there is none yet");
    let cert = read_pair(folder, SERVER)?;
    let parsed = ParsedCertificate::try_from(&cert)?;
    for name in names {
        let server = ServerName::try_from(name.as_str()).context("a name of this host cannot be used")?;
        ensure!(verify_server_name(&parsed, &server).is_ok(), "it does not name {name}");
    }
    let algorithms = ring::default_provider().signature_verification_algorithms.all;
    let valid_at =
        |time| verify_server_cert_signed_by_trust_anchor(&parsed, &roots(ca)?, &[], unix(time), algorithms).map_err(anyhow::Error::from);
    valid_at(now)?;
    valid_at(now + RENEW).context("it expires soon")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let folder = std::env::temp_dir().join(format!("flannel-certificates-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&folder).unwrap();
            Folder(folder)
        }

        fn read(&self, name: &str) -> String {
            std::fs::read_to_string(self.0.join(name)).unwrap()
        }

        fn ensure(&self, names: &[&str], now: SystemTime) -> anyhow::Result<()> {
            ensure_files(&self.0, &set(names), now).map(drop)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(ToString::to_string).collect()
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    const TODAY: u64 = 1_795_000_000;
    const YEAR: u64 = 365 * 86_400;
    const HOST: [&str; 3] = ["10.0.0.1", "fd00::1", "h1"];

    #[test]
    fn first_start_makes_all_files_and_keys_are_private() {
        use std::os::unix::fs::PermissionsExt;
        let folder = Folder::new("first");
        folder.ensure(&HOST, at(TODAY)).unwrap();
        let mut files: Vec<(String, u32)> = std::fs::read_dir(&folder.0)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.metadata().unwrap().permissions().mode() & 0o777))
            .collect();
        files.sort();
        let want = [
            ("ca-key.pem", 0o600),
            ("ca.pem", 0o644),
            ("client-key.pem", 0o600),
            ("client.pem", 0o644),
            ("server-key.pem", 0o600),
            ("server.pem", 0o644),
        ];
        assert_eq!(files, want.map(|(name, mode)| (name.to_owned(), mode)));
    }

    #[test]
    fn later_start_changes_only_what_does_not_fit() {
        let folder = Folder::new("later");
        folder.ensure(&HOST, at(TODAY)).unwrap();
        let all = ["ca.pem", "client.pem", "client-key.pem", "server.pem"];
        let first = all.map(|name| folder.read(name));
        folder.ensure(&HOST, at(TODAY + 6 * YEAR)).unwrap();
        folder.ensure(&HOST[..2], at(TODAY)).unwrap();
        assert_eq!(all.map(|name| folder.read(name)), first, "all fits");
        folder.ensure(&["10.0.0.1", "10.0.0.9"], at(TODAY)).unwrap();
        assert_eq!(all[..3].iter().map(|name| folder.read(name)).collect::<Vec<_>>(), first[..3], "only the server has another address");
        let second = folder.read("server.pem");
        assert_ne!(second, first[3]);
        folder.ensure(&["10.0.0.9"], at(TODAY + 7 * YEAR)).unwrap();
        let third = folder.read("server.pem");
        assert_ne!(third, second, "less than a third of its life was left");
        folder.ensure(&["10.0.0.9"], at(TODAY + 30 * YEAR)).unwrap();
        assert_ne!(folder.read("server.pem"), third, "it had expired");
        assert_eq!(all[..3].iter().map(|name| folder.read(name)).collect::<Vec<_>>(), first[..3], "these do not expire");
    }

    #[test]
    fn interrupted_writes_are_completed() {
        let folder = Folder::new("interrupted");
        folder.ensure(&HOST, at(TODAY)).unwrap();
        let ca = folder.read("ca.pem");
        for missing in ["ca.pem", "client.pem", "client-key.pem", "server.pem", "server-key.pem"] {
            std::fs::remove_file(folder.0.join(missing)).unwrap();
            folder.ensure(&HOST, at(TODAY)).unwrap();
        }
        // A key that was written, and its certificate not.
        std::fs::write(folder.0.join("server-key.pem"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        folder.ensure(&HOST, at(TODAY)).unwrap();
        check_server(&folder.0, &read_certificate(&folder.0.join("ca.pem")).unwrap(), &set(&HOST), at(TODAY)).unwrap();
        let key = |pem: &str| ParsedKey::of(pem);
        assert_eq!(key(&ca), key(&folder.read("ca.pem")), "the authority is the same");
    }

    /// What certificates are checked against: the authority's key.
    #[derive(Debug, PartialEq)]
    struct ParsedKey(Vec<u8>);

    impl ParsedKey {
        fn of(pem: &str) -> ParsedKey {
            let cert = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
            ParsedKey(ParsedCertificate::try_from(&cert).unwrap().subject_public_key_info().to_vec())
        }
    }

    #[test]
    fn authority_key_may_be_kept_elsewhere_until_it_is_needed() {
        let folder = Folder::new("elsewhere");
        folder.ensure(&HOST, at(TODAY)).unwrap();
        std::fs::remove_file(folder.0.join("ca-key.pem")).unwrap();
        folder.ensure(&HOST, at(TODAY)).unwrap();
        let error = format!("{:#}", folder.ensure(&["10.0.0.9"], at(TODAY)).unwrap_err());
        assert!(error.contains("a certificate must be issued, which needs") && error.contains("ca-key.pem"), "{error}");
    }

    #[test]
    fn wrong_clock_makes_no_certificate_that_has_expired() {
        let folder = Folder::new("clock");
        folder.ensure(&HOST, at(1000)).unwrap();
        let first = folder.read("server.pem");
        folder.ensure(&HOST, at(TODAY)).unwrap();
        assert_eq!(folder.read("server.pem"), first);
    }

    #[test]
    fn names_are_the_address_of_the_listener_and_what_is_added() {
        let found = names("192.0.2.7:2379".parse().unwrap(), &["store.example".to_owned()]).unwrap();
        for name in ["192.0.2.7", "127.0.0.1", "::1", "localhost", "store.example"] {
            assert!(found.contains(name), "{found:?}");
        }
        assert!(names("192.0.2.7:2379".parse().unwrap(), &["a b".to_owned()]).is_err());
        assert!(names("0.0.0.0:2379".parse().unwrap(), &[]).unwrap().len() <= NAMES);
    }
}
