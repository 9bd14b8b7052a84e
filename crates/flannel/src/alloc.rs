//! Chooses the subnet that this host leases (specification, section 3.2). The random number generator is an argument.

use std::net::IpAddr;

use thiserror::Error;

use crate::config::{Config, Network};
use crate::lease::{LeaseKey, LeaseSet};
use crate::net::{Family, PerFamily, Subnet, bits_of};
use crate::node::Interface;

/// The number of free subnets to choose from at random, so that hosts that start together rarely choose the same one.
const CANDIDATES: usize = 100;

/// The error when no subnet is left to lease.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("out of subnets: every /{} of {} from {} to {} is leased; enlarge Network or raise SubnetLen", network.subnet_len, network.network, network.min, network.max)]
pub struct OutOfSubnets {
    /// The exhausted pod network.
    pub network: Network,
}

/// The lease to renew or to create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Renew this lease, which this host holds already.
    Reuse(LeaseKey),
    /// Create this lease, which is free.
    Create(LeaseKey),
}

/// Chooses a lease: the one with this host's public address, or else the previous one if it is free, or else a random free one. Of
/// several with this host's address it is the previous one, or else the oldest.
/// `stale` receives a lease of this host that the configuration no longer admits, and that should be deleted.
///
/// `mine` are the published addresses of this host; they are compared by IPv4, or by IPv6 if there is no IPv4 address. `random(n)`
/// returns a number in `0..n`.
///
/// # Errors
/// [`OutOfSubnets`] when no subnet is free.
pub fn choose(
    config: &Config,
    leases: &LeaseSet,
    mine: &PerFamily<IpAddr>,
    previous: &PerFamily<Subnet>,
    stale: &mut Option<LeaseKey>,
    mut random: impl FnMut(usize) -> usize,
) -> Result<Choice, OutOfSubnets> {
    // Another host may publish this host's address with a lease of its own: the pods' addresses are those of the previous one.
    let own = leases.iter().filter(|(_, peer)| is_mine(&peer.public, mine)).map(|(key, _)| key);
    if let Some(key) =
        own.min_by_key(|key| (!is_admitted(config, key.subnets()), key.subnets() != previous, leases.get_with_age(key).map(|(_, age)| age)))
    {
        if is_admitted(config, key.subnets()) {
            return Ok(Choice::Reuse(*key));
        }
        *stale = Some(*key);
    }
    let others = || leases.iter().map(|(key, _)| key).filter(|key| Some(**key) != *stale);
    let before = stale.map(|key| *key.subnets()).unwrap_or_default();
    let mut subnets = PerFamily::default();
    for (family, network) in config.networks.iter() {
        let taken: Vec<Subnet> = others().filter_map(|key| key.subnets().get(family).copied()).collect();
        // Each family is chosen by itself: when the cluster gets a second family, a host keeps its subnet of the first.
        let known = [previous.get(family), before.get(family)].into_iter().flatten();
        let known = known.copied().find(|subnet| network.admits(*subnet) && !taken.iter().any(|taken| taken.overlaps(*subnet)));
        let subnet = match known {
            Some(subnet) => subnet,
            None => {
                let free = free(network, taken);
                if free.is_empty() {
                    return Err(OutOfSubnets { network: *network });
                }
                free[random(free.len())]
            }
        };
        subnets.set(family, Some(subnet));
    }
    let key = LeaseKey::new(subnets).expect("a validated config has at least one network");
    Ok(Choice::Create(key))
}

/// Whether the configuration admits a lease of these subnets: one for each enabled family, and each in its range.
pub fn is_admitted(config: &Config, subnets: &PerFamily<Subnet>) -> bool {
    Family::ALL.into_iter().all(|family| match (config.networks.get(family), subnets.get(family)) {
        (None, None) => true,
        (Some(network), Some(subnet)) => network.admits(*subnet),
        _ => false,
    })
}

/// The subnets that this host had before, by the addresses of the backend's devices: each has its subnet's first one, with a prefix of
/// full length. The devices outlive the daemon, and tell the subnet of the pods even where the subnet file was deleted.
pub fn previous_by_devices(config: &Config, interfaces: &[Interface]) -> PerFamily<Subnet> {
    let mut previous = PerFamily::default();
    for (family, network) in config.networks.iter() {
        let device = config.backend.device(family).and_then(|name| interfaces.iter().find(|interface| interface.name == name));
        let addresses = device.into_iter().flat_map(|device| &device.addrs).map(|addr| addr.cidr);
        let subnets = addresses.filter(|cidr| Family::of(cidr.addr) == family && cidr.len == family.bits());
        let mut subnets =
            subnets.filter_map(|cidr| Subnet::new(cidr.addr, network.subnet_len).ok().filter(|subnet| subnet.network() == cidr.addr));
        previous.set(family, subnets.find(|subnet| network.admits(*subnet)));
    }
    previous
}

