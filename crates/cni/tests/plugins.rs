//! The plugins as programs: environment and standard input, the JSON that they print, and the objects in the namespaces
//! afterwards. After DEL nothing is left.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use flannel::{Family, IfName};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::{self, Netns};
use kernel::{addr, link, route, sysctl};
use libtest_mimic::{Arguments, Trial};
use serde_json::{Value, json};

#[path = "support/host.rs"]
mod host;

use host::Host;

type Test = fn(&Host);

fn main() {
    let arguments = Arguments::from_args();
    if !arguments.list {
        netns::isolate(Path::new("/mnt")).expect("these tests need namespaces");
    }
    let tests: [(&str, Test); 19] = [
        ("add_check_and_del_by_the_meta_plugin", add_check_and_del_by_the_meta_plugin),
        ("attachments_of_a_container_are_deleted_separately", attachments_of_a_container_are_deleted_separately),
        ("host_namespace_is_refused", host_namespace_is_refused),
        ("result_follows_the_configured_version", result_follows_the_configured_version),
        ("bridge_adds_default_route_and_enables_forwarding", bridge_adds_default_route_and_enables_forwarding),
        ("ranges_of_both_families_are_allocated", ranges_of_both_families_are_allocated),
        ("bridge_masquerades_when_the_daemon_does_not", bridge_masquerades_when_the_daemon_does_not),
        ("host_local_files_match_the_reference_plugin", host_local_files_match_the_reference_plugin),
        ("exhausted_range_is_refilled_by_del", exhausted_range_is_refilled_by_del),
        ("empty_address_file_counts_as_free", empty_address_file_counts_as_free),
        ("requested_addresses_and_macs_are_applied_or_refused", requested_addresses_and_macs_are_applied_or_refused),
        ("failed_add_leaves_nothing", failed_add_leaves_nothing),
        ("del_of_a_missing_attachment_succeeds", del_of_a_missing_attachment_succeeds),
        ("gc_frees_addresses_of_invalid_attachments", gc_frees_addresses_of_invalid_attachments),
        ("check_reports_missing_objects", check_reports_missing_objects),
        ("invalid_input_is_refused_with_cni_codes", invalid_input_is_refused_with_cni_codes),
        ("foreign_delegate_is_executed", foreign_delegate_is_executed),
        ("loopback_sets_lo_up_and_down", loopback_sets_lo_up_and_down),
        ("program_links_no_async_runtime", program_links_no_async_runtime),
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

fn socket() -> Socket {
    Socket::open(Protocol::Route).unwrap()
}

fn name(text: &str) -> IfName {
    text.parse().unwrap()
}

/// Addresses and routes of an interface, as text.
fn inside(netns: &Netns, ifname: &str) -> (Vec<String>, Vec<String>) {
    netns
        .run(|| {
            let mut socket = socket();
            let index = link::get(&mut socket, name(ifname)).unwrap().unwrap().index;
            let addrs =
                addr::list(&mut socket, index).unwrap().into_iter().filter(|a| !a.link_scope).map(|a| a.addr.cidr.to_string()).collect();
            let mut routes = Vec::new();
            for family in Family::ALL {
                let list = route::list(&mut socket, family, route::Filter::Oif(index)).unwrap();
                routes.extend(
                    list.iter()
                        .filter(|r| !r.dst.to_string().starts_with("fe80"))
                        .map(|r| format!("{}{}", r.dst, r.via.map(|v| format!(" via {v}")).unwrap_or_default())),
                );
            }
            (addrs, routes)
        })
        .unwrap()
}

fn add_check_and_del_by_the_meta_plugin(host: &Host) {
    let pod = host.pod("c1");
    let result = host.add("c1");
    assert_eq!(result["ips"], json!([{ "interface": 2, "address": "10.1.17.2/24", "gateway": "10.1.17.1" }]));
    assert_eq!(result["routes"], json!([{ "dst": "10.1.0.0/16" }, { "dst": "0.0.0.0/0", "gw": "10.1.17.1" }]));
    let names: Vec<&str> = result["interfaces"].as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap()).collect();
    assert_eq!((names[0], &names[1][..4], names[2]), ("cni0", "veth", "eth0"));
    assert_eq!(result["interfaces"][2]["sandbox"], host.path("c1").to_string_lossy().as_ref());

    let (addrs, routes) = inside(&pod, "eth0");
    assert_eq!(addrs, ["10.1.17.2/24"]);
    assert_eq!(routes, ["0.0.0.0/0 via 10.1.17.1", "10.1.0.0/16 via 10.1.17.1", "10.1.17.0/24"]);
    pod.run(|| {
        let eth0 = link::get(&mut socket(), name("eth0")).unwrap().unwrap();
        assert_eq!((eth0.mtu, eth0.up), (1450, true));
        assert_eq!(eth0.mac.unwrap().to_string(), result["interfaces"][2]["mac"].as_str().unwrap());
        assert_eq!(sysctl::read("net/ipv4/conf/eth0/arp_notify").unwrap().as_deref(), Some("1"));
    })
    .unwrap();
    host.netns
        .run(|| {
            assert_eq!(sysctl::read("net/ipv4/ip_forward").unwrap().as_deref(), Some("1"));
            let (bridge, veth) =
                (link::get(&mut socket(), name("cni0")).unwrap().unwrap(), link::get(&mut socket(), name(names[1])).unwrap().unwrap());
            assert_eq!((veth.master, veth.mtu, veth.operstate), (bridge.index, 1450, link::OPER_UP));
            assert_eq!(bridge.mac.unwrap().to_string(), result["interfaces"][0]["mac"].as_str().unwrap());
        })
        .unwrap();
    assert_eq!(inside(&host.netns, "cni0").0, ["10.1.17.1/24"]);

    let mut check = host.conf("1.0.0");
    check["prevResult"] = result;
    assert_eq!(host.call("flannel", "CHECK", "c1", &check).unwrap(), "");

    let second = host.pod("c2");
    assert_eq!(host.add("c2")["ips"][0]["address"], "10.1.17.3/24");
    let mut duplicate = host.call("flannel", "ADD", "c2", &host.conf("1.0.0")).unwrap_err();
    assert_eq!(duplicate["code"], 999);
    assert!(duplicate["msg"].take().as_str().unwrap().contains("already exists"));
    drop(second);

    for id in ["c1", "c2"] {
        assert_eq!(host.call("flannel", "DEL", id, &host.conf("1.0.0")).unwrap(), "");
    }
    assert_eq!(host.links(), BTreeSet::from(["cni0".to_owned(), "lo".to_owned()]));
    assert_eq!(host.files("networks/net"), BTreeSet::from(["last_reserved_ip.0".to_owned(), "lock".to_owned()]));
    assert!(host.files("flannel").is_empty());
}

fn attachments_of_a_container_are_deleted_separately(host: &Host) {
    let pod = host.pod("c1");
    let conf = host.conf("1.0.0").to_string();
    let net1 = [("CNI_IFNAME", "net1")];
    host.add("c1");
    host.call_with("flannel", "ADD", "c1", &conf, &net1).unwrap();
    assert_eq!(host.files("flannel"), ["c1", "c1:net1"].map(ToOwned::to_owned).into());
    // The first one's way into the pod network is still its own.
    assert!(inside(&pod, "eth0").1.contains(&"10.1.0.0/16 via 10.1.17.1".to_owned()));
    host.call("flannel", "DEL", "c1", &host.conf("1.0.0")).unwrap();
    assert_eq!(inside(&pod, "net1").0, ["10.1.17.3/24"], "the other stays");
    host.call_with("flannel", "DEL", "c1", &conf, &net1).unwrap();
    assert_eq!(host.links(), BTreeSet::from(["cni0".to_owned(), "lo".to_owned()]));
    assert_eq!(host.files("networks/net"), BTreeSet::from(["last_reserved_ip.0".to_owned(), "lock".to_owned()]));
    assert!(host.files("flannel").is_empty());
}

fn host_namespace_is_refused(host: &Host) {
    let own = [("CNI_NETNS", "/proc/self/ns/net")];
    for (plugin, verb, conf) in
        [("flannel", "ADD", host.conf("1.0.0")), ("loopback", "DEL", json!({ "cniVersion": "1.0.0", "name": "lo", "type": "loopback" }))]
    {
        let error = host.call_with(plugin, verb, "c1", &conf.to_string(), &own).unwrap_err();
        assert_eq!(error["code"], 8, "{error}");
    }
    assert_eq!(host.links(), BTreeSet::from(["lo".to_owned()]));
}

fn result_follows_the_configured_version(host: &Host) {
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let id = format!("v{version}");
        let _pod = host.pod(&id);
        let result: Value = serde_json::from_str(&host.call("flannel", "ADD", &id, &host.conf(version)).unwrap()).unwrap();
        assert_eq!(result["cniVersion"], version);
        match version {
            "0.1.0" | "0.2.0" => assert!(result["ip4"]["ip"].is_string() && result.get("ips").is_none(), "{result}"),
            "0.3.0" | "0.3.1" | "0.4.0" => assert!(result["ips"][0]["version"] == "4" && result["dns"] == json!({}), "{result}"),
            _ => assert!(result["ips"][0].get("version").is_none() && result.get("dns").is_none(), "{result}"),
        }
        host.call("flannel", "DEL", &id, &host.conf(version)).unwrap();
    }
    let answer: Value = serde_json::from_str(&host.call_with("bridge", "VERSION", "", "", &[]).unwrap()).unwrap();
    assert_eq!(answer["supportedVersions"].as_array().unwrap().len(), 7);
}

