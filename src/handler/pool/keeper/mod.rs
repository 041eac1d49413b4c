//! The keeper of one program of a pool: a thread that starts it, lets it serve, and ends it with all
//! that came from it.
//!
//! A program that is ready goes with its wire to the `desk`, and comes back from there when it was
//! asked for or can't serve any more: one that sends what is no answer, breaks off, or whose call
//! is given up is killed here. Whatever takes time is done here, for the desk is the event loop's.
//! Waits in one poll(2), with the nearest deadline; calls don't wake it.

mod ending;
mod starting;

use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::handler::call_state::Reports;
use crate::handler::pool::Pool;
use crate::handler::pool::boot::Boot;
use crate::handler::pool::desk::{Order, Recall, Word};
use crate::handler::pool::life::{Rules, Wear};
use crate::handler::pool::process::Process;
use crate::handler::pool::program_record::ProgramState;
use crate::handler::pool::seat::{Seat, Tally};
use crate::handler::pool::wire::Wire;
use crate::handler::registry::Registry;
use crate::sys::process::monotonic_ms;
use crate::sys::waker::Waker;
use crate::throttle::limiter::Limiter;
use crate::throttle::{Millis, Throttle};

/// How long a program that is replaced, or sleeps, may take to leave before it is told by SIGTERM,
/// and then until it is killed. It keeps nobody waiting.
const LEISURE: Millis = 3000;

/// A program that serves; its wire is at the desk.
struct Serving {
    process: Process,
    /// When it was started.
    since: Millis,
    wear: Wear,
    tally: Arc<Tally>,
    /// What it was asked back for, as long as there is no answer to that.
    asked: Option<Recall>,
    /// The desk knows that it has ended.
    told_end: bool,
}

/// A program that is not ready yet, or waits for its predecessor to finish a call.
struct Fresh {
    process: Process,
    wire: Wire,
    since: Millis,
    is_ready: bool,
    has_spoken: bool,
}

/// A program that was told to leave.
struct Leaver {
    process: Process,
    /// When it is told once more; 0 once it was.
    terminate_at: Millis,
    kill_at: Millis,
}

/// What a desk is told, of which of its pools by which of its keepers.
#[derive(Debug)]
pub(super) struct Told {
    pub pool: usize,
    pub number: usize,
    pub word: Word,
}

/// What a keeper is given.
pub(super) struct Post {
    pub number: usize,
    /// The number of the pool.
    pub desk: usize,
    pub pool: Arc<Pool>,
    /// From the desk, announced by the waker.
    pub orders: Receiver<Order>,
    pub waker: Arc<Waker>,
    /// To the desk, announced by the reports' waker.
    pub words: Sender<Told>,
    pub registry: Arc<Registry>,
    pub reports: Reports,
    pub boot: Arc<Boot>,
}

/// See the module.
pub(super) struct Keeper {
    post: Post,
    rules: Rules,
    serving: Option<Serving>,
    fresh: Option<Fresh>,
    leavers: Vec<Leaver>,
    throttle: Throttle,
    /// No program is started before.
    due: Millis,
    /// It was told to the desk that there is none for a while.
    told_down: bool,
    sleeps: bool,
    /// Why the last program ended, for those who ask in vain.
    last_end: String,
    began: Millis,
    /// A program of this keeper's was ready once.
    proven: bool,
    /// The first one never came to it: the worker leaves.
    gave_up: bool,
    /// How often it may be said that a program is killed with its call.
    kills: Limiter,
    /// The worker is about to leave: nothing is started any more.
    rests: bool,
    /// The worker leaves, and programs may take so long to do so.
    closes_with: Option<Millis>,
}

fn now() -> Millis {
    monotonic_ms()
}

impl Keeper {
    pub fn new(post: Post) -> Self {
        Keeper {
            rules: Rules::new(&post.pool.settings, post.number),
            post,
            serving: None,
            fresh: None,
            leavers: Vec::new(),
            throttle: Throttle::default(),
            due: 0,
            told_down: false,
            sleeps: false,
            last_end: String::new(),
            began: now(),
            proven: false,
            gave_up: false,
            kills: Limiter::rare(),
            rests: false,
            closes_with: None,
        }
    }

