//! Configurations, hosts and sequences of calls that users reported: several attachments of a container, unset fields, a
//! read-only `/proc/sys`, values that ADD rejects and DEL must accept.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "robustness/bandwidth.rs"]
mod bandwidth;
#[path = "robustness/firewalld.rs"]
mod firewalld;
#[path = "support/host.rs"]
mod host;
#[path = "robustness/masquerade.rs"]
mod masquerade;
#[path = "robustness/ports.rs"]
mod ports;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use flannel::IfName;
use host::Host;
use kernel::netlink::{Protocol, Socket};
use kernel::netns::{self, Netns};
use kernel::{link, lock, sysctl};
use libtest_mimic::{Arguments, Trial};
use serde_json::{Value, json};

type Test = fn(&Host);

fn main() {
    let arguments = Arguments::from_args();
    if !arguments.list {
        netns::isolate(Path::new("/mnt")).expect("these tests need namespaces");
        // The plugins' default directories are below it.
        run("mount -t tmpfs tmpfs /var/lib");
        // Plugins keep notes and requests there. Without root the directory belongs to another user.
        run("mount -t tmpfs tmpfs /run");
    }
    let tests: [(&str, Test); 26] = [
        ("del_of_an_attachment_keeps_the_ports_of_another", ports::del_of_an_attachment_keeps_the_ports_of_another),
        ("iptables_chains_of_two_interfaces_are_separate", ports::iptables_chains_of_two_interfaces_are_separate),
        ("del_removes_a_chain_that_was_flushed", ports::del_removes_a_chain_that_was_flushed),
        ("one_del_serves_all_waiting_dels", masquerade::one_del_serves_all_waiting_dels),
        ("parallel_dels_leave_no_rules", masquerade::parallel_dels_leave_no_rules),
        ("failed_add_keeps_the_ports_of_another_attachment", ports::failed_add_keeps_the_ports_of_another_attachment),
        ("untagged_port_rules_are_removed_by_address", ports::untagged_port_rules_are_removed_by_address),
        ("empty_and_null_fields_are_unset", empty_and_null_fields_are_unset),
        ("bridge_mac_never_follows_its_ports", bridge_mac_never_follows_its_ports),
        ("zero_bridge_mac_is_replaced", zero_bridge_mac_is_replaced),
        ("check_fails_when_the_gateway_is_unreachable", check_fails_when_the_gateway_is_unreachable),
        ("gc_accepts_null_and_continues_after_an_error", gc_accepts_null_and_continues_after_an_error),
        ("route_of_another_attachment_is_kept_and_not_reported", route_of_another_attachment_is_kept_and_not_reported),
        ("read_only_proc_sys_with_required_values_is_accepted", read_only_proc_sys_with_required_values_is_accepted),
        ("del_accepts_configurations_that_add_rejects", del_accepts_configurations_that_add_rejects),
        ("portmap_needs_no_route_to_the_container", ports::portmap_needs_no_route_to_the_container),
        ("tuning_follows_args_and_sysctl_names", tuning_follows_args_and_sysctl_names),
        ("bandwidth_links_have_the_reference_name_and_an_owner", bandwidth::bandwidth_links_have_the_reference_name_and_an_owner),
        ("bandwidth_limits_are_validated", bandwidth::bandwidth_limits_are_validated),
        ("firewalld_is_used_where_it_runs", firewalld::firewalld_is_used_where_it_runs),
        ("host_local_validates_requests_and_ranges", host_local_validates_requests_and_ranges),
        ("conditions_for_nftables_are_applied", ports::conditions_for_nftables_are_applied),
        ("errors_name_the_field", errors_name_the_field),
        ("long_container_ids_are_compared_whole", long_container_ids_are_compared_whole),
        ("delegation_to_itself_ends", delegation_to_itself_ends),
        ("held_address_lock_times_out", held_address_lock_times_out),
    ];
    let trial = |(name, test): (&'static str, Test)| {
        Trial::test(name, move || {
            let host = Host::new(name);
            test(&host);
            host.tear_down();
            Ok(())
        })
    };
    libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect()).exit();
}

