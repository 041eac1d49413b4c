//! Runs the event loop of the jobs process: frames of workers, replies of the store, orders of the master.
//!
//! It waits only in `Reactor::poll_once`, and never for the store, whose threads report by a waker. It ends when it
//! was ordered to and everything that it has read is answered, or at the deadline of the order.

use std::io;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::attempts;
use super::calls;
use super::commands;
use super::core::JobsCore;
use super::frames;
use super::links::{LINK_BASE, LinkEnd};
use super::replies::{self, StoreStep};
use super::status;
use super::ticket::Ticket;
use crate::jobs::rules;
use crate::jobs::store::request::StoreRequest;
use crate::link::call_frame::Frame;
use crate::link::channel::{Received, WorkerEnd};
use crate::link::ids::{Generation, Pid};
use crate::link::message::{Message, Order, Report};
use crate::link::scoreboard::{JOBS_LANE, WorkerRecord};
use crate::logging;
use crate::sys::event::{Completion, Driver, Reactor};
use crate::sys::process::monotonic_ms;
use crate::sys::signal::{self, SignalPipe};
use crate::sys::waker::Waker;
use crate::worker::peer::shown_generation;

/// The numbers under which other descriptors than links are watched.
pub const SIGNALS: u16 = 0;
pub const LINK: u16 = 1;
pub const WAKER: u16 = 2;

/// The time between two heartbeats, at most.
const TICK_MS: u64 = 1_000;
/// There are at least this many heartbeats in the time after which the master misses them.
const TICKS_PER_TIMEOUT: u64 = 4;
/// How often the store is checked for changes by another jobs process, while there is one, in milliseconds.
const LOOK_MS: u64 = 100;
const PIECE_LEN: usize = 64 * 1024;
/// The capacity that the record shows. It has no real limit, because calls wait for the store and not for capacity. The
/// workers limit their bytes.
const ROOM: u32 = 1 << 20;
/// How long the last group may take if the process must exit at once.
const AT_ONCE_MS: u64 = 300;
/// How long the store may take to close after the deadline of a drain.
const CLOSE_MS: u64 = 500;

/// The stage of its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LoopStage {
    /// The store was not tried yet.
    Starting,
    Serving,
    /// It takes no calls, and closes the store when all is answered. `is_stop` says that no other jobs process follows.
    Draining {
        until_ms: u64,
        is_stop: bool,
    },
    /// The store is being closed.
    Closing {
        until_ms: u64,
    },
    Ended,
}

/// What the loop is made of.
pub struct LoopParts {
    pub core: JobsCore,
    pub link: WorkerEnd,
    pub signals: SignalPipe,
    pub waker: Arc<Waker>,
    pub generation: Generation,
    pub record: &'static WorkerRecord,
    /// The longest drain if the master cannot order one any more.
    pub drain_timeout: Duration,
    /// After this time without a heartbeat the master replaces the process.
    pub heartbeat_timeout: Duration,
    pub show_draining: Box<dyn Fn()>,
}

/// The event loop.
pub struct JobsLoop {
    parts: LoopParts,
    stage: LoopStage,
    /// Why it must exit with an error.
    failure: Option<String>,
    /// When the link to the master ended, in milliseconds (CLOCK_MONOTONIC).
    master_gone: Option<u64>,
    tick_ms: u64,
    next_tick_ms: u64,
    /// When the store is checked next for changes by another process, in milliseconds (CLOCK_MONOTONIC).
    look_ms: u64,
    /// Whether there was another jobs process at the last look.
    had_other: bool,
    piece: Vec<u8>,
    /// Whether calls have arrived since the record was written.
    is_stale: bool,
}

