//! Supervises one program of a pool in a thread: starts it, lets it serve, and ends it with all that it has
//! started.
//!
//! The supervisor passes a ready program and its socket to the `dispatcher`, which is part of the event loop. The
//! dispatcher gives the program back if the supervisor asks for it, or if it cannot serve any more: it sent an
//! invalid answer, closed its socket, or its call was given up. Every step that takes time is done here, because the
//! event loop must not wait. The thread waits in poll(2) until the next deadline. Calls do not wake it.

mod ending;
mod starting;

use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::handler::call_state::Reports;
use crate::handler::pool::boot::{Boot, SpareRoom};
use crate::handler::pool::definition::Pool;
use crate::handler::pool::dispatcher::{SupervisorEvent, SupervisorOrder};
use crate::handler::pool::entry::ProgramCalls;
use crate::handler::pool::entry::Recall;
use crate::handler::pool::life::{ProgramLimits, ProgramUsage};
use crate::handler::pool::process::Process;
use crate::handler::pool::program_connection::ProgramConnection;
use crate::handler::pool::program_record::ProgramState;
use crate::handler::pool::wire::Wire;
use crate::handler::registry::Registry;
use crate::sys::process::monotonic_ms;
use crate::sys::waker::Waker;
use crate::throttle::limiter::Limiter;
use crate::throttle::{Millis, Throttle};

/// How long a program that is replaced or idle may take to exit before SIGTERM, and then before SIGKILL. No
/// call waits for it.
const EXIT_GRACE: Millis = 3000;

/// A program that serves. Its socket is at the dispatcher.
struct Serving {
    process: Process,
    /// When it was started.
    since: Millis,
    usage: ProgramUsage,
    tally: Arc<ProgramCalls>,
    /// Why the program was asked back; `None` once it has come back.
    asked: Option<Recall>,
    /// Whether the dispatcher knows that it has ended.
    told_end: bool,
}

/// A program that is not ready, or waits until its predecessor has finished a call.
struct Fresh {
    process: Process,
    wire: Wire,
    since: Millis,
    is_ready: bool,
    has_spoken: bool,
}

/// A program that was ordered to exit.
struct Leaver {
    process: Process,
    /// When it gets SIGTERM; 0 after that.
    terminate_at: Millis,
    kill_at: Millis,
}

/// A message from the supervisor of the program with this number.
#[derive(Debug)]
pub(super) struct SupervisorReport {
    pub number: usize,
    pub event: SupervisorEvent,
}

/// What a supervisor is started with.
pub(super) struct SupervisorSetup {
    pub number: usize,
    pub pool: Arc<Pool>,
    /// From the dispatcher, announced by the waker.
    pub orders: Receiver<SupervisorOrder>,
    pub waker: Arc<Waker>,
    /// To the dispatcher, announced by the reports' waker.
    pub events: Sender<SupervisorReport>,
    pub registry: Arc<Registry>,
    pub reports: Reports,
    /// Gets the result of the first start. `None` if no start or reload waits for it.
    pub boot: Option<Arc<Boot>>,
    /// Whether the first program waits until it may serve.
    pub is_held: bool,
    /// The room for a second program, which the supervisor must reserve; `None` if there is no limit.
    pub spare: Option<Arc<SpareRoom>>,
}

/// The phase of a supervisor. It never returns to an earlier phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// Starts, replaces and ends programs.
    Running,
    /// The process exits soon, so nothing is started.
    Resting,
    /// Its program exits when it has no call, and none follows.
    Leaving,
    /// All programs exit, because the process exits or the first program was never ready. They have this
    /// time before SIGTERM, and the same time again before SIGKILL.
    Closing(Millis),
}

/// Why there is no program, as the dispatcher knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Absence {
    /// There is a program, or one is being started.
    None,
    /// No program is started for a while, because programs have died.
    Down,
    /// The program was ended because it was idle. The next call starts it.
    Asleep,
}

/// Supervises one program of a pool.
pub(super) struct ProgramSupervisor {
    post: SupervisorSetup,
    rules: ProgramLimits,
    serving: Option<Serving>,
    fresh: Option<Fresh>,
    leavers: Vec<Leaver>,
    throttle: Throttle,
    /// No program is started before this time.
    due: Millis,
    absence: Absence,
    /// Why the last program ended, for the answers to calls that get no program.
    last_end: String,
    began: Millis,
    /// Whether a program was ever ready.
    proven: bool,
    /// The limit on lines about programs that are killed with their calls.
    kills: Limiter,
    phase: Phase,
    has_spare: bool,
    /// Whether it waits until there is room for a second program.
    waits_for_room: bool,
}

fn now() -> Millis {
    monotonic_ms()
}

impl ProgramSupervisor {
    pub fn new(post: SupervisorSetup) -> Self {
        ProgramSupervisor {
            rules: ProgramLimits::new(&post.pool.settings, post.number),
            proven: post.boot.is_none(),
            post,
            serving: None,
            fresh: None,
            leavers: Vec::new(),
            throttle: Throttle::default(),
            due: 0,
            absence: Absence::None,
            last_end: String::new(),
            began: now(),
            kills: Limiter::rare(),
            phase: Phase::Running,
            has_spare: false,
            waits_for_room: false,
        }
    }

