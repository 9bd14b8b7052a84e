//! Tasks of clients that have not proved themselves yet. They are bounded, and no flood of them shuts out another client: a new one
//! takes the place of the oldest, of the address that has most.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;

use tokio::task::AbortHandle;

/// The tasks, oldest first.
#[derive(Debug)]
pub(crate) struct Newcomers {
    tasks: VecDeque<(IpAddr, AbortHandle)>,
    most: usize,
}

impl Newcomers {
    /// At most this many tasks.
    pub(crate) fn new(most: usize) -> Newcomers {
        Newcomers { tasks: VecDeque::new(), most }
    }

    /// Adds a task; if there is no place, another one is ended.
    pub(crate) fn add(&mut self, from: IpAddr, task: AbortHandle) {
        self.tasks.retain(|(_, task)| !task.is_finished());
        if self.tasks.len() >= self.most {
            let mut counts: BTreeMap<IpAddr, usize> = BTreeMap::new();
            self.tasks.iter().for_each(|(from, _)| *counts.entry(*from).or_default() += 1);
            let most = counts.values().copied().max().unwrap_or(0);
            if let Some(at) = self.tasks.iter().position(|(from, _)| counts.get(from) == Some(&most))
                && let Some((_, oldest)) = self.tasks.remove(at)
            {
                oldest.abort();
            }
        }
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
        let mut add = |from| {
            let task = tokio::spawn(std::future::pending::<()>());
            newcomers.add(from, task.abort_handle());
            task
        };
        let first = [add(one), add(two), add(two), add(two)];
        let more = [add(two), add(two), add(one)];
        tokio::task::yield_now().await;
        assert_eq!(first.each_ref().map(|task| task.is_finished()), [false, true, true, true]);
        assert_eq!(more.each_ref().map(|task| task.is_finished()), [false, false, false]);
    }
}
