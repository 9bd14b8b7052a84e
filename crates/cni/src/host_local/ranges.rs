//! The ranges that addresses are allocated from.

use std::net::IpAddr;

use ::flannel::net::bits_of;
use ::flannel::{Cidr, Family, Subnet};
use serde_json::{Map, Value};

use crate::protocol::{CniError, Request, array, string};

/// Addresses that may be allocated: `start..=end` of a subnet, without the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) subnet: Subnet,
    start: IpAddr,
    end: IpAddr,
    pub(super) gateway: IpAddr,
}

impl Range {
    /// May the address be allocated from this range?
    pub(super) fn admits(&self, ip: IpAddr) -> bool {
        Family::of(ip) == self.subnet.family() && (self.start..=self.end).contains(&ip)
    }
}

/// Reads the range sets of a configuration. An ADD allocates one address from each.
pub(super) fn ranges(request: &Request<'_>, ipam: &Map<String, Value>) -> Result<Vec<Vec<Range>>, CniError> {
    let mut sets = Vec::new();
    if let Some(runtime) = request.runtime_config()?
        && let Some(list) = array(runtime, "ipRanges")?
    {
        sets.extend(list.iter().map(range_set).collect::<Result<Vec<_>, _>>()?);
    }
    // The range of the old form, with its fields in `ipam` itself, comes first.
    if string(ipam, "subnet")?.is_some() {
        sets.push(vec![range(ipam)?]);
    }
    if let Some(list) = array(ipam, "ranges")? {
        sets.extend(list.iter().map(range_set).collect::<Result<Vec<_>, _>>()?);
    }
    if sets.is_empty() {
        return Err(CniError::config("ipam.ranges: no IP ranges specified"));
    }
    if !request.speaks("0.3.0") {
        for family in Family::ALL {
            if sets.iter().filter(|set| set[0].subnet.family() == family).count() > 1 {
                let text = format!("CNI version {} does not support more than 1 address per family", request.version);
                return Err(CniError::config(format!("ipam.ranges: {text}")));
            }
        }
    }
    let all: Vec<&Range> = sets.iter().flatten().collect();
    for (i, a) in all.iter().enumerate() {
        if let Some(b) = all[..i].iter().find(|b| a.subnet.overlaps(b.subnet) && a.start <= b.end && b.start <= a.end) {
            return Err(CniError::config(format!("ipam.ranges: {}-{} overlaps {}-{}", a.start, a.end, b.start, b.end)));
        }
    }
    Ok(sets)
}

fn range_set(value: &Value) -> Result<Vec<Range>, CniError> {
    let list = value
        .as_array()
        .filter(|list| !list.is_empty())
        .ok_or_else(|| CniError::config("ipam.ranges: each set must be a list of ranges"))?;
    let set = list
        .iter()
        .map(|value| range(value.as_object().ok_or_else(|| CniError::config("ipam.ranges: a range must be an object"))?))
        .collect::<Result<Vec<_>, _>>()?;
    if set.iter().any(|range| range.subnet.family() != set[0].subnet.family()) {
        return Err(CniError::config("ipam.ranges: the ranges of a set must be of one family"));
    }
    Ok(set)
}

fn range(object: &Map<String, Value>) -> Result<Range, CniError> {
    let text = string(object, "subnet")?.ok_or_else(|| CniError::config("ipam.ranges: a range needs a subnet"))?;
    let cidr: Cidr = text.parse().map_err(|error| CniError::config(format!("ipam.ranges.subnet: {error}")))?;
    let (subnet, family) = (cidr.subnet(), Family::of(cidr.addr));
    if subnet.network() != cidr.addr {
        return Err(CniError::config(format!("ipam.ranges.subnet: {cidr} has host bits set: did you mean {subnet}?")));
    }
    if subnet.prefix_len() > family.bits() - 2 {
        return Err(CniError::config(format!("ipam.ranges.subnet: {subnet} is too small to allocate addresses")));
    }
    let address = |name: &str| -> Result<Option<IpAddr>, CniError> {
        let Some(text) = string(object, name)? else { return Ok(None) };
        let ip: IpAddr = text.parse().map_err(|_| CniError::config(format!("ipam.ranges.{name}: {text:?} is not an address")))?;
        if Family::of(ip) != family || !subnet.contains(ip) {
            return Err(CniError::config(format!("ipam.ranges.{name}: {ip} is not in {subnet}")));
        }
        Ok(Some(ip))
    };
    let last = match family {
        Family::V4 => family.address(bits_of(subnet.last()) - 1),
        Family::V6 => subnet.last(),
    };
    let gateway = address("gateway")?.unwrap_or(subnet.first_host());
    let (start, end) = (address("rangeStart")?.unwrap_or(subnet.first_host()), address("rangeEnd")?.unwrap_or(last));
    if start > end {
        return Err(CniError::config(format!("ipam.ranges: rangeStart {start} is above rangeEnd {end}")));
    }
    Ok(Range { subnet, start, end, gateway })
}