    /// Supervises the program until the pool ends it for good.
    pub fn keep(mut self) {
        loop {
            let now = now();
            while let Ok(order) = self.post.orders.try_recv() {
                self.obey(order, now);
            }
            match self.phase {
                Phase::Running => self.advance(now),
                Phase::Resting => {}
                Phase::Leaving => {
                    if !self.finish(now) {
                        return self.is_gone();
                    }
                }
                Phase::Closing(grace) => {
                    self.leave(grace, now);
                    if self.leavers.is_empty() {
                        return self.is_gone();
                    }
                }
            }
            if self.has_spare && self.processes().count() < 2 {
                self.release_room();
            }
            self.show();
            self.wait(now);
            self.handle_events();
        }
    }

    /// Publishes the state of its program.
    fn show(&self) {
        let (pid, state, since) = match (&self.serving, &self.fresh) {
            (Some(one), _) => (one.process.pid().0, ProgramState::Idle, one.since),
            (None, Some(one)) => (one.process.pid().0, ProgramState::Starting, one.since),
            (None, None) if self.absence == Absence::Asleep => (0, ProgramState::Asleep, 0),
            (None, None) => (0, ProgramState::Down, 0),
        };
        if let Some(record) = self.post.pool.record(self.post.number) {
            record.show(pid, state, since);
        }
    }

    fn obey(&mut self, order: SupervisorOrder, now: Millis) {
        match order {
            SupervisorOrder::Back(connection) => self.take_back(connection, now),
            SupervisorOrder::End(connection, why) => self.end_serving(*connection, &why, now),
            SupervisorOrder::Kept => {
                if let Some(serving) = &mut self.serving {
                    serving.asked = None;
                    serving.usage.is_busy(now);
                }
            }
            SupervisorOrder::Start if self.absence == Absence::Asleep => {
                self.absence = Absence::None
            }
            SupervisorOrder::Start => {}
            SupervisorOrder::Rest => self.phase = self.phase.max(Phase::Resting),
            SupervisorOrder::Serve => self.post.is_held = false,
            SupervisorOrder::Leave => self.phase = self.phase.max(Phase::Leaving),
            SupervisorOrder::Registry(registry) => self.post.registry = registry,
            SupervisorOrder::Close(grace) => self.phase = Phase::Closing(grace),
        }
    }

    /// Handles a program that has come back without a call.
    fn take_back(&mut self, mut connection: Box<ProgramConnection>, now: Millis) {
        let Some(serving) = &mut self.serving else {
            return;
        };
        let asked = serving.asked.take();
        let has_successor = self.fresh.as_ref().is_some_and(|fresh| fresh.is_ready);
        let stays = self.phase < Phase::Leaving;
        let is_needed = !has_successor && stays && !serving.process.has_ended;
        if asked == Some(Recall::Successor) && is_needed {
            // The new one has died meanwhile, so the old one continues.
            connection.is_recalled = false;
            return self.report(SupervisorEvent::Ready(connection));
        }
        if asked == Some(Recall::Sleep) && self.fresh.is_none() && stays {
            self.absence = Absence::Asleep;
            log::debug!("pool {}: a program has nothing to do", self.post.pool.name);
        }
        drop(connection);
        self.retire(now);
    }

    fn report(&self, event: SupervisorEvent) {
        let number = self.post.number;
        // The receiver is gone if the process exits.
        let _ = self.post.events.send(SupervisorReport { number, event });
        self.post.reports.wake();
    }

    /// Asks for the serving program, once.
    fn recall(&mut self, recall: Recall) {
        if let Some(serving) = &mut self.serving
            && serving.asked.is_none()
        {
            serving.asked = Some(recall);
            self.report(SupervisorEvent::Recall(recall));
        }
    }

    /// Starts, replaces and ends programs that are due.
    fn advance(&mut self, now: Millis) {
        self.look_at_fresh(now);
        if self.fresh.as_ref().is_some_and(|fresh| fresh.is_ready) {
            return match self.serving {
                Some(_) => self.recall(Recall::Successor),
                None if self.post.is_held => self.is_ready(),
                None => self.let_serve(now),
            };
        }
        let Some(serving) = &mut self.serving else {
            if self.fresh.is_none() && self.absence != Absence::Asleep {
                self.revive(now);
            }
            return;
        };
        serving.usage.saw(serving.tally.seen());
        if serving.usage.wants_look(&self.rules, now) {
            let bytes = serving.process.resident_bytes();
            serving.usage.looked(bytes, &self.rules, now);
        }
        if self.fresh.is_some() {
            return;
        }
        if let Some(key) = serving.usage.recycle_reason(&self.rules, now) {
            let pid = serving.process.pid();
            if now >= self.due && self.takes_room() {
                self.log_replacement(pid, key, now);
                self.start(now);
            }
        } else if serving.usage.is_idle_for_too_long(&self.rules, now) {
            self.recall(Recall::Sleep);
        }
    }