impl JobsLoop {
    pub fn new(parts: LoopParts) -> Self {
        let heartbeat_ms = rules::milliseconds(parts.heartbeat_timeout);
        JobsLoop {
            parts,
            tick_ms: TICK_MS.min(heartbeat_ms / TICKS_PER_TIMEOUT),
            stage: LoopStage::Starting,
            failure: None,
            master_gone: None,
            next_tick_ms: 0,
            look_ms: 0,
            had_other: false,
            piece: vec![0; PIECE_LEN],
            is_stale: false,
        }
    }

    /// Serves until it is time to exit.
    ///
    /// # Errors
    /// If the reactor fails, the report to the master fails, or the store cannot be used.
    pub fn run(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        self.beat();
        while self.stage != LoopStage::Ended {
            let core = &self.parts.core;
            let next_ms = [
                Some(self.next_tick_ms),
                calls::next_ms(core),
                core.commands.next_ms(),
                attempts::next_ms(core),
                self.look_due().then_some(self.look_ms),
                self.stage_deadline(),
            ];
            let next_ms = next_ms.into_iter().flatten().min().unwrap_or(u64::MAX);
            let wait_ms = next_ms.saturating_sub(monotonic_ms());
            reactor.poll_once(wait_ms.min(self.tick_ms), self)?;
            self.take_store_events()?;
            calls::pass_time(&mut self.parts.core);
            commands::take_tasks(&mut self.parts.core);
            commands::pass_time(&mut self.parts.core);
            self.look_at_store();
            attempts::pass_time(&mut self.parts.core, self.parts.record);
            self.parts.core.links.settle(reactor);
            self.publish();
            self.leave_without_master();
            self.advance();
        }
        match self.failure.take() {
            None => Ok(()),
            Some(reason) => Err(io::Error::other(reason)),
        }
    }

    fn beat(&mut self) {
        self.parts.core.now_ms = monotonic_ms();
        let heartbeat_ms = &self.parts.record.heartbeat_ms;
        heartbeat_ms.store(self.parts.core.now_ms, Relaxed);
    }

    /// Shows in the scoreboard that calls may be sent here, and does what is due once per second.
    fn publish(&mut self) {
        let (core, record) = (&self.parts.core, self.parts.record);
        record.calls.store(core.calls, Relaxed);
        record.running.store(core.awaited.len() as u32, Relaxed);
        if self.is_stale {
            self.is_stale = false;
            record.capacity_epoch.fetch_add(1, Relaxed);
        }
        if core.now_ms >= self.next_tick_ms {
            self.next_tick_ms = core.now_ms + self.tick_ms;
            logging::report_lost_lines();
            let lost = u32::try_from(logging::lost_lines()).unwrap_or(u32::MAX);
            record.lost_lines.store(lost, Relaxed);
            status::count(&mut self.parts.core);
        }
    }

    /// Lets workers send calls, once the store is open or is known to be away.
    fn serve(&mut self) -> io::Result<()> {
        if self.stage != LoopStage::Starting {
            return Ok(());
        }
        self.stage = LoopStage::Serving;
        let record = self.parts.record;
        record.lane.store(JOBS_LANE, Relaxed);
        record.idle.store(ROOM, Relaxed);
        let shown = shown_generation(self.parts.generation.0);
        record.generation.store(shown, Relaxed);
        record.capacity_epoch.fetch_add(1, Relaxed);
        self.report(Report::Ready)?;
        logging::stop_forwarding();
        Ok(())
    }

    fn report(&self, body: Report) -> io::Result<()> {
        let message = Message {
            pid: Pid::current(),
            generation: self.parts.generation,
            body,
        };
        match self.parts.link.send(message, None) {
            // If the master is gone, the end of the link shows it.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            _ => Ok(()),
        }
    }

    fn take_store_events(&mut self) -> io::Result<()> {
        while let Some(event) = self.parts.core.store.next_event() {
            match replies::handle(&mut self.parts.core, event) {
                None => {}
                Some(StoreStep::Serve) => self.serve()?,
                Some(StoreStep::Fail(reason)) => {
                    self.failure = Some(reason);
                    self.stage = LoopStage::Ended;
                }
                Some(StoreStep::Closed) => self.stage = LoopStage::Ended,
            }
        }
        Ok(())
    }

