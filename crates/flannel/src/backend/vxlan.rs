//! The vxlan backend: one device per family, and for each peer a neighbour entry, an FDB entry and a route (specification,
//! section 5.1). With `DirectRouting`, a peer on the same link gets a plain route instead.

use super::outer_mtu::OuterMtu;
use super::{Admitted, Context, Driver, Local, Part, Problem, Refusal, each_family, host_gw};
use crate::config::{ConfigError, invalid, port, typed};
use crate::json::Fields;
use crate::lease::{LeaseKey, Peer};
use crate::net::{Cidr, Family, IfName, Mac, PerFamily, Vni};
use crate::node::Node;
use crate::object::{Addr, Fdb, Link, LinkKind, Neigh, Object, ROUTE_PROTOCOL, Route, Sysctl, route_metric};
use crate::probe::Point;

/// The default UDP port: that of the Linux kernel (`drivers/net/vxlan`), which predates the 4789 of RFC 7348.
const PORT: u16 = 8472;

/// The vxlan backend with its settings (specification, section 2.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// VXLAN network identifier.
    vni: Vni,
    /// UDP destination port.
    port: u16,
    mtu: OuterMtu,
    /// Enables the group-based policy extension.
    gbp: bool,
    /// Enables source-address learning.
    learning: bool,
    /// Uses plain routes to peers on the same L2 network.
    direct_routing: bool,
    /// The names of the VXLAN devices.
    devices: Devices,
}

/// The name of each family's VXLAN device.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Devices {
    v4: IfName,
    v6: IfName,
}

/// The bytes that VXLAN adds to a packet: the outer IP header (IPv4 20, IPv6 40), the UDP (8) and VXLAN (8) headers and the
/// inner Ethernet header (14).
fn overhead(family: Family) -> u32 {
    match family {
        Family::V4 => 50,
        Family::V6 => 70,
    }
}

/// The device name: `flannel.<VNI>` for IPv4, `flannel-v6.<VNI>` for IPv6.
fn device_name(family: Family, vni: Vni) -> IfName {
    let stem = match family {
        Family::V4 => "flannel",
        Family::V6 => "flannel-v6",
    };
    // The kernel limits interface names to 15 bytes, which long VNIs exceed: flannel-v6.16777215 is truncated. The truncated
    // names of different VNIs can collide.
    let mut name = format!("{stem}.{vni}");
    name.truncate(15);
    name.parse().expect("the name has 9 to 15 bytes and no special characters")
}

impl Vxlan {
    pub(super) fn parse(section: &Fields<'_>) -> Result<Vxlan, ConfigError> {
        let vni = typed::<i64>(section, "Backend.VNI", "vni")?.unwrap_or(1);
        let vni = u32::try_from(vni)
            .ok()
            .and_then(Vni::new)
            .ok_or_else(|| invalid("Backend.VNI", format!("{vni} is out of range: a VXLAN network identifier is 0 to {}", Vni::MAX)))?;
        Ok(Vxlan {
            vni,
            port: port(section, PORT)?,
            mtu: OuterMtu::parse(section, overhead(Family::V4))?,
            gbp: typed(section, "Backend.GBP", "gbp")?.unwrap_or(false),
            learning: typed(section, "Backend.Learning", "learning")?.unwrap_or(false),
            direct_routing: typed(section, "Backend.DirectRouting", "directrouting")?.unwrap_or(false),
            devices: Devices { v4: device_name(Family::V4, vni), v6: device_name(Family::V6, vni) },
        })
    }

    fn link(&self, family: Family) -> IfName {
        match family {
            Family::V4 => self.devices.v4,
            Family::V6 => self.devices.v6,
        }
    }

    /// The MTU of the device, in bytes. The kernel would clamp a larger one to the same value.
    fn device_mtu(&self, node: &Node, family: Family) -> u32 {
        self.mtu.inner(node, overhead(family))
    }

