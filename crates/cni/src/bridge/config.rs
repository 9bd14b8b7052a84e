//! The bridge plugin's configuration, read and validated.

use ::flannel::object::bridge::Port;
use ::flannel::{IfName, Mac};
use serde_json::{Map, Value};

use super::vlan::Vlans;
use crate::protocol::{CniError, Request, boolean, new_interface, number, object, string, unicast_mac};

/// The firewall that masquerades the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MasqBackend {
    /// The reference plugins' nftables table.
    Nftables,
    /// An iptables chain.
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
    /// Detect duplicates of IPv6 addresses?
    pub(super) dad: bool,
    /// Leave the container's end down?
    pub(super) leave_down: bool,
    pub(super) mac: Option<Mac>,
    /// The IPAM plugin's name; `None` for an attachment without addresses.
    pub(super) ipam: Option<String>,
}

impl Config {
    pub(super) fn new(request: &Request<'_>) -> Result<Config, CniError> {
        let conf = request.conf;
        let flag = |name: &str| boolean(conf, name).map(Option::unwrap_or_default);
        let bridge = string(conf, "bridge")?.unwrap_or("cni0");
        let is_default_gateway = flag("isDefaultGateway")?;
        let ipam = object(conf, "ipam")?.map(|ipam| string(ipam, "type")).transpose()?.flatten();
        let ipam = ipam.map(ToOwned::to_owned);
        // nftables needs no external program. The reference plugins prefer iptables if it is installed.
        let backend = match string(conf, "ipMasqBackend")?.unwrap_or("nftables") {
            "nftables" => MasqBackend::Nftables,
            "iptables" => MasqBackend::Iptables,
            other => return Err(CniError::config(format!("ipMasqBackend: {other:?} is neither \"iptables\" nor \"nftables\""))),
        };
        let (hairpin, promiscuous) = (flag("hairpinMode")?, flag("promiscMode")?);
        if hairpin && promiscuous {
            return Err(CniError::config("hairpinMode, promiscMode: at most one of them may be true"));
        }
        let leave_down = flag("disableContainerInterface")?;
        if leave_down && ipam.is_some() {
            return Err(CniError::config("disableContainerInterface: an interface that stays down can have no ipam"));
        }
        Ok(Config {
            bridge: new_interface(bridge).map_err(|error| CniError::config(format!("bridge: {error}")))?,
            is_gateway: flag("isGateway")? || is_default_gateway,
            is_default_gateway,
            force_address: flag("forceAddress")?,
            ip_masq: flag("ipMasq")?.then_some(backend),
            mtu: mtu(conf)?,
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

/// The MTU of bridge and veth pair; 0 leaves it to the kernel.
fn mtu(conf: &Map<String, Value>) -> Result<u32, CniError> {
    const VALID: std::ops::RangeInclusive<u32> = 68..=65_535;
    match number(conf, "mtu")?.unwrap_or(0) {
        mtu if mtu == 0 || VALID.contains(&mtu) => Ok(mtu),
        mtu => Err(CniError::config(format!("mtu: {mtu} is out of range {VALID:?}"))),
    }
}

/// The container's MAC: from `runtimeConfig`, else from `args.cni`, else from `CNI_ARGS`.
fn mac(request: &Request<'_>) -> Result<Option<Mac>, CniError> {
    let runtime = request.runtime_config()?.map(|runtime| string(runtime, "mac")).transpose()?.flatten();
    let args = request.cni_args()?.map(|cni| string(cni, "mac")).transpose()?.flatten();
    let text = match runtime.or(args) {
        Some(text) => Some(text),
        None => request.arg("MAC")?,
    };
    text.map(|text| unicast_mac("mac", text)).transpose()
}