fn run(command: &str) {
    let status = Command::new("sh").args(["-c", command]).status().unwrap();
    assert!(status.success(), "{command}");
}

/// Runs a command line in a namespace and returns what it printed.
fn shell(netns: &Netns, command: &str) -> String {
    let output = netns.run(|| Command::new("sh").args(["-c", command]).output()).unwrap().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// The configuration of a network with its own bridge and gateway.
fn network(host: &Host, number: u8) -> Value {
    let ipam = json!({ "type": "host-local", "dataDir": host.root.join("networks"), "subnet": format!("10.{number}.0.0/24") });
    json!({ "cniVersion": "1.0.0", "name": format!("net{number}"), "type": "bridge", "bridge": format!("br{number}"),
            "isDefaultGateway": true, "ipam": ipam })
}

/// The configuration of portmap in that network, with one mapping.
fn portmap(number: u8, previous: &Value, more: &Value) -> Value {
    let mapping = json!({ "hostPort": 8000 + u32::from(number), "containerPort": 80, "protocol": "tcp" });
    let mut conf = json!({ "cniVersion": "1.0.0", "name": format!("net{number}"), "type": "portmap", "prevResult": previous,
                           "runtimeConfig": { "portMappings": [mapping] } });
    conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    conf
}

/// Calls a plugin for an interface of a container.
fn call(host: &Host, plugin: &str, verb: &str, id: &str, ifname: &str, conf: &Value) -> Result<String, Value> {
    host.call_with(plugin, verb, id, &conf.to_string(), &[("CNI_IFNAME", ifname)])
}

/// The number of rules that translate to an address.
fn translations(host: &Host, address: &str) -> usize {
    host.nft().matches(&format!("dnat to {address}:")).count()
}

fn empty_and_null_fields_are_unset(host: &Host) {
    let folder = Path::new("/var/lib/cni/networks/unset");
    let _pods = ["c1", "c2"].map(|id| host.pod(id));
    let conf = |more: &Value| {
        let ipam = json!({ "type": "host-local", "dataDir": "", "subnet": "10.9.0.0/24", "rangeStart": "", "rangeEnd": null, "gateway": "",
                           "resolvConf": "", "ranges": null, "routes": null });
        let mut conf = json!({ "cniVersion": "1.0.0", "name": "unset", "type": "bridge", "bridge": "", "ipMasqBackend": "", "mtu": null,
                               "vlanTrunk": null, "dns": null, "runtimeConfig": null, "args": null, "isGateway": true, "ipam": ipam });
        conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        conf
    };
    let env = [("CNI_ARGS", "IgnoreUnknown=1;IP=;MAC=")];
    let add = |id: &str, conf: &Value| parse(&host.call_with("bridge", "ADD", id, &conf.to_string(), &env).unwrap());
    let first = add("c1", &conf(&json!({})));
    assert_eq!((&first["interfaces"][0]["name"], &first["ips"][0]["address"]), (&json!("cni0"), &json!("10.9.0.2/24")));
    assert!(folder.join("10.9.0.2").exists(), "an empty dataDir is the default one");
    let second = add("c2", &conf(&json!({ "args": { "cni": { "ips": [""], "mac": "" } }, "runtimeConfig": { "mac": "", "ips": null } })));
    assert_eq!(second["ips"][0]["address"], "10.9.0.3/24", "no address is allocated twice");
    let chained = |plugin: &str, more: Value| {
        let mut conf = json!({ "cniVersion": "1.0.0", "name": "unset", "type": plugin, "prevResult": first });
        conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        host.call(plugin, "ADD", "c1", &conf).unwrap();
        host.call(plugin, "DEL", "c1", &conf).unwrap();
    };
    let mapping = json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "", "hostIP": "" }]);
    chained(
        "portmap",
        json!({ "backend": "", "externalSetMarkChain": "", "markMasqBit": null, "conditionsV4": null, "conditionsV6": [""], "snat": null,
                "runtimeConfig": { "portMappings": mapping } }),
    );
    chained("firewall", json!({ "backend": "", "iptablesAdminChainName": "", "ingressPolicy": "" }));
    chained(
        "tuning",
        json!({ "dataDir": null, "sysctl": null, "mac": "", "mtu": 0, "args": { "cni": null }, "runtimeConfig": { "mac": "" } }),
    );
    chained("bandwidth", json!({ "ingressRate": 0, "ingressBurst": null, "runtimeConfig": { "bandwidth": null } }));
    for id in ["c1", "c2"] {
        host.call("bridge", "DEL", id, &conf(&json!({}))).unwrap();
    }
    assert!(!folder.join("10.9.0.2").exists() && !folder.join("10.9.0.3").exists());
    // The meta plugin fills in empty fields.
    let mut meta = host.conf("1.0.0");
    meta["delegate"] = json!({ "type": "", "mtu": null, "bridge": "cni1", "isDefaultGateway": true });
    meta["ipam"]["type"] = "".into();
    let _pod = host.pod("c3");
    let result = parse(&host.call("flannel", "ADD", "c3", &meta).unwrap());
    assert_eq!((&result["interfaces"][0]["name"], &result["ips"][0]["address"]), (&json!("cni1"), &json!("10.1.17.2/24")));
}

