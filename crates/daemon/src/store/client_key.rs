//! Private keys of client certificates. rustls compares a key with its certificate by parsing that, and its parser refuses X.509
//! version 1: what `openssl x509 -req` makes without extensions, and what etcd, the API server and Go clients accept. So keys are
//! loaded without that comparison, and [`check_pair`] makes it on the bytes.

use std::sync::Arc;

use tokio_rustls::rustls::crypto::{CryptoProvider, KeyProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::sign::{Signer, SigningKey};
use tokio_rustls::rustls::{Error, SignatureAlgorithm, SignatureScheme};

/// A key that does not reveal its public half, with which rustls would begin the comparison.
#[derive(Debug)]
struct Uncompared(Arc<dyn SigningKey>);

impl SigningKey for Uncompared {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        self.0.choose_scheme(offered)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.0.algorithm()
    }
}

#[derive(Debug)]
struct Keys;

impl KeyProvider for Keys {
    fn load_private_key(&self, key: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, Error> {
        Ok(Arc::new(Uncompared(ring::sign::any_supported_type(&key)?)))
    }
}

/// Makes the clients of etcd and of the API server, which use this process's provider, accept version 1.
pub(super) fn accept_version_1() {
    // It fails if it was done before.
    let _ = CryptoProvider { key_provider: &Keys, ..ring::default_provider() }.install_default();
}

/// Checks that a certificate, the first of a PEM file, is that of the private key of another.
///
/// # Errors
/// What is wrong with the key.
pub(super) fn check_pair(cert: &[u8], key: &[u8]) -> Result<(), String> {
    let cert = CertificateDer::from_pem_slice(cert).map_err(|error| format!("the certificate cannot be read: {error}"))?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| format!("the key cannot be read: {error}"))?;
    let key = ring::sign::any_supported_type(&key).map_err(|error| format!("the key cannot be used: {error}"))?;
    // A certificate contains its SubjectPublicKeyInfo as it is (RFC 5280, section 4.1).
    let is_in = |public: &[u8]| cert.windows(public.len()).any(|part| part == public);
    match key.public_key() {
        Some(public) if !is_in(&public) => Err("the key is not that of the certificate".to_owned()),
        _ => Ok(()),
    }
}
