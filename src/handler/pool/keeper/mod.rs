//! The keeper of one program of a pool: a thread that starts it, gives it one call after the other,
//! and ends it with all that came from it.
//!
//! A call is written when the program has none; the next one already while an answer still
//! arrives. A program that answers what is no answer, breaks off, or whose call is given up is
//! killed, so that no answer ever reaches another call than its own; the answer to a call of a dead
//! program is `crashed`, unless the program had not read it, which the kernel knows: that one has
//! not begun, and goes to the next program. Waits in one poll(2), with the nearest deadline.

mod calls;
mod starting;

use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::handler::job::Reports;
use crate::handler::pool::Pool;
use crate::handler::pool::boot::Boot;
use crate::handler::pool::desk::{Desk, Entry};
use crate::handler::pool::life::{Rules, Wear, millis};
use crate::handler::pool::process::Process;
use crate::handler::registry::Registry;
use crate::sys::process::{Exit, monotonic};
use crate::throttle::{Millis, Throttle};

/// How long a program that is replaced, or sleeps, may take to leave before it is told by SIGTERM,
/// and then until it is killed. It keeps nobody waiting.
const LEISURE: Millis = 3000;

/// A program that serves.
struct Serving {
    process: Process,
    wear: Wear,
    running: Option<Entry>,
    /// Written while the answer of `running` arrives; `None` where nothing is running.
    next: Option<Entry>,
    /// It has sent something already, so that a word of being ready is out of place.
    has_spoken: bool,
}

