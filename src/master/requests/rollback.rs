//! A program that panics on trial: it goes back like one that fails in any other way, with the table
//! as it is now, so that nothing it has heard is lost and its workers are somebody's.
//!
//! Where even that fails, the panic goes on to whoever called, who goes back with the table that the
//! program before has written.

use std::any::Any;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::super::main_loop::{Master, now};
use super::super::policy::event::Action;
use super::super::policy::fleet::Fleet;
use crate::master::upgrade::UpgradeStage;
use crate::sys::signal;

/// What people are told.
pub const PANICKED: &str = "the new program panicked; the log says where";

impl Master<'_> {
    /// Is the master until it has to leave; what a panic on trial ends is handed back. Returns a panic
    /// that it could not get away from.
    pub(crate) fn serve_until_confirmed(&mut self) -> Result<(), Box<dyn Any + Send>> {
        let lived = catch_unwind(AssertUnwindSafe(|| {
            self.report_vanished_workers();
            self.serve();
        }));
        let is_on_trial = self.setup.trial.as_ref().is_some_and(|it| it.can_go_back());
        if lived.is_err() && is_on_trial {
            // A second one, for it is in no good state, leads to the other way back.
            let _ = catch_unwind(AssertUnwindSafe(|| self.roll_back_after_panic()));
            // Whoever goes on hears what was not heard yet.
            signal::block_all();
            self.signals.requeue_pending();
        }
        lived
    }

    /// Becomes the program before. Returns only when that can't be.
    fn roll_back_after_panic(&mut self) {
        self.queue_last_requests();
        let given_up = self.fleet.abandon_reload(PANICKED, now());
        let left = mem::take(&mut self.actions);
        // The other program forks: this one may have panicked because it can't.
        let is_fork = |action: &Action| matches!(action, Action::Fork { .. });
        self.actions = left
            .into_iter()
            .chain(given_up)
            .filter(|it| !is_fork(it))
            .collect();
        self.apply_actions();
        let reason = match mem::take(&mut self.upgrade.stage) {
            UpgradeStage::RollingBack(reason) => reason,
            // Its reload had no verdict to be given: it had not begun.
            _ => PANICKED.to_owned(),
        };
        let table = self.export();
        let pids = |fleet: &Fleet| fleet.pids().all(|pid| self.workers.get(pid).is_some());
        let is_whole = table.workers.living.len() == table.fleet.children.len()
            && Fleet::import(table.fleet.clone(), now()).is_ok_and(|fleet| pids(&fleet));
        let Some(trial) = self.setup.trial.as_ref().filter(|_| is_whole) else {
            return log::error!("upgrade: what the new program knew is of no use any more");
        };
        log::info!("upgrade: goes back to the program before");
        let error = trial.exec_old_with_state(&table, &self.signals, &reason);
        self.workers.allow_requests();
        log::error!("upgrade: the program before can't be executed again: {error}");
    }
}
