//! The bridge plugin's configuration, read and validated.

use ::flannel::object::bridge::Port;
use ::flannel::{IfName, Mac};

use super::vlan::Vlans;
use crate::protocol::{CniError, Request, boolean, number, object, string};

/// In which form a container is masqueraded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MasqBackend {
    /// A rule of the reference plugins' nftables table.
    Nftables,
    /// A chain of iptables.
    Iptables,
}

/// The validated configuration.
pub(super) struct Config {
    pub(super) bridge: IfName,
    pub(super) is_gateway: bool,
    pub(super) is_default_gateway: bool,
    pub(super) force_address: bool,
    pub(super) ip_masq: Option<MasqBackend>,
    pub(super) mtu: u32,
    pub(super) port: Port,
    pub(super) promiscuous: bool,
    pub(super) vlans: Option<Vlans>,
    pub(super) spoofcheck: bool,
    /// Look for duplicates of IPv6 addresses?
    pub(super) dad: bool,
    /// Leave the container's end down?
    pub(super) leave_down: bool,
    pub(super) mac: Option<Mac>,
    /// The IPAM plugin's name; `None` for an attachment without addresses.
    pub(super) ipam: Option<String>,
}

impl Config {
    pub(super) fn new(request: &Request) -> Result<Config, CniError> {
        let conf = &request.conf;
        let flag = |name: &str| boolean(conf, name).map(Option::unwrap_or_default);
        let bridge = string(conf, "bridge")?.filter(|name| !name.is_empty()).unwrap_or("cni0");
        let is_default_gateway = flag("isDefaultGateway")?;
        let ipam = object(conf, "ipam")?.map(|ipam| string(ipam, "type")).transpose()?.flatten();
        let ipam = ipam.filter(|kind| !kind.is_empty()).map(ToOwned::to_owned);
        // nftables needs no program; the reference plugins take iptables where they have it.
        let backend = match string(conf, "ipMasqBackend")?.unwrap_or("nftables") {
            "nftables" => MasqBackend::Nftables,
            "iptables" => MasqBackend::Iptables,
            other => return Err(CniError::config(format!("ipMasqBackend: {other:?} is neither \"iptables\" nor \"nftables\""))),
        };
        let (hairpin, promiscuous) = (flag("hairpinMode")?, flag("promiscMode")?);
        if hairpin && promiscuous {
            return Err(CniError::config("hairpinMode, promiscMode: one of them at most may be true"));
        }
        let leave_down = flag("disableContainerInterface")?;
        if leave_down && ipam.is_some() {
            return Err(CniError::config("disableContainerInterface: an interface that stays down can have no ipam"));
        }
        Ok(Config {
            bridge: bridge.parse().map_err(|error| CniError::config(format!("bridge: {error}")))?,
            is_gateway: flag("isGateway")? || is_default_gateway,
            is_default_gateway,
            force_address: flag("forceAddress")?,
            ip_masq: flag("ipMasq")?.then_some(backend),
            mtu: number(conf, "mtu")?.unwrap_or(0),
            port: Port { hairpin, isolated: flag("portIsolation")? },
            promiscuous,
            vlans: Vlans::new(conf)?,
            spoofcheck: flag("macspoofchk")?,
            dad: flag("enabledad")?,
            leave_down,
            mac: mac(request)?,
            ipam,
        })
    }
}

/// The container's MAC: of the runtime, else of the arguments in the configuration, else of `CNI_ARGS`.
fn mac(request: &Request) -> Result<Option<Mac>, CniError> {
    let runtime = object(&request.conf, "runtimeConfig")?.map(|runtime| string(runtime, "mac")).transpose()?.flatten();
    let cni = object(&request.conf, "args")?.map(|args| object(args, "cni")).transpose()?.flatten();
    let args = cni.map(|cni| string(cni, "mac")).transpose()?.flatten();
    let text = match runtime.or(args).filter(|text| !text.is_empty()) {
        Some(text) => Some(text),
        None => request.arg("MAC")?,
    };
    text.map(|text| text.parse().map_err(|error| CniError::config(format!("mac: {error}")))).transpose()
}