    /// Sends a ready program to the dispatcher.
    fn let_serve(&mut self, now: Millis) {
        let Some(mut fresh) = self.fresh.take() else {
            return;
        };
        let name = &self.post.pool.name;
        log::debug!("pool {name} [{}]: is ready", fresh.process.pid());
        let program = self.post.pool.program(fresh.process.pid());
        let tally = Arc::new(ProgramCalls::of(program));
        fresh.process.calls = Some(Arc::clone(&tally));
        let enough = self.rules.max_calls;
        let connection = ProgramConnection::new(
            (fresh.wire, fresh.has_spoken),
            self.post.pool.concurrency(),
            Arc::clone(&tally),
            enough,
        );
        self.serving = Some(Serving {
            process: fresh.process,
            since: fresh.since,
            usage: ProgramUsage::new(now),
            tally,
            asked: None,
            told_end: false,
        });
        self.absence = Absence::None;
        self.report(SupervisorEvent::Ready(Box::new(connection)));
        self.is_ready();
    }

    /// Handles that its first program is ready.
    fn is_ready(&mut self) {
        if !mem::replace(&mut self.proven, true)
            && let Some(boot) = &self.post.boot
        {
            boot.record_ready();
        }
    }

    /// Waits for the next event, and reads.
    fn wait(&mut self, now: Millis) {
        let left = self.next(now).saturating_sub(now);
        let timeout =
            PollTimeout::try_from(Duration::from_millis(left)).unwrap_or(PollTimeout::MAX);
        let waker = Arc::clone(&self.post.waker);
        let mut fds = Vec::with_capacity(14);
        fds.push(PollFd::new(waker.as_fd(), PollFlags::POLLIN));
        let fresh = self.fresh.as_ref().filter(|fresh| !fresh.wire.is_closed());
        fds.push(fresh.map_or_else(
            || PollFd::new(waker.as_fd(), PollFlags::empty()),
            |fresh| PollFd::new(fresh.wire.as_fd(), PollFlags::POLLIN),
        ));
        self.processes().for_each(|process| process.watch(&mut fds));
        let waited = poll(&mut fds, timeout);
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        if waited.is_err() {
            // EINTR, or a shortage of memory. The next round tries again.
            return;
        }
        if ready[0] {
            waker.clear();
        }
        if let Some(fresh) = self.fresh.as_mut().filter(|_| ready[1]) {
            fresh.wire.receive(fresh.process.piece());
        }
        let now = self::now();
        let (threes, _) = ready[2..].as_chunks::<3>();
        for (process, three) in self.processes_mut().zip(threes) {
            process.attend(*three, now);
        }
    }

    fn processes(&self) -> impl Iterator<Item = &Process> {
        let serving = self.serving.iter().map(|it| &it.process);
        let fresh = self.fresh.iter().map(|it| &it.process);
        let leavers = self.leavers.iter().map(|it| &it.process);
        serving.chain(fresh).chain(leavers)
    }

    fn processes_mut(&mut self) -> impl Iterator<Item = &mut Process> {
        let serving = self.serving.iter_mut().map(|it| &mut it.process);
        let fresh = self.fresh.iter_mut().map(|it| &mut it.process);
        let leavers = self.leavers.iter_mut().map(|it| &mut it.process);
        serving.chain(fresh).chain(leavers)
    }

    /// Returns when something is due.
    fn next(&self, now: Millis) -> Millis {
        let mut next = Millis::MAX;
        let mut at = |at: Millis| next = next.min(at);
        match (&self.fresh, &self.serving) {
            _ if self.phase != Phase::Running => {}
            (Some(fresh), _) if !fresh.is_ready => {
                let by_itself = self.rules.ready_at(fresh.since);
                at(by_itself.unwrap_or(fresh.since.saturating_add(self.boot_limit())));
            }
            (Some(_), _) => {}
            _ if self.waits_for_room => {}
            (None, Some(serving)) if serving.usage.recycle_reason(&self.rules, now).is_some() => {
                at(self.due);
            }
            (None, Some(serving)) => at(serving.usage.next(&self.rules, serving.asked.is_none())),
            (None, None) if self.absence == Absence::Asleep => {}
            (None, None) => at(self.due),
        }
        for leaver in &self.leavers {
            at(if leaver.terminate_at > 0 {
                leaver.terminate_at
            } else {
                leaver.kill_at
            });
        }
        next
    }

    /// Handles what was read, ends of programs, and deadlines.
    fn handle_events(&mut self) {
        let now = now();
        let mut at = 0;
        while let Some(leaver) = self.leavers.get_mut(at) {
            if leaver.process.has_ended || now >= leaver.kill_at {
                self.leavers.remove(at).process.end(now);
                continue;
            }
            if leaver.terminate_at > 0 && now >= leaver.terminate_at {
                leaver.process.terminate();
                leaver.terminate_at = 0;
            }
            at += 1;
        }
        self.handle_fresh(now);
        if let Some(serving) = &mut self.serving
            && serving.process.has_ended
            && !mem::replace(&mut serving.told_end, true)
        {
            self.report(SupervisorEvent::Recall(Recall::Ended));
        }
    }
}
