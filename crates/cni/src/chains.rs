//! iptables chains with the layout of the reference plugins: some shared by all containers, and one per container. Each change
//! of a table is one run of `iptables-restore`.

use std::net::IpAddr;

use ::flannel::Family;
use ::flannel::pod::Attachment;
use kernel::iptables;
use kernel::lock::Lock;
use sha2::{Digest, Sha512};

use crate::lock;
use crate::protocol::{CniError, Request};

/// The maximum length of an iptables chain's name.
const MAX_NAME: usize = 28;

fn name(prefix: &str, network: &str, id: &str) -> String {
    let digest: String = Sha512::digest(format!("{network}{id}")).iter().map(|byte| format!("{byte:02x}")).collect();
    let mut name = format!("{prefix}{digest}");
    name.truncate(MAX_NAME);
    name
}

/// The chains and comments of one attachment. In the reference plugin, all interfaces of a container in a network share one
/// chain. Here further interfaces have their own chain, and comments name every interface but `eth0`.
pub(crate) struct Own {
    shared: String,
    own: String,
    comment: String,
    marker: String,
    is_usual: bool,
}

impl Own {
    /// The chains and comments of the attachment of a request.
    pub(crate) fn of(prefix: &str, request: &Request<'_>) -> Own {
        let (network, id, ifname) = (request.name, request.container_id, request.ifname);
        let is_usual = ifname == "eth0";
        let marker = format!("if: \\\"{ifname}\\\"");
        let named = if is_usual { String::new() } else { format!(" if: \"{ifname}\"") };
        let comment = format!("name: \"{network}\" id: \"{id}\"{named}");
        Own { shared: name(prefix, network, id), own: name(prefix, network, &format!("{id} {ifname}")), comment, marker, is_usual }
    }

    /// The possible names of an attachment's chain.
    pub(crate) fn names_of(prefix: &str, attachment: &Attachment) -> Vec<String> {
        let Attachment { network, container, ifname } = attachment;
        vec![name(prefix, network, container), name(prefix, network, &format!("{container} {ifname}"))]
    }

    /// The comment of the attachment's rules, with a prefix.
    pub(crate) fn comment(&self, prefix: &str) -> String {
        comment(&format!("{prefix}{}", self.comment))
    }

    fn names(&self) -> [&str; 2] {
        [&self.own, &self.shared]
    }

    /// The attachment's chain, if it exists.
    pub(crate) fn find(&self, table: &Table, base: &str) -> Option<&str> {
        if table.has_chain(&self.own) {
            return Some(&self.own);
        }
        (table.has_chain(&self.shared) && !self.is_of_another_interface(table, base)).then_some(self.shared.as_str())
    }

    /// The name of the chain that an ADD writes.
    pub(crate) fn to_write(&self, table: &Table, base: &str) -> &str {
        let is_free =
            !table.has_chain(&self.shared) || !self.is_of_another_interface(table, base) && (self.is_usual || self.has_marker(table, base));
        if is_free { &self.shared } else { &self.own }
    }

    /// Do rules of the shared chain, or rules that jump to it, name another interface of the container?
    fn is_of_another_interface(&self, table: &Table, base: &str) -> bool {
        self.rules(table, base).iter().any(|rule| rule.contains("if: \\\"") && !rule.contains(&self.marker))
    }

    fn has_marker(&self, table: &Table, base: &str) -> bool {
        self.rules(table, base).iter().any(|rule| rule.contains(&self.marker))
    }

    fn rules(&self, table: &Table, base: &str) -> Vec<String> {
        let jump = format!("-j {}", self.shared);
        let leading = table.rules(base).into_iter().filter(|rule| rule.ends_with(&jump));
        table.rules(&self.shared).into_iter().chain(leading).collect()
    }

    /// Removes the attachment's chain, and the rules of `base` that jump to it. `addresses` are the attachment's known addresses:
    /// a chain whose rules name no interface is removed only if they name one of these addresses.
    pub(crate) fn remove(&self, family: Family, table: &'static str, base: &str, addresses: &[IpAddr]) -> Result<(), CniError> {
        let Some(mut table) = Table::read_if_chain(family, table, &self.names())? else { return Ok(()) };
        let Some(chain) = self.find(&table, base) else { return Ok(()) };
        let named = |rule: &String| {
            addresses.iter().any(|ip| [format!("{ip}/"), format!("{ip}:"), format!("[{ip}]")].iter().any(|text| rule.contains(text)))
        };
        let is_known = chain == self.own || self.is_usual || addresses.is_empty() || self.has_marker(&table, base);
        let rules = self.rules(&table, base);
        // A flush leaves a chain without rules, which any attachment may remove.
        if is_known || rules.is_empty() || rules.iter().any(named) {
            table.remove_chain(chain, &[base]);
        }
        table.write()
    }

    /// Reads the table if it may have a chain of the attachment.
    pub(crate) fn read(&self, family: Family, table: &'static str) -> Result<Option<Table>, CniError> {
        Table::read_if_chain(family, table, &self.names())
    }
}

/// A comment of at most 255 bytes, quoted for `iptables-restore`.
pub(crate) fn comment(text: &str) -> String {
    let mut text = text.to_owned();
    text.truncate(255);
    format!("-m comment --comment \"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Validates a chain name of the configuration.
pub(crate) fn validated_name<'a>(field: &str, name: &'a str) -> Result<&'a str, CniError> {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-')) && !name.starts_with('-');
    let taken = ["INPUT", "OUTPUT", "FORWARD", "PREROUTING", "POSTROUTING", "ACCEPT", "DROP", "RETURN"].contains(&name);
    if name.is_empty() || name.len() > MAX_NAME || !plain || taken {
        return Err(CniError::config(format!("{field}: {name:?} is not a name for a chain: use 1 to {MAX_NAME} letters, digits, _ and -")));
    }
    Ok(name)
}

