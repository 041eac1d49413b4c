//! How workers leave when the master wants it: a drain with its deadline, the stop, the stop at once.
//!
//! Here the orders are given and the first signal of those who overstay is set; [`super::watch`]
//! sends it. What asks for a drain (reload, scale, retire) is decided elsewhere.

use log::Level;
use nix::sys::signal::Signal;

use super::children::{Child, Stage};
use super::event::{Action, Millis, Span};
use super::fleet::{Fleet, Phase};
use super::watch::{AFTER_DRAIN, STARTING_GRACE, kill_after};
use crate::link::ids::{Generation, Pid};
use crate::logging::pluralize;

/// Two orders to stop that come so close are one: `timeout` and service managers send TERM to a
/// process and to its group.
const SAME_STOP: Millis = 100;

/// How a worker is told to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leave {
    /// Drain; its connections go on elsewhere.
    Retire,
    /// Drain; its connections end with their last answer.
    Stop,
    /// Now, whatever it does.
    AtOnce,
}

impl Fleet {
    /// Gives up a generation's seats from a slot on: highest first, their workers leave.
    pub(super) fn close(&mut self, generation: Generation, from: usize, leave: Leave) {
        for seat in self.table.seats_of(generation).into_iter().rev() {
            if usize::from(seat.slot.0) >= from {
                for pid in self.table.close(seat) {
                    self.dismiss(pid, leave);
                }
            }
        }
    }

    /// Tells a worker that holds no seat any more to leave. One that is being ended by force
    /// already needs no order.
    pub(super) fn dismiss(&mut self, pid: Pid, leave: Leave) {
        let now = self.now;
        let child = self.child_mut(pid);
        let mut deadline = now + child.limits.drain_timeout;
        if let Stage::Draining { deadline: earlier } = child.stage {
            deadline = deadline.min(earlier);
        }
        begin_drain(child, deadline, now);
        if child.doom.is_some() {
            return;
        }
        if leave != Leave::AtOnce {
            let stop = leave == Leave::Stop;
            return self.act(Action::Drain {
                pid,
                deadline,
                stop,
            });
        }
        // Before a worker handles it, QUIT would write a core.
        let signal = match child.ready_at {
            Some(_) => Signal::SIGQUIT,
            None => Signal::SIGTERM,
        };
        child.doom = Some("the server stops now".to_owned());
        child.next = Some((now + kill_after(signal), Signal::SIGKILL));
        self.act(Action::Kill { pid, signal });
    }

    /// Serves on for a while, and stops then. The last word counts.
    pub(super) fn stop_after(&mut self, delay: Millis) {
        if matches!(self.phase, Phase::Stopping { .. } | Phase::Gone) {
            return;
        }
        self.stop_at = Some(self.now.saturating_add(delay));
        let text = format!(
            "stops in {}: serves until then, and is not ready for who asks",
            Span(delay)
        );
        self.log(Level::Info, text);
    }

    /// Ends everything, the first time gracefully unless told otherwise. `reason` is for whoever
    /// waits for a verdict.
    pub(super) fn stop(&mut self, mut leave: Leave, mut code: u8, reason: &str) {
        match self.phase {
            Phase::Gone
            | Phase::Stopping {
                leave: Leave::AtOnce,
                ..
            } => return,
            Phase::Stopping { since, .. }
                if leave == Leave::Stop && self.now < since + SAME_STOP =>
            {
                return;
            }
            Phase::Stopping { code: first, .. } => (leave, code) = (Leave::AtOnce, first),
            Phase::StartUp | Phase::Serving => {}
        }
        self.refuse_newcomers(reason);
        self.stop_at = None;
        let since = self.now;
        self.phase = Phase::Stopping { leave, code, since };
        let pids: Vec<Pid> = self.table.children.keys().copied().collect();
        let how = match leave {
            Leave::AtOnce => pluralize(pids.len(), "worker leaves now", "workers leave now"),
            Leave::Stop | Leave::Retire => {
                let drain = pluralize(pids.len(), "worker drains", "workers drain");
                format!("{drain} within {}", Span(self.limits.drain_timeout))
            }
        };
        self.log(Level::Info, format!("stopping: {how}"));
        for seat in self.table.seats_of(self.serving) {
            self.table.close(seat);
        }
        // Those of older generations too: their connections have nowhere to go any more.
        for pid in pids {
            self.dismiss(pid, leave);
        }
    }
}

/// Puts a child into the draining stage, with the signals that await it if it overstays.
pub(super) fn begin_drain(child: &mut Child, deadline: Millis, now: Millis) {
    if !child.drains() {
        child.since = now;
    }
    child.stage = Stage::Draining { deadline };
    if child.doom.is_some() {
        return; // Its end is under way already, and sooner.
    }
    child.next = Some(match child.ready_at {
        Some(_) => (deadline + AFTER_DRAIN, Signal::SIGTERM),
        // It has no call to finish, and may not read orders for long. If its ready is on the way,
        // it comes in time.
        None => (deadline.min(now + STARTING_GRACE), Signal::SIGTERM),
    });
}
