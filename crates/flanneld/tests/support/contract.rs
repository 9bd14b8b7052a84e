//! The contract of every store: one sequence of changes, and the events that must follow.

use std::collections::BTreeMap;

use daemon::notice::Notices;
use daemon::ready::Ready;
use daemon::store::{Following, Link, Store};
use flannel::{Age, Config, Lease, LeaseKey, Peer, PerFamily, StoreEvent};
use tokio::sync::{mpsc, watch};

/// How a test changes what a store holds.
pub(crate) trait Hand {
    /// Makes this lease be there, so.
    async fn put(&mut self, lease: &Lease);
    /// Makes the value of a lease unreadable.
    async fn spoil(&mut self, key: &LeaseKey);
    /// Makes a lease be gone.
    async fn delete(&mut self, key: &LeaseKey);
    /// The same as `put` for several, as nearly at once as the store can.
    async fn put_all(&mut self, leases: &[Lease]);
}

pub(crate) fn lease(i: u8, public: &str) -> Lease {
    let key = LeaseKey::new(PerFamily { v4: format!("10.244.{i}.0/24").parse().ok(), v6: None }).unwrap();
    Lease { key, peer: Peer { public: PerFamily { v4: public.parse().ok(), v6: None }, backend_type: "host-gw".into(), ..Peer::default() } }
}

pub(crate) async fn following_reports_lists_and_changes(store: impl Store, hand: &mut impl Hand) {
    let [one, two, three] = [lease(101, "192.0.2.1"), lease(102, "192.0.2.2"), lease(103, "192.0.2.3")];
    let unreadable = lease(109, "192.0.2.9").key;
    hand.put(&one).await;
    hand.spoil(&unreadable).await;

    let (tell, mut events) = mpsc::channel(16);
    let (publish, mut reports) = watch::channel(Following::default());
    let config = Config::parse(r#"{"Network":"10.244.0.0/16"}"#).unwrap();
    let link = Link::new(publish, Ready::default(), Notices::new().0);
    let following = tokio::spawn(store.follow(config, tell, link));
    let mut ages = Ages::default();
    let mut next = async || ages.strip(events.recv().await.unwrap());
    let (apply, keep) = (|lease: &Lease| StoreEvent::Apply(lease.clone(), Age::UNKNOWN), |key| StoreEvent::Keep(key, Age::UNKNOWN));
    assert_eq!(next().await, [StoreEvent::Init, apply(&one), keep(unreadable), StoreEvent::InitDone]);
    reports.wait_for(|following| following.connected).await.unwrap();
    hand.put(&two).await;
    assert_eq!(next().await, [apply(&two)]);
    let moved = Lease { key: two.key, peer: lease(2, "192.0.2.22").peer };
    hand.put(&moved).await;
    assert_eq!(next().await, [apply(&moved)]);
    hand.spoil(&two.key).await;
    assert_eq!(next().await, [keep(two.key)], "what cannot be read keeps what was known");
    hand.put(&two).await;
    assert_eq!(next().await, [apply(&two)]);
    hand.delete(&one.key).await;
    assert_eq!(next().await, [StoreEvent::Delete(one.key)]);
    // Many at once: all of them count.
    hand.put_all(&[one.clone(), three.clone()]).await;
    let mut got = Vec::new();
    while got.len() < 2 {
        got.extend(next().await);
    }
    assert_eq!(got, [apply(&one), apply(&three)]);
    let age = |lease: &Lease| ages.0[&lease.key];
    assert!(age(&two) <= age(&one) && age(&one) <= age(&three), "a lease that is created again is a newcomer: {ages:?}");
    following.abort();
}

/// The age of each lease, which a rewrite must not change.
#[derive(Debug, Default)]
struct Ages(BTreeMap<LeaseKey, Age>);

impl Ages {
    /// Notes the ages in events and takes them out.
    fn strip(&mut self, events: Vec<StoreEvent>) -> Vec<StoreEvent> {
        events.into_iter().map(|event| self.strip_one(event)).collect()
    }

    fn strip_one(&mut self, event: StoreEvent) -> StoreEvent {
        match event {
            StoreEvent::Apply(lease, age) => {
                self.note(lease.key, age);
                StoreEvent::Apply(lease, Age::UNKNOWN)
            }
            StoreEvent::Keep(key, age) => {
                self.note(key, age);
                StoreEvent::Keep(key, Age::UNKNOWN)
            }
            StoreEvent::Delete(key) => {
                self.0.remove(&key);
                StoreEvent::Delete(key)
            }
            other => other,
        }
    }

    fn note(&mut self, key: LeaseKey, age: Age) {
        assert!(age < Age::UNKNOWN, "{key}");
        assert_eq!(*self.0.entry(key).or_insert(age), age, "the age of {key} changed");
    }
}
