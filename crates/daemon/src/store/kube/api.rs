//! Requests to the API server, and what its refusals mean to an operator.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flannel::Age;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{Method, Request};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::core::WatchEvent;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use thiserror::Error;

use crate::store::endpoint::without_credentials;
use crate::store::foreign_text;

/// How long a request may take, a watch's beginning included.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long the server keeps a watch open: drawn from this range, so that not all watches end at once.
const WATCH: (u64, u64) = (300, 600);
/// Objects with nothing but their metadata: without images, conditions and addresses a Node is a fifth of its size.
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
const METADATA_LIST: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";

/// Why a request to the API server failed.
#[derive(Debug, Clone, Error)]
pub enum ApiError {
    /// It answered, and refused.
    #[error("the API server refuses to {act}: {message}{}", advice(*code))]
    Refused {
        /// What was asked.
        act: &'static str,
        /// The HTTP status.
        code: u16,
        /// What it said.
        message: String,
    },
    /// It did not answer, or its answer cannot be used.
    #[error("the API server {url} does not answer: {last}{}", tls_advice(last))]
    Unreachable {
        /// Where it was looked for.
        url: String,
        /// What went wrong.
        last: String,
    },
}

impl ApiError {
    /// Is the resource version of a list or watch too old to go on from?
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, ApiError::Refused { code: 410, .. })
    }

    fn is(&self, status: u16) -> bool {
        matches!(self, ApiError::Refused { code, .. } if *code == status)
    }
}

fn advice(code: u16) -> &'static str {
    match code {
        401 => {
            "; the token is expired, revoked or not valid yet: compare this host's clock with the API server's, and see that the service account still exists"
        }
        403 => "; apply the ClusterRole and ClusterRoleBinding of deploy/kubernetes/kube-flannel.yml",
        _ => "",
    }
}

fn tls_advice(text: &str) -> &'static str {
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    match text {
        _ if says(&["NotValidYet", "not valid yet", "Expired", "expired"]) => {
            "; compare this host's clock with the dates of the API server's certificate"
        }
        _ if says(&["UnknownIssuer", "BadSignature"]) => {
            "; its certificate is signed by another authority than the one that flanneld was given"
        }
        _ => "",
    }
}

/// The parts of a Node that are used. Everything else is skipped as it is read.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct NodeObject {
    pub(super) metadata: Metadata,
    /// Empty in what comes as metadata alone.
    #[serde(default)]
    pub(super) spec: Spec,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metadata {
    #[serde(default)]
    pub(super) name: String,
    /// Another one where the name is used again.
    #[serde(default)]
    pub(super) uid: String,
    #[serde(default)]
    pub(super) resource_version: String,
    /// When the API server created it, in RFC 3339 with seconds.
    #[serde(default)]
    pub(super) creation_timestamp: Option<String>,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
}

