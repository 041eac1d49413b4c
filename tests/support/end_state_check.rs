//! What a daemon must be again after a test has done its worst: the same workers, no death, as
//! many descriptors as before.

use std::time::Instant;

use super::{Daemon, PATIENCE, process, wait_for};

/// A daemon as it was.
pub struct Sweep {
    /// Its workers' pids, with the descriptors of each.
    workers: Vec<(i32, usize)>,
}

impl Sweep {
    /// As it is now, at rest: no client connected.
    #[track_caller]
    pub fn of(daemon: &Daemon) -> Self {
        wait_for("a daemon without clients", PATIENCE, || {
            daemon.workers().iter().all(|it| it.connections == 0)
        });
        let pids = daemon.ready_workers();
        Sweep {
            workers: pids
                .into_iter()
                .map(|pid| (pid, process::descriptors_at_rest(pid)))
                .collect(),
        }
    }

    /// The same of a daemon whose workers were replaced: as many, with as many descriptors each.
    #[track_caller]
    pub fn assert_as_many(&self, daemon: &Daemon) {
        let counts = |workers: &[(i32, usize)]| -> Vec<usize> {
            workers
                .iter()
                .map(|&(_, descriptors)| descriptors)
                .collect()
        };
        wait_for("as many descriptors as before", PATIENCE, || {
            counts(&Sweep::of(daemon).workers) == counts(&self.workers)
        });
        process::wait_for_no_zombies(daemon.pid());
    }

    /// The same, and nobody has died.
    #[track_caller]
    pub fn assert_like(&self, daemon: &Daemon) {
        self.assert_as_many(daemon);
        let deaths = daemon.status()["deaths"].take();
        assert_eq!(deaths.as_array().map(Vec::len), Some(0), "{deaths}");
    }

    /// Waits until all connections are gone; fails when anything else has changed.
    #[track_caller]
    pub fn assert_same(&self, daemon: &Daemon) {
        let mut now = Sweep::of(daemon);
        let end = Instant::now() + PATIENCE;
        // who has come and gone may not have been let in yet
        while now.workers != self.workers && Instant::now() < end {
            now = Sweep::of(daemon);
        }
        assert_eq!(now.workers, self.workers, "pids and descriptors of workers");
        let deaths = daemon.status()["deaths"].take();
        assert_eq!(deaths.as_array().map(Vec::len), Some(0), "{deaths}");
        process::wait_for_no_zombies(daemon.pid());
    }
}
