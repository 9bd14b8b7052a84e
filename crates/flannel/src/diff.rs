//! Compares the desired with the observed state, and orders the operations so that no packet is lost: dependencies first, adds before
//! deletes, deletes in reverse order.

use crate::desired::Desired;
use crate::net::IfName;
use crate::object::{Key, Object};
use crate::observed::Observed;
use crate::op::Op;

/// Whether objects without an owner may be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prune {
    /// Yes: the store has completed a list, so all leases are known.
    Yes,
    /// No: an object without an owner may belong to a lease that is not known yet.
    No,
}

/// The operations that make `observed` equal `desired`.
pub fn diff(desired: &Desired, observed: &Observed, prune: Prune) -> Vec<Op> {
    // Links come first of all keys.
    let links = observed.iter().take_while(|(key, _)| matches!(key, Key::Link(_)));
    let replaced: Vec<IfName> = links.filter_map(|(key, _)| replaced_link(desired, observed, key)).collect();
    let survives = |object: &Object| !replaced.iter().any(|link| object.depends_on(*link));

    let mut ops: Vec<Op> = replaced_deletes(observed, &replaced);
    let mut deletes: Vec<Op> = Vec::new();
    let mut superfluous = |have: &Object| {
        if prune == Prune::Yes && survives(have) && !have.policy().never_deleted {
            deletes.push(Op::Delete(have.clone()));
        }
    };
    // Both are in the order of keys, so one pass compares them.
    let mut there = observed.iter().peekable();
    for (key, want) in desired.iter() {
        while let Some((_, have)) = there.next_if(|(other, _)| *other < key) {
            superfluous(have);
        }
        let have = there.next_if(|(other, _)| *other == key).map(|(_, have)| have);
        if have.filter(|have| survives(have) && !is_replaced(&replaced, key)) != Some(want) {
            ops.push(Op::Set(want.clone()));
        }
    }
    there.for_each(|(_, have)| superfluous(have));
    deletes.reverse();
    ops.extend(deletes);
    ops
}

/// Like [`diff`], limited to these keys, which must be in order: the cost depends on their number. If a link must be recreated,
/// everything is compared, because deleting a link deletes the objects that depend on it.
pub fn diff_keys<'a>(desired: &Desired, observed: &Observed, keys: impl IntoIterator<Item = &'a Key> + Copy, prune: Prune) -> Vec<Op> {
    if keys.into_iter().any(|key| replaced_link(desired, observed, key).is_some()) {
        return diff(desired, observed, prune);
    }
    let mut ops = Vec::new();
    let mut deletes = Vec::new();
    for key in keys {
        match (desired.get(key), observed.get(key)) {
            (Some(want), have) if have != Some(want) => ops.push(Op::Set(want.clone())),
            (None, Some(have)) if prune == Prune::Yes && !have.policy().never_deleted => deletes.push(Op::Delete(have.clone())),
            _ => {}
        }
    }
    deletes.reverse();
    ops.extend(deletes);
    ops
}

/// The link at this key, if it exists and must be recreated to get the desired form.
fn replaced_link(desired: &Desired, observed: &Observed, key: &Key) -> Option<IfName> {
    let Key::Link(name) = key else { return None };
    match (desired.get(key), observed.get(key)) {
        (Some(Object::Link(want)), Some(Object::Link(have))) if !want.can_replace_in_place(have) => Some(*name),
        _ => None,
    }
}

fn is_replaced(replaced: &[IfName], key: &Key) -> bool {
    matches!(key, Key::Link(name) if replaced.contains(name))
}

