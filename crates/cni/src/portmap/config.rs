//! The portmap plugin's configuration, read and validated.

use std::net::IpAddr;

use ::flannel::Family;
use ::flannel::pod::ports::{Mapping, Snat};
use serde_json::Value;

use crate::chains::validated_name;
use crate::protocol::{CniError, Request, array, boolean, field, number, object, string};

/// The firewall that holds the port rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backend {
    /// The reference plugin's nftables table.
    Nftables,
    /// iptables, with the reference plugin's chains.
    Iptables,
}

/// The validated configuration.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) backend: Backend,
    pub(super) snat: Snat,
    /// Packet-mark bit that requests masquerading. Only the backend iptables uses it: with nftables `markMasqBit` is ignored.
    pub(super) mark_bit: u32,
    /// Another program's iptables chain, which sets a mark of its own to request masquerading.
    pub(super) set_mark_chain: Option<String>,
    /// The conditions for IPv4 and for IPv6.
    conditions: [Vec<String>; 2],
    pub(super) mappings: Vec<Mapping>,
}

impl Config {
    pub(super) fn new(request: &Request<'_>) -> Result<Config, CniError> {
        let conf = request.conf;
        let set_mark_chain = string(conf, "externalSetMarkChain")?
            .map(|name| validated_name("externalSetMarkChain", name).map(ToOwned::to_owned))
            .transpose()?;
        let mark = number(conf, "markMasqBit")?;
        if set_mark_chain.is_some() && mark.is_some() {
            return Err(CniError::config("markMasqBit, externalSetMarkChain: set only one of them"));
        }
        if let Some(bit) = mark.filter(|bit| *bit > 31) {
            return Err(CniError::config(format!("markMasqBit: {bit} is out of range 0..=31")));
        }
        let conditions = [conditions(request, "conditionsV4")?, conditions(request, "conditionsV6")?];
        let fields_for = |backend| {
            let fields = ["conditionsV4", "conditionsV6"].into_iter().zip(&conditions);
            fields.filter(|(_, list)| backend_of(list) == Some(backend)).map(|(field, _)| field).collect::<Vec<&str>>()
        };
        let (for_iptables, for_nftables) = (fields_for(Backend::Iptables), fields_for(Backend::Nftables));
        let has_mark = mark.is_some() || set_mark_chain.is_some();
        let configured = string(conf, "backend")?;
        let backend = match configured {
            Some("iptables") => Backend::Iptables,
            Some("nftables") => Backend::Nftables,
            Some(other) => return Err(CniError::config(format!("backend: {other:?} is neither \"iptables\" nor \"nftables\""))),
            // Only iptables rules use a mark.
            None if for_nftables.is_empty() && (has_mark || !for_iptables.is_empty()) => Backend::Iptables,
            None => Backend::Nftables,
        };
        let (other, syntax, name) = match backend {
            Backend::Iptables => (&for_nftables, "nftables", "iptables"),
            Backend::Nftables => (&for_iptables, "iptables", "nftables"),
        };
        // Without a configured backend, nftables is used because of the conditions of the other family.
        let reason = match configured {
            Some(_) => format!("backend is {name:?}"),
            None => format!("{} selects {name:?}", for_nftables.join(", ")),
        };
        if !other.is_empty() {
            return Err(CniError::config(format!("{}: these are {syntax} conditions, but {reason}", other.join(", "))));
        }
        if backend == Backend::Nftables && set_mark_chain.is_some() {
            return Err(CniError::config(format!("externalSetMarkChain: needs backend \"iptables\", but {reason}")));
        }
        let snat = match (boolean(conf, "snat")?.unwrap_or(true), boolean(conf, "masqAll")?.unwrap_or(false)) {
            (false, _) => Snat::No,
            (true, false) => Snat::Local,
            (true, true) => Snat::All,
        };
        Ok(Config { backend, snat, mark_bit: mark.unwrap_or(13), set_mark_chain, conditions, mappings: mappings(request)? })
    }

    /// The conditions on packets of a family.
    pub(super) fn conditions_of(&self, family: Family) -> &[String] {
        &self.conditions[if family == Family::V4 { 0 } else { 1 }]
    }
}

