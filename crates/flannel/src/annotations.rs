//! The Kubernetes form of a lease: annotations and pod CIDRs of a Node (specification, sections 4.2 to 4.4). They are read leniently
//! and written byte for byte as upstream does, because other implementations compare these texts.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::value::RawValue;
use thiserror::Error;

use crate::backend::Backend;
use crate::config::Config;
use crate::json::compact;
use crate::lease::{LeaseKey, Peer};
use crate::net::{Family, PerFamily, Subnet};

/// Annotations by their full keys.
pub type Annotations = BTreeMap<String, String>;

/// The reason why a Node, or an annotation of it, cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NodeError {
    /// `--kube-annotation-prefix` is not valid.
    #[error(
        "--kube-annotation-prefix: {0:?} is not a valid annotation prefix: use one like flannel.alpha.coreos.com or example.com/net, in lower case, with a dot before the slash"
    )]
    Prefix(String),
    /// An annotation has a value that cannot be used.
    #[error("annotation {key}: {problem}")]
    Annotation {
        /// Its full key.
        key: String,
        /// The problem with its value.
        problem: String,
    },
    /// The Node has no pod CIDR.
    #[error(
        "it has no spec.podCIDR: start kube-controller-manager with --allocate-node-cidrs and --cluster-cidr, or set the field by hand"
    )]
    NoPodCidr,
    /// The Node has a pod CIDR, but none of a family that the network config enables.
    #[error(
        "spec.podCIDRs {0} has no {1} subnet, which the network config enables: the cluster CIDR of kube-controller-manager must have one"
    )]
    NoFamily(String, Family),
    /// A pod CIDR is not a valid subnet, or there are too many.
    #[error("spec.podCIDRs: {0}")]
    BadPodCidr(String),
    /// The pod CIDR is not part of the pod network.
    #[error("its pod CIDR {0} lies outside the pod network {1}: {field} of the network config must contain kube-controller-manager's --cluster-cidr", field = if .1.family() == Family::V4 { "Network" } else { "IPv6Network" })]
    Outside(Subnet, Subnet),
}

/// The keys of flannel's annotations: their prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys(String);

/// The names of one family's annotations, so that one function reads both families.
struct Names {
    data: &'static str,
    public: &'static str,
    overwrite: &'static str,
    node: &'static str,
}

fn names(family: Family) -> Names {
    match family {
        Family::V4 => Names { data: "backend-data", public: "public-ip", overwrite: "public-ip-overwrite", node: "node-public-ip" },
        Family::V6 => {
            Names { data: "backend-v6-data", public: "public-ipv6", overwrite: "public-ipv6-overwrite", node: "node-public-ipv6" }
        }
    }
}

const TYPE: &str = "backend-type";
const MANAGED: &str = "kube-subnet-manager";