fn bridge_adds_default_route_and_enables_forwarding(host: &Host) {
    let pod = host.pod("c1");
    let mut conf = host.bridge_conf(&json!({ "subnet": "10.9.0.0/24", "routes": [{ "dst": "192.168.0.0/16", "gw": "10.9.0.77" }] }));
    conf["bridge"] = "br9".into();
    conf["hairpinMode"] = true.into();
    conf["dns"] = json!({ "nameservers": ["10.9.0.53"] });
    let result: Value = serde_json::from_str(&host.call("bridge", "ADD", "c1", &conf).unwrap()).unwrap();
    assert_eq!(result["dns"]["nameservers"][0], "10.9.0.53");
    assert_eq!(inside(&pod, "eth0").1, ["0.0.0.0/0 via 10.9.0.1", "10.9.0.0/24", "192.168.0.0/16 via 10.9.0.77"]);
    let veth = result["interfaces"][1]["name"].as_str().unwrap();
    let shown = host
        .netns
        .run(|| Command::new("ip").args(["-d", "link", "show", veth]).output())
        .unwrap()
        .expect("ip is installed by `cargo xtask test`");
    assert!(String::from_utf8_lossy(&shown.stdout).contains("hairpin on"));
    // Another subnet on the same bridge is refused, unless forced.
    let mut other = host.bridge_conf(&json!({ "subnet": "10.8.0.0/24" }));
    other["bridge"] = "br9".into();
    other["name"] = "other".into();
    let _second = host.pod("c2");
    let error = host.call("bridge", "ADD", "c2", &other).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("already has an IP address different from 10.8.0.1/24"), "{error}");
    other["forceAddress"] = true.into();
    host.call("bridge", "ADD", "c2", &other).unwrap();
    assert_eq!(inside(&host.netns, "br9").0, ["10.8.0.1/24"]);
    // An address before the gateway's does no harm.
    other["forceAddress"] = false.into();
    let ip = |args: &[&str]| assert!(host.netns.run(|| Command::new("ip").args(args).status()).unwrap().unwrap().success());
    ip(&["addr", "flush", "dev", "br9"]);
    ip(&["addr", "add", "192.0.2.1/24", "dev", "br9"]);
    ip(&["addr", "add", "10.8.0.1/24", "dev", "br9"]);
    let _third = host.pod("c3");
    host.call("bridge", "ADD", "c3", &other).unwrap();
    assert_eq!(inside(&host.netns, "br9").0, ["192.0.2.1/24", "10.8.0.1/24"]);
}

