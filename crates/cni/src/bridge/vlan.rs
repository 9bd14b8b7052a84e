//! VLANs of a bridge port (IEEE 802.1Q): the untagged VLAN of the container, and those of a trunk.

use ::flannel::object::bridge::Port;
use kernel::link::{self, LinkInfo, VethEnd};
use kernel::netlink::Socket;
use serde_json::{Map, Value};

use super::failed;
use crate::lock;
use crate::protocol::{CniError, array, boolean, number};

/// The VLAN that a port has by default.
const DEFAULT: u16 = 1;

/// The VLANs of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Vlans {
    own: Option<u16>,
    /// First and last identifiers.
    trunk: Vec<(u16, u16)>,
    keep_default: bool,
}

impl Vlans {
    pub(super) fn new(conf: &Map<String, Value>) -> Result<Option<Vlans>, CniError> {
        let identifier = |what: &str, id: u32| {
            let id = u16::try_from(id).ok().filter(|id| (1..=4094).contains(id));
            id.ok_or_else(|| CniError::config(format!("{what}: a VLAN identifier is 1 to 4094")))
        };
        let own = match number(conf, "vlan")?.unwrap_or(0) {
            0 => None,
            id => Some(identifier("vlan", id)?),
        };
        let mut trunk = Vec::new();
        for entry in array(conf, "vlanTrunk")?.map(Vec::as_slice).unwrap_or_default() {
            let map = entry.as_object().ok_or_else(|| CniError::config("vlanTrunk: each entry must be an object"))?;
            match (number(map, "id")?, number(map, "minID")?, number(map, "maxID")?) {
                (Some(id), None, None) => {
                    let id = identifier("vlanTrunk.id", id)?;
                    trunk.push((id, id));
                }
                (None, Some(first), Some(last)) => {
                    let range = (identifier("vlanTrunk.minID", first)?, identifier("vlanTrunk.maxID", last)?);
                    if range.0 > range.1 {
                        return Err(CniError::config(format!("vlanTrunk: minID {first} is above maxID {last}")));
                    }
                    trunk.push(range);
                }
                _ => return Err(CniError::config("vlanTrunk: each entry needs id, or minID and maxID")),
            }
        }
        let keep_default = boolean(conf, "preserveDefaultVlan")?.unwrap_or(true);
        Ok((own.is_some() || !trunk.is_empty()).then_some(Vlans { own, trunk, keep_default }))
    }

    /// The VLANs of the link that holds the gateway's address, if that is not the bridge itself.
    pub(super) fn of_gateway(&self) -> Option<Vlans> {
        self.own.map(|own| Vlans { own: Some(own), trunk: Vec::new(), keep_default: self.keep_default })
    }

    pub(super) fn set_port(&self, host: &mut Socket, port: &LinkInfo) -> Result<(), CniError> {
        let act = || format!("set the VLANs of {}", port.name);
        let vlans = |first: u16, last: u16, untagged: bool| link::Vlans { first, last, untagged };
        if !self.keep_default {
            match link::delete_vlans(host, port.index, vlans(DEFAULT, DEFAULT, true)) {
                Err(error) if !error.is_not_found() => return Err(failed(act())(error)),
                _ => {}
            }
        }
        let own = match (self.own, self.trunk.is_empty()) {
            (Some(own), _) => Some(own),
            // A trunk alone: untagged frames belong to the default VLAN.
            (None, false) => Some(DEFAULT),
            (None, true) => None,
        };
        if let Some(own) = own {
            link::add_vlans(host, port.index, vlans(own, own, true)).map_err(failed(act()))?;
        }
        for (first, last) in &self.trunk {
            link::add_vlans(host, port.index, vlans(*first, *last, false)).map_err(failed(act()))?;
        }
        Ok(())
    }
}

/// The link that holds a VLAN's gateway address, `<bridge>.<vlan>`: one end of a veth pair whose other end is a port of
/// the bridge in that VLAN.
pub(super) fn gateway(host: &mut Socket, bridge: &LinkInfo, vlans: &Vlans, mtu: u32) -> Result<LinkInfo, CniError> {
    let _lock = lock::host()?;
    let vlan = vlans.own.unwrap_or(DEFAULT);
    // The name is not truncated: the truncated names of two VLANs could collide.
    let name = format!("{}.{vlan}", bridge.name)
        .parse()
        .map_err(|error| CniError::config(format!("bridge: no name for the gateway's interface of VLAN {vlan}: {error}")))?;
    let read = |host: &mut Socket, index: u32| {
        let found = link::get_index(host, index).map_err(failed("read the VLAN's links"))?;
        found.ok_or_else(|| CniError::failed(format!("a link of {name} was deleted at once")))
    };
    if link::get(host, name).map_err(failed(format!("read {name}")))?.is_none() {
        let other = format!("vlan{:08x}", fastrand::u32(..)).parse().expect("it has 12 bytes");
        let end = |name| VethEnd { name, mac: None, netns: None };
        match link::create_veth(host, mtu, end(name), end(other)) {
            // Another ADD created it at the same time.
            Err(error) if !error.is_exists() => return Err(failed(format!("create {name}"))(error)),
            _ => {}
        }
    }
    let holder = link::get(host, name).map_err(failed(format!("read {name}")))?;
    let holder = holder.ok_or_else(|| CniError::failed(format!("{name} was deleted at once")))?;
    let port = read(host, holder.link)?;
    if port.master != bridge.index {
        link::enslave(host, port.index, bridge.index, Port::default()).map_err(failed(format!("make {} a port", port.name)))?;
    }
    // Done even if the pair existed: the plugin that created it may have been killed before this step.
    vlans.set_port(host, &port)?;
    if !holder.up {
        link::set_up(host, holder.index, true).map_err(failed(format!("set {name} up")))?;
    }
    read(host, holder.index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> String {
        let Ok(Value::Object(conf)) = serde_json::from_str(text) else { panic!("{text}") };
        Vlans::new(&conf).map_or_else(|error| error.msg, |vlans| format!("{vlans:?}"))
    }

    #[test]
    fn vlans_are_validated() {
        assert_eq!(read(r#"{"vlan":0}"#), "None");
        assert_eq!(read(r#"{"vlan":100,"preserveDefaultVlan":false}"#), "Some(Vlans { own: Some(100), trunk: [], keep_default: false })");
        assert_eq!(
            read(r#"{"vlanTrunk":[{"id":7},{"minID":10,"maxID":20}]}"#),
            "Some(Vlans { own: None, trunk: [(7, 7), (10, 20)], keep_default: true })"
        );
        assert_eq!(read(r#"{"vlan":4095}"#), "vlan: a VLAN identifier is 1 to 4094");
        assert_eq!(read(r#"{"vlanTrunk":[{"minID":20,"maxID":10}]}"#), "vlanTrunk: minID 20 is above maxID 10");
        assert_eq!(read(r#"{"vlanTrunk":[{"minID":20}]}"#), "vlanTrunk: each entry needs id, or minID and maxID");
        assert_eq!(read(r#"{"vlanTrunk":[{"id":0}]}"#), "vlanTrunk.id: a VLAN identifier is 1 to 4094");
    }
}
