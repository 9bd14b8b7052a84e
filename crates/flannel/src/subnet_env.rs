//! Renders and parses `/run/flannel/subnet.env`, by which the daemon informs the CNI plugins and its next run (specification, sections
//! 1.6 and 7.2).

use thiserror::Error;

use crate::net::{Cidr, Family, PerFamily, Subnet};

/// The content of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The pod networks, IPv4 first. The daemon writes one per family; a file may list several.
    pub networks: Vec<Subnet>,
    /// This host's subnet of each enabled family.
    pub subnets: PerFamily<Subnet>,
    /// MTU for pods, in bytes.
    pub mtu: u32,
    /// Whether the daemon masquerades. Then the bridge plugin does not need to.
    pub ip_masq: bool,
}

/// The reason why the CNI plugins cannot use a file.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SubnetEnvError {
    /// Some variables are missing. The list has upstream's form, joined by commas.
    #[error("is missing {0}")]
    Missing(String),
    /// A variable has a value that cannot be read.
    #[error("has an invalid {name}: {problem}")]
    Invalid {
        /// The variable.
        name: &'static str,
        /// The problem.
        problem: String,
    },
}

const NETWORK: [&str; 2] = ["FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"];
const SUBNET: [&str; 2] = ["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"];
const MTU: &str = "FLANNEL_MTU";
const IPMASQ: &str = "FLANNEL_IPMASQ";

impl SubnetEnv {
    /// Renders the text of the file. As in upstream's, `FLANNEL_SUBNET` is the first host address with the prefix length.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for (family, network, subnet) in Family::ALL.into_iter().zip(NETWORK).zip(SUBNET).map(|((f, n), s)| (f, n, s)) {
            let nets: Vec<String> = self.networks.iter().filter(|net| net.family() == family).map(ToString::to_string).collect();
            if let (false, Some(mine)) = (nets.is_empty(), self.subnets.get(family)) {
                text.push_str(&format!("{network}={}\n{subnet}={}/{}\n", nets.join(","), mine.first_host(), mine.prefix_len()));
            }
        }
        text.push_str(&format!("{MTU}={}\n{IPMASQ}={}\n", self.mtu, self.ip_masq));
        text
    }

    /// Parses the text as upstream's CNI plugin does: lines `NAME=value`; unknown names are ignored, required ones must be present. A
    /// network variable may list several CIDRs, separated by commas.
    ///
    /// # Errors
    /// [`SubnetEnvError`], which names the variables.
    pub fn parse(text: &str) -> Result<SubnetEnv, SubnetEnvError> {
        let mut networks: Vec<Subnet> = Vec::new();
        let mut subnets = PerFamily::default();
        let (mut mtu, mut ip_masq) = (None, None);
        for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
            for (i, family) in Family::ALL.into_iter().enumerate() {
                if name == NETWORK[i] {
                    for text in value.split(',') {
                        let network = cidr(NETWORK[i], text, family)?;
                        if !networks.contains(&network) {
                            networks.push(network);
                        }
                    }
                }
                if name == SUBNET[i] {
                    subnets.set(family, Some(cidr(SUBNET[i], value, family)?));
                }
            }
            match name {
                MTU => {
                    let number =
                        value.parse().map_err(|_| SubnetEnvError::Invalid { name: MTU, problem: format!("{value:?} is not a number") })?;
                    mtu = Some(number);
                }
                IPMASQ => ip_masq = Some(value == "true"),
                _ => {}
            }
        }
        networks.sort_by_key(|network| network.family());
        let mut missing = Vec::new();
        if networks.is_empty() {
            missing.extend(NETWORK);
        }
        if subnets.is_empty() {
            missing.extend(SUBNET);
        }
        match (mtu, ip_masq) {
            (Some(mtu), Some(ip_masq)) if missing.is_empty() => Ok(SubnetEnv { networks, subnets, mtu, ip_masq }),
            _ => {
                missing.extend(mtu.is_none().then_some(MTU));
                missing.extend(ip_masq.is_none().then_some(IPMASQ));
                Err(SubnetEnvError::Missing(missing.join(", ")))
            }
        }
    }
}

fn cidr(name: &'static str, value: &str, family: Family) -> Result<Subnet, SubnetEnvError> {
    let parsed = value.parse().map(|cidr: Cidr| cidr.subnet());
    match parsed {
        Ok(subnet) if subnet.family() == family => Ok(subnet),
        Ok(subnet) => Err(SubnetEnvError::Invalid { name, problem: format!("{subnet} is not an {family} network") }),
        Err(error) => Err(SubnetEnvError::Invalid { name, problem: error.to_string() }),
    }
}

