//! Rules of pods: from the notes of the plugins the daemon restores them.

use flannel::object::{Key, Object, PodRules};
use flannel::pod::masquerade::{self, Masquerade};
use flannel::pod::note::Rules;
use flannel::pod::ports::{self, Holder, Mapping, Ports, Snat};
use flannel::pod::{Attachment, Table};
use flannel::scope::Scope;
use flannel::{Cidr, Family, Op};
use kernel::netns::Netns;
use kernel::pod_rules::Notes;
use kernel::pod_table::PORTS;
use kernel::{Changed, Kernel, Monitor, link, pod_table};

use crate::{apply, external, name, scope};

fn pod_rules(missing: usize) -> Object {
    Object::PodRules(PodRules { missing })
}

fn addresses() -> [Cidr; 2] {
    ["10.244.1.5/24".parse().unwrap(), "fd00::5/64".parse().unwrap()]
}

fn mapping(host_port: u16) -> Mapping {
    Mapping { protocol: 6, host_port, container_port: 80, host_ip: None }
}

fn mappings() -> Vec<Mapping> {
    vec![mapping(80), mapping(81)]
}

fn pod(container: &str) -> Attachment {
    Attachment { network: "cbr0".to_owned(), container: container.to_owned(), ifname: "eth0".to_owned() }
}

/// The pod with masquerading and ports of both families.
fn attachment() -> Attachment {
    pod("abc")
}

/// Adds its rules and notes as the plugins do. `end` is the index of its link.
fn add(end: u32) {
    let masquerade = Masquerade { attachment: attachment(), addresses: addresses().to_vec() };
    let all_ports =
        addresses().map(|address| Ports { holder: Holder::Attachment(attachment()), address, mappings: mappings(), snat: Snat::Local });
    let notes = Notes::hold().unwrap();
    pod_table::add(Table::Masquerade, &masquerade.rules()).unwrap();
    notes.keep(end, "eth0", Rules::Masquerade(masquerade)).unwrap();
    for ports in &all_ports {
        pod_table::add(Table::Ports(ports.family()), &ports.rules()).unwrap();
        notes.keep(end, "eth0", Rules::Ports(ports.clone())).unwrap();
    }
}

/// Deletes its rules, but not its notes.
fn flush() {
    let attachment = attachment();
    let ports = pod_table::remove(&PORTS, |rule| ports::is_of(rule, &attachment, &[])).unwrap();
    drop((pod_table::remove(&[Table::Masquerade], |rule| masquerade::is_of(rule, &attachment)).unwrap(), ports));
}

fn count(attachment: &Attachment, family: Family) -> usize {
    let rules = pod_table::list(Table::Ports(family)).unwrap();
    rules.iter().filter(|rule| rule.chain == "hostports" && ports::is_of(rule, attachment, &[])).count()
}

/// Its port rules, by family.
fn ports() -> [usize; 2] {
    Family::ALL.map(|family| count(&attachment(), family))
}

#[track_caller]
fn nft(arguments: &str) -> String {
    let output = std::process::Command::new("nft").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{arguments}");
    String::from_utf8(output.stdout).unwrap()
}

/// The daemon's side.
struct Daemon {
    kernel: Kernel,
    monitor: Monitor,
}

impl Daemon {
    fn wrong(&mut self) -> Option<Object> {
        let scope = Scope { pod_rules: true, ..Scope::default() };
        self.kernel.observe(&scope).unwrap().get(&Key::PodRules).cloned()
    }

    fn is_reported(&mut self) -> bool {
        self.monitor.drain().unwrap().iter().any(|event| event.change == Changed::PodRules)
    }

    #[track_caller]
    fn restore(&mut self) {
        apply(&mut self.kernel, &[Op::Set(pod_rules(0))]);
    }
}

pub(crate) fn missing_pod_rules_are_restored() {
    let end = link::get(&mut external(), name("wire")).unwrap().unwrap().index;
    let kernel = Kernel::open().unwrap();
    let monitor = Monitor::open(scope(), name("eth0"), kernel.port()).unwrap();
    let mut daemon = Daemon { kernel, monitor };
    assert_eq!(daemon.wrong(), Some(pod_rules(0)), "no plugin has written any");
    add(end);
    assert!(!daemon.is_reported() && daemon.wrong() == Some(pod_rules(0)));

    flush();
    assert!(daemon.is_reported() && daemon.wrong() == Some(pod_rules(3)));
    // What is no note is none of ours.
    let namespace = Netns::current().unwrap().id().unwrap().1;
    let junk = format!("/run/flannel/pods/{namespace}-junk");
    std::fs::write(&junk, "end 1\nports no").unwrap();
    daemon.restore();
    assert_eq!((daemon.wrong(), ports()), (Some(pod_rules(0)), [2, 2]));
    deleted_rules_and_chains_are_restored(&mut daemon);
    rules_of_many_pods_are_restored(&mut daemon, end);
    note_of_an_earlier_version_is_understood(&mut daemon, end);
    held_notes_are_not_waited_for(&mut daemon);

    // The link of a pod that is gone has ended: so do its rules.
    add(end + 1000);
    assert_eq!(daemon.wrong(), Some(pod_rules(3)));
    daemon.restore();
    assert_eq!((daemon.wrong(), ports()), (Some(pod_rules(0)), [0, 0]));
    assert!(
        std::fs::read_dir("/run/flannel/pods")
            .unwrap()
            .flatten()
            .filter(|file| file.file_name().to_string_lossy().starts_with(&namespace.to_string()))
            .count()
            == 1
    );
    std::fs::remove_file(junk).unwrap();
}

