//! IP and Ethernet addresses, prefixes and interface names, with their parsing, formatting and order.
//!
//! One code path serves both families: a [`Subnet`] holds an [`IpAddr`], and the families differ in numbers (32 or 128 bits), not in
//! types.

use std::cmp::{Ordering, Reverse};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use thiserror::Error;

/// The error for text that is not a valid address, prefix or name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{text:?} is not {expected}")]
pub struct NetError {
    text: String,
    expected: &'static str,
}

fn bad(text: &str, expected: &'static str) -> NetError {
    NetError { text: text.chars().take(64).collect(), expected }
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

impl Family {
    /// Both families, IPv4 first: the order in which they are processed and printed.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    pub fn of(ip: IpAddr) -> Family {
        if ip.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// The number of bits in an address: 32 or 128.
    pub fn bits(self) -> u8 {
        match self {
            Family::V4 => 32,
            Family::V6 => 128,
        }
    }

    /// The sysctl that enables forwarding of this family, as a path under `/proc/sys`.
    pub fn forwarding(self) -> &'static str {
        match self {
            Family::V4 => "net/ipv4/ip_forward",
            Family::V6 => "net/ipv6/conf/all/forwarding",
        }
    }

    /// The sysctl by which one interface forwards packets of this family: hardening guides set it to 0 by default for new ones.
    pub fn forwarding_of(self, interface: IfName) -> String {
        match self {
            Family::V4 => format!("net/ipv4/conf/{interface}/forwarding"),
            Family::V6 => format!("net/ipv6/conf/{interface}/forwarding"),
        }
    }

    /// The interface and the family of a sysctl that [`Family::forwarding_of`] names.
    pub fn of_forwarding(path: &str) -> Option<(Family, IfName)> {
        let interface = |prefix: &str| path.strip_prefix(prefix)?.strip_suffix("/forwarding")?.parse().ok();
        let family = |(family, prefix)| interface(prefix).map(|interface: IfName| (family, interface));
        [(Family::V4, "net/ipv4/conf/"), (Family::V6, "net/ipv6/conf/")].into_iter().find_map(family)
    }

    /// The all-zero address (`0.0.0.0` or `::`).
    pub fn unspecified(self) -> IpAddr {
        self.address(0)
    }

    /// The multicast prefix of the family: `224.0.0.0/4` or `ff00::/8`.
    pub fn multicast(self) -> Subnet {
        match self {
            Family::V4 => Subnet { addr: IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), len: 4 },
            Family::V6 => Subnet { addr: IpAddr::V6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0)), len: 8 },
        }
    }

    /// The address with these bits. For IPv4 only the low 32 bits count.
    pub fn address(self, bits: u128) -> IpAddr {
        match self {
            #[expect(clippy::cast_possible_truncation, reason = "an IPv4 address is the low 32 bits")]
            Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(bits as u32)),
            Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(bits)),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// The bits of an address, as a number.
pub fn bits_of(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

/// At most one value for each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PerFamily<T> {
    /// The IPv4 value.
    pub v4: Option<T>,
    /// The IPv6 value.
    pub v6: Option<T>,
}

impl<T> Default for PerFamily<T> {
    fn default() -> Self {
        PerFamily { v4: None, v6: None }
    }
}

impl<T> PerFamily<T> {
    /// The value of one family.
    pub fn get(&self, family: Family) -> Option<&T> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    /// Sets or clears the value of one family.
    pub fn set(&mut self, family: Family, value: Option<T>) {
        match family {
            Family::V4 => self.v4 = value,
            Family::V6 => self.v6 = value,
        }
    }

    /// The values that are set, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = (Family, &T)> {
        Family::ALL.into_iter().filter_map(|family| self.get(family).map(|value| (family, value)))
    }

    /// Whether neither family has a value.
    pub fn is_empty(&self) -> bool {
        self.v4.is_none() && self.v6.is_none()
    }
}

/// A network prefix. Host bits are always zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subnet {
    addr: IpAddr,
    len: u8,
}

// Ordered by address, then length. Maps of leases and routes compare subnets often; comparing numbers is faster than comparing bytes.
impl Ord for Subnet {
    fn cmp(&self, other: &Subnet) -> Ordering {
        let order = |subnet: &Subnet| (subnet.family(), bits_of(subnet.addr), subnet.len);
        order(self).cmp(&order(other))
    }
}

