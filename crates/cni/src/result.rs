//! The result of an ADD: read in any version of the specification, written in the version of the configuration.

use std::net::IpAddr;

use ::flannel::{Cidr, Family, Subnet};
use serde_json::{Map, Value, json};

use crate::protocol::{CniError, pretty};

/// An interface that the attachment created or uses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its link-layer address.
    pub mac: String,
    /// Its MTU in bytes; 0 if unknown.
    pub mtu: u32,
    /// The path of the network namespace that it is in; empty for the host's.
    pub sandbox: String,
    /// Further fields that another plugin set (`socketPath`, `pciID`), unchanged.
    pub more: Map<String, Value>,
}

/// An address of the attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ip {
    /// The index in the list of interfaces.
    pub interface: Option<usize>,
    /// The address with its prefix length.
    pub address: Cidr,
    /// The gateway of its subnet.
    pub gateway: Option<IpAddr>,
}

/// A route of the attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub dst: Subnet,
    /// Gateway; without one, the gateway of the family's first address is used.
    pub gw: Option<IpAddr>,
    /// Further fields of the configuration (`mtu`, `priority`, …), unchanged.
    pub more: Map<String, Value>,
}

/// The result of an ADD.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CniResult {
    /// Interfaces.
    pub interfaces: Vec<Interface>,
    /// Addresses.
    pub ips: Vec<Ip>,
    /// Routes.
    pub routes: Vec<Route>,
    /// DNS settings, unchanged.
    pub dns: Map<String, Value>,
}

impl CniResult {
    /// The JSON text in a version of the specification.
    pub fn render(&self, version: &str) -> String {
        if matches!(version, "0.1.0" | "0.2.0") {
            return self.render_old(version);
        }
        let new = matches!(version, "1.0.0" | "1.1.0");
        let mut result = Map::new();
        result.insert("cniVersion".to_owned(), version.into());
        let interface = |i: &Interface| {
            let mut object = Value::Object(i.more.clone());
            object["name"] = i.name.as_str().into();
            for (key, value) in [("mac", &i.mac), ("sandbox", &i.sandbox)] {
                if !value.is_empty() {
                    object[key] = value.as_str().into();
                }
            }
            if i.mtu != 0 && version == "1.1.0" {
                object["mtu"] = i.mtu.into();
            }
            object
        };
        let ip = |ip: &Ip| {
            let mut object = json!({ "address": ip.address.to_string() });
            if let Some(index) = ip.interface {
                object["interface"] = index.into();
            }
            if let Some(gateway) = ip.gateway {
                object["gateway"] = gateway.to_string().into();
            }
            if !new {
                object["version"] = if ip.address.addr.is_ipv4() { "4".into() } else { "6".into() };
            }
            object
        };
        for (key, list) in [
            ("interfaces", self.interfaces.iter().map(interface).collect::<Vec<_>>()),
            ("ips", self.ips.iter().map(ip).collect()),
            ("routes", self.routes.iter().map(Route::to_json).collect()),
        ] {
            if !list.is_empty() {
                result.insert(key.to_owned(), list.into());
            }
        }
        // Before 1.0.0 the field was mandatory.
        if !self.dns.is_empty() || !new {
            result.insert("dns".to_owned(), self.dns.clone().into());
        }
        pretty(&result.into())
    }

    fn render_old(&self, version: &str) -> String {
        let mut result = json!({ "cniVersion": version, "dns": self.dns });
        for (key, family) in [("ip4", Family::V4), ("ip6", Family::V6)] {
            let Some(ip) = self.ips.iter().find(|ip| Family::of(ip.address.addr) == family) else { continue };
            let mut object = json!({ "ip": ip.address.to_string() });
            if let Some(gateway) = ip.gateway {
                object["gateway"] = gateway.to_string().into();
            }
            let routes: Vec<Value> = self.routes.iter().filter(|route| route.dst.family() == family).map(Route::to_json).collect();
            if !routes.is_empty() {
                object["routes"] = routes.into();
            }
            result[key] = object;
        }
        pretty(&result)
    }

    /// Reads a result of any version.
    ///
    /// # Errors
    /// Code 6, naming the field.
    pub fn parse(value: &Value) -> Result<CniResult, CniError> {
        let mut first = Ok(());
        let result = CniResult::read(value, |error| {
            if first.is_ok() {
                first = Err(error);
            }
        });
        first.map(|()| result)
    }

    /// Reads a result of any version, and skips invalid entries.
    pub fn parse_leniently(value: &Value) -> CniResult {
        CniResult::read(value, drop)
    }

