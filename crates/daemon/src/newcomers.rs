//! Tasks of clients that have not proved themselves yet. They are bounded, and no flood of them shuts out another client: a new one
//! takes the place of the oldest, of the address that has most.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;

/// The tasks, oldest first.
#[derive(Debug)]
pub(crate) struct Newcomers {
    tasks: VecDeque<(IpAddr, AbortHandle)>,
    places: Arc<Semaphore>,
}

/// A place; the task holds it until it ends, with its descriptor.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Newcomers {
    /// At most this many tasks.
    pub(crate) fn new(most: usize) -> Newcomers {
        Newcomers { tasks: VecDeque::new(), places: Arc::new(Semaphore::new(most)) }
    }

    /// A place for one more task. If there is none, another task is ended, and this waits until it has.
    pub(crate) async fn place(&mut self) -> Place {
        self.tasks.retain(|(_, task)| !task.is_finished());
        if self.places.available_permits() == 0 {
            let mut counts: BTreeMap<IpAddr, usize> = BTreeMap::new();
            self.tasks.iter().for_each(|(from, _)| *counts.entry(*from).or_default() += 1);
            let most = counts.values().copied().max().unwrap_or(0);
            if let Some(at) = self.tasks.iter().position(|(from, _)| counts.get(from) == Some(&most))
                && let Some((_, oldest)) = self.tasks.remove(at)
            {
                oldest.abort();
            }
        }
        // It is never closed.
        Place { _permit: self.places.clone().acquire_owned().await.ok() }
    }

    /// Notes the task that got the place.
    pub(crate) fn add(&mut self, from: IpAddr, task: AbortHandle) {
        self.tasks.push_back((from, task));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_task_of_the_busiest_address_is_ended() {
        let [one, two]: [IpAddr; 2] = ["192.0.2.1", "192.0.2.2"].map(|text| text.parse().unwrap());
        let mut newcomers = Newcomers::new(4);
        let mut tasks = Vec::new();
        for from in [one, two, two, two, two, two, one] {
            let place = newcomers.place().await;
            let task = tokio::spawn(async move {
                let _place = place;
                std::future::pending::<()>().await;
            });
            newcomers.add(from, task.abort_handle());
            tasks.push(task);
        }
        let ended: Vec<bool> = tasks.iter().map(|task| task.is_finished()).collect();
        assert_eq!(ended, [false, true, true, true, false, false, false]);
    }
}
