//! Clients that request too much of the embedded store, over real connections: in a process of their own, because memory is measured.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use daemon::embedded::{StoreArgs, TlsArgs, bind};
use daemon::etcd::kv_client::KvClient;
use daemon::etcd::watch_client::WatchClient;
use daemon::etcd::watch_request::RequestUnion;
use daemon::etcd::{PutRequest, RangeRequest, WatchCreateRequest, WatchRequest, WatchResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn folder(name: &str) -> Folder {
    Folder(std::env::temp_dir().join(format!("flannel-limits-{}-{name}", std::process::id())))
}

fn args(folder: &Folder, net_config: Option<&str>) -> StoreArgs {
    StoreArgs {
        listen: "127.0.0.1:0".parse().unwrap(),
        data_dir: folder.0.clone(),
        net_config: net_config.map(ToOwned::to_owned),
        etcd_prefix: "/coreos.com/network".to_owned(),
        tls: TlsArgs::default(),
    }
}

/// A store in a thread of its own, as it is in a process of its own: its clients do not share its runtime.
fn serve(folder: &Folder) -> SocketAddr {
    let args = args(folder, None);
    let (send, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let bound = bind(&args).await.unwrap();
            send.send(bound.address()).unwrap();
            bound.serve(std::future::pending()).await.unwrap();
        });
    });
    address.recv().unwrap()
}

fn run(f: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f);
}

