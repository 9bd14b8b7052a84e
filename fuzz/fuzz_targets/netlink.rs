//! Netlink messages from the kernel: links, addresses, routes, neighbours, nftables rules.
#![no_main]
use flannel::Family;
use kernel::{addr, link, neigh, netlink, nft, route};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for message in netlink::messages(bytes) {
        let _ = (link::decode(message.body), addr::decode(message.body), route::decode(message.body), neigh::decode(message.body));
    }
    let _ = (link::decode(bytes), addr::decode(bytes), route::decode(bytes), neigh::decode(bytes));
    for family in Family::ALL {
        let _ = nft::decode_rule(bytes, family);
    }
});