fn mac_of(host: &Host, link: &str) -> String {
    let name: IfName = link.parse().unwrap();
    host.netns.run(|| link::get(&mut Socket::open(Protocol::Route).unwrap(), name).unwrap().unwrap().mac.unwrap().to_string()).unwrap()
}

fn bridge_mac_never_follows_its_ports(host: &Host) {
    let conf = network(host, 5);
    let add =
        |id: &str, conf: &Value| parse(&host.call("bridge", "ADD", id, conf).unwrap())["interfaces"][0]["mac"].as_str().unwrap().to_owned();
    let ids = ["a", "b", "c", "d", "e"];
    let _pods = ids.map(|id| host.pod(id));
    let mut seen = Vec::new();
    for id in ids {
        seen.push(add(id, &conf));
        seen.push(mac_of(host, "br5"));
    }
    for id in ids {
        host.call("bridge", "DEL", id, &conf).unwrap();
        seen.push(mac_of(host, "br5"));
    }
    seen.dedup();
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert!(seen[0] != "00:00:00:00:00:00" && !host.nft().contains("br5"));
    // A bridge of another program that has the gateway's address already: its MAC would follow its ports.
    shell(&host.netns, "ip link add br6 type bridge; ip addr add 10.6.0.1/24 dev br6; ip link set br6 up");
    let before = mac_of(host, "br6");
    let other = network(host, 6);
    let _pods = ["f", "g", "h"].map(|id| host.pod(id));
    for id in ["f", "g", "h"] {
        assert_eq!(add(id, &other), before);
    }
    host.call("bridge", "DEL", "f", &other).unwrap();
    assert_eq!(mac_of(host, "br6"), before);
}

fn zero_bridge_mac_is_replaced(host: &Host) {
    shell(
        &host.netns,
        "ip link add br5 type bridge; ip link add d0 type veth peer name d1; ip link set d0 master br5; ip link del d0; ip addr add 10.5.0.1/24 dev br5",
    );
    assert_eq!(mac_of(host, "br5"), "00:00:00:00:00:00", "the kernel zeroes the MAC when the last port is removed");
    let conf = network(host, 5);
    let _pod = host.pod("c1");
    let mac = parse(&host.call("bridge", "ADD", "c1", &conf).unwrap())["interfaces"][0]["mac"].as_str().unwrap().to_owned();
    assert_ne!(mac, "00:00:00:00:00:00");
    host.call("bridge", "DEL", "c1", &conf).unwrap();
    assert_eq!(mac_of(host, "br5"), mac);
}

