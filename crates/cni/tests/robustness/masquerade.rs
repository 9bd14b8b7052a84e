//! Masquerading rules when several DELs run at the same time.

use flannel::pod::Attachment;
use kernel::pod_rules::RemovalRequest;
use serde_json::Value;

use super::{call, network, parse};
use crate::host::Host;

/// The configuration of a network that masquerades its containers in nftables.
fn masqueraded(host: &Host) -> Value {
    let mut conf = network(host, 5);
    conf["ipMasq"] = true.into();
    conf["ipMasqBackend"] = "nftables".into();
    conf
}

fn attachment(id: &str) -> Attachment {
    Attachment { network: "net5".to_owned(), container: id.to_owned(), ifname: "eth0".to_owned() }
}

/// The number of rules that masquerade an address.
fn rules(host: &Host, address: &str) -> usize {
    host.nft().matches(&format!("saddr {address} ")).count()
}

pub(super) fn one_del_serves_all_waiting_dels(host: &Host) {
    let _pods = ["c1", "c2", "c3"].map(|id| host.pod(id));
    let conf = masqueraded(host);
    let request = |id: &str| host.netns.run(|| RemovalRequest::new(&attachment(id))).unwrap();
    for (id, address) in [("c1", "10.5.0.2"), ("c2", "10.5.0.3"), ("c3", "10.5.0.4")] {
        let result = parse(&call(host, "bridge", "ADD", id, "eth0", &conf).unwrap());
        assert_eq!(result["ips"][0]["address"], format!("{address}/24"));
        assert_eq!(rules(host, address), 1, "{}", host.nft());
    }
    let waiting = request("c2");
    assert!(!waiting.is_done());
    call(host, "bridge", "DEL", "c1", "eth0", &conf).unwrap();
    assert!(waiting.is_done());
    assert_eq!(["10.5.0.2", "10.5.0.3", "10.5.0.4"].map(|address| rules(host, address)), [0, 0, 1], "{}", host.nft());
    call(host, "bridge", "DEL", "c2", "eth0", &conf).unwrap();
    // A killed DEL left its request; then the container is added again.
    let stale = request("c1");
    let result = parse(&call(host, "bridge", "ADD", "c1", "eth0", &conf).unwrap());
    assert!(stale.is_done());
    call(host, "bridge", "DEL", "c3", "eth0", &conf).unwrap();
    let address = result["ips"][0]["address"].as_str().unwrap().trim_end_matches("/24").to_owned();
    assert_eq!(rules(host, &address), 1, "{}", host.nft());
    call(host, "bridge", "DEL", "c1", "eth0", &conf).unwrap();
    assert_eq!(rules(host, &address), 0, "{}", host.nft());
}

pub(super) fn parallel_dels_leave_no_rules(host: &Host) {
    let ids: Vec<String> = (0..12).map(|n| format!("c{n}")).collect();
    let _pods: Vec<_> = ids.iter().map(|id| host.pod(id)).collect();
    let conf = masqueraded(host);
    for _ in 0..2 {
        for verb in ["ADD", "DEL"] {
            std::thread::scope(|scope| {
                for id in &ids {
                    scope.spawn(|| call(host, "bridge", verb, id, "eth0", &conf).unwrap());
                }
            });
            let expected = if verb == "ADD" { ids.len() } else { 0 };
            assert_eq!(host.nft().matches("saddr 10.5.0.").count(), expected, "after {verb}: {}", host.nft());
        }
    }
    let left: Vec<_> = std::fs::read_dir(kernel::pod_rules::FOLDER).unwrap().flatten().map(|file| file.file_name()).collect();
    let inode = host.netns.id().unwrap().1.to_string();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with(&inode)), "{left:?}");
}