impl Keys {
    /// Makes the keys for a `--kube-annotation-prefix`. A prefix without a slash gets one; one that then ends neither in a slash nor in
    /// a dash gets a dash.
    ///
    /// # Errors
    /// [`NodeError::Prefix`].
    pub fn new(prefix: &str) -> Result<Keys, NodeError> {
        let bad = || NodeError::Prefix(prefix.to_owned());
        let mut text = prefix.to_owned();
        if !text.contains('/') {
            text.push('/');
        }
        if !text.ends_with(['/', '-']) {
            text.push('-');
        }
        let (domain, rest) = text.split_once('/').ok_or_else(bad)?;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.' | '_');
        let label = |label: &str| {
            let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
            label.starts_with(alphanumeric) && label.ends_with(alphanumeric) && label.chars().all(|c| alphanumeric(c) || c == '-')
        };
        let fqdn = domain.contains('.') && domain.split('.').all(label);
        let suffix = rest.is_empty() || rest.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()) && rest.chars().all(plain);
        if fqdn && suffix { Ok(Keys(text)) } else { Err(bad()) }
    }

    /// Whether this is the key of a flannel annotation.
    pub fn is_ours(&self, key: &str) -> bool {
        key.starts_with(&self.0)
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.0)
    }

    fn get<'a>(&self, annotations: &'a Annotations, name: &str) -> Option<&'a str> {
        annotations.get(&self.key(name)).map(String::as_str)
    }

    fn address(&self, annotations: &Annotations, name: &str, family: Family) -> Result<Option<IpAddr>, NodeError> {
        let Some(text) = self.get(annotations, name).filter(|text| !text.is_empty()) else { return Ok(None) };
        let ip: Option<IpAddr> = text.parse().ok().filter(|ip| Family::of(*ip) == family);
        // An annotation can have 256 kB, and this text is logged.
        let problem = || format!("{:?} is not an {family} address", text.chars().take(64).collect::<String>());
        let ip = ip.ok_or_else(|| NodeError::Annotation { key: self.key(name), problem: problem() })?;
        Ok(Some(ip).filter(|ip| *ip != family.unspecified()))
    }

    /// Whether flannel manages the Node with these annotations.
    pub fn is_managed(&self, annotations: &Annotations) -> bool {
        self.get(annotations, MANAGED) == Some("true")
    }

    /// Reads the attributes that the flanneld of a Node published for the enabled families, with the errors in them; `None` if flannel
    /// does not manage the Node.
    ///
    /// An absent annotation, or a family that cannot be read, keeps its value from `before`: no flanneld removes an annotation.
    pub fn peer(&self, annotations: &Annotations, config: &Config, before: &Peer) -> Option<(Peer, Vec<NodeError>)> {
        if !self.is_managed(annotations) {
            return None;
        }
        let backend_type = self.get(annotations, TYPE).map_or_else(|| before.backend_type.clone(), Into::into);
        let mut peer = Peer { backend_type, ..Peer::default() };
        let mut problems = Vec::new();
        for (family, _) in config.networks.iter() {
            let names = names(family);
            let known = (before.public.get(family).copied(), before.backend_data.get(family).cloned());
            let text = |name| self.get(annotations, name).filter(|text| !text.is_empty());
            let read = || {
                let public = match text(names.public) {
                    Some(_) => self.address(annotations, names.public, family)?,
                    None => known.0,
                };
                let data = match text(names.data) {
                    Some(text) => self.data(names.data, text)?,
                    None => known.1.clone(),
                };
                Ok((public, data))
            };
            let (public, data) = read().unwrap_or_else(|problem| {
                problems.push(problem);
                known.clone()
            });
            peer.public.set(family, public);
            peer.backend_data.set(family, data);
        }
        Some((peer, problems))
    }

    /// Parses backend data; `null` means none.
    fn data(&self, name: &str, text: &str) -> Result<Option<Box<str>>, NodeError> {
        let raw: &RawValue = serde_json::from_str(text)
            .map_err(|error| NodeError::Annotation { key: self.key(name), problem: format!("it is not valid JSON: {error}") })?;
        Ok(compact(raw).filter(|data| &**data != "null"))
    }

    /// The addresses that the operator sets by annotations in place of `--public-ip` and `--public-ipv6`.
    ///
    /// # Errors
    /// [`NodeError::Annotation`].
    pub fn node_public(&self, annotations: &Annotations) -> Result<PerFamily<IpAddr>, NodeError> {
        let mut public = PerFamily::default();
        for family in Family::ALL {
            public.set(family, self.address(annotations, names(family).node, family)?);
        }
        Ok(public)
    }

    /// The annotations by which this node publishes `peer`. An address is replaced by the operator's overwrite among the `current`
    /// annotations of the Node. Only those that differ need to be written.
    ///
    /// # Errors
    /// [`NodeError::Annotation`] for an invalid overwrite.
    pub fn wanted(&self, current: &Annotations, backend: &Backend, peer: &Peer) -> Result<Annotations, NodeError> {
        let mut wanted = Annotations::from([(self.key(TYPE), peer.backend_type.to_string()), (self.key(MANAGED), "true".to_owned())]);
        for family in Family::ALL {
            if !backend.annotates(family, peer) {
                continue;
            }
            let names = names(family);
            let address = match self.address(current, names.overwrite, family)? {
                Some(overwrite) => overwrite,
                None => peer.public.get(family).copied().unwrap_or(family.unspecified()),
            };
            wanted.insert(self.key(names.public), address.to_string());
            let data = peer.backend_data.get(family).map_or("null", |data| data);
            wanted.insert(self.key(names.data), data.to_owned());
        }
        Ok(wanted)
    }
}

