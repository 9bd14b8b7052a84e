//! Keys of WireGuard and their text: base64 of 32 bytes, as `wg genkey` prints it. Secrets have no text: their `Debug` shows
//! nothing of them, they have no `Display`, and their bytes are cleared when they are dropped.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use thiserror::Error;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// The length of every key in bytes (`WG_KEY_LEN` of `linux/wireguard.h`).
pub const KEY_LEN: usize = 32;

/// A text that is not a key. It does not repeat the text, which may be a secret.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyError {
    /// It is not base64.
    #[error("it is not base64 (the standard alphabet, with padding)")]
    NotBase64,
    /// It decodes to another number of bytes.
    #[error("it is base64 of {0} bytes, not of {KEY_LEN}")]
    Length(usize),
    /// It is the key of zeros, by which WireGuard means that there is none.
    #[error("it is the key of zeros, which stands for none")]
    Zero,
}

/// A peer's public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; KEY_LEN]);

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<PublicKey, KeyError> {
        decode(text).map(|bytes| PublicKey(*bytes))
    }
}

/// 32 secret bytes: a preshared key.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Secret([u8; KEY_LEN]);

impl Secret {
    /// Makes a secret of its bytes.
    pub fn new(bytes: [u8; KEY_LEN]) -> Secret {
        Secret(bytes)
    }

    /// Reads base64.
    ///
    /// # Errors
    /// [`KeyError`], which repeats nothing of the text.
    pub fn parse(text: &str) -> Result<Secret, KeyError> {
        decode(text).map(|bytes| Secret(*bytes))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(redacted)")
    }
}

/// A host's private key.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey(Secret);

impl PrivateKey {
    /// Makes a private key of random bytes, with the bits set that Curve25519 asks for (RFC 7748, section 5).
    pub fn from_random(mut bytes: [u8; KEY_LEN]) -> PrivateKey {
        bytes[0] &= 248;
        bytes[31] = bytes[31] & 127 | 64;
        PrivateKey(Secret(bytes))
    }

    /// Reads the content of a key file: base64, also with a line break at its end.
    ///
    /// # Errors
    /// [`KeyError`], which repeats nothing of the text.
    pub fn parse(text: &str) -> Result<PrivateKey, KeyError> {
        Secret::parse(text).map(PrivateKey)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; KEY_LEN] {
        self.0.bytes()
    }

    /// The content of a key file: base64 without a line break.
    pub fn text(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(self.bytes()))
    }

    /// The public key that belongs to it.
    pub fn public(&self) -> PublicKey {
        let secret = x25519_dalek::StaticSecret::from(*self.bytes());
        PublicKey(x25519_dalek::PublicKey::from(&secret).to_bytes())
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}

/// Decodes base64 of 32 bytes. Line breaks are ignored, as Go's decoder does.
fn decode(text: &str) -> Result<Zeroizing<[u8; KEY_LEN]>, KeyError> {
    let text: Zeroizing<Vec<u8>> = Zeroizing::new(text.bytes().filter(|byte| !matches!(byte, b'\r' | b'\n')).collect());
    let bytes = Zeroizing::new(STANDARD.decode(&*text).map_err(|_| KeyError::NotBase64)?);
    let key: [u8; KEY_LEN] = bytes.as_slice().try_into().map_err(|_| KeyError::Length(bytes.len()))?;
    if key == [0; KEY_LEN] { Err(KeyError::Zero) } else { Ok(Zeroizing::new(key)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 7748, section 6.1: the keys of Alice.
    const PRIVATE: &str = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
    const PUBLIC: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";

    #[test]
    fn public_key_follows_from_private_key() {
        let key = PrivateKey::parse(&format!("{PRIVATE}\n")).unwrap();
        assert_eq!(key.public().to_string(), PUBLIC);
        assert_eq!(*key.text(), PRIVATE);
        assert_eq!(PUBLIC.parse(), Ok(key.public()));
    }

    #[test]
    fn random_private_key_is_clamped() {
        let key = PrivateKey::from_random([0xff; KEY_LEN]);
        assert_eq!((key.bytes()[0], key.bytes()[31]), (0xf8, 0x7f));
        let zero = PrivateKey::from_random([0; KEY_LEN]);
        assert_eq!((zero.bytes()[0], zero.bytes()[31]), (0, 0x40));
    }

    #[test]
    fn bad_text_is_refused_without_repeating_it() {
        let error = |text: &str| Secret::parse(text).unwrap_err().to_string();
        assert_eq!(error("hunter2!"), "it is not base64 (the standard alphabet, with padding)");
        assert_eq!(error(PRIVATE.trim_end_matches('=')), "it is not base64 (the standard alphabet, with padding)");
        assert_eq!(error("AAAA"), "it is base64 of 3 bytes, not of 32");
        assert_eq!(error(""), "it is base64 of 0 bytes, not of 32");
        assert_eq!(error("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="), "it is the key of zeros, which stands for none");
    }

    #[test]
    fn secrets_show_nothing_in_debug_text() {
        let key = PrivateKey::parse(PRIVATE).unwrap();
        assert_eq!(format!("{key:?} {:?}", Secret::parse(PRIVATE).unwrap()), "PrivateKey(redacted) Secret(redacted)");
    }
}