/// Iterates over every address of a range set once: from the one after `last` to the end, then from the start to `last`.
pub(super) fn candidates(set: &[Range], last: Option<IpAddr>) -> impl Iterator<Item = (IpAddr, Range)> + '_ {
    let position = last.and_then(|last| Some((set.iter().position(|range| range.admits(last))?, bits_of(last))));
    let part = move |range: Range, from: u128, to: u128| {
        let family = range.subnet.family();
        (from..=to).map(move |bits| (family.address(bits), range))
    };
    let whole = move |range: Range| part(range, bits_of(range.start), bits_of(range.end));
    let first = position.map_or(0, |(first, _)| first);
    // The addresses above `last` in its range come first, the others of that range at the end. Nothing is above the highest
    // address of a family.
    let above = position.and_then(|(first, last)| Some(part(set[first], last.checked_add(1)?, bits_of(set[first].end))));
    let others = (usize::from(position.is_some())..set.len()).flat_map(move |i| whole(set[(first + i) % set.len()]));
    let rest = position.map(|(first, last)| part(set[first], bits_of(set[first].start), last));
    above.into_iter().flatten().chain(others).chain(rest.into_iter().flatten())
}

/// The ranges of a set as text, for errors.
pub(super) fn describe(set: &[Range]) -> String {
    set.iter().map(|range| format!("{}-{}", range.start, range.end)).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ranges: &[&str]) -> Vec<Range> {
        ranges.iter().map(|text| range(serde_json::from_str::<Value>(text).unwrap().as_object().unwrap()).unwrap()).collect()
    }

    fn order(ranges: &[&str], last: &str) -> Vec<String> {
        candidates(&set(ranges), last.parse().ok()).map(|(ip, _)| ip.to_string()).collect()
    }

    #[test]
    fn candidates_wrap_around_once() {
        let small = r#"{"subnet":"10.1.0.0/29"}"#;
        assert_eq!(order(&[small], ""), ["10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6"]);
        assert_eq!(order(&[small], "10.1.0.4"), ["10.1.0.5", "10.1.0.6", "10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4"]);
        assert_eq!(order(&[small], "10.9.9.9"), order(&[small], ""));
        let first = r#"{"subnet":"0.0.0.0/29","rangeStart":"0.0.0.0","gateway":"0.0.0.1"}"#;
        assert_eq!(order(&[first], ""), (0..=6).map(|n| format!("0.0.0.{n}")).collect::<Vec<_>>());
        let top = r#"{"subnet":"ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffc/126"}"#;
        let name = |n: u32| format!("ffff:ffff:ffff:ffff:ffff:ffff:ffff:{n:x}");
        assert_eq!(order(&[top], ""), [0xfffd, 0xfffe, 0xffff].map(name));
        assert_eq!(order(&[top], &name(0xffff)), [0xfffd, 0xfffe, 0xffff].map(name));
        let two = [
            r#"{"subnet":"10.1.0.0/24","rangeStart":"10.1.0.5","rangeEnd":"10.1.0.6"}"#,
            r#"{"subnet":"10.2.0.0/24","rangeStart":"10.2.0.5","rangeEnd":"10.2.0.6"}"#,
        ];
        assert_eq!(order(&two, "10.2.0.5"), ["10.2.0.6", "10.1.0.5", "10.1.0.6", "10.2.0.5"]);
    }

    #[test]
    fn invalid_ranges_are_refused() {
        let error = |text: &str| range(serde_json::from_str::<Value>(text).unwrap().as_object().unwrap()).unwrap_err().msg;
        assert_eq!(error("{}"), "ipam.ranges: a range needs a subnet");
        assert_eq!(error(r#"{"subnet":"10.1.0.7/24"}"#), "ipam.ranges.subnet: 10.1.0.7/24 has host bits set: did you mean 10.1.0.0/24?");
        assert_eq!(error(r#"{"subnet":"10.1.0.0/31"}"#), "ipam.ranges.subnet: 10.1.0.0/31 is too small to allocate addresses");
        assert_eq!(error(r#"{"subnet":"10.1.0.0/24","rangeEnd":"10.2.0.1"}"#), "ipam.ranges.rangeEnd: 10.2.0.1 is not in 10.1.0.0/24");
        for gateway in ["10.2.0.1", "fd00::1"] {
            let text = format!(r#"{{"subnet":"10.1.0.0/24","gateway":"{gateway}"}}"#);
            assert_eq!(error(&text), format!("ipam.ranges.gateway: {gateway} is not in 10.1.0.0/24"));
        }
        assert_eq!(
            error(r#"{"subnet":"10.1.0.0/24","rangeStart":"10.1.0.9","rangeEnd":"10.1.0.5"}"#),
            "ipam.ranges: rangeStart 10.1.0.9 is above rangeEnd 10.1.0.5"
        );
    }
}