fn ranges_of_both_families_are_allocated(host: &Host) {
    let pod = host.pod("c1");
    let conf = host.bridge_conf(&json!({ "ranges": [[{ "subnet": "10.9.0.0/24" }], [{ "subnet": "fd00:9::/64" }]] }));
    let result: Value = serde_json::from_str(&host.call("bridge", "ADD", "c1", &conf).unwrap()).unwrap();
    assert_eq!(result["ips"][1]["address"], "fd00:9::2/64");
    let (addrs, routes) = inside(&pod, "eth0");
    assert_eq!(addrs, ["10.9.0.2/24", "fd00:9::2/64"]);
    assert!(routes.contains(&"::/0 via fd00:9::1".to_owned()), "{routes:?}");
    assert_eq!(inside(&host.netns, "cni0").0, ["10.9.0.1/24", "fd00:9::1/64"]);
    host.call("bridge", "DEL", "c1", &conf).unwrap();
    assert_eq!(
        host.files("networks/net"),
        BTreeSet::from(["last_reserved_ip.0".to_owned(), "last_reserved_ip.1".to_owned(), "lock".to_owned()])
    );
}

fn bridge_masquerades_when_the_daemon_does_not(host: &Host) {
    host.subnet_env(false);
    for id in ["c1", "c2"] {
        host.pod(id);
        host.add(id);
    }
    let rules = host.nft();
    for wanted in [
        "table inet cni_plugins_masquerade",
        "type nat hook postrouting priority srcnat",
        "ip daddr 224.0.0.0/4 return",
        "goto masq_checks",
        "ip saddr 10.1.17.2 ip daddr != 10.1.17.0/24 masquerade",
        "ip saddr 10.1.17.3 ip daddr != 10.1.17.0/24 masquerade",
        "net: net, if: eth0, id: c1",
    ] {
        assert!(rules.contains(wanted), "{wanted} is not in\n{rules}");
    }
    assert_eq!(rules.matches("goto masq_checks").count(), 1, "{rules}");
    host.call("flannel", "DEL", "c1", &host.conf("1.0.0")).unwrap();
    let rules = host.nft();
    assert!(!rules.contains("10.1.17.2 ") && rules.contains("10.1.17.3 "), "{rules}");
    host.call("flannel", "DEL", "c2", &host.conf("1.0.0")).unwrap();
    assert!(!host.nft().contains("10.1.17."), "nothing of a container is left");
}