    /// Returns whether another process may store jobs that are due here, and end jobs for which calls wait. Also true
    /// once after its end, because its last changes are seen only then.
    fn look_due(&self) -> bool {
        self.had_other || self.parts.core.has_other()
    }

    fn look_at_store(&mut self) {
        let core = &mut self.parts.core;
        if core.now_ms < self.look_ms {
            return;
        }
        let has_other = core.has_other();
        if !mem::replace(&mut self.had_other, has_other) && !has_other {
            return;
        }
        self.look_ms = core.now_ms + LOOK_MS;
        attempts::look(core);
        attempts::look_at_running(core, !has_other);
        calls::look(core);
    }

    fn orders(&mut self, reactor: &mut Reactor) {
        loop {
            match self.parts.link.receive() {
                Received::Message(message, descriptor) => match (message.body, descriptor) {
                    (Order::Drain(limit), _) => self.drain(limit, false),
                    (Order::Stop(limit), _) => self.drain(limit, true),
                    (Order::EndClaims, _) => self.parts.core.executors.leave(),
                    (Order::ExecutorEnded(end), _) => {
                        attempts::executor_ended(&mut self.parts.core, end);
                    }
                    (Order::LinkPool(ends), Some(fd)) => {
                        let core = &mut self.parts.core;
                        if let Some(record) = core.records.0.get(usize::from(ends.record)) {
                            core.links.add(fd, LinkEnd::Executor(record));
                        }
                    }
                    (Order::SessionLink(link), Some(fd)) => {
                        if let Some(surplus) = self.parts.core.links.surplus_of(link.session) {
                            self.end_link(surplus, reactor);
                        }
                        let end = LinkEnd::Session(link.session);
                        self.parts.core.links.add(fd, end);
                    }
                    (Order::JobCommand, Some(connection)) => {
                        self.parts.core.commands.serve(connection);
                    }
                    (Order::ReopenLog, Some(file)) => {
                        drop(logging::set_output(logging::LogOutput::received(file)));
                    }
                    _ => {}
                },
                Received::Garbage | Received::WithDescriptors(_) => {
                    log::warn!("the master sent an invalid order");
                }
                Received::Empty => return,
                Received::End => {
                    reactor.unwatch(LINK);
                    self.master_gone = Some(self.parts.core.now_ms);
                    if self.stage == LoopStage::Starting {
                        self.stage = LoopStage::Ended;
                    }
                    return;
                }
            }
        }
    }

    fn end_link(&mut self, link: u64, reactor: &mut Reactor) {
        self.parts.core.links.remove(link, reactor);
        frames::end(&mut self.parts.core, link);
    }

    fn on_signal(&mut self) {
        for signal in self.parts.signals.take() {
            match signal {
                Signal::SIGQUIT => self.close(AT_ONCE_MS),
                _ if self.master_gone.is_some() => self.drain(self.parts.drain_timeout, false),
                // It serves until the master orders it to exit, because workers need it.
                _ if matches!(self.stage, LoopStage::Starting | LoopStage::Serving) => {
                    let _ = self.report(Report::Retiring);
                }
                // The deadline of a drain has passed.
                _ => self.close(CLOSE_MS),
            }
        }
    }

    /// Takes no further call, and answers all waits with the record as it is.
    fn drain(&mut self, limit: Duration, is_stop: bool) {
        let limit_ms = rules::milliseconds(limit);
        let core = &mut self.parts.core;
        let mut until_ms = core.now_ms.saturating_add(limit_ms);
        let mut is_stop = is_stop;
        match self.stage {
            LoopStage::Starting | LoopStage::Serving => {}
            // An earlier order holds: its deadline, and that no other jobs process follows.
            LoopStage::Draining {
                until_ms: earlier,
                is_stop: was_stop,
            } => {
                until_ms = until_ms.min(earlier);
                is_stop |= was_stop;
            }
            LoopStage::Closing { .. } | LoopStage::Ended => return,
        }
        if !core.is_draining {
            core.is_draining = true;
            core.executors.leave();
            self.parts.record.idle.store(0, Relaxed);
            core.links.queue_all(&Frame::Leave);
            let jobs = core.waits.finish_all();
            calls::read(core, jobs);
            (self.parts.show_draining)();
        }
        self.stage = LoopStage::Draining { until_ms, is_stop };
    }

