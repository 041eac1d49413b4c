//! The fleet as plain data, and back: what one program knows of its workers, for the next one.
//!
//! Pure, like the fleet itself. Each table is taken apart by name, so that a field that is added to
//! it can't be forgotten here. What comes from another version is checked before it is believed:
//! a table that contradicts itself is an error, never a panic. Limits on log lines start afresh.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::death_log::{Death, Deaths};
use super::event::{Exit, MAX_COUNT, Millis, PolicyLimits};
use super::fleet::{Fleet, ServerPhase};
use super::slots::{
    ChildRecord, RecycleState, SlotEntry, SlotId, SlotState, SlotTable, WorkerStage, slot_id,
};
use crate::link::ids::{Generation, Pid, Slot};
use crate::throttle::Throttle;

/// After an upgrade the pool processes of the program before serve on, without the master. New ones are
/// forked for them after this time, unless the reload that follows has replaced their generation.
const POOLS_AFTER_UPGRADE: Millis = 3_000;

/// A fleet between two reloads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetState {
    pub generation: u32,
    /// The last generation's number given out.
    pub last_generation: u32,
    /// What the configuration of the generation that serves says.
    pub limits: PolicyLimits,
    /// How many workers there shall be.
    pub count: usize,
    /// The slots of the generation that serves.
    pub seats: Vec<SeatState>,
    /// Every child not yet reaped.
    pub children: Vec<ChildState>,
    /// The last deaths, oldest first.
    pub deaths: Vec<DeathState>,
    /// All deaths, those included whose record is gone.
    pub deaths_total: u64,
}

