//! What each flag and each key of the configuration does, as it can be seen from outside (specification, sections 1 and 2).

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lab::{Lab, Plan, StoreKind};
use serde_json::{Value, json};

use crate::{PROGRAM, ping_all_from, plan};

#[track_caller]
fn shell(lab: &Lab, host: usize, script: &str) -> String {
    let mut sh = Command::new("sh");
    let output = lab.hosts[host].netns.run(|| sh.args(["-ec", script]).output()).unwrap().unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Starts the only daemon of a lab with these flags, waits until it is ready, and returns its state.
fn with_flags(lab: &mut Lab, flags: &[&str]) -> Value {
    if lab.hosts[0].pid().is_some() {
        lab.stop_daemon(0, false).unwrap();
    }
    lab.start_daemon(0, flags).unwrap();
    lab.wait_state(0, "itself", |_| true).unwrap()
}

pub(crate) fn flags_do_what_they_say(root: &Path) {
    let notify = root.join("notify");
    let mut plan = plan(1, "vxlan", StoreKind::Embedded);
    plan.env.push(("NOTIFY_SOCKET".to_owned(), notify.to_string_lossy().into_owned()));
    let mut lab = Lab::wire(plan, root).unwrap();
    let ready = UnixDatagram::bind(&notify).unwrap();
    ready.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    // The interface, by each way that there is; the last of them leads nowhere else.
    for flags in
        [&["--iface=eth0"][..], &["-iface", "10.0.0.1"], &["--iface=nope", r"-iface-regex=^10\.0\.0\."], &["--iface-can-reach=10.0.0.254"]]
    {
        let state = with_flags(&mut lab, flags);
        assert_eq!((&state["interface"], &state["public_ip"]), (&json!("eth0"), &json!("10.0.0.1")), "{flags:?}");
        let mut buffer = [0; 64];
        let length = ready.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"READY=1", "{flags:?}");
    }
    // Behind NAT another address is published, and the device keeps the interface's.
    let state = with_flags(&mut lab, &["--iface=eth0", "--public-ip=203.0.113.9"]);
    assert_eq!(state["public_ip"], "203.0.113.9");
    assert!(shell(&lab, 0, "ip -d link show flannel.1").contains("local 10.0.0.1"));
    let snapshot = lab.with_store(async |store| store.snapshot().await).unwrap();
    assert!(snapshot.entries.iter().any(|entry| entry.peer.as_ref().unwrap().public.v4 == "203.0.113.9".parse().ok()));
    // The health listener takes clients of both families; its answers are upstream's.
    with_flags(&mut lab, &["--healthz-ip=0.0.0.0"]);
    for (address, path, want) in
        [("127.0.0.1", "/healthz", "flanneld is running"), ("[::1]", "/readyz", "flanneld is ready"), ("[::1]", "/nothing", "there is")]
    {
        let ask = || {
            let mut stream = TcpStream::connect(format!("{address}:8081")).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).map(|_| answer).unwrap()
        };
        let answer = lab.hosts[0].netns.run(ask).unwrap();
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        assert!(body == want || path == "/nothing" && answer.starts_with("HTTP/1.1 404") && body.starts_with(want), "{path}: {answer}");
    }
    // Without it, clients on this host are served at each of its addresses, and no others.
    let get = |netns: &kernel::netns::Netns, address: &str, path: &str| {
        let ask = || {
            let mut stream = TcpStream::connect(format!("{address}:8081")).ok()?;
            let _ = write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).ok().filter(|length| *length > 0).map(|_| answer)
        };
        netns.run(ask).unwrap()
    };
    let healthz = |netns: &kernel::netns::Netns, address: &str| get(netns, address, "/healthz").is_some();
    assert!(healthz(&lab.middle, "10.0.0.1"), "0.0.0.0 was given");
    // Clients elsewhere read numbers only.
    let state = |netns| get(netns, "10.0.0.1", "/state").unwrap();
    let (here, elsewhere) = (state(&lab.hosts[0].netns), state(&lab.middle));
    assert!(here.contains("10.244.1.0/24") && here.contains("eth0"), "{here}");
    assert!(elsewhere.contains("\"schema\": 1") && !elsewhere.contains("10.") && !elsewhere.contains("eth0"), "{elsewhere}");
    with_flags(&mut lab, &[]);
    for address in ["127.0.0.1", "127.0.0.9", "10.0.0.1", "[::1]"] {
        assert!(healthz(&lab.hosts[0].netns, address), "{address}");
    }
    assert!(!healthz(&lab.middle, "10.0.0.1"), "a client elsewhere");
    // Rules.
    let env = |lab: &Lab| std::fs::read_to_string(lab.hosts[0].subnet_file()).unwrap();
    with_flags(&mut lab, &["--ip-masq=false", "--iptables-forward-rules=false"]);
    crate::eventually("no rules", || !shell(&lab, 0, "nft list tables").contains("flannel"));
    assert!(env(&lab).ends_with("FLANNEL_IPMASQ=false\n"), "{}", env(&lab));
    with_flags(&mut lab, &["--ip-masq-fully-random-disable"]);
    let rules = shell(&lab, 0, "nft list table ip flannel-ipv4");
    assert!(rules.contains("masquerade") && !rules.contains("random"), "{rules}");
    with_flags(&mut lab, &[]);
    assert!(shell(&lab, 0, "nft list table ip flannel-ipv4").contains("masquerade fully-random"));
    assert_eq!(env(&lab), "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n");
    // The version, on standard error.
    let output = Command::new(PROGRAM).arg("-version").output().unwrap();
    assert!(output.status.success() && output.stdout.is_empty() && String::from_utf8_lossy(&output.stderr).starts_with("flanneld "));
}

pub(crate) fn keys_of_the_configuration_reach_the_kernel(root: &Path) {
    let keys = json!({ "type": "VXLAN", "vni": 7, "PORT": 4789, "mtu": 1400, "Gbp": true, "learning": true });
    let mut plan = Plan::new(2, &keys, Path::new(PROGRAM));
    plan.config = json!({ "network": "10.244.0.0/16", "SUBNETLEN": 26, "subnetMin": "10.244.8.0", "SubnetMax": "10.244.8.64", "enableNFTables": true, "backend": keys, "unknown": [] });
    let mut lab = Lab::start(plan, root).unwrap();
    lab.settle().unwrap();
    let device = shell(&lab, 0, "ip -d link show flannel.7");
    for part in ["mtu 1350", "vxlan id 7", "dstport 4789", "gbp"] {
        assert!(device.contains(part), "{part}: {device}");
    }
    assert!(!device.contains("nolearning"), "{device}");
    let subnets: std::collections::BTreeSet<String> =
        lab.hosts.iter().map(|host| host.state().unwrap()["subnet"].as_str().unwrap().to_owned()).collect();
    assert_eq!(subnets, ["10.244.8.0/26", "10.244.8.64/26"].map(ToOwned::to_owned).into());
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
}
