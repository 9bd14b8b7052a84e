//! Hostile clients. A stranger reaches the ports and has no certificate; a taken node has one, and writes what it likes.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use daemon::etcd::kv_client::KvClient;
use daemon::etcd::request_op::Request as Op;
use daemon::etcd::watch_client::WatchClient;
use daemon::etcd::watch_request::RequestUnion;
use daemon::etcd::{PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, WatchRequest};
use lab::{STORE, Secure};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// What is attacked, and until when.
pub(super) struct Target {
    pub(super) health: SocketAddr,
    pub(super) secure: Secure,
    /// The VTEP MAC of the host that the pings go to.
    pub(super) mac: String,
    pub(super) stop: AtomicBool,
}

/// A kind of hostile client.
pub(super) struct Kind {
    pub(super) count: usize,
    pub(super) run: fn(&Target),
}

const fn clients(count: usize, run: fn(&Target)) -> Kind {
    Kind { count, run }
}

/// 64 of them.
pub(super) const KINDS: [Kind; 13] = [
    clients(8, |target| target.hold(target.health, 40, b"GET /healthz HTTP/1.1\r\nHost:")),
    clients(8, header_flood),
    clients(6, |target| target.hold(target.health, 40, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")),
    clients(4, other_methods),
    clients(8, |target| target.hold(STORE, 20, &[0x16, 3, 1, 2, 0, 1, 0])),
    clients(4, |target| target.hold(STORE, 20, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")),
    clients(4, no_certificate),
    clients(4, datagrams),
    clients(3, large_values),
    clients(4, large_transactions),
    clients(2, deep_transactions),
    clients(7, unread_watches),
    clients(2, hostile_leases),
];

impl Target {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Keeps connections open that sent these bytes and nothing more; those that the server closes are opened again.
    fn hold(&self, to: SocketAddr, count: usize, first: &[u8]) {
        let mut held: Vec<TcpStream> = Vec::new();
        while self.goes_on() {
            held.retain(|stream| stream.peek(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
            while held.len() < count && self.goes_on() {
                let Ok(mut stream) = TcpStream::connect_timeout(&to, Duration::from_secs(1)) else { break };
                if stream.write_all(first).is_ok() && stream.set_nonblocking(true).is_ok() {
                    held.push(stream);
                }
            }
            // 64 clients on a machine that also runs what they attack: the server is tested, not the processor.
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// A connection to the store, with the certificate of a node or none.
    pub(super) async fn connect(&self, has_certificate: bool) -> Option<Channel> {
        let read = |path: &std::path::Path| std::fs::read(path).unwrap();
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&self.secure.ca)));
        if has_certificate {
            tls = tls.identity(Identity::from_pem(read(&self.secure.client.0), read(&self.secure.client.1)));
        }
        let endpoint = Endpoint::from_shared(format!("https://{STORE}")).unwrap().connect_timeout(Duration::from_secs(5));
        endpoint.tls_config(tls).unwrap().connect().await.ok()
    }

    /// Does something with one connection after the other.
    fn with_store(&self, has_certificate: bool, act: impl AsyncFn(Channel)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            while self.goes_on() {
                if let Some(channel) = self.connect(has_certificate).await {
                    let _ = tokio::time::timeout(Duration::from_secs(10), act(channel)).await;
                }
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        });
    }
}

fn header_flood(target: &Target) {
    let line = format!("X-{}: {}\r\n", "y".repeat(100), "z".repeat(4_000));
    while target.goes_on() {
        if let Ok(mut stream) = TcpStream::connect_timeout(&target.health, Duration::from_secs(1)) {
            let _ = stream.set_write_timeout(Some(Duration::from_secs(1)));
            let _ = stream.write_all(b"GET /state HTTP/1.1\r\n");
            // 400 kB, or until the server has enough.
            for _ in 0..100 {
                if stream.write_all(line.as_bytes()).is_err() {
                    break;
                }
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn other_methods(target: &Target) {
    while target.goes_on() {
        for method in ["POST", "DELETE", "CONNECT", "\u{1b}[2J", "GET"] {
            if let Ok(mut stream) = TcpStream::connect_timeout(&target.health, Duration::from_secs(1)) {
                let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
                let _ = write!(
                    stream,
                    "{method} /%2e%2e/state?{} HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{{",
                    "q".repeat(2000)
                );
                let _ = stream.read(&mut [0; 1024]);
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn no_certificate(target: &Target) {
    target.with_store(false, async |channel| {
        let _ = KvClient::new(channel).range(RangeRequest { key: b"/".to_vec(), range_end: vec![0], ..RangeRequest::default() }).await;
    });
}

/// To the ports of vxlan and of udp.
fn datagrams(target: &Target) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    while target.goes_on() {
        let mut bytes = vec![0; fastrand::usize(..1400)];
        bytes.iter_mut().for_each(|byte| *byte = fastrand::u8(..));
        // A header of VXLAN with this network's VNI, before anything.
        if let Some(header) = bytes.first_chunk_mut() {
            *header = [8, 0, 0, 0, 0, 0, 1, 0];
        }
        for port in [8472, 8285] {
            let _ = socket.send_to(&bytes, SocketAddr::new(target.health.ip(), port));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn put(key: String, size: usize) -> PutRequest {
    PutRequest { key: key.into_bytes(), value: vec![b'x'; size], ..PutRequest::default() }
}

/// 20 MB of values, and requests that are too large.
fn large_values(target: &Target) {
    target.with_store(true, async |channel| {
        let mut kv = KvClient::new(channel);
        for (i, size) in (0..14).zip([1_400_000].into_iter().cycle()).chain([(20, 1_600_000), (21, 12_000_000)]) {
            let _ = kv.put(put(format!("/attack/{i}"), size)).await;
        }
    });
}

fn range(key: &str) -> RequestOp {
    RequestOp { request: Some(Op::RequestRange(RangeRequest { key: key.into(), ..RangeRequest::default() })) }
}

/// 60 reads of one large value, 20,000 operations, and answers that are not read.
fn large_transactions(target: &Target) {
    target.with_store(true, async |channel| {
        let mut kv = KvClient::new(channel).max_decoding_message_size(64 << 20);
        for count in [60, 128, 129, 20_000] {
            let _ = kv.txn(TxnRequest { success: vec![range("/attack/1"); count], ..TxnRequest::default() }).await;
        }
        let everything = RangeRequest { key: b"/attack/".to_vec(), range_end: b"/attack0".to_vec(), ..RangeRequest::default() };
        let asked: Vec<_> = (0..20)
            .map(|_| {
                tokio::spawn({
                    let (mut kv, everything) = (kv.clone(), everything.clone());
                    async move { kv.range(everything).await.is_ok() }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(100)).await;
        asked.iter().for_each(tokio::task::JoinHandle::abort);
    });
}

fn deep_transactions(target: &Target) {
    target.with_store(true, async |channel| {
        let mut kv = KvClient::new(channel);
        for depth in [5, 20, 90] {
            let mut txn = TxnRequest { success: vec![range("/attack/1"); 100], ..TxnRequest::default() };
            for _ in 0..depth {
                txn = TxnRequest { success: vec![RequestOp { request: Some(Op::RequestTxn(txn)) }], ..TxnRequest::default() };
            }
            let _ = kv.txn(txn).await;
        }
    });
}

fn unread_watches(target: &Target) {
    target.with_store(true, async |channel| {
        let mut open = Vec::new();
        for _ in 0..20 {
            let (requests, stream) = tokio::sync::mpsc::channel(8);
            let create = WatchCreateRequest {
                key: b"/".to_vec(),
                range_end: b"0".to_vec(),
                start_revision: 1,
                prev_kv: true,
                ..WatchCreateRequest::default()
            };
            let _ = requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await;
            let answers = WatchClient::new(channel.clone()).watch(ReceiverStream::new(stream)).await;
            open.push((requests, answers));
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
    });
}

/// Keys below the leases' prefix, with values that no flanneld writes.
fn hostile_leases(target: &Target) {
    let vxlan = |address: &str, mac: &str| {
        format!(r#"{{"PublicIP":"{address}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#)
    };
    let values = [
        vxlan("10.0.0.201", "zz"),
        vxlan("10.0.0.202", "ff:ff:ff:ff:ff:ff"),
        vxlan("224.0.0.1", "02:00:00:00:00:c9"),
        vxlan("127.0.0.1", "02:00:00:00:00:ca"),
        vxlan("0.0.0.0", "02:00:00:00:00:cb"),
        vxlan("10.0.0.1", "02:00:00:00:00:cc"),
        format!(r#"{{"PublicIP":"10.0.0.203","BackendType":"{}"}}"#, "v".repeat(200_000)),
        r#"{"PublicIP":"10.0.0.204","BackendType":"\u001b[2J\u001b]0;x\u0007\nINFO all is well"}"#.to_owned(),
        r#"{"PublicIP":7,"BackendType":{"a":[]},"BackendData":"x"}"#.to_owned(),
        format!(r#"{{"PublicIP":"10.0.0.205","BackendType":"vxlan","BackendData":{}1{}}}"#, "[".repeat(10_000), "]".repeat(10_000)),
        "x".repeat(1_400_000),
        "\0\u{1b}[31m".to_owned(),
    ];
    // The key of the other host's tunnel, under a subnet that sorts before its own.
    let theft = vxlan("10.0.0.3", &target.mac);
    target.with_store(true, async |channel| {
        let mut kv = KvClient::new(channel);
        let key = b"/coreos.com/network/subnets/10.244.0.0-24".to_vec();
        let _ = kv.put(PutRequest { key, value: theft.clone().into_bytes(), ..PutRequest::default() }).await;
        for (i, value) in values.iter().enumerate() {
            for key in [
                format!("10.244.{}.0-24", 200 + i),
                format!("10.244.{}.0-24", fastrand::u8(220..)),
                format!("\u{1b}[2J\n{i}"),
                "0.0.0.0-0".to_owned(),
            ] {
                let key = format!("/coreos.com/network/subnets/{key}").into_bytes();
                let _ = kv.put(PutRequest { key, value: value.clone().into_bytes(), ..PutRequest::default() }).await;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
}
