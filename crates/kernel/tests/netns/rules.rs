//! The rules of the node: rulesets of nftables and chains of iptables.

use flannel::desired::Owner;
use flannel::diff::{Prune, diff};
use flannel::object::{Key, Object};
use flannel::traffic::Flavour;
use flannel::traffic::iptables::Variant;
use flannel::{Desired, Family, Observed, Op};
use kernel::Kernel;

use crate::{apply, rules, rules_in, scope};

/// Runs an iptables program in the test's namespace.
#[track_caller]
fn run(program: &str, args: &str) -> String {
    let output = std::process::Command::new(program).args(args.split(' ')).output().expect("iptables is installed by `cargo xtask test`");
    assert!(output.status.success(), "{program} {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn changed_ruleset_is_detected_and_repaired() {
    let mut kernel = Kernel::open().unwrap();
    let mut desired = Desired::default();
    desired.set_part(Owner::Node, rules());
    apply(&mut kernel, &diff(&desired, &Observed::default(), Prune::Yes));
    let less = |mut ruleset: flannel::traffic::Ruleset| {
        ruleset.chains[1].rules.remove(2);
        Op::Set(Object::Ruleset(ruleset))
    };
    let Object::Ruleset(v4) = rules().remove(0) else { unreachable!() };
    apply(&mut kernel, &[less(v4)]);
    let observed = kernel.observe(&scope()).unwrap();
    let ops = diff(&desired, &observed, Prune::Yes);
    assert_eq!(ops.iter().map(|op| op.object().key()).collect::<Vec<_>>(), [Key::Ruleset(Family::V4)]);
    apply(&mut kernel, &ops);
    assert_eq!(diff(&desired, &kernel.observe(&scope()).unwrap(), Prune::Yes), []);
}

pub(crate) fn table_that_iptables_cannot_read() {
    let nft = |script: &str| {
        let status = std::process::Command::new("nft").arg(script).status().expect("nft is installed by `cargo xtask test`");
        assert!(status.success(), "{script}");
    };
    // iptables cannot express a route lookup; its programs print an error, but exit with 0.
    nft("add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; }");
    nft("add rule ip filter FORWARD fib daddr type local accept");
    let mut desired = Desired::default();
    desired.set_part(Owner::Node, rules_in(Flavour::Iptables(Variant::Nft)));
    let mut kernel = Kernel::open().unwrap();
    let mut errors = Vec::new();
    for _ in 0..5 {
        let observed = kernel.observe(&scope()).unwrap();
        errors.extend(kernel.take_read_error());
        kernel.apply(&diff(&desired, &observed, Prune::Yes));
    }
    assert!(errors.iter().any(|text| text.contains("cannot read")), "{errors:?}");
    let output = std::process::Command::new("nft").args(["list", "chain", "ip", "filter", "FORWARD"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.matches("jump FLANNEL-FWD").count() <= 1, "{text}");
    assert!(text.contains("fib daddr"), "{text}");
}

pub(crate) fn iptables_rules_are_written_and_repaired() {
    for (variant, program) in [(Variant::Nft, "iptables-nft"), (Variant::Legacy, "iptables-legacy")] {
        let mut kernel = Kernel::open().unwrap();
        let mut desired = Desired::default();
        desired.set_part(Owner::Node, rules_in(Flavour::Iptables(variant)));
        let ops = |kernel: &mut Kernel, desired: &Desired| diff(desired, &kernel.observe(&scope()).unwrap(), Prune::Yes);
        run(program, "-P FORWARD DROP");
        run(program, "-A FORWARD -s 198.51.100.0/24 -j ACCEPT");
        let first = ops(&mut kernel, &desired);
        assert_eq!(first.len(), 2, "{variant}: one for each family");
        apply(&mut kernel, &first);
        assert_eq!(ops(&mut kernel, &desired), [], "{variant}");
        // As upstream lists it (specification, section 6.1).
        let jump = "-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG";
        assert!(run(program, "-t nat -S").contains(jump));
        assert_eq!(run(program, "-t nat -S FLANNEL-POSTRTG").lines().count(), 7);
        // Rules of others elsewhere in the tables are ignored.
        run(program, "-A FORWARD -s 203.0.113.0/24 -j ACCEPT");
        run(program, "-t nat -A POSTROUTING -s 203.0.113.0/24 -j MASQUERADE");
        assert_eq!(ops(&mut kernel, &desired), [], "{variant}: a foreign rule");
        for damage in [
            "-t nat -F",
            "-F FLANNEL-FWD",
            "-D FLANNEL-FWD 1",
            "-t nat -R FLANNEL-POSTRTG 5 -s 10.244.0.0/16 -j RETURN",
            "-t nat -D POSTROUTING -m comment --comment x -j FLANNEL-POSTRTG",
            "-I FORWARD -j FLANNEL-FWD",
            "-t nat -A FLANNEL-POSTRTG -s 10.244.0.0/16 -j ACCEPT",
        ] {
            let words: Vec<&str> = damage.split(' ').map(|word| if word == "x" { "flanneld masq" } else { word }).collect();
            assert!(std::process::Command::new(program).args(words).status().unwrap().success(), "{damage}");
            let repair = ops(&mut kernel, &desired);
            assert_eq!(repair.len(), 1, "{variant}: {damage}");
            apply(&mut kernel, &repair);
            assert_eq!(ops(&mut kernel, &desired), [], "{variant}: after {damage}");
            assert!(run(program, "-t nat -S").contains(jump), "{variant}: after {damage}");
        }
        // Another flanneld on this host shares the chains; its rules are kept.
        let theirs = "-A FLANNEL-FWD -s 172.16.0.0/16 -j ACCEPT";
        run(program, theirs);
        assert_eq!(ops(&mut kernel, &desired), [], "{variant}: {theirs}");
        run(program, "-D FLANNEL-FWD 1");
        let repair = ops(&mut kernel, &desired);
        apply(&mut kernel, &repair);
        assert!(run(program, "-S FLANNEL-FWD").contains(theirs));
        run(program, "-D FLANNEL-FWD -s 172.16.0.0/16 -j ACCEPT");
        // A switch to the other flavour removes all rules of this one, and no foreign rule.
        let mut nftables = Desired::default();
        nftables.set_part(Owner::Node, rules());
        let change = ops(&mut kernel, &nftables);
        apply(&mut kernel, &change);
        let left = run(program, "-S") + &run(program, "-t nat -S");
        assert!(!left.contains("FLANNEL"), "{variant}: {left}");
        for foreign in ["-P FORWARD DROP", "-A FORWARD -s 198.51.100.0/24 -j ACCEPT", "-A FORWARD -s 203.0.113.0/24 -j ACCEPT"] {
            assert!(left.contains(foreign), "{variant}: {foreign} in {left}");
        }
        let back = ops(&mut kernel, &desired);
        apply(&mut kernel, &back);
        assert_eq!(ops(&mut kernel, &desired), [], "{variant}: after switching back");
        let none = ops(&mut kernel, &Desired::default());
        apply(&mut kernel, &none);
    }
}