fn check_fails_when_the_gateway_is_unreachable(host: &Host) {
    let pod = host.pod("c1");
    let mut conf = network(host, 5);
    conf["isDefaultGateway"] = false.into();
    conf["isGateway"] = true.into();
    conf["prevResult"] = parse(&call(host, "bridge", "ADD", "c1", "eth0", &conf).unwrap());
    let check = || call(host, "bridge", "CHECK", "c1", "eth0", &conf);
    check().unwrap();
    shell(&pod, "ip route delete 10.5.0.0/24");
    assert_eq!(check().unwrap_err()["msg"], "the route to 10.5.0.0/24 is missing in the container");
    shell(&pod, "ip link set eth0 down");
    assert_eq!(check().unwrap_err()["msg"], "eth0 is down in the container");
}

fn gc_accepts_null_and_continues_after_an_error(host: &Host) {
    let mut conf = host.conf("1.1.0");
    for id in ["c1", "c2"] {
        host.pod(id);
        host.call("flannel", "ADD", id, &conf).unwrap();
    }
    // An address file that cannot be removed.
    let stuck = host.root.join("networks/net/10.1.17.1");
    std::fs::write(&stuck, "gone\r\neth0").unwrap();
    run(&format!("mount --bind {0} {0}", stuck.display()));
    conf["cni.dev/valid-attachments"] = Value::Null;
    let error = host.call("flannel", "GC", "", &conf).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("10.1.17.1"), "{error}");
    let addresses: Vec<String> = host.files("networks/net").into_iter().filter(|name| name.starts_with("10.")).collect();
    assert_eq!(addresses, ["10.1.17.1"], "all others are collected");
    assert!(host.files("flannel").is_empty());
    run(&format!("umount {}", stuck.display()));
    host.call("flannel", "GC", "", &conf).unwrap();
    assert!(!stuck.exists());
}

fn route_of_another_attachment_is_kept_and_not_reported(host: &Host) {
    let pod = host.pod("c1");
    let conf = |number| {
        let mut conf = network(host, number);
        conf["ipam"]["routes"] = json!([{ "dst": "198.51.100.0/24" }, { "dst": format!("10.{}.0.0/16", 100 + number) }]);
        conf
    };
    call(host, "bridge", "ADD", "c1", "eth0", &conf(5)).unwrap();
    let result = parse(&call(host, "bridge", "ADD", "c1", "net1", &conf(6)).unwrap());
    assert_eq!(result["routes"], json!([{ "dst": "10.106.0.0/16" }]), "the result lists only the routes that were added");
    let routes = shell(&pod, "ip route");
    assert!(routes.contains("default via 10.5.0.1 dev eth0") && routes.contains("198.51.100.0/24 via 10.5.0.1 dev eth0"), "{routes}");
    assert!(routes.contains("10.106.0.0/16 via 10.6.0.1 dev net1") && !routes.contains("default via 10.6.0.1"), "{routes}");
    let mut check = conf(6);
    check["prevResult"] = result;
    call(host, "bridge", "CHECK", "c1", "net1", &check).unwrap();
}

fn read_only_proc_sys_with_required_values_is_accepted(host: &Host) {
    let script = "#!/bin/sh\nmount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys && exec \"$CNI_PATH/$1\"\n";
    let inner = host.root.join("read-only");
    std::fs::write(&inner, script).unwrap();
    for plugin in ["bridge", "portmap"] {
        let wrapper = host.root.join("bin").join(format!("{plugin}-read-only"));
        std::fs::write(&wrapper, format!("#!/bin/sh\nexec unshare --mount {} {plugin}\n", inner.display())).unwrap();
        std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    std::fs::set_permissions(&inner, std::fs::Permissions::from_mode(0o755)).unwrap();
    let _pods = ["c1", "c2"].map(|id| host.pod(id));
    let conf = network(host, 5);
    let error = host.call("bridge-read-only", "ADD", "c1", &conf).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("net/ipv4/ip_forward = 1"), "{error}");
    host.netns.run(|| sysctl::write("net/ipv4/ip_forward", "1")).unwrap().unwrap();
    for id in ["c1", "c2"] {
        let result = parse(&host.call("bridge-read-only", "ADD", id, &conf).unwrap());
        host.call("portmap-read-only", "ADD", id, &portmap(5, &result, &json!({}))).unwrap();
    }
    assert_eq!(shell(&host.netns, "cat /proc/sys/net/ipv4/conf/br5/route_localnet").trim(), "1");
}

