//! extension: the operator's own commands for each peer that comes and goes (specification, section 5.7). A command is
//! words, or, where the configuration says `"Shell": true`, a line for a shell. What peers publish reaches a command as
//! environment variables of a fixed form and on its standard input, never as part of the line.

use std::fmt;
use std::net::IpAddr;

use super::Context;
use crate::config::ExtensionConfig;
use crate::desired::Object;
use crate::lease::{LeaseKey, Peer};
use crate::net::{Family, PerFamily, Subnet};

/// A command of the operator, with its surroundings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// The line, as it is configured.
    pub line: Box<str>,
    /// Is it for a shell?
    pub shell: bool,
    /// Variables beside this process's own.
    pub env: Vec<(&'static str, String)>,
    /// What it gets on standard input.
    pub stdin: String,
}

impl Command {
    /// Program and arguments. Without a shell the line is split at white space, and in each word `$NAME` and `${NAME}`
    /// stand for variables: the command's own, else those that `var` knows.
    pub fn words(&self, var: impl Fn(&str) -> Option<String>) -> Vec<String> {
        if self.shell {
            return vec!["/bin/sh".to_owned(), "-c".to_owned(), self.line.to_string()];
        }
        let value = |name: &str| {
            let own = self.env.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
            own.or_else(|| var(name)).unwrap_or_default()
        };
        self.line.split_whitespace().map(|word| expand(word, &value)).collect()
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}

fn expand(word: &str, value: &impl Fn(&str) -> String) -> String {
    let mut text = String::new();
    let mut rest = word;
    while let Some(at) = rest.find('$') {
        text.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some((name, after)) = rest.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            text.push_str(&value(name));
            rest = after;
            continue;
        }
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
        if end == 0 {
            text.push('$');
        } else {
            text.push_str(&value(&rest[..end]));
        }
        rest = &rest[end..];
    }
    text.push_str(rest);
    text
}

/// A peer as the commands see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtensionPeer {
    /// Its lease.
    pub key: LeaseKey,
    /// What is run when it is there.
    pub add: Command,
    /// What is run when it is gone.
    pub remove: Command,
}

/// The variables of a lease. What is absent has upstream's spelling of it.
fn variables(subnets: &PerFamily<Subnet>, public: &PerFamily<IpAddr>) -> Vec<(&'static str, String)> {
    let subnet = |family: Family| {
        let none = || format!("{}/0", family.unspecified());
        subnets.get(family).map_or_else(none, |subnet: &Subnet| subnet.to_string())
    };
    let ip = |family: Family, none: &str| public.get(family).map_or(none.to_owned(), |ip: &IpAddr| ip.to_string());
    vec![
        ("SUBNET", subnet(Family::V4)),
        ("IPV6SUBNET", subnet(Family::V6)),
        ("PUBLIC_IP", ip(Family::V4, "0.0.0.0")),
        ("PUBLIC_IPV6", ip(Family::V6, "<nil>")),
    ]
}

pub(super) fn peer_objects(config: &ExtensionConfig, key: &LeaseKey, peer: &Peer) -> Vec<Object> {
    // The data is a JSON string; whatever else it may be is handed on as it stands.
    let data = peer.backend_data.get(Family::V4).or(peer.backend_data.get(Family::V6));
    let data = data.map(|text| serde_json::from_str::<String>(text).unwrap_or_else(|_| text.to_string())).unwrap_or_default();
    let command = |line: &str| Command {
        line: line.into(),
        shell: config.shell,
        env: variables(key.subnets(), &peer.public),
        stdin: format!("{data}\n"),
    };
    vec![Object::Extension(Box::new(ExtensionPeer { key: *key, add: command(&config.subnet_add), remove: command(&config.subnet_remove) }))]
}

/// What is run before a lease is acquired, if anything; its output is this host's `BackendData`.
pub fn pre_startup(config: &ExtensionConfig) -> Option<Command> {
    let line = Some(&config.pre_startup).filter(|line| !line.trim().is_empty())?;
    Some(Command { line: line.clone(), shell: config.shell, env: Vec::new(), stdin: String::new() })
}

/// What is run once this host has its lease, if anything.
pub fn post_startup(config: &ExtensionConfig, context: Context<'_>) -> Option<Command> {
    let line = Some(&config.post_startup).filter(|line| !line.trim().is_empty())?;
    let mut env = variables(context.own.subnets(), &context.node.addrs);
    let network = |family| context.config.network(family).map(|network| network.to_string());
    env.push(("NETWORK", network(Family::V4).unwrap_or("0.0.0.0/0".to_owned())));
    env.push(("IPV6NETWORK", network(Family::V6).unwrap_or("::/0".to_owned())));
    Some(Command { line: line.clone(), shell: config.shell, env, stdin: String::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tests::check;
    use expect_test::expect;

    #[test]
    fn a_peer_is_its_commands() {
        check(
            r#"{"Type":"extension","SubnetAddCommand":"ip route add $SUBNET via ${PUBLIC_IP}","SubnetRemoveCommand":"ip route del $SUBNET"}"#,
            &[("10.244.2.0-24", r#"{"PublicIP":"192.0.2.2","BackendType":"extension","BackendData":"a b"}"#)],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"extension"}
                mtu 1500
                10.244.2.0-24:
                  extension 10.244.2.0/24: ip route add $SUBNET via ${PUBLIC_IP}
            "#]],
        );
    }

    #[test]
    fn words_and_shells() {
        let command =
            |line: &str, shell| Command { line: line.into(), shell, env: vec![("SUBNET", "10.1.0.0/24".to_owned())], stdin: String::new() };
        let var = |name: &str| (name == "HOME").then(|| "/root dir".to_owned());
        assert_eq!(
            command("x '$SUBNET;' ${HOME}/y $NOPE a$ $$b && c", false).words(var),
            ["x", "'10.1.0.0/24;'", "/root dir/y", "", "a$", "$", "&&", "c"],
            "a value never becomes two words"
        );
        assert_eq!(command("a && b", true).words(var), ["/bin/sh", "-c", "a && b"]);
    }
}
