//! The bandwidth plugin: the names of its links, and the validation of its limits.

use serde_json::{Value, json};

use super::host::Host;
use super::{call, network, parse, shell};

/// Two attachments of the container `c1` to one network.
fn attach(host: &Host) -> [Value; 2] {
    ["net1", "eth0"].map(|ifname| {
        let mut conf = network(host, 5);
        conf["isDefaultGateway"] = false.into();
        parse(&call(host, "bridge", "ADD", "c1", ifname, &conf).unwrap())
    })
}

fn limits(previous: &Value) -> Value {
    json!({ "cniVersion": "1.0.0", "name": "net5", "type": "bandwidth", "egressRate": 8_000_000, "egressBurst": 800_000, "prevResult": previous })
}

pub(super) fn bandwidth_links_have_the_reference_name_and_an_owner(host: &Host) {
    let _pod = host.pod("c1");
    let results = attach(host);
    // `bwp` and the first 12 digits of the SHA-512 of network and container.
    let digest = "net5c1";
    let shared = format!("bwp{}", &shell(&host.netns, &format!("printf %s {digest} | sha512sum"))[..12]);
    let ifbs = || host.links().into_iter().filter(|name| name.starts_with("bwp")).collect::<Vec<_>>();
    call(host, "bandwidth", "ADD", "c1", "net1", &limits(&results[0])).unwrap();
    assert_eq!(ifbs(), std::slice::from_ref(&shared));
    call(host, "bandwidth", "ADD", "c1", "eth0", &limits(&results[1])).unwrap();
    assert_eq!(ifbs().len(), 2);
    for (ifname, previous) in [("net1", &results[0]), ("eth0", &results[1])] {
        call(host, "bandwidth", "CHECK", "c1", ifname, &limits(previous)).unwrap();
    }
    call(host, "bandwidth", "DEL", "c1", "eth0", &limits(&results[1])).unwrap();
    assert_eq!(ifbs(), std::slice::from_ref(&shared), "the other attachment keeps its own");
    call(host, "bandwidth", "DEL", "c1", "net1", &limits(&results[0])).unwrap();
    assert!(ifbs().is_empty());
    // A link of the reference plugin has no owner in its alias.
    shell(&host.netns, &format!("ip link add {shared} type ifb"));
    call(host, "bandwidth", "DEL", "c1", "net1", &limits(&results[0])).unwrap();
    assert!(ifbs().is_empty());
}

pub(super) fn bandwidth_limits_are_validated(host: &Host) {
    let _pod = host.pod("c1");
    let [_, result] = attach(host);
    let limited = |ingress: u64, burst: u64, previous: &Value| {
        let mut conf = limits(previous);
        (conf["ingressRate"], conf["ingressBurst"]) = (ingress.into(), burst.into());
        call(host, "bandwidth", "ADD", "c1", "eth0", &conf)
    };
    for (rate, burst, wanted) in [
        (8_000_000, 34_359_738_360, "ingressBurst must be less than 34359738360 bits"),
        (8_000_000, 0, "ingressBurst: if rate is set, burst must also be set"),
        (0, 8_000, "ingressRate: if burst is set, rate must also be set"),
    ] {
        let error = limited(rate, burst, &result).unwrap_err();
        assert!(error["msg"].as_str().unwrap().starts_with(wanted), "{error}");
    }
    // Unless the result names the host's end, the index may be that of another link.
    let mut other = result.clone();
    other["interfaces"][1]["name"] = "veth00000000".into();
    let error = limited(8_000_000, 800_000, &other).unwrap_err();
    assert!(error["msg"].as_str().unwrap().starts_with("prevResult: it does not list veth"), "{error}");
    // A burst below one frame causes a warning; the pod still starts.
    limited(8_000_000, 8, &result).unwrap();
    assert!(shell(&host.netns, "tc qdisc").contains("qdisc tbf"));
    call(host, "bandwidth", "DEL", "c1", "eth0", &limits(&result)).unwrap();
}