fn host_local_files_match_the_reference_plugin(host: &Host) {
    host.pod("c1");
    host.add("c1");
    let directory = host.root.join("networks/net");
    assert_eq!(std::fs::read(directory.join("10.1.17.2")).unwrap(), b"c1\r\neth0");
    assert_eq!(std::fs::read(directory.join("last_reserved_ip.0")).unwrap(), b"10.1.17.2");
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(directory.join("10.1.17.2")).unwrap().permissions().mode() & 0o777, 0o600);
    // What the reference plugin left is understood: with white space, or with the container alone.
    std::fs::write(directory.join("10.1.17.9"), "old\n").unwrap();
    std::fs::write(directory.join("10.1.17.8"), " c8\r\neth0\n").unwrap();
    let ipam = host.bridge_conf(&json!({ "subnet": "10.1.17.0/24" }));
    for id in ["old", "c8"] {
        host.call("host-local", "DEL", id, &ipam).unwrap();
    }
    assert_eq!(host.files("networks/net"), ["10.1.17.2", "last_reserved_ip.0", "lock"].map(ToOwned::to_owned).into());
    // The stored configuration is the delegate's, to the byte.
    let stored = std::fs::read_to_string(host.root.join("flannel/c1")).unwrap();
    let networks = host.root.join("networks");
    let wanted = format!(
        r#"{{"cniVersion":"1.0.0","ipMasq":false,"ipam":{{"dataDir":"{}","ranges":[[{{"subnet":"10.1.17.0/24"}}]],"routes":[{{"dst":"10.1.0.0/16"}}],"type":"host-local"}},"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"net","type":"bridge"}}"#,
        networks.display()
    );
    assert_eq!(stored, wanted);
}

