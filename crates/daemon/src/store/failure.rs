//! What a failed request means to an operator: one short text that stays the same while the problem does, with the fix.

use std::error::Error;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Status;

use super::endpoint::EndpointUrl;
use super::foreign_text;

/// How long an endpoint is asked which protocol it speaks.
const PROBE: Duration = Duration::from_secs(1);

/// Why a request did not get through: the innermost cause, which says most, in the words of this project.
pub(super) fn reason(status: &Status) -> String {
    let Some(outermost) = status.source() else { return foreign_text(status.message()) };
    let mut cause: &dyn Error = outermost;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let text = cause.to_string();
    // A certificate's text has the time in it; one problem is one text.
    let text = text.split(": verification time").next().unwrap_or(&text);
    let text = text.split(" (os error").next().unwrap_or(text);
    let mut text = foreign_text(text);
    if text.starts_with("Connection") || text.starts_with("No route") || text.starts_with("Network") {
        text[..1].make_ascii_lowercase();
    }
    match tls_advice(&text) {
        Some(advice) => format!("{text}; {advice}"),
        None => text,
    }
}

/// What to do about a certificate that one of the two sides refuses.
fn tls_advice(text: &str) -> Option<&'static str> {
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    match text {
        _ if says(&["CertificateRequired", "BadCertificate", "UnknownCA", "CertificateUnknown", "AccessDenied"]) && says(&["alert"]) => {
            Some(
                "etcd refuses this host's certificate: --etcd-certfile and --etcd-keyfile must be a client certificate of the authority that etcd trusts (its --trusted-ca-file)",
            )
        }
        _ if says(&["CertificateExpired", "CertificateRevoked"]) && says(&["alert"]) => {
            Some("etcd refuses this host's certificate: renew the file of --etcd-certfile")
        }
        _ if says(&["UnknownIssuer", "BadSignature", "CaUsedAsEndEntity"]) => {
            Some("etcd's certificate is not signed by an authority that --etcd-cafile names")
        }
        _ if says(&["NotValidForName", "not valid for name"]) => Some("etcd's certificate does not name the host of --etcd-endpoints"),
        _ if says(&["Expired", "expired", "NotValidYet", "not valid yet"]) => {
            Some("compare this host's clock with the dates of etcd's certificate")
        }
        _ => None,
    }
}

/// Was a connection made and then broken? Then the endpoint may speak another protocol.
pub(super) fn is_protocol_failure(status: &Status) -> bool {
    let text = reason(status);
    let is_network = ["refused", "timed out", "no route", "unreachable", "lookup", "in time", "certificate", "alert"];
    status.source().is_some() && !is_network.iter().any(|word| text.to_lowercase().contains(word))
}

/// What to say of an endpoint that speaks TLS where `http://` was given, or the reverse. It is asked in the other protocol.
pub(super) async fn scheme_mismatch(endpoint: &EndpointUrl) -> Option<&'static str> {
    let question: &[u8] = if endpoint.is_tls { HTTP_REQUEST } else { CLIENT_HELLO };
    let ask = async {
        let mut stream = TcpStream::connect(&*endpoint.authority).await.ok()?;
        stream.write_all(question).await.ok()?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer[..5]).await.ok()?;
        Some(answer)
    };
    let answer = tokio::time::timeout(PROBE, ask).await.ok().flatten()?;
    match (protocol(&answer)?, endpoint.is_tls) {
        (Protocol::Tls, false) => Some("the endpoint speaks TLS: write https:// in --etcd-endpoints"),
        (Protocol::Http, true) => Some("the endpoint is a plain etcd, without TLS: write http:// in --etcd-endpoints"),
        _ => None,
    }
}

const HTTP_REQUEST: &[u8] = b"GET /version HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\n\r\n";

/// The shortest ClientHello of TLS 1.2 (RFC 5246, section 7.4.1.2): two cipher suites, no extension. Whether a server accepts it
/// or not, its answer is a TLS record.
const CLIENT_HELLO: &[u8] = &{
    let mut hello = [0; 52];
    // The record: a handshake of 47 bytes.
    (hello[0], hello[1], hello[2], hello[4]) = (0x16, 3, 1, 47);
    // The message: a ClientHello of 43 bytes, version 1.2; the random bytes and the session identifier are zero and empty.
    (hello[5], hello[8], hello[9], hello[10]) = (1, 43, 3, 3);
    // Two cipher suites of two bytes, and the one compression method that there is, none.
    (hello[45], hello[46], hello[47], hello[48], hello[49], hello[50]) = (4, 0xc0, 0x2f, 0xc0, 0x2b, 1);
    hello
};

#[derive(Debug, PartialEq, Eq)]
enum Protocol {
    Tls,
    Http,
}

/// The protocol of a server that answers with these first bytes.
fn protocol(answer: &[u8]) -> Option<Protocol> {
    match answer {
        // A handshake message, or an alert.
        [0x15 | 0x16, 3, ..] => Some(Protocol::Tls),
        [b'H', b'T', b'T', b'P', ..] => Some(Protocol::Http),
        _ => None,
    }
}

/// What to do about a request that etcd refused. `withheld`: a password was given and not sent.
pub(super) fn refusal_advice(message: &str, user: Option<&str>, withheld: bool, prefix: &str) -> String {
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    match user {
        _ if withheld && says(&["user name is empty", "permission denied", "invalid auth token"]) => {
            "; the password is not sent to the default endpoints: name etcd's by --etcd-endpoints".to_owned()
        }
        None if says(&["user name is empty", "permission denied"]) => "; give --etcd-username and --etcd-password".to_owned(),
        Some(user) if says(&["permission denied"]) => {
            format!("; grant a role of user {user} (--etcd-username) the permission readwrite on the prefix {prefix}")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocol_is_known_by_the_first_bytes() {
        assert_eq!(protocol(b"HTTP/1.1"), Some(Protocol::Http));
        assert_eq!(protocol(&[0x15, 3, 1, 0, 2]), Some(Protocol::Tls));
        assert_eq!(protocol(&[0x16, 3, 3, 0, 80]), Some(Protocol::Tls));
        assert_eq!(protocol(b"SSH-2.0"), None);
    }

    #[test]
    fn refusals_name_the_flag() {
        let denied = "etcdserver: permission denied";
        assert!(refusal_advice(denied, Some("flannel"), false, "/p").contains("user flannel (--etcd-username)"));
        assert!(refusal_advice(denied, None, false, "/p").contains("--etcd-username and --etcd-password"));
        assert!(refusal_advice("etcdserver: user name is empty", Some("u"), true, "/p").contains("--etcd-endpoints"));
        assert_eq!(refusal_advice("etcdserver: too many requests", Some("u"), false, "/p"), "");
    }

    #[test]
    fn reason_is_the_innermost_cause_once_and_constant() {
        let io = std::io::Error::from_raw_os_error(111);
        assert_eq!(reason(&Status::from_error(Box::new(io))), "connection refused");
        assert_eq!(reason(&Status::unavailable("etcdserver: no leader")), "etcdserver: no leader");
        let expired = std::io::Error::other("invalid peer certificate: certificate expired: verification time 1764315431 (UNIX), but …");
        let text = reason(&Status::from_error(Box::new(expired)));
        assert!(text.contains("compare this host's clock") && !text.contains("1764"), "{text}");
    }
}
