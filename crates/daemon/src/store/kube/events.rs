//! Notices as Events of this node's Node, so that `kubectl describe node` shows them.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::Kube;
use super::api::ApiError;
use crate::notice::Notice;

/// The same notice is written at most this often.
const AGAIN: Duration = Duration::from_secs(60);
/// So many at once, and one more each so often: a wrong configuration must not flood the API server.
const BURST: (f64, Duration) = (20.0, Duration::from_secs(10));
/// The API server's limit of a message, in bytes.
const LONGEST: usize = 1024;
/// Notices of which it is remembered when they were written.
const REMEMBERED: usize = 1_000;
/// How long the last notice may hold up the end of the process.
const LAST: Duration = Duration::from_secs(3);

impl Kube {
    /// Writes notices for as long as there are any.
    pub async fn post_all(self, mut notices: mpsc::Receiver<Notice>) {
        let mut written: BTreeMap<String, (Instant, u32)> = BTreeMap::new();
        let mut budget = (BURST.0, Instant::now());
        let mut refused = false;
        while let Some(notice) = notices.recv().await {
            let now = Instant::now();
            let name = name(self.node(), &notice);
            let (at, count) = written.get(&name).copied().unwrap_or((now, 0));
            let tokens = (budget.0 + now.duration_since(budget.1).as_secs_f64() / BURST.1.as_secs_f64()).min(BURST.0);
            budget = (tokens, now);
            if count > 0 && now.duration_since(at) < AGAIN || tokens < 1.0 {
                continue;
            }
            budget.0 -= 1.0;
            if written.len() >= REMEMBERED {
                written.clear();
            }
            written.insert(name.clone(), (now, count + 1));
            match self.api().event(&event(self.node(), &name, &notice), count + 1).await {
                Err(error @ ApiError::Refused { code: 403, .. }) if !refused => {
                    refused = true;
                    tracing::info!(%error, "no right to write Events; problems are logged only");
                }
                Err(error) => tracing::debug!(%error, reason = notice.reason, "cannot write an Event"),
                Ok(()) => {}
            }
        }
    }

    /// Writes the last notice before the process ends.
    pub async fn post_last(&self, notice: Notice) {
        let name = name(self.node(), &notice);
        let event = event(self.node(), &name, &notice);
        let _ = tokio::time::timeout(LAST, self.api().event(&event, 2)).await;
    }
}

/// The same notice of the same node has the same name: it is counted, not written again.
fn name(node: &str, notice: &Notice) -> String {
    let mut hasher = DefaultHasher::new();
    (notice.reason, &notice.text).hash(&mut hasher);
    format!("{node}.{:016x}", hasher.finish())
}

fn event(node: &str, name: &str, notice: &Notice) -> Value {
    let now = now();
    let mut text = notice.text.clone();
    if text.len() > LONGEST {
        let end = (0..=LONGEST - 4).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": { "name": name, "namespace": "default" },
        // kubectl finds the events of a Node by this uid, as kubelet writes it.
        "involvedObject": { "kind": "Node", "name": node, "uid": node },
        "reason": notice.reason,
        "message": text,
        "type": "Warning",
        "source": { "component": "flanneld", "host": node },
        "reportingComponent": "flanneld",
        "reportingInstance": node,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    })
}

/// The time as the API has it, in seconds.
pub(super) fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_is_cut_to_the_limit_and_equal_notices_have_one_name() {
        let notice = Notice::new("PeerUnreachable", "é".repeat(2000));
        let event = event("n1", &name("n1", &notice), &notice);
        let message = event["message"].as_str().unwrap();
        assert!(message.len() <= LONGEST && message.ends_with('…'), "{}", message.len());
        assert_eq!(name("n1", &notice), name("n1", &notice.clone()));
        assert_ne!(name("n1", &notice), name("n1", &Notice::new("PeerUnreachable", "x")));
    }
}
