//! The contract of a store's API: the embedded one, etcd 3.4, 3.5 and 3.6 answer the same requests alike.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "support/contract.rs"]
mod contract;
#[path = "support/limit.rs"]
mod limit;
#[path = "support/stores.rs"]
mod stores;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use contract::lease;
use daemon::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use daemon::etcd::event::EventType;
use daemon::etcd::kv_client::KvClient;
use daemon::etcd::lease_client::LeaseClient;
use daemon::etcd::request_op::Request as Op;
use daemon::etcd::watch_client::WatchClient;
use daemon::etcd::watch_request::RequestUnion;
use daemon::etcd::*;
use daemon::store::etcd::Keeper;
use daemon::store::{Claim, Etcd};
use flannel::{Lease, LeaseKey, PerFamily, wire};
use lab::{Lab, Plan, STORE, isolate};
use libtest_mimic::{Arguments, Trial};
use limit::limited;
use serde_json::json;
use tokio::sync::mpsc;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

const PROGRAM: &str = env!("CARGO_BIN_EXE_flanneld");

type Test = fn(&mut Lab);

fn main() {
    let arguments = Arguments::from_args();
    let scratch = if arguments.list { PathBuf::new() } else { isolate(Path::new(PROGRAM)).expect("these tests need namespaces") };
    let tests: [(&str, Test); 10] = [
        ("ranges_count_limit_and_sort", ranges_count_limit_and_sort),
        ("transactions_compare_and_swap", transactions_compare_and_swap),
        ("old_revisions_can_be_read_until_compacted", old_revisions_can_be_read_until_compacted),
        ("watch_reports_every_change_once_and_in_order", watch_reports_every_change_once_and_in_order),
        ("watch_from_compacted_revision_is_cancelled_with_reason", watch_from_compacted_revision_is_cancelled_with_reason),
        ("expired_lease_deletes_its_keys", expired_lease_deletes_its_keys),
        ("acknowledged_writes_survive_a_kill", acknowledged_writes_survive_a_kill),
        ("following_reports_lists_and_changes", following_reports_lists_and_changes),
        ("acquire_handles_reuse_race_and_reservation", acquire_handles_reuse_race_and_reservation),
        ("etcdctl_reads_and_writes", etcdctl_reads_and_writes),
    ];
    let mut trials = Vec::new();
    for (store_name, store) in stores::all() {
        for (name, test) in tests {
            let (store, root) = (store.clone(), scratch.join(format!("{store_name}-{name}").replace(' ', "-")));
            let title = format!("{store_name}: {name}");
            trials.push(Trial::test(title.clone(), move || {
                let plan = Plan { store, ..Plan::new(1, &json!({ "Type": "vxlan" }), Path::new(PROGRAM)) };
                let mut lab = Lab::wire(plan, &root).unwrap();
                lab.start_store().unwrap();
                lab.put_config().unwrap();
                limited(&title, || test(&mut lab));
                drop(lab);
                let _ = std::fs::remove_dir_all(&root);
                Ok(())
            }));
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}

/// Runs a function with a connection to the lab's store, in the store's namespace.
fn with(lab: &Lab, f: impl AsyncFnOnce(Channel)) {
    let work = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let channel = tonic::transport::Endpoint::from_shared(format!("http://{STORE}")).unwrap().connect().await.unwrap();
            tokio::time::timeout(Duration::from_secs(30), f(channel)).await.expect("the store answers");
        });
    };
    lab.middle.run(work).unwrap();
}

fn bytes(text: &str) -> Vec<u8> {
    text.as_bytes().to_vec()
}

fn put(key: &str, value: &str, lease: i64) -> PutRequest {
    PutRequest { key: bytes(key), value: bytes(value), lease, ..PutRequest::default() }
}

fn all() -> RangeRequest {
    RangeRequest { key: bytes("t/"), range_end: prefix_end(b"t/"), ..RangeRequest::default() }
}

fn text(response: &RangeResponse) -> String {
    let pair = |kv: &KeyValue| format!("{}={}", String::from_utf8_lossy(&kv.key), String::from_utf8_lossy(&kv.value));
    response.kvs.iter().map(pair).collect::<Vec<_>>().join(" ")
}

