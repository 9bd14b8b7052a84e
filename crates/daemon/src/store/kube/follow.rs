//! Follows the Nodes: a list, then the watch behind it. A watch that ends is resumed where it ended; a list follows when the
//! server no longer has that resource version (410 Gone). Only metadata is requested, so that neither a list nor a heartbeat
//! costs a whole Node.

use std::pin::pin;
use std::time::{Duration, Instant};

use flannel::{Config, StoreEvent};
use futures_util::StreamExt;
use kube::core::WatchEvent;
use tokio::sync::{mpsc, watch};

use super::Kube;
use super::api::{ApiError, Changes, NodeObject, Part, Since};
use super::table::Table;
use crate::store::{Link, Outage, foreign_text};

/// Nodes of a page of a list: of metadata, and of whole Nodes, which are large.
const PAGE: (u32, u32) = (500, 200);
/// Up to this many Nodes are read one by one; more are read as a list.
const ONE_BY_ONE: usize = 16;
/// A watch without an event for this long, not even a bookmark (the server sends one a minute), is given up, and all Nodes are
/// listed again: the server may be gone, or was restored from a backup, which has no events to send for a future version.
const SILENCE: Duration = Duration::from_secs(130);
/// A server that ends each watch at once is not asked more often than this.
const AT_LEAST: Duration = Duration::from_secs(1);
/// Events that wait together are one change.
const TOGETHER: usize = 512;
/// The annotation of the bookmark at the end of a list that came as events.
const LIST_ENDS: &str = "k8s.io/initial-events-end";
/// The file of the network config is compared with the config in use at most this often.
const CONFIG: Duration = Duration::from_secs(30);

/// How far this node has followed.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) table: Table,
    /// Every event up to this resource version was received; `None`: a list is due.
    version: Option<String>,
    /// The network config that this node started with, what its file said last, and when that was compared.
    config: Config,
    config_problem: String,
    config_compared: Instant,
    /// Can the server send a list as events?
    streams: bool,
    /// Changes when this host has another address.
    moves: watch::Receiver<u32>,
}

impl Place {
    pub(super) fn new(table: Table, config: Config, moves: watch::Receiver<u32>) -> Place {
        let (config_problem, config_compared) = (String::new(), Instant::now());
        Place { table, version: None, config, config_problem, config_compared, streams: true, moves }
    }
}

impl Kube {
    /// Follows until it cannot go on, and returns why.
    pub(super) async fn turn(&self, place: &mut Place, events: &mpsc::Sender<Vec<StoreEvent>>, link: &mut Link) -> Outage {
        match self.list_and_watch(place, events, link).await {
            Ok(why) => Outage::Lost(why.to_owned()),
            Err(error) => {
                if error.is_gone() {
                    place.version = None;
                }
                match &error {
                    ApiError::Refused { code: 400..=409 | 411..=428, .. } => Outage::Refused(error.to_string()),
                    _ => Outage::Lost(error.to_string()),
                }
            }
        }
    }

    /// Warns of a network config in the file that is not the one in use. The running daemon keeps what it began with.
    fn compare_config(&self, place: &mut Place, link: &Link) {
        if place.config_compared.elapsed() < CONFIG {
            return;
        }
        place.config_compared = Instant::now();
        let problem = match self.read_config() {
            Ok(config) if config == place.config => String::new(),
            Ok(_) => "the file of --net-config-path was changed; restart flanneld on each node to apply it".to_owned(),
            Err(problem) => format!("{problem}; this node keeps the network config that it started with"),
        };
        if problem == place.config_problem {
            return;
        }
        if problem.is_empty() {
            tracing::info!("network config in the file is the one in use again");
        } else {
            tracing::warn!(reason = %problem, "network config in the file differs from the one in use");
            link.notice("NetworkConfigChanged", problem.clone());
        }
        place.config_problem = problem;
    }

