//! Parses and validates the network configuration (net-conf), JSON with upstream's keys (specification, section 2). All defaults are
//! applied here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Deserialize;
use thiserror::Error;

use crate::backend::Backend;
use crate::json::Fields;
use crate::net::{Family, NetError, PerFamily, Subnet, bits_of};

/// The reason why a network configuration cannot be used. Each message names the field, the problem and the fix.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The text is not a JSON object.
    #[error(
        "the network config is not a JSON object: {0}; it looks like {{\"Network\":\"10.244.0.0/16\",\"Backend\":{{\"Type\":\"vxlan\"}}}}"
    )]
    Json(serde_json::Error),
    /// A field has the wrong JSON type.
    #[error("network config: {field}: {source}")]
    Type {
        /// The field, in upstream's spelling.
        field: &'static str,
        /// The error of the JSON parser.
        source: serde_json::Error,
    },
    /// A required field is missing.
    #[error("network config: {field} is missing: {fix}")]
    Missing {
        /// The field, in upstream's spelling.
        field: &'static str,
        /// The value to set.
        fix: &'static str,
    },
    /// A field has a value that cannot be used.
    #[error("network config: {field}: {problem}")]
    Invalid {
        /// The field, in upstream's spelling.
        field: &'static str,
        /// The problem and the fix.
        problem: String,
    },
}

/// The network configuration, validated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The pod network of each enabled family, at least one.
    pub networks: PerFamily<Network>,
    /// `EnableNFTables`: the operator's choice between nftables and iptables rules.
    pub nftables: bool,
    /// `Backend`.
    pub backend: Backend,
}

/// One family's pod network and its division into subnets. Where subnets are assigned (Kubernetes), it is not divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// The whole pod network.
    pub network: Subnet,
    /// Prefix length of each host's subnet, in bits.
    pub subnet_len: u8,
    /// Network address of the first subnet to lease.
    pub min: IpAddr,
    /// Network address of the last subnet to lease.
    pub max: IpAddr,
}

impl Network {
    /// Whether this subnet may be leased under this configuration: it has the right size and lies between `min` and `max`.
    pub fn admits(&self, subnet: Subnet) -> bool {
        subnet.family() == self.network.family()
            && subnet.prefix_len() == self.subnet_len
            && (self.min..=self.max).contains(&subnet.network())
    }
}

impl Config {
    /// Parses and validates the JSON text.
    ///
    /// # Errors
    /// [`ConfigError`], which names the field and the fix. An unknown field is no error.
    pub fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::read(text, Subnets::Leased)
    }

    /// Like [`Config::parse`], for a store that assigns each host its subnet, as Kubernetes does: `SubnetLen`, `SubnetMin` and
    /// `SubnetMax` have no meaning there and are ignored.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn parse_assigned(text: &str) -> Result<Config, ConfigError> {
        Config::read(text, Subnets::Assigned)
    }

    fn read(text: &str, subnets: Subnets) -> Result<Config, ConfigError> {
        let fields = Fields::parse(text).map_err(ConfigError::Json)?;
        let mut networks = PerFamily::default();
        for family in Family::ALL {
            networks.set(family, network(&fields, family, subnets)?);
        }
        if networks.is_empty() {
            return Err(invalid("EnableIPv4", "both EnableIPv4 and EnableIPv6 are false: enable one".to_owned()));
        }
        let nftables = get(&fields, "EnableNFTables")?.unwrap_or(false);
        let backend = Backend::parse(get::<Fields<'_>>(&fields, "Backend")?.as_ref())?;
        let config = Config { networks, nftables, backend };
        config.backend.check_config(&config)?;
        Ok(config)
    }

    /// The pod network of a family, if that family is enabled.
    pub fn network(&self, family: Family) -> Option<Subnet> {
        self.networks.get(family).map(|network| network.network)
    }
}

/// How hosts get their subnets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subnets {
    /// Each host chooses a free subnet within the limits of the configuration.
    Leased,
    /// The store assigns them.
    Assigned,
}