/// A table in the format of `iptables-save`, and its pending changes.
pub(crate) struct Table {
    family: Family,
    table: &'static str,
    lines: Vec<String>,
    changes: String,
    /// Held until the changes are written, so that no other plugin changes the table in between.
    _lock: Lock,
}

impl Table {
    /// Reads a table.
    pub(crate) fn read(family: Family, table: &'static str) -> Result<Table, CniError> {
        let lock = lock::host()?;
        let text = iptables::save_text(family, table)
            .map_err(|error| CniError::failed(format!("cannot read table {table} of iptables: {error}")))?;
        Ok(Table { family, table, lines: text.lines().map(ToOwned::to_owned).collect(), changes: String::new(), _lock: lock })
    }

    /// Reads a table if one of these chains exists. Most containers have none, and then no process is started.
    pub(crate) fn read_if_chain(family: Family, table: &'static str, chains: &[&str]) -> Result<Option<Table>, CniError> {
        if !chains.iter().any(|chain| iptables::may_have_chain(family, table, chain)) {
            return Ok(None);
        }
        if !iptables::has_programs(family) {
            // Without the programs no plugin can have created a chain.
            return Ok(None);
        }
        Table::read(family, table).map(|found| chains.iter().any(|chain| found.has_chain(chain)).then_some(found))
    }

    pub(crate) fn has_chain(&self, chain: &str) -> bool {
        let declared = format!(":{chain} ");
        self.lines.iter().any(|line| line.starts_with(&declared))
    }

    /// The rules of a chain, without `-A CHAIN`.
    pub(crate) fn rules(&self, chain: &str) -> Vec<String> {
        let prefix = format!("-A {chain} ");
        self.lines.iter().filter_map(|line| line.strip_prefix(&prefix)).map(ToOwned::to_owned).collect()
    }

    /// Creates a shared chain with these rules if it does not exist.
    pub(crate) fn ensure_chain(&mut self, chain: &str, rules: &[String]) {
        if !self.has_chain(chain) {
            // A declaration (`:CHAIN`) would empty a chain that another program has created in the meantime.
            self.changes.push_str(&format!("-N {chain}\n"));
            rules.iter().for_each(|rule| self.append(chain, rule));
            return;
        }
        // Another program may have emptied it.
        let have = self.rules(chain);
        rules.iter().filter(|rule| !have.contains(rule)).for_each(|rule| self.append(chain, rule));
    }

    /// Replaces the rules of a container's chain, and creates it if it does not exist.
    pub(crate) fn replace_chain(&mut self, chain: &str, rules: &[String]) {
        self.changes.push_str(&format!(":{chain} - [0:0]\n"));
        rules.iter().for_each(|rule| self.append(chain, rule));
    }

    /// Appends a rule to a chain.
    pub(crate) fn append(&mut self, chain: &str, rule: &str) {
        self.changes.push_str(&format!("-A {chain} {rule}\n"));
    }

    /// Inserts a rule at the beginning of a chain.
    pub(crate) fn insert(&mut self, chain: &str, rule: &str) {
        self.changes.push_str(&format!("-I {chain} 1 {rule}\n"));
    }

    /// Adds a jump to a shared chain at the beginning or the end, if there is none.
    pub(crate) fn ensure_jump(&mut self, chain: &str, rule: &str, first: bool) {
        let target = rule.rsplit(' ').next().unwrap_or_default();
        if self.rules(chain).iter().any(|have| have.ends_with(&format!("-j {target}"))) {
            return;
        }
        self.changes.push_str(&if first { format!("-I {chain} 1 {rule}\n") } else { format!("-A {chain} {rule}\n") });
    }

    /// Removes a container's chain and the rules of the chains `from` that jump to it.
    pub(crate) fn remove_chain(&mut self, chain: &str, from: &[&str]) {
        let jump = format!("-j {chain}");
        for base in from {
            self.remove_rules(base, |rule| rule.ends_with(&jump));
        }
        if self.has_chain(chain) {
            self.changes.push_str(&format!("-F {chain}\n-X {chain}\n"));
        }
    }

    /// Removes the rules of a chain that `wanted` selects.
    pub(crate) fn remove_rules(&mut self, chain: &str, wanted: impl Fn(&str) -> bool) {
        for rule in self.rules(chain).iter().filter(|rule| wanted(rule)) {
            self.changes.push_str(&format!("-D {chain} {rule}\n"));
        }
    }

    /// Writes the changes.
    pub(crate) fn write(self) -> Result<(), CniError> {
        if self.changes.is_empty() {
            return Ok(());
        }
        let text = format!("*{}\n{}COMMIT\n", self.table, self.changes);
        iptables::restore_text(self.family, &text)
            .map_err(|error| CniError::failed(format!("cannot change table {} of iptables: {error}", self.table)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_chains_have_the_reference_plugins_names() {
        assert_eq!(name("CNI-", "net", "id").len(), 28);
        assert!(name("CNI-DN-", "net", "id").starts_with("CNI-DN-"));
        assert_ne!(name("CNI-", "net", "id"), name("CNI-", "net", "id2"));
    }

    #[test]
    fn comments_are_quoted() {
        assert_eq!(comment(r#"name: "n" id: "c""#), r#"-m comment --comment "name: \"n\" id: \"c\"""#);
    }
}