async fn connect(address: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

fn put(key: &str, size: usize) -> PutRequest {
    PutRequest { key: key.into(), value: vec![b'x'; size], ..PutRequest::default() }
}

/// Memory of this process, in bytes.
fn memory() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

type Watches = (mpsc::Sender<WatchRequest>, Streaming<WatchResponse>);

async fn open(channel: Channel) -> Watches {
    let (requests, stream) = mpsc::channel(256);
    let answers = WatchClient::new(channel).max_decoding_message_size(64 << 20).watch(ReceiverStream::new(stream)).await.unwrap();
    (requests, answers.into_inner())
}

fn create(watch_id: i64) -> WatchRequest {
    let create = WatchCreateRequest { key: b"k".to_vec(), watch_id, ..WatchCreateRequest::default() };
    WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
}

#[test]
fn hostile_clients_reach_limits_and_memory_is_given_back() {
    let folder = folder("hostile");
    let address = serve(&folder);
    large_requests_are_refused(address);
    watch_identifiers_do_not_overflow(address);
    watches_of_a_stream_are_bounded(address);
    control_requests_headers_and_streams_are_bounded(address);
    connections_of_an_address_are_bounded(address);
    watches_that_are_not_read_cost_no_memory(address);
}

fn large_requests_are_refused(address: SocketAddr) {
    run(async {
        let mut kv = KvClient::new(connect(address).await);
        kv.put(put("k", 1 << 20)).await.unwrap();
        let refused = kv.put(put("k", 1_600_000)).await.unwrap_err();
        assert_eq!(refused.message(), "etcdserver: request is too large");
        assert!(kv.put(put("k", 3 << 20)).await.is_err(), "it is not even decoded");
        kv.put(put("k", 1)).await.unwrap();
    });
}

fn watch_identifiers_do_not_overflow(address: SocketAddr) {
    run(async {
        let (requests, mut answers) = open(connect(address).await).await;
        let mut ids = Vec::new();
        for wanted in [i64::MAX, 0, 0, 7, 7, i64::MAX] {
            requests.send(create(wanted)).await.unwrap();
            let answer = answers.message().await.unwrap().unwrap();
            assert!(answer.created);
            assert_eq!(answer.canceled, answer.cancel_reason == "mvcc: watch ID already exists");
            ids.push(answer.watch_id);
        }
        assert_eq!(ids, [i64::MAX, 0, 1, 7, -1, -1]);
    });
}

fn watches_of_a_stream_are_bounded(address: SocketAddr) {
    run(async {
        let (requests, mut answers) = open(connect(address).await).await;
        let mut refused = 0;
        for _ in 0..200 {
            requests.send(create(0)).await.unwrap();
            let answer = answers.message().await.unwrap().unwrap();
            refused += u32::from(answer.cancel_reason == "too many watches");
        }
        assert_eq!(refused, 200 - 128);
    });
}

fn control_requests_headers_and_streams_are_bounded(address: SocketAddr) {
    run(async {
        // A request that opens a watch names a key, no more.
        let (requests, mut answers) = open(connect(address).await).await;
        let create = WatchCreateRequest { key: vec![b'k'; 100_000], ..WatchCreateRequest::default() };
        requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await.unwrap();
        assert!(!matches!(answers.message().await, Ok(Some(_))), "its stream ends");
        let mut request = tonic::Request::new(RangeRequest { key: b"k".to_vec(), ..RangeRequest::default() });
        request.metadata_mut().insert("x", "y".repeat(20_000).parse().unwrap());
        assert!(KvClient::new(connect(address).await).range(request).await.is_err(), "the headers are too large");
        // A stream beyond the limit waits in its client until another one ends.
        let channel = connect(address).await;
        let mut streams = Vec::new();
        for _ in 0..64 {
            streams.push(open(channel.clone()).await);
        }
        assert!(tokio::time::timeout(Duration::from_millis(300), open(channel.clone())).await.is_err());
        streams.clear();
        tokio::time::timeout(Duration::from_secs(10), open(channel)).await.expect("there is a place again");
    });
}

fn connections_of_an_address_are_bounded(address: SocketAddr) {
    let began = Instant::now();
    let mut silent: Vec<std::net::TcpStream> = (0..300).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
    // Half a preface is no sign of life.
    silent.iter_mut().for_each(|stream| drop(stream.write_all(b"PRI * HTTP")));
    let mut closed = |within: Duration| {
        let end = Instant::now() + within;
        let mut count = 0;
        for stream in &mut silent {
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            stream.set_read_timeout(Some(left)).unwrap();
            count += usize::from(match stream.read(&mut [0; 64]) {
                Ok(0) => true,
                Ok(_) => false,
                Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
            });
        }
        count
    };
    let at_once = closed(Duration::from_secs(2));
    assert!((300 - 256..300 - 200).contains(&at_once), "{at_once} of 300 were closed");
    assert_eq!(closed(Duration::from_secs(15)), 300, "the others spoke no HTTP/2");
    assert!(began.elapsed() > Duration::from_secs(8));
    run(async {
        KvClient::new(connect(address).await).put(put("k", 1)).await.unwrap();
    });
}

fn watches_that_are_not_read_cost_no_memory(address: SocketAddr) {
    run(async {
        let before = memory();
        let mut kv = KvClient::new(connect(address).await).max_decoding_message_size(64 << 20);
        let mut unread = Vec::new();
        for _ in 0..100 {
            let (requests, answers) = open(connect(address).await).await;
            requests.send(create(0)).await.unwrap();
            unread.push((requests, answers));
        }
        let mut slowest = Duration::ZERO;
        for _ in 0..100 {
            let began = Instant::now();
            kv.put(put("k", 1 << 20)).await.unwrap();
            kv.range(RangeRequest { key: b"k".to_vec(), ..RangeRequest::default() }).await.unwrap();
            slowest = slowest.max(began.elapsed());
        }
        let during = memory().saturating_sub(before) >> 20;
        assert!(during < 400, "{during} MiB for 100 MiB of events and 100 watches");
        assert!(slowest < Duration::from_secs(5), "{slowest:?}");
        drop(unread);
        drop(kv);
        let mut kv = KvClient::new(connect(address).await);
        kv.put(put("k", 1)).await.unwrap();
        // The history is bounded, and what was freed goes back when the store is idle.
        tokio::time::sleep(Duration::from_secs(6)).await;
        let after = memory().saturating_sub(before) >> 20;
        assert!(after < 100, "{after} MiB are not given back");
    });
}