impl PartialOrd for Subnet {
    fn partial_cmp(&self, other: &Subnet) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Subnet {
    /// The prefix of `len` bits that contains `addr`; host bits of `addr` are cleared.
    ///
    /// # Errors
    /// When `len` exceeds the family's bits.
    pub fn new(addr: IpAddr, len: u8) -> Result<Subnet, NetError> {
        let family = Family::of(addr);
        if len > family.bits() {
            return Err(bad(&format!("{addr}/{len}"), "a prefix: the length exceeds the family's bits"));
        }
        Ok(Subnet { addr: family.address(bits_of(addr) & mask(family, len)), len })
    }

    /// The family of the prefix.
    pub fn family(self) -> Family {
        Family::of(self.addr)
    }

    /// The network address: all host bits zero.
    pub fn network(self) -> IpAddr {
        self.addr
    }

    /// The prefix length in bits.
    pub fn prefix_len(self) -> u8 {
        self.len
    }

    /// Network address + 1: the address that `subnet.env` states and that the bridge gets.
    pub fn first_host(self) -> IpAddr {
        self.family().address(bits_of(self.addr) | 1)
    }

    /// The highest address of the prefix (IPv4: the broadcast address).
    pub fn last(self) -> IpAddr {
        let family = self.family();
        family.address(bits_of(self.addr) | !mask(family, self.len))
    }

    /// Whether the prefix contains the address.
    pub fn contains(self, ip: IpAddr) -> bool {
        Family::of(ip) == self.family() && bits_of(ip) & mask(self.family(), self.len) == bits_of(self.addr)
    }

    /// Whether the prefix contains the whole other prefix.
    pub fn covers(self, other: Subnet) -> bool {
        self.len <= other.len && self.contains(other.addr)
    }

    /// Whether the two prefixes share an address.
    pub fn overlaps(self, other: Subnet) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// The index of this subnet among the subnets of its size in `network`, from 0; saturates at `u32::MAX`.
    pub fn index_in(self, network: Subnet) -> u32 {
        let offset = bits_of(self.addr).wrapping_sub(bits_of(network.addr));
        let step = self.family().bits() - self.len;
        let index = if step >= 128 { 0 } else { offset >> step };
        u32::try_from(index).unwrap_or(u32::MAX)
    }
}

fn mask(family: Family, len: u8) -> u128 {
    let host = u32::from(family.bits() - len.min(family.bits()));
    let all = match family {
        Family::V4 => u128::from(u32::MAX),
        Family::V6 => u128::MAX,
    };
    all.checked_shr(host).map_or(0, |kept| kept << host)
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}

impl FromStr for Subnet {
    type Err = NetError;
    /// Parses CIDR text; host bits are cleared, as upstream does.
    fn from_str(text: &str) -> Result<Subnet, NetError> {
        let cidr: Cidr = text.parse()?;
        Ok(cidr.subnet())
    }
}

/// Values of subnets, found by the longest prefix that contains an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixMap<T>(BTreeMap<Reverse<u8>, BTreeMap<Subnet, T>>);

impl<T> Default for PrefixMap<T> {
    fn default() -> Self {
        PrefixMap(BTreeMap::new())
    }
}

impl<T> PrefixMap<T> {
    /// Sets the value of a subnet and returns the previous one.
    pub fn insert(&mut self, subnet: Subnet, value: T) -> Option<T> {
        self.0.entry(Reverse(subnet.len)).or_default().insert(subnet, value)
    }

    /// Removes a subnet and returns its value.
    pub fn remove(&mut self, subnet: Subnet) -> Option<T> {
        let subnets = self.0.get_mut(&Reverse(subnet.len))?;
        let removed = subnets.remove(&subnet);
        if subnets.is_empty() {
            self.0.remove(&Reverse(subnet.len));
        }
        removed
    }

    /// The value of the longest prefix that contains the address.
    pub fn find(&self, ip: IpAddr) -> Option<&T> {
        self.0.iter().find_map(|(Reverse(length), subnets)| subnets.get(&Subnet::new(ip, *length).ok()?))
    }

    /// All subnets with their values, the longest prefixes first.
    pub fn iter(&self) -> impl Iterator<Item = (Subnet, &T)> {
        self.0.values().flatten().map(|(subnet, value)| (*subnet, value))
    }
}

/// An interface address: an address together with the length of its on-link prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    /// The address, host bits kept.
    pub addr: IpAddr,
    /// The prefix length in bits, at most the family's.
    pub len: u8,
}

impl Cidr {
    /// The prefix that contains the address.
    pub fn subnet(self) -> Subnet {
        let family = Family::of(self.addr);
        Subnet { addr: family.address(bits_of(self.addr) & mask(family, self.len)), len: self.len }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}

impl FromStr for Cidr {
    type Err = NetError;
    fn from_str(text: &str) -> Result<Cidr, NetError> {
        const EXPECTED: &str = "a network in CIDR form, such as 10.244.0.0/16";
        let (addr, len) = text.split_once('/').ok_or_else(|| bad(text, EXPECTED))?;
        let addr: IpAddr = addr.parse().map_err(|_| bad(text, EXPECTED))?;
        // `u8::from_str` accepts "+16"; a prefix length has digits only.
        let digits = !len.is_empty() && len.bytes().all(|b| b.is_ascii_digit());
        let len = if digits { len.parse().ok() } else { None };
        match len {
            Some(len) if len <= Family::of(addr).bits() => Ok(Cidr { addr, len }),
            _ => Err(bad(text, EXPECTED)),
        }
    }
}

/// An Ethernet (MAC) address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Turns six random bytes into a locally administered unicast address (IEEE 802: bit 1 of the first octet set,
    /// bit 0 clear).
    pub fn local(mut random: [u8; 6]) -> Mac {
        random[0] = (random[0] | 0x02) & !0x01;
        Mac(random)
    }