    /// Ends without an error when a new list is needed, and says why.
    async fn list_and_watch(
        &self,
        place: &mut Place,
        events: &mpsc::Sender<Vec<StoreEvent>>,
        link: &mut Link,
    ) -> Result<&'static str, ApiError> {
        let mut first = None;
        if place.version.is_none() {
            let (nodes, version) = if place.streams {
                match self.list_by_stream().await {
                    Ok((nodes, version, stream)) => {
                        first = Some(stream);
                        (nodes, version)
                    }
                    Err(error @ ApiError::Refused { code: 401 | 403, .. }) => return Err(error),
                    // A server before 1.32, or one where it is switched off, does not know the parameters; one whose etcd is
                    // too old finds that out only then. Pages every server has.
                    Err(ApiError::Refused { code, .. }) => {
                        place.streams = !matches!(code, 400 | 422);
                        self.pages(Part::Metadata, PAGE.0).await?
                    }
                    Err(error) => return Err(error),
                }
            } else {
                self.pages(Part::Metadata, PAGE.0).await?
            };
            self.learn(&mut place.table, &nodes).await?;
            let list = place.table.list(&nodes);
            link.set_leases(place.table.len());
            self.look_after_own(&mut place.table);
            if events.send(list).await.is_err() {
                return Ok("event channel closed");
            }
            // Only now has all of it been passed on.
            place.version = Some(version);
        }
        loop {
            let began = Instant::now();
            let version = place.version.clone().unwrap_or_default();
            let stream = match first.take() {
                Some(stream) => stream,
                None => self.api().watch(Since::Version(&version)).await?,
            };
            let mut chunks = pin!(stream.ready_chunks(TOGETHER));
            if link.up() {
                tracing::info!(version, "store watch started");
            }
            loop {
                // Only here may this be given up: events that were received must be passed on.
                let next = tokio::select! {
                    next = tokio::time::timeout(SILENCE, chunks.next()) => next,
                    _ = place.moves.changed() => return Ok("this host has another address; reconnecting"),
                };
                let chunk = match next {
                    Ok(Some(chunk)) => chunk,
                    Ok(None) => break,
                    Err(_) => {
                        place.version = None;
                        return Ok("no event of the API server for two minutes; listing all Nodes again");
                    }
                };
                self.compare_config(place, link);
                let list_again = self.take_in(place, chunk, events).await?;
                link.set_leases(place.table.len());
                if list_again {
                    return Ok("another Node claims the subnet of a deleted one; listing all Nodes again");
                }
            }
            tokio::time::sleep(AT_LEAST.saturating_sub(began.elapsed())).await;
        }
    }

    /// All Nodes, as the server lists them by events, and the stream that goes on behind the list.
    async fn list_by_stream(&self) -> Result<(Vec<NodeObject>, String, Changes), ApiError> {
        let mut stream = self.api().watch(Since::List).await?;
        let mut nodes = Vec::new();
        loop {
            match tokio::time::timeout(SILENCE, stream.next()).await {
                Ok(Some(event)) => match event? {
                    WatchEvent::Added(node) | WatchEvent::Modified(node) => nodes.push(node),
                    WatchEvent::Deleted(gone) => nodes.retain(|node: &NodeObject| node.metadata.name != gone.metadata.name),
                    WatchEvent::Bookmark(bookmark) if bookmark.metadata.annotations.get(LIST_ENDS).is_some_and(|value| value == "true") => {
                        return Ok((nodes, bookmark.metadata.resource_version, stream));
                    }
                    WatchEvent::Bookmark(_) => {}
                    WatchEvent::Error(status) => return Err(refused(status.code, status.message)),
                },
                Ok(None) => return Err(self.api().broken("its list of Nodes ended before it was complete")),
                Err(_) => return Err(self.api().broken("its list of Nodes is not sent")),
            }
        }
    }

    /// All Nodes, page by page, and their resource version.
    async fn pages(&self, part: Part, limit: u32) -> Result<(Vec<NodeObject>, String), ApiError> {
        let (mut nodes, mut next) = (Vec::new(), String::new());
        loop {
            let page = self.api().page(part, limit, &next).await?;
            nodes.extend(page.items);
            next = page.metadata.next;
            if next.is_empty() {
                return Ok((nodes, page.metadata.resource_version));
            }
        }
    }

    /// Reads the whole Nodes whose pod CIDRs are not known yet.
    async fn learn(&self, table: &mut Table, nodes: &[NodeObject]) -> Result<(), ApiError> {
        let unknown: Vec<&NodeObject> = nodes.iter().filter(|node| table.wants(node)).collect();
        if unknown.len() > ONE_BY_ONE {
            for node in self.pages(Part::Whole, PAGE.1).await?.0 {
                table.learn(&node);
            }
            return Ok(());
        }
        let names: Vec<String> = unknown.iter().map(|node| node.metadata.name.clone()).collect();
        for name in names {
            // The watch reports a Node that is gone by now.
            if let Some(node) = self.api().node(&name).await? {
                table.learn(&node);
            }
        }
        Ok(())
    }

    /// Takes events in. True if all Nodes must be listed again.
    async fn take_in(
        &self,
        place: &mut Place,
        chunk: Vec<Result<WatchEvent<NodeObject>, ApiError>>,
        events: &mpsc::Sender<Vec<StoreEvent>>,
    ) -> Result<bool, ApiError> {
        let mut again = false;
        let mut news = Vec::new();
        let mut outcome = Ok(());
        for event in chunk {
            let version = match event {
                Ok(WatchEvent::Added(node) | WatchEvent::Modified(node)) => {
                    if let Err(error) = self.learn(&mut place.table, std::slice::from_ref(&node)).await {
                        outcome = Err(error);
                        break;
                    }
                    again |= place.table.apply(&node, &mut news);
                    node.metadata.resource_version
                }
                Ok(WatchEvent::Deleted(node)) => {
                    again |= place.table.delete(&node.metadata.name, &mut news);
                    node.metadata.resource_version
                }
                Ok(WatchEvent::Bookmark(bookmark)) => bookmark.metadata.resource_version,
                Ok(WatchEvent::Error(status)) => {
                    outcome = Err(refused(status.code, status.message));
                    break;
                }
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            };
            place.version = Some(version);
        }
        self.look_after_own(&mut place.table);
        // Events before an error count.
        if !news.is_empty() && events.send(news).await.is_err() {
            return Ok(true);
        }
        if again {
            // A list also covers what an error cut off.
            place.version = None;
        }
        outcome.map(|()| again)
    }

    fn look_after_own(&self, table: &mut Table) {
        if table.take_own_changed() {
            self.own_changed().notify_one();
        }
    }
}

fn refused(code: u16, message: String) -> ApiError {
    ApiError::Refused { act: "continue the watch of the Nodes", code, message: foreign_text(&message) }
}
