//! The gRPC services in front of the engine.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use anyhow::Context;
use prost::Message;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

use super::connection::{self, Handle};
use super::disk::Disk;
use super::engine::Engine;
use super::guard::{GuardLayer, Slots};
use super::limits;
use super::tls::{Tls, TlsArgs};
use crate::etcd::cluster_server::{Cluster, ClusterServer};
use crate::etcd::kv_server::{Kv, KvServer};
use crate::etcd::lease_server::{Lease, LeaseServer};
use crate::etcd::maintenance_server::{Maintenance, MaintenanceServer};
use crate::etcd::request_op::Request as Op;
use crate::etcd::watch_server::WatchServer;
use crate::etcd::*;
use crate::store::foreign_text;

/// The time between the store's failure and its end, in which the answers are sent that say why.
const PARTING: Duration = Duration::from_secs(1);
/// How often an idle connection is pinged, and how long the answer may take.
const PING: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));

/// The arguments of `flanneld store`.
#[derive(Debug, Clone, clap::Args)]
pub struct StoreArgs {
    /// Address and port to serve the etcd v3 API on
    #[arg(long, default_value = "127.0.0.1:2379", value_name = "IP:PORT")]
    pub listen: SocketAddr,
    /// Directory of the store's file; created if missing
    #[arg(long, default_value = "/var/lib/flannel/store", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Network configuration (JSON), written to the store at the start if it has none
    #[arg(long, value_name = "JSON")]
    pub net_config: Option<String>,
    /// Prefix of flannel's keys, for --net-config
    #[arg(long, default_value = "/coreos.com/network", value_name = "PATH")]
    pub etcd_prefix: String,
    /// Who is served.
    #[command(flatten)]
    pub tls: TlsArgs,
}

/// A store that listens and does not serve yet.
#[derive(Debug)]
pub struct Bound {
    listener: TcpListener,
    service: Service,
    address: SocketAddr,
    tls: Option<Tls>,
}

/// Opens the file and the port.
///
/// # Errors
/// When either cannot be opened; the text names it.
pub async fn bind(args: &StoreArgs) -> anyhow::Result<Bound> {
    if let Some(text) = &args.net_config {
        flannel::Config::parse(text).context("--net-config cannot be used")?;
    }
    let disk = Disk::open(&args.data_dir, fastrand::u64(1..))?;
    // The file is locked from here on: no other store makes certificates at the same time.
    let tls = args.tls.prepare(args.listen, &args.data_dir)?;
    let engine = Engine::start(disk).with_context(|| format!("cannot read the store's file in {}", args.data_dir.display()))?;
    begin_with(&engine, args).await.context("cannot write --net-config to the store")?;
    let listener = TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on --listen {}", args.listen))?;
    let address = listener.local_addr()?;
    let url = format!("{}://{address}", if tls.is_some() { "https" } else { "http" });
    Ok(Bound { listener, service: Service::new(engine, url), address, tls })
}

/// Writes `--net-config` if the store has no network config, and says what the store has.
async fn begin_with(engine: &Engine, args: &StoreArgs) -> Result<(), Status> {
    let key = format!("{}/config", args.etcd_prefix.trim_end_matches('/'));
    let given = args.net_config.clone();
    let put = PutRequest { key: key.clone().into_bytes(), value: given.clone().unwrap_or_default().into_bytes(), ..PutRequest::default() };
    let write = move |state: &mut super::state::State, _| {
        let found = state.range(&RangeRequest { key: put.key.clone(), ..RangeRequest::default() })?.kvs.into_iter().next();
        if found.is_none() && !put.value.is_empty() {
            state.put(put)?;
        }
        Ok(found.map(|kv| kv.value))
    };
    let found = engine.call(write).await?;
    let text = |value: &[u8]| foreign_text(&String::from_utf8_lossy(value));
    match (found, given) {
        (None, None) => tracing::warn!(key, "store has no network config; daemons wait for one"),
        (None, Some(given)) => tracing::info!(key, config = text(given.as_bytes()), "network config written from --net-config"),
        (Some(found), Some(given)) if found != given.as_bytes() => {
            let fix = format!("to change it: etcdctl put {key} '…'");
            tracing::warn!(key, config = text(&found), fix, "--net-config ignored: the store already has a network config");
        }
        (Some(found), _) => tracing::info!(key, config = text(&found), "store has a network config"),
    }
    Ok(())
}

impl Bound {
    /// Where it listens: the kernel may have chosen the port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Does it serve by TLS, and only clients with a certificate?
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Serves until `stop` is ready.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(self, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        let Bound { listener, service, tls, .. } = self;
        let engine = service.engine.clone();
        let server = tonic::transport::Server::builder()
            .max_concurrent_streams(limits::STREAMS)
            .http2_max_header_list_size(limits::HEADERS)
            .http2_keepalive_interval(Some(PING.0))
            .http2_keepalive_timeout(Some(PING.1))
            .layer(GuardLayer::default())
            .add_routes(service.routes());
        // A store that cannot write ends, and a supervisor starts it again. The answers that say why are sent first; streams never
        // end by themselves, so there is a time for that.
        let parted = async {
            failed(engine.revision()).await;
            tokio::time::sleep(PARTING).await;
        };
        tokio::select! {
            served = server.serve_with_incoming_shutdown(connection::accept(listener, tls), failed(engine.revision())) => served?,
            () = parted => {}
            // What is acknowledged is on disk.
            () = stop => return Ok(()),
        }
        anyhow::bail!("the store's file cannot be written: see the log")
    }
}

