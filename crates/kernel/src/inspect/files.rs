//! Facts from files: sysctls, counters, and what network managers write about interfaces. `root` is `/`, except in tests.

use std::fs;
use std::path::Path;

use flannel::check::{Manager, Usage};
use flannel::{Family, IfName, PerFamily};

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn sysctl(root: &Path, name: &str) -> Option<u64> {
    number(&root.join("proc/sys").join(name))
}

/// The stricter of an interface's own setting and that for all counts.
pub(super) fn rp_filter(root: &Path, interface: IfName) -> Option<u8> {
    let read = |name: &str| sysctl(root, &format!("net/ipv4/conf/{name}/rp_filter"));
    u8::try_from(read("all")?.max(read(interface.as_str())?)).ok()
}

/// Packets that this namespace's reverse-path filtering has dropped.
pub(super) fn rp_dropped(root: &Path) -> Option<u64> {
    let text = fs::read_to_string(root.join("proc/thread-self/net/netstat")).ok()?;
    counter(&text, "TcpExt:", "IPReversePathFilter")
}

/// A counter of `/proc/net/netstat`, which has a line of names and a line of values for each group.
fn counter(text: &str, group: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group));
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names.split_whitespace().position(|word| word == name)?;
    values.split_whitespace().nth(at)?.parse().ok()
}

pub(super) fn is_ipv6_disabled(root: &Path, interface: IfName) -> bool {
    sysctl(root, &format!("net/ipv6/conf/{interface}/disable_ipv6")) == Some(1)
}

/// Whether bridged packets pass the rules for routed ones. Without br_netfilter the settings do not exist.
pub(super) fn bridge_calls(root: &Path) -> PerFamily<bool> {
    let read = |name: &str| Some(sysctl(root, &format!("net/bridge/{name}"))? == 1);
    PerFamily { v4: read("bridge-nf-call-iptables"), v6: read("bridge-nf-call-ip6tables") }
}

pub(super) fn conntrack(root: &Path) -> Option<Usage> {
    let read = |name: &str| sysctl(root, &format!("net/netfilter/{name}"));
    Some(Usage { used: read("nf_conntrack_count")?, limit: read("nf_conntrack_max")? })
}

/// The neighbour tables. Only the initial network namespace shows the limit.
pub(super) fn neighbours(root: &Path, mut entries: impl FnMut(Family) -> u64) -> PerFamily<Usage> {
    let mut found = PerFamily::default();
    for (family, version) in [(Family::V4, "ipv4"), (Family::V6, "ipv6")] {
        let limit = sysctl(root, &format!("net/{version}/neigh/default/gc_thresh3"));
        found.set(family, limit.map(|limit| Usage { used: entries(family), limit }));
    }
    found
}

/// The programs that say that they manage the interface with this index. Their files are in `/run` of the host; in a container without it
/// nothing is known.
pub(super) fn managers(root: &Path, index: u32) -> Vec<Manager> {
    let has_line = |path: String, is_it: fn(&str) -> bool| {
        let text = fs::read_to_string(root.join(path)).unwrap_or_default();
        text.lines().map(str::trim).any(is_it)
    };
    let network_manager = has_line(format!("run/NetworkManager/devices/{index}"), |line| line == "managed=true");
    // Without a state networkd does not know yet whether it will manage the link.
    let networkd = has_line(format!("run/systemd/netif/links/{index}"), |line| {
        line.strip_prefix("ADMIN_STATE=").is_some_and(|state| matches!(state, "configured" | "configuring" | "failed"))
    });
    let found = [(network_manager, Manager::NetworkManager), (networkd, Manager::Networkd)];
    found.into_iter().filter(|(is_managed, _)| *is_managed).map(|(_, by)| by).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these files, removed at the end.
    struct Tree(std::path::PathBuf);

    impl Tree {
        fn new(name: &str, files: &[(&str, &str)]) -> Tree {
            let root = std::env::temp_dir().join(format!("flannel-inspect-{}-{name}", std::process::id()));
            for (path, text) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Tree(root)
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn name(text: &str) -> IfName {
        text.parse().unwrap()
    }

    #[test]
    fn sysctls_are_read_from_files() {
        let tree = Tree::new(
            "sysctls",
            &[
                ("proc/sys/net/ipv4/conf/all/rp_filter", "0\n"),
                ("proc/sys/net/ipv4/conf/eth0/rp_filter", "1\n"),
                ("proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1\n"),
                ("proc/sys/net/bridge/bridge-nf-call-iptables", "0\n"),
                ("proc/sys/net/netfilter/nf_conntrack_count", "950\n"),
                ("proc/sys/net/netfilter/nf_conntrack_max", "1000\n"),
                ("proc/sys/net/ipv4/neigh/default/gc_thresh3", "1024\n"),
                ("proc/thread-self/net/netstat", "TcpExt: A IPReversePathFilter B\nTcpExt: 1 42 3\nIpExt: X\nIpExt: 9\n"),
            ],
        );
        let root = tree.0.as_path();
        assert_eq!((rp_filter(root, name("eth0")), rp_filter(root, name("eth1"))), (Some(1), None));
        assert_eq!(rp_dropped(root), Some(42));
        assert!(is_ipv6_disabled(root, name("eth0")) && !is_ipv6_disabled(root, name("eth1")));
        assert_eq!(bridge_calls(root), PerFamily { v4: Some(false), v6: None });
        assert_eq!(conntrack(root), Some(Usage { used: 950, limit: 1000 }));
        assert_eq!(neighbours(root, |_| 7), PerFamily { v4: Some(Usage { used: 7, limit: 1024 }), v6: None });
    }

    #[test]
    fn managers_are_read_from_their_own_files() {
        let tree = Tree::new(
            "managers",
            &[
                ("run/NetworkManager/devices/7", "[device]\nmanaged=true\n"),
                ("run/systemd/netif/links/7", "ADMIN_STATE=configuring\nOPER_STATE=routable\n"),
                ("run/NetworkManager/devices/8", "[device]\nmanaged=false\n"),
                ("run/systemd/netif/links/8", "ADMIN_STATE=unmanaged\n"),
            ],
        );
        assert_eq!(managers(&tree.0, 7), [Manager::NetworkManager, Manager::Networkd]);
        assert_eq!(managers(&tree.0, 8), []);
        assert_eq!(managers(&tree.0, 9), []);
    }

    #[test]
    fn garbled_counters_are_unknown() {
        for text in ["", "TcpExt: A\n", "TcpExt: IPReversePathFilter\nTcpExt:\n", "TcpExt: IPReversePathFilter\nTcpExt: x\n"] {
            assert_eq!(counter(text, "TcpExt:", "IPReversePathFilter"), None, "{text:?}");
        }
    }
}
