//! Checks the state of a daemon after a disruptive test: it must have the same workers, no death, and the same number
//! of descriptors as before.

use std::time::Instant;

use super::{Daemon, PATIENCE, process, wait_for};

/// The recorded state of a daemon.
pub struct Sweep {
    /// The pids of its workers, with the number of descriptors of each.
    workers: Vec<(i32, usize)>,
}

impl Sweep {
    /// Records the current state, without connected clients.
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

    /// Returns whether workers have the same numbers of descriptors as before. Links to other workers are
    /// made when they are first needed, and stay: each costs two descriptors.
    fn are_as_many(&self, now: &Sweep) -> bool {
        let links = 2 * self.workers.len().saturating_sub(1);
        self.workers.len() == now.workers.len()
            && (self.workers.iter().zip(&now.workers))
                .all(|((_, before), (_, now))| now.abs_diff(*before) <= links)
    }

    /// Asserts that a daemon whose workers may have been replaced has the same number of workers as before, with the
    /// same numbers of descriptors.
    #[track_caller]
    pub fn assert_as_many(&self, daemon: &Daemon) {
        wait_for("as many descriptors as before", PATIENCE, || {
            self.are_as_many(&Sweep::of(daemon))
        });
        process::wait_for_no_zombies(daemon.pid());
    }

    /// Asserts the same as `assert_as_many`, and that no worker has died.
    #[track_caller]
    pub fn assert_like(&self, daemon: &Daemon) {
        self.assert_as_many(daemon);
        let deaths = daemon.status()["deaths"].take();
        assert_eq!(deaths.as_array().map(Vec::len), Some(0), "{deaths}");
    }

    /// Waits until all connections are gone; fails if anything else has changed.
    #[track_caller]
    pub fn assert_same(&self, daemon: &Daemon) {
        let mut now = Sweep::of(daemon);
        let end = Instant::now() + PATIENCE;
        // A client that has already disconnected may not have been accepted yet, so try again.
        let pids =
            |sweep: &Sweep| -> Vec<i32> { sweep.workers.iter().map(|(pid, _)| *pid).collect() };
        let is_same = |now: &Sweep| pids(now) == pids(self) && self.are_as_many(now);
        while !is_same(&now) && Instant::now() < end {
            now = Sweep::of(daemon);
        }
        assert!(
            is_same(&now),
            "pids and descriptors of workers: {:?} instead of {:?}",
            now.workers,
            self.workers
        );
        let deaths = daemon.status()["deaths"].take();
        assert_eq!(deaths.as_array().map(Vec::len), Some(0), "{deaths}");
        process::wait_for_no_zombies(daemon.pid());
    }
}