    /// Ends a process whose master is gone, when no process uses it any more, or after `drain-timeout`. It claims
    /// nothing more once the master has died, or another jobs process has followed.
    fn leave_without_master(&mut self) {
        // The executors that are left exit soon. At an upgrade, they serve until the new program has a jobs process.
        if self.master_gone.is_some()
            && (signal::parent_died_ms().is_some() || self.parts.core.has_other())
        {
            self.parts.core.executors.leave();
        }
        if let Some(since_ms) = self.master_gone
            && self.stage == LoopStage::Serving
        {
            let limit = self.parts.drain_timeout;
            let limit_ms = rules::milliseconds(limit);
            let core = &self.parts.core;
            if core.links.is_empty() || core.now_ms >= since_ms.saturating_add(limit_ms) {
                self.drain(limit, false);
            }
        }
    }

    fn stage_deadline(&self) -> Option<u64> {
        match self.stage {
            LoopStage::Draining { until_ms, .. } | LoopStage::Closing { until_ms } => {
                Some(until_ms)
            }
            LoopStage::Starting | LoopStage::Serving | LoopStage::Ended => None,
        }
    }

    /// Does the next step of a drain.
    fn advance(&mut self) {
        let core = &mut self.parts.core;
        match self.stage {
            LoopStage::Draining { until_ms, is_stop } => {
                let is_done = core.executors.is_settled()
                    && core.store.is_settled()
                    && core.waits.is_empty()
                    && core.links.are_sent();
                if is_done && is_stop && !core.has_other() {
                    let own = core.instance;
                    core.store.submit(StoreRequest::Leave(own), Ticket::Leave);
                }
                if is_done || core.now_ms >= until_ms {
                    self.close(CLOSE_MS);
                }
            }
            LoopStage::Closing { until_ms } if core.now_ms >= until_ms => {
                self.stage = LoopStage::Ended;
            }
            _ => {}
        }
    }

    /// Closes the store behind what was submitted, within this time.
    fn close(&mut self, limit_ms: u64) {
        let core = &mut self.parts.core;
        let mut until_ms = core.now_ms + limit_ms;
        match self.stage {
            LoopStage::Ended => return,
            LoopStage::Closing { until_ms: earlier } => until_ms = until_ms.min(earlier),
            _ => {
                core.is_draining = true;
                core.store.close();
            }
        }
        self.stage = LoopStage::Closing { until_ms };
    }
}

impl Driver for JobsLoop {
    fn woken(&mut self) {
        self.beat();
    }

    fn complete(&mut self, reactor: &mut Reactor, completion: Completion<'_>) {
        match completion {
            Completion::Readable { watch: SIGNALS } => self.on_signal(),
            Completion::Readable { watch: LINK } => self.orders(reactor),
            Completion::Readable { watch: WAKER } => self.parts.waker.clear(),
            Completion::Readable { watch } if watch >= LINK_BASE => {
                let core = &mut self.parts.core;
                let before = core.calls;
                if let Some(link) = core.links.of_watch(watch)
                    && !frames::receive(core, link, &mut self.piece)
                {
                    self.end_link(link, reactor);
                }
                // Publish only after calls. If an offer made this process publish, the other side would offer again,
                // without end.
                self.is_stale |= self.parts.core.calls != before;
            }
            // It has no listeners and no connections.
            _ => {}
        }
    }
}