/// Guesses the backend from the syntax of the conditions: those of iptables begin with an option or a negation, those of nft
/// never do.
fn backend_of(conditions: &[String]) -> Option<Backend> {
    let first = conditions.iter().find(|word| !word.is_empty())?;
    Some(if first.starts_with(['-', '!']) { Backend::Iptables } else { Backend::Nftables })
}

fn conditions(request: &Request<'_>, name: &str) -> Result<Vec<String>, CniError> {
    let list = array(request.conf, name)?.map(Vec::as_slice).unwrap_or_default();
    let word = |value: &Value| {
        // The words become part of a line that iptables-restore or nft reads.
        let word = value.as_str().filter(|word| !word.contains(['"', '\n', '\\', ';', '#']));
        word.map(ToOwned::to_owned)
            .ok_or_else(|| CniError::config(format!("{name} must be a list of words without \" \\ ; # and line ends")))
    };
    let words: Vec<String> = list.iter().map(word).collect::<Result<_, _>>()?;
    // Some generators write [""] for an empty list.
    Ok(if matches!(words.as_slice(), [word] if word.is_empty()) { Vec::new() } else { words })
}

/// An error about a field of a port mapping. `field` begins with a dot, or is empty for the mapping itself.
fn mapping_error(index: usize, field: &str, reason: impl std::fmt::Display) -> CniError {
    CniError::config(format!("runtimeConfig.portMappings[{index}]{field}: {reason}"))
}

fn mappings(request: &Request<'_>) -> Result<Vec<Mapping>, CniError> {
    let list = request.runtime_config()?.map(|runtime| array(runtime, "portMappings")).transpose()?.flatten();
    list.into_iter().flatten().enumerate().map(|(index, value)| mapping(index, value)).collect()
}

/// The mappings of a DEL, without the invalid ones, which ADD rejects; `None` if the configuration has none at all.
pub(super) fn known_mappings(request: &Request<'_>) -> Option<Vec<Mapping>> {
    let runtime = object(request.conf, "runtimeConfig").ok().flatten()?;
    let list = array(runtime, "portMappings").ok().flatten().filter(|list| !list.is_empty())?;
    Some(list.iter().enumerate().filter_map(|(index, value)| mapping(index, value).ok()).collect())
}