/// Whether a lease with these public addresses belongs to the host that publishes `mine`.
pub fn is_mine(theirs: &PerFamily<IpAddr>, mine: &PerFamily<IpAddr>) -> bool {
    match mine.v4 {
        Some(ip) => theirs.v4 == Some(ip),
        // Hosts without IPv4 all publish 0.0.0.0, which does not identify them; their IPv6 addresses do.
        None => theirs.v4.is_none() && mine.v6.is_some() && theirs.v6 == mine.v6,
    }
}

/// The first free subnets. The taken ones are sorted, so that the search skips each once instead of comparing all with all.
fn free(network: &Network, mut taken: Vec<Subnet>) -> Vec<Subnet> {
    taken.sort_by_key(|subnet| bits_of(subnet.network()));
    let family = network.network.family();
    let step = 1u128 << (family.bits() - network.subnet_len);
    let (mut at, end) = (bits_of(network.min), bits_of(network.max));
    let mut taken = taken.into_iter().peekable();
    let mut blocked_to = None::<u128>; // the highest address of the taken subnets passed so far
    let mut free = Vec::new();
    while at <= end && free.len() < CANDIDATES {
        while let Some(subnet) = taken.next_if(|subnet| bits_of(subnet.network()) < at.saturating_add(step)) {
            blocked_to = blocked_to.max(Some(bits_of(subnet.last())));
        }
        match blocked_to {
            Some(last) if last >= at => {
                // Continue at the first subnet after the taken one.
                let Some(next) = (last / step).checked_add(1).and_then(|n| n.checked_mul(step)) else { break };
                at = next;
            }
            _ => {
                free.extend(Subnet::new(family.address(at), network.subnet_len));
                let Some(next) = at.checked_add(step) else { break };
                at = next;
            }
        }
    }
    free
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Age, Lease, Peer, StoreEvent};
    use crate::node::InterfaceAddr;

    const CONFIG: &str = r#"{"Network":"10.1.0.0/16","SubnetMax":"10.1.4.0","Backend":{"Type":"alloc"}}"#;

    /// Chooses among `leases`: "subnet@public ip", the oldest first, separated by spaces.
    fn pick(leases: &str, mine: &str, previous: &str) -> String {
        let config = Config::parse(CONFIG).unwrap();
        let (mut set, mut age) = (LeaseSet::default(), 0);
        for text in leases.split_whitespace() {
            let (subnet, ip) = text.split_once('@').unwrap();
            let key = LeaseKey::new(PerFamily { v4: Some(subnet.parse().unwrap()), v6: None }).unwrap();
            let peer = Peer { public: PerFamily { v4: Some(ip.parse().unwrap()), v6: None }, ..Peer::default() };
            age += 1;
            set.fold(StoreEvent::Apply(Lease { key, peer }, Age::created(age)));
        }
        let mine = PerFamily { v4: Some(mine.parse().unwrap()), v6: None };
        let previous = PerFamily { v4: previous.parse().ok(), v6: None };
        let mut stale = None;
        let choice = choose(&config, &set, &mine, &previous, &mut stale, |n| n - 1);
        let stale = stale.map_or(String::new(), |key| format!(" delete {key}"));
        match choice {
            Ok(Choice::Reuse(key)) => format!("reuse {key}{stale}"),
            Ok(Choice::Create(key)) => format!("create {key}{stale}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn previous_subnet_is_that_of_the_device() {
        let previous = |config: &str, name: &str, cidrs: &[&str]| {
            let config = Config::parse(&format!(r#"{{"Network":"10.1.0.0/16","SubnetMax":"10.1.4.0","Backend":{config}}}"#)).unwrap();
            let addr = |cidr: &&str| InterfaceAddr { cidr: cidr.parse().unwrap(), permanent: true, temporary: false, deprecated: false };
            let interface = Interface { index: 3, name: name.parse().unwrap(), mtu: 1450, addrs: cidrs.iter().map(addr).collect() };
            previous_by_devices(&config, &[interface]).v4.map(|subnet| subnet.to_string())
        };
        let vxlan = r#"{"Type":"vxlan"}"#;
        assert_eq!(previous(vxlan, "flannel.1", &["10.1.3.0/32"]).as_deref(), Some("10.1.3.0/24"));
        assert_eq!(
            previous(vxlan, "flannel.1", &["192.0.2.1/32", "10.1.3.7/32", "10.1.2.0/24", "10.1.4.0/32"]).as_deref(),
            Some("10.1.4.0/24")
        );
        // Of another network, beyond SubnetMax, on another device, of a backend without one.
        for (backend, name, cidr) in [
            (vxlan, "flannel.1", "10.2.3.0/32"),
            (vxlan, "flannel.1", "10.1.9.0/32"),
            (vxlan, "flannel.2", "10.1.3.0/32"),
            (r#"{"Type":"host-gw"}"#, "flannel.1", "10.1.3.0/32"),
        ] {
            assert_eq!(previous(backend, name, &[cidr]), None, "{backend} {name} {cidr}");
        }
    }

    #[test]
    fn lease_with_own_address_is_reused() {
        assert_eq!(pick("10.1.1.0/24@192.0.2.1 10.1.3.0/24@192.0.2.2", "192.0.2.2", "10.1.2.0/24"), "reuse 10.1.3.0/24");
    }

    #[test]
    fn lease_of_another_host_with_own_address_is_not_taken() {
        let both = "10.1.3.0/24@192.0.2.2 10.1.1.0/24@192.0.2.2";
        assert_eq!(pick(both, "192.0.2.2", "10.1.3.0/24"), "reuse 10.1.3.0/24");
        assert_eq!(pick(both, "192.0.2.2", "10.1.1.0/24"), "reuse 10.1.1.0/24");
        assert_eq!(pick(both, "192.0.2.2", ""), "reuse 10.1.3.0/24", "the oldest");
        assert_eq!(pick("10.1.2.0/25@192.0.2.2 10.1.1.0/24@192.0.2.2", "192.0.2.2", ""), "reuse 10.1.1.0/24", "the admitted one");
    }

    #[test]
    fn previous_subnet_is_chosen_if_free() {
        assert_eq!(pick("10.1.1.0/24@192.0.2.1", "192.0.2.2", "10.1.2.0/24"), "create 10.1.2.0/24");
        assert_eq!(pick("10.1.2.0/24@192.0.2.1", "192.0.2.2", "10.1.2.0/24"), "create 10.1.4.0/24");
        assert_eq!(pick("10.1.2.0/25@192.0.2.1", "192.0.2.2", "10.1.2.0/24"), "create 10.1.4.0/24");
    }

    #[test]
    fn previous_subnet_out_of_range_is_ignored() {
        for previous in ["10.9.2.0/24", "10.1.2.0/25", "10.1.5.0/24", "10.1.0.0/24"] {
            assert_eq!(pick("", "192.0.2.2", previous), "create 10.1.4.0/24");
        }
    }

    #[test]
    fn own_lease_out_of_range_is_deleted() {
        assert_eq!(pick("10.1.2.0/25@192.0.2.2", "192.0.2.2", "10.1.2.0/24"), "create 10.1.2.0/24 delete 10.1.2.0/25");
    }

    #[test]
    fn adding_a_family_keeps_the_subnet_of_the_first() {
        let config =
            Config::parse(r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"alloc"}}"#).unwrap();
        let mut set = LeaseSet::default();
        let key = LeaseKey::new(PerFamily { v4: "10.1.7.0/24".parse().ok(), v6: None }).unwrap();
        let mine = PerFamily { v4: "192.0.2.1".parse().ok(), v6: None };
        set.fold(StoreEvent::Apply(Lease { key, peer: Peer { public: mine, ..Peer::default() } }, Age::UNKNOWN));
        let mut stale = None;
        let Ok(Choice::Create(new)) = choose(&config, &set, &mine, &PerFamily::default(), &mut stale, |_| 0) else {
            panic!("expected a new lease")
        };
        assert_eq!((stale, new.to_string().as_str()), (Some(key), "10.1.7.0/24,fc00:0:0:1::/64"));
    }

    #[test]
    fn full_network_error_names_the_fix() {
        let leases = "10.1.1.0/24@192.0.2.1 10.1.2.0/23@192.0.2.2 10.1.4.128/25@192.0.2.3";
        assert_eq!(
            pick(leases, "192.0.2.9", ""),
            "out of subnets: every /24 of 10.1.0.0/16 from 10.1.1.0 to 10.1.4.0 is leased; enlarge Network or raise SubnetLen"
        );
    }

    fn addresses(v4: &str, v6: &str) -> PerFamily<IpAddr> {
        PerFamily { v4: v4.parse().ok(), v6: v6.parse().ok() }
    }

    #[test]
    fn host_with_ipv4_owns_lease_by_ipv4_alone() {
        let mine = addresses("192.0.2.1", "2001:db8::1");
        assert!(is_mine(&addresses("192.0.2.1", "2001:db8::1"), &mine));
        assert!(is_mine(&addresses("192.0.2.1", "2001:db8::9"), &mine), "the IPv6 address may have changed");
        assert!(is_mine(&addresses("192.0.2.1", ""), &mine));
        assert!(!is_mine(&addresses("192.0.2.2", "2001:db8::1"), &mine));
        assert!(!is_mine(&addresses("", "2001:db8::1"), &mine));
    }

    #[test]
    fn host_without_ipv4_owns_lease_by_ipv6() {
        let mine = addresses("", "2001:db8::1");
        assert!(is_mine(&addresses("", "2001:db8::1"), &mine));
        assert!(!is_mine(&addresses("", "2001:db8::2"), &mine));
        assert!(!is_mine(&addresses("", ""), &mine));
        assert!(!is_mine(&addresses("192.0.2.1", "2001:db8::1"), &mine), "a host with IPv4 is another host");
    }

    #[test]
    fn host_without_addresses_owns_no_lease() {
        assert!(!is_mine(&addresses("", ""), &addresses("", "")));
        assert!(!is_mine(&addresses("", "2001:db8::1"), &addresses("", "")));
        assert!(!is_mine(&addresses("192.0.2.1", ""), &addresses("", "")));
    }

    fn free_of(config: &str, taken: &[&str]) -> Vec<String> {
        let config = Config::parse(config).unwrap();
        let network = config.networks.iter().next().unwrap().1;
        let taken = taken.iter().map(|text| text.parse().unwrap()).collect();
        free(network, taken).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn free_subnets_are_those_between_taken_ones() {
        let free_of = |taken: &[&str]| free_of(CONFIG, taken);
        assert_eq!(free_of(&[]), ["10.1.1.0/24", "10.1.2.0/24", "10.1.3.0/24", "10.1.4.0/24"]);
        assert_eq!(free_of(&["10.1.3.0/24", "10.1.1.0/24"]), ["10.1.2.0/24", "10.1.4.0/24"], "in any order");
        assert_eq!(free_of(&["10.1.2.255/32"]), ["10.1.1.0/24", "10.1.3.0/24", "10.1.4.0/24"], "the last address of a subnet");
        assert_eq!(free_of(&["10.1.3.0/32"]), ["10.1.1.0/24", "10.1.2.0/24", "10.1.4.0/24"], "the first address of a subnet");
        assert_eq!(free_of(&["10.1.0.0/23", "10.1.0.0/32"]), ["10.1.2.0/24", "10.1.3.0/24", "10.1.4.0/24"], "one within another");
        assert_eq!(free_of(&["10.1.2.0/23"]), ["10.1.1.0/24", "10.1.4.0/24"], "a larger one");
        assert_eq!(free_of(&["10.0.0.0/24", "10.1.5.0/24"]).len(), 4, "outside the range");
    }

    #[test]
    fn candidates_are_limited_to_a_hundred() {
        let free = free_of(r#"{"Network":"10.1.0.0/16","Backend":{"Type":"alloc"}}"#, &["10.1.1.0/24"]);
        assert_eq!((free.len(), free[0].as_str(), free[99].as_str()), (CANDIDATES, "10.1.2.0/24", "10.1.101.0/24"));
    }

    #[test]
    fn last_subnet_of_the_address_space_is_free() {
        let config = r#"{"Network":"255.255.0.0/16","SubnetMin":"255.255.254.0","SubnetMax":"255.255.255.0","Backend":{"Type":"alloc"}}"#;
        assert_eq!(free_of(config, &[]), ["255.255.254.0/24", "255.255.255.0/24"]);
        assert_eq!(free_of(config, &["255.255.255.128/25"]), ["255.255.254.0/24"]);
    }

    #[test]
    fn lease_must_have_exactly_the_families_of_the_config() {
        let config =
            Config::parse(r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"alloc"}}"#).unwrap();
        let subnets = |v4: &str, v6: &str| PerFamily { v4: v4.parse().ok(), v6: v6.parse().ok() };
        assert!(is_admitted(&config, &subnets("10.1.7.0/24", "fc00:0:0:1::/64")));
        assert!(!is_admitted(&config, &subnets("10.1.7.0/24", "")));
        assert!(!is_admitted(&config, &subnets("", "fc00:0:0:1::/64")));
        assert!(!is_admitted(&config, &subnets("10.1.7.0/24", "fd00:0:0:1::/64")));
        assert!(!is_admitted(&Config::parse(CONFIG).unwrap(), &subnets("10.1.2.0/24", "fc00:0:0:1::/64")));
    }
}
