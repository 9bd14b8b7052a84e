//! VXLAN: one device a family, and for each peer a neighbour entry, a forwarding entry and a route (specification,
//! section 5.1). With `DirectRouting`, peers on the same link get a plain route instead.

use std::net::IpAddr;

use super::{Context, Refusal, host_gw};
use crate::config::{Config, VXLAN_PORT, VxlanConfig};
use crate::desired::{Fdb, Link, LinkKind, Neigh, Object, ROUTE_PROTOCOL, Route, route_metric};
use crate::json::Fields;
use crate::lease::Peer;
use crate::net::{Cidr, Family, IfName, Mac, PerFamily, Subnet, Vni};
use crate::node::Node;

/// Bytes that VXLAN adds to a packet: the outer IP header (IPv4 20, IPv6 40), UDP (8) and VXLAN (8) headers and the
/// inner Ethernet header (14).
fn overhead(family: Family) -> u32 {
    match family {
        Family::V4 => 50,
        Family::V6 => 70,
    }
}

/// The vxlan backend of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    config: VxlanConfig,
    /// Bytes that an outer packet may have.
    outer_mtu: u32,
    /// The VTEP's link-layer address of each enabled family.
    macs: PerFamily<Mac>,
    /// The devices' names, IPv4's first.
    devices: [IfName; 2],
}

/// The device's name: `flannel.<VNI>`, or `flannel-v6.<VNI>`.
pub fn device_name(family: Family, vni: Vni) -> IfName {
    let stem = match family {
        Family::V4 => "flannel",
        Family::V6 => "flannel-v6",
    };
    // The longest name is shortened: flannel-v6.16777215 exceeds 15 bytes, which the kernel would refuse.
    let mut name = format!("{stem}.{vni}");
    name.truncate(15);
    name.parse().expect("it has 9 to 15 bytes, none of them special")
}

impl Vxlan {
    pub(super) fn new(vxlan: &VxlanConfig, config: &Config, node: &Node, mut macs: PerFamily<Mac>) -> Vxlan {
        for family in Family::ALL {
            if config.network(family).is_none() {
                macs.set(family, None);
            }
        }
        // More than the interface carries would be promised in vain; the kernel clamps the device as well.
        let outer_mtu = vxlan.mtu.unwrap_or(node.mtu).min(node.mtu);
        let devices = Family::ALL.map(|family| device_name(family, vxlan.vni));
        Vxlan { config: vxlan.clone(), outer_mtu, macs, devices }
    }

    /// The link-layer addresses of this host's VTEPs.
    pub(super) fn macs(&self) -> PerFamily<Mac> {
        self.macs
    }

    fn device(&self, family: Family) -> IfName {
        let [v4, v6] = self.devices;
        if family == Family::V4 { v4 } else { v6 }
    }

    /// The MTU for pods. With both families it is IPv4's, as upstream publishes it: pods of a bridge must agree on one,
    /// and while a cluster is switched those of Go nodes have that. IPv6 packets that do not fit are answered with
    /// "packet too big" by the host.
    pub(super) fn mtu(&self) -> u32 {
        self.device_mtu(if self.macs.v4.is_some() { Family::V4 } else { Family::V6 })
    }

    /// The device's MTU; the kernel would clamp it to the same.
    fn device_mtu(&self, family: Family) -> u32 {
        self.outer_mtu.saturating_sub(overhead(family))
    }

    /// `{"VNI":1,"VtepMAC":"…"}` a family: compact, VtepMAC last, because upstream splits the text to find it.
    pub(super) fn backend_data(&self) -> PerFamily<Box<str>> {
        let mut data = PerFamily::default();
        for (family, mac) in self.macs.iter() {
            data.set(family, Some(format!("{{\"VNI\":{},\"VtepMAC\":\"{mac}\"}}", self.config.vni).into()));
        }
        data
    }

    pub(super) fn node_objects(&self, context: Context<'_>) -> Vec<Object> {
        let mut objects = Vec::new();
        for (family, mac) in self.macs.iter() {
            let (Some(local), Some(own)) = (context.node.addrs.get(family), context.own.subnets().get(family)) else { continue };
            let name = self.device(family);
            let kind = LinkKind::Vxlan {
                vni: self.config.vni,
                port: self.config.port.unwrap_or(VXLAN_PORT),
                local: *local,
                lower: context.node.ext,
                gbp: self.config.gbp,
                learning: self.config.learning,
            };
            objects.push(Object::Link(Box::new(Link { name, kind, mac: *mac, mtu: self.device_mtu(family), up: true })));
            objects.push(Object::Addr(name, Cidr { addr: own.network(), len: family.bits() }));
            objects.push(Object::Sysctl(format!("net/ipv6/conf/{name}/accept_ra"), "0".to_owned()));
        }
        objects
    }

