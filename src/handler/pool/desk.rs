//! Where a pool's calls wait for its programs: what the loop puts in, and the keeper of each
//! program takes out.
//!
//! The loop keeps it short (`worker::calls` has the queue); here is decided whom a call wakes: a
//! program that is ready and idle before one that sleeps. A call is never bound to a program
//! before it is written to it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::handler::job::Job;
use crate::sys::process::monotonic;
use crate::sys::waker::Waker;
use crate::throttle::Millis;

/// What a keeper's program is up to, as far as new calls go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It works, starts, or was woken: it will look for calls by itself.
    Busy,
    /// It is ready and would take one now.
    Idle,
    /// It was ended because nothing came, and is started for the next call.
    Asleep,
    /// It died too often and is not started for a while.
    Down,
}

/// A call for a program.
#[derive(Debug)]
pub(super) struct Entry {
    pub job: Job,
    /// A program has died already before it had read it.
    pub returned: bool,
    /// When it came here, as time since boot.
    pub put: Duration,
    /// When it was written, likewise.
    pub begun: Option<Duration>,
}

impl Entry {
    fn new(job: Job, returned: bool) -> Self {
        Entry {
            job,
            returned,
            put: monotonic(),
            begun: None,
        }
    }
}

#[derive(Debug)]
struct State {
    waiting: VecDeque<Entry>,
    standings: Vec<Standing>,
    /// No program serves any more; how long each may take to leave, and once more so long after
    /// SIGTERM.
    closes_with: Option<Millis>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Desk {
    state: Mutex<State>,
    /// One a keeper.
    wakers: Vec<Arc<Waker>>,
}

impl Desk {
    pub fn new(wakers: Vec<Arc<Waker>>) -> Self {
        Desk {
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                standings: vec![Standing::Busy; wakers.len()],
                closes_with: None,
            }),
            wakers,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn waker(&self, keeper: usize) -> &Arc<Waker> {
        &self.wakers[keeper]
    }

    pub fn count(&self) -> usize {
        self.wakers.len()
    }

    /// A call for whichever program is the first to be free.
    pub fn put(&self, job: Job) {
        let mut state = self.lock();
        state.waiting.push_back(Entry::new(job, false));
        self.wake_one(&mut state);
    }

    /// A call that was written to a program and not read by it: it goes first.
    pub fn put_back(&self, job: Job) {
        let mut state = self.lock();
        state.waiting.push_front(Entry::new(job, true));
        self.wake_one(&mut state);
    }

    fn wake_one(&self, state: &mut State) {
        let of = |wanted: Standing| state.standings.iter().position(|&it| it == wanted);
        let all_down = || state.standings.iter().all(|&it| it == Standing::Down);
        let next = of(Standing::Idle)
            .or_else(|| of(Standing::Asleep))
            .or_else(|| all_down().then_some(0));
        if let Some(keeper) = next {
            if state.standings[keeper] != Standing::Down {
                state.standings[keeper] = Standing::Busy;
            }
            self.wakers[keeper].wake();
        }
    }

    /// A call for a keeper whose program can take one; without one, it counts as idle.
    pub fn take(&self, keeper: usize) -> Option<Entry> {
        let mut state = self.lock();
        let entry = state.waiting.pop_front();
        state.standings[keeper] = match entry {
            Some(_) => Standing::Busy,
            None => Standing::Idle,
        };
        entry
    }

    /// A call for a keeper whose program will be free in a moment.
    pub fn take_ahead(&self) -> Option<Entry> {
        self.lock().waiting.pop_front()
    }

    /// A call that nobody will run: the programs are all down.
    pub fn take_refused(&self) -> Option<Entry> {
        let mut state = self.lock();
        let all_down = state.standings.iter().all(|&it| it == Standing::Down);
        if all_down {
            state.waiting.pop_front()
        } else {
            None
        }
    }

    /// Says that a keeper's program is busy or down.
    pub fn stand(&self, keeper: usize, standing: Standing) {
        self.lock().standings[keeper] = standing;
    }

