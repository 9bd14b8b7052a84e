//! Bounds the memory of requests that are sent slowly and of answers that are read slowly.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use http_body_util::BodyExt;
use hyper::body::{Bytes, Frame};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Sleep;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tower::Service;

use super::connection::Handle;
use super::limits;

/// The places for answers that are large.
#[derive(Debug, Clone)]
pub(super) struct Slots(Arc<Semaphore>);

/// Held for as long as a large answer is in memory.
#[derive(Debug)]
pub(super) struct Slot {
    _permit: OwnedSemaphorePermit,
    _done: oneshot::Sender<Infallible>,
}

impl Slots {
    pub(super) fn new() -> Slots {
        Slots(Arc::new(Semaphore::new(limits::LARGE_ANSWERS)))
    }

    /// Waits for a place. A client that then does not read its answer in time loses its connection.
    pub(super) async fn take(&self, client: Option<Handle>) -> Result<Arc<Slot>, Status> {
        let permit = self.0.clone().acquire_owned().await.map_err(|_| Status::unavailable("the store is shutting down"))?;
        let (done, mut is_done) = oneshot::channel::<Infallible>();
        if let Some(client) = client {
            tokio::spawn(async move {
                if tokio::time::timeout(limits::READING, &mut is_done).await.is_err() {
                    tracing::debug!("connection closed: its client does not read");
                    client.close();
                }
            });
        }
        Ok(Arc::new(Slot { _permit: permit, _done: done }))
    }
}

/// The services, behind the bounds.
#[derive(Debug, Clone)]
pub(super) struct Guarded {
    routes: Routes,
    /// Bytes of requests in memory.
    bytes: Arc<AtomicUsize>,
}

/// Puts the bounds before the services.
#[derive(Debug, Clone, Default)]
pub(super) struct GuardLayer(Arc<AtomicUsize>);

impl tower::Layer<Routes> for GuardLayer {
    type Service = Guarded;

    fn layer(&self, routes: Routes) -> Guarded {
        Guarded { routes, bytes: self.0.clone() }
    }
}

impl Service<http::Request<Body>> for Guarded {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<http::Request<Body>>::poll_ready(&mut self.routes, cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let account = Arc::new(Account { total: self.bytes.clone(), own: AtomicUsize::new(0) });
        // Only these requests can be large. The others' streams last.
        let request = match request.uri().path().starts_with("/etcdserverpb.KV/") {
            true => request.map(|inner| Body::new(Metered::new(inner, account.clone()))),
            false => request,
        };
        let answer = self.routes.call(request);
        Box::pin(async move {
            let mut response = answer.await?;
            // Until here the decoded request was in memory.
            drop(account);
            Ok(match response.extensions_mut().remove::<Arc<Slot>>() {
                None => response,
                Some(slot) => response.map(|inner| {
                    Body::new(inner.map_frame(move |frame| {
                        let _ = &slot;
                        frame
                    }))
                }),
            })
        })
    }
}

/// The bytes of one request, of all that are in memory.
#[derive(Debug)]
struct Account {
    total: Arc<AtomicUsize>,
    own: AtomicUsize,
}

impl Account {
    /// False if there is no room for so much more.
    fn add(&self, bytes: usize) -> bool {
        self.own.fetch_add(bytes, Ordering::Relaxed);
        self.total.fetch_add(bytes, Ordering::Relaxed) + bytes <= limits::REQUESTS_BYTES
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.total.fetch_sub(*self.own.get_mut(), Ordering::Relaxed);
    }
}

/// The body of a request, counted, and refused if it is sent too slowly.
struct Metered {
    inner: Body,
    account: Arc<Account>,
    late: Pin<Box<Sleep>>,
}

impl Metered {
    fn new(inner: Body, account: Arc<Account>) -> Metered {
        Metered { inner, account, late: Box::pin(tokio::time::sleep(limits::SENDING)) }
    }
}

impl hyper::body::Body for Metered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        match &frame {
            Poll::Ready(Some(Ok(frame))) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len);
                if !self.account.add(bytes) {
                    return Poll::Ready(Some(Err(Status::resource_exhausted("too many large requests at the same time; try again"))));
                }
            }
            Poll::Pending if self.late.as_mut().poll(cx).is_ready() => {
                return Poll::Ready(Some(Err(Status::deadline_exceeded("the request was sent too slowly"))));
            }
            _ => {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_requests_are_bounded_and_given_back() {
        let total = Arc::new(AtomicUsize::new(0));
        let account = || Account { total: total.clone(), own: AtomicUsize::new(0) };
        let first = account();
        assert!(first.add(limits::REQUESTS_BYTES - 10) && !account().add(11));
        assert_eq!(total.load(Ordering::Relaxed), limits::REQUESTS_BYTES - 10, "a refused request gives its bytes back");
        drop(first);
        assert_eq!(total.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn request_that_is_sent_too_slowly_is_refused() {
        let (_send, stream) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, Status>>(1);
        let body = Body::new(http_body_util::StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(stream)));
        let account = Arc::new(Account { total: Arc::default(), own: AtomicUsize::new(0) });
        let mut metered = Metered::new(body, account);
        let error = metered.frame().await.unwrap().unwrap_err();
        assert_eq!(error.code(), tonic::Code::DeadlineExceeded);
    }

    #[tokio::test(start_paused = true)]
    async fn large_answers_wait_for_a_place_and_one_that_is_not_read_loses_its_connection() {
        let slots = Slots::new();
        let client = Handle::default();
        let mut held = Vec::new();
        for _ in 0..limits::LARGE_ANSWERS {
            held.push(slots.take(Some(client.clone())).await.unwrap());
        }
        assert!(tokio::time::timeout(limits::READING / 2, slots.take(None)).await.is_err(), "no place is free");
        assert!(!client.is_closed());
        held.pop();
        slots.take(None).await.unwrap();
        tokio::time::sleep(limits::READING).await;
        assert!(client.is_closed());
    }
}
