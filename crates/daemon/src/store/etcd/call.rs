//! One request to whichever endpoint answers, and what its failure means.

use std::sync::atomic::Ordering;
use std::time::Duration;

use thiserror::Error;
use tonic::{Code, Response, Status};

use super::{Etcd, Inner};
use crate::notice::Notice;
use crate::store::connect::Connection;
use crate::store::failure::refusal_advice;
use crate::store::{StoreError, foreign_text};

/// How long an endpoint may take to answer before the next one is asked.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);

/// Why a request to etcd, or the preparation of one, failed.
#[derive(Debug, Clone, Error)]
pub enum EtcdError {
    /// `--etcd-endpoints` cannot be used: the endpoint, and why.
    #[error("--etcd-endpoints {0:?}: {1}")]
    Endpoint(String, String),
    /// Flags contradict each other.
    #[error("{0}")]
    Flags(&'static str),
    /// A certificate or key file cannot be used: the flag, the file, and why.
    #[error("cannot use {0} {1}: {2}")]
    File(&'static str, String, String),
    /// No endpoint answers.
    #[error("no etcd endpoint answers {reasons}")]
    Unreachable {
        /// The endpoints, and why each of them cannot be asked.
        reasons: String,
        /// Did the last one not answer in time?
        is_slow: bool,
    },
    /// etcd answered with an error.
    #[error("etcd refused to {act}: {message}")]
    Refused {
        /// What was asked for.
        act: &'static str,
        /// The answer, and what to do about it.
        message: String,
    },
}

impl From<EtcdError> for StoreError {
    fn from(error: EtcdError) -> StoreError {
        let reason = match &error {
            EtcdError::Endpoint(..) | EtcdError::Flags(_) => return StoreError::Lasting(error.into()),
            EtcdError::File(..) => "BadCertificateFile",
            EtcdError::Unreachable { .. } => "StoreUnreachable",
            EtcdError::Refused { .. } => "StoreRefused",
        };
        StoreError::Passing(Notice::new(reason, error.to_string()))
    }
}

impl Etcd {
    /// Asks the endpoint that answered last, then the others in turn. An endpoint that finds the token too old is asked again with
    /// a new one.
    pub(super) async fn call<T, F, A>(&self, act: &'static str, ask: F) -> Result<T, EtcdError>
    where
        F: Fn(Connection) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_within(TIMEOUT, act, ask).await
    }

    /// The same, with this much time for each endpoint.
    pub(super) async fn call_within<T, F, A>(&self, patience: Duration, act: &'static str, ask: F) -> Result<T, EtcdError>
    where
        F: Fn(Connection) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        let Inner { endpoints, current, .. } = &*self.0;
        let mut failures: Vec<Option<Status>> = vec![None; endpoints.len()];
        let mut is_slow = false;
        let mut tries = endpoints.len();
        let mut logins = 1;
        while tries > 0 {
            let at = current.load(Ordering::Relaxed);
            let answer = async { ask(endpoints.connection(at).await?).await };
            let status = match tokio::time::timeout(patience, answer).await {
                Ok(Ok(answer)) => {
                    endpoints.answered(at);
                    return Ok(answer.into_inner());
                }
                Ok(Err(status)) => status,
                // The time is not in the text: one problem is one text.
                Err(_) => Status::deadline_exceeded("no answer in time"),
            };
            if endpoints.forget_stale_token(&status) && logins > 0 {
                logins -= 1;
                continue;
            }
            let elsewhere =
                matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal);
            if !elsewhere {
                return Err(self.refused(act, &status));
            }
            is_slow = status.code() == Code::DeadlineExceeded;
            failures[at % endpoints.len()] = Some(status);
            tries -= 1;
            // Another task may have moved on already.
            let _ = current.compare_exchange(at, at + 1, Ordering::Relaxed, Ordering::Relaxed);
        }
        endpoints.renew_certificates();
        Err(EtcdError::Unreachable { reasons: self.reasons(failures).await, is_slow })
    }

    /// The text of a refusal, with what to do about it.
    pub(super) fn refused(&self, act: &'static str, status: &Status) -> EtcdError {
        let (user, withheld) = self.0.endpoints.user();
        let advice = refusal_advice(status.message(), user, withheld, &self.0.prefix);
        EtcdError::Refused { act, message: format!("{}{advice}", foreign_text(status.message())) }
    }

    /// Why the endpoints do not answer: one reason for all of them, or one for each, in the order of the list.
    async fn reasons(&self, failures: Vec<Option<Status>>) -> String {
        let endpoints = &self.0.endpoints;
        let mut reasons: Vec<(&str, String)> = Vec::new();
        for (at, (name, status)) in endpoints.names.iter().zip(failures).enumerate() {
            if let Some(status) = status {
                reasons.push((name, endpoints.explain(at, &status).await));
            }
        }
        match reasons.as_slice() {
            [(_, first), rest @ ..] if rest.iter().all(|(_, reason)| reason == first) => {
                format!("({}): {first}", endpoints.names.join(","))
            }
            _ => {
                let each: Vec<String> = reasons.iter().map(|(name, reason)| format!("({name}): {reason}")).collect();
                each.join("; ")
            }
        }
    }
}