fn del_accepts_configurations_that_add_rejects(host: &Host) {
    let _pod = host.pod("c1");
    let previous = parse(&host.call("bridge", "ADD", "c1", &network(host, 5)).unwrap());
    let only_del_accepts = |plugin: &str, conf: &Value| {
        host.call(plugin, "ADD", "c1", conf).expect_err("ADD rejects it");
        host.call(plugin, "DEL", "c1", conf).unwrap_or_else(|error| panic!("{plugin} {conf}: {error}"));
    };
    for mapping in [
        json!({ "hostPort": 65536, "containerPort": 80 }),
        json!({ "hostPort": 0, "containerPort": 80 }),
        json!({ "hostPort": 80, "containerPort": 80, "protocol": "icmp" }),
        json!({ "hostPort": 80, "containerPort": 80, "hostIP": "192.168.000.001" }),
        json!(7),
    ] {
        only_del_accepts("portmap", &portmap(5, &previous, &json!({ "runtimeConfig": { "portMappings": [mapping] } })));
    }
    for more in [json!({ "backend": "x" }), json!({ "externalSetMarkChain": "a b" }), json!({ "markMasqBit": 99 }), json!({ "snat": "x" })]
    {
        only_del_accepts("portmap", &portmap(5, &previous, &more));
    }
    let chained = |plugin: &str, more: Value| {
        let mut conf = json!({ "cniVersion": "1.0.0", "name": "net5", "type": plugin, "prevResult": previous });
        conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        only_del_accepts(plugin, &conf);
    };
    for more in [
        json!({ "backend": "firewalld" }),
        json!({ "backend": 7 }),
        json!({ "ingressPolicy": "pigeons" }),
        json!({ "iptablesAdminChainName": "a b" }),
    ] {
        chained("firewall", more);
    }
    chained("firewall", json!({ "prevResult": { "ips": [{ "address": "nonsense" }] } }));
    chained("tuning", json!({ "dataDir": 7 }));
    chained("tuning", json!({ "sysctl": { "kernel.hostname": "x" } }));
    chained("bandwidth", json!({ "ingressRate": "x" }));
    for more in [
        json!({ "bridge": "a/b" }),
        json!({ "mtu": 10 }),
        json!({ "ipMasqBackend": "x" }),
        json!({ "ipMasq": "x" }),
        json!({ "hairpinMode": true, "promiscMode": true }),
        json!({ "vlan": 5000 }),
        json!({ "ipam": 7 }),
        json!({ "ipam": { "type": "host-local", "dataDir": 7, "subnet": "10.5.0.0/24" } }),
        json!({ "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.5.0.7/24" }]] } }),
    ] {
        let mut conf = network(host, 5);
        conf["name"] = "other".into();
        conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        only_del_accepts("bridge", &conf);
    }
    let mut meta = host.conf("1.0.0");
    meta["dataDir"] = 7.into();
    only_del_accepts("flannel", &meta);
}

