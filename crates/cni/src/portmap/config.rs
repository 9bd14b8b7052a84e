//! The portmap plugin's configuration, read and validated.

use std::net::IpAddr;

use ::flannel::Family;
use ::flannel::pod::ports::{Mapping, Snat};
use serde_json::{Map, Value};

use crate::chains::given_name;
use crate::protocol::{CniError, Request, array, boolean, number, object, string};

/// Which rules lead to the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backend {
    /// Rules of the reference plugin's nftables table.
    Nftables,
    /// Chains of iptables.
    Iptables,
}

/// The validated configuration.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) backend: Backend,
    pub(super) snat: Snat,
    /// The bit of the packet mark that says "masquerade".
    pub(super) mark_bit: u32,
    /// Another program's chain that sets its mark instead.
    pub(super) set_mark_chain: Option<String>,
    conditions: [Vec<String>; 2],
    pub(super) mappings: Vec<Mapping>,
}

impl Config {
    pub(super) fn new(request: &Request<'_>) -> Result<Config, CniError> {
        let conf = request.conf;
        let set_mark_chain = string(conf, "externalSetMarkChain")?
            .map(|name| given_name("externalSetMarkChain", name).map(ToOwned::to_owned))
            .transpose()?;
        let mark = number(conf, "markMasqBit")?;
        if set_mark_chain.is_some() && mark.is_some() {
            return Err(CniError::config("markMasqBit, externalSetMarkChain: give one of them"));
        }
        if mark.is_some_and(|bit| bit > 31) {
            return Err(CniError::config("markMasqBit: it must be 0 to 31"));
        }
        let conditions = [conditions(request, "conditionsV4")?, conditions(request, "conditionsV6")?];
        let needs = |backend| {
            let names = ["conditionsV4", "conditionsV6"].into_iter().zip(&conditions);
            let mut fields: Vec<&str> = names.filter(|(_, list)| backend_of(list) == Some(backend)).map(|(name, _)| name).collect();
            if backend == Backend::Iptables && set_mark_chain.is_some() {
                fields.push("externalSetMarkChain");
            }
            fields
        };
        let (for_iptables, for_nftables) = (needs(Backend::Iptables), needs(Backend::Nftables));
        let backend = match string(conf, "backend")? {
            Some("iptables") => Backend::Iptables,
            Some("nftables") => Backend::Nftables,
            Some(other) => return Err(CniError::config(format!("backend: {other:?} is neither \"iptables\" nor \"nftables\""))),
            // A mark means something to rules of iptables only.
            None if for_nftables.is_empty() && (mark.is_some() || !for_iptables.is_empty()) => Backend::Iptables,
            None => Backend::Nftables,
        };
        let (wrong, name) = match backend {
            Backend::Iptables => (for_nftables, "iptables"),
            Backend::Nftables => (for_iptables, "nftables"),
        };
        if !wrong.is_empty() {
            return Err(CniError::config(format!("{}: not in the form that backend {name} takes", wrong.join(", "))));
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

/// Whose words conditions are. Those of iptables begin with an option or a negation, those of nft never do.
fn backend_of(conditions: &[String]) -> Option<Backend> {
    let first = conditions.first()?;
    Some(if first.starts_with(['-', '!']) { Backend::Iptables } else { Backend::Nftables })
}

fn conditions(request: &Request<'_>, name: &str) -> Result<Vec<String>, CniError> {
    let list = array(request.conf, name)?.map(Vec::as_slice).unwrap_or_default();
    let word = |value: &Value| {
        // They become part of a line that iptables-restore or nft reads.
        let word = value.as_str().filter(|word| !word.contains(['"', '\n', '\\', ';', '#']));
        word.map(ToOwned::to_owned)
            .ok_or_else(|| CniError::config(format!("{name}: it must be a list of words without \" \\ ; # and line ends")))
    };
    let words: Vec<String> = list.iter().map(word).collect::<Result<_, _>>()?;
    // One empty word is what some writers make of no conditions.
    Ok(if words.first().is_some_and(String::is_empty) { Vec::new() } else { words })
}

fn bad(what: impl std::fmt::Display) -> CniError {
    CniError::config(format!("runtimeConfig.portMappings: {what}"))
}

fn mappings(request: &Request<'_>) -> Result<Vec<Mapping>, CniError> {
    let list = request.runtime_config()?.map(|runtime| array(runtime, "portMappings")).transpose()?.flatten();
    let read = |value: &Value| mapping(value.as_object().ok_or_else(|| bad("each must be an object"))?);
    list.into_iter().flatten().map(read).collect()
}

/// The mappings of a DEL, without those that ADD would have refused; `None` if the configuration has none at all.
pub(super) fn known_mappings(request: &Request<'_>) -> Option<Vec<Mapping>> {
    let runtime = object(request.conf, "runtimeConfig").ok().flatten()?;
    let list = array(runtime, "portMappings").ok().flatten().filter(|list| !list.is_empty())?;
    Some(list.iter().filter_map(Value::as_object).filter_map(|map| mapping(map).ok()).collect())
}

fn mapping(map: &Map<String, Value>) -> Result<Mapping, CniError> {
    let port = |name: &str| {
        let port = number(map, name)?.and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
        port.ok_or_else(|| bad(format_args!("{name}: it must be 1 to 65535")))
    };
    let protocol = match string(map, "protocol")?.unwrap_or("tcp").to_lowercase().as_str() {
        "tcp" => 6,
        "udp" => 17,
        "sctp" => 132,
        other => return Err(bad(format_args!("protocol: {other:?} is none of tcp, udp and sctp"))),
    };
    let address = |text: &str| text.parse::<IpAddr>().map_err(|_| bad(format_args!("hostIP: {text:?} is not an address")));
    let host_ip = string(map, "hostIP")?.map(address).transpose()?;
    Ok(Mapping { protocol, host_port: port("hostPort")?, container_port: port("containerPort")?, host_ip })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Command, Environment, Invocation};
    use serde_json::json;

    #[track_caller]
    fn backend(more: &Value) -> Result<Backend, String> {
        let mut conf = json!({ "cniVersion": "1.0.0", "name": "net" });
        for (key, value) in more.as_object().unwrap() {
            conf[key] = value.clone();
        }
        let env = Environment::from(|name: &str| (name == "CNI_PATH").then(|| "/bin".to_owned()));
        let invocation = Invocation::new(Command::Version, &env, &conf.to_string()).unwrap();
        Config::new(&invocation.request()).map(|config| config.backend).map_err(|error| error.msg)
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
        assert!(
            backend(&json!({ "backend": "nftables", "conditionsV4": ["!", "-s", "192.0.2.1"] })).unwrap_err().starts_with("conditionsV4: ")
        );
        assert!(backend(&json!({ "backend": "iptables", "conditionsV6": ["ip6"] })).unwrap_err().starts_with("conditionsV6: "));
    }
}