    /// A keeper has lost its program: a call that had woken it in vain wakes another.
    pub fn pass_on(&self, keeper: usize) {
        let mut state = self.lock();
        state.standings[keeper] = Standing::Busy;
        if !state.waiting.is_empty() {
            self.wake_one(&mut state);
        }
    }

    /// Lets an idle program sleep, unless a call has just woken it.
    pub fn fall_asleep(&self, keeper: usize) -> bool {
        let mut state = self.lock();
        let sleeps = state.standings[keeper] == Standing::Idle && state.waiting.is_empty();
        if sleeps {
            state.standings[keeper] = Standing::Asleep;
        }
        sleeps
    }

    /// Whether a keeper whose program sleeps was asked for it, or there is work for it.
    pub fn is_wanted(&self, keeper: usize) -> bool {
        let state = self.lock();
        state.standings[keeper] != Standing::Asleep || !state.waiting.is_empty()
    }

    /// No program serves from now on: each keeper ends its own, `grace` before and after SIGTERM.
    pub fn close(&self, grace: Millis) {
        self.lock().closes_with = Some(grace);
        self.wakers.iter().for_each(|waker| waker.wake());
    }

    /// The grace, once it is closed.
    pub fn closes_with(&self) -> Option<Millis> {
        self.lock().closes_with
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::handler::job::CallKey;
    use std::os::fd::AsFd;

    fn desk(count: usize) -> Desk {
        Desk::new(
            (0..count)
                .map(|_| Arc::new(Waker::new().unwrap()))
                .collect(),
        )
    }

    fn job(serial: u64) -> Job {
        Job {
            key: CallKey { index: 0, serial },
            method: 0,
            params: "null".into(),
            id: None,
            peer: None,
            expected: None,
            deadline: Duration::MAX,
            state: Arc::default(),
        }
    }

    fn woken(desk: &Desk) -> Vec<bool> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let is_readable = |waker: &Arc<Waker>| {
            let fd = PollFd::new(waker.as_fd(), PollFlags::POLLIN);
            let ready = poll(&mut [fd], PollTimeout::ZERO).unwrap();
            waker.clear();
            ready == 1
        };
        desk.wakers.iter().map(is_readable).collect()
    }

    #[test]
    fn a_call_wakes_an_idle_program_before_a_sleeping_one_and_each_but_once() {
        let desk = desk(3);
        assert!(desk.take(0).is_none() && desk.fall_asleep(0));
        assert!(desk.take(1).is_none() && desk.take(2).is_none());
        desk.put(job(1));
        assert_eq!(woken(&desk), [false, true, false]);
        desk.put(job(2));
        assert_eq!(woken(&desk), [false, false, true]);
        assert!(!desk.fall_asleep(1), "it was woken");
        assert!(desk.is_wanted(0), "there is work left");
        desk.put(job(3));
        assert_eq!(woken(&desk), [true, false, false]);
        desk.put(job(4));
        assert_eq!(woken(&desk), [false, false, false], "all of them are up");
        for serial in 1..=4 {
            assert_eq!(desk.take(1).unwrap().job.key.serial, serial);
        }
    }

    #[test]
    fn what_comes_back_goes_first_and_is_known_for_it() {
        let desk = desk(1);
        desk.put(job(1));
        desk.put_back(job(2));
        let first = desk.take(0).unwrap();
        assert!(first.job.key.serial == 2 && first.returned);
        assert!(!desk.take_ahead().unwrap().returned);
    }

    #[test]
    fn calls_are_refused_only_while_every_program_is_down() {
        let desk = desk(2);
        desk.stand(0, Standing::Down);
        desk.put(job(1));
        assert!(desk.take_refused().is_none());
        assert_eq!(woken(&desk), [false, false]);
        desk.stand(1, Standing::Down);
        desk.put(job(2));
        assert_eq!(woken(&desk), [true, false]);
        assert!(desk.take_refused().is_some() && desk.take_refused().is_some());
    }
}
