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

/// What to say of an endpoint that speaks TLS where `http://` was given, or the reverse. It is asked in plain HTTP/1.1, to which a
/// plain etcd answers, and a TLS server says that it is one.
pub(super) async fn scheme_mismatch(endpoint: &EndpointUrl) -> Option<String> {
    let ask = async {
        let mut stream = TcpStream::connect(&*endpoint.authority).await.ok()?;
        stream.write_all(b"GET /version HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\n\r\n").await.ok()?;
        let mut answer = vec![0; 512];
        let mut len = 0;
        while len < answer.len() {
            match stream.read(&mut answer[len..]).await {
                Ok(0) | Err(_) => break,
                Ok(more) => len += more,
            }
            if len > 0 && answer[0] == TLS_ALERT {
                break;
            }
        }
        answer.truncate(len);
        Some(answer)
    };
    let answer = tokio::time::timeout(PROBE, ask).await.ok().flatten()?;
    match (speaks_tls(&answer)?, endpoint.is_tls) {
        (true, false) => Some("the endpoint speaks TLS: write https:// in --etcd-endpoints".to_owned()),
        (false, true) => Some("the endpoint is a plain etcd, without TLS: write http:// in --etcd-endpoints".to_owned()),
        _ => None,
    }
}

/// The first byte of a TLS record that is an alert.
const TLS_ALERT: u8 = 0x15;

/// Does a server speak TLS that answers plain HTTP so? `None` if the answer does not tell.
fn speaks_tls(answer: &[u8]) -> Option<bool> {
    let text = String::from_utf8_lossy(answer);
    match answer {
        [TLS_ALERT, 3, ..] => Some(true),
        _ if text.starts_with("HTTP/1") && text.contains("HTTPS server") => Some(true),
        _ if text.starts_with("HTTP/1") => Some(false),
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
    fn protocol_of_a_server_is_known_by_its_answer_to_plain_http() {
        assert_eq!(speaks_tls(b"HTTP/1.1 200 OK\r\n\r\n{}"), Some(false));
        assert_eq!(speaks_tls(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"), Some(true));
        assert_eq!(speaks_tls(&[0x15, 3, 1, 0, 2, 2, 70]), Some(true));
        assert_eq!(speaks_tls(b""), None);
        assert_eq!(speaks_tls(b"SSH-2.0"), None);
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
