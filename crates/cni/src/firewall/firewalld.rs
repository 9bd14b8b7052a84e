//! firewalld: a container's addresses become sources of a zone, by default `trusted`, so that firewalld accepts their traffic.

use std::net::IpAddr;

use ::flannel::Family;

use super::dbus::{Bus, CallError, Method};
use crate::protocol::CniError;

const SERVICE: &str = "org.fedoraproject.FirewallD1";

/// A method of firewalld's zones.
fn zone(name: &'static str) -> Method {
    Method { service: SERVICE, path: "/org/fedoraproject/FirewallD1", interface: "org.fedoraproject.FirewallD1.zone", name }
}

/// A running firewalld.
pub(super) struct Firewalld(Bus);

impl Firewalld {
    /// Connects to firewalld. Fails if it does not run.
    pub(super) fn connect() -> Result<Firewalld, CallError> {
        let mut bus = Bus::system()?;
        let owner = Method {
            service: "org.freedesktop.DBus",
            path: "/org/freedesktop/DBus",
            interface: "org.freedesktop.DBus",
            name: "GetNameOwner",
        };
        bus.call(owner, &[SERVICE])?;
        Ok(Firewalld(bus))
    }

    /// Makes an address a source of a zone.
    pub(super) fn add(&mut self, zone_name: &str, ip: IpAddr) -> Result<(), CniError> {
        match self.0.call(zone("addSource"), &[zone_name, &source(ip)]) {
            // An earlier ADD added it.
            Err(CallError::Refused(text)) if text.contains("ZONE_ALREADY_SET") => Ok(()),
            Err(error) => Err(CniError::failed(format!("cannot make {ip} a source of firewalld's zone {zone_name:?}: {error}"))),
            Ok(_) => Ok(()),
        }
    }

    /// Removes an address from a zone, if it is a source of it.
    pub(super) fn remove(&mut self, zone_name: &str, ip: IpAddr) {
        match self.0.call(zone("removeSource"), &[zone_name, &source(ip)]) {
            Err(CallError::Refused(text)) if text.contains("UNKNOWN_SOURCE") => {}
            Err(error) => eprintln!("firewall: cannot remove {ip} from firewalld's zone {zone_name:?}: {error}"),
            Ok(_) => {}
        }
    }

    /// Is an address a source of a zone?
    pub(super) fn has(&mut self, zone_name: &str, ip: IpAddr) -> Result<bool, CniError> {
        let answer = self.0.call(zone("querySource"), &[zone_name, &source(ip)]);
        answer.map_err(|error| CniError::failed(format!("cannot query the sources of firewalld's zone {zone_name:?}: {error}")))
    }
}

fn source(ip: IpAddr) -> String {
    format!("{ip}/{}", Family::of(ip).bits())
}
