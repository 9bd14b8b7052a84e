//! The embedded store without file and port, for the simulation: the same state and the same services, in this process.

use tonic::service::Routes;

use super::engine;
use super::server::Service;
use super::state::State;

/// A store in memory. Clones are the same store.
#[derive(Debug, Clone)]
pub struct Memory(engine::Memory);

/// The data of a store at some time.
#[derive(Debug, Clone)]
pub struct Backup(State);

impl Default for Memory {
    fn default() -> Memory {
        Memory(engine::Memory::new())
    }
}

impl Memory {
    /// Its services, as a server would mount them.
    pub fn routes(&self) -> Routes {
        Service::new(self.0.engine(), "http://127.0.0.1:2379".to_owned()).routes()
    }

    /// Ends the leases that have expired.
    pub fn tick(&self) {
        self.0.with(|_, _| ());
    }

    /// Its present data.
    pub fn backup(&self) -> Backup {
        self.0.with(|state, _| Backup(state.clone()))
    }

    /// Restores a backup: the revision goes backwards. Leases get their whole life again, as when a server starts.
    pub fn restore(&self, backup: &Backup) {
        self.0.with(|state, now| {
            *state = backup.0.clone();
            state.renew_leases(now);
        });
    }

    /// Compacts its history, so that a watch that comes back too late must list again.
    pub fn compact(&self) {
        // There may be nothing to compact.
        let _ = self.0.with(|state, _| state.compact(state.revision()));
    }
}
