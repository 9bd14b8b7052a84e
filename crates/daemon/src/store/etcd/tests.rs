//! The client against the embedded store in memory, over a transport that can be cut, in virtual time.

use std::time::Duration;

use flannel::{Config, Lease, LeaseKey, Peer, PerFamily, StoreEvent, wire};
use http_body_util::{BodyExt, StreamBody};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::body::Body;
use tower::ServiceExt;

use super::Etcd;
use crate::embedded::memory::Memory;
use crate::etcd::PutRequest;
use crate::etcd::kv_client::KvClient;
use crate::notice::{Notice, Notices};
use crate::ready::Ready;
use crate::store::{Claim, Following, Link, Store, StoreError, Transport, limits};

const PREFIX: &str = "/coreos.com/network";
const CONFIG: &str = r#"{"Network":"10.244.0.0/16","SubnetMax":"10.244.1.0","Backend":{"Type":"host-gw"}}"#;

/// A transport that refuses requests, and breaks open streams, while the store is down.
fn transport(store: &Memory, down: &watch::Sender<bool>) -> Transport {
    let (store, down) = (store.clone(), down.subscribe());
    Transport::new(tower::service_fn(move |request| {
        let (store, down) = (store.clone(), down.clone());
        async move { Ok(carry(request, store, down).await) }
    }))
}

async fn carry(request: http::Request<Body>, store: Memory, mut down: watch::Receiver<bool>) -> http::Response<Body> {
    if *down.borrow() {
        return Status::unavailable("connection refused").into_http();
    }
    let Ok(response) = store.routes().oneshot(request).await;
    let (head, mut body) = response.into_parts();
    let (put, taken) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            let frame = tokio::select! {
                biased;
                _ = down.wait_for(|down| *down) => Err(Status::unavailable("connection reset")),
                frame = body.frame() => match frame {
                    Some(Ok(frame)) => Ok(frame),
                    _ => return,
                },
            };
            let is_end = frame.is_err();
            if put.send(frame).await.is_err() || is_end {
                return;
            }
        }
    });
    http::Response::from_parts(head, Body::new(StreamBody::new(ReceiverStream::new(taken))))
}

/// A store, the switch that takes it down, and a client of it.
fn store() -> (Memory, watch::Sender<bool>, Etcd) {
    let (memory, down) = (Memory::default(), watch::channel(false).0);
    let client = client(&memory, &down);
    (memory, down, client)
}

fn client(memory: &Memory, down: &watch::Sender<bool>) -> Etcd {
    let (memory, down) = (memory.clone(), down.clone());
    Etcd::over("store", move || transport(&memory, &down), PREFIX)
}

async fn put(memory: &Memory, key: &str, value: impl Into<Vec<u8>>) {
    let up = watch::channel(false).0;
    let request = PutRequest { key: format!("{PREFIX}/{key}").into(), value: value.into(), ..PutRequest::default() };
    KvClient::new(transport(memory, &up)).put(request).await.unwrap();
}

fn lease(third: u8, fourth: u8) -> Lease {
    let key = LeaseKey::new(PerFamily { v4: format!("10.244.{third}.{fourth}/32").replace("/32", "/31").parse().ok(), v6: None }).unwrap();
    let public = PerFamily { v4: format!("192.168.{third}.{fourth}").parse().ok(), v6: None };
    Lease { key, peer: Peer { public, backend_type: "host-gw".into(), ..Peer::default() } }
}

