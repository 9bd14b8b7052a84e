//! The etcd form of a lease: key text and JSON value (specification, section 3.1). They are read leniently and written byte for byte
//! as upstream does, because other implementations compare and split these texts.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::value::RawValue;
use thiserror::Error;

use crate::json::{Fields, compact};
use crate::lease::{LeaseKey, Peer};
use crate::net::{Family, PerFamily, Subnet};

/// The reason why a store entry is not a lease. Such an entry is reported and skipped; the others are not affected.
#[derive(Debug, Error)]
pub enum WireError {
    /// The key does not name a subnet.
    #[error("key {0:?} does not end in a subnet such as 10.244.1.0-24")]
    Key(String),
    /// The value is not a JSON object.
    #[error("value is not a JSON object: {0}")]
    Json(serde_json::Error),
    /// A field of the value cannot be used.
    #[error("field {field}: {problem}")]
    Field {
        /// The field, in upstream's spelling.
        field: &'static str,
        /// The problem with it.
        problem: String,
    },
}

/// Renders the last part of a lease's key: `10.244.1.0-24`, dual `10.244.1.0-24&fd00:12:13::-56`, IPv6 alone
/// `0.0.0.0-0&fd00:12:13::-56`.
pub fn key(key: &LeaseKey) -> String {
    let subnets = key.subnets();
    let mut text = match subnets.v4 {
        Some(subnet) => format!("{}-{}", subnet.network(), subnet.prefix_len()),
        None => "0.0.0.0-0".to_owned(),
    };
    if let Some(subnet) = subnets.v6 {
        text.push_str(&format!("&{}-{}", subnet.network(), subnet.prefix_len()));
    }
    text
}

/// Parses a lease's key. Only its end counts, as in upstream's unanchored expression; an IPv4 prefix length of 32 or an IPv6 prefix
/// length of 128 is not a subnet.
///
/// # Errors
/// [`WireError::Key`].
pub fn parse_key(text: &str) -> Result<LeaseKey, WireError> {
    let parse = || {
        let (v4, v6) = match text.rsplit_once('&') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (text, None),
        };
        // Text before the dotted address is ignored: take the digits and dots before the last dash.
        let (address, len) = v4.rsplit_once('-')?;
        let start = address.rfind(|c: char| !c.is_ascii_digit() && c != '.').map_or(0, |at| at + 1);
        let v4: Ipv4Addr = address.get(start..)?.parse().ok()?;
        let v4 = Subnet::new(IpAddr::V4(v4), prefix_len(len, 31)?).ok()?;
        let v6 = match v6 {
            None => None,
            Some(v6) => {
                let (address, len) = v6.rsplit_once('-')?;
                let plain = address.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f' | b':'));
                let v6: Ipv6Addr = address.parse().ok().filter(|_| plain)?;
                Some(Subnet::new(IpAddr::V6(v6), prefix_len(len, 127)?).ok()?)
            }
        };
        let absent = v4.network() == Family::V4.unspecified() && v4.prefix_len() == 0;
        LeaseKey::new(PerFamily { v4: (!absent).then_some(v4), v6 })
    };
    parse().ok_or_else(|| WireError::Key(text.chars().take(128).collect()))
}

fn prefix_len(digits: &str, max: u8) -> Option<u8> {
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|len| plain && *len <= max)
}

/// Renders a lease's value: compact JSON with a fixed key order.
pub fn value(peer: &Peer) -> String {
    let v4 = peer.public.v4.unwrap_or(Family::V4.unspecified());
    let v6 = peer.public.v6.map_or("null".to_owned(), |ip| format!("\"{ip}\""));
    let mut text = format!("{{\"PublicIP\":\"{v4}\",\"PublicIPv6\":{v6}");
    if !peer.backend_type.is_empty() {
        text.push_str(",\"BackendType\":");
        text.push_str(&serde_json::Value::from(&*peer.backend_type).to_string());
    }
    for (name, family) in [("BackendData", Family::V4), ("BackendV6Data", Family::V6)] {
        if let Some(data) = peer.backend_data.get(family) {
            text.push_str(&format!(",\"{name}\":{data}"));
        }
    }
    text.push('}');
    text
}

