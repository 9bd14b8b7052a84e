//! The gRPC services in front of the engine.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use super::disk::Disk;
use super::engine::Engine;
use super::state::Events;
use crate::etcd::cluster_server::{Cluster, ClusterServer};
use crate::etcd::kv_server::{Kv, KvServer};
use crate::etcd::lease_server::{Lease, LeaseServer};
use crate::etcd::maintenance_server::{Maintenance, MaintenanceServer};
use crate::etcd::watch_create_request::FilterType;
use crate::etcd::watch_request::RequestUnion;
use crate::etcd::watch_server::{Watch, WatchServer};
use crate::etcd::*;

/// The largest request that is read, in bytes. etcd's own limit is 1.5 MiB by default; a thousand leases in one
/// transaction need a fifth of that.
const MAX_REQUEST: usize = 16 << 20;

/// From the store's failure to its end: for the answers that are on their way.
const PARTING: Duration = Duration::from_secs(1);

/// What `flanneld store` is told.
#[derive(Debug, Clone, clap::Args)]
pub struct StoreArgs {
    /// Address and port to serve the etcd v3 API on
    #[arg(long, default_value = "127.0.0.1:2379", value_name = "IP:PORT")]
    pub listen: SocketAddr,
    /// Directory of the store's file; created if missing
    #[arg(long, default_value = "/var/lib/flannel/store", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Network configuration (JSON) to begin with: written to the store if it has none
    #[arg(long, value_name = "JSON")]
    pub net_config: Option<String>,
    /// Prefix of flannel's keys, for --net-config
    #[arg(long, default_value = "/coreos.com/network", value_name = "PATH")]
    pub etcd_prefix: String,
}

/// A store that listens and does not serve yet.
#[derive(Debug)]
pub struct Bound {
    listener: TcpListener,
    service: Service,
    address: SocketAddr,
}

/// Opens the file and the port.
///
/// # Errors
/// When either cannot be had; the text names it.
pub async fn bind(args: &StoreArgs) -> anyhow::Result<Bound> {
    if let Some(text) = &args.net_config {
        flannel::Config::parse(text).context("--net-config cannot be used")?;
    }
    let disk = Disk::open(&args.data_dir, fastrand::u64(1..))?;
    let engine = Engine::start(disk).with_context(|| format!("cannot read the store's file in {}", args.data_dir.display()))?;
    if let Some(text) = &args.net_config {
        let put = PutRequest {
            key: format!("{}/config", args.etcd_prefix.trim_end_matches('/')).into_bytes(),
            value: text.as_bytes().to_vec(),
            ..PutRequest::default()
        };
        let begin_with = move |state: &mut super::state::State, _| {
            let there = state.range(&RangeRequest { key: put.key.clone(), ..RangeRequest::default() })?;
            if there.count == 0 { state.put(put).map(drop) } else { Ok(()) }
        };
        engine.call(begin_with).await.context("cannot write --net-config to the store")?;
    }
    let listener = TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on --listen {}", args.listen))?;
    let address = listener.local_addr()?;
    Ok(Bound { listener, service: Service::new(engine, address), address })
}

impl Bound {
    /// Where it listens: the port may have been left to the kernel.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` is ready.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(self, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        let Bound { listener, service, .. } = self;
        let engine = service.engine.clone();
        let server = tonic::transport::Server::builder().add_routes(service.routes());
        // Without this an answer in two segments waits for a delayed ack: 40 ms.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        // A store that cannot write is of no use to anybody: it ends, and is started again. Those whose requests it
        // refused hear why first; a stream of keep-alives never ends by itself, so they have a moment for that.
        let parted = async {
            failed(engine.revision()).await;
            tokio::time::sleep(PARTING).await;
        };
        tokio::select! {
            served = server.serve_with_incoming_shutdown(incoming, failed(engine.revision())) => served?,
            () = parted => {}
            // Watches never end by themselves either: what is acknowledged is on disk.
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
    engine: Engine,
    address: SocketAddr,
}

impl Service {
    pub(super) fn new(engine: Engine, address: SocketAddr) -> Service {
        Service { engine, address }
    }

