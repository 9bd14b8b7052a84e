//! Chains of iptables, as the reference plugins keep them: some shared by all containers, one a container. A table is
//! changed by one `iptables-restore`.

use std::net::IpAddr;

use ::flannel::Family;
use ::flannel::pod::Attachment;
use kernel::iptables;
use kernel::lock::Lock;
use sha2::{Digest, Sha512};

use crate::lock;
use crate::protocol::{CniError, Request};

/// The longest name of a chain in iptables.
const NAME: usize = 28;

fn name(prefix: &str, network: &str, id: &str) -> String {
    let digest: String = Sha512::digest(format!("{network}{id}")).iter().map(|byte| format!("{byte:02x}")).collect();
    let mut name = format!("{prefix}{digest}");
    name.truncate(NAME);
    name
}

/// The chains and comments of one attachment. All interfaces of a container in a network would share the reference plugin's
/// chain; so one that comes second has a chain of its own, and comments name any interface but the usual one.
pub(crate) struct Own {
    shared: String,
    own: String,
    comment: String,
    marker: String,
    is_usual: bool,
}

impl Own {
    /// Those of the attachment of a request.
    pub(crate) fn of(prefix: &str, request: &Request<'_>) -> Own {
        let (network, id, ifname) = (request.name, request.container_id, request.ifname);
        let is_usual = ifname == "eth0";
        let marker = format!("if: \\\"{ifname}\\\"");
        let named = if is_usual { String::new() } else { format!(" if: \"{ifname}\"") };
        let comment = format!("name: \"{network}\" id: \"{id}\"{named}");
        Own { shared: name(prefix, network, id), own: name(prefix, network, &format!("{id} {ifname}")), comment, marker, is_usual }
    }

    /// The names that the chain of an attachment may have.
    pub(crate) fn names_of(prefix: &str, attachment: &Attachment) -> Vec<String> {
        let Attachment { network, container, ifname } = attachment;
        vec![name(prefix, network, container), name(prefix, network, &format!("{container} {ifname}"))]
    }

    /// The comment of its rules, after a prefix.
    pub(crate) fn comment(&self, prefix: &str) -> String {
        comment(&format!("{prefix}{}", self.comment))
    }

    fn names(&self) -> [&str; 2] {
        [&self.own, &self.shared]
    }

    /// Its chain, if it has one already.
    pub(crate) fn find(&self, table: &Table, base: &str) -> Option<&str> {
        if table.has_chain(&self.own) {
            return Some(&self.own);
        }
        (table.has_chain(&self.shared) && !self.is_anothers(table, base)).then_some(self.shared.as_str())
    }

    /// The chain that an ADD writes.
    pub(crate) fn to_write(&self, table: &Table, base: &str) -> &str {
        let is_free = !table.has_chain(&self.shared) || !self.is_anothers(table, base) && (self.is_usual || self.has_marker(table, base));
        if is_free { &self.shared } else { &self.own }
    }