fn deleted_rules_and_chains_are_restored(daemon: &mut Daemon) {
    // One rule of several.
    let handle = nft("-a list chain ip cni_hostport hostports")
        .lines()
        .find_map(|line| line.split("dnat").nth(1)?.split("# handle ").nth(1).map(str::to_owned))
        .unwrap();
    nft(&format!("delete rule ip cni_hostport hostports handle {handle}"));
    assert!(daemon.is_reported() && daemon.wrong() == Some(pod_rules(1)));
    daemon.restore();
    assert_eq!((daemon.wrong(), ports()), (Some(pod_rules(0)), [2, 2]));

    // Chains that lead to them, and those beside them; nothing is there twice after that.
    let before = nft("list table ip cni_hostport");
    for chain in ["prerouting", "output", "hostports_all", "masquerading", "hostports"] {
        nft(&format!("flush chain ip cni_hostport {chain}"));
        assert!(daemon.is_reported() && daemon.wrong() == Some(pod_rules(1)), "{chain}");
        daemon.restore();
        assert_eq!((nft("list table ip cni_hostport"), daemon.wrong()), (before.clone(), Some(pod_rules(0))), "{chain}");
    }
}

fn rules_of_many_pods_are_restored(daemon: &mut Daemon, end: u32) {
    let before = nft("list table ip cni_hostport");
    let notes = Notes::hold().unwrap();
    let id = |n: u32| format!("many-{n:064x}");
    for n in 0..200 {
        let address = format!("10.244.{}.{}/16", 2 + n / 200, 1 + n % 200).parse().unwrap();
        let mappings = vec![Mapping { host_port: u16::try_from(1_000 + n).unwrap(), ..mapping(1) }];
        let ports = Ports { holder: Holder::Attachment(pod(&id(n))), address, mappings, snat: Snat::Local };
        notes.keep(end, "eth0", Rules::Ports(ports)).unwrap();
    }
    drop(notes);
    assert_eq!(daemon.wrong(), Some(pod_rules(200)));
    daemon.restore();
    assert_eq!(daemon.wrong(), Some(pod_rules(0)));
    assert_eq!((0..200).map(|n| count(&pod(&id(n)), Family::V4)).sum::<usize>(), 200);
    let notes = Notes::hold().unwrap();
    (0..200).for_each(|n| notes.forget_ports(&pod(&id(n))));
    drop((notes, nft("delete table ip cni_hostport")));
    daemon.restore();
    assert_eq!(nft("list table ip cni_hostport"), before);
}

/// It names the container only: its rules are restored as they were, and found by a DEL.
fn note_of_an_earlier_version_is_understood(daemon: &mut Daemon, end: u32) {
    let notes = Notes::hold().unwrap();
    let old = Ports { holder: Holder::Container("old".to_owned()), address: addresses()[0], mappings: mappings(), snat: Snat::No };
    notes.keep(end, "eth0", Rules::Ports(old)).unwrap();
    drop(notes);
    assert_eq!(daemon.wrong(), Some(pod_rules(1)));
    daemon.restore();
    assert_eq!((daemon.wrong(), count(&pod("old"), Family::V4)), (Some(pod_rules(0)), 2));
    let notes = Notes::hold().unwrap();
    notes.forget_ports(&pod("old"));
    let of_old = |address: &str| pod_table::remove(&PORTS, |rule| ports::is_of(rule, &pod("old"), &[address.parse().unwrap()])).unwrap();
    drop(of_old("10.244.1.6"));
    assert_eq!(count(&pod("old"), Family::V4), 2, "of another attachment of the container");
    drop(of_old("10.244.1.5"));
    assert_eq!(count(&pod("old"), Family::V4), 0);
    drop(notes);
    assert_eq!((daemon.wrong(), ports()), (Some(pod_rules(0)), [2, 2]));
}

/// While a plugin holds the notes the daemon does not wait.
fn held_notes_are_not_waited_for(daemon: &mut Daemon) {
    flush();
    let held = Notes::hold().unwrap();
    let outcome = daemon.kernel.apply(&[Op::Set(pod_rules(0))]).remove(0);
    assert!(outcome.unwrap_err().text.contains("a plugin holds /run/flannel/pods"));
    // It forgets what it deletes.
    held.forget_masquerade(&attachment());
    held.forget_ports(&attachment());
    drop(held);
    assert_eq!(daemon.wrong(), Some(pod_rules(0)));
}