/// Ends when the engine has: it could not write.
async fn failed(mut revision: watch::Receiver<i64>) {
    while revision.changed().await.is_ok() {}
}

#[derive(Debug, Clone)]
pub(super) struct Service {
    pub(super) engine: Engine,
    /// Where clients reach it.
    url: String,
    slots: Slots,
    /// Of their own, so that watches that are not read do not delay other answers.
    pub(super) watch_slots: Slots,
    /// Watches of all streams.
    pub(super) watches: Arc<AtomicUsize>,
}

impl Service {
    pub(super) fn new(engine: Engine, url: String) -> Service {
        Service { engine, url, slots: Slots::new(), watch_slots: Slots::new(), watches: Arc::default() }
    }

    /// All services, by their paths.
    pub(super) fn routes(self) -> Routes {
        // Answers are bounded by `limits::ANSWER` where they are made.
        let kv = KvServer::new(self.clone()).max_decoding_message_size(limits::DECODED).max_encoding_message_size(usize::MAX);
        let watch = WatchServer::new(self.clone()).max_decoding_message_size(limits::CONTROL);
        Routes::new(kv)
            .add_service(watch.max_encoding_message_size(usize::MAX))
            .add_service(LeaseServer::new(self.clone()).max_decoding_message_size(limits::CONTROL))
            .add_service(MaintenanceServer::new(self.clone()).max_decoding_message_size(limits::CONTROL))
            .add_service(ClusterServer::new(self).max_decoding_message_size(limits::CONTROL))
    }

    /// Executes a request that reads and writes. Its answer may be large, so it has a place first; a small one gives it back at once.
    async fn write_and_read<T: Message + 'static>(
        &self,
        client: Option<Handle>,
        f: impl FnOnce(&mut super::state::State) -> Result<T, Status> + Send + 'static,
    ) -> Answer<T> {
        let slot = self.slots.take(client).await?;
        let mut response = Response::new(self.engine.call(move |state, _| f(state)).await?);
        if response.get_ref().encoded_len() > limits::SMALL {
            response.extensions_mut().insert(slot);
        }
        Ok(response)
    }

    /// Executes a request that only reads. A small answer needs no place, so that no client that reads slowly delays it; for a large
    /// one the request is executed again when there is a place.
    async fn read<T: Message + 'static, F>(&self, client: Option<Handle>, f: F) -> Answer<T>
    where
        F: Fn(&mut super::state::State) -> Result<T, Status> + Clone + Send + 'static,
    {
        let first = f.clone();
        let small = move |state: &mut super::state::State, _| {
            first(state).map(|answer| Some(answer).filter(|answer| answer.encoded_len() <= limits::SMALL))
        };
        match self.engine.call(small).await? {
            Some(answer) => Ok(Response::new(answer)),
            None => self.write_and_read(client, f).await,
        }
    }
}

/// The connection of a request; none in a simulation.
pub(super) fn client<T>(request: &Request<T>) -> Option<Handle> {
    request.extensions().get::<Handle>().cloned()
}

/// Does a transaction write?
fn writes(txn: &TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).any(|op| match &op.request {
        Some(Op::RequestPut(_) | Op::RequestDeleteRange(_)) => true,
        Some(Op::RequestTxn(txn)) => writes(txn),
        Some(Op::RequestRange(_)) | None => false,
    })
}