fn ranges_count_limit_and_sort(lab: &mut Lab) {
    with(lab, async |channel| {
        let mut kv = KvClient::new(channel);
        for (key, value) in [("t/b", "1"), ("t/a", "3"), ("t/c", "2"), ("u", "9")] {
            kv.put(put(key, value, 0)).await.unwrap();
        }
        let mut range = async |request: RangeRequest| kv.range(request).await.unwrap().into_inner();
        let whole = range(all()).await;
        assert_eq!((text(&whole).as_str(), whole.count, whole.more), ("t/a=3 t/b=1 t/c=2", 3, false));
        let two = range(RangeRequest { limit: 2, ..all() }).await;
        assert_eq!((text(&two).as_str(), two.count, two.more), ("t/a=3 t/b=1", 3, true));
        let count = range(RangeRequest { count_only: true, ..all() }).await;
        assert_eq!((count.kvs.len(), count.count), (0, 3));
        assert_eq!(text(&range(RangeRequest { keys_only: true, ..all() }).await), "t/a= t/b= t/c=");
        let by_value = RangeRequest {
            sort_target: range_request::SortTarget::Value.into(),
            sort_order: range_request::SortOrder::Descend.into(),
            ..all()
        };
        assert_eq!(text(&range(by_value).await), "t/a=3 t/c=2 t/b=1");
        assert_eq!(range(RangeRequest { key: bytes("t/x"), ..RangeRequest::default() }).await.count, 0);
        let from = RangeRequest { key: bytes("t/c"), range_end: vec![0], ..RangeRequest::default() };
        assert_eq!(text(&range(from).await), "t/c=2 u=9");
        // Those that were made after the first, and those that were changed before the last.
        let first = whole.kvs.iter().map(|kv| kv.create_revision).min().unwrap();
        let later = range(RangeRequest { min_create_revision: first + 1, ..all() }).await;
        assert_eq!((text(&later).as_str(), later.count), ("t/a=3 t/c=2", 3));
        assert_eq!(text(&range(RangeRequest { max_mod_revision: first, ..all() }).await), "t/b=1");
    });
}

