//! A packet that a pod or another host hands to the udp backend.
#![no_main]
use flannel::backend::udp::{Table, Verdict, inbound, outbound};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut table = Table::default();
    table.insert("10.244.2.0/24".parse().expect("a subnet"), [192, 0, 2, 2].into());
    let mut packet = bytes.to_vec();
    let local = [192, 0, 2, 1].into();
    table.insert("10.244.1.0/24".parse().expect("a subnet"), local);
    match outbound(&mut packet, &table, local, [10, 244, 1, 0].into()) {
        Verdict::Send(host) => assert_eq!((host.octets(), packet[8]), ([192, 0, 2, 2], bytes[8] - 1)),
        Verdict::Answer(answer) => assert!(answer.len() <= 20 + 8 + 60 + 8),
        Verdict::Deliver | Verdict::Drop(_) => {}
    }
    if inbound(&mut bytes.to_vec(), [192, 0, 2, 2].into(), &table, local) == Verdict::Deliver {
        assert_eq!((&bytes[12..15], &bytes[16..19]), (&[10, 244, 2][..], &[10, 244, 1][..]));
    }
});
