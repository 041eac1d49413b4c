//! Defines what the policy orders, and the incidents that it reports to the log.
//!
//! An incident is a value. [`crate::master::incident_text`] has its sentence, so wording can change without
//! a change of the policy.

use nix::sys::signal::Signal;

use super::death_log::{Death, DeathReason};
use super::event::{Exit, Millis, PoolStep, StopMode};
use super::slots::{KillReason, RecycleReason, SlotId};
use crate::link::ids::{Generation, Pid, Slot};

/// An order to the main loop. Orders are carried out in the given order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Fork a child, and report exactly one of [`super::event::Event::Forked`] and
    /// [`super::event::Event::ForkFailed`].
    Fork {
        slot: Slot,
        /// Says which configuration the child runs.
        generation: Generation,
    },
    /// Order a child to drain, by a message on its socketpair.
    Drain {
        pid: Pid,
        /// When the drain must be over.
        deadline: Millis,
        /// Whether the server stops. If so, connections are closed after their answers. If not, they are
        /// handed to other workers, or stay until the deadline.
        stop: bool,
    },
    /// Order a jobs process to claim no further job.
    EndClaims { pid: Pid },
    /// Do one step of a reload with a pool process that stays.
    Pool {
        pid: Pid,
        step: PoolStep,
        /// The slot of the pool process in the new generation, and that generation.
        at: (Slot, Generation),
    },
    /// Find out what a worker is stuck in, and report it with [`super::event::Event::Diagnosed`] before the
    /// next action, because that action may end the worker.
    Diagnose { pid: Pid },
    /// Send a child a signal. It is no error if the child has exited already.
    Kill {
        pid: Pid,
        /// - QUIT: exit now.
        /// - TERM: retire, because its keeper has died; exit, because the drain deadline has passed; or exit before
        ///   it was ready.
        /// - ABRT: it is stuck, dump a core.
        /// - KILL: it was not ready in time, or an earlier signal had no effect.
        signal: Signal,
    },
    /// Send SIGKILL to the keeper of a dead worker.
    KillKeeper { pid: Pid },
    /// Fork an observer, and report [`super::event::Event::ObserverForked`] or
    /// [`super::event::Event::ObserverForkFailed`]: exactly one of them.
    ForkObserver,
    /// Send an observer QUIT (exit), TERM (exit; only if it was forked before an upgrade) or KILL.
    SignalObserver { pid: Pid, signal: Signal },
    /// The result of the start, given once. After an error all children are stopped, and [`Action::Exit`]
    /// follows without another event.
    StartUpDone(Result<(), NotReady>),
    /// The result of a reload, given once for each reload. After an error the old generation continues.
    ReloadDone {
        generation: Generation,
        result: Result<(), NotReady>,
    },
    /// The time of [`super::event::Event::StopAfter`] is over. Report [`super::event::Event::Stop`].
    StopDue,
    Log {
        level: log::Level,
        incident: Incident,
        /// The number of lines that the limiter has suppressed before this one.
        suppressed: u32,
    },
    /// No child is left. The last action of all.
    Exit { code: u8 },
}

impl Action {
    pub(crate) fn child(&self) -> Option<Pid> {
        match self {
            Action::Drain { pid, .. }
            | Action::EndClaims { pid }
            | Action::Pool { pid, .. }
            | Action::Diagnose { pid }
            | Action::Kill { pid, .. }
            | Action::KillKeeper { pid }
            | Action::SignalObserver { pid, .. } => Some(*pid),
            Action::Fork { .. }
            | Action::ForkObserver
            | Action::StartUpDone(_)
            | Action::ReloadDone { .. }
            | Action::StopDue
            | Action::Log { .. }
            | Action::Exit { .. } => None,
        }
    }

    /// Returns whether this is the result of a start or a reload.
    pub(crate) fn is_result(&self) -> bool {
        matches!(self, Action::StartUpDone(_) | Action::ReloadDone { .. })
    }
}

/// A child as log lines name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChildName {
    pub(crate) pid: Pid,
    pub(crate) slot_id: SlotId,
}

/// What the log reports about child processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incident {
    Child(ChildName, ChildIncident),
    Died(Box<Death>, AfterDeath),
    ForkRefused {
        slot: Slot,
        is_successor: bool,
        /// The error text of the system.
        reason: String,
        retry_in: Millis,
    },
    /// The keeper of this living worker has died.
    KeeperLost(Pid, AfterKeeper),
    KeeperStuck {
        keeper: Pid,
        worker: Pid,
    },
    Observer(ObserverIncident),
    /// A child that the policy does not know was reaped.
    UnknownReaped(Pid),
    /// A report that its sender may not send, or has sent before.
    ReportIgnored(Pid, &'static str),
    /// The master did not run for this time or longer.
    MasterPaused(Millis),
    ScaleDeferred,
    ScaleRefused,
    /// The number of workers before, and now.
    Scaled(usize, usize),
    /// [`super::event::Event::Reload`] came while [`super::fleet::Fleet::can_reload`] returned false.
    ReloadIgnored,
    /// The stop begins after this time.
    StopScheduled(Millis),
    /// This number of workers leaves now.
    StopsNow(usize),
    /// This number of workers drains, for this time at most.
    Stops(usize, Millis),
    /// The number of lines of each kind that the limiter has suppressed.
    SuppressedTroubles(u32),
    SuppressedForkRefusals(u32),
    SuppressedRecycles(u32),
}

/// What the log reports about the observer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObserverIncident {
    Died {
        pid: Pid,
        how: Exit,
        uptime: Millis,
        retry_in: Millis,
    },
    ForkRefused {
        /// The error text of the system.
        reason: String,
        retry_in: Millis,
    },
    /// It was stopped (SIGSTOP) for too long, and gets SIGKILL.
    Stopped(Pid),
}

/// What the log reports about one child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChildIncident {
    Started,
    /// The value is the time since its fork.
    Ready(Millis),
    Retires,
    /// The text says what it is stuck in.
    Stuck(String),
    Recycled(RecycleReason),
    Signalled(Signal, KillReason),
    /// SIGKILL did not end it. Another child gets its slot.
    SurvivedKill,
    /// SIGKILL did not end it. Its slot was given up before, so no child follows.
    SurvivedKillUnneeded,
}

impl ChildIncident {
    pub(crate) fn of(self, pid: Pid, slot_id: SlotId) -> Incident {
        Incident::Child(ChildName { pid, slot_id }, self)
    }
}

/// What follows when the keeper of a living worker has died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterKeeper {
    Nothing,
    RetiresNow,
    RetiresWhenReady,
}

/// What follows from a death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterDeath {
    Nothing,
    /// Another child is forked after this wait. The second value counts young deaths.
    Replacement(Millis, u32),
    /// A session has died. No process replaces it.
    ConnectionLost,
    /// A successor has died before it was ready, so the old child continues. Another successor is forked after this
    /// wait. The second value counts young deaths.
    NextSuccessor(Millis, u32),
}

/// Why the workers of a generation did not all become ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotReady {
    /// With the error text of the system.
    ForkRefused(Slot, String),
    /// The second value is only for a pool process: its program that died last, and why.
    Died(Box<Death>, Option<(Pid, DeathReason)>),
    Killed(ChildName, KillReason),
    SurvivedKill(ChildName),
    Stopped(StopMode),
    /// An upgrade is rolled back because the new program has failed.
    UpgradeFailed(String),
    /// A pool process that stays cannot serve the next generation, for this reason.
    PoolRefused(String),
    /// A pool process that stays has not reported in time.
    PoolSilent,
}
