//! From the fork to the first connection, and back to nobody: a worker serves when the programs of
//! its pools are ready, and takes them along when it leaves.
//!
//! It turns its loop meanwhile, so that orders and signals are heard and the heart beats. Fails with
//! the reason why a program can't be had: a start or a reload that needs it fails with it then.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use super::event_loop::EventLoop;
use crate::handler::command::sweep;
use crate::handler::pool::{Hurry, Stage};
use crate::link::message::Report;
use crate::logging;
use crate::sys::event::Reactor;
use crate::sys::process::monotonic_ms;

/// With less time than that until its drain is over, a worker's programs have to hurry.
const PROGRAMS_MS: u64 = 2500;

impl EventLoop {
    /// Takes no connection as long as programs are missing.
    pub(super) fn defer_accepting(&mut self, reactor: &mut Reactor) {
        if self.service.threads.pools().stage() != Stage::Ready || self.lacks_pools() {
            reactor.pause_listeners();
        }
    }

    /// Whether it is to wait for a pool process. A client's call would wait for that otherwise.
    fn lacks_pools(&self) -> bool {
        self.waits_for_pools && !self.service.has_all_pools()
    }

    /// Begins to serve, once that is possible.
    pub(super) fn start_accepting(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        if self.is_accepting || !self.drain.is_serving() {
            return Ok(());
        }
        match self.service.threads.pools().stage() {
            Stage::Starting => {}
            Stage::Failed(reason) => return Err(io::Error::other(reason)),
            Stage::Ready if self.lacks_pools() => {}
            Stage::Ready => {
                self.is_accepting = true;
                self.resume_listening(reactor);
                // One that the master does not know of would be ended at boot-timeout.
                self.report(Report::Ready)?;
                logging::stop_forwarding();
            }
        }
        Ok(())
    }

    /// Ends all programs, of pools and of commands: who still waits for one has been answered.
    pub(super) fn end_programs(&mut self, reactor: &mut Reactor) {
        self.service.threads.pools().send_home();
        self.settle_programs(reactor);
        let record = self.service.record;
        let hurry = match self.master_gone.is_some() {
            _ if self.drain.is_at_once() => Hurry::AtOnce,
            true => Hurry::Some,
            // The master does not wait much longer than the drain may last.
            false if self.drain.stop_hook_budget_ms(self.service.now_ms) < Some(PROGRAMS_MS) => {
                Hurry::Some
            }
            false => Hurry::None,
        };
        self.service.threads.pools().leave(hurry, || {
            record.heartbeat_ms.store(monotonic_ms(), Relaxed);
        });
        sweep::kill_all();
    }
}
