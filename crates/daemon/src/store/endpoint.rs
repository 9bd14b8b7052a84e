//! The text of `--etcd-endpoints`: a comma-separated list, read as operators write it, and shown without credentials.

use super::{EtcdError, foreign_text};

/// One endpoint, as far as its text says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EndpointUrl {
    /// Scheme, host and port. This is what logs show: it never has a user or password.
    pub(super) url: String,
    /// Host and port, as a resolver takes them.
    pub(super) authority: String,
    /// Is it reached by TLS?
    pub(super) is_tls: bool,
}

/// A list of endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EndpointList {
    pub(super) endpoints: Vec<EndpointUrl>,
    /// Did an endpoint have a user or password in it? They are not used, as upstream does not use them.
    pub(super) had_credentials: bool,
}

/// Reads a comma-separated list. Spaces and quotes around an endpoint and empty places in the list are ignored, because
/// environment files and shells leave them. Without a scheme, `has_certificates` decides whether it is TLS.
pub(super) fn parse_list(text: &str, has_certificates: bool) -> Result<EndpointList, EtcdError> {
    let mut list = EndpointList { endpoints: Vec::new(), had_credentials: false };
    let is_padding = |c: char| c.is_whitespace() || matches!(c, '"' | '\'');
    for text in text.split(',').map(|text| text.trim_matches(is_padding)).filter(|text| !text.is_empty()) {
        let (text, had_credentials) = without_credentials(text);
        list.had_credentials |= had_credentials;
        let endpoint = parse(&text, has_certificates).map_err(|problem| EtcdError::Endpoint(foreign_text(&text), problem.to_owned()))?;
        if !list.endpoints.contains(&endpoint) {
            list.endpoints.push(endpoint);
        }
    }
    if list.endpoints.is_empty() {
        return Err(EtcdError::Endpoint(String::new(), "it names no endpoint".to_owned()));
    }
    Ok(list)
}

fn parse(text: &str, has_certificates: bool) -> Result<EndpointUrl, &'static str> {
    const EXPECTED: &str = "an endpoint looks like http://127.0.0.1:2379 or https://etcd.example:2379";
    let (scheme, rest) = text.split_once("://").unwrap_or((if has_certificates { "https" } else { "http" }, text));
    let is_tls = match scheme.to_ascii_lowercase().as_str() {
        "http" => false,
        "https" => true,
        _ => return Err(EXPECTED),
    };
    let authority = rest.split('/').next().unwrap_or_default();
    let parsed: http::uri::Authority = authority.parse().map_err(|_| EXPECTED)?;
    if parsed.host().is_empty() {
        return Err(EXPECTED);
    }
    if parsed.port_u16().is_none() {
        return Err("the port is missing; etcd's is 2379");
    }
    let scheme = if is_tls { "https" } else { "http" };
    Ok(EndpointUrl { url: format!("{scheme}://{authority}"), authority: authority.to_owned(), is_tls })
}

/// A URL without its user and password, and whether it had any. What is no URL loses everything before its last `@` too: a
/// mistyped one may still hold a password.
pub(super) fn without_credentials(url: &str) -> (String, bool) {
    let start = url.find("://").map_or(0, |at| at + 3);
    // A password may have a slash in it that was not escaped.
    match url[start..].rfind('@') {
        Some(at) => (format!("{}{}", &url[..start], &url[start + at + 1..]), true),
        None => (url.to_owned(), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: &str) {
        let got = match parse_list(text, false) {
            Ok(list) => {
                let urls: Vec<String> = list.endpoints.into_iter().map(|endpoint| endpoint.url).collect();
                format!("{}{}", urls.join(" "), if list.had_credentials { " (credentials)" } else { "" })
            }
            Err(error) => error.to_string(),
        };
        assert_eq!(got, want, "{text}");
    }

    #[test]
    fn spaces_quotes_and_empty_places_are_ignored() {
        check("http://a:1, https://b:2 ,", "http://a:1 https://b:2");
        check("\"http://a:1,http://b:2\"", "http://a:1 http://b:2");
        check("'http://a:1', 'http://b:2'\n", "http://a:1 http://b:2");
        check("a:1,HTTP://[fd00::1]:2379/,http://a:1", "http://a:1 http://[fd00::1]:2379");
        assert!(parse_list("a:1", true).unwrap().endpoints[0].is_tls, "with certificate files an endpoint without a scheme is TLS");
    }

    #[test]
    fn unusable_endpoints_are_named() {
        const LOOKS: &str = "an endpoint looks like http://127.0.0.1:2379 or https://etcd.example:2379";
        check("", "--etcd-endpoints \"\": it names no endpoint");
        check(" , \"\"", "--etcd-endpoints \"\": it names no endpoint");
        check("http://a", "--etcd-endpoints \"http://a\": the port is missing; etcd's is 2379");
        check("ftp://a:1", &format!("--etcd-endpoints \"ftp://a:1\": {LOOKS}"));
        check("http://a b:1", &format!("--etcd-endpoints \"http://a b:1\": {LOOKS}"));
        check("http://:1", &format!("--etcd-endpoints \"http://:1\": {LOOKS}"));
    }

    #[test]
    fn credentials_are_never_shown() {
        check("http://user:hush@a:1,http://b:2", "http://a:1 http://b:2 (credentials)");
        for text in ["http://user:hush@a", "user:hush@a", "http://u:hu/hush@a b:1", "ftp://user:hush@a:1"] {
            let error = parse_list(text, false).unwrap_err();
            assert!(!error.to_string().contains("hush") && !format!("{error:?}").contains("hush"), "{error}");
        }
    }
}