/// Reads the subnets of a Node from `spec.podCIDRs`, or from `spec.podCIDR` if that is empty.
///
/// # Errors
/// [`NodeError::NoPodCidr`] and [`NodeError::BadPodCidr`].
pub fn pod_cidrs(pod_cidr: &str, pod_cidrs: &[String]) -> Result<PerFamily<Subnet>, NodeError> {
    let one = [pod_cidr.to_owned()];
    let texts = if pod_cidrs.is_empty() { &one[..] } else { pod_cidrs };
    if texts.len() > 2 {
        return Err(NodeError::BadPodCidr(format!("there are {}; a Node has at most one per family", texts.len())));
    }
    let mut subnets = PerFamily::default();
    for text in texts.iter().filter(|text| !text.is_empty()) {
        let subnet: Subnet = text.parse().map_err(|error: crate::net::NetError| NodeError::BadPodCidr(error.to_string()))?;
        // The first of each family counts.
        if subnets.get(subnet.family()).is_none() {
            subnets.set(subnet.family(), Some(subnet));
        }
    }
    if subnets.is_empty() { Err(NodeError::NoPodCidr) } else { Ok(subnets) }
}

/// The lease of a Node with these subnets, for the families that the configuration enables.
///
/// # Errors
/// [`NodeError::NoFamily`] if the Node has no subnet of an enabled family.
pub fn lease_key(config: &Config, subnets: &PerFamily<Subnet>) -> Result<LeaseKey, NodeError> {
    let mut enabled = PerFamily::default();
    for (family, _) in config.networks.iter() {
        enabled.set(family, subnets.get(family).copied());
    }
    LeaseKey::new(enabled).ok_or_else(|| {
        let family = if config.networks.v4.is_some() { Family::V4 } else { Family::V6 };
        NodeError::NoFamily(list(subnets), family)
    })
}

/// The lease of this node: a subnet of every enabled family, each inside the pod network.
///
/// # Errors
/// [`NodeError::NoFamily`] and [`NodeError::Outside`].
pub fn own_lease_key(config: &Config, subnets: &PerFamily<Subnet>) -> Result<LeaseKey, NodeError> {
    for (family, network) in config.networks.iter() {
        let subnet = *subnets.get(family).ok_or_else(|| NodeError::NoFamily(list(subnets), family))?;
        if !network.network.covers(subnet) {
            return Err(NodeError::Outside(subnet, network.network));
        }
    }
    lease_key(config, subnets)
}

