//! `lab --keep`: a tour of the running lab, as lines to paste into another terminal.

use std::path::Path;

use crate::cluster::{Lab, Pod, STORE};
use crate::exec::{Directory, Place};
use crate::plan::StoreKind;
use crate::process::find;

/// What `lab exec` must know of this lab.
pub(crate) fn directory(lab: &Lab, pods: &[Pod]) -> Directory {
    let hosts = lab.hosts.iter().map(|host| (host.name.clone(), lab.netns_file(&host.name), host));
    let pods = pods.iter().map(|pod| (pod.name.clone(), pod.path.clone(), &lab.hosts[pod.host]));
    let places = hosts.chain(pods).map(|(name, netns, host)| Place { name, netns, mounts: host.mounts.number() }).collect();
    let mut env = vec![("ETCDCTL_API".to_owned(), "3".to_owned())];
    let mut tools = None;
    if matches!(lab.plan.store, StoreKind::Kubernetes(_)) {
        env.push(("KUBECONFIG".to_owned(), lab.kubernetes().join("admin.kubeconfig").display().to_string()));
        tools = Some(lab.tools());
    }
    Directory { places, env, tools }
}

/// The text of the tour: comments, and lines that a shell runs as they are.
pub(crate) fn tour(lab: &Lab, pods: &[Pod], program: &Path) -> String {
    let exec = format!("{} lab exec", quoted(program));
    let mut tour = Tour { text: String::new(), missing: Vec::new(), exec };
    tour.text.push_str("The lab stays up until you press Ctrl-C. Paste these lines into another terminal:\n");
    let target = pods.get(1).map(|pod| pod.address.to_string());
    if let Some(address) = &target {
        tour.comment("Ping the pod of h2 from the pod of h1.");
        tour.line("h1-pod", &format!("ping -c 3 {address}"));
    }
    tour.comment("The daemon of h1: its lease, its peers, and what it could not do.");
    tour.line("h1", &format!("curl -s http://{}/state", crate::cluster::HEALTH));
    tour.line("h1", "cat /run/flannel/subnet.env");
    match lab.plan.store {
        StoreKind::Kubernetes(_) => {
            tour.comment("The store: leases are annotations of the Nodes.");
            tour.line("h1", "kubectl get nodes -o wide");
            tour.line("h1", "kubectl describe node h1");
        }
        _ => {
            tour.comment("The store: the network configuration, and a lease for each host.");
            tour.line("h1", &format!("etcdctl --endpoints http://{STORE} get --prefix {}", lab.plan.prefix));
        }
    }
    tour.comment("The kernel of h1: routes to the other hosts' pods, and rules for their traffic.");
    tour.line("h1", "ip route show proto 241");
    if lab.plan.backend() == "vxlan" {
        tour.line("h1", "bridge fdb show dev flannel.1");
    }
    if lab.plan.backend() == "wireguard" {
        tour.line("h1", "wg show");
    }
    tour.line("h1", "nft list table ip flannel-ipv4");
    tour.comment("Break it: flush the routes and the rules. The daemon restores them within milliseconds.");
    tour.line("h1", "ip route flush proto 241");
    tour.line("h1", "nft flush ruleset");
    tour.line("h1", "sleep 1");
    tour.line("h1", "ip route show proto 241");
    tour.line("h1", "nft list table ip flannel-ipv4");
    if let (Some(address), Some(pid)) = (&target, lab.hosts.get(1).and_then(crate::cluster::Host::pid)) {
        tour.comment("Break it: kill the daemon of h2. Traffic goes on; h2 learns of no change any more.");
        tour.plain(&format!("kill {pid}"));
        tour.line("h1-pod", &format!("ping -c 3 {address}"));
    }
    let names: Vec<&str> = lab.hosts.iter().map(|host| host.name.as_str()).chain(pods.iter().map(|pod| pod.name.as_str())).collect();
    tour.comment(&format!("Places to enter: {}.", shortened(&names)));
    if !tour.missing.is_empty() {
        tour.comment(&format!("Not shown, because they are not installed: {}.", tour.missing.join(", ")));
    }
    tour.text
}

struct Tour {
    text: String,
    missing: Vec<String>,
    exec: String,
}

impl Tour {
    fn comment(&mut self, text: &str) {
        self.text.push_str(&format!("\n    # {text}\n"));
    }

    /// A command in a host or pod, unless its program is not installed.
    fn line(&mut self, place: &str, command: &str) {
        let program = command.split(' ').next().unwrap_or_default();
        if program != "kubectl" && find(program).is_none() {
            if !self.missing.iter().any(|missing| missing == program) {
                self.missing.push(program.to_owned());
            }
            return;
        }
        self.text.push_str(&format!("    {} {place} -- {command}\n", self.exec));
    }

    fn plain(&mut self, command: &str) {
        self.text.push_str(&format!("    {command}\n"));
    }
}

/// The first and last of many names.
fn shortened(names: &[&str]) -> String {
    match names {
        [first @ .., last] if names.len() > 12 => format!("{}, …, {last}", first[..6].join(", ")),
        _ => names.join(", "),
    }
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+".contains(c));
    if is_plain { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_quoted_for_a_shell() {
        assert_eq!(quoted(Path::new("/usr/local/bin/flanneld")), "/usr/local/bin/flanneld");
        assert_eq!(quoted(Path::new("/home/a b/it's")), r"'/home/a b/it'\''s'");
    }
}