fn tuning_follows_args_and_sysctl_names(host: &Host) {
    let pod = host.pod("c1");
    let previous = parse(&host.call("bridge", "ADD", "c1", &network(host, 5)).unwrap());
    let conf = |more: &Value| {
        let mut conf =
            json!({ "cniVersion": "1.0.0", "name": "net5", "type": "tuning", "dataDir": host.root.join("tuning"), "prevResult": previous });
        conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        conf
    };
    let args = json!({ "mtu": 1400, "promisc": true, "allmulti": true, "txQLen": 77, "mac": "02:00:00:00:00:01",
                       "sysctl": { "net.ipv4.conf.IFNAME.log_martians": "1" } });
    let all =
        conf(&json!({ "mtu": 1300, "mac": "02:00:00:00:00:04", "runtimeConfig": { "mac": "02:00:00:00:00:02" }, "args": { "cni": args } }));
    let env = [("CNI_ARGS", "MAC=02:00:00:00:00:03")];
    let result = parse(&host.call_with("tuning", "ADD", "c1", &all.to_string(), &env).unwrap());
    assert_eq!(result["interfaces"][2]["mac"], "02:00:00:00:00:01");
    let shown = shell(&pod, "ip -d link show eth0; cat /proc/sys/net/ipv4/conf/eth0/log_martians");
    for wanted in ["mtu 1400", "PROMISC", "ALLMULTI", "qlen 77", "02:00:00:00:00:01"] {
        assert!(shown.contains(wanted), "{wanted}: {shown}");
    }
    assert!(shown.ends_with("1\n"), "{shown}");
    host.call_with("tuning", "CHECK", "c1", &all.to_string(), &env).unwrap();
    host.call_with("tuning", "DEL", "c1", &all.to_string(), &env).unwrap();
    assert!(!shell(&pod, "ip -d link show eth0").contains("mtu 1400"));
    // The other sources of a MAC, in order of precedence.
    for (more, env, mac) in [
        (
            json!({ "mac": "02:00:00:00:00:04", "runtimeConfig": { "mac": "02:00:00:00:00:02" } }),
            "MAC=02:00:00:00:00:03",
            "02:00:00:00:00:02",
        ),
        (json!({ "mac": "02:00:00:00:00:04" }), "MAC=02:00:00:00:00:03", "02:00:00:00:00:03"),
        (json!({ "mac": "02:00:00:00:00:04" }), "", "02:00:00:00:00:04"),
    ] {
        let text = conf(&more).to_string();
        let result = parse(&host.call_with("tuning", "ADD", "c1", &text, &[("CNI_ARGS", env)]).unwrap());
        assert_eq!(result["interfaces"][2]["mac"], mac);
        host.call_with("tuning", "DEL", "c1", &text, &[]).unwrap();
    }
    // Without an interface: sysctls alone do not need one. The sysctl of an interface with a dot, one that is set twice, and a
    // write-only one.
    shell(&pod, "ip link add eth0.798 type veth peer name other");
    let sysctls = conf(&json!({ "sysctl": {
        "net.ipv4.conf.eth0/798.log_martians": "1",
        "net.ipv4.ip_default_ttl": "77", "net/ipv4/ip_default_ttl": "77",
        "net.ipv4.route.flush": "1",
    } }));
    let env = [("CNI_IFNAME", "absent")];
    host.call_with("tuning", "ADD", "c1", &sysctls.to_string(), &env).unwrap();
    host.call_with("tuning", "CHECK", "c1", &sysctls.to_string(), &env).unwrap();
    let values = shell(&pod, "cat /proc/sys/net/ipv4/conf/eth0.798/log_martians /proc/sys/net/ipv4/ip_default_ttl");
    assert_eq!(values, "1\n77\n");
    // A JSON parser keeps the last of two equal keys; a duplicate is more likely a mistake.
    let text = conf(&json!({ "sysctl": { "net.ipv4.ip_default_ttl": "70" } })).to_string();
    let twice = text.replace("\"net.ipv4.ip_default_ttl\":\"70\"", "\"net.ipv4.ip_default_ttl\":\"70\",\"net.ipv4.ip_default_ttl\":\"71\"");
    let error = host.call_with("tuning", "ADD", "c1", &twice, &[]).unwrap_err();
    assert_eq!(error["msg"], "sysctl: duplicated key \"net.ipv4.ip_default_ttl\": give it one value");
    host.call_with("tuning", "DEL", "c1", &twice, &[]).unwrap();
}