    /// All services, by their paths.
    pub(super) fn routes(self) -> Routes {
        let kv = KvServer::new(self.clone()).max_decoding_message_size(MAX_REQUEST).max_encoding_message_size(usize::MAX);
        Routes::new(kv)
            .add_service(WatchServer::new(self.clone()).max_encoding_message_size(usize::MAX))
            .add_service(LeaseServer::new(self.clone()))
            .add_service(MaintenanceServer::new(self.clone()))
            .add_service(ClusterServer::new(self))
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Kv for Service {
    async fn range(&self, request: Request<RangeRequest>) -> Answer<RangeResponse> {
        let request = request.into_inner();
        self.engine.call(move |state, _| state.range(&request)).await.map(Response::new)
    }

    async fn put(&self, request: Request<PutRequest>) -> Answer<PutResponse> {
        let request = request.into_inner();
        self.engine.call(move |state, _| state.put(request)).await.map(Response::new)
    }

    async fn delete_range(&self, request: Request<DeleteRangeRequest>) -> Answer<DeleteRangeResponse> {
        let request = request.into_inner();
        self.engine.call(move |state, _| state.delete(&request)).await.map(Response::new)
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Answer<TxnResponse> {
        let request = request.into_inner();
        self.engine.call(move |state, _| state.txn(&request)).await.map(Response::new)
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
        let url = format!("http://{}", self.address);
        let look = move |state: &mut super::state::State, _| {
            let member = Member { id: 1, name: "embedded".to_owned(), client_ur_ls: vec![url], ..Member::default() };
            Ok(MemberListResponse { header: state.header(), members: vec![member] })
        };
        self.engine.call(look).await.map(Response::new)
    }
}

#[tonic::async_trait]
impl Watch for Service {
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;

    async fn watch(&self, request: Request<Streaming<WatchRequest>>) -> Answer<Self::WatchStream> {
        let (answers, stream) = mpsc::channel(16);
        let watches = Watches { engine: self.engine.clone(), answers, watchers: BTreeMap::new() };
        tokio::spawn(watches.run(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// The watchers of one client's stream. Each pulls what it has not seen yet, so a slow client costs no memory; it may
/// fall behind the history and then hears so.
struct Watches {
    engine: Engine,
    answers: mpsc::Sender<Result<WatchResponse, Status>>,
    watchers: BTreeMap<i64, Watcher>,
}

struct Watcher {
    request: WatchCreateRequest,
    /// The first revision that was not looked at yet.
    next: i64,
}

/// The client is gone: nobody is left to answer.
struct Gone;

impl Watches {
    async fn run(mut self, mut requests: Streaming<WatchRequest>) {
        let mut revision = self.engine.revision();
        loop {
            let outcome = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.handle(request).await,
                    _ => Err(Gone),
                },
                changed = revision.changed() => match changed {
                    Ok(()) => self.pull_all().await,
                    Err(_) => Err(Gone),
                },
            };
            if outcome.is_err() {
                return;
            }
        }
    }

    async fn handle(&mut self, request: WatchRequest) -> Result<(), Gone> {
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => {
                let now = self.engine.call(|state, _| Ok((state.header(), state.revision()))).await;
                let (header, revision) = now.map_err(|_| Gone)?;
                let taken = self.watchers.keys().next_back().copied();
                let watch_id = if create.watch_id != 0 { create.watch_id } else { taken.map_or(0, |id| id + 1) };
                let next = if create.start_revision > 0 { create.start_revision } else { revision + 1 };
                self.send(WatchResponse { header, watch_id, created: true, ..WatchResponse::default() }).await?;
                self.watchers.insert(watch_id, Watcher { request: create, next });
                self.pull(watch_id).await
            }
            Some(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })) => {
                if self.watchers.remove(&watch_id).is_none() {
                    return Ok(());
                }
                let header = self.engine.call(|state, _| Ok(state.header())).await.map_err(|_| Gone)?;
                self.send(WatchResponse { header, watch_id, canceled: true, ..WatchResponse::default() }).await
            }
            Some(RequestUnion::ProgressRequest(_)) => {
                self.pull_all().await?;
                let header = self.engine.call(|state, _| Ok(state.header())).await.map_err(|_| Gone)?;
                self.send(WatchResponse { header, watch_id: -1, ..WatchResponse::default() }).await
            }
            None => Ok(()),
        }
    }

    async fn pull_all(&mut self) -> Result<(), Gone> {
        for id in self.watchers.keys().copied().collect::<Vec<_>>() {
            self.pull(id).await?;
        }
        Ok(())
    }

    /// Sends a watcher all that it has not seen yet.
    async fn pull(&mut self, watch_id: i64) -> Result<(), Gone> {
        loop {
            let Some(watcher) = self.watchers.get_mut(&watch_id) else { return Ok(()) };
            let WatchCreateRequest { key, range_end, .. } = watcher.request.clone();
            let from = watcher.next;
            let pulled = self.engine.call(move |state, _| Ok((state.header(), state.events(from, &key, &range_end))));
            match pulled.await.map_err(|_| Gone)? {
                (header, Events::Compacted(compact_revision)) => {
                    self.watchers.remove(&watch_id);
                    let cancel_reason = "etcdserver: mvcc: required revision has been compacted".to_owned();
                    return self
                        .send(WatchResponse {
                            header,
                            watch_id,
                            canceled: true,
                            compact_revision,
                            cancel_reason,
                            ..WatchResponse::default()
                        })
                        .await;
                }
                (header, Events::Next(mut events, next)) => {
                    let done = next <= from || header.is_none_or(|h| next > h.revision);
                    // A watch may begin in the future: its beginning never moves back.
                    watcher.next = watcher.next.max(next);
                    let unwanted: Vec<i32> = watcher.request.filters().map(|f| if f == FilterType::Noput { 0 } else { 1 }).collect();
                    events.retain(|event| !unwanted.contains(&event.r#type));
                    if !watcher.request.prev_kv {
                        events.iter_mut().for_each(|event| event.prev_kv = None);
                    }
                    if !events.is_empty() {
                        self.send(WatchResponse { header, watch_id, events, ..WatchResponse::default() }).await?;
                    }
                    if done {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn send(&self, response: WatchResponse) -> Result<(), Gone> {
        self.answers.send(Ok(response)).await.map_err(|_| Gone)
    }
}
