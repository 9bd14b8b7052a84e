//! The shipped plugin program. It is installed once, with hard links under the plugins' names; called by its own name
//! it takes the plugin as its first argument.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let plugin = cni::called_as(args.next()).or_else(|| cni::called_as(args.next()));
    match plugin {
        Some(plugin) => cni::main(plugin),
        None => {
            eprintln!("flannel-cni: call it by the name of a plugin, or with that name as the first argument: {}", cni::NAMES.join(", "));
            ExitCode::from(2)
        }
    }
}