/// A slot and who sits there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatState {
    pub slot: u16,
    /// Who sits there, if anybody does.
    pub worker: Option<i32>,
    /// When to fork, if nobody does.
    pub until: Option<Millis>,
    /// Who is to follow that worker, if anybody is there already.
    #[serde(default)]
    pub coming: Option<i32>,
    /// When to fork the one that is to follow, if nobody is.
    #[serde(default)]
    pub coming_until: Option<Millis>,
    /// When that last changed.
    pub since: Millis,
    /// How soon it may be forked again.
    pub throttle: Throttle,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildState {
    pub pid: i32,
    pub generation: u32,
    pub slot: u16,
    pub limits: PolicyLimits,
    /// When it was forked.
    pub born: Millis,
    pub ready_at: Option<Millis>,
    /// Where it is in its life.
    pub stage: WorkerStage,
    pub since: Millis,
    /// The last sign of its event loop.
    pub heartbeat: Millis,
    /// When it gets its next signal, and which.
    pub next: Option<(Millis, i32)>,
    /// Why it is being ended by force, if it is.
    pub doom: Option<String>,
    /// What it has been through.
    #[serde(default)]
    pub wear: RecycleState,
    /// Whether it got KILL.
    #[serde(default)]
    pub killed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeathState {
    /// Where the worker was.
    pub slot: u16,
    pub pid: i32,
    pub generation: u32,
    /// Its exit code, if it left by one.
    pub exit: Option<i32>,
    /// The signal that ended it, if one did, and whether a core was dumped.
    pub signal: Option<(i32, bool)>,
    /// From its fork to its end.
    pub uptime: Millis,
    /// The method that it last ran.
    pub method: Option<String>,
    /// Its resident memory, in bytes.
    pub rss_bytes: u64,
    /// Why, as far as was known.
    pub reason: String,
    /// The wall clock, in unix seconds.
    pub at: u64,
}

impl Fleet {
    /// All that another program needs to know. To be asked between two reloads
    /// ([`Fleet::can_reload`]) and between two events: no verdict is open then and no fork ordered; or
    /// after [`Fleet::give_up`], and then it is the other program that forks what was ordered.
    pub fn export(&self) -> FleetState {
        let SlotTable {
            slots: seats,
            children,
        } = &self.table;
        let is_wanted = |(slot_id, tenure): &(&SlotId, &SlotEntry)| {
            tenure.is_active && slot_id.generation == self.serving && !slot_id.is_pool()
        };
        // Pool processes are told of elsewhere: a program that does not know them must not end them.
        let is_worker = |(_, child): &(&Pid, &ChildRecord)| !child.slot_id.is_pool();
        FleetState {
            generation: self.serving.0,
            last_generation: self.last_generation.0,
            limits: self.limits,
            count: self.count,
            seats: seats.iter().filter(is_wanted).map(seat_state).collect(),
            children: children.iter().filter(is_worker).map(child_state).collect(),
            deaths: self.deaths.iter().map(death_state).collect(),
            deaths_total: self.deaths.total(),
        }
    }

    /// The fleet that another program has left, at `now` of the same clock. What has come due
    /// meanwhile is for the first [`Fleet::tick`], when the workers' reports have been heard: the
    /// ready of one whose time was over during the exec may be among them.
    ///
    /// # Errors
    /// What contradicts itself in it.
    pub fn import(state: FleetState, now: Millis) -> Result<Self, String> {
        let FleetState {
            generation,
            last_generation,
            limits,
            count,
            seats,
            children,
            deaths,
            deaths_total,
        } = state;
        let serving = Generation(generation);
        if !(1..=MAX_COUNT).contains(&count) || last_generation < generation {
            return Err(format!(
                "{count} workers of generation {generation}, the last one being {last_generation}"
            ));
        }
        let mut fleet = Fleet::empty(limits, now);
        fleet.phase = ServerPhase::Serving;
        fleet.serving = serving;
        fleet.last_generation = Generation(last_generation);
        fleet.count = count;
        let pids: BTreeSet<i32> = children.iter().map(|child| child.pid).collect();
        if pids.len() != children.len() || pids.first().is_some_and(|&pid| pid <= 1) {
            return Err("the table of workers names a pid twice, or one that is none".into());
        }
        for state in children {
            // Its heartbeat too is for the first tick, before which the scoreboard is read.
            let (pid, child) = child(state)?;
            fleet.table.children.insert(pid, child);
        }
        for state in seats {
            let at = slot_id(serving, state.slot);
            let sits = |pid: Pid| {
                let child = fleet.table.children.get(&pid);
                child.is_some_and(|child| child.slot_id == at && !child.drains())
            };
            let holder = |worker: Option<i32>, until: Option<Millis>| match worker.map(Pid) {
                Some(pid) if sits(pid) => Ok(Some(SlotState::Worker(pid))),
                Some(pid) => Err(format!("slot {} has no worker {pid}", state.slot)),
                None => Ok(until.map(|until| SlotState::Throttled { until })),
            };
            let first = holder(state.worker, state.until)?;
            let second = holder(state.coming, state.coming_until)?;
            if second.is_some() && (state.worker.is_none() || state.worker == state.coming) {
                return Err(format!("slot {} has only one to follow", state.slot));
            }
            let tenure = SlotEntry {
                state: first.unwrap_or(SlotState::Throttled { until: now }),
                successor: second,
                is_active: true,
                throttle: state.throttle,
                since: state.since,
            };
            if usize::from(state.slot) >= count || fleet.table.slots.insert(at, tenure).is_some() {
                return Err(format!("slot {} is there twice, or is none", state.slot));
            }
        }
        if fleet.table.slots.len() != count {
            return Err(format!(
                "{} slots where {count} are wanted",
                fleet.table.slots.len()
            ));
        }
        // The pool processes that there were serve until nobody uses them.
        for number in 0..limits.pools {
            let slot = Slot::of_pool(number);
            let entry = SlotEntry {
                state: SlotState::Throttled {
                    until: now + POOLS_AFTER_UPGRADE,
                },
                successor: None,
                is_active: true,
                throttle: Throttle::default(),
                since: now,
            };
            let at = SlotId {
                generation: serving,
                slot,
            };
            fleet.table.slots.insert(at, entry);
        }
        fleet.deaths = Deaths::of(deaths.into_iter().map(death).collect(), deaths_total);
        fleet.next_tick_at = fleet.earliest();
        Ok(fleet)
    }
}

fn seat_state((slot_id, tenure): (&SlotId, &SlotEntry)) -> SeatState {
    let SlotEntry {
        state,
        successor,
        // those that are not are left out
        is_active: _,
        throttle,
        since,
    } = tenure;
    let parts = |holder: SlotState| match holder {
        SlotState::Worker(pid) => (Some(pid.0), None),
        SlotState::Throttled { until } => (None, Some(until)),
        SlotState::Forking => (None, None),
    };
    let (worker, until) = parts(*state);
    let (coming, coming_until) = successor.map_or((None, None), parts);
    SeatState {
        slot: slot_id.slot.0,
        worker,
        until,
        coming,
        coming_until,
        since: *since,
        throttle: throttle.clone(),
    }
}

fn child_state((pid, child): (&Pid, &ChildRecord)) -> ChildState {
    let ChildRecord {
        slot_id,
        limits,
        forked_at,
        ready_at,
        stage,
        stage_since,
        heartbeat,
        next_signal,
        kill_reason,
        recycle,
        is_sigkill_sent,
    } = child;
    ChildState {
        pid: pid.0,
        generation: slot_id.generation.0,
        slot: slot_id.slot.0,
        limits: *limits,
        born: *forked_at,
        ready_at: *ready_at,
        stage: *stage,
        since: *stage_since,
        heartbeat: *heartbeat,
        next: next_signal.map(|(at, signal)| (at, signal as i32)),
        doom: kill_reason.clone(),
        wear: recycle.clone(),
        killed: *is_sigkill_sent,
    }
}

fn child(state: ChildState) -> Result<(Pid, ChildRecord), String> {
    let next = match state.next {
        None => None,
        Some((at, number)) => {
            let signal = Signal::try_from(number).map_err(|_| format!("signal {number}"))?;
            Some((at, signal))
        }
    };
    let child = ChildRecord {
        slot_id: slot_id(Generation(state.generation), state.slot),
        limits: state.limits,
        forked_at: state.born,
        ready_at: state.ready_at,
        stage: state.stage,
        stage_since: state.since,
        heartbeat: state.heartbeat,
        next_signal: next,
        kill_reason: state.doom,
        recycle: state.wear,
        is_sigkill_sent: state.killed,
    };
    Ok((Pid(state.pid), child))
}

fn death_state(death: &Death) -> DeathState {
    let Death {
        slot,
        pid,
        generation,
        how,
        uptime,
        method,
        rss_bytes,
        reason,
        at,
    } = death;
    let (exit, signal) = match *how {
        Exit::Code(code) => (Some(code), None),
        Exit::Signal {
            number,
            core_dumped,
        } => (None, Some((number, core_dumped))),
    };
    DeathState {
        slot: slot.0,
        pid: pid.0,
        generation: generation.0,
        exit,
        signal,
        uptime: *uptime,
        method: method.clone(),
        rss_bytes: *rss_bytes,
        reason: reason.clone(),
        at: *at,
    }
}

fn death(state: DeathState) -> Death {
    Death {
        slot: Slot(state.slot),
        pid: Pid(state.pid),
        generation: Generation(state.generation),
        how: match state.signal {
            Some((number, core_dumped)) => Exit::Signal {
                number,
                core_dumped,
            },
            None => Exit::Code(state.exit.unwrap_or_default()),
        },
        uptime: state.uptime,
        method: state.method,
        rss_bytes: state.rss_bytes,
        reason: state.reason,
        at: state.at,
    }
}