    /// Whether an interface can have this address: it is neither multicast nor all-zero.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = NetError;
    fn from_str(text: &str) -> Result<Mac, NetError> {
        const EXPECTED: &str = "an Ethernet address, such as 0e:1f:2a:3b:4c:5d";
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let parse = || {
            let mut mac = [0; 6];
            let bytes: &[u8; 17] = text.as_bytes().try_into().ok()?;
            for (byte, part) in mac.iter_mut().zip(bytes.chunks(3)) {
                *byte = digit(part[0])? << 4 | digit(part[1])?;
                part.get(2).is_none_or(|colon| *colon == b':').then_some(())?;
            }
            Some(Mac(mac))
        };
        parse().ok_or_else(|| bad(text, EXPECTED))
    }
}

/// The name of a network interface: 1 to 15 bytes (`IFNAMSIZ` of `linux/if.h` counts the terminating zero), no `/`,
/// no `:`, no white space, neither `.` nor `..`. Held inline, so that ten thousand routes cost no allocation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName([u8; 16]);

impl IfName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|b| *b == 0).unwrap_or(16);
        std::str::from_utf8(&self.0[..end]).unwrap_or("?")
    }
}

impl FromStr for IfName {
    type Err = NetError;
    fn from_str(text: &str) -> Result<IfName, NetError> {
        let ok = !text.is_empty()
            && text.len() <= 15
            && text != "."
            && text != ".."
            && !text.chars().any(|c| c == '/' || c == ':' || c == '\0' || c.is_whitespace());
        if !ok {
            return Err(bad(text, "an interface name (invalid character or length: 1 to 15 bytes, no slash, colon or white space)"));
        }
        let mut name = [0; 16];
        name[..text.len()].copy_from_slice(text.as_bytes());
        Ok(IfName(name))
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

/// A VXLAN network identifier: 24 bits (RFC 7348, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vni(u32);

impl Vni {
    /// The largest identifier, 2²⁴ − 1.
    pub const MAX: u32 = 0x00ff_ffff;

    /// `None` when the number needs more than 24 bits.
    pub fn new(vni: u32) -> Option<Vni> {
        (vni <= Vni::MAX).then_some(Vni(vni))
    }

    /// The identifier as a number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn subnet_is_normalized_on_construction() {
        assert_eq!(net("10.244.1.7/24").to_string(), "10.244.1.0/24");
        assert_eq!(net("fc00:0:0:3::9/64").to_string(), "fc00:0:0:3::/64");
        assert_eq!(net("1.2.3.4/0").to_string(), "0.0.0.0/0");
        assert_eq!(net("ffff::1/0").to_string(), "::/0");
    }

    #[test]
    fn malformed_prefixes_are_refused() {
        for text in ["", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0/8", "::/129", "10.0.0.01/8", "a/8"] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
    }

    #[test]
    fn covers_and_overlaps_compare_prefixes() {
        assert!(net("10.244.0.0/16").covers(net("10.244.255.0/24")));
        assert!(!net("10.244.0.0/16").covers(net("10.245.0.0/24")));
        assert!(net("10.244.1.0/24").overlaps(net("10.244.0.0/16")));
        assert!(!net("10.244.1.0/24").overlaps(net("10.244.2.0/24")));
        assert!(!net("0.0.0.0/0").overlaps(net("::/0")));
    }

    #[test]
    fn index_counts_subnets_of_the_same_size() {
        assert_eq!(net("10.244.2.0/24").index_in(net("10.244.0.0/16")), 2);
        assert_eq!(net("10.244.0.0/16").index_in(net("10.244.0.0/16")), 0);
        assert_eq!(net("fc00:0:0:3::/64").index_in(net("fc00::/48")), 3);
        assert_eq!(net("::/0").index_in(net("::/0")), 0);
    }

    #[test]
    fn first_and_last_addresses() {
        assert_eq!(net("10.244.3.0/24").first_host().to_string(), "10.244.3.1");
        assert_eq!(net("10.244.3.0/24").last().to_string(), "10.244.3.255");
        assert_eq!(net("fc00:0:0:3::/64").first_host().to_string(), "fc00:0:0:3::1");
    }

    #[test]
    fn mac_parses_and_prints() {
        let mac: Mac = "0E:1f:2a:3b:4c:5d".parse().unwrap();
        assert_eq!(mac.to_string(), "0e:1f:2a:3b:4c:5d");
        for text in
            ["", "0e:1f:2a:3b:4c", "0e:1f:2a:3b:4c:5d:6e", "e:1f:2a:3b:4c:5d", "+e:1f:2a:3b:4c:5d", "0e-1f:2a:3b:4c:5d", "ée:1f:2a:3b:4c:5"]
        {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
        assert!(Mac::local([0xff; 6]).is_unicast());
        assert!(!Mac([0; 6]).is_unicast());
    }

    #[test]
    fn malformed_interface_names_are_refused() {
        assert_eq!("flannel.1".parse::<IfName>().unwrap().as_str(), "flannel.1");
        for text in ["", ".", "..", "a/b", "a:b", "a b", "sixteen-bytes-xx"] {
            assert!(text.parse::<IfName>().is_err(), "{text}");
        }
    }
}
