//! Removes secrets from a text: those that are known by their value, and whatever looks like one. What is removed by mistake is no harm.

use regex_lite::{Captures, Regex};

/// What stands for a secret.
const REMOVED: &str = "(removed)";
/// Shorter values are words that occur anywhere.
const SHORTEST: usize = 4;

/// What is put in the place of a match.
type Replace = fn(&Captures<'_>) -> String;

/// Removes secrets.
#[derive(Debug)]
pub(super) struct Redactor {
    known: Vec<String>,
    rules: Vec<(Regex, Replace)>,
}

impl Redactor {
    /// Removes these values, and what looks like a secret.
    pub(super) fn new(known: impl IntoIterator<Item = String>) -> Redactor {
        let mut known: Vec<String> = known.into_iter().filter(|value| value.len() >= SHORTEST).collect();
        // One may be a part of another.
        known.sort_by_key(|value| std::cmp::Reverse(value.len()));
        let whole: Replace = |_| REMOVED.to_owned();
        let rest: Replace = |found| format!("{}{REMOVED}", &found[1]);
        let in_quotes: Replace = |found| {
            let quote = found.get(2).map_or("", |quote| quote.as_str());
            format!("{}{quote}{REMOVED}{quote}", &found[1])
        };
        let rules = [
            // Private keys in PEM form, also when their end is cut off, and in one line of JSON.
            (r"(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|$)", whole),
            // User and password in a URL. A password may have a slash or an at sign in it.
            (r#"([A-Za-z][A-Za-z0-9+.-]*://)[^\s"'<>,]*@"#, |found: &Captures<'_>| format!("{}{REMOVED}@", &found[1])),
            (r"(?i)\b((?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{6,}", rest),
            // JSON web tokens.
            (r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*\.?[A-Za-z0-9_-]*", whole),
            // A key of 32 bytes in base64, as WireGuard has them.
            (r"\b[A-Za-z0-9+/]{43}=", whole),
            // `password = x`, `"token": "x"`, `\"psk\":\"x\"`, `--etcd-password x`.
            (
                r#"(?i)([\w.-]*(?:password|passwd|passphrase|secret|token|psk|private[_-]?key|privkey|key[_-]data|api[_-]?key|credentials?|authorization)[\w-]*\\*["']?\s*[:=]\s*)(\\*["'])(?:[^"'\\]|\\[^"'])*\\*["']?"#,
                in_quotes,
            ),
            (
                r#"(?i)([\w.-]*(?:password|passwd|passphrase|secret|token|psk|private[_-]?key|privkey|key[_-]data|api[_-]?key|credentials?|authorization)[\w-]*\s*[:=]\s*)[^\s"',;{}\[\]\\][^\s,;}\]]*"#,
                rest,
            ),
            (r"(?i)(--?[\w-]*(?:password|passwd|passphrase|secret|token|psk)\s+)\S+", rest),
        ];
        let rules = rules.into_iter().filter_map(|(pattern, replace)| Some((Regex::new(pattern).ok()?, replace)));
        Redactor { known, rules: rules.collect() }
    }

    /// The text without secrets.
    pub(super) fn clean(&self, text: &str) -> String {
        let known = self.known.iter().fold(text.to_owned(), |text, secret| text.replace(secret.as_str(), REMOVED));
        self.rules.iter().fold(known, |text, (pattern, replace)| pattern.replace_all(&text, *replace).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_compiles() {
        assert_eq!(Redactor::new([]).rules.len(), 8);
    }

    #[test]
    fn planted_secrets_are_removed() {
        let redactor = Redactor::new(["known-secret/value".to_owned(), "abc".to_owned()]);
        for text in [
            "FLANNELD_ETCD_PASSWORD=PLANTED",
            "--etcd-password PLANTED --ip-masq",
            "--etcd-password=PLANTED --ip-masq",
            r#"{"PSK": "PLANTED", "Type": "ipsec"}"#,
            r#"{"password":"PLANTED with \" quotes"}"#,
            r#"{"config": "{\"token\":\"PLANTED\",\"a\":1}"}"#,
            "client-key-data: PLANTED==",
            "token: 'PLANTED'",
            "etcd_password = PLANTED",
            "https://user:PLANTED@10.0.0.1:2379/path",
            "https://user:pass/with@PLANTED@10.0.0.1:2379",
            "Authorization: Bearer PLANTED.x-y_z",
            "authorization: Basic UExBTlRFRA==PLANTED",
            "-----BEGIN EC PRIVATE KEY-----\nPLANTED\nlines\n-----END EC PRIVATE KEY-----\nafter",
            "-----BEGIN PRIVATE KEY-----\nPLANTED and cut off",
            r#"{"key": "-----BEGIN RSA PRIVATE KEY-----\nPLANTED\n-----END RSA PRIVATE KEY-----\n"}"#,
            "x known-secret/value y PLANTED".trim_end_matches(" PLANTED"),
            "jwt eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJQTEFOVEVEIn0.PLANTED_signature",
            "private key yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk= PrivateKey = PLANTED",
        ] {
            let clean = redactor.clean(text);
            assert!(!clean.contains("PLANTED") && !clean.contains("known-secret") && clean.contains(REMOVED), "{text}\n{clean}");
            assert!(!clean.contains("yAnz5TF"), "{clean}");
        }
        assert_eq!(redactor.clean("https://a:b@h:1 https://c:2"), "https://(removed)@h:1 https://c:2");
        assert_eq!(redactor.clean(r#"{"psk": "x", "Type": "ipsec"}"#), r#"{"psk": "(removed)", "Type": "ipsec"}"#);
    }

    #[test]
    fn what_is_no_secret_stays() {
        let redactor = Redactor::new(["abc".to_owned()]);
        for text in [
            "abc of a route 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink",
            "--etcd-keyfile=/etc/flannel/client-key.pem --etcd-endpoints=https://10.0.0.1:2379",
            "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
            r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "VNI": 1}}"#,
            "link/ether 02:00:00:00:00:01 brd ff:ff:ff:ff:ff:ff",
        ] {
            assert_eq!(redactor.clean(text), text);
        }
    }
}
