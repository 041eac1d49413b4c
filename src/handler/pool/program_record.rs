//! Holds the records of pool programs, in memory that a pool process shares with the master.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::sys::shared_memory::shared_record;

shared_record! {
    /// The record of a program. All zero: there is no program.
    #[derive(Debug)]
    pub struct ProgramRecord {
        /// The start time in milliseconds (CLOCK_MONOTONIC).
        started_ms: AtomicU64,
        /// The number of answered calls.
        calls: AtomicU64,
        /// The pid; 0 if there is none.
        pid: AtomicI32,
        /// A number of `ProgramState`.
        state: AtomicU32,
        /// The number of running calls.
        running: AtomicU32,
        /// The pid of the connection process that the program belongs to; 0 if it belongs to a pool process.
        owner: AtomicI32,
    }
}

/// The state of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgramState {
    /// There is no program, and none will be started.
    Vacant,
    /// There is no program. The next one is started soon, or later if programs died too often.
    Down,
    /// It is started but not ready.
    Starting,
    /// It is ready and has no call.
    Idle,
    /// It has at least one call.
    Busy,
    /// It was ended because no call came (`idle-timeout`). The next call starts it.
    Asleep,
}

/// A copy of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramView {
    pub pid: Option<i32>,
    pub state: ProgramState,
    /// The pid of its connection process; 0 if it belongs to a pool process.
    pub owner: i32,
    pub calls: u64,
    /// The start time in milliseconds (CLOCK_MONOTONIC).
    pub started_ms: u64,
}

impl ProgramRecord {
    /// Takes a record for the program of a connection process. Returns false if another one has it and lives.
    pub(super) fn claim(&self, owner: i32, lives: impl Fn(i32) -> bool) -> bool {
        let before = self.owner.load(Relaxed);
        if before != 0 && lives(before) {
            return false;
        }
        let taken = self.owner.compare_exchange(before, owner, Relaxed, Relaxed);
        taken.map(|_| self.show(0, ProgramState::Vacant, 0)).is_ok()
    }

    /// Records the state of a program. The supervisor of the program calls it.
    pub(super) fn show(&self, pid: i32, state: ProgramState, started_ms: u64) {
        self.pid.store(pid, Relaxed);
        self.state.store(state as u32, Relaxed);
        self.started_ms.store(started_ms, Relaxed);
        if state != ProgramState::Idle {
            self.running.store(0, Relaxed);
            self.calls.store(0, Relaxed);
        }
    }

    /// Records the calls of a program that serves. The event loop calls it.
    pub(super) fn show_calls(&self, running: usize, calls: u64) {
        self.running.store(running as u32, Relaxed);
        self.calls.store(calls, Relaxed);
    }

    pub fn view(&self) -> ProgramView {
        let state = match self.state.load(Relaxed) {
            1 => ProgramState::Down,
            2 => ProgramState::Starting,
            3 | 4 if self.running.load(Relaxed) > 0 => ProgramState::Busy,
            3 | 4 => ProgramState::Idle,
            5 => ProgramState::Asleep,
            _ => ProgramState::Vacant,
        };
        ProgramView {
            pid: Some(self.pid.load(Relaxed)).filter(|pid| *pid > 0),
            state,
            owner: self.owner.load(Relaxed),
            calls: self.calls.load(Relaxed),
            started_ms: self.started_ms.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::sys::shared_memory::OwnedArray;

    #[test]
    fn a_record_shows_the_state_of_its_program() -> std::io::Result<()> {
        let records = OwnedArray::<ProgramRecord>::new(NonZeroUsize::MIN)?;
        let record = &records[0];
        let state = || record.view().state;
        assert_eq!((record.view().pid, state()), (None, ProgramState::Vacant));
        record.show(7, ProgramState::Starting, 5);
        assert_eq!(
            (record.view().pid, state()),
            (Some(7), ProgramState::Starting)
        );
        record.show(7, ProgramState::Idle, 5);
        assert_eq!(state(), ProgramState::Idle);
        record.show_calls(1, 9);
        record.show(7, ProgramState::Idle, 5);
        let view = record.view();
        assert_eq!(
            (view.state, view.calls, view.started_ms),
            (ProgramState::Busy, 9, 5)
        );
        record.show(0, ProgramState::Asleep, 0);
        assert_eq!((state(), record.view().calls), (ProgramState::Asleep, 0));
        Ok(())
    }

    #[test]
    fn a_record_is_taken_over_from_a_dead_process_only() -> std::io::Result<()> {
        let record = &OwnedArray::<ProgramRecord>::new(NonZeroUsize::MIN)?[0];
        assert!(record.claim(7, |_| true));
        record.show(70, ProgramState::Idle, 5);
        assert!(!record.claim(8, |owner| owner == 7));
        assert!(record.claim(8, |_| false));
        let view = record.view();
        assert_eq!((view.pid, view.owner), (None, 8));
        Ok(())
    }
}
