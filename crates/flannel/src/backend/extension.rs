//! The extension backend: runs commands of the operator for each peer that is added or removed (specification, section 5.7). A command
//! is split into words, or, with `"Shell": true`, passed to a shell. Data of peers reaches a command as environment variables of a
//! fixed form and on its standard input, never as part of the command line.

use std::fmt;
use std::net::IpAddr;

use super::{Context, Driver, Local, Part, each_family};
use crate::config::{ConfigError, typed};
use crate::json::Fields;
use crate::lease::{LeaseKey, Peer};
use crate::net::{Family, PerFamily, Subnet};
use crate::node::Node;
use crate::object::Object;
use crate::probe::Point;

/// The extension backend with its settings. An empty command is not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extension {
    /// Run before a lease is acquired; its output is this host's `BackendData`.
    pre_startup: Box<str>,
    /// Run once this host has its lease.
    post_startup: Box<str>,
    /// Run when a peer is added.
    subnet_add: Box<str>,
    /// Run when a peer is removed.
    subnet_remove: Box<str>,
    /// `Shell`, which upstream does not have: whether the commands are passed to a shell.
    shell: bool,
}

impl Extension {
    pub(super) fn parse(section: &Fields<'_>) -> Result<Extension, ConfigError> {
        let command = |field, key| typed::<String>(section, field, key).map(|line| line.unwrap_or_default().into());
        Ok(Extension {
            pre_startup: command("Backend.PreStartupCommand", "prestartupcommand")?,
            post_startup: command("Backend.PostStartupCommand", "poststartupcommand")?,
            subnet_add: command("Backend.SubnetAddCommand", "subnetaddcommand")?,
            subnet_remove: command("Backend.SubnetRemoveCommand", "subnetremovecommand")?,
            shell: typed(section, "Backend.Shell", "shell")?.unwrap_or(false),
        })
    }

    fn peer_objects(&self, key: &LeaseKey, peer: &Peer) -> Vec<Object> {
        // The data is a JSON string; any other JSON is passed on unchanged.
        let data = peer.backend_data.get(Family::V4).or(peer.backend_data.get(Family::V6));
        let data = data.map(|text| serde_json::from_str::<String>(text).unwrap_or_else(|_| text.to_string())).unwrap_or_default();
        let command = |line: &str| Command {
            line: line.into(),
            shell: self.shell,
            env: variables(key.subnets(), &peer.public),
            stdin: format!("{data}\n"),
        };
        let (add, remove) = (command(&self.subnet_add), command(&self.subnet_remove));
        vec![Object::Extension(Box::new(ExtensionPeer { key: *key, add, remove }))]
    }
}

impl Driver for Extension {
    fn name(&self) -> &'static str {
        "extension"
    }

    /// The commands set up the interface, so its own addresses are published.
    fn published_addresses(&self, node: &Node) -> PerFamily<IpAddr> {
        node.addrs
    }

    fn published_data(&self, local: Local<'_>) -> PerFamily<Box<str>> {
        PerFamily { v4: local.identity.data.clone(), v6: None }
    }

    fn annotates(&self, family: Family, peer: &Peer) -> bool {
        family == Family::V4 || peer.public.v6.is_some()
    }

    fn mtu(&self, local: Local<'_>) -> u32 {
        local.node.mtu
    }

    fn probe_point(&self) -> Option<Point> {
        Some(Point::Unknown("the operator's commands make the path"))
    }

    fn node_objects(&self, _: Context<'_>) -> Vec<Object> {
        Vec::new()
    }

    /// One command serves both families: if one family is refused, no command runs.
    fn peer_part(&self, context: Context<'_>, key: &LeaseKey, peer: &Peer) -> Part {
        let mut part = each_family(context, key, peer, |_| Ok(Vec::new()));
        if part.refusals.is_empty() {
            part.objects = self.peer_objects(key, peer);
        }
        part
    }

    fn has_commands(&self) -> bool {
        let commands = [&self.pre_startup, &self.post_startup, &self.subnet_add, &self.subnet_remove];
        commands.iter().any(|command| !command.trim().is_empty())
    }

    fn before_lease(&self) -> Option<(&'static str, Command)> {
        let line = Some(&self.pre_startup).filter(|line| !line.trim().is_empty())?;
        Some(("Backend.PreStartupCommand", Command { line: line.clone(), shell: self.shell, env: Vec::new(), stdin: String::new() }))
    }

    fn after_lease(&self, context: Context<'_>) -> Option<(&'static str, Command)> {
        let line = Some(&self.post_startup).filter(|line| !line.trim().is_empty())?;
        let Local { config, node, .. } = context.local;
        let mut env = variables(context.own.subnets(), &node.addrs);
        let network = |family| config.network(family).map(|network| network.to_string());
        env.push(("NETWORK", network(Family::V4).unwrap_or("0.0.0.0/0".to_owned())));
        env.push(("IPV6NETWORK", network(Family::V6).unwrap_or("::/0".to_owned())));
        Some(("Backend.PostStartupCommand", Command { line: line.clone(), shell: self.shell, env, stdin: String::new() }))
    }
}

/// A command of the operator, with its environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// The command line, as configured.
    pub line: Box<str>,
    /// Whether to run it by a shell.
    pub shell: bool,
    /// Environment variables in addition to those of the daemon.
    pub env: Vec<(&'static str, String)>,
    /// The text on its standard input.
    pub stdin: String,
}

impl Command {
    /// The program and its arguments. Without a shell the line is split at white space, and `$NAME` and `${NAME}` in a word are
    /// replaced by variables of the command, or else by those that `var` returns.
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

/// The commands of one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtensionPeer {
    /// Its lease.
    pub key: LeaseKey,
    /// Run when it is added.
    pub add: Command,
    /// Run when it is removed.
    pub remove: Command,
}

/// The environment variables of a lease. Absent values are spelled as upstream spells them.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tests::check;
    use expect_test::expect;

    #[test]
    fn peer_is_an_object_with_its_commands() {
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
    fn variables_are_expanded_within_words() {
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