/// Parses a lease's value.
///
/// # Errors
/// [`WireError::Json`] and [`WireError::Field`].
pub fn parse_value(text: &[u8]) -> Result<Peer, WireError> {
    // One check for valid UTF-8 is faster than one for each string.
    let fields = match std::str::from_utf8(text) {
        Ok(text) => Fields::parse(text),
        Err(_) => serde_json::from_slice(text),
    };
    let fields = fields.map_err(WireError::Json)?;
    let string =
        |field: &'static str, name: &str| fields.text(name).map_err(|error| WireError::Field { field, problem: error.to_string() });
    let mut public = PerFamily::default();
    let is_null = |raw: &RawValue| raw.get().trim() == "null";
    if fields.raw("publicip").is_some_and(is_null) {
        return Err(WireError::Field { field: "PublicIP", problem: "null is not an IPv4 address".to_owned() });
    }
    for (field, name, family) in [("PublicIP", "publicip", Family::V4), ("PublicIPv6", "publicipv6", Family::V6)] {
        let Some(text) = string(field, name)? else { continue };
        let ip: Option<IpAddr> = text.parse().ok().filter(|ip| Family::of(*ip) == family);
        let ip = ip.ok_or_else(|| WireError::Field { field, problem: format!("{text:?} is not an {family} address") })?;
        public.set(family, (ip != family.unspecified()).then_some(ip));
    }
    let mut backend_data = PerFamily::default();
    for (name, family) in [("backenddata", Family::V4), ("backendv6data", Family::V6)] {
        let data = fields.raw(name).filter(|raw| !is_null(raw)).and_then(compact);
        backend_data.set(family, data);
    }
    let backend_type = string("BackendType", "backendtype")?.unwrap_or_default().into();
    Ok(Peer { public, backend_type, backend_data })
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    #[test]
    fn keys_round_trip() {
        for text in ["10.5.52.0-24", "10.12.13.0-24&fd00:12:13::-56", "0.0.0.0-0&fd00:12:13::-56"] {
            assert_eq!(key(&parse_key(text).unwrap()), text);
        }
        assert_eq!(key(&parse_key("/coreos.com/network/subnets/10.5.52.0-24").unwrap()), "10.5.52.0-24");
    }

    #[test]
    fn malformed_keys_are_refused() {
        for text in [
            "10",
            "10.12.13.0",
            "10.12.13-24",
            "10.12.13.300-24",
            "10.12.13.0-24hi",
            "10.12.13.0-24&2001::-56hi",
            "10.12.13.0-24&:12:13:-56",
            "10.12.13.0-24&20011::-56",
            "10.12.13.0-24&2001-56",
            "10.12.13.0-24&2001::",
            "10.12.13.0-32",
            "10.12.13.0-24&FD00::-56",
            "0.0.0.0-0",
            "",
            "-",
            "&",
        ] {
            assert!(parse_key(text).is_err(), "{text}");
        }
    }

    #[track_caller]
    fn check(text: &str, want: Expect) {
        match parse_value(text.as_bytes()) {
            Ok(peer) => want.assert_eq(&value(&peer)),
            Err(error) => want.assert_eq(&format!("error: {error}")),
        }
    }

    #[test]
    fn values_match_upstream_byte_for_byte() {
        let vxlan =
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;
        assert_eq!(value(&parse_value(vxlan.as_bytes()).unwrap()), vxlan);
        check(r#"{"PublicIP":"1.2.3.4"}"#, expect![[r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#]]);
        check(
            r#" { "publicip" : "1.2.3.4", "PUBLICIPV6": "fd00::1", "extra": {}, "backendType":"host-gw", "BackendV6Data": { "VNI": 1 } } "#,
            expect![[r#"{"PublicIP":"1.2.3.4","PublicIPv6":"fd00::1","BackendType":"host-gw","BackendV6Data":{"VNI":1}}"#]],
        );
        check("{}", expect![[r#"{"PublicIP":"0.0.0.0","PublicIPv6":null}"#]]);
    }

    #[test]
    fn value_errors_name_the_field() {
        check("", expect!["error: value is not a JSON object: EOF while parsing a value at line 1 column 0"]);
        check(r#"{"PublicIP":null}"#, expect!["error: field PublicIP: null is not an IPv4 address"]);
        check(r#"{"PublicIP":"fd00::1"}"#, expect![[r#"error: field PublicIP: "fd00::1" is not an IPv4 address"#]]);
        check(r#"{"PublicIP":"1.2.3.4","PublicIPv6":"x"}"#, expect![[r#"error: field PublicIPv6: "x" is not an IPv6 address"#]]);
        check(
            r#"{"PublicIP":"1.2.3.4","BackendType":7}"#,
            expect!["error: field BackendType: invalid type: integer `7`, expected a string at line 1 column 1"],
        );
    }
}