/// Reads the subnets of a previous run from its file. Quotes, spaces and `export` are tolerated. Entries of a list that are not a CIDR
/// of the family are skipped; unless exactly one remains, the family has none.
pub fn previous_subnets(text: &str) -> PerFamily<Subnet> {
    let mut previous = PerFamily::default();
    for (family, name) in Family::ALL.into_iter().zip(SUBNET) {
        let subnets = list(text, name, family);
        previous.set(family, subnets.last().filter(|_| subnets.len() == 1).copied());
    }
    previous
}

/// Reads the pod networks of a previous run, as leniently as [`previous_subnets`].
pub fn previous_networks(text: &str) -> Vec<Subnet> {
    Family::ALL.into_iter().zip(NETWORK).flat_map(|(family, name)| list(text, name, family)).collect()
}

/// The prefixes that a variable lists. If several lines set it, the last counts.
fn list(text: &str, wanted: &str, family: Family) -> Vec<Subnet> {
    let mut found = Vec::new();
    for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
        if name.trim().trim_start_matches("export ").trim() == wanted {
            let values = value.trim().trim_matches(['"', '\'']).split(',');
            found = values.filter_map(|text| text.trim().parse().ok()).filter(|subnet: &Subnet| subnet.family() == family).collect();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env() -> SubnetEnv {
        SubnetEnv {
            networks: vec!["10.244.0.0/16".parse().unwrap(), "fc00::/48".parse().unwrap()],
            subnets: PerFamily { v4: "10.244.3.0/24".parse().ok(), v6: "fc00:0:0:3::/64".parse().ok() },
            mtu: 1450,
            ip_masq: true,
        }
    }

    const TEXT: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00:0:0:3::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

    #[test]
    fn file_matches_upstream_byte_for_byte_and_parses_back() {
        assert_eq!(env().render(), TEXT);
        assert_eq!(SubnetEnv::parse(TEXT).unwrap(), env());
        let v4 = SubnetEnv { networks: env().networks[..1].to_vec(), subnets: PerFamily { v6: None, ..env().subnets }, ..env() };
        assert_eq!(v4.render(), "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n");
        let v6 = SubnetEnv { networks: env().networks[1..].to_vec(), subnets: PerFamily { v4: None, ..env().subnets }, ..env() };
        let text = "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00:0:0:3::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        assert_eq!(v6.render(), text);
        assert_eq!(SubnetEnv::parse(text).unwrap(), v6);
    }

    #[test]
    fn duplicate_networks_are_dropped() {
        let text =
            "FLANNEL_NETWORK=10.1.0.0/16,10.2.0.0/16,10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n";
        let networks: Vec<String> = SubnetEnv::parse(text).unwrap().networks.iter().map(ToString::to_string).collect();
        assert_eq!(networks, ["10.1.0.0/16", "10.2.0.0/16"]);
    }

    #[test]
    fn missing_variables_are_listed_as_upstream_lists_them() {
        let error = |text| SubnetEnv::parse(text).unwrap_err().to_string();
        assert_eq!(
            error(""),
            "is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_MTU, FLANNEL_IPMASQ"
        );
        assert_eq!(error("FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.2.1/24\nFLANNEL_IPMASQ=1"), "is missing FLANNEL_MTU");
        assert_eq!(error("FLANNEL_MTU=x"), "has an invalid FLANNEL_MTU: \"x\" is not a number");
        assert_eq!(error("FLANNEL_SUBNET=fc00::1/64"), "has an invalid FLANNEL_SUBNET: fc00::/64 is not an IPv4 network");
    }

    #[test]
    fn previous_file_is_read_leniently() {
        assert_eq!(previous_subnets(TEXT), env().subnets);
        assert_eq!(previous_subnets("export FLANNEL_SUBNET=\"10.244.3.1/24\" \n").v4, env().subnets.v4);
        // The cases of upstream's TestReadCIDRsFromSubnetFileSkipsInvalidCIDRs and similar tests.
        assert_eq!(previous_networks("FLANNEL_NETWORK=10.1.0.0/16,bad,10.2.0.0/16\nFLANNEL_IPV6_NETWORK=x,fc00::/48").len(), 3);
        assert_eq!(previous_subnets("FLANNEL_SUBNET=bad,10.244.3.1/24").v4, env().subnets.v4);
        assert!(previous_networks("FLANNEL_IPV6_NETWORK=bad,10.0.0.0/8").is_empty());
        for text in ["", "FLANNEL_SUBNET=bad", "FLANNEL_SUBNET=10.1.1.1/24,10.1.2.1/24", "FLANNEL_SUBNET=fc00::1/64"] {
            assert!(previous_subnets(text).is_empty(), "{text}");
        }
    }
}