impl Metadata {
    /// Which of two Nodes is older. The server sets the time, and a Node that is deleted and created again has another one.
    pub(super) fn age(&self) -> Age {
        let created = self.creation_timestamp.as_deref().and_then(|text| text.parse::<Timestamp>().ok());
        created.and_then(|at| u64::try_from(at.as_second()).ok()).map_or(Age::UNKNOWN, Age::created)
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Spec {
    #[serde(default, rename = "podCIDR")]
    pub(super) pod_cidr: String,
    #[serde(default, rename = "podCIDRs")]
    pub(super) pod_cidrs: Vec<String>,
}

/// A page of a list.
#[derive(Debug, Deserialize)]
pub(super) struct List {
    pub(super) metadata: ListMetadata,
    #[serde(default)]
    pub(super) items: Vec<NodeObject>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ListMetadata {
    #[serde(default)]
    pub(super) resource_version: String,
    #[serde(default, rename = "continue")]
    pub(super) next: String,
}

#[derive(Debug, Deserialize)]
struct Pod {
    #[serde(default)]
    spec: PodSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    #[serde(default)]
    node_name: String,
}

/// How much of each Node a list has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Its metadata.
    Metadata,
    /// All.
    Whole,
}

/// From where a watch begins.
#[derive(Debug, Clone, Copy)]
pub(super) enum Since<'a> {
    /// With a list of all Nodes, as events, and a bookmark at its end (KEP-3157).
    List,
    /// Behind a resource version.
    Version(&'a str),
}

/// The changes of a watch.
pub(super) type Changes = BoxStream<'static, Result<WatchEvent<NodeObject>, ApiError>>;

/// A client of the API server.
#[derive(Clone)]
pub(super) struct Api {
    config: kube::Config,
    client: Arc<Mutex<Client>>,
    url: String,
}

impl Api {
    /// A client. Nothing is connected yet.
    pub(super) fn new(config: kube::Config) -> Result<Api, kube::Error> {
        let url = without_credentials(&config.cluster_url.to_string()).0;
        Ok(Api { client: Arc::new(Mutex::new(Client::try_from(config.clone())?)), config, url })
    }

    /// Replaces all connections: the present ones begin at an address that this host no longer has.
    pub(super) fn reconnect(&self) {
        if let Ok(client) = Client::try_from(self.config.clone()) {
            *self.client.lock().unwrap_or_else(PoisonError::into_inner) = client;
        }
    }

    fn client(&self) -> Client {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A Node; `None` if there is none of that name.
    pub(super) async fn node(&self, name: &str) -> Result<Option<NodeObject>, ApiError> {
        match self.ask("read a Node", Method::GET, &format!("/api/v1/nodes/{name}"), "", None).await {
            Ok(node) => Ok(Some(node)),
            Err(error) if error.is(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The name of the Node on which a pod runs.
    pub(super) async fn node_of_pod(&self, namespace: &str, name: &str) -> Result<String, ApiError> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}");
        let pod: Pod = self.ask("read this pod", Method::GET, &path, "", None).await?;
        Ok(pod.spec.node_name)
    }

    /// Changes a Node by way of its status, as upstream does: the one right that its role has.
    pub(super) async fn patch_node(&self, act: &'static str, name: &str, patch: &Value) -> Result<NodeObject, ApiError> {
        let path = format!("/api/v1/nodes/{name}/status?fieldManager=flanneld");
        self.ask(act, Method::PATCH, &path, "application/strategic-merge-patch+json", Some(patch)).await
    }

    /// Writes an Event; the count of an existing one of that name is raised to `count`.
    pub(super) async fn event(&self, event: &Value, count: u32) -> Result<(), ApiError> {
        let act = "write an Event";
        let path = "/api/v1/namespaces/default/events";
        let created: Result<Value, ApiError> = self.ask(act, Method::POST, path, "application/json", Some(event)).await;
        match created {
            Err(error) if error.is(409) => {
                let path = format!("{path}/{}", event["metadata"]["name"].as_str().unwrap_or_default());
                let patch = json!({ "count": count, "lastTimestamp": event["lastTimestamp"] });
                self.ask::<Value>(act, Method::PATCH, &path, "application/merge-patch+json", Some(&patch)).await.map(drop)
            }
            other => other.map(drop),
        }
    }

    /// That the server's answer is not what it should be.
    pub(super) fn broken(&self, what: &str) -> ApiError {
        ApiError::Unreachable { url: self.url.clone(), last: what.to_owned() }
    }

    /// A page of all Nodes, at most `limit` of them, behind the page that said `next`.
    pub(super) async fn page(&self, part: Part, limit: u32, next: &str) -> Result<List, ApiError> {
        let mut path = format!("/api/v1/nodes?limit={limit}");
        if !next.is_empty() {
            path.push_str(&format!("&continue={next}"));
        }
        let accept = if part == Part::Metadata { METADATA_LIST } else { "application/json" };
        let request = Request::get(path).header(ACCEPT, accept).body(Vec::new());
        self.send("list the Nodes", request).await
    }

    /// The changes of all Nodes, each with its metadata alone.
    pub(super) async fn watch(&self, since: Since<'_>) -> Result<Changes, ApiError> {
        let timeout = fastrand::u64(WATCH.0..WATCH.1);
        let since = match since {
            Since::List => "sendInitialEvents=true&resourceVersionMatch=NotOlderThan".to_owned(),
            Since::Version(version) => format!("resourceVersion={version}"),
        };
        let path = format!("/api/v1/nodes?watch=true&allowWatchBookmarks=true&timeoutSeconds={timeout}&{since}");
        let act = "watch the Nodes";
        let request = Request::get(path).header(ACCEPT, METADATA).body(Vec::new()).map_err(|error| self.unreachable(&error))?;
        let client = self.client();
        let opened = tokio::time::timeout(TIMEOUT, client.request_events::<NodeObject>(request)).await;
        let stream = opened.map_err(|_| self.silent())?.map_err(|error| self.error(act, error))?;
        let this = self.clone();
        Ok(stream.map(move |event: kube::Result<WatchEvent<NodeObject>>| event.map_err(|error| this.error(act, error))).boxed())
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        act: &'static str,
        method: Method,
        path: &str,
        content_type: &str,
        body: Option<&Value>,
    ) -> Result<T, ApiError> {
        let mut request = Request::builder().method(method).uri(path).header(ACCEPT, "application/json");
        if !content_type.is_empty() {
            request = request.header(CONTENT_TYPE, content_type);
        }
        self.send(act, request.body(body.map_or(Vec::new(), |body| body.to_string().into_bytes()))).await
    }

    async fn send<T: DeserializeOwned>(&self, act: &'static str, request: http::Result<Request<Vec<u8>>>) -> Result<T, ApiError> {
        let request = request.map_err(|error| self.unreachable(&error))?;
        let client = self.client();
        let answer = tokio::time::timeout(TIMEOUT, client.request(request)).await;
        answer.map_err(|_| self.silent())?.map_err(|error| self.error(act, error))
    }

    fn silent(&self) -> ApiError {
        ApiError::Unreachable { url: self.url.clone(), last: format!("no answer within {} s", TIMEOUT.as_secs()) }
    }

    fn unreachable(&self, error: &dyn Error) -> ApiError {
        ApiError::Unreachable { url: self.url.clone(), last: foreign_text(&chain(error)) }
    }

    fn error(&self, act: &'static str, error: kube::Error) -> ApiError {
        match error {
            kube::Error::Api(status) => ApiError::Refused { act, code: status.code, message: foreign_text(&status.message) },
            // The outermost says nothing.
            kube::Error::Service(error) => self.unreachable(error.as_ref()),
            kube::Error::HyperError(error) => self.unreachable(&error),
            other => self.unreachable(&other),
        }
    }
}

/// An error with all its causes: the outermost says least.
fn chain(error: &dyn Error) -> String {
    let mut texts = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !texts.iter().any(|known| known.contains(&text)) {
            texts.push(text);
        }
        cause = error.source();
    }
    let text = texts.join(": ");
    // The time is in it; one problem is one text.
    text.split(": verification time").next().unwrap_or(&text).to_owned()
}
