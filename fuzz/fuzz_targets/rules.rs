//! What `iptables-save` prints, whatever it is: our rules are distinguished from foreign ones, and foreign ones are written back.
#![no_main]
use flannel::Family;
use flannel::traffic::iptables::{Iptables, Variant, parse_save, restore};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let networks = ["10.244.0.0/16".parse().expect("a network")];
    let saved = [parse_save("nat", text), parse_save("filter", text)].concat();
    let found = Iptables::read(Family::V4, Variant::Nft, &saved, &networks);
    let none = Iptables { family: Family::V4, variant: Variant::Nft, chains: Vec::new() };
    let text = restore(found.as_ref().unwrap_or(&none), &saved, &networks);
    assert!(found.is_none() || text.lines().all(|line| !line.starts_with("-X")), "what is as wanted is not deleted: {text}");
    let _ = restore(&none, &saved, &networks);
});