fn list(subnets: &PerFamily<Subnet>) -> String {
    subnets.iter().map(|(_, subnet)| subnet.to_string()).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    const PREFIX: &str = "flannel.alpha.coreos.com";

    #[test]
    fn prefixes_are_completed_and_checked_as_upstream_does() {
        for (prefix, key) in [
            (PREFIX, "flannel.alpha.coreos.com/backend-type"),
            ("flannel.alpha.coreos.com/", "flannel.alpha.coreos.com/backend-type"),
            ("org.com/9", "org.com/9-backend-type"),
            ("org.com/9-", "org.com/9-backend-type"),
            ("org.com/a_b.c", "org.com/a_b.c-backend-type"),
        ] {
            assert_eq!(Keys::new(prefix).unwrap().key(TYPE), key);
        }
        for prefix in ["org", "org/", "org.COM", "org.com/PREFIX", "org.com/a/b", "", "/", ".com/", "org..com/", "org.com/-x", "a b.com"] {
            assert_eq!(Keys::new(prefix), Err(NodeError::Prefix(prefix.to_owned())), "{prefix}");
        }
    }

    fn annotations(pairs: &[(&str, &str)]) -> Annotations {
        pairs.iter().map(|(name, value)| (format!("{PREFIX}/{name}"), (*value).to_owned())).collect()
    }

    /// Checks the annotations that a node publishes, one per line.
    #[track_caller]
    fn check(config: &str, peer: Peer, current: &[(&str, &str)], want: Expect) {
        let config = Config::parse_assigned(config).unwrap();
        let keys = Keys::new(PREFIX).unwrap();
        match keys.wanted(&annotations(current), &config.backend, &peer) {
            Err(error) => want.assert_eq(&format!("error: {error}")),
            Ok(wanted) => {
                // Unless the operator overwrote an address, the annotations are read back as the same peer.
                if current.is_empty() {
                    let mut peer = peer;
                    if config.networks.v6.is_none() {
                        // The reader ignores a family that is not enabled.
                        (peer.public.v6, peer.backend_data.v6) = (None, None);
                    }
                    assert_eq!(keys.peer(&wanted, &config, &Peer::default()), Some((peer, Vec::new())));
                }
                let lines: Vec<String> = wanted.iter().map(|(key, value)| format!("{}={value}\n", &key[PREFIX.len() + 1..])).collect();
                want.assert_eq(&lines.concat());
            }
        }
    }

    fn vxlan(v6: bool) -> Peer {
        let data = |mac: &str| Some(format!("{{\"VNI\":1,\"VtepMAC\":\"{mac}\"}}").into());
        Peer {
            public: PerFamily { v4: "192.0.2.1".parse().ok(), v6: v6.then(|| "2001:db8::1".parse().unwrap()) },
            backend_type: "vxlan".into(),
            backend_data: PerFamily { v4: data("0e:00:00:00:00:01"), v6: if v6 { data("0e:00:00:00:06:01") } else { None } },
        }
    }

    fn only_v6(backend: &str) -> String {
        format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{{"Type":"{backend}"}}}}"#)
    }

    #[test]
    fn annotations_of_vxlan_match_upstream_byte_for_byte() {
        let v4 = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
        check(
            v4,
            vxlan(false),
            &[],
            expect![[r#"
            backend-data={"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}
            backend-type=vxlan
            kube-subnet-manager=true
            public-ip=192.0.2.1
        "#]],
        );
        let dual = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"vxlan"}}"#;
        check(
            dual,
            vxlan(true),
            &[],
            expect![[r#"
            backend-data={"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}
            backend-type=vxlan
            backend-v6-data={"VNI":1,"VtepMAC":"0e:00:00:00:06:01"}
            kube-subnet-manager=true
            public-ip=192.0.2.1
            public-ipv6=2001:db8::1
        "#]],
        );
        let peer = Peer {
            public: PerFamily { v4: None, ..vxlan(true).public },
            backend_data: PerFamily { v4: None, ..vxlan(true).backend_data },
            ..vxlan(true)
        };
        check(
            &only_v6("vxlan"),
            peer,
            &[],
            expect![[r#"
            backend-type=vxlan
            backend-v6-data={"VNI":1,"VtepMAC":"0e:00:00:00:06:01"}
            kube-subnet-manager=true
            public-ipv6=2001:db8::1
        "#]],
        );
    }

    #[test]
    fn annotations_of_host_gw_match_upstream_byte_for_byte() {
        // A dual-stack host in an IPv4 pod network also publishes its IPv6 address.
        let v6 = Peer { public: vxlan(true).public, ..vxlan(false) };
        let host_gw = |public| Peer { public, backend_type: "host-gw".into(), ..Peer::default() };
        check(
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#,
            host_gw(v6.public),
            &[],
            expect![[r#"
            backend-data=null
            backend-type=host-gw
            backend-v6-data=null
            kube-subnet-manager=true
            public-ip=192.0.2.1
            public-ipv6=2001:db8::1
        "#]],
        );
        check(
            &only_v6("host-gw"),
            host_gw(PerFamily { v4: None, ..v6.public }),
            &[],
            expect![[r#"
            backend-data=null
            backend-type=host-gw
            backend-v6-data=null
            kube-subnet-manager=true
            public-ip=0.0.0.0
            public-ipv6=2001:db8::1
        "#]],
        );
    }

    #[test]
    fn annotations_of_wireguard_match_upstream_byte_for_byte() {
        let data = || Some(r#"{"PublicKey":"AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=","Port":51820}"#.into());
        let wireguard = |public: PerFamily<IpAddr>| {
            let backend_data = PerFamily { v4: public.v4.and_then(|_| data()), v6: public.v6.and_then(|_| data()) };
            Peer { public, backend_type: "wireguard".into(), backend_data }
        };
        check(
            r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"wireguard"}}"#,
            wireguard(vxlan(true).public),
            &[],
            expect![[r#"
                backend-data={"PublicKey":"AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=","Port":51820}
                backend-type=wireguard
                backend-v6-data={"PublicKey":"AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=","Port":51820}
                kube-subnet-manager=true
                public-ip=192.0.2.1
                public-ipv6=2001:db8::1
            "#]],
        );
        check(
            &only_v6("wireguard"),
            wireguard(PerFamily { v4: None, ..vxlan(true).public }),
            &[],
            expect![[r#"
            backend-data=null
            backend-type=wireguard
            backend-v6-data={"PublicKey":"AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=","Port":51820}
            kube-subnet-manager=true
            public-ip=0.0.0.0
            public-ipv6=2001:db8::1
        "#]],
        );
    }

    #[test]
    fn annotations_of_udp_match_upstream_byte_for_byte() {
        let udp = Peer { public: vxlan(false).public, ..Peer::default() };
        check(
            r#"{"Network":"10.244.0.0/16"}"#,
            udp,
            &[],
            expect![[r#"
            backend-data=null
            backend-type=
            kube-subnet-manager=true
            public-ip=192.0.2.1
        "#]],
        );
    }

    #[test]
    fn operator_can_overwrite_the_published_address() {
        let v4 = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
        check(
            v4,
            vxlan(false),
            &[("public-ip-overwrite", "203.0.113.9"), ("public-ip", "192.0.2.1")],
            expect![[r#"
            backend-data={"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}
            backend-type=vxlan
            kube-subnet-manager=true
            public-ip=203.0.113.9
        "#]],
        );
        check(
            v4,
            vxlan(false),
            &[("public-ip-overwrite", "somewhere")],
            expect![[r#"error: annotation flannel.alpha.coreos.com/public-ip-overwrite: "somewhere" is not an IPv4 address"#]],
        );
    }

    #[test]
    fn invalid_annotation_affects_only_its_family() {
        let keys = Keys::new(PREFIX).unwrap();
        let dual = Config::parse_assigned(r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#).unwrap();
        let v4 = Config::parse_assigned(r#"{"Network":"10.244.0.0/16"}"#).unwrap();
        let peer = |config: &Config, before: &Peer, pairs: &[(&str, &str)]| keys.peer(&annotations(pairs), config, before);
        assert_eq!(peer(&dual, &Peer::default(), &[("public-ip", "nonsense")]), None, "flannel does not manage the Node");
        let managed = ("kube-subnet-manager", "true");
        let (read, problems) = peer(&dual, &vxlan(true), &[managed, ("public-ip", "fd00::1"), ("public-ipv6", "fd00::7")]).unwrap();
        assert_eq!(problems[0].to_string(), "annotation flannel.alpha.coreos.com/public-ip: \"fd00::1\" is not an IPv4 address");
        assert_eq!(read, Peer { public: PerFamily { v6: "fd00::7".parse().ok(), ..vxlan(true).public }, ..vxlan(true) });
        let (read, problems) = peer(&dual, &vxlan(true), &[managed, ("backend-data", "{\"VNI\":")]).unwrap();
        assert!(
            problems[0].to_string().starts_with("annotation flannel.alpha.coreos.com/backend-data: it is not valid JSON: "),
            "{problems:?}"
        );
        assert_eq!(read, vxlan(true), "absent annotations keep their values");
        // A family that is not enabled is ignored.
        assert_eq!(peer(&v4, &vxlan(false), &[managed, ("public-ipv6", "none")]), Some((vxlan(false), Vec::new())));
        let long = "x".repeat(100_000);
        let (_, problems) = peer(&v4, &vxlan(false), &[managed, ("public-ip", &long)]).unwrap();
        assert!(problems[0].to_string().len() < 200);
    }

    #[test]
    fn pod_cidrs_are_read_from_either_field() {
        let of = |one: &str, many: &[&str]| {
            let many: Vec<String> = many.iter().map(ToString::to_string).collect();
            pod_cidrs(one, &many).map(|subnets| list(&subnets)).map_err(|error| error.to_string())
        };
        assert_eq!(of("10.244.1.0/24", &[]).unwrap(), "10.244.1.0/24");
        assert_eq!(of("10.244.1.0/24", &["fc00:0:0:1::/64", "10.244.1.0/24"]).unwrap(), "10.244.1.0/24,fc00:0:0:1::/64");
        assert!(of("", &[]).unwrap_err().starts_with("it has no spec.podCIDR: start kube-controller-manager with"));
        assert!(of("x", &[]).unwrap_err().starts_with("spec.podCIDRs: "));
        assert!(of("", &["10.1.0.0/24", "10.2.0.0/24", "10.3.0.0/24"]).is_err());
    }

    #[test]
    fn own_lease_must_be_in_the_pod_network_in_every_family() {
        let config = Config::parse_assigned(r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#).unwrap();
        let key = |v4: &str, v6: &str| own_lease_key(&config, &PerFamily { v4: v4.parse().ok(), v6: v6.parse().ok() });
        assert_eq!(key("10.244.1.0/24", "fc00:0:0:1::/64").unwrap().to_string(), "10.244.1.0/24,fc00:0:0:1::/64");
        assert!(matches!(key("10.244.1.0/24", ""), Err(NodeError::NoFamily(_, Family::V6))));
        assert_eq!(
            key("10.1.1.0/24", "fc00:0:0:1::/64").unwrap_err().to_string(),
            "its pod CIDR 10.1.1.0/24 lies outside the pod network 10.244.0.0/16: Network of the network config must contain kube-controller-manager's --cluster-cidr"
        );
    }

    #[test]
    fn only_keys_with_the_prefix_are_ours() {
        let keys = Keys::new("org.com/9").unwrap();
        for (key, ours) in
            [("org.com/9-backend-type", true), ("org.com/9-x", true), ("org.com/9", false), ("org.com/8-backend-type", false), ("", false)]
        {
            assert_eq!(keys.is_ours(key), ours, "{key:?}");
        }
    }

    #[test]
    fn node_public_reads_each_family() {
        let keys = Keys::new(PREFIX).unwrap();
        let read = |pairs: &[(&str, &str)]| keys.node_public(&annotations(pairs)).map_err(|error| error.to_string());
        assert_eq!(read(&[]), Ok(PerFamily::default()));
        assert_eq!(
            read(&[("node-public-ip", "192.0.2.7"), ("node-public-ipv6", "2001:db8::7")]),
            Ok(PerFamily { v4: "192.0.2.7".parse().ok(), v6: "2001:db8::7".parse().ok() })
        );
        let problem = read(&[("node-public-ipv6", "192.0.2.7")]).unwrap_err();
        assert!(problem.contains("node-public-ipv6") && problem.contains("192.0.2.7"), "{problem}");
    }
}