/// Does a transaction read values?
fn reads(txn: &TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).any(|op| match &op.request {
        Some(Op::RequestRange(_)) => true,
        Some(Op::RequestPut(put)) => put.prev_kv,
        Some(Op::RequestDeleteRange(delete)) => delete.prev_kv,
        Some(Op::RequestTxn(txn)) => reads(txn),
        None => false,
    })
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Kv for Service {
    async fn range(&self, request: Request<RangeRequest>) -> Answer<RangeResponse> {
        let client = client(&request);
        let request = request.into_inner();
        self.read(client, move |state| state.range(&request)).await
    }

    async fn put(&self, request: Request<PutRequest>) -> Answer<PutResponse> {
        let client = client(&request);
        let request = request.into_inner();
        if request.prev_kv {
            return self.write_and_read(client, move |state| state.put(request)).await;
        }
        self.engine.call(move |state, _| state.put(request)).await.map(Response::new)
    }

    async fn delete_range(&self, request: Request<DeleteRangeRequest>) -> Answer<DeleteRangeResponse> {
        let client = client(&request);
        let request = request.into_inner();
        if request.prev_kv {
            return self.write_and_read(client, move |state| state.delete(&request)).await;
        }
        self.engine.call(move |state, _| state.delete(&request)).await.map(Response::new)
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Answer<TxnResponse> {
        let client = client(&request);
        let request = request.into_inner();
        match (reads(&request), writes(&request)) {
            (true, true) => self.write_and_read(client, move |state| state.txn(&request)).await,
            (true, false) => self.read(client, move |state| state.txn(&request)).await,
            (false, _) => self.engine.call(move |state, _| state.txn(&request)).await.map(Response::new),
        }
    }

    async fn compact(&self, request: Request<CompactionRequest>) -> Answer<CompactionResponse> {
        let revision = request.into_inner().revision;
        let compact =
            move |state: &mut super::state::State, _| state.compact(revision).map(|()| CompactionResponse { header: state.header() });
        self.engine.call(compact).await.map(Response::new)
    }
}

#[tonic::async_trait]
impl Lease for Service {
    type LeaseKeepAliveStream = ReceiverStream<Result<LeaseKeepAliveResponse, Status>>;

    async fn lease_grant(&self, request: Request<LeaseGrantRequest>) -> Answer<LeaseGrantResponse> {
        let LeaseGrantRequest { ttl, id } = request.into_inner();
        let random = fastrand::i64(1..);
        let grant = move |state: &mut super::state::State, now| {
            let (id, ttl) = state.grant(id, ttl, random, now)?;
            Ok(LeaseGrantResponse { header: state.header(), id, ttl, error: String::new() })
        };
        self.engine.call(grant).await.map(Response::new)
    }

    async fn lease_revoke(&self, request: Request<LeaseRevokeRequest>) -> Answer<LeaseRevokeResponse> {
        let id = request.into_inner().id;
        let revoke = move |state: &mut super::state::State, _| state.revoke(id).map(|()| LeaseRevokeResponse { header: state.header() });
        self.engine.call(revoke).await.map(Response::new)
    }

    async fn lease_keep_alive(&self, request: Request<Streaming<LeaseKeepAliveRequest>>) -> Answer<Self::LeaseKeepAliveStream> {
        let engine = self.engine.clone();
        let mut requests = request.into_inner();
        let (answers, stream) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok(Some(LeaseKeepAliveRequest { id })) = requests.message().await {
                let answer = engine.call(move |state, now| {
                    let ttl = state.keep_alive(id, now);
                    Ok(LeaseKeepAliveResponse { header: state.header(), id, ttl })
                });
                if answers.send(answer.await).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn lease_time_to_live(&self, request: Request<LeaseTimeToLiveRequest>) -> Answer<LeaseTimeToLiveResponse> {
        let LeaseTimeToLiveRequest { id, keys: with_keys } = request.into_inner();
        let look = move |state: &mut super::state::State, now| {
            let (ttl, granted_ttl, keys) = state.time_to_live(id, now).unwrap_or((-1, 0, Vec::new()));
            Ok(LeaseTimeToLiveResponse { header: state.header(), id, ttl, granted_ttl, keys: if with_keys { keys } else { Vec::new() } })
        };
        self.engine.call(look).await.map(Response::new)
    }

    async fn lease_leases(&self, _: Request<LeaseLeasesRequest>) -> Answer<LeaseLeasesResponse> {
        let look = move |state: &mut super::state::State, _| {
            let leases = state.lease_ids().into_iter().map(|id| LeaseStatus { id }).collect();
            Ok(LeaseLeasesResponse { header: state.header(), leases })
        };
        self.engine.call(look).await.map(Response::new)
    }
}

#[tonic::async_trait]
impl Maintenance for Service {
    async fn alarm(&self, _: Request<AlarmRequest>) -> Answer<AlarmResponse> {
        self.engine.call(|state, _| Ok(AlarmResponse { header: state.header(), alarms: Vec::new() })).await.map(Response::new)
    }

    async fn status(&self, _: Request<StatusRequest>) -> Answer<StatusResponse> {
        let look = |state: &mut super::state::State, _| {
            let index = state.revision().cast_unsigned();
            let version = format!("3.5.0+flannel.{}", env!("CARGO_PKG_VERSION"));
            Ok(StatusResponse {
                header: state.header(),
                version,
                leader: 1,
                raft_term: 1,
                raft_index: index,
                raft_applied_index: index,
                ..StatusResponse::default()
            })
        };
        self.engine.call(look).await.map(Response::new)
    }
}

#[tonic::async_trait]
impl Cluster for Service {
    async fn member_list(&self, _: Request<MemberListRequest>) -> Answer<MemberListResponse> {
        let url = self.url.clone();
        let look = move |state: &mut super::state::State, _| {
            let member = Member { id: 1, name: "embedded".to_owned(), client_ur_ls: vec![url], ..Member::default() };
            Ok(MemberListResponse { header: state.header(), members: vec![member] })
        };
        self.engine.call(look).await.map(Response::new)
    }
}