    fn peer_objects(&self, context: Context<'_>, admitted: Admitted, peer: &Peer) -> Result<Vec<Object>, Refusal> {
        let Admitted { network, subnet, public } = admitted;
        let family = subnet.family();
        if self.direct_routing && context.local.node.is_on_link(public) {
            return host_gw::route(context.local.node, admitted).map(|route| vec![route]);
        }
        let (mac, vni) = vtep(peer, family).map_err(Refusal::BadData)?;
        if let Some(vni) = vni.filter(|vni| *vni != self.vni.get()) {
            return Err(Refusal::OtherVni(vni, self.vni));
        }
        if context.local.identity.macs.get(family) == Some(&mac) {
            return Err(Refusal::OwnMac(mac));
        }
        let link = self.link(family);
        // The network address of the peer's subnet stands for its VTEP: no pod has it.
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

impl Driver for Vxlan {
    fn name(&self) -> &'static str {
        "vxlan"
    }

    /// `{"VNI":1,"VtepMAC":"…"}` for each family: compact and with VtepMAC last, because upstream finds it by splitting the text.
    fn published_data(&self, local: Local<'_>) -> PerFamily<Box<str>> {
        let mut data = PerFamily::default();
        for (family, mac) in local.identity.macs.iter().filter(|(family, _)| local.config.network(*family).is_some()) {
            data.set(family, Some(format!("{{\"VNI\":{},\"VtepMAC\":\"{mac}\"}}", self.vni).into()));
        }
        data
    }

    fn annotates(&self, family: Family, peer: &Peer) -> bool {
        peer.backend_data.get(family).is_some()
    }

    /// In dual stack this is the MTU of IPv4, as upstream publishes it: all pods on a bridge need one MTU, and during a migration the
    /// pods of Go nodes have this one. The host answers IPv6 packets that do not fit with "packet too big".
    fn mtu(&self, local: Local<'_>) -> u32 {
        self.device_mtu(local.node, if local.config.networks.v4.is_some() { Family::V4 } else { Family::V6 })
    }

    fn path_mtu(&self, local: Local<'_>, family: Family) -> u32 {
        self.device_mtu(local.node, family).min(self.mtu(local))
    }

    fn problem(&self, local: Local<'_>, family: Family) -> Option<Problem> {
        self.mtu.problem(local.node, family, overhead(family))
    }

    fn notes(&self, node: &Node) -> Vec<String> {
        self.mtu.notes(node)
    }

    fn tunnel(&self) -> (Option<Vni>, Option<u16>) {
        (Some(self.vni), Some(self.port))
    }

    fn has_unique_data(&self) -> bool {
        true
    }

    fn probe_point(&self) -> Option<Point> {
        Some(Point::Device)
    }

    fn node_objects(&self, context: Context<'_>) -> Vec<Object> {
        let Local { config, node, identity } = context.local;
        let mut objects = Vec::new();
        for (family, mac) in identity.macs.iter().filter(|(family, _)| config.network(*family).is_some()) {
            let (Some(local), Some(own)) = (node.addrs.get(family), context.own.subnets().get(family)) else { continue };
            let link = self.link(family);
            let kind =
                LinkKind::Vxlan { vni: self.vni, port: self.port, local: *local, lower: node.ext, gbp: self.gbp, learning: self.learning };
            objects.push(Object::Link(Box::new(Link { name: link, kind, mac: *mac, mtu: self.device_mtu(node, family), up: true })));
            objects.push(Object::Addr(Addr { link, cidr: Cidr { addr: own.network(), len: family.bits() } }));
            objects.push(Object::Sysctl(Sysctl { path: format!("net/ipv6/conf/{link}/accept_ra"), value: "0".to_owned() }));
        }
        objects
    }

    fn peer_part(&self, context: Context<'_>, key: &LeaseKey, peer: &Peer) -> Part {
        each_family(context, key, peer, |admitted| self.peer_objects(context, admitted, peer))
    }

    fn device(&self, family: Family) -> Option<IfName> {
        Some(self.link(family))
    }

    fn vtep(&self, family: Family) -> Option<IfName> {
        Some(self.link(family))
    }

    fn has_plain_routes(&self) -> bool {
        self.direct_routing
    }
}

/// Reads the VTEP MAC that a peer published for a family.
///
/// # Errors
/// The reason why the peer's data cannot be used.
pub(super) fn vtep(peer: &Peer, family: Family) -> Result<(Mac, Option<u32>), String> {
    let data = peer.backend_data.get(family).ok_or("it is missing")?;
    let fields = Fields::parse(data).map_err(|error| error.to_string())?;
    // Very old nodes omit the VNI.
    let vni = fields.get::<u32>("vni").map_err(|error| format!("VNI: {error}"))?;
    let text = fields.text("vtepmac").map_err(|error| format!("VtepMAC: {error}"))?.ok_or("VtepMAC is missing")?;
    let mac: Mac = text.parse().map_err(|error| format!("VtepMAC: {error}"))?;
    if !mac.is_unicast() {
        return Err(format!("VtepMAC: {mac} is not a unicast address"));
    }
    Ok((mac, vni))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tests::check;
    use expect_test::expect;

    const PEER: &str =
        r#"{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:02"}}"#;
    const FAR: &str =
        r#"{"PublicIP":"198.51.100.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"vni":1,"vtepmac":"0E:00:00:00:00:03"}}"#;
    const OTHER_VNI: &str =
        r#"{"PublicIP":"192.0.2.4","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":7,"VtepMAC":"0e:00:00:00:00:04"}}"#;

    #[test]
    fn peer_gets_fdb_neigh_and_route() {
        check(
            r#"{"Type":"vxlan"}"#,
            &[("10.244.2.0-24", PEER), ("10.244.3.0-24", FAR), ("10.244.4.0-24", OTHER_VNI)],
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
                10.244.4.0-24:
                  refused: its VNI is 7, this host's is 1: restart flanneld on the host whose VNI differs from Backend.VNI in the store
            "#]],
        );
    }

    #[test]
    fn direct_routing_uses_plain_routes_on_the_same_link() {
        check(
            r#"{"Type":"vxlan","VNI":7,"Port":4789,"MTU":1400,"GBP":true,"Learning":true,"DirectRouting":true}"#,
            &[("10.244.2.0-24", PEER), ("10.244.3.0-24", &FAR.replace(r#""vni":1"#, r#""vni":7"#))],
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
    fn each_family_has_its_own_device() {
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
    fn unusable_data_is_refused_with_reason() {
        let data = |data: &str| format!(r#"{{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{data}}}"#);
        let refused = |text: &str| vtep(&crate::wire::parse_value(text.as_bytes()).unwrap(), Family::V4).unwrap_err();
        assert_eq!(refused(&data("null")), "it is missing");
        assert_eq!(refused(&data("7")), "invalid type: integer `7`, expected a JSON object at line 1 column 1");
        assert_eq!(refused(&data("{}")), "VtepMAC is missing");
        assert_eq!(
            refused(&data(r#"{"VNI":-1,"VtepMAC":"0e:00:00:00:00:02"}"#)),
            "VNI: invalid value: integer `-1`, expected u32 at line 1 column 2"
        );
        assert_eq!(refused(&data(r#"{"VtepMAC":"zz"}"#)), "VtepMAC: \"zz\" is not an Ethernet address, such as 0e:1f:2a:3b:4c:5d");
        assert_eq!(refused(&data(r#"{"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#)), "VtepMAC: ff:ff:ff:ff:ff:ff is not a unicast address");
    }

    #[test]
    fn mtu_is_limited_to_the_interface_mtu() {
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
    fn device_names_fit_in_15_bytes() {
        assert_eq!(device_name(Family::V4, Vni::new(1).unwrap()).as_str(), "flannel.1");
        assert_eq!(device_name(Family::V4, Vni::new(Vni::MAX).unwrap()).as_str(), "flannel.1677721");
    }
}
