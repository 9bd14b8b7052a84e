//! `subnet.env`, as the plugin reads it and as the next daemon does.
#![no_main]
use flannel::subnet_env::{SubnetEnv, previous_subnets};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = previous_subnets(text);
    if let Ok(env) = SubnetEnv::parse(text) {
        // A family with a subnet and no network is not written again; what is written reads back.
        if let Ok(again) = SubnetEnv::parse(&env.render()) {
            assert_eq!(SubnetEnv::parse(&again.render()).as_ref(), Ok(&again));
        }
    }
});