fn transactions_compare_and_swap(lab: &mut Lab) {
    with(lab, async |channel| {
        let mut kv = KvClient::new(channel);
        let compare = |target: CompareTarget, union: TargetUnion| Compare {
            result: CompareResult::Equal.into(),
            target: target.into(),
            key: bytes("t/x"),
            target_union: Some(union),
            ..Compare::default()
        };
        let absent = compare(CompareTarget::Version, TargetUnion::Version(0));
        let op = |key: &str, value: &str| RequestOp { request: Some(Op::RequestPut(put(key, value, 0))) };
        let create = TxnRequest {
            compare: vec![absent],
            success: vec![op("t/x", "1"), op("t/y", "1")],
            failure: vec![RequestOp { request: Some(Op::RequestRange(all())) }],
        };
        let first = kv.txn(create.clone()).await.unwrap().into_inner();
        assert!(first.succeeded);
        let second = kv.txn(create).await.unwrap().into_inner();
        assert!(!second.succeeded);
        assert_eq!(second.header.unwrap().revision, first.header.unwrap().revision, "nothing was written");
        let Some(response_op::Response::ResponseRange(found)) = second.responses[0].response.clone() else { panic!("a range") };
        assert_eq!(text(&found), "t/x=1 t/y=1");
        assert_eq!(found.kvs[0].mod_revision, found.kvs[1].mod_revision, "one transaction is one revision");

        let swap = TxnRequest {
            compare: vec![compare(CompareTarget::Mod, TargetUnion::ModRevision(found.kvs[0].mod_revision))],
            success: vec![op("t/x", "2")],
            failure: vec![],
        };
        assert!(kv.txn(swap.clone()).await.unwrap().into_inner().succeeded);
        assert!(!kv.txn(swap).await.unwrap().into_inner().succeeded);
        let value =
            TxnRequest { compare: vec![compare(CompareTarget::Value, TargetUnion::Value(bytes("2")))], success: vec![], failure: vec![] };
        assert!(kv.txn(value).await.unwrap().into_inner().succeeded);
        let twice = TxnRequest { success: vec![op("t/z", "1"), op("t/z", "2")], ..TxnRequest::default() };
        assert_eq!(kv.txn(twice).await.unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(kv.put(PutRequest::default()).await.unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(kv.put(put("t/z", "1", 4711)).await.unwrap_err().code(), Code::NotFound);
        assert_eq!(text(&kv.range(all()).await.unwrap().into_inner()), "t/x=2 t/y=1");
    });
}

fn old_revisions_can_be_read_until_compacted(lab: &mut Lab) {
    with(lab, async |channel| {
        let mut kv = KvClient::new(channel);
        let first = kv.put(put("t/a", "1", 0)).await.unwrap().into_inner().header.unwrap().revision;
        let second = kv.put(PutRequest { prev_kv: true, ..put("t/a", "2", 0) }).await.unwrap().into_inner();
        assert_eq!(second.prev_kv.unwrap().value, b"1");
        let deleted = kv
            .delete_range(DeleteRangeRequest { key: bytes("t/a"), prev_kv: true, ..DeleteRangeRequest::default() })
            .await
            .unwrap()
            .into_inner();
        assert_eq!((deleted.deleted, deleted.prev_kvs[0].version), (1, 2));
        let at = |revision| RangeRequest { revision, ..all() };
        assert_eq!(text(&kv.range(at(first)).await.unwrap().into_inner()), "t/a=1");
        assert_eq!(text(&kv.range(at(first + 1)).await.unwrap().into_inner()), "t/a=2");
        assert_eq!(text(&kv.range(at(0)).await.unwrap().into_inner()), "");
        kv.compact(CompactionRequest { revision: first + 1, physical: true }).await.unwrap();
        assert_eq!(kv.range(at(first)).await.unwrap_err().code(), Code::OutOfRange);
        assert_eq!(text(&kv.range(at(first + 1)).await.unwrap().into_inner()), "t/a=2");
        assert_eq!(kv.range(at(first + 100)).await.unwrap_err().code(), Code::OutOfRange);
        assert_eq!(kv.compact(CompactionRequest { revision: first, physical: false }).await.unwrap_err().code(), Code::OutOfRange);
    });
}

/// Opens a watch; the sender keeps it open.
async fn open(channel: Channel, create: WatchCreateRequest) -> (mpsc::Sender<WatchRequest>, Streaming<WatchResponse>) {
    let (requests, stream) = mpsc::channel(4);
    requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await.unwrap();
    let answers = WatchClient::new(channel).watch(tokio_stream::wrappers::ReceiverStream::new(stream)).await.unwrap().into_inner();
    (requests, answers)
}

fn prefix(start_revision: i64) -> WatchCreateRequest {
    WatchCreateRequest { key: bytes("t/"), range_end: prefix_end(b"t/"), start_revision, prev_kv: true, ..WatchCreateRequest::default() }
}

fn watch_reports_every_change_once_and_in_order(lab: &mut Lab) {
    with(lab, async |channel| {
        let mut kv = KvClient::new(channel.clone());
        let start = kv.put(put("t/before", "", 0)).await.unwrap().into_inner().header.unwrap().revision;
        for i in 0..1500 {
            kv.put(put(&format!("t/{i:04}"), "", 0)).await.unwrap();
            kv.put(put("elsewhere", "", 0)).await.unwrap();
        }
        // It begins in the past and goes on into what happens now.
        let (requests, mut answers) = open(channel, prefix(start)).await;
        let created = answers.message().await.unwrap().unwrap();
        assert!(created.created && !created.canceled);
        kv.put(put("t/0000", "again", 0)).await.unwrap();
        kv.delete_range(DeleteRangeRequest { key: bytes("t/0001"), ..DeleteRangeRequest::default() }).await.unwrap();
        let mut events = Vec::new();
        while events.len() < 1503 {
            let answer = answers.message().await.unwrap().unwrap();
            assert!(!answer.canceled);
            events.extend(answer.events);
        }
        let keys: Vec<String> = events.iter().map(|event| String::from_utf8(event.kv.clone().unwrap().key).unwrap()).collect();
        let mut wanted = vec!["t/before".to_owned()];
        wanted.extend((0..1500).map(|i| format!("t/{i:04}")));
        wanted.extend(["t/0000".to_owned(), "t/0001".to_owned()]);
        assert_eq!(keys, wanted);
        let (again, gone) = (&events[1501], &events[1502]);
        assert_eq!((again.prev_kv.clone().unwrap().value, again.kv.clone().unwrap().version), (Vec::new(), 2));
        assert_eq!((gone.r#type(), gone.prev_kv.clone().unwrap().key), (EventType::Delete, bytes("t/0001")));

        requests
            .send(WatchRequest { request_union: Some(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: created.watch_id })) })
            .await
            .unwrap();
        assert!(answers.message().await.unwrap().unwrap().canceled);
    });
}

fn watch_from_compacted_revision_is_cancelled_with_reason(lab: &mut Lab) {
    with(lab, async |channel| {
        let mut kv = KvClient::new(channel.clone());
        let start = kv.put(put("t/a", "1", 0)).await.unwrap().into_inner().header.unwrap().revision;
        let last = kv.put(put("t/a", "2", 0)).await.unwrap().into_inner().header.unwrap().revision;
        kv.compact(CompactionRequest { revision: last, physical: true }).await.unwrap();
        let (_requests, mut answers) = open(channel, prefix(start)).await;
        let cancelled = loop {
            let answer = answers.message().await.unwrap().unwrap();
            if answer.canceled {
                break answer;
            }
            assert!(answer.events.is_empty());
        };
        assert_eq!(cancelled.compact_revision, last);
    });
}

fn expired_lease_deletes_its_keys(lab: &mut Lab) {
    with(lab, async |channel| {
        let (mut kv, mut leases) = (KvClient::new(channel.clone()), LeaseClient::new(channel.clone()));
        let granted = leases.lease_grant(LeaseGrantRequest { ttl: 60, id: 0 }).await.unwrap().into_inner();
        assert!(granted.id != 0 && granted.ttl == 60);
        kv.put(put("t/a", "1", granted.id)).await.unwrap();
        kv.put(put("t/b", "1", granted.id)).await.unwrap();
        let look = LeaseTimeToLiveRequest { id: granted.id, keys: true };
        let mut ttl = leases.lease_time_to_live(look).await.unwrap().into_inner();
        // In no particular order.
        ttl.keys.sort();
        assert_eq!((ttl.granted_ttl, ttl.keys), (60, vec![bytes("t/a"), bytes("t/b")]));
        leases.lease_revoke(LeaseRevokeRequest { id: granted.id }).await.unwrap();
        assert_eq!(kv.range(all()).await.unwrap().into_inner().count, 0);
        assert_eq!(leases.lease_time_to_live(look).await.unwrap().into_inner().ttl, -1);
        assert_eq!(leases.lease_revoke(LeaseRevokeRequest { id: granted.id }).await.unwrap_err().code(), Code::NotFound);

        // One that is not kept alive ends by itself, and a watcher sees its key go.
        let short = leases.lease_grant(LeaseGrantRequest { ttl: 2, id: 4711 }).await.unwrap().into_inner();
        assert_eq!(short.id, 4711);
        let (_requests, mut answers) = open(channel, prefix(0)).await;
        assert!(answers.message().await.unwrap().unwrap().created);
        kv.put(put("t/short", "1", short.id)).await.unwrap();
        let mut events = Vec::new();
        while events.len() < 2 {
            events.extend(answers.message().await.unwrap().unwrap().events);
        }
        assert_eq!(events[1].r#type(), EventType::Delete);
        assert_eq!(events[1].prev_kv.clone().unwrap().lease, 4711);
    });
    // The client's renewal of a lease that is there, and of one that is not.
    lab.with_store(async |store: &Etcd| {
        let id = store.grant(Duration::from_secs(100)).await?;
        assert_eq!(store.keep_alive(id).await?, Some(Duration::from_secs(100)));
        store.revoke(id).await;
        assert_eq!(store.keep_alive(id).await?, None);
        Ok::<(), daemon::store::EtcdError>(())
    })
    .unwrap();
}

fn acknowledged_writes_survive_a_kill(lab: &mut Lab) {
    let mut wanted = String::new();
    for round in 0..5 {
        with(lab, async |channel| {
            let (mut kv, mut leases) = (KvClient::new(channel.clone()), LeaseClient::new(channel));
            let lease = leases.lease_grant(LeaseGrantRequest { ttl: 3600, id: 100 + round }).await.unwrap().into_inner().id;
            for i in 0..20 {
                kv.put(put(&format!("t/{round}-{i:02}"), "v", lease)).await.unwrap();
            }
        });
        wanted.push_str(&(0..20).map(|i| format!("t/{round}-{i:02}=v ")).collect::<String>());
        lab.kill_store().unwrap();
        lab.start_store().unwrap();
        // A store that just began to listen may not serve yet.
        lab.with_store(async |store| store.config().await).unwrap();
        with(lab, async |channel| {
            let found = KvClient::new(channel.clone()).range(all()).await.unwrap().into_inner();
            assert_eq!(text(&found), wanted.trim_end());
            let ttl = LeaseClient::new(channel)
                .lease_time_to_live(LeaseTimeToLiveRequest { id: 100 + round, keys: true })
                .await
                .unwrap()
                .into_inner();
            assert_eq!((ttl.granted_ttl, ttl.keys.len()), (3600, 20));
        });
    }
}

fn claim(config: &flannel::Config, public: &str) -> Claim {
    Claim {
        config: config.clone(),
        peer: lease(0, public).peer,
        addrs: PerFamily::default(),
        previous: PerFamily::default(),
        previous_leases: Vec::new(),
        margin: Duration::from_secs(60),
    }
}

/// Changes leases in etcd.
struct Hand {
    kv: KvClient<Channel>,
}

impl Hand {
    async fn text(&mut self, key: &LeaseKey, value: &str) {
        self.kv.put(put(&format!("/coreos.com/network/subnets/{}", wire::key(key)), value, 0)).await.unwrap();
    }
}

impl contract::Hand for Hand {
    async fn put(&mut self, lease: &Lease) {
        self.text(&lease.key, &wire::value(&lease.peer)).await;
    }

    async fn spoil(&mut self, key: &LeaseKey) {
        self.text(key, "{").await;
    }

    async fn delete(&mut self, key: &LeaseKey) {
        let key = bytes(&format!("/coreos.com/network/subnets/{}", wire::key(key)));
        self.kv.delete_range(DeleteRangeRequest { key, ..DeleteRangeRequest::default() }).await.unwrap();
    }

    async fn put_all(&mut self, leases: &[Lease]) {
        let op = |lease: &Lease| {
            let key = format!("/coreos.com/network/subnets/{}", wire::key(&lease.key));
            RequestOp { request: Some(Op::RequestPut(put(&key, &wire::value(&lease.peer), 0))) }
        };
        self.kv.txn(TxnRequest { success: leases.iter().map(op).collect(), ..TxnRequest::default() }).await.unwrap();
    }
}

fn following_reports_lists_and_changes(lab: &mut Lab) {
    with(lab, async |channel| {
        let store = Etcd::plain(&format!("http://{STORE}"), "/coreos.com/network/").unwrap();
        assert!(!store.put_lease(&lease(2, "192.0.2.2"), 0, 77).await.unwrap(), "the key does not have that revision");
        let mut hand = Hand { kv: KvClient::new(channel) };
        hand.kv.put(put("/coreos.com/network/subnets-not/10.244.8.0-24", "{}", 0)).await.unwrap();
        contract::following_reports_lists_and_changes(store, &mut hand).await;
    });
}

fn acquire_handles_reuse_race_and_reservation(lab: &mut Lab) {
    with(lab, async |channel| {
        let store = Etcd::plain(&format!("http://{STORE}"), "/coreos.com/network").unwrap();
        let config =
            flannel::Config::parse(r#"{"Network":"10.244.0.0/16","SubnetMax":"10.244.30.0","Backend":{"Type":"host-gw"}}"#).unwrap();
        let keeper = |public: &str| Keeper { store: store.clone(), claim: claim(&config, public) };
        let none = PerFamily::default();
        let wanted = PerFamily { v4: "10.244.7.0/24".parse().ok(), v6: None };
        let first = keeper("192.0.2.1").acquire(&wanted, false).await.unwrap();
        assert_eq!((first.key.to_string().as_str(), first.etcd_lease != 0), ("10.244.7.0/24", true));
        let again = keeper("192.0.2.1").acquire(&none, false).await.unwrap();
        assert_eq!(again.key, first.key, "by its address");
        let other = keeper("192.0.2.2").acquire(&wanted, false).await.unwrap();
        assert_ne!(other.key, first.key, "it is taken");
        let value = KvClient::new(channel.clone())
            .range(RangeRequest { key: bytes("/coreos.com/network/subnets/10.244.7.0-24"), ..RangeRequest::default() })
            .await
            .unwrap()
            .into_inner();
        assert_eq!(value.kvs[0].value, br#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}"#);
        assert_eq!(value.kvs[0].lease, again.etcd_lease);
        let ttl = LeaseClient::new(channel.clone())
            .lease_time_to_live(LeaseTimeToLiveRequest { id: again.etcd_lease, keys: false })
            .await
            .unwrap()
            .into_inner();
        assert_eq!(ttl.granted_ttl, 86_400);

        // A key without an etcd lease is a reservation and stays one.
        assert!(store.put_lease(&lease(20, "192.0.2.3"), 0, 0).await.unwrap());
        let reserved = keeper("192.0.2.3").acquire(&none, false).await.unwrap();
        assert_eq!((reserved.key, reserved.etcd_lease), (lease(20, "").key, 0));

        // Twenty-seven are left; as many at once get one each.
        let mut racers = tokio::task::JoinSet::new();
        for i in 0..27 {
            let keeper = keeper(&format!("192.0.2.{}", 100 + i));
            racers.spawn(async move { keeper.acquire(&PerFamily::default(), false).await.unwrap().key });
        }
        let mut keys: Vec<LeaseKey> = racers.join_all().await;
        keys.extend([first.key, other.key, reserved.key]);
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 30);
        let full = keeper("192.0.2.250").acquire(&none, false).await.unwrap_err();
        assert!(full.to_string().contains("out of subnets"), "{full}");

        // With both families, leases that share an IPv4 subnet are two keys, both of which the store creates.
        let text = r#"{"Network":"10.244.0.0/16","SubnetMax":"10.244.24.0","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"host-gw"}}"#;
        let config = flannel::Config::parse(text).unwrap();
        let store = Etcd::plain(&format!("http://{STORE}"), "/dual").unwrap();
        let mut racers = tokio::task::JoinSet::new();
        for i in 0..12 {
            let keeper = Keeper { store: store.clone(), claim: claim(&config, &format!("192.0.2.{}", 100 + i)) };
            racers.spawn(async move { keeper.acquire(&PerFamily::default(), false).await.unwrap().key });
        }
        let keys: Vec<LeaseKey> = racers.join_all().await;
        let overlaps = keys.iter().enumerate().filter(|(at, key)| keys[..*at].iter().any(|other| other.overlaps(key))).count();
        assert_eq!(overlaps, 0, "{keys:?}");
    });
}

fn etcdctl_reads_and_writes(lab: &mut Lab) {
    for variable in ["FLANNEL_ETCDCTL_3_4", "FLANNEL_ETCDCTL_3_5"] {
        let program = stores::tool(variable);
        let command = |args: &[&str]| {
            let mut command = Command::new(&program);
            command.env("ETCDCTL_API", "3").arg(format!("--endpoints=http://{STORE}")).args(args);
            command
        };
        let ctl = |args: &[&str]| {
            let output = lab.middle.run(|| command(args).output()).unwrap().unwrap();
            let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "{variable} {args:?}: {said}");
            said
        };
        assert_eq!(ctl(&["put", "t/a", "1"]), "OK\n");
        assert_eq!(ctl(&["put", "t/a", "2", "--prev-kv"]), "OK\nt/a\n1\n");
        assert_eq!(ctl(&["get", "--prefix", "t/"]), "t/a\n2\n");
        assert!(ctl(&["get", "/coreos.com/network/config"]).contains("10.244.0.0/16"));
        let granted = ctl(&["lease", "grant", "300"]);
        let id = granted.split_whitespace().nth(1).unwrap();
        ctl(&["put", "t/leased", "x", &format!("--lease={id}")]);
        assert!(ctl(&["lease", "timetolive", id, "--keys"]).contains("t/leased"));
        assert!(ctl(&["lease", "keep-alive", "--once", id]).contains("keepalived"));
        assert!(ctl(&["lease", "list"]).contains(id));
        assert!(ctl(&["lease", "revoke", id]).contains("revoked"));
        assert_eq!(ctl(&["get", "t/leased"]), "");
        assert_eq!(ctl(&["del", "--prefix", "t/"]), "1\n");
        assert!(ctl(&["endpoint", "health"]).contains("is healthy"));
        assert!(ctl(&["member", "list"]).contains("10.0.0.254:2379"));
        // A watch prints the puts of another client.
        let mut watching = command(&["watch", "t/w", "--rev=1"]);
        let mut child = lab.middle.run(|| watching.stdout(std::process::Stdio::piped()).spawn()).unwrap().unwrap();
        ctl(&["put", "t/w", "seen"]);
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap())).map_while(Result::ok);
        assert!(lines.by_ref().any(|line| line == "seen"));
        child.kill().unwrap();
        child.wait().unwrap();
        ctl(&["del", "t/w"]);
    }
}
