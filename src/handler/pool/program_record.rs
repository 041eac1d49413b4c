//! What a pool process shows of each of its programs, in memory that it shares with the master.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::sys::shared_memory::shared_record;

shared_record! {
    /// One program, or the place of one. All zero: there is none.
    #[derive(Debug)]
    pub struct ProgramRecord {
        /// When it was started, in milliseconds (CLOCK_MONOTONIC).
        started_ms: AtomicU64,
        /// Calls that it has answered.
        calls: AtomicU64,
        /// 0: there is none.
        pid: AtomicI32,
        /// See `ProgramState`.
        state: AtomicU32,
        /// Calls that it runs.
        running: AtomicU32,
        /// Keeps the size a multiple of eight.
        spare: AtomicU32,
    }
}

/// How far a program is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgramState {
    /// There is none; the next one is started soon, or after a while if they died too often.
    Down,
    /// It is not ready yet.
    Starting,
    /// It serves and has no call.
    Idle,
    /// It has at least one call.
    Busy,
    /// It was ended because no call came (`idle-timeout`), and is started for the next one.
    Asleep,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramView {
    pub pid: Option<i32>,
    pub state: ProgramState,
    pub calls: u64,
    /// See `ProgramRecord`.
    pub started_ms: u64,
}

impl ProgramRecord {
    /// For the thread that keeps the program.
    pub(super) fn show(&self, pid: i32, state: ProgramState, started_ms: u64) {
        self.pid.store(pid, Relaxed);
        self.state.store(state as u32, Relaxed);
        self.started_ms.store(started_ms, Relaxed);
        if state != ProgramState::Idle {
            self.running.store(0, Relaxed);
            self.calls.store(0, Relaxed);
        }
    }

    /// For the event loop, of a program that serves.
    pub(super) fn show_calls(&self, running: usize, calls: u64) {
        self.running.store(running as u32, Relaxed);
        self.calls.store(calls, Relaxed);
    }

    pub fn view(&self) -> ProgramView {
        let state = match self.state.load(Relaxed) {
            1 => ProgramState::Starting,
            2 | 3 if self.running.load(Relaxed) > 0 => ProgramState::Busy,
            2 | 3 => ProgramState::Idle,
            4 => ProgramState::Asleep,
            _ => ProgramState::Down,
        };
        ProgramView {
            pid: Some(self.pid.load(Relaxed)).filter(|pid| *pid > 0),
            state,
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
    fn a_record_says_what_its_program_does() -> std::io::Result<()> {
        let records = OwnedArray::<ProgramRecord>::new(NonZeroUsize::MIN)?;
        let record = &records[0];
        let state = || record.view().state;
        assert_eq!((record.view().pid, state()), (None, ProgramState::Down));
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
}
