//! The network configuration: whatever is in the store, it is a valid configuration or a named error.
#![no_main]
use flannel::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = Config::parse(text) {
        for (family, network) in config.networks.iter() {
            assert_eq!(network.network.family(), family);
            assert!(network.network.contains(network.min) && network.network.contains(network.max) && network.min <= network.max);
        }
    }
});