fn exhausted_range_is_refilled_by_del(host: &Host) {
    let ipam = host.bridge_conf(&json!({ "subnet": "10.9.0.0/29" }));
    let add = |id: &str| {
        host.call("host-local", "ADD", id, &ipam)
            .map(|text| serde_json::from_str::<Value>(&text).unwrap()["ips"][0]["address"].as_str().unwrap().to_owned())
    };
    for (i, id) in ["a", "b", "c", "d", "e"].iter().enumerate() {
        assert_eq!(add(id).unwrap(), format!("10.9.0.{}/29", i + 2));
    }
    let full = add("f").unwrap_err();
    assert_eq!(full["msg"], "no IP addresses available in range set: 10.9.0.1-10.9.0.6");
    host.call("host-local", "DEL", "b", &ipam).unwrap();
    assert_eq!(add("f").unwrap(), "10.9.0.3/29");
    let twice = add("f").unwrap_err();
    assert_eq!(twice["msg"], "10.9.0.3 has been allocated to f eth0, duplicate allocation is not allowed");
}

fn empty_address_file_counts_as_free(host: &Host) {
    let ipam = host.bridge_conf(&json!({ "subnet": "10.9.0.0/30" }));
    std::fs::create_dir_all(host.root.join("networks/net")).unwrap();
    std::fs::write(host.root.join("networks/net/10.9.0.2"), "").unwrap();
    host.call("host-local", "ADD", "a", &ipam).unwrap();
    assert_eq!(std::fs::read(host.root.join("networks/net/10.9.0.2")).unwrap(), b"a\r\neth0");
}

fn requested_addresses_and_macs_are_applied_or_refused(host: &Host) {
    let pod = host.pod("c1");
    let conf = host.bridge_conf(&json!({ "subnet": "10.9.0.0/24" }));
    let env = [("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=x;IP=10.9.0.50;MAC=02:00:00:00:00:50")];
    let result: Value = serde_json::from_str(&host.call_with("bridge", "ADD", "c1", &conf.to_string(), &env).unwrap()).unwrap();
    assert_eq!((&result["ips"][0]["address"], &result["interfaces"][2]["mac"]), (&json!("10.9.0.50/24"), &json!("02:00:00:00:00:50")));
    assert_eq!(inside(&pod, "eth0").0, ["10.9.0.50/24"]);
    for (args, wanted) in [
        ("IP=10.9.0.50", "requested IP address 10.9.0.50 is not available"),
        ("IP=10.9.0.1", "is the subnet's gateway"),
        ("IP=10.7.0.1", "failed to allocate all requested IPs: 10.7.0.1"),
        ("K8S_POD_NAME=x", "unknown args"),
        ("MAC=zz", "mac: \"zz\" is not an Ethernet address"),
    ] {
        host.pod("c2");
        let error = host.call_with("bridge", "ADD", "c2", &conf.to_string(), &[("CNI_ARGS", args)]).unwrap_err();
        assert!(error["msg"].as_str().unwrap().contains(wanted), "{args}: {error}");
        netns::unbind(&host.path("c2")).unwrap();
    }
    assert!(!host.files("networks/net").iter().any(|file| file.starts_with("10.9.0.") && file != "10.9.0.50"), "nothing was kept");
}

fn failed_add_leaves_nothing(host: &Host) {
    let pod = host.pod("c1");
    // The last step but one fails: the route's gateway is not reachable.
    let conf = host.bridge_conf(&json!({ "subnet": "10.9.0.0/24", "routes": [{ "dst": "192.168.0.0/16", "gw": "172.31.0.1" }] }));
    let error = host.call("bridge", "ADD", "c1", &conf).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("cannot add the route to 192.168.0.0/16 in the container"), "{error}");
    assert_eq!(host.links(), BTreeSet::from(["cni0".to_owned(), "lo".to_owned()]));
    assert_eq!(pod.run(|| link::list(&mut socket()).unwrap().len()).unwrap(), 1);
    assert!(!host.files("networks/net").iter().any(|file| file.starts_with("10.9.")));
    // And the same container can be added with a configuration that works.
    host.call("bridge", "ADD", "c1", &host.bridge_conf(&json!({ "subnet": "10.9.0.0/24" }))).unwrap();
}