    /// Keeps the program until the desk is closed.
    pub fn keep(mut self) {
        loop {
            let now = now();
            while let Ok(order) = self.post.orders.try_recv() {
                self.obey(order, now);
            }
            if let Some(grace) = self.closes_with.or(self.gave_up.then_some(0)) {
                self.leave(grace, now);
                if self.leavers.is_empty() {
                    return;
                }
            } else if !self.rests {
                self.advance(now);
            }
            self.show();
            self.wait(now);
            self.judge();
        }
    }

    /// Shows how far its program is.
    fn show(&self) {
        let (pid, state, since) = match (&self.serving, &self.fresh) {
            (Some(one), _) => (one.process.pid().0, ProgramState::Idle, one.since),
            (None, Some(one)) => (one.process.pid().0, ProgramState::Starting, one.since),
            (None, None) if self.sleeps => (0, ProgramState::Asleep, 0),
            (None, None) => (0, ProgramState::Down, 0),
        };
        if let Some(record) = self.post.pool.records().get(self.post.number) {
            record.show(pid, state, since);
        }
    }

    fn obey(&mut self, order: Order, now: Millis) {
        match order {
            Order::Back(seat) => self.take_back(seat, now),
            Order::End(seat, why) => self.end_serving(*seat, &why, now),
            Order::Kept => {
                if let Some(serving) = &mut self.serving {
                    serving.asked = None;
                    serving.wear.is_busy(now);
                }
            }
            Order::Start => self.sleeps = false,
            Order::Rest => self.rests = true,
            Order::Close(grace) => self.closes_with = Some(grace),
        }
    }

    /// The program that serves has nothing to do, and is here.
    fn take_back(&mut self, mut seat: Box<Seat>, now: Millis) {
        let Some(serving) = &mut self.serving else {
            return;
        };
        let asked = serving.asked.take();
        let has_successor = self.fresh.as_ref().is_some_and(|fresh| fresh.is_ready);
        if asked == Some(Recall::Successor) && !has_successor && !serving.process.has_ended {
            // That one has died meanwhile: better an old one than none.
            seat.is_recalled = false;
            return self.tell(Word::Ready(seat));
        }
        self.sleeps = asked == Some(Recall::Sleep) && self.fresh.is_none();
        if self.sleeps {
            log::debug!("pool {}: a program has nothing to do", self.post.pool.name);
        }
        drop(seat);
        self.retire(now);
    }

    fn tell(&self, word: Word) {
        let (pool, number) = (self.post.desk, self.post.number);
        // Nobody listens any more once the worker leaves.
        let _ = self.post.words.send(Told { pool, number, word });
        self.post.reports.wake();
    }

    /// Asks for the program that serves, unless that was done.
    fn recall(&mut self, recall: Recall) {
        if let Some(serving) = &mut self.serving
            && serving.asked.is_none()
        {
            serving.asked = Some(recall);
            self.tell(Word::Recall(recall));
        }
    }

    /// Starts, replaces and rests programs as time has come.
    fn advance(&mut self, now: Millis) {
        self.look_at_fresh(now);
        if self.fresh.as_ref().is_some_and(|fresh| fresh.is_ready) {
            return match self.serving {
                Some(_) => self.recall(Recall::Successor),
                None => self.let_serve(now),
            };
        }
        let Some(serving) = &mut self.serving else {
            if self.fresh.is_none() && !self.sleeps {
                self.revive(now);
            }
            return;
        };
        serving.wear.saw(serving.tally.seen());
        if serving.wear.wants_look(&self.rules, now) {
            let bytes = serving.process.resident_bytes();
            serving.wear.looked(bytes, &self.rules, now);
        }
        if self.fresh.is_some() {
            return;
        }
        if let Some(key) = serving.wear.is_worn(&self.rules, now) {
            if now >= self.due {
                log::info!(
                    "pool {} [{}]: is replaced, as {key} says",
                    self.post.pool.name,
                    serving.process.pid()
                );
                self.start(now);
            }
        } else if serving.wear.is_idle_for_too_long(&self.rules, now) {
            self.recall(Recall::Sleep);
        }
    }

