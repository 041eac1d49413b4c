//! Runs an acceptor: accepts on one isolated listener, and has a process for each of its connections.
//!
//! It forks, so it has one thread for life. It parses nothing that a client sends. `sessions` forks the
//! processes, gives them connections and reaps them. The master sends it orders. If the master dies, the
//! acceptor ends with its last session. An error that it cannot handle ends it; then the master starts
//! another one, and the sessions continue.

mod accepting;
mod handover;
mod held;
mod records;
mod rejoined;
mod session;
mod sessions;
mod sources;

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::Signal;

use crate::config::IsolationConfig;
use crate::link::channel::Received;
use crate::link::ids::Pid;
use crate::link::message::{Message, Order, Report, SessionLink};
use crate::link::session_draining::{Draining, LOOK_MS};
use crate::link::session_limits::OVERDUE_MS;
use crate::logging;
use crate::sys::process::monotonic_ms;
use crate::sys::signal::SignalPipe;
use crate::worker;
use crate::worker::peer::{has_all_pools, shown_generation};
use crate::worker_init::WorkerInit;
use accepting::{Accepting, FIRST_SESSION, LISTENER, QUEUE, REFUSED};
use sources::warn_of_limits;

/// The time between two heartbeats.
const TICK_MS: u64 = 500;
/// If the master dies, its link may end this long before its pipe, in milliseconds. Only the end of the pipe shows
/// that the master has died. This is also the time between two checks whether the program after an upgrade serves.
const DECIDE_MS: u64 = 50;
/// The time between two checks whether all pool processes serve.
const POOL_LOOK_MS: u64 = 10;
/// A process is forked ahead when this time has passed without an event, because the fork would delay the session that
/// has just got a connection.
const QUIET_MS: u8 = 1;
/// The largest number of events that are taken from the kernel at once.
const BATCH: usize = 64;

/// The event number of the link.
const LINK: u64 = 0;
const SIGNALS: u64 = 1;

/// Runs the acceptor in a new child, with all signals blocked.
pub fn run(boot: WorkerInit<'_>) -> ! {
    worker::run_as(boot, live)
}

fn live(mut boot: WorkerInit<'_>) -> Result<(), (&'static str, io::Error)> {
    let is_awaited = boot.startup_log_tx.is_some();
    logging::start_forwarding(boot.startup_log_tx.take());
    let (signals, _) = worker::post_fork::init_worker_process(&mut boot)?;
    logging::init_acceptor_log(boot.slot.0);
    let isolation = boot.isolation().cloned();
    let isolation = isolation.ok_or(("start", io::Error::other("its listener is not isolated")))?;
    warn_of_limits(&boot, &isolation);
    worker::session::warm_up();
    let mut acceptor = Acceptor::new(boot, signals, isolation)
        .map_err(|error| ("create its event loop", error))?;
    acceptor.waits_for_pools = is_awaited;
    acceptor.serve().map_err(|error| ("serve", error))
}

/// The stage of its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Until a session has shown that it can start.
    Starting,
    /// Until the pool processes serve.
    Proven,
    Serving,
    /// The link to the master has ended. It is not known yet whether the master has died or was upgraded. After an
    /// upgrade, it is not known whether the new program accepts connections already.
    Undecided {
        look_at_ms: u64,
    },
    /// Accepts nothing more, and exits after its last session.
    Leaving {
        until_ms: u64,
    },
    /// Exits. The master adopts its sessions.
    Replaced,
}

struct Acceptor<'a> {
    accepting: Accepting<'a>,
    stage: Stage,
    /// Whether it accepts only when all pool processes serve, because clients would otherwise wait for them.
    waits_for_pools: bool,
    draining: Draining,
    next_tick_ms: u64,
    /// Whether the link to the master is open.
    is_linked: bool,
}

