//! A frame captured on the wire, as the lab reads it.
#![no_main]
#[path = "../../crates/flanneld/src/lab/packet.rs"]
#[allow(dead_code)]
mod packet;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(frame) = packet::Frame::parse(bytes) {
        let _ = (frame.innermost().src, frame.to_string());
    }
});