fn del_of_a_missing_attachment_succeeds(host: &Host) {
    // Never added, no namespace, no files.
    assert_eq!(host.call("flannel", "DEL", "never", &host.conf("1.0.0")).unwrap(), "");
    assert_eq!(host.call("bridge", "DEL", "never", &host.bridge_conf(&json!({ "subnet": "10.9.0.0/24" }))).unwrap(), "");
    // Added, and then the namespace went away.
    drop(host.pod("c1"));
    host.add("c1");
    netns::unbind(&host.path("c1")).unwrap();
    host.call("flannel", "DEL", "c1", &host.conf("1.0.0")).unwrap();
    assert!(host.files("flannel").is_empty());
    assert!(!host.files("networks/net").iter().any(|file| file.starts_with("10.1.")));
    // subnet.env is not needed to undo what it led to.
    host.pod("c2");
    host.add("c2");
    std::fs::remove_file(host.root.join("subnet.env")).unwrap();
    host.call("flannel", "DEL", "c2", &host.conf("1.0.0")).unwrap();
    assert!(host.files("flannel").is_empty());
    // A delegate that fails keeps the configuration for the next try.
    std::fs::write(host.root.join("flannel/c3"), r#"{"cniVersion":"1.0.0","name":"net","type":"missing"}"#).unwrap();
    assert!(host.call("flannel", "DEL", "c3", &host.conf("1.0.0")).is_err());
    assert_eq!(host.files("flannel"), BTreeSet::from(["c3".to_owned()]));
}

fn gc_frees_addresses_of_invalid_attachments(host: &Host) {
    for id in ["c1", "c2", "c3"] {
        host.pod(id);
        host.add(id);
    }
    let mut gc = host.conf("1.1.0");
    assert_eq!(host.call("flannel", "GC", "", &gc).unwrap_err()["code"], 7, "without the list nothing is collected");
    gc["cni.dev/valid-attachments"] = json!([{ "containerID": "c2", "ifname": "eth0" }]);
    host.call("flannel", "GC", "", &gc).unwrap();
    assert_eq!(host.files("networks/net"), ["10.1.17.3", "last_reserved_ip.0", "lock"].map(ToOwned::to_owned).into());
    assert_eq!(host.files("flannel"), BTreeSet::from(["c2".to_owned()]));
    assert_eq!(host.call("flannel", "STATUS", "", &host.conf("1.1.0")).unwrap(), "");
    std::fs::remove_file(host.root.join("subnet.env")).unwrap();
    assert_eq!(host.call("flannel", "STATUS", "", &host.conf("1.1.0")).unwrap_err()["code"], 50);
}

fn check_reports_missing_objects(host: &Host) {
    let pod = host.pod("c1");
    let mut check = host.conf("1.0.0");
    check["prevResult"] = host.add("c1");
    host.call("flannel", "CHECK", "c1", &check).unwrap();
    pod.run(|| {
        let mut socket = socket();
        let index = link::get(&mut socket, name("eth0")).unwrap().unwrap().index;
        addr::delete(&mut socket, index, "10.1.17.2/24".parse().unwrap()).unwrap();
    })
    .unwrap();
    let error = host.call("flannel", "CHECK", "c1", &check).unwrap_err();
    assert_eq!(error["msg"], "10.1.17.2/24 is missing on eth0 in the container");
    pod.run(|| link::delete(&mut socket(), name("eth0")).unwrap()).unwrap();
    assert_eq!(host.call("flannel", "CHECK", "c1", &check).unwrap_err()["msg"], "eth0 is missing in the container");
    assert!(host.call("flannel", "CHECK", "c9", &check).is_err());
}

fn invalid_input_is_refused_with_cni_codes(host: &Host) {
    host.pod("c1");
    let good = host.conf("1.0.0").to_string();
    let code = |stdin: &str, env: &[(&str, &str)]| {
        let error = host.call_with("flannel", "ADD", "c1", stdin, env).unwrap_err();
        (error["code"].as_u64().unwrap(), error["msg"].as_str().unwrap().to_owned())
    };
    assert_eq!(code("garbage", &[]).0, 6);
    assert_eq!(code("", &[]).0, 6);
    assert_eq!(code("{", &[]).0, 6);
    assert_eq!(code(r#"{"cniVersion":"2.0.0","name":"n"}"#, &[]).0, 1);
    assert_eq!(code(r#"{"cniVersion":"1.0.0"}"#, &[]).0, 7);
    assert_eq!(code(&good, &[("CNI_CONTAINERID", "a/b")]).0, 4);
    assert_eq!(code(&good, &[("CNI_IFNAME", "a b")]).0, 4);
    assert_eq!(code(&good, &[("CNI_PATH", "")]).0, 4);
    for path in ["/nonexistent", "/etc/passwd", "/proc/self/ns/mnt"] {
        let (code, message) = code(&good, &[("CNI_NETNS", path)]);
        assert_eq!(code, 4, "{message}");
        assert!(message.contains(path), "{message}");
    }
    for (subnet_env, wanted) in [
        ("", "is missing FLANNEL_NETWORK"),
        ("FLANNEL_SUBNET=x\n", "FLANNEL_SUBNET"),
        ("FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1450", "is missing FLANNEL_IPMASQ"),
    ] {
        std::fs::write(host.root.join("subnet.env"), subnet_env).unwrap();
        let (code, message) = code(&good, &[]);
        assert!(code == 999 && message.contains(wanted), "{code} {message}");
    }
    std::fs::remove_file(host.root.join("subnet.env")).unwrap();
    assert!(code(&good, &[]).1.contains("is it running on this host?"));
    assert_eq!(host.links(), BTreeSet::from(["lo".to_owned()]), "nothing was made");
}

fn foreign_delegate_is_executed(host: &Host) {
    use std::os::unix::fs::PermissionsExt;
    let plugin = host.root.join("bin/mine");
    let script = format!(
        "#!/bin/sh\nprintf '%s ' $CNI_COMMAND $CNI_CONTAINERID >> {0}/seen\ncat >> {0}/seen\n[ $CNI_COMMAND = ADD ] && echo '{{\"cniVersion\":\"1.0.0\",\"ips\":[{{\"address\":\"10.1.17.200/24\"}}]}}'\nexit 0\n",
        host.root.display()
    );
    std::fs::write(&plugin, script).unwrap();
    std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).unwrap();
    host.pod("c1");
    let mut conf = host.conf("1.0.0");
    conf["delegate"] = json!({ "type": "mine" });
    let result: Value = serde_json::from_str(&host.call("flannel", "ADD", "c1", &conf).unwrap()).unwrap();
    assert_eq!(result["ips"][0]["address"], "10.1.17.200/24");
    host.call("flannel", "DEL", "c1", &conf).unwrap();
    let seen = std::fs::read_to_string(host.root.join("seen")).unwrap();
    assert!(seen.starts_with("ADD c1 {") && seen.contains("DEL c1 {") && seen.contains(r#""mtu":1450"#), "{seen}");
    // Its error is passed on as it is.
    std::fs::write(&plugin, "#!/bin/sh\necho '{\"code\":11,\"msg\":\"later\"}'\nexit 1\n").unwrap();
    let error = host.call("flannel", "ADD", "c1", &conf).unwrap_err();
    assert_eq!((&error["code"], &error["msg"]), (&json!(11), &json!("later")));
}

fn loopback_sets_lo_up_and_down(host: &Host) {
    let pod = host.pod("c1");
    let up = || pod.run(|| link::get(&mut socket(), name("lo")).unwrap().unwrap().up).unwrap();
    let conf = json!({ "cniVersion": "1.0.0", "name": "lo", "type": "loopback" });
    assert!(!up());
    let result: Value = serde_json::from_str(&host.call("loopback", "ADD", "c1", &conf).unwrap()).unwrap();
    assert_eq!(result["ips"][0]["address"], "127.0.0.1/8");
    assert!(up());
    host.call("loopback", "CHECK", "c1", &conf).unwrap();
    host.call("loopback", "DEL", "c1", &conf).unwrap();
    assert!(!up());
    assert!(host.call("loopback", "CHECK", "c1", &conf).is_err());
}

fn program_links_no_async_runtime(_: &Host) {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--edges", "normal,build", "--prefix", "none", "--manifest-path", manifest])
        .output()
        .unwrap();
    let tree = String::from_utf8(output.stdout).unwrap();
    assert!(tree.contains("serde_json"), "{tree}{}", String::from_utf8_lossy(&output.stderr));
    for crate_name in ["tokio", "async-std", "smol", "futures", "hyper", "tonic", "rustls", "openssl", "prost", "redb"] {
        assert!(!tree.lines().any(|line| line.split(' ').next() == Some(crate_name)), "the CNI program links {crate_name}:\n{tree}");
    }
}
