//! A packet that a pod or another host hands to the udp backend.
#![no_main]
use flannel::backend::udp::{Table, Verdict, inbound, outbound};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut table = Table::default();
    table.insert("10.244.2.0/24".parse().expect("a subnet"), [192, 0, 2, 2].into());
    let mut packet = bytes.to_vec();
    match outbound(&mut packet, &table, [10, 244, 1, 0].into()) {
        Verdict::Send(host) => assert_eq!((host.octets(), packet[8]), ([192, 0, 2, 2], bytes[8] - 1)),
        Verdict::Answer(answer) => assert!(answer.len() <= 20 + 8 + 60 + 8),
        Verdict::Deliver | Verdict::Drop => {}
    }
    let _ = inbound(&mut bytes.to_vec());
});