    /// Reads the valid entries, and reports an error for each invalid one.
    fn read(value: &Value, mut report: impl FnMut(CniError)) -> CniResult {
        let decode_error = |what: &str| CniError::decode(format!("result: {what}"));
        let mut result = CniResult::default();
        let Value::Object(object) = value else {
            report(decode_error("it is not a JSON object"));
            return result;
        };
        let list = |key: &str| object.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let gateway = |value: &Value, key: &str| match value.get(key).and_then(Value::as_str) {
            None | Some("") => Ok(None),
            Some(ip) => ip.parse().map(Some).map_err(|_| decode_error(&format!("{key}: {ip:?} is not an address"))),
        };
        for i in list("interfaces") {
            let mtu = i.get("mtu").and_then(Value::as_u64).and_then(|mtu| u32::try_from(mtu).ok()).unwrap_or(0);
            let mut more = i.as_object().cloned().unwrap_or_default();
            more.retain(|key, _| !["name", "mac", "mtu", "sandbox"].contains(&key.as_str()));
            result.interfaces.push(Interface { name: text(i, "name"), mac: text(i, "mac"), mtu, sandbox: text(i, "sandbox"), more });
        }
        let old = ["ip4", "ip6"].iter().filter_map(|key| object.get(*key)).map(|old| (old, "ip"));
        for (ip, key) in list("ips").iter().map(|ip| (ip, "address")).chain(old.clone()) {
            let interface = ip.get("interface").and_then(Value::as_u64).and_then(|index| usize::try_from(index).ok());
            let address = text(ip, key).parse().map_err(|error| decode_error(&format!("{key}: {error}")));
            match address.and_then(|address| Ok(Ip { interface, address, gateway: gateway(ip, "gateway")? })) {
                Ok(ip) => result.ips.push(ip),
                Err(error) => report(error),
            }
        }
        let old_routes = old.filter_map(|(old, _)| old.get("routes").and_then(Value::as_array)).flatten();
        for route in old_routes.chain(list("routes")) {
            match Route::parse(route) {
                Ok(route) => result.routes.push(route),
                Err(error) => report(error),
            }
        }
        if let Some(Value::Object(dns)) = object.get("dns") {
            result.dns = dns.clone();
        }
        result
    }
}

impl Route {
    /// Reads a route of a result or of a configuration.
    ///
    /// # Errors
    /// Code 6, naming the field.
    pub fn parse(value: &Value) -> Result<Route, CniError> {
        let Value::Object(object) = value else { return Err(CniError::decode("routes: each entry must be an object with dst")) };
        let mut more = object.clone();
        let dst = more.remove("dst").as_ref().and_then(Value::as_str).unwrap_or_default().parse();
        let dst = dst.map_err(|error| CniError::decode(format!("routes.dst: {error}")))?;
        let gw = match more.remove("gw").as_ref().and_then(Value::as_str) {
            None | Some("") => None,
            Some(gw) => Some(gw.parse().map_err(|_| CniError::decode(format!("routes.gw: {gw:?} is not an address")))?),
        };
        Ok(Route { dst, gw, more })
    }

    fn to_json(&self) -> Value {
        let mut object = self.more.clone();
        object.insert("dst".to_owned(), self.dst.to_string().into());
        if let Some(gw) = self.gw {
            object.insert("gw".to_owned(), gw.to_string().into());
        }
        object.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    fn result() -> CniResult {
        CniResult {
            interfaces: vec![Interface {
                name: "eth0".to_owned(),
                mac: "02:00:00:00:00:01".to_owned(),
                mtu: 1450,
                sandbox: "/ns".to_owned(),
                more: Map::new(),
            }],
            ips: vec![Ip { interface: Some(0), address: "10.1.17.2/24".parse().unwrap(), gateway: "10.1.17.1".parse().ok() }],
            routes: vec![Route { dst: "10.1.0.0/16".parse().unwrap(), gw: None, more: Map::new() }],
            dns: Map::new(),
        }
    }

    #[test]
    fn each_version_has_its_form() {
        expect![[r#"
            {
                "cniVersion": "1.1.0",
                "interfaces": [
                    {
                        "mac": "02:00:00:00:00:01",
                        "mtu": 1450,
                        "name": "eth0",
                        "sandbox": "/ns"
                    }
                ],
                "ips": [
                    {
                        "address": "10.1.17.2/24",
                        "gateway": "10.1.17.1",
                        "interface": 0
                    }
                ],
                "routes": [
                    {
                        "dst": "10.1.0.0/16"
                    }
                ]
            }"#]]
        .assert_eq(&result().render("1.1.0"));
        let old = result().render("0.3.1");
        assert!(old.contains("\"version\": \"4\"") && old.contains("\"dns\": {}") && !old.contains("mtu"), "{old}");
        let oldest = result().render("0.2.0");
        assert!(oldest.contains("\"ip4\"") && oldest.contains("\"ip\": \"10.1.17.2/24\""), "{oldest}");
    }

    #[test]
    fn lenient_parsing_skips_invalid_entries() {
        let value = json!({ "ips": [{ "address": "10.1.17.2/24" }, { "address": "x" }, 7], "routes": [{ "dst": "y" }] });
        assert!(CniResult::parse(&value).is_err());
        assert_eq!(CniResult::parse_leniently(&value).ips.len(), 1);
        assert_eq!(CniResult::parse_leniently(&json!("x")), CniResult::default());
    }

    #[test]
    fn rendered_results_read_back() {
        for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            let back = CniResult::parse(&serde_json::from_str(&result().render(version)).unwrap()).unwrap();
            assert_eq!((back.ips, back.routes), (result().ips, result().routes), "{version}");
        }
        let back = CniResult::parse(&serde_json::from_str(&result().render("0.2.0")).unwrap()).unwrap();
        assert_eq!(back.ips[0].address, result().ips[0].address);
    }
}
