//! Our plugins called by libcni, in the version that the reference plugins use, as containerd, CRI-O and podman call them,
//! and by cnitool (`tests/libcni`).

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "support/host.rs"]
mod host;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use host::Host;
use kernel::netns;
use libtest_mimic::{Arguments, Trial};
use serde_json::{Value, json};

type Test = fn(&Host);

fn main() {
    let arguments = Arguments::from_args();
    if !arguments.list {
        netns::isolate(Path::new("/mnt")).expect("these tests need namespaces");
        // cnitool has its cache there.
        let mounted = Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/var/lib"]).status().unwrap();
        assert!(mounted.success(), "cannot mount a tmpfs on /var/lib");
    }
    let tests: [(&str, Test); 9] = [
        ("containerd_adds_checks_and_deletes_a_pod", containerd_adds_checks_and_deletes_a_pod),
        ("del_without_namespace_removes_everything_on_the_host", del_without_namespace_removes_everything_on_the_host),
        ("failed_add_and_its_del_leave_nothing", failed_add_and_its_del_leave_nothing),
        ("crio_gc_collects_what_is_not_valid", crio_gc_collects_what_is_not_valid),
        ("status_reports_a_missing_subnet_env", status_reports_a_missing_subnet_env),
        ("newest_common_version_is_used", newest_common_version_is_used),
        ("disabled_check_and_gc_are_not_called", disabled_check_and_gc_are_not_called),
        ("podman_attaches_several_networks", podman_attaches_several_networks),
        ("cnitool_runs_each_command", cnitool_runs_each_command),
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

fn program() -> PathBuf {
    std::env::var_os("FLANNEL_LIBCNI").map(PathBuf::from).expect("FLANNEL_LIBCNI is not set: run the tests by `cargo xtask test`")
}

/// A network's list of plugins in a file, and a runtime that has it.
struct Runtime<'a> {
    host: &'a Host,
    list: PathBuf,
}

/// An error as libcni reports it.
#[derive(Debug)]
struct Refused {
    code: u64,
    text: String,
}

impl Runtime<'_> {
    fn new<'a>(host: &'a Host, list: &Value) -> Runtime<'a> {
        let folder = host.root.join("net.d");
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join(format!("{}.conflist", list["name"].as_str().unwrap()));
        std::fs::write(&file, list.to_string()).unwrap();
        Runtime { host, list: file }
    }

    /// Makes a call of libcni in the host's namespace; `more` are further fields of the request.
    fn call(&self, call: &str, id: &str, ifname: &str, more: &Value) -> Result<Value, Refused> {
        let mut request = json!({
            "call": call, "list": self.list, "cache": self.host.root.join("cache"), "path": [self.host.root.join("bin")],
            "id": id, "netns": self.host.path(id), "ifname": ifname, "args": [["IgnoreUnknown", "1"], ["K8S_POD_NAME", "web-1"]],
        });
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let output = run(self.host, Command::new(program()), &request.to_string());
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| {
            panic!("{request}: {} {}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
        });
        match answer["error"].as_str() {
            None => Ok(answer),
            Some(text) => Err(Refused { code: answer["code"].as_u64().unwrap_or(0), text: text.to_owned() }),
        }
    }

    fn plain(&self, call: &str, id: &str) -> Result<Value, Refused> {
        self.call(call, id, "eth0", &json!({}))
    }
}

