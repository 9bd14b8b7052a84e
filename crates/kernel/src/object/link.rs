//! Applies and reads links of the daemon: the devices of the backends, including the udp backend's TUN device with its data path.

use std::collections::BTreeMap;
use std::net::IpAddr;

use flannel::IfName;
use flannel::object::{Link, LinkKind, Object};
use flannel::wireguard::PublicKey;

use super::{Change, Reading, io_error};
use crate::link::LinkInfo;
use crate::netlink::NetlinkError;
use crate::tunnel::Tunnel;
use crate::wireguard::Device;
use crate::{Kernel, link};

pub(super) fn apply(kernel: &mut Kernel, change: Change, wanted: &Link) -> Result<(), NetlinkError> {
    kernel.indexes.clear();
    if change == Change::Delete {
        return delete(kernel, wanted);
    }
    match wanted.kind {
        LinkKind::Udp { local, port } => start_tunnel(kernel, wanted, local, port)?,
        LinkKind::WireGuard { port, public_key } => {
            let set = set_wireguard(kernel, wanted, port, public_key);
            set.map_err(|error| explain(kernel, wanted, error))?;
        }
        LinkKind::Vxlan { .. } | LinkKind::Ipip { .. } | LinkKind::Other(_) => {}
    }
    link::set(&mut kernel.route, wanted).map_err(|error| explain(kernel, wanted, error))
}

/// Names what has the VNI, the UDP port or the address already that a device was refused for.
fn explain(kernel: &mut Kernel, wanted: &Link, error: NetlinkError) -> NetlinkError {
    let Some(errno @ (libc::EEXIST | libc::EADDRINUSE)) = error.errno() else { return error };
    if let LinkKind::WireGuard { port, .. } = wanted.kind {
        let message = format!(
            "another program has UDP port {port} (`ss -ulnp sport = :{port}` names it; a WireGuard device has no program, `wg` lists it): \
             stop it, or set Backend.ListenPort or Backend.ListenPortV6 of the network config"
        );
        return if errno == libc::EADDRINUSE { NetlinkError::Refused { errno, message } } else { error };
    }
    let links = link::list(&mut kernel.route).unwrap_or_default();
    if let LinkKind::Ipip { local } = wanted.kind {
        let rival = links.iter().find(|link| link.name != wanted.name && link.ipip == Some(local));
        let message = |rival: &LinkInfo| {
            format!("IPIP device {0} has the local address {local} and no remote address, too: delete it (ip link del {0})", rival.name)
        };
        return rival.map_or(error, |rival| NetlinkError::Refused { errno, message: message(rival) });
    }
    let LinkKind::Vxlan { vni, port, .. } = &wanted.kind else { return error };
    let others = links.iter().filter(|link| link.name != wanted.name);
    let rivals =
        others.filter_map(|link| Some((link.name, link.vxlan?))).filter(|(_, vxlan)| vxlan.vni == vni.get() || vxlan.port == *port);
    let rivals: Vec<String> =
        rivals.map(|(name, vxlan)| format!("VXLAN device {name} has VNI {} and UDP port {}", vxlan.vni, vxlan.port)).collect();
    let message = match (rivals.is_empty(), errno) {
        (false, _) => format!(
            "{}: delete it, or set Backend.VNI or Backend.Port of the network config to others (VNI {vni}, port {port} now)",
            rivals.join(", ")
        ),
        (true, libc::EADDRINUSE) => format!(
            "another program has UDP port {port} (`ss -ulnp sport = :{port}` names it): stop it, or set Backend.Port of the network config"
        ),
        _ => return error,
    };
    NetlinkError::Refused { errno, message }
}

fn delete(kernel: &mut Kernel, found: &Link) -> Result<(), NetlinkError> {
    if kernel.tunnel.take_if(|tunnel| tunnel.name == found.name).is_some() || kernel.wireguard.stop(found.name) {
        return Ok(());
    }
    if found.kind == LinkKind::Other("tun".to_owned()) {
        let message = format!("{} belongs to another process, possibly a second flanneld", found.name);
        return Err(NetlinkError::Refused { errno: libc::EBUSY, message });
    }
    link::delete(&mut kernel.route, found.name)
}

/// Creates a WireGuard device, unless there is one, and gives it its key and port. A device that has them is not disturbed. If the kernel
/// has no WireGuard, this process carries the device.
fn set_wireguard(kernel: &mut Kernel, wanted: &Link, port: u16, public_key: PublicKey) -> Result<(), NetlinkError> {
    match link::get(&mut kernel.route, wanted.name)? {
        Some(found) if found.kind == "wireguard" => {}
        Some(found) if found.kind == "tun" && kernel.wireguard.is_carried(wanted.name) => {
            return kernel.wireguard.carry(wanted.name, public_key, port, wanted.mtu);
        }
        Some(found) => {
            let message = format!("{} exists and is no WireGuard device, but {:?}: delete it", wanted.name, found.kind);
            return Err(NetlinkError::Refused { errno: libc::EEXIST, message });
        }
        None => match link::create_wireguard(&mut kernel.route, wanted) {
            Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => {
                return kernel.wireguard.carry(wanted.name, public_key, port, wanted.mtu);
            }
            created => {
                created?;
                kernel.wireguard.stop(wanted.name);
            }
        },
    }
    kernel.wireguard.set_device(wanted.name, public_key, port)
}

/// Starts the udp backend's data path, unless it is running and its device exists.
fn start_tunnel(kernel: &mut Kernel, wanted: &Link, local: IpAddr, port: u16) -> Result<(), NetlinkError> {
    let is_present = link::get(&mut kernel.route, wanted.name)?.is_some();
    let same = |tunnel: &Tunnel| (tunnel.name, tunnel.local, tunnel.port) == (wanted.name, local, port);
    if is_present && kernel.tunnel.as_ref().is_some_and(|tunnel| same(tunnel) && tunnel.is_running()) {
        return Ok(());
    }
    // The entries are kept when the device is recreated.
    let entries = kernel.tunnel.take().map(|tunnel| tunnel.entries()).unwrap_or_default();
    let tunnel = Tunnel::start(wanted.name, local, port, &kernel.drops).map_err(io_error)?;
    entries.into_iter().for_each(|(subnet, host)| tunnel.set(subnet, Some(host)));
    kernel.tunnel = Some(tunnel);
    Ok(())
}

pub(super) fn observe(kernel: &Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) {
    for info in reading.ours() {
        let mut object = link::to_object(info, |index| reading.name(index));
        if let Some(device) = reading.wireguard.get(&info.name)
            && let (Some(port), Some(public_key)) = (device.port, device.public_key)
        {
            object.kind = LinkKind::WireGuard { port, public_key };
        }
        if let Some(tunnel) = kernel.running_tunnel(info) {
            object.kind = LinkKind::Udp { local: tunnel.local, port: tunnel.port };
        }
        found.push(Object::Link(Box::new(object)));
    }
}

impl Kernel {
    /// Reads the WireGuard devices in scope.
    pub(super) fn wireguard_devices(&mut self, reading: &Reading<'_>) -> Result<BTreeMap<IfName, Device>, NetlinkError> {
        let mut devices = BTreeMap::new();
        let is_one = |info: &&LinkInfo| info.kind == "wireguard" || info.kind == "tun" && self.wireguard.is_carried(info.name);
        let names: Vec<IfName> = reading.ours().filter(is_one).map(|info| info.name).collect();
        for name in names {
            match self.wireguard.device(name) {
                Ok(device) => drop(devices.insert(name, device)),
                // It was deleted meanwhile.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(devices)
    }
}