impl<'a> Acceptor<'a> {
    fn new(
        boot: WorkerInit<'a>,
        signals: SignalPipe,
        isolation: IsolationConfig,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let event = |number| EpollEvent::new(EpollFlags::EPOLLIN, number);
        epoll.add(boot.link.as_fd(), event(LINK))?;
        epoll.add(signals.as_fd(), event(SIGNALS))?;
        Ok(Acceptor {
            accepting: Accepting::new(boot, signals, epoll, isolation)?,
            stage: Stage::Starting,
            waits_for_pools: false,
            draining: Draining::default(),
            next_tick_ms: 0,
            is_linked: true,
        })
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); BATCH];
        loop {
            let count = match self.accepting.epoll.wait(&mut events, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => return Err(error.into()),
            };
            self.accepting.now_ms = monotonic_ms();
            let heartbeat_ms = &self.accepting.boot.record.heartbeat_ms;
            heartbeat_ms.store(self.accepting.now_ms, Relaxed);
            for event in &events[..count] {
                match event.data() {
                    LINK => self.orders(),
                    SIGNALS => self.on_signals()?,
                    LISTENER => handover::accept(&mut self.accepting, false),
                    QUEUE if self.stage == Stage::Serving => {
                        handover::adopt(&mut self.accepting, false)
                    }
                    QUEUE => {}
                    REFUSED => self.accepting.serve_refused(),
                    number => self.receive_reports((number - FIRST_SESSION) as usize),
                }
            }
            self.pass_time();
            if self.may_fork_ahead() && (count == 0 || self.is_fork_urgent()) {
                self.accepting.refill(self.is_starting())?;
            }
            match self.stage {
                Stage::Leaving { .. } if self.accepting.is_done() => return Ok(()),
                Stage::Replaced => return Ok(()),
                _ => {}
            }
        }
    }

    fn is_listening_due(&self) -> bool {
        let at = self.accepting.resume_at_ms();
        at.is_some_and(|at| at <= self.accepting.now_ms)
    }

    fn is_starting(&self) -> bool {
        matches!(self.stage, Stage::Starting | Stage::Proven)
    }

    fn may_fork_ahead(&self) -> bool {
        self.is_starting() || self.stage == Stage::Serving
    }

    /// Whether the next process must not wait for a quiet moment.
    fn is_fork_urgent(&self) -> bool {
        self.is_starting() || self.accepting.is_short_of_spares()
    }

    fn timeout(&self) -> EpollTimeout {
        if self.may_fork_ahead() && self.accepting.may_refill(self.is_starting()) {
            return match self.is_fork_urgent() {
                true => EpollTimeout::ZERO,
                false => QUIET_MS.into(),
            };
        }
        let mut next = self.next_tick_ms;
        if self.stage == Stage::Serving {
            next = next.min(self.accepting.resume_at_ms().unwrap_or(u64::MAX));
        }
        next = next.min(self.accepting.refused_until_ms().unwrap_or(u64::MAX));
        next = next.min(match self.stage {
            Stage::Proven => self.accepting.now_ms + POOL_LOOK_MS,
            Stage::Starting | Stage::Serving | Stage::Replaced => u64::MAX,
            Stage::Undecided { look_at_ms } => look_at_ms,
            Stage::Leaving { until_ms } => until_ms + OVERDUE_MS,
        });
        if self.draining.has_waiting() {
            next = next.min(self.accepting.now_ms + LOOK_MS);
        }
        // One more millisecond, because the wait is rounded down and would end too early.
        let wait = next.saturating_sub(self.accepting.now_ms).min(TICK_MS) + 1;
        EpollTimeout::try_from(Duration::from_millis(wait)).unwrap_or(EpollTimeout::ZERO)
    }

    fn pass_time(&mut self) {
        if self.accepting.now_ms >= self.next_tick_ms {
            self.next_tick_ms = self.accepting.now_ms + TICK_MS;
            logging::report_lost_lines();
            self.accepting.tick();
        }
        if (self.accepting.refused_until_ms()).is_some_and(|at| at <= self.accepting.now_ms) {
            self.accepting.serve_refused();
        }
        match self.stage {
            Stage::Proven => self.start_serving(),
            Stage::Serving if self.is_listening_due() => handover::listen(&mut self.accepting),
            Stage::Undecided { look_at_ms } if self.accepting.now_ms >= look_at_ms => self.decide(),
            Stage::Leaving { until_ms } if self.accepting.now_ms >= until_ms + OVERDUE_MS => {
                self.accepting.sessions.kill_all();
            }
            _ => {}
        }
        self.drain_next();
        let open = u32::try_from(self.accepting.sessions.open()).unwrap_or(u32::MAX);
        self.accepting.boot.record.connections.store(open, Relaxed);
    }

    fn report(&mut self, body: Report) {
        let message = Message {
            pid: Pid::current(),
            generation: self.accepting.boot.generation,
            body,
        };
        if let Err(error) = self.accepting.boot.link.send(message, None)
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            let text = format!("could not report {body:?} to the master: {error}");
            self.accepting.warn(&text);
        }
    }

    /// Handles the reports of a session.
    fn receive_reports(&mut self, session: usize) {
        for report in self
            .accepting
            .sessions
            .reports(session, &self.accepting.epoll)
        {
            match report {
                Report::Ready if self.stage == Stage::Starting => {
                    self.stage = Stage::Proven;
                    self.start_serving();
                }
                Report::LinkWanted(record) if self.accepting.may_ask(session, record) => {
                    let session = self.accepting.sessions.records.place(session) as u32;
                    self.report(Report::SessionLink(SessionLink {
                        session,
                        record: u16::try_from(record).unwrap_or(u16::MAX),
                        lane: 0,
                    }));
                }
                _ => {}
            }
        }
    }

    /// Begins to accept if it need not wait for a pool process.
    fn start_serving(&mut self) {
        let boot = &self.accepting.boot;
        let generation = shown_generation(boot.generation.0);
        let pools = boot.registry.pools().len();
        if self.waits_for_pools
            && !has_all_pools(boot.records.0, generation, &boot.kept_lanes, pools)
        {
            return;
        }
        self.stage = Stage::Serving;
        handover::listen(&mut self.accepting);
        self.report(Report::Ready);
        logging::stop_forwarding();
    }

    fn on_signals(&mut self) -> io::Result<()> {
        for signal in self.accepting.signals.take() {
            match signal {
                Signal::SIGQUIT => {
                    handover::leave(&mut self.accepting);
                    self.stage = Stage::Leaving { until_ms: 0 };
                }
                Signal::SIGTERM => self.on_term(),
                _ => {}
            }
        }
        let (now_ms, accepting) = (self.accepting.now_ms, &mut self.accepting);
        let ends = accepting.sessions.reap(&accepting.epoll, now_ms);
        for (reason, session) in ends.lost {
            accepting.count_lost(reason, session);
        }
        for place in ends.crashed {
            self.report(Report::SessionCrashed(place));
        }
        match self.stage {
            Stage::Starting
                if self.accepting.sessions.is_empty() && self.accepting.sessions.has_forked() =>
            {
                let text = "its first process ended before it was ready, as logged above";
                Err(io::Error::other(text))
            }
            _ => Ok(()),
        }
    }

    /// Handles SIGTERM. It is ignored while there is a link to a master, because a service manager sends it to all
    /// processes. Without a link, it is the order of the program after an upgrade to stop.
    fn on_term(&mut self) {
        self.orders();
        if !self.is_linked {
            let limit = self.accepting.boot.settings.workers.drain_timeout;
            self.leave(limit, false);
        }
    }

    fn orders(&mut self) {
        while self.is_linked {
            match self.accepting.boot.link.receive() {
                Received::Message(message, descriptor) => match message.body {
                    Order::Drain(limit) | Order::Stop(limit) => {
                        let has_taker = self.accepting.has_taker();
                        let is_drain = has_taker && matches!(message.body, Order::Drain(_));
                        // Accept what waits in the queue: closing the listener for the last time would reset it. If the
                        // reload has failed, the serving generation accepts it.
                        if !self.is_starting() || !has_taker {
                            handover::accept(&mut self.accepting, true);
                        }
                        // No other acceptor would take these connections.
                        if !is_drain {
                            handover::adopt(&mut self.accepting, true);
                        }
                        self.leave(limit, is_drain);
                    }
                    Order::SessionLink(link) => {
                        if let Some(fd) = descriptor {
                            self.accepting.sessions.link(link, &fd);
                        }
                    }
                    order @ (Order::ReopenLog | Order::ReopenAccessLog) => {
                        if let Some(file) = descriptor {
                            self.accepting.reopen(order, file);
                        }
                    }
                    Order::StopPending => {
                        self.accepting.sessions.order_all(Order::StopPending, None)
                    }
                    _ => {}
                },
                Received::Garbage | Received::WithDescriptors(_) => {
                    log::warn!("the master sent an invalid order");
                }
                Received::Empty => return,
                Received::End => {
                    self.is_linked = false;
                    let _ = self
                        .accepting
                        .epoll
                        .delete(self.accepting.boot.link.as_fd());
                    handover::leave(&mut self.accepting);
                    if !matches!(self.stage, Stage::Leaving { .. }) {
                        let look_at_ms = self.accepting.now_ms + DECIDE_MS;
                        self.stage = Stage::Undecided { look_at_ms };
                    }
                    return;
                }
            }
        }
    }

    /// Finds out whether the master is dead, which the sessions see too, or was upgraded. After an upgrade the
    /// acceptor of the new program takes over, once its generation serves. If the upgrade has failed, another
    /// acceptor of this generation serves. Until then the sessions continue.
    fn decide(&mut self) {
        let limit = self.accepting.boot.settings.workers.drain_timeout;
        let is_dead = sources::has_master_died(&self.accepting.boot);
        if is_dead {
            // After an upgrade the next program may have stopped already.
            if !self.accepting.has_taker() {
                log::error!(
                    "the master has died: this acceptor accepts no more connections, and its sessions answer \
                     their running calls and exit; start a new master"
                );
            }
            self.leave(limit, false);
        } else if self.accepting.has_taker() {
            self.leave(limit, true);
        } else if !self.accepting.is_isolated() {
            // Connections would wait in the queue for ever.
            self.leave(limit, false);
        } else if self.accepting.is_done() || self.accepting.sessions.records.has_successor() {
            // A failed upgrade has left the master without the link to this acceptor, and it has started another
            // one. Without the link, the sessions would get no pool process and no order.
            self.stage = Stage::Replaced;
        } else {
            let look_at_ms = self.accepting.now_ms + DECIDE_MS;
            self.stage = Stage::Undecided { look_at_ms };
        }
    }

    /// Orders the next sessions to hand their connections over.
    fn drain_next(&mut self) {
        let (now_ms, sessions) = (self.accepting.now_ms, &self.accepting.sessions);
        let order = |session, limit| sessions.order_one(session, Order::Drain(limit));
        if self.draining.has_waiting() {
            self.draining
                .advance(|it| sessions.may_move(it), order, now_ms);
        }
    }

    /// Accepts nothing more, and exits after the sessions. `is_drain`: these hand their connections over.
    fn leave(&mut self, limit: Duration, is_drain: bool) {
        handover::leave(&mut self.accepting);
        let mut until_ms =
            self.accepting.now_ms + u64::try_from(limit.as_millis()).unwrap_or(u64::MAX / 2);
        if let Stage::Leaving { until_ms: earlier } = self.stage {
            until_ms = until_ms.min(earlier);
        }
        self.stage = Stage::Leaving { until_ms };
        if is_drain {
            self.draining = Draining::new(self.accepting.sessions.places(), until_ms);
            self.drain_next();
        } else {
            self.draining = Draining::default();
            let sessions = &mut self.accepting.sessions;
            sessions.order_all(Order::Stop(limit), None);
        }
    }
}