#[track_caller]
fn waits_for<T: std::fmt::Debug>(answer: Result<T, StoreError>, reason: &str, text: &str) {
    match answer {
        Err(StoreError::Passing(notice)) => {
            assert_eq!(notice.reason, reason, "{notice:?}");
            assert!(notice.text.contains(text), "{notice:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn network_config_that_is_missing_or_unreadable_is_waited_for() {
    let (memory, _down, client) = store();
    waits_for(Store::config(&client).await, "NoNetworkConfig", "put one at /coreos.com/network/config");
    put(&memory, "config", "{").await;
    waits_for(Store::config(&client).await, "BadNetworkConfig", "/coreos.com/network/config in etcd cannot be used");
    put(&memory, "config", b"\xff".to_vec()).await;
    waits_for(Store::config(&client).await, "BadNetworkConfig", "not UTF-8");
    put(&memory, "config", format!(r#"{{"Network":"{}"}}"#, "x".repeat(10_000))).await;
    let long = Store::config(&client).await.unwrap_err();
    assert!(matches!(&long, StoreError::Passing(notice) if notice.text.len() < 512), "{long:?}");
    put(&memory, "config", "x".repeat(100_000)).await;
    waits_for(Store::config(&client).await, "BadNetworkConfig", "at most 65536 are read");
    put(&memory, "config", CONFIG).await;
    assert_eq!(Store::config(&client).await.unwrap(), Config::parse(CONFIG).unwrap());
}

#[tokio::test(start_paused = true)]
async fn full_network_is_waited_for_until_a_subnet_is_free() {
    let (_memory, _down, client) = store();
    let config = Config::parse(CONFIG).unwrap();
    let claim = Claim {
        config,
        peer: lease(9, 2).peer,
        addrs: PerFamily::default(),
        previous: PerFamily::default(),
        previous_leases: Vec::new(),
        margin: Duration::from_secs(60),
    };
    let taken = Lease { key: LeaseKey::new(PerFamily { v4: "10.244.1.0/24".parse().ok(), v6: None }).unwrap(), peer: lease(9, 4).peer };
    assert!(client.put_lease(&taken, 0, 0).await.unwrap());
    waits_for(client.acquire(&claim).await, "NoSubnet", "enlarge Network or raise SubnetLen");
    let entry = client.snapshot().await.unwrap().entries.remove(0);
    assert!(client.delete_lease(&taken.key, entry.mod_revision).await.unwrap());
    let handle = client.acquire(&claim).await.unwrap();
    assert!(handle.is_new && handle.key == taken.key);
    assert!(!client.acquire(&claim).await.unwrap().is_new, "the second time it is reused");
}

/// A store that was restored from a backup has the lease under an address that the host no longer has, with an etcd lease that no file
/// names: the MAC address of the device shows whose it is.
#[tokio::test(start_paused = true)]
async fn lease_with_the_nodes_own_mac_is_its_own_whatever_the_address() {
    let (memory, _down, client) = store();
    let peer = |address: &str, mac: &str| {
        let value = format!(
            r#"{{"PublicIP":"{address}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0e:00:00:00:00:{mac}"}}}}"#
        );
        wire::parse_value(value.as_bytes()).unwrap()
    };
    let claim = Claim {
        config: Config::parse(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).unwrap(),
        peer: peer("192.0.2.1", "01"),
        addrs: PerFamily::default(),
        previous: PerFamily { v4: "10.244.7.0/24".parse().ok(), v6: None },
        previous_leases: Vec::new(),
        margin: Duration::from_secs(60),
    };
    let key = wire::parse_key("10.244.7.0-24").unwrap();
    let restore = async |mac| {
        let before = client.snapshot().await.unwrap().entries.iter().find(|entry| entry.key == key).map_or(0, |entry| entry.mod_revision);
        let id = client.grant(Duration::from_secs(3600)).await.unwrap();
        assert!(client.put_lease(&Lease { key, peer: peer("192.0.2.99", mac) }, id, before).await.unwrap());
    };
    restore("01").await;
    let handle = client.acquire(&claim).await.unwrap();
    assert_eq!((handle.key, handle.is_new), (key, false));

    // The same while the daemon runs.
    let (hold, mut held) = watch::channel(handle);
    let (lose, lost) = mpsc::channel(1);
    let (_claims, claims) = watch::channel(claim.clone());
    tokio::spawn(client.clone().keep(claims, hold, lost));
    restore("01").await;
    lose.send(()).await.unwrap();
    held.changed().await.unwrap();
    assert_eq!(held.borrow_and_update().key, key);
    let stored = async || client.snapshot().await.unwrap().entries.into_iter().find(|entry| entry.key == key).and_then(|entry| entry.peer);
    assert_eq!(stored().await, Some(claim.peer));
    // Another host's MAC: another host has it.
    restore("02").await;
    lose.send(()).await.unwrap();
    held.changed().await.unwrap();
    assert_ne!(held.borrow_and_update().key, key);
    drop(memory);
}

#[tokio::test(start_paused = true)]
async fn store_that_is_down_is_waited_for_with_one_text() {
    let (_memory, down, client) = store();
    down.send_replace(true);
    for _ in 0..3 {
        waits_for(Store::config(&client).await, "StoreUnreachable", "no etcd endpoint answers (store): connection refused");
    }
}

/// Follows a store, and returns its events and the notices.
fn follow(client: Etcd) -> (mpsc::Receiver<Vec<StoreEvent>>, mpsc::Receiver<Notice>) {
    let (send, events) = mpsc::channel(64);
    let (notices, noticed) = Notices::new();
    let link = Link::new(watch::channel(Following::default()).0, Ready::default(), notices);
    tokio::spawn(client.follow(Config::parse(CONFIG).unwrap(), send, link));
    (events, noticed)
}

#[tokio::test(start_paused = true)]
async fn network_config_that_becomes_unreadable_while_running_is_only_reported() {
    let (memory, down, client) = store();
    put(&memory, "config", CONFIG).await;
    Store::config(&client).await.unwrap();
    let (mut events, mut notices) = follow(client);
    assert_eq!(events.recv().await.unwrap(), [StoreEvent::Init, StoreEvent::InitDone]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    put(&memory, "config", "{").await;
    let notice = notices.recv().await.unwrap();
    assert!(notice.text.contains("config in etcd cannot be used") && notice.text.contains("keeps"), "{notice:?}");
    put(&memory, "config", CONFIG.replace("host-gw", "vxlan")).await;
    assert!(notices.recv().await.unwrap().text.contains("restart flanneld"));
    // A change during an outage is noticed too.
    down.send_replace(true);
    put(&memory, "config", "[]").await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    down.send_replace(false);
    assert!(notices.recv().await.unwrap().text.contains("cannot be used"));
    assert_eq!(events.recv().await.unwrap(), [StoreEvent::Init, StoreEvent::InitDone]);
    put(&memory, "config", CONFIG).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(notices.try_recv().is_err() && events.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn new_lease_is_followed_within_a_second_after_an_outage() {
    fastrand::seed(1);
    let (memory, down, first) = store();
    for third in 0..=3 {
        for fourth in 0..=249 {
            let lease = lease(third, fourth / 2 * 2);
            put(&memory, &format!("subnets/{}", wire::key(&lease.key)), wire::value(&lease.peer)).await;
        }
    }
    drop(first);
    for outage in [1, 5, 30, 300] {
        let mut followers: Vec<_> = (0..20).map(|_| follow(client(&memory, &down)).0).collect();
        for events in &mut followers {
            events.recv().await.unwrap();
        }
        tokio::time::sleep(Duration::from_secs(20)).await;
        down.send_replace(true);
        tokio::time::sleep(Duration::from_secs(outage)).await;
        let lease = lease(200, u8::try_from(outage % 100).unwrap() * 2);
        put(&memory, &format!("subnets/{}", wire::key(&lease.key)), wire::value(&lease.peer)).await;
        down.send_replace(false);
        let back = Instant::now();
        for events in &mut followers {
            let list = events.recv().await.unwrap();
            assert!(list.iter().any(|event| matches!(event, StoreEvent::Apply(applied, _) if *applied == lease)), "{list:?}");
            assert!(back.elapsed() < Duration::from_secs(1), "{:?} after {outage} s", back.elapsed());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn value_beyond_the_limits_keeps_its_lease_and_is_not_kept_itself() {
    let (memory, _down, client) = store();
    let key = wire::key(&lease(1, 0).key);
    for value in [
        format!(r#"{{"PublicIP":"192.0.2.1","BackendType":"{}"}}"#, "x".repeat(200_000)),
        r#"{"PublicIP":"192.0.2.1","BackendType":"vxlan\nERROR forged"}"#.to_owned(),
        format!(r#"{{"PublicIP":"{}"}}"#, "x".repeat(10_000)),
        format!(r#"{{"PublicIP":"192.0.2.1","BackendType":"extension","BackendData":"{}"}}"#, "x".repeat(20_000)),
    ] {
        put(&memory, &format!("subnets/{key}"), value).await;
        let snapshot = client.snapshot().await.unwrap();
        assert!(snapshot.entries[0].peer.is_none());
        let shown = &snapshot.unreadable[0];
        assert!(shown.reason.len() < 512 && !shown.reason.contains('\n'), "{shown:?}");
    }
    put(&memory, &format!("subnets/{}", "k".repeat(10_000)), "{}").await;
    assert!(client.snapshot().await.unwrap().unreadable.iter().all(|entry| entry.key.len() < 512));
}

#[tokio::test(start_paused = true)]
async fn endless_lease_is_believed_for_a_year() {
    let (_memory, _down, client) = store();
    let id = client.grant(Duration::from_secs(9_000_000_000)).await.unwrap();
    assert_eq!(client.keep_alive(id).await.unwrap(), Some(Duration::from_secs(limits::LEASE_TTL)));
}

#[test]
fn network_config_beyond_the_limit_is_refused() {
    let config = |spaces: usize| format!("{{{}\"Network\": \"10.244.0.0/16\"}}", " ".repeat(spaces));
    assert!(super::follow::parse_config("k", config(limits::CONFIG - 100).as_bytes()).is_ok());
    let error = super::follow::parse_config("k", config(limits::CONFIG).as_bytes()).unwrap_err();
    assert!(error.contains("at most 65536 are read"), "{error}");
}