fn host_local_validates_requests_and_ranges(host: &Host) {
    let conf = |version: &str, ipam: &Value, more: &Value| {
        let mut conf = host.bridge_conf(ipam);
        conf["cniVersion"] = version.into();
        conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        conf
    };
    let plain = json!({ "subnet": "10.9.0.0/24" });
    let both = conf("1.0.0", &plain, &json!({ "args": { "cni": { "ips": ["10.9.0.7"] } }, "runtimeConfig": { "ips": ["10.9.0.7/24"] } }));
    let env = [("CNI_ARGS", "IgnoreUnknown=True;K8S_POD_NAME=x;IP=10.9.0.7")];
    let result = parse(&host.call_with("host-local", "ADD", "a", &both.to_string(), &env).unwrap());
    assert_eq!(result["ips"][0]["address"], "10.9.0.7/24");
    // A file of an old version names the container alone. It is a reservation too.
    std::fs::write(host.root.join("networks/net/10.9.0.99"), "old").unwrap();
    let error = host.call("host-local", "ADD", "old", &conf("1.0.0", &plain, &json!({}))).unwrap_err();
    assert!(error["msg"].as_str().unwrap().starts_with("10.9.0.99 has been allocated to old"), "{error}");
    let sets = json!({ "ranges": [[{ "subnet": "10.10.0.0/24" }], [{ "subnet": "10.11.0.0/24" }]] });
    let error = host.call("host-local", "ADD", "b", &conf("0.2.0", &sets, &json!({}))).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("CNI version 0.2.0 does not support more than 1 address per family"), "{error}");
    for gateway in ["10.10.0.1", "fd00::1"] {
        let ipam = json!({ "subnet": "10.9.0.0/24", "gateway": gateway });
        let error = host.call("host-local", "ADD", "b", &conf("1.0.0", &ipam, &json!({}))).unwrap_err();
        assert_eq!(error["msg"], format!("ipam.ranges.gateway: {gateway} is not in 10.9.0.0/24"));
    }
    let _pod = host.pod("c1");
    let layer2 = json!({ "cniVersion": "0.2.0", "name": "net", "type": "bridge" });
    let error = host.call("bridge", "ADD", "c1", &layer2).unwrap_err();
    assert!(error["msg"].as_str().unwrap().starts_with("ipam: cannot convert: no valid IP addresses"), "{error}");
    assert!(host.links().iter().all(|name| !name.starts_with("veth")), "{:?}", host.links());
    let reserved: Vec<String> = host.files("networks/net").into_iter().filter(|name| name.starts_with("10.")).collect();
    assert_eq!(reserved, ["10.9.0.7", "10.9.0.99"], "a refused ADD reserves nothing");
    // A directory with an address's name is skipped.
    std::fs::create_dir(host.root.join("networks/net/10.9.0.2")).unwrap();
    let result = parse(
        &host
            .call("host-local", "ADD", "b", &conf("1.0.0", &json!({ "subnet": "10.9.0.0/24", "rangeEnd": "10.9.0.6" }), &json!({})))
            .unwrap(),
    );
    assert_eq!(result["ips"][0]["address"], "10.9.0.3/24");
}

fn errors_name_the_field(host: &Host) {
    let _pod = host.pod("c1");
    let bridge = |more: Value| {
        let mut conf = network(host, 5);
        conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        host.call("bridge", "ADD", "c1", &conf).unwrap_err()["msg"].as_str().unwrap().to_owned()
    };
    for (more, wanted) in [
        (json!({ "mtu": 70000 }), "mtu: 70000 is out of range 68..=65535"),
        (json!({ "mtu": 10 }), "mtu: 10 is out of range 68..=65535"),
        (json!({ "bridge": "all" }), "bridge: \"all\" is reserved by the kernel"),
        (json!({ "bridge": "br%d" }), "bridge: \"br%d\" contains %, which the kernel replaces by a number: choose another name"),
        (json!({ "runtimeConfig": { "mac": "01:00:5e:00:00:01" } }), "mac: 01:00:5e:00:00:01 is a multicast or zero address"),
        (json!({ "runtimeConfig": { "mac": "00:00:00:00:00:00" } }), "mac: 00:00:00:00:00:00 is a multicast or zero address"),
    ] {
        let text = bridge(more);
        assert!(text.starts_with(wanted), "{wanted}: {text}");
    }
    for (ifname, reason) in [
        ("all", "is reserved by the kernel"),
        ("default", "is reserved by the kernel"),
        ("eth%d", "contains %, which the kernel replaces by a number"),
    ] {
        let error = call(host, "bridge", "ADD", "c1", ifname, &network(host, 5)).unwrap_err();
        assert_eq!(error["msg"], format!("invalid CNI_IFNAME: {ifname:?} {reason}: choose another name"));
        call(host, "bridge", "DEL", "c1", ifname, &network(host, 5)).unwrap();
    }
    assert!(!host.links().contains("br5"), "no bridge was created");
    let text = bridge(json!({ "ipam": { "type": "host-local", "subnet": "10.5.0.1/32", "gateway": "10.6.0.1" } }));
    assert!(text.starts_with("ipam.ranges.subnet: 10.5.0.1/32 is too small"), "{text}");
    // A byte-order mark is ignored.
    let env = std::fs::read_to_string(host.root.join("subnet.env")).unwrap();
    std::fs::write(host.root.join("subnet.env"), format!("\u{feff}{env}")).unwrap();
    host.call_with("flannel", "ADD", "c1", &format!("\u{feff}{}", host.conf("1.0.0")), &[]).unwrap();
}