fn run(host: &Host, mut command: Command, input: &str) -> Output {
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = host.netns.run(|| command.spawn()).unwrap().unwrap();
    // cnitool reads nothing.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

/// The list that the daemon installs, with firewall and tuning as podman has them.
fn pod_network(host: &Host, version: &str) -> Value {
    host.subnet_env(false);
    let mut flannel = host.conf(version);
    for field in ["name", "cniVersion"] {
        flannel.as_object_mut().unwrap().remove(field);
    }
    json!({ "name": "net", "cniVersion": version, "plugins": [
        flannel,
        { "type": "portmap", "capabilities": { "portMappings": true } },
        { "type": "bandwidth", "capabilities": { "bandwidth": true } },
        { "type": "firewall", "backend": "iptables" },
        { "type": "tuning", "dataDir": host.root.join("tuning"), "sysctl": { "net.ipv4.conf.IFNAME.arp_filter": "1" }, "txQLen": 500 },
    ] })
}

fn capabilities(port: u16) -> Value {
    json!({ "capabilities": {
        "portMappings": [{ "hostPort": port, "containerPort": 80, "protocol": "tcp" }],
        "bandwidth": { "egressRate": 8_000_000, "egressBurst": 800_000 },
        "dns": { "servers": ["10.1.0.1"] },
    } })
}

/// What containers have on the host: links, files, rules.
fn resources(host: &Host) -> BTreeSet<String> {
    let mut found: BTreeSet<String> = host.links().into_iter().filter(|name| name.starts_with("veth") || name.starts_with("bwp")).collect();
    for folder in ["flannel", "networks/net", "tuning", "cache/results"] {
        let names = host.files(folder).into_iter().filter(|name| !name.starts_with("last_reserved_ip") && name != "lock");
        found.extend(names.map(|name| format!("{folder}/{name}")));
    }
    // Addresses of containers are in nothing that they share.
    found.extend(host.nft().lines().filter(|line| line.contains("10.1.17.")).map(|line| line.trim().to_owned()));
    found
}

fn containerd_adds_checks_and_deletes_a_pod(host: &Host) {
    let _pod = host.pod("p1");
    let network = Runtime::new(host, &pod_network(host, "1.1.0"));
    let loopback = Runtime::new(host, &json!({ "name": "cni-loopback", "cniVersion": "1.0.0", "plugins": [{ "type": "loopback" }] }));
    network.plain("status", "p1").unwrap();
    network.plain("validate", "p1").unwrap();
    let result = network.call("add", "p1", "eth0", &capabilities(8080)).unwrap()["result"].clone();
    loopback.call("add", "p1", "lo", &json!({})).unwrap();
    assert_eq!(result["ips"][0]["address"], "10.1.17.2/24");
    assert_eq!(network.plain("cached", "p1").unwrap()["result"], result);
    assert!(host.nft().contains("dnat to 10.1.17.2:80"), "{}", host.nft());
    for _ in 0..2 {
        network.call("check", "p1", "eth0", &capabilities(8080)).unwrap();
        loopback.call("check", "p1", "lo", &json!({})).unwrap();
    }
    // A second ADD is refused, and takes nothing from the first one.
    let error = network.call("add", "p1", "eth0", &capabilities(8080)).unwrap_err();
    assert!(error.text.contains("already exists"), "{error:?}");
    network.call("check", "p1", "eth0", &capabilities(8080)).unwrap();
    loopback.call("del", "p1", "lo", &json!({})).unwrap();
    for _ in 0..2 {
        network.call("del", "p1", "eth0", &capabilities(8080)).unwrap();
    }
    assert_eq!(resources(host), BTreeSet::new());
    assert!(network.plain("cached", "p1").unwrap()["result"].is_null());
}

/// After a reboot, or when the container died first, the runtime has no namespace to name.
fn del_without_namespace_removes_everything_on_the_host(host: &Host) {
    let pod = host.pod("p1");
    let network = Runtime::new(host, &pod_network(host, "1.0.0"));
    network.call("add", "p1", "eth0", &capabilities(8080)).unwrap();
    netns::unbind(&host.path("p1")).unwrap();
    drop(pod);
    let mut gone = capabilities(8080);
    gone["netns"] = "".into();
    network.call("del", "p1", "eth0", &gone).unwrap();
    // The kernel deletes the veth pair with the namespace, a moment later.
    let is_rest = |name: &String| !name.starts_with("veth") && name.contains('/') || name.contains("10.1.17.");
    let rest: Vec<String> = resources(host).into_iter().filter(is_rest).collect();
    assert!(rest.is_empty(), "{rest:#?}");
}

fn failed_add_and_its_del_leave_nothing(host: &Host) {
    let _pod = host.pod("p1");
    let network = Runtime::new(host, &pod_network(host, "1.0.0"));
    let mut bad = capabilities(8080);
    bad["capabilities"]["bandwidth"] = json!({ "egressRate": 8_000_000 });
    let error = network.call("add", "p1", "eth0", &bad).unwrap_err();
    assert!(error.code == 7 && error.text.contains("egressBurst"), "{error:?}");
    assert!(network.plain("cached", "p1").unwrap()["result"].is_null());
    // The list in reverse, without a result, twice.
    for _ in 0..2 {
        network.call("del", "p1", "eth0", &bad).unwrap();
    }
    assert_eq!(resources(host), BTreeSet::new());
    // What failed can be added again.
    let result = network.call("add", "p1", "eth0", &capabilities(8080)).unwrap();
    network.call("check", "p1", "eth0", &capabilities(8080)).unwrap();
    assert_eq!(result["result"]["ips"].as_array().unwrap().len(), 1);
    network.call("del", "p1", "eth0", &capabilities(8080)).unwrap();
    assert_eq!(resources(host), BTreeSet::new());
}

fn crio_gc_collects_what_is_not_valid(host: &Host) {
    let _pods = ["p1", "p2", "p3"].map(|id| host.pod(id));
    let network = Runtime::new(host, &pod_network(host, "1.1.0"));
    for (id, port) in [("p1", 8081), ("p2", 8082), ("p3", 8083)] {
        network.call("add", id, "eth0", &capabilities(port)).unwrap();
    }
    // libcni knows p2 and deletes it; of p3 it knows nothing any more.
    let forgotten = host.files("cache/results").into_iter().find(|name| name.contains("p3")).unwrap();
    std::fs::remove_file(host.root.join("cache/results").join(forgotten)).unwrap();
    network.call("gc", "p1", "eth0", &json!({ "valid": [{ "containerID": "p1", "ifname": "eth0" }] })).unwrap();
    network.call("check", "p1", "eth0", &capabilities(8081)).unwrap();
    let addresses: Vec<String> = host.files("networks/net").into_iter().filter(|name| name.starts_with("10.")).collect();
    assert_eq!((addresses, host.files("flannel").into_iter().collect()), (vec!["10.1.17.2".to_owned()], vec!["p1".to_owned()]));
    assert!(!host.nft().contains("dnat to 10.1.17.3:80"), "{}", host.nft());
    // At its start CRI-O has no valid attachment: a Go slice without elements.
    for _ in 0..2 {
        network.call("gc", "p1", "eth0", &json!({ "valid": null })).unwrap();
    }
    let rest: Vec<String> = resources(host).into_iter().filter(|name| !name.contains("10.1.17.4") && !name.starts_with("veth")).collect();
    // GC of tuning, bandwidth and portmap does nothing, as in the reference plugins.
    assert!(rest.iter().all(|name| name.starts_with("bwp") || name == "tuning/p3_eth0.json"), "{rest:#?}");
    network.call("del", "p3", "eth0", &capabilities(8083)).unwrap();
}

fn status_reports_a_missing_subnet_env(host: &Host) {
    let network = Runtime::new(host, &pod_network(host, "1.1.0"));
    network.plain("status", "p1").unwrap();
    std::fs::remove_file(host.root.join("subnet.env")).unwrap();
    let error = network.plain("status", "p1").unwrap_err();
    assert!(error.code == 50 && error.text.contains("flanneld"), "{error:?}");
}

fn newest_common_version_is_used(host: &Host) {
    for version in ["0.4.0", "1.0.0", "1.1.0"] {
        let _pod = host.pod("p1");
        let mut list = pod_network(host, version);
        let network = Runtime::new(host, &list);
        let result = network.call("add", "p1", "eth0", &capabilities(8080)).unwrap();
        assert_eq!((&result["result"]["cniVersion"], &result["version"]), (&version.into(), &version.into()));
        network.call("check", "p1", "eth0", &capabilities(8080)).unwrap();
        // The node is updated in the pod's life: the list offers more versions, and has another one then.
        list["cniVersions"] = json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0", "9.0.0"]);
        let network = Runtime::new(host, &list);
        let answer = network.call("check", "p1", "eth0", &capabilities(8080)).unwrap();
        assert_eq!(answer["version"], "1.1.0");
        assert!(!network.plain("validate", "p1").unwrap()["result"].is_null());
        network.call("del", "p1", "eth0", &capabilities(8080)).unwrap();
        assert_eq!(resources(host), BTreeSet::new(), "{version}");
        let result = network.call("add", "p1", "eth0", &capabilities(8080)).unwrap();
        assert_eq!(result["result"]["cniVersion"], "1.1.0");
        network.call("del", "p1", "eth0", &capabilities(8080)).unwrap();
        netns::unbind(&host.path("p1")).unwrap();
    }
}

fn disabled_check_and_gc_are_not_called(host: &Host) {
    let pod = host.pod("p1");
    let mut list = pod_network(host, "1.1.0");
    let network = Runtime::new(host, &list);
    network.call("add", "p1", "eth0", &capabilities(8080)).unwrap();
    let deleted = pod.run(|| Command::new("ip").args(["link", "delete", "eth0"]).status()).unwrap().unwrap();
    assert!(deleted.success());
    assert!(network.call("check", "p1", "eth0", &capabilities(8080)).is_err());
    list["disableCheck"] = true.into();
    list["disableGC"] = true.into();
    let network = Runtime::new(host, &list);
    network.call("check", "p1", "eth0", &capabilities(8080)).unwrap();
    network.call("gc", "p1", "eth0", &json!({ "valid": null })).unwrap();
    assert!(host.files("networks/net").contains("10.1.17.2"));
    network.call("del", "p1", "eth0", &capabilities(8080)).unwrap();
    assert_eq!(resources(host), BTreeSet::new());
}

/// Networks as `podman network create` writes them, with a fixed address and MAC; torn down in any order, and twice.
fn podman_attaches_several_networks(host: &Host) {
    let _pod = host.pod("p1");
    let list = |number: u8| {
        let ipam = json!({ "type": "host-local", "dataDir": host.root.join("networks"), "routes": [{ "dst": if number == 1 { "0.0.0.0/0" } else { "172.31.0.0/16" } }],
                           "ranges": [[{ "subnet": format!("10.{number}.17.0/24"), "gateway": format!("10.{number}.17.1") }]] });
        json!({ "name": format!("net{number}"), "cniVersion": "0.4.0", "plugins": [
            { "type": "bridge", "bridge": format!("cni-podman{number}"), "isGateway": true, "ipMasq": true, "hairpinMode": true, "ipam": ipam,
              "capabilities": { "ips": true, "mac": true } },
            { "type": "portmap", "capabilities": { "portMappings": true } },
            { "type": "firewall", "backend": "" },
            { "type": "tuning", "dataDir": host.root.join("tuning"), "capabilities": { "mac": true } },
        ] })
    };
    let networks = [1, 2].map(|number| Runtime::new(host, &list(number)));
    let wanted = |number: u16| {
        json!({ "capabilities": { "ips": [format!("10.{number}.17.99")], "mac": format!("02:00:00:00:00:0{number}"),
                "portMappings": [{ "hostPort": 8080 + number, "containerPort": 80, "protocol": "tcp" }] } })
    };
    for (network, (ifname, number)) in networks.iter().zip([("eth0", 1), ("eth1", 2)]) {
        let result = network.call("add", "p1", ifname, &wanted(number)).unwrap()["result"].clone();
        assert_eq!(result["ips"][0]["address"], format!("10.{number}.17.99/24"));
        assert_eq!(result["interfaces"][2]["mac"], format!("02:00:00:00:00:0{number}"));
    }
    let attachments = networks[0].plain("attachments", "p1").unwrap()["result"].clone();
    assert_eq!(attachments.as_array().unwrap().len(), 2, "{attachments}");
    for (network, (ifname, number)) in networks.iter().zip([("eth0", 1), ("eth1", 2)]) {
        network.call("check", "p1", ifname, &wanted(number)).unwrap();
    }
    networks[0].call("del", "p1", "eth0", &wanted(1)).unwrap();
    assert!(!host.nft().contains("10.1.17.99") && host.nft().contains("dnat to 10.2.17.99:80"), "{}", host.nft());
    networks[1].call("check", "p1", "eth1", &wanted(2)).unwrap();
    for _ in 0..2 {
        networks[1].call("del", "p1", "eth1", &wanted(2)).unwrap();
        networks[0].call("del", "p1", "eth0", &wanted(1)).unwrap();
    }
    assert!(!host.nft().contains(".17.99"), "{}", host.nft());
    assert_eq!(resources(host), BTreeSet::new());
}

fn cnitool_runs_each_command(host: &Host) {
    let _pod = host.pod("p1");
    let network = Runtime::new(host, &pod_network(host, "1.1.0"));
    let capabilities = capabilities(8080)["capabilities"].to_string();
    let tool = |verb: &str| {
        let mut command = Command::new(program());
        command.args(["cnitool", verb, "net"]).arg(host.path("p1"));
        command.env("CNI_PATH", host.root.join("bin")).env("NETCONFPATH", network.list.parent().unwrap()).env("CAP_ARGS", &capabilities);
        run(host, command, "")
    };
    let succeeds = |verb: &str| {
        let output = tool(verb);
        assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    succeeds("status");
    let result: Value = serde_json::from_slice(&succeeds("add")).unwrap();
    assert_eq!(result["ips"][0]["address"], "10.1.17.2/24");
    succeeds("check");
    succeeds("del");
    succeeds("del");
    assert_eq!(resources(host), BTreeSet::new());
    assert!(!tool("check").status.success());
    // It names no valid attachments: it deletes what it has cached, and nothing else is collected.
    succeeds("add");
    let output = tool("gc");
    assert!(String::from_utf8_lossy(&output.stderr).contains("cni.dev/valid-attachments"), "{output:?}");
    assert_eq!(resources(host), BTreeSet::new());
}