    /// The program that is ready goes to the desk.
    fn let_serve(&mut self, now: Millis) {
        let Some(fresh) = self.fresh.take() else {
            return;
        };
        let name = &self.post.pool.name;
        log::debug!("pool {name} [{}]: is ready", fresh.process.pid());
        let tally = Arc::new(Tally::default());
        let enough = self.rules.max_calls;
        let seat = Seat::new(
            (fresh.wire, fresh.has_spoken),
            self.post.pool.concurrency(),
            Arc::clone(&tally),
            enough,
        );
        self.serving = Some(Serving {
            process: fresh.process,
            since: fresh.since,
            wear: Wear::new(now),
            tally,
            asked: None,
            told_end: false,
        });
        (self.told_down, self.sleeps) = (false, false);
        self.tell(Word::Ready(Box::new(seat)));
        if !mem::replace(&mut self.proven, true) {
            self.post.boot.one_is_ready();
        }
    }

    /// The program that served is done, and leaves: that its wire has ended tells it so.
    fn retire(&mut self, now: Millis) {
        if let Some(serving) = self.serving.take() {
            self.throttle
                .record_ready_time(Some(serving.wear.health(now)));
            self.dismiss(serving.process, LEISURE, now);
        }
    }

    /// Lets a program leave whose wire has ended: `grace` until SIGTERM, and as long until SIGKILL.
    fn dismiss(&mut self, process: Process, grace: Millis, now: Millis) {
        // They are few: one that does not go makes room for the next.
        if self.leavers.len() > 1 {
            self.leavers.remove(0).process.end(now);
        }
        self.leavers.push(Leaver {
            process,
            terminate_at: now + grace,
            kill_at: now + 2 * grace,
        });
    }

    /// Waits for whatever comes first, and does the reading.
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
            // EINTR, or no memory for a moment: another round, and nothing was told.
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

    /// When there is something to do even if nothing happens.
    fn next(&self, now: Millis) -> Millis {
        let mut next = Millis::MAX;
        let mut at = |at: Millis| next = next.min(at);
        match &self.fresh {
            Some(fresh) if !fresh.is_ready => {
                let by_itself = self.rules.ready_at(fresh.since);
                at(by_itself.unwrap_or(fresh.since.saturating_add(self.boot_limit())));
            }
            Some(_) => {}
            None => match &self.serving {
                Some(serving) if serving.wear.is_worn(&self.rules, now).is_some() => at(self.due),
                Some(serving) => at(serving.wear.next(&self.rules, serving.asked.is_none())),
                None if self.sleeps || self.rests => {}
                None => at(self.due),
            },
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

    /// Says what follows from what was read, from ends, and from the time.
    fn judge(&mut self) {
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
        self.judge_fresh(now);
        if let Some(serving) = &mut self.serving
            && serving.process.has_ended
            && !mem::replace(&mut serving.told_end, true)
        {
            self.tell(Word::Recall(Recall::Ended));
        }
    }

    /// The worker leaves: nothing is begun any more, and who runs is told to go.
    fn leave(&mut self, grace: Millis, now: Millis) {
        if let Some(fresh) = self.fresh.take() {
            self.dismiss(fresh.process, grace, now);
        }
        // One whose wire crosses this on its way to the desk.
        if let Some(serving) = self.serving.take() {
            self.dismiss(serving.process, grace, now);
        }
        for leaver in &mut self.leavers {
            leaver.kill_at = leaver.kill_at.min(now + 2 * grace);
            if leaver.terminate_at > 0 {
                leaver.terminate_at = leaver.terminate_at.min(now + grace);
            }
        }
    }
}