    pub(super) fn peer_objects(
        &self,
        context: Context<'_>,
        network: Subnet,
        subnet: Subnet,
        public: IpAddr,
        peer: &Peer,
    ) -> Result<Vec<Object>, Refusal> {
        let family = subnet.family();
        if self.config.direct_routing && context.node.is_on_link(public) {
            return host_gw::route(context.node, network, subnet, public).map(|route| vec![route]);
        }
        let mac = vtep_mac(peer, family).map_err(Refusal::BadData)?;
        if self.macs.get(family) == Some(&mac) {
            return Err(Refusal::OwnMac(mac));
        }
        let link = self.device(family);
        // The peer's subnet address stands for its VTEP; nothing else has it.
        let vtep = subnet.network();
        Ok(vec![
            Object::Fdb(Fdb { link, mac, dst: public }),
            Object::Neigh(Neigh { link, ip: vtep, mac }),
            Object::Route(Route {
                dst: subnet,
                metric: route_metric(network, subnet),
                via: Some(vtep),
                dev: link,
                onlink: true,
                protocol: ROUTE_PROTOCOL,
            }),
        ])
    }
}

/// The VTEP's link-layer address that a peer published for a family.
///
/// # Errors
/// What is wrong with the peer's data, as text.
pub fn vtep_mac(peer: &Peer, family: Family) -> Result<Mac, String> {
    let data = peer.backend_data.get(family).ok_or("there is none")?;
    let fields = Fields::parse(data).map_err(|error| error.to_string())?;
    // VNI is decoded for its type and otherwise ignored, as upstream does; very old nodes omit it.
    fields.get::<u32>("vni").map_err(|error| format!("VNI: {error}"))?;
    let text = fields.text("vtepmac").map_err(|error| format!("VtepMAC: {error}"))?.ok_or("VtepMAC is missing")?;
    let mac: Mac = text.parse().map_err(|error| format!("VtepMAC: {error}"))?;
    if !mac.is_unicast() {
        return Err(format!("VtepMAC: {mac} is not the address of a station"));
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tests::check;
    use expect_test::expect;

    const PEER: &str =
        r#"{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:02"}}"#;
    const FAR: &str =
        r#"{"PublicIP":"198.51.100.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"vni":7,"vtepmac":"0E:00:00:00:00:03"}}"#;

    #[test]
    fn a_peer_is_a_neighbour_a_forwarding_entry_and_a_route() {
        check(
            r#"{"Type":"vxlan"}"#,
            &[("10.244.2.0-24", PEER), ("10.244.3.0-24", FAR)],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}}
                mtu 1450
                link flannel.1 0e:00:00:00:00:01 mtu 1450 up vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0 nolearning
                addr 10.244.1.0/32 dev flannel.1
                sysctl net/ipv6/conf/flannel.1/accept_ra = 0
                10.244.2.0-24:
                  fdb 0e:00:00:00:00:02 dst 192.0.2.2 dev flannel.1
                  neigh 10.244.2.0 lladdr 0e:00:00:00:00:02 dev flannel.1
                  route 10.244.2.0/24 via 10.244.2.0 dev flannel.1 metric 2 onlink
                10.244.3.0-24:
                  fdb 0e:00:00:00:00:03 dst 198.51.100.3 dev flannel.1
                  neigh 10.244.3.0 lladdr 0e:00:00:00:00:03 dev flannel.1
                  route 10.244.3.0/24 via 10.244.3.0 dev flannel.1 metric 3 onlink
            "#]],
        );
    }

    #[test]
    fn direct_routing_takes_the_link_where_there_is_one() {
        check(
            r#"{"Type":"vxlan","VNI":7,"Port":4789,"MTU":1400,"GBP":true,"Learning":true,"DirectRouting":true}"#,
            &[("10.244.2.0-24", PEER), ("10.244.3.0-24", FAR)],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":7,"VtepMAC":"0e:00:00:00:00:01"}}
                mtu 1350
                link flannel.7 0e:00:00:00:00:01 mtu 1350 up vxlan id 7 dstport 4789 local 192.0.2.1 dev eth0 learning gbp
                addr 10.244.1.0/32 dev flannel.7
                sysctl net/ipv6/conf/flannel.7/accept_ra = 0
                10.244.2.0-24:
                  route 10.244.2.0/24 via 192.0.2.2 dev eth0 metric 2
                10.244.3.0-24:
                  fdb 0e:00:00:00:00:03 dst 198.51.100.3 dev flannel.7
                  neigh 10.244.3.0 lladdr 0e:00:00:00:00:03 dev flannel.7
                  route 10.244.3.0/24 via 10.244.3.0 dev flannel.7 metric 3 onlink
            "#]],
        );
    }

    #[test]
    fn both_families_have_their_own_device() {
        check(
            r#"{"Type":"vxlan"}"#,
            &[(
                "10.244.2.0-24&fc00:0:0:2::-64",
                r#"{"PublicIP":"192.0.2.2","PublicIPv6":"2001:db8::2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:02"},"BackendV6Data":{"VNI":1,"VtepMAC":"0e:00:00:00:06:02"}}"#,
            )],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"},"BackendV6Data":{"VNI":1,"VtepMAC":"0e:00:00:00:06:01"}}
                mtu 1450
                link flannel.1 0e:00:00:00:00:01 mtu 1450 up vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0 nolearning
                addr 10.244.1.0/32 dev flannel.1
                sysctl net/ipv6/conf/flannel.1/accept_ra = 0
                link flannel-v6.1 0e:00:00:00:06:01 mtu 1430 up vxlan id 1 dstport 8472 local 2001:db8::1 dev eth0 nolearning
                addr fc00:0:0:1::/128 dev flannel-v6.1
                sysctl net/ipv6/conf/flannel-v6.1/accept_ra = 0
                10.244.2.0-24&fc00:0:0:2::-64:
                  fdb 0e:00:00:00:00:02 dst 192.0.2.2 dev flannel.1
                  neigh 10.244.2.0 lladdr 0e:00:00:00:00:02 dev flannel.1
                  route 10.244.2.0/24 via 10.244.2.0 dev flannel.1 metric 2 onlink
                  fdb 0e:00:00:00:06:02 dst 2001:db8::2 dev flannel-v6.1
                  neigh fc00:0:0:2:: lladdr 0e:00:00:00:06:02 dev flannel-v6.1
                  route fc00:0:0:2::/64 via fc00:0:0:2:: dev flannel-v6.1 metric 1024 onlink
            "#]],
        );
    }

    #[test]
    fn data_that_cannot_be_used_is_named() {
        let data = |data: &str| format!(r#"{{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{data}}}"#);
        let refused = |text: &str| vtep_mac(&crate::wire::parse_value(text.as_bytes()).unwrap(), Family::V4).unwrap_err();
        assert_eq!(refused(&data("null")), "there is none");
        assert_eq!(refused(&data("7")), "invalid type: integer `7`, expected a JSON object at line 1 column 1");
        assert_eq!(refused(&data("{}")), "VtepMAC is missing");
        assert_eq!(
            refused(&data(r#"{"VNI":-1,"VtepMAC":"0e:00:00:00:00:02"}"#)),
            "VNI: invalid value: integer `-1`, expected u32 at line 1 column 2"
        );
        assert_eq!(refused(&data(r#"{"VtepMAC":"zz"}"#)), "VtepMAC: \"zz\" is not an Ethernet address, such as 0e:1f:2a:3b:4c:5d");
        assert_eq!(refused(&data(r#"{"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#)), "VtepMAC: ff:ff:ff:ff:ff:ff is not the address of a station");
    }

    #[test]
    fn an_mtu_beyond_the_interfaces_is_the_interfaces() {
        check(
            r#"{"Type":"vxlan","MTU":9000}"#,
            &[],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}}
                mtu 1450
                link flannel.1 0e:00:00:00:00:01 mtu 1450 up vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0 nolearning
                addr 10.244.1.0/32 dev flannel.1
                sysctl net/ipv6/conf/flannel.1/accept_ra = 0
            "#]],
        );
    }

    #[test]
    fn device_names_fit() {
        assert_eq!(device_name(Family::V4, Vni::new(1).unwrap()).as_str(), "flannel.1");
        assert_eq!(device_name(Family::V4, Vni::new(Vni::MAX).unwrap()).as_str(), "flannel.1677721");
    }
}
