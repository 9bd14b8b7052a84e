//! The status without a daemon: what the subnet file and the kernel say.

use std::fs;

use flannel::Subnet;
use flannel::check::{Facts, HostFacts, run_all};
use flannel::object::Object;
use flannel::scope::Scope;
use flannel::subnet_env::{previous_networks, previous_subnets};

use kernel::Kernel;

use super::rows::{Level, Row, counted};
use super::screen::Screen;
use super::{DaemonArgs, Found, show};
use crate::doctor;
use crate::terminal::{clean, wrap};

pub(super) fn look(args: &DaemonArgs, pods: Row, error: &str, screen: Screen, json: bool) -> Found {
    let mut rows = vec![Row { name: "Daemon", level: Level::Fail, text: clean(&format!("{error}; what follows is the kernel's state")) }];
    let path = args.subnet_file.display();
    let mut networks = Vec::new();
    match fs::read_to_string(&args.subnet_file) {
        Ok(text) => {
            networks = previous_networks(&text);
            let list = |items: Vec<String>| if items.is_empty() { "none".to_owned() } else { items.join(",") };
            let subnets = list(previous_subnets(&text).iter().map(|(_, subnet)| subnet.to_string()).collect());
            let networks = list(networks.iter().map(ToString::to_string).collect());
            let text = clean(&format!("subnet {subnets} of network {networks}, by {path}"));
            rows.push(Row { name: "Node", level: Level::Ok, text });
        }
        Err(error) => {
            let text = clean(&format!("cannot read {path}: {error}; no flanneld has run on this host since it was started"));
            rows.push(Row { name: "Node", level: Level::Warn, text });
        }
    }
    rows.push(pods);
    match doctor::gather(&args.subnet_file) {
        Ok((expected, host)) => {
            rows.push(kernel(&networks, &host).unwrap_or_else(|error| not_checked(&error)));
            rows.extend(run_all(Facts { expected: &expected, host: &host }).into_iter().map(|finding| {
                let level = if finding.severity == flannel::check::Severity::Error { Level::Fail } else { Level::Warn };
                Row { name: "Finding", level, text: clean(&format!("{}: {finding}", finding.code)) }
            }));
        }
        Err(error) => rows.push(not_checked(&error)),
    }
    let head = wrap(&format!("flannel {}  no daemon", env!("CARGO_PKG_VERSION")), screen.style.width, 2) + "\n";
    show(&rows, None, screen, json, |screen, rows| head.clone() + &rows.iter().map(|row| screen.row(row)).collect::<String>())
}

fn not_checked(error: &anyhow::Error) -> Row {
    Row { name: "Kernel", level: Level::Warn, text: clean(&format!("not checked: {error:#}")) }
}

fn kernel(networks: &[Subnet], host: &HostFacts) -> anyhow::Result<Row> {
    let scope = Scope { networks: networks.to_vec(), ..Scope::default() };
    let observed = Kernel::open()?.observe(&scope)?;
    let routes = observed.iter().filter(|(_, object)| matches!(object, Object::Route(_))).count();
    let devices = host.links.iter().filter(|link| link.vxlan.is_some() || link.kind == "tun").map(|link| link.name.to_string());
    let devices: Vec<String> = devices.filter(|name| name.starts_with("flannel")).collect();
    let devices = if devices.is_empty() { "no flannel device".to_owned() } else { devices.join(", ") };
    let text = clean(&format!("{}, {devices}; peers that come or go are not seen", counted(routes, "peer route")));
    Ok(Row { name: "Kernel", level: if routes > 0 { Level::Ok } else { Level::Warn }, text })
}
