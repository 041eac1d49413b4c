//! Provides the metrics board of the master that answers.
//!
//! After a restart or an upgrade of the server, its board may be another one. A process that finds its server by the
//! control socket then asks for the board again. The observer that a master has forked keeps its board.
//! Times are in milliseconds (CLOCK_MONOTONIC).

use std::fmt;
use std::io;

use super::master_facts::Facts;
use crate::link::metrics_board::BoardReader;
use crate::protocol::control::MasterStatus;

/// Asks the server for its board. `None` if this version cannot read that. Fails if no server answers.
pub type FindBoard = Box<dyn Fn() -> io::Result<Option<BoardReader>>>;

/// A board, and how to find the next one.
pub struct BoardSource {
    board: Option<BoardReader>,
    /// `None` for a board that stays.
    next: Option<NextBoard>,
}

/// How to find the board of another master.
struct NextBoard {
    find: FindBoard,
    /// The master that has sent the board.
    sender: Sender,
    /// When a failed request is tried again.
    try_at_ms: u64,
}

/// A master, as far as its status tells it from another one.
struct Sender {
    pid: i32,
    version: String,
    /// When it started. In a container, each master may have the same pid.
    started_ms: u64,
}

/// The time until a failed request for a board is tried again, because nothing else is served meanwhile.
const RETRY_MS: u64 = 5_000;
/// How much the start time of one master may differ, because its status has its age in whole seconds, and may be late.
const TOLERANCE_MS: u64 = 3_000;

impl Sender {
    fn of(master: &MasterStatus, at_ms: u64) -> Self {
        Sender {
            pid: master.pid,
            version: master.version.clone(),
            started_ms: at_ms.saturating_sub(master.uptime_s.saturating_mul(1_000)),
        }
    }

    fn is_same(&self, other: &Sender) -> bool {
        let differs_ms = self.started_ms.abs_diff(other.started_ms);
        self.pid == other.pid && self.version == other.version && differs_ms <= TOLERANCE_MS
    }
}

impl BoardSource {
    /// Uses one board. `None` if there is none that this version can read.
    pub fn of(board: Option<BoardReader>) -> Self {
        BoardSource { board, next: None }
    }

    /// Uses the board that `master` has sent now, and asks for another one when another master answers.
    pub fn following(
        board: Option<BoardReader>,
        (master, now_ms): (&MasterStatus, u64),
        find: FindBoard,
    ) -> Self {
        let next = NextBoard {
            find,
            sender: Sender::of(master, now_ms),
            try_at_ms: 0,
        };
        BoardSource {
            board,
            next: Some(next),
        }
    }

    /// Returns the board, if there is one.
    pub fn board(&self) -> Option<&BoardReader> {
        self.board.as_ref()
    }

    /// Maps what the board has now. `current` is the answer of the master, if that is current.
    pub fn refresh(&mut self, current: Option<&Facts>, now_ms: u64) {
        if let Some(next) = &mut self.next
            && let Some(facts) = current
            && now_ms >= next.try_at_ms
        {
            let sender = Sender::of(&facts.status.master, facts.at_ms);
            if !sender.is_same(&next.sender) {
                match (next.find)() {
                    Ok(board) => (self.board, next.sender) = (board, sender),
                    Err(_) => next.try_at_ms = now_ms + RETRY_MS,
                }
            }
        }
        if let Some(board) = &mut self.board {
            // Without memory for new blocks, those that are mapped are still read.
            let _ = board.refresh();
        }
    }
}

impl fmt::Debug for BoardSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BoardSource")
            .field("board", &self.board)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_master_is_another_one_by_pid_version_or_start() {
        let master = |pid, uptime_s| MasterStatus {
            pid,
            uptime_s,
            ..MasterStatus::default()
        };
        let first = Sender::of(&master(1, 60), 100_000);
        assert!(first.is_same(&Sender::of(&master(1, 70), 110_900)));
        assert!(!first.is_same(&Sender::of(&master(1, 2), 110_900)));
        assert!(!first.is_same(&Sender::of(&master(2, 70), 110_900)));
        let other = MasterStatus {
            version: "2".into(),
            ..master(1, 60)
        };
        assert!(!first.is_same(&Sender::of(&other, 100_000)));
    }
}