/// The names of one family's keys, so that one function reads both families.
struct Keys {
    enable: (&'static str, bool),
    network: &'static str,
    len: &'static str,
    min: &'static str,
    max: &'static str,
    /// The longest permitted SubnetLen; the longest network prefix without SubnetLen, and with the usual SubnetLen; the usual SubnetLen.
    limits: (u8, u8, u8, u8),
}

const V4: Keys = Keys {
    enable: ("EnableIPv4", true),
    network: "Network",
    len: "SubnetLen",
    min: "SubnetMin",
    max: "SubnetMax",
    limits: (30, 28, 22, 24),
};
const V6: Keys = Keys {
    enable: ("EnableIPv6", false),
    network: "IPv6Network",
    len: "IPv6SubnetLen",
    min: "IPv6SubnetMin",
    max: "IPv6SubnetMax",
    limits: (126, 124, 62, 64),
};

fn network(fields: &Fields<'_>, family: Family, subnets: Subnets) -> Result<Option<Network>, ConfigError> {
    let keys = match family {
        Family::V4 => V4,
        Family::V6 => V6,
    };
    let (enable, default) = keys.enable;
    if !get(fields, enable)?.unwrap_or(default) {
        return Ok(None);
    }
    // As in upstream's decoders, a null means an absent value for the IPv6 addresses and is an error for all others.
    let given = match subnets {
        Subnets::Leased => &[keys.network, keys.min, keys.max][..],
        Subnets::Assigned => &[keys.network],
    };
    for field in given.iter().copied() {
        let tolerated = family == Family::V6 && field != keys.network;
        if fields.is_null(&field.to_lowercase()) && !tolerated {
            return Err(invalid(field, "null is not a valid value: remove the field or set a value".to_owned()));
        }
    }
    let Some(text) = get::<String>(fields, keys.network)? else {
        return Err(ConfigError::Missing { field: keys.network, fix: "give the pod network in CIDR form, such as 10.244.0.0/16" });
    };
    let network: Subnet = text.parse().map_err(|error: NetError| invalid(keys.network, error.to_string()))?;
    if network.family() != family {
        return Err(invalid(keys.network, format!("{network} is not an {family} network")));
    }
    if subnets == Subnets::Assigned {
        return Ok(Some(Network { network, subnet_len: network.prefix_len(), min: network.network(), max: network.network() }));
    }

    let (longest, longest_network, usual_network, usual_len) = keys.limits;
    let subnet_len = match get::<u64>(fields, keys.len)?.filter(|len| *len != 0) {
        Some(len) => {
            let lowest = network.prefix_len() + 2;
            match u8::try_from(len) {
                Ok(len) if len <= longest && len >= lowest => len,
                _ => {
                    let problem = format!("{len} is out of range for {network}: it must be {lowest} to {longest}");
                    return Err(invalid(keys.len, problem));
                }
            }
        }
        None if network.prefix_len() > longest_network => {
            let problem = format!("{network} is too small: its prefix length must be at most {longest_network}");
            return Err(invalid(keys.network, problem));
        }
        None if network.prefix_len() <= usual_network => usual_len,
        None => network.prefix_len() + 2,
    };

    let step = 1u128 << (family.bits() - subnet_len);
    let min = match address(fields, keys.min, family)? {
        Some(min) => min,
        // The first subnet is skipped: its network address is that of the whole network.
        None => family.address(bits_of(network.network()) + step),
    };
    let max = match address(fields, keys.max, family)? {
        Some(max) => max,
        None => family.address(bits_of(network.last()) & !(step - 1)),
    };
    for (field, ip) in [(keys.min, min), (keys.max, max)] {
        if !network.contains(ip) {
            return Err(invalid(field, format!("{ip} is outside the pod network {network}")));
        }
        if !bits_of(ip).is_multiple_of(step) {
            let aligned = family.address(bits_of(ip) & !(step - 1));
            return Err(invalid(field, format!("{ip} is not the network address of a /{subnet_len}: did you mean {aligned}?")));
        }
    }
    if min > max {
        return Err(invalid(keys.min, format!("{min} is above {} {max}: no subnet is left to lease", keys.max)));
    }
    Ok(Some(Network { network, subnet_len, min, max }))
}

fn address(fields: &Fields<'_>, field: &'static str, family: Family) -> Result<Option<IpAddr>, ConfigError> {
    let Some(text) = get::<String>(fields, field)? else { return Ok(None) };
    let ip = match family {
        Family::V4 => text.parse().map(|ip: Ipv4Addr| IpAddr::V4(ip)),
        Family::V6 => text.parse().map(|ip: Ipv6Addr| IpAddr::V6(ip)),
    };
    match ip {
        Ok(ip) if ip == family.unspecified() => Ok(None),
        Ok(ip) => Ok(Some(ip)),
        Err(_) => Err(invalid(field, format!("{text:?} is not an {family} address"))),
    }
}

/// Reads `Backend.Port`; if it is 0 or absent, the default.
pub(crate) fn port(section: &Fields<'_>, default: u16) -> Result<u16, ConfigError> {
    let port = typed::<i64>(section, "Backend.Port", "port")?.unwrap_or(0);
    let port = u16::try_from(port)
        .map_err(|_| invalid("Backend.Port", format!("{port} is out of range: it must be 0 (the default, {default}) to 65535")))?;
    Ok(if port == 0 { default } else { port })
}

fn get<'a, T: Deserialize<'a>>(fields: &Fields<'a>, field: &'static str) -> Result<Option<T>, ConfigError> {
    typed(fields, field, &field.to_lowercase())
}

pub(crate) fn typed<'a, T: Deserialize<'a>>(fields: &Fields<'a>, field: &'static str, key: &str) -> Result<Option<T>, ConfigError> {
    fields.get(key).map_err(|source| ConfigError::Type { field, source })
}

pub(crate) fn invalid(field: &'static str, problem: String) -> ConfigError {
    ConfigError::Invalid { field, problem }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(text: &str, want: Expect) {
        let got = match Config::parse(text) {
            Err(error) => format!("error: {error}"),
            Ok(config) => {
                let networks = config.networks.iter().map(|(_, n)| format!("{} /{} {}..{}", n.network, n.subnet_len, n.min, n.max));
                let networks: Vec<_> = networks.collect();
                format!("{}; {:?}", networks.join("; "), config.backend)
            }
        };
        want.assert_eq(&got);
    }

    #[test]
    fn defaults_skip_the_first_subnet() {
        check(r#"{"network":"10.3.0.0/16","Backend":{"Type":"host-gw"}}"#, expect!["10.3.0.0/16 /24 10.3.1.0..10.3.255.0; HostGw(HostGw)"]);
    }

    #[test]
    fn ipv6_defaults_skip_the_first_subnet() {
        check(
            r#"{"EnableIPv4":false,"enableipv6":true,"ipv6Network":"fc00::/48","Backend":{"Type":"alloc"}}"#,
            expect!["fc00::/48 /64 fc00:0:0:1::..fc00:0:0:ffff::; Alloc(Alloc)"],
        );
    }

    #[test]
    fn keys_are_case_insensitive_and_override_defaults() {
        check(
            r#"{"NETWORK":"10.3.0.7/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0","SubnetLen":28,"unknown":[1],
                "backend":{"type":"VXLAN","vni":7,"PORT":4789,"directrouting":true,"MTU":9000}}"#,
            expect![
                "10.3.0.0/16 /28 10.3.5.0..10.3.8.0; Vxlan(Vxlan { vni: Vni(7), port: 4789, mtu: OuterMtu(Some(9000)), gbp: false, learning: false, direct_routing: true, devices: Devices { v4: \"flannel.7\", v6: \"flannel-v6.7\" } })"
            ],
        );
    }

    #[test]
    fn ipv6_keys_override_defaults() {
        check(
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetMin":"fc00:0:0:100::","IPv6SubnetMax":"fc00:0:0:200::","IPv6SubnetLen":56,"Backend":{"Type":"alloc"}}"#,
            expect!["fc00::/48 /56 fc00:0:0:100::..fc00:0:0:200::; Alloc(Alloc)"],
        );
    }

    #[test]
    fn last_duplicate_key_wins_whatever_its_case() {
        check(
            r#"{"Network":"10.3.0.0/16","network":"10.4.0.0/16","Backend":{"Type":"alloc"}}"#,
            expect!["10.4.0.0/16 /24 10.4.1.0..10.4.255.0; Alloc(Alloc)"],
        );
    }

    #[test]
    fn subnet_limits_are_ignored_where_subnets_are_assigned() {
        let text = r#"{"Network":"10.3.0.0/29","SubnetLen":99,"SubnetMin":"x","SubnetMax":null,"Backend":{"Type":"alloc"}}"#;
        assert!(Config::parse(text).is_err());
        assert_eq!(Config::parse_assigned(text).unwrap().network(Family::V4), "10.3.0.0/29".parse().ok());
        assert!(Config::parse_assigned(r#"{"SubnetLen":24}"#).is_err(), "Network is required");
    }

    #[test]
    fn small_network_is_divided_into_four_subnets() {
        check(r#"{"Network":"10.3.0.0/26","Backend":{"Type":"alloc"}}"#, expect!["10.3.0.0/26 /28 10.3.0.16..10.3.0.48; Alloc(Alloc)"]);
    }

    #[test]
    fn every_error_names_the_field_and_the_fix() {
        check(
            r#"{"Network":"10.3.0.0/16","#,
            expect![[
                r#"error: the network config is not a JSON object: EOF while parsing a value at line 1 column 25; it looks like {"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#
            ]],
        );
        check(
            "[]",
            expect![[
                r#"error: the network config is not a JSON object: invalid type: sequence, expected a JSON object at line 1 column 0; it looks like {"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#
            ]],
        );
        check(
            r#"{"Backend":{"Type":"vxlan"}}"#,
            expect!["error: network config: Network is missing: give the pod network in CIDR form, such as 10.244.0.0/16"],
        );
        check(r#"{"Network":null}"#, expect!["error: network config: Network: null is not a valid value: remove the field or set a value"]);
        check(
            r#"{"Network":5}"#,
            expect!["error: network config: Network: invalid type: integer `5`, expected a string at line 1 column 1"],
        );
        check(
            r#"{"Network":"10.3.0.0"}"#,
            expect![[r#"error: network config: Network: "10.3.0.0" is not a network in CIDR form, such as 10.244.0.0/16"#]],
        );
        check(r#"{"Network":"fc00::/48"}"#, expect!["error: network config: Network: fc00::/48 is not an IPv4 network"]);
        check(
            r#"{"Network":"10.3.0.0/16","SubnetLen":17}"#,
            expect!["error: network config: SubnetLen: 17 is out of range for 10.3.0.0/16: it must be 18 to 30"],
        );
        check(
            r#"{"Network":"10.3.0.0/16","SubnetLen":31}"#,
            expect!["error: network config: SubnetLen: 31 is out of range for 10.3.0.0/16: it must be 18 to 30"],
        );
        check(
            r#"{"Network":"10.3.0.0/29"}"#,
            expect!["error: network config: Network: 10.3.0.0/29 is too small: its prefix length must be at most 28"],
        );
        check(
            r#"{"Network":"10.3.0.0/16","SubnetMin":"10.4.0.0"}"#,
            expect!["error: network config: SubnetMin: 10.4.0.0 is outside the pod network 10.3.0.0/16"],
        );
        check(
            r#"{"Network":"10.3.0.0/16","SubnetMax":"10.3.9.1"}"#,
            expect!["error: network config: SubnetMax: 10.3.9.1 is not the network address of a /24: did you mean 10.3.9.0?"],
        );
        check(
            r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.8.0"}"#,
            expect!["error: network config: SubnetMin: 10.3.9.0 is above SubnetMax 10.3.8.0: no subnet is left to lease"],
        );
        check(
            r#"{"EnableIPv4":false}"#,
            expect!["error: network config: EnableIPv4: both EnableIPv4 and EnableIPv6 are false: enable one"],
        );
        check(r#"{"Network":"10.3.0.0/16"}"#, expect!["10.3.0.0/16 /24 10.3.1.0..10.3.255.0; Udp(Udp { port: 8285 })"]);
        check(
            r#"{"Network":"10.3.0.0/16","Backend":{}}"#,
            expect![[
                r#"error: network config: Backend.Type is missing: set Backend.Type to "vxlan", "host-gw", "ipip", "wireguard", "udp", "extension" or "alloc""#
            ]],
        );
        check(
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vlxan"}}"#,
            expect![[
                r#"error: network config: Backend.Type: "vlxan" is an unknown backend: set Backend.Type to "vxlan", "host-gw", "ipip", "wireguard", "udp", "extension" or "alloc""#
            ]],
        );
        check(
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#,
            expect!["error: network config: Backend.VNI: 16777216 is out of range: a VXLAN network identifier is 0 to 16777215"],
        );
        check(
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","Port":-1}}"#,
            expect!["error: network config: Backend.Port: -1 is out of range: it must be 0 (the default, 8472) to 65535"],
        );
    }
}
