//! Chains of iptables, as the reference plugins keep them: some shared by all containers, one a container. A table is
//! changed by one `iptables-restore`.

use ::flannel::Family;
use kernel::iptables;
use kernel::lock::Lock;
use sha2::{Digest, Sha512};

use crate::lock;
use crate::protocol::CniError;

/// The longest name of a chain in iptables.
const NAME: usize = 28;

/// The name of a container's chain: a prefix, and as much of a digest as fits.
pub(crate) fn name(prefix: &str, network: &str, id: &str) -> String {
    let digest: String = Sha512::digest(format!("{network}{id}")).iter().map(|byte| format!("{byte:02x}")).collect();
    let mut name = format!("{prefix}{digest}");
    name.truncate(NAME);
    name
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

    /// The same for a container's chain, if there is one; most containers have none, and then no process is started.
    pub(crate) fn read_if_chain(family: Family, table: &'static str, chain: &str) -> Result<Option<Table>, CniError> {
        if !iptables::may_have_chain(family, table, chain) {
            return Ok(None);
        }
        if !iptables::has_programs(family) {
            // Without the programs no plugin made a chain: other tables are in use.
            return Ok(None);
        }
        Table::read(family, table).map(|found| found.has_chain(chain).then_some(found))
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