fn mapping(index: usize, value: &Value) -> Result<Mapping, CniError> {
    let map = value.as_object().ok_or_else(|| mapping_error(index, "", "must be an object"))?;
    let port = |name: &str| {
        let fail = |reason: String| mapping_error(index, &format!(".{name}"), reason);
        let value = field(map, name).ok_or_else(|| fail("missing".to_owned()))?;
        let port = value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
        port.ok_or_else(|| match value.as_u64() {
            Some(port) => fail(format!("{port} is out of range 1..=65535")),
            None => CniError::decode(fail(format!("{value} is not a port number, 1 to 65535")).msg),
        })
    };
    let text =
        |name: &str| string(map, name).map_err(|_| CniError::decode(mapping_error(index, &format!(".{name}"), "must be a string").msg));
    let protocol = match text("protocol")?.unwrap_or("tcp").to_lowercase().as_str() {
        "tcp" => 6,
        "udp" => 17,
        "sctp" => 132,
        other => return Err(mapping_error(index, ".protocol", format_args!("{other:?} is none of tcp, udp and sctp"))),
    };
    let address =
        |text: &str| text.parse::<IpAddr>().map_err(|_| mapping_error(index, ".hostIP", format_args!("{text:?} is not an address")));
    let host_ip = text("hostIP")?.map(address).transpose()?;
    Ok(Mapping { protocol, host_port: port("hostPort")?, container_port: port("containerPort")?, host_ip })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Command, Environment, Invocation};
    use serde_json::json;

    #[track_caller]
    fn backend(more: &Value) -> Result<Backend, String> {
        config(more).map(|config| config.backend)
    }

    #[track_caller]
    fn config(more: &Value) -> Result<Config, String> {
        let mut conf = json!({ "cniVersion": "1.0.0", "name": "net" });
        for (key, value) in more.as_object().unwrap() {
            conf[key] = value.clone();
        }
        let env = Environment::from(|name: &str| (name == "CNI_PATH").then(|| "/bin".to_owned()));
        let invocation = Invocation::new(Command::Version, &env, &conf.to_string()).unwrap();
        Config::new(&invocation.request()).map_err(|error| error.msg)
    }

    #[test]
    fn backend_follows_the_form_of_the_conditions() {
        assert_eq!(backend(&json!({})), Ok(Backend::Nftables));
        assert_eq!(backend(&json!({ "backend": "" , "conditionsV4": null })), Ok(Backend::Nftables));
        assert_eq!(backend(&json!({ "conditionsV4": ["-s", "192.0.2.0/24"] })), Ok(Backend::Iptables));
        assert_eq!(backend(&json!({ "conditionsV4": ["ip", "saddr", "192.0.2.0/24"] })), Ok(Backend::Nftables));
        assert_eq!(backend(&json!({ "backend": "nftables", "markMasqBit": 3 })), Ok(Backend::Nftables));
        assert_eq!(backend(&json!({ "markMasqBit": 3 })), Ok(Backend::Iptables));
        assert_eq!(backend(&json!({ "backend": "iptables", "conditionsV6": [""] })), Ok(Backend::Iptables));
        assert_eq!(backend(&json!({ "externalSetMarkChain": "X" })), Ok(Backend::Iptables));
        for (more, wanted) in [
            (
                json!({ "backend": "nftables", "conditionsV4": ["!", "-s", "192.0.2.1"] }),
                "conditionsV4: these are iptables conditions, but backend is \"nftables\"",
            ),
            (
                json!({ "backend": "iptables", "conditionsV6": ["ip6"] }),
                "conditionsV6: these are nftables conditions, but backend is \"iptables\"",
            ),
            (
                json!({ "conditionsV4": ["-s", "192.0.2.1"], "conditionsV6": ["ip6"] }),
                "conditionsV4: these are iptables conditions, but conditionsV6 selects \"nftables\"",
            ),
            (
                json!({ "backend": "nftables", "externalSetMarkChain": "X" }),
                "externalSetMarkChain: needs backend \"iptables\", but backend is \"nftables\"",
            ),
        ] {
            assert_eq!(backend(&more), Err(wanted.to_owned()));
        }
    }

    #[test]
    fn only_a_list_of_one_empty_word_is_no_condition() {
        let conditions = |list: Value| config(&json!({ "conditionsV4": list })).unwrap().conditions_of(Family::V4).join(" ");
        assert_eq!(conditions(json!([""])), "");
        assert_eq!(conditions(json!(["", "-s", "192.0.2.0/24"])).trim(), "-s 192.0.2.0/24");
        assert_eq!(backend(&json!({ "conditionsV4": ["", "-s", "192.0.2.0/24"] })), Ok(Backend::Iptables));
    }

    #[test]
    fn errors_name_the_mapping_and_its_value() {
        let error = |mapping: Value| {
            let valid = json!({ "hostPort": 8080, "containerPort": 80 });
            config(&json!({ "runtimeConfig": { "portMappings": [valid, mapping] } })).unwrap_err()
        };
        for (mapping, wanted) in [
            (json!(7), ": must be an object"),
            (json!({ "hostPort": 65536, "containerPort": 80 }), ".hostPort: 65536 is out of range 1..=65535"),
            (json!({ "hostPort": -1, "containerPort": 80 }), ".hostPort: -1 is not a port number, 1 to 65535"),
            (json!({ "hostPort": 80 }), ".containerPort: missing"),
            (json!({ "hostPort": 80, "containerPort": 80, "protocol": "icmp" }), ".protocol: \"icmp\" is none of tcp, udp and sctp"),
            (json!({ "hostPort": 80, "containerPort": 80, "hostIP": "x" }), ".hostIP: \"x\" is not an address"),
            (json!({ "hostPort": 80, "containerPort": 80, "hostIP": 7 }), ".hostIP: must be a string"),
        ] {
            assert_eq!(error(mapping), format!("runtimeConfig.portMappings[1]{wanted}"));
        }
    }
}
