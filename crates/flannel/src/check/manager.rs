//! NetworkManager or systemd-networkd manages a device of the daemon or the pods' bridge.

use super::{Facts, Finding, Manager};

pub(super) const CODE: &str = "managed-device";
pub(super) const REASON: &str =
    "A program that manages an interface may give it another address, MAC or state, or remove the daemon's routes when it restarts.";

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (manager, program, fix) in [
        (
            Manager::NetworkManager,
            "NetworkManager",
            "write \"[keyfile]\" and \"unmanaged-devices=interface-name:flannel*;interface-name:cni*;interface-name:veth*\" to /etc/NetworkManager/conf.d/flannel.conf; systemctl reload NetworkManager",
        ),
        (
            Manager::Networkd,
            "systemd-networkd",
            "write \"[Match]\", \"Name=flannel* cni* veth*\", \"[Link]\" and \"Unmanaged=yes\" to /etc/systemd/network/10-flannel.network; networkctl reload",
        ),
    ] {
        let names: Vec<String> = facts.host.managed.iter().filter(|(_, by)| *by == manager).map(|(name, _)| name.to_string()).collect();
        if !names.is_empty() {
            findings.push(Finding::warning(CODE, format!("{program} manages {}", names.join(", ")), fix));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::{Check, HostFacts, fixture::findings};
    use super::*;
    use expect_test::expect;

    #[test]
    fn managed_devices_are_named_by_program() {
        let managed = [("flannel.1", Manager::Networkd), ("cni0", Manager::NetworkManager), ("cni0", Manager::Networkd)];
        let managed = managed.map(|(name, by)| (name.parse().unwrap(), by)).to_vec();
        expect![[r#"
            warning managed-device NetworkManager manages cni0; fix: write "[keyfile]" and "unmanaged-devices=interface-name:flannel*;interface-name:cni*;interface-name:veth*" to /etc/NetworkManager/conf.d/flannel.conf; systemctl reload NetworkManager
            warning managed-device systemd-networkd manages flannel.1, cni0; fix: write "[Match]", "Name=flannel* cni* veth*", "[Link]" and "Unmanaged=yes" to /etc/systemd/network/10-flannel.network; networkctl reload
        "#]]
        .assert_eq(&findings(Check::Manager, &HostFacts { managed, ..HostFacts::default() }));
    }
}
