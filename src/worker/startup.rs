//! Starts accepting when the required pool programs are ready, and ends all programs at the exit of a
//! worker.
//!
//! The event loop runs meanwhile, so that orders, signals and the heartbeat work. If a program cannot become ready,
//! this fails with the reason. Then the start or reload that needs the program fails too.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use super::event_loop::EventLoop;
use crate::handler::command::sweep;
use crate::handler::pool::{Hurry, Stage};
use crate::link::message::Report;
use crate::logging;
use crate::sys::event::Reactor;
use crate::sys::process::monotonic_ms;

/// With less time than this (in milliseconds) until the end of the drain, the programs must exit faster.
const PROGRAMS_MS: u64 = 2500;

impl EventLoop {
    /// Accepts no connection while programs are missing.
    pub(super) fn defer_accepting(&mut self, reactor: &mut Reactor) {
        if self.service.threads.pools().main().stage() != Stage::Ready || self.lacks_pools() {
            reactor.pause_listeners();
        }
    }

    /// Returns whether it must wait for a pool process, because a client's call would otherwise wait for
    /// it.
    fn lacks_pools(&self) -> bool {
        self.waits_for_pools
            && !(self.service.forwarding).has_all_pools(self.service.registry.pools().len())
    }

    /// Begins to accept if nothing is missing any more.
    ///
    /// # Errors
    /// Why a program cannot become ready; or the report to the master cannot be sent.
    pub(super) fn start_accepting(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        if self.is_accepting || !self.drain.is_serving() {
            return Ok(());
        }
        match self.service.threads.pools().main().stage() {
            Stage::Starting => {}
            Stage::Failed(reason) => return Err(io::Error::other(reason)),
            Stage::Ready if self.lacks_pools() => {}
            Stage::Ready => {
                self.is_accepting = true;
                self.resume_listening(reactor);
                // If this report cannot be sent, the worker exits: the master would end it at boot-timeout anyway.
                // The log is forwarded until then, so that the master gets the reason.
                self.report(Report::Ready)?;
                logging::stop_forwarding();
            }
        }
        Ok(())
    }

    /// Ends all programs of pools and commands. Calls that waited for them are already answered.
    pub(super) fn end_programs(&mut self, reactor: &mut Reactor) {
        self.service.threads.pools().release_all_programs();
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