fn replaced_deletes(observed: &Observed, replaced: &[IfName]) -> Vec<Op> {
    let links = replaced.iter().filter_map(|name| observed.get(&Key::Link(*name)));
    links.map(|link| Op::Delete(link.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Claims, Lost, Owner};
    use crate::lease::{Age, LeaseKey};
    use crate::net::{Family, PerFamily};
    use crate::object::{Addr, Link, LinkKind, Route};
    use expect_test::{Expect, expect};
    use std::collections::BTreeSet;

    fn route(dst: &str, via: &str) -> Object {
        Object::Route(Route {
            dst: dst.parse().unwrap(),
            metric: 0,
            via: Some(via.parse().unwrap()),
            dev: "eth0".parse().unwrap(),
            onlink: false,
            protocol: crate::object::ROUTE_PROTOCOL,
        })
    }

    fn link(vni: u32, mtu: u32) -> Object {
        let kind = LinkKind::Vxlan {
            vni: crate::net::Vni::new(vni).unwrap(),
            port: 8472,
            local: "192.0.2.1".parse().unwrap(),
            lower: "eth0".parse().unwrap(),
            gbp: false,
            learning: false,
        };
        Object::Link(Box::new(Link { name: "flannel.1".parse().unwrap(), kind, mac: "0e:00:00:00:00:01".parse().unwrap(), mtu, up: true }))
    }

    fn addr() -> Object {
        Object::Addr(Addr { link: "flannel.1".parse().unwrap(), cidr: "10.1.1.0/32".parse().unwrap() })
    }

    #[track_caller]
    fn check(desired: Vec<Object>, observed: Vec<Object>, prune: Prune, want: Expect) {
        let mut d = Desired::default();
        d.set_part(Owner::Node, desired);
        let o: Observed = observed.into_iter().collect();
        let ops = diff(&d, &o, prune);
        let keys: BTreeSet<Key> = d.iter().map(|(key, _)| key.clone()).chain(o.iter().map(|(key, _)| key.clone())).collect();
        assert_eq!(ops, diff_keys(&d, &o, &keys, prune), "a diff of all keys equals the whole diff");
        want.assert_eq(&ops.iter().map(|op| format!("{op}\n")).collect::<String>());
    }

    #[test]
    fn equal_states_need_no_operation() {
        check(vec![link(1, 1450), addr()], vec![addr(), link(1, 1450)], Prune::Yes, expect![""]);
    }

    #[test]
    fn adds_come_before_deletes() {
        check(
            vec![route("10.1.2.0/24", "192.0.2.2"), route("10.1.3.0/24", "192.0.2.3")],
            vec![route("10.1.1.0/24", "192.0.2.1"), route("10.1.2.0/24", "192.0.2.9"), route("10.1.0.0/24", "192.0.2.1")],
            Prune::Yes,
            expect![[r#"
                set route 10.1.2.0/24 via 192.0.2.2 dev eth0 metric 0
                set route 10.1.3.0/24 via 192.0.2.3 dev eth0 metric 0
                delete route 10.1.1.0/24 via 192.0.2.1 dev eth0 metric 0
                delete route 10.1.0.0/24 via 192.0.2.1 dev eth0 metric 0
            "#]],
        );
    }

    #[test]
    fn nothing_is_deleted_without_pruning() {
        check(vec![], vec![route("10.1.1.0/24", "192.0.2.1")], Prune::No, expect![""]);
    }

    #[test]
    fn link_with_another_vni_is_recreated_with_its_dependents() {
        check(
            vec![link(1, 1450), addr()],
            vec![link(7, 1450), addr()],
            Prune::No,
            expect![[r#"
                delete link flannel.1 0e:00:00:00:00:01 mtu 1450 up vxlan id 7 dstport 8472 local 192.0.2.1 dev eth0 nolearning
                set link flannel.1 0e:00:00:00:00:01 mtu 1450 up vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0 nolearning
                set addr 10.1.1.0/32 dev flannel.1
            "#]],
        );
    }

    #[test]
    fn changed_lower_interface_is_set_in_place() {
        let Object::Link(mut renamed) = link(1, 1450) else { panic!("expected a link") };
        let LinkKind::Vxlan { lower, .. } = &mut renamed.kind else { panic!("expected a VXLAN link") };
        *lower = "ens3".parse().unwrap();
        check(
            vec![link(1, 1450), addr()],
            vec![Object::Link(renamed), addr()],
            Prune::Yes,
            expect![[r#"
                set link flannel.1 0e:00:00:00:00:01 mtu 1450 up vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0 nolearning
            "#]],
        );
    }

    #[test]
    fn changed_mtu_is_set_in_place() {
        check(
            vec![link(1, 1400), addr()],
            vec![link(1, 1450), addr()],
            Prune::Yes,
            expect![[r#"
                set link flannel.1 0e:00:00:00:00:01 mtu 1400 up vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0 nolearning
            "#]],
        );
    }

    #[test]
    fn younger_lease_gets_key_when_older_one_releases_it() {
        let key = |text: &str| LeaseKey::new(PerFamily { v4: Some(text.parse().unwrap()), v6: None }).unwrap();
        let claims = |lease: &str, age: u64, host: &str| {
            let hosts = PerFamily { v4: host.parse().ok(), v6: None };
            let objects = vec![route("10.1.1.0/24", host), route(lease, host)];
            Claims { owner: Owner::Lease(key(lease)), age: Age::created(age), hosts, objects }
        };
        let (old, young) = (key("10.1.9.0/24"), key("10.1.2.0/24"));
        let mut d = Desired::default();
        assert_eq!(d.set_parts(vec![claims("10.1.2.0/24", 8, "192.0.2.2")]).contested, []);
        let contest = d.set_parts(vec![claims("10.1.9.0/24", 7, "192.0.2.9")]);
        assert_eq!((contest.contested, contest.keys.len()), (vec![young], 3));
        let shared = route("10.1.1.0/24", "192.0.2.2").key();
        assert_eq!(d.get(&shared), Some(&route("10.1.1.0/24", "192.0.2.9")));
        assert_eq!(d.get(&route("10.1.2.0/24", "192.0.2.2").key()), None, "the younger one is left out as a whole");
        let lost = d.refused(young).next().unwrap();
        assert_eq!(lost, (Family::V4, &Lost { holder: Owner::Lease(old), key: Some(shared.clone()) }));
        assert_eq!(d.refused(old).count(), 0);
        let released = d.set_parts(vec![Claims { objects: vec![], ..claims("10.1.9.0/24", 7, "192.0.2.9") }]);
        assert_eq!((released.contested, released.keys.len()), (vec![young], 3));
        assert_eq!(d.get(&shared), Some(&route("10.1.1.0/24", "192.0.2.2")));
        assert_eq!((d.len(), d.refused(young).count()), (2, 0));
    }
}