    /// Do rules of the shared chain, or those that lead to it, name another interface of the container?
    fn is_anothers(&self, table: &Table, base: &str) -> bool {
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

    /// Removes its chain, and whatever in `base` jumps to it. `addresses` are its addresses as far as they are known: a chain
    /// that names no interface may be that of another one, with another address.
    pub(crate) fn remove(&self, family: Family, table: &'static str, base: &str, addresses: &[IpAddr]) -> Result<(), CniError> {
        let Some(mut table) = Table::read_if_chain(family, table, &self.names())? else { return Ok(()) };
        let Some(chain) = self.find(&table, base) else { return Ok(()) };
        let named = |rule: &String| {
            addresses.iter().any(|ip| [format!("{ip}/"), format!("{ip}:"), format!("[{ip}]")].iter().any(|text| rule.contains(text)))
        };
        let is_known = chain == self.own || self.is_usual || addresses.is_empty() || self.has_marker(&table, base);
        let rules = self.rules(&table, base);
        // A chain without rules is what a flush leaves; whose it was does not matter.
        if is_known || rules.is_empty() || rules.iter().any(named) {
            table.remove_chain(chain, &[base]);
        }
        table.write()
    }

    /// The table if the attachment may have a chain in it.
    pub(crate) fn read(&self, family: Family, table: &'static str) -> Result<Option<Table>, CniError> {
        Table::read_if_chain(family, table, &self.names())
    }
}

/// A comment, quoted for `iptables-restore`; it takes 255 bytes.
pub(crate) fn comment(text: &str) -> String {
    let mut text = text.to_owned();
    text.truncate(255);
    format!("-m comment --comment \"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// A chain's name that the configuration gives.
pub(crate) fn given_name<'a>(field: &str, name: &'a str) -> Result<&'a str, CniError> {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-')) && !name.starts_with('-');
    let taken = ["INPUT", "OUTPUT", "FORWARD", "PREROUTING", "POSTROUTING", "ACCEPT", "DROP", "RETURN"].contains(&name);
    if name.is_empty() || name.len() > NAME || !plain || taken {
        return Err(CniError::config(format!("{field}: {name:?} is not a name for a chain: use 1 to {NAME} letters, digits, _ and -")));
    }
    Ok(name)
}

/// A table as `iptables-save` prints it.
pub(crate) struct Table {
    family: Family,
    table: &'static str,
    lines: Vec<String>,
    changes: String,
    /// Held so that what was read stays true until it is changed.
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

    /// The same if one of these chains exists; most containers have none, and then no process is started.
    pub(crate) fn read_if_chain(family: Family, table: &'static str, chains: &[&str]) -> Result<Option<Table>, CniError> {
        if !chains.iter().any(|chain| iptables::may_have_chain(family, table, chain)) {
            return Ok(None);
        }
        if !iptables::has_programs(family) {
            // Without the programs no plugin made a chain: other tables are in use.
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
            // Declaring it, as a container's own, would empty one that another program has created meanwhile.
            self.changes.push_str(&format!("-N {chain}\n"));
            rules.iter().for_each(|rule| self.append(chain, rule));
            return;
        }
        // Another program may have emptied it.
        let have = self.rules(chain);
        rules.iter().filter(|rule| !have.contains(rule)).for_each(|rule| self.append(chain, rule));
    }

    /// Makes a container's chain have these rules.
    pub(crate) fn replace_chain(&mut self, chain: &str, rules: &[String]) {
        self.changes.push_str(&format!(":{chain} - [0:0]\n"));
        rules.iter().for_each(|rule| self.append(chain, rule));
    }

    /// Adds a rule at a chain's end.
    pub(crate) fn append(&mut self, chain: &str, rule: &str) {
        self.changes.push_str(&format!("-A {chain} {rule}\n"));
    }

    /// Adds a rule at a chain's beginning.
    pub(crate) fn insert(&mut self, chain: &str, rule: &str) {
        self.changes.push_str(&format!("-I {chain} 1 {rule}\n"));
    }

    /// Adds a jump to a shared chain if there is none, at the beginning or the end.
    pub(crate) fn ensure_jump(&mut self, chain: &str, rule: &str, first: bool) {
        let target = rule.rsplit(' ').next().unwrap_or_default();
        if self.rules(chain).iter().any(|have| have.ends_with(&format!("-j {target}"))) {
            return;
        }
        self.changes.push_str(&if first { format!("-I {chain} 1 {rule}\n") } else { format!("-A {chain} {rule}\n") });
    }

    /// Removes a container's chain and whatever in `from` jumps to it.
    pub(crate) fn remove_chain(&mut self, chain: &str, from: &[&str]) {
        let jump = format!("-j {chain}");
        for base in from {
            self.remove_rules(base, |rule| rule.ends_with(&jump));
        }
        if self.has_chain(chain) {
            self.changes.push_str(&format!("-F {chain}\n-X {chain}\n"));
        }
    }

    /// Removes the rules of a chain that `wanted` picks.
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