/// A program that is not ready yet, or waits for its predecessor to finish a call.
struct Fresh {
    process: Process,
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

/// Why a program is ended.
enum Why {
    /// Or has closed its descriptor 3, which comes to the same.
    Died,
    /// What it has sent is no answer.
    Broken(String),
    TimedOut,
    GivenUp,
    /// The worker leaves.
    Leaving,
}

/// What a keeper is given.
pub(super) struct Post {
    pub number: usize,
    pub pool: Arc<Pool>,
    pub desk: Arc<Desk>,
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
    sleeps: bool,
    /// Why the last program ended, for those who ask in vain.
    last_end: String,
    began: Millis,
    /// A program of this keeper's was ready once.
    proven: bool,
    /// The first one never came to it: the worker leaves.
    gave_up: bool,
}

fn now() -> Millis {
    millis(monotonic())
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
            sleeps: false,
            last_end: String::new(),
            began: now(),
            proven: false,
            gave_up: false,
        }
    }

    /// Keeps the program until the desk is closed.
    pub fn keep(mut self) {
        loop {
            let now = now();
            if let Some(grace) = self.post.desk.closes_with().or(self.gave_up.then_some(0)) {
                self.leave(grace, now);
                if self.leavers.is_empty() {
                    return;
                }
            } else {
                self.advance(now);
            }
            self.wait(now);
            self.judge();
        }
    }

    /// Starts, replaces and rests programs as time has come, and gives out calls.
    fn advance(&mut self, now: Millis) {
        self.look_at_fresh(now);
        let idle = self.serving.as_ref().is_none_or(|it| it.running.is_none());
        if let Some(fresh) = self.fresh.take_if(|fresh| fresh.is_ready && idle) {
            self.replace(fresh, now);
        }
        if let Some(serving) = &mut self.serving {
            if serving.wear.wants_look(&self.rules, now) {
                let bytes = serving.process.resident_bytes();
                serving.wear.looked(bytes, &self.rules, now);
            }
            let too_long = serving.wear.is_idle_for_too_long(&self.rules, now);
            if too_long
                && idle
                && self.fresh.is_none()
                && self.post.desk.fall_asleep(self.post.number)
            {
                log::debug!("pool {}: a program has nothing to do", self.post.pool.name);
                self.sleeps = true;
                return self.retire_serving(now);
            }
            let worn = serving.wear.is_worn(&self.rules, now);
            if let Some(key) = worn.filter(|_| self.fresh.is_none() && now >= self.due) {
                log::info!(
                    "pool {} [{}]: is replaced, as {key} says",
                    self.post.pool.name,
                    serving.process.pid()
                );
                self.start(now);
            }
        } else if self.fresh.is_none() {
            self.sleeps &= !self.post.desk.is_wanted(self.post.number);
            if !self.sleeps {
                self.revive(now);
            }
        }
        self.give_out();
    }

    /// A fresh program takes over.
    fn replace(&mut self, fresh: Fresh, now: Millis) {
        if self.serving.is_some() {
            self.retire_serving(now);
        }
        log::debug!(
            "pool {} [{}]: is ready",
            self.post.pool.name,
            fresh.process.pid()
        );
        self.serving = Some(Serving {
            process: fresh.process,
            wear: Wear::new(now),
            running: None,
            next: None,
            has_spoken: fresh.has_spoken,
        });
        if !mem::replace(&mut self.proven, true) {
            self.post.boot.one_is_ready();
        }
    }

    fn retire_serving(&mut self, now: Millis) {
        if let Some(serving) = self.serving.take() {
            self.throttle.credit(Some(serving.wear.health(now)));
            self.dismiss(serving.process, LEISURE, now);
        }
    }

    /// Lets a program leave: `grace` until SIGTERM, and as long until SIGKILL.
    fn dismiss(&mut self, mut process: Process, grace: Millis, now: Millis) {
        // They are few: one that does not go makes room for the next.
        if self.leavers.len() > 1 {
            self.leavers.remove(0).process.end(now);
        }
        process.dismiss();
        self.leavers.push(Leaver {
            process,
            terminate_at: now + grace,
            kill_at: now + 2 * grace,
        });
    }

    /// Waits for whatever comes first, and does the reading and writing.
    fn wait(&mut self, now: Millis) {
        let waker = Arc::clone(self.post.desk.waker(self.post.number));
        let left = self.next(now).saturating_sub(now);
        let timeout =
            PollTimeout::try_from(Duration::from_millis(left)).unwrap_or(PollTimeout::MAX);
        let mut fds = Vec::with_capacity(9);
        fds.push(PollFd::new(waker.as_fd(), PollFlags::POLLIN));
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
        let now = self::now();
        let (fours, _) = ready[1..].as_chunks::<4>();
        for (process, four) in self.processes_mut().zip(fours) {
            process.attend(*four, now);
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
                Some(serving) => at(serving.wear.next(&self.rules, serving.running.is_none())),
                None if self.sleeps => {}
                None => at(self.due),
            },
        }
        if let Some(serving) = &self.serving
            && let Some(entry) = &serving.running
        {
            // A millisecond more: what is rounded down would be woken for in vain.
            at(millis(entry.job.deadline).saturating_add(1));
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
        self.judge_serving(now);
    }

    /// Ends a process that is at its end, and says how.
    fn how_it_ended(&self, mut process: Process, now: Millis) -> (String, bool) {
        // An exit closes descriptors before it is seen.
        let by_itself = process.ends_soon();
        let ended = process.end(now);
        let text = match ended.exit {
            _ if !by_itself => "has closed its descriptor 3, and is killed".into(),
            Some(Exit::Code(code)) => format!("has left with exit code {code}"),
            Some(exit) => format!("was ended by {exit}"),
            None => "hangs".into(),
        };
        (text, ended.left_unread)
    }

    /// The worker leaves: nothing is begun any more, and who runs is told to go.
    fn leave(&mut self, grace: Millis, now: Millis) {
        if let Some(fresh) = self.fresh.take() {
            self.dismiss(fresh.process, grace, now);
        }
        if self.serving.as_ref().is_some_and(|it| it.running.is_some()) {
            self.end_serving(&Why::Leaving, now);
        } else if let Some(serving) = self.serving.take() {
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