fn long_container_ids_are_compared_whole(host: &Host) {
    let ids = ["1", "2"].map(|last| format!("{}{last}", "x".repeat(600)));
    let mut conf = network(host, 5);
    conf["macspoofchk"] = true.into();
    conf["ipMasq"] = true.into();
    // The name of a namespace's file cannot be that long.
    let pods = ["one", "two"].map(|name| host.pod(name));
    let paths = ["one", "two"].map(|name| host.path(name).to_string_lossy().into_owned());
    let call = |plugin: &str, verb: &str, at: usize, conf: &Value| {
        host.call_with(plugin, verb, &ids[at], &conf.to_string(), &[("CNI_NETNS", &paths[at])]).unwrap()
    };
    let results = [0, 1].map(|at| {
        let result = parse(&call("bridge", "ADD", at, &conf));
        call("portmap", "ADD", at, &portmap(5 + u8::try_from(at).unwrap(), &result, &json!({})));
        result
    });
    assert_eq!((translations(host, "10.5.0.2"), translations(host, "10.5.0.3")), (1, 1));
    call("portmap", "DEL", 0, &portmap(5, &Value::Null, &json!({})));
    assert_eq!((translations(host, "10.5.0.2"), translations(host, "10.5.0.3")), (0, 1), "the other container keeps its ports");
    call("bridge", "DEL", 0, &conf);
    let rules = host.nft();
    assert!(!rules.contains("10.5.0.2 ") && rules.contains("10.5.0.3 ") && rules.matches("-mac {").count() == 1, "{rules}");
    assert!(!host.files("networks/net5").contains("10.5.0.2"), "the address was released");
    call("portmap", "DEL", 1, &portmap(6, &results[1], &json!({})));
    call("bridge", "DEL", 1, &conf);
    assert!(!host.nft().contains("10.5.0.") && !host.nft().contains("-mac {"), "{}", host.nft());
    assert!(!host.files("networks/net5").iter().any(|name| name.starts_with("10.")));
    drop(pods);
}

fn delegation_to_itself_ends(host: &Host) {
    let _pod = host.pod("c1");
    let mut conf = network(host, 5);
    conf["ipam"]["type"] = "bridge".into();
    host.call("bridge", "ADD", "c1", &conf).unwrap_err();
    host.call("bridge", "DEL", "c1", &conf).unwrap();
    // Also across processes: a script that calls the plugin again.
    let script = "#!/bin/sh\nexec \"${0%/*}/bridge\"\n";
    let path = host.root.join("bin/again");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    conf["ipam"]["type"] = "again".into();
    conf["cniVersion"] = "1.1.0".into();
    let error = host.call("bridge", "STATUS", "", &conf).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("does one delegate to itself?"), "{error}");
}

fn held_address_lock_times_out(host: &Host) {
    std::fs::create_dir_all(host.root.join("networks/net")).unwrap();
    let _held = lock::open(&host.root.join("networks/net/lock"), 0o600, lock::PATIENCE).unwrap();
    let error = host.call("host-local", "ADD", "a", &host.bridge_conf(&json!({ "subnet": "10.9.0.0/24" }))).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert!(error["msg"].as_str().unwrap().starts_with("ipam.dataDir: cannot lock "), "{error}");
}
