//! Port mappings with conditions in the syntax of `nft`. That program adds the rules, because only it parses its syntax. It
//! cannot write our tags, and no note of the rules is kept, so DEL finds them by comment and address.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use ::flannel::Family;
use ::flannel::pod::ports::{HOSTPORTS, Ports};
use ::flannel::pod::{Table, comment};
use kernel::child::{self, Limits};
use kernel::pod_table;

use super::iptables::protocol_name;
use crate::chained::failed;
use crate::protocol::CniError;

/// The limits of `nft`, which waits for no other process and prints only the lines that it refuses.
const LIMITS: Limits = Limits { time: Duration::from_secs(10), output: 4096 };

/// Adds a container's mappings for packets that match the conditions.
pub(super) fn add(ports: &Ports, container: &str, conditions: &[String]) -> Result<(), CniError> {
    let table = Table::Ports(ports.family());
    pod_table::ensure(table).map_err(failed("create the table of port mappings"))?;
    run(&script(ports, container, conditions))?;
    let rules: Vec<_> = ports.rules().into_iter().filter(|rule| rule.chain != HOSTPORTS).collect();
    pod_table::add(table, &rules).map_err(failed("map the container's ports"))
}

fn script(ports: &Ports, container: &str, conditions: &[String]) -> String {
    let ip = if ports.family() == Family::V4 { "ip" } else { "ip6" };
    let (name, conditions, text) = (Table::Ports(ports.family()).name(), conditions.join(" "), comment(container));
    let line = |mapping: &::flannel::pod::ports::Mapping| {
        let host = mapping.host_ip.filter(|host| !host.is_unspecified()).map_or(String::new(), |host| format!("{ip} daddr {host} "));
        let to = match ports.address.addr {
            IpAddr::V4(to) => format!("{to}:{}", mapping.container_port),
            IpAddr::V6(to) => format!("[{to}]:{}", mapping.container_port),
        };
        let port = format!("{} dport {}", protocol_name(mapping.protocol), mapping.host_port);
        format!("add rule {ip} {name} {HOSTPORTS} {conditions} {host}{port} dnat to {to} comment \"{text}\"\n")
    };
    ports.mappings.iter().map(line).collect()
}

/// Runs a script with `nft`, as one transaction.
fn run(script: &str) -> Result<(), CniError> {
    let failed = |what: String| CniError::failed(format!("conditionsV4, conditionsV6: cannot add the rules with nft: {what}"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let program = folders.map(|folder| folder.join("nft")).find(|file| file.is_file());
    let program = program.ok_or_else(|| failed("the program is not installed".to_owned()))?;
    let ended = child::run(Command::new(program).args(["-f", "-"]), script, LIMITS).map_err(|error| failed(error.to_string()))?;
    match ended.status {
        Some(status) if status.success() => Ok(()),
        Some(_) => Err(failed(String::from_utf8_lossy(&ended.stderr).trim().to_owned())),
        None => Err(failed(format!("it did not end within {} s", LIMITS.time.as_secs()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::flannel::pod::ports::{Holder, Mapping, Snat};

    #[test]
    fn rules_carry_conditions_and_comment() {
        let mappings = vec![
            Mapping { protocol: 6, host_port: 8080, container_port: 80, host_ip: None },
            Mapping { protocol: 17, host_port: 53, container_port: 53, host_ip: "192.0.2.1".parse().ok() },
        ];
        let ports = Ports { holder: Holder::Container("c1".to_owned()), address: "10.1.2.3/24".parse().unwrap(), mappings, snat: Snat::No };
        let conditions = ["ip", "saddr", "198.51.100.0/24"].map(ToOwned::to_owned);
        assert_eq!(
            script(&ports, "c1", &conditions),
            "add rule ip cni_hostport hostports ip saddr 198.51.100.0/24 tcp dport 8080 dnat to 10.1.2.3:80 comment \"c1\"\n\
             add rule ip cni_hostport hostports ip saddr 198.51.100.0/24 ip daddr 192.0.2.1 udp dport 53 dnat to 10.1.2.3:53 comment \"c1\"\n"
        );
    }
}
