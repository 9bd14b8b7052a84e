//! A plugin's standard input and CNI_ARGS, up to a validated request; and a result of another plugin.
#![no_main]
use cni::protocol::{Command, Environment, Request};
use cni::result::CniResult;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &str)| {
    let (stdin, args) = input;
    let environment = Environment::from(|name: &str| {
        Some(match name {
            "CNI_COMMAND" => "ADD".to_owned(),
            "CNI_ARGS" => args.to_owned(),
            "CNI_IFNAME" => "eth0".to_owned(),
            _ => "x".to_owned(),
        })
    });
    for command in [Command::Add, Command::Gc] {
        if let Ok(request) = Request::new(command, &environment, stdin) {
            let _ = (request.arg("IP"), request.valid_attachments());
        }
    }
    if let Ok(value) = serde_json::from_str(stdin)
        && let Ok(result) = CniResult::parse(&value)
    {
        for version in ["0.2.0", "0.4.0", "1.1.0"] {
            let text = result.render(version);
            let value = serde_json::from_str(&text).expect("our own text");
            CniResult::parse(&value).expect("our own text");
        }
    }
});
