//! Handles sessions, which are children of acceptors: records their crashes, and adopts those whose acceptor has died.
//! The master reaps the adopted sessions, and gives them the orders that their acceptor would have given. A stop also
//! ends the acceptors and pool processes of the program before an upgrade, with their sessions.

use std::collections::BTreeMap;
use std::rc::Rc;

use nix::sys::signal::Signal;

use super::children::generation_info::GenerationInfo;
use super::core::{Master, now};
use super::policy::event::Millis;
use crate::link::session_table::DirectOrder;
use crate::sys::process::Pid;

/// The time from the deadline of a stop to the SIGKILL. Until then an acceptor ends its sessions by itself.
const STOP_KILL_DELAY: Millis = 1000;

/// Handles the end of an acceptor: its sessions continue as long as they would have with it.
pub fn adopt_sessions(
    master: &mut Master<'_>,
    acceptor: Pid,
    known: &Rc<GenerationInfo>,
    reaped: &[Pid],
) {
    let mut left = master.workers.sessions.left_by(acceptor, known, reaped);
    // A session can write the pid of another child of this process into a record that belongs to its acceptor.
    left.retain(|(pid, _)| {
        !master.workers.is_other(*pid) && !master.orphans.cannot_be_keeper(*pid)
    });
    master.workers.sessions.adopt(acceptor, left, known);
    order_sessions(master);
    note_adopted_sessions(master);
}

/// Passes the generations of the sessions without an acceptor to the policy.
pub fn note_adopted_sessions(master: &mut Master<'_>) {
    let generations = master.workers.sessions.adopted.generations().collect();
    let actions = master.fleet.note_sessions(generations, now());
    master.actions.extend(actions);
}

/// Notes the crashes of sessions, and passes them to the policy. Call it at each tick too, because a
/// report of an acceptor may be lost.
pub fn note_crashed_sessions(master: &mut Master<'_>) {
    let living = master.workers.iter();
    let acceptors = living.filter(|(_, handle)| handle.slot.acceptor().is_some());
    let known: BTreeMap<Pid, Rc<GenerationInfo>> = acceptors
        .map(|(pid, handle)| (pid, Rc::clone(&handle.known)))
        .collect();
    // After an upgrade, the acceptors of the program before are unknown.
    let serving = &master.contexts.serving.known;
    let of = |acceptor: Pid| Some(Rc::clone(known.get(&acceptor).unwrap_or(serving)));
    master.workers.sessions.note_crashes(of);
    pass_session_deaths(master);
}

pub fn pass_session_deaths(master: &mut Master<'_>) {
    for death in master.workers.sessions.take_deaths() {
        let actions = master.fleet.session_died(death, now());
        master.actions.extend(actions);
    }
}

/// Gives the sessions without an acceptor the orders that their acceptor would give:
///
/// - At a stop they close their connections after the answers.
/// - Otherwise, those that are not of the serving generation hand their connections over. A session of a later
///   generation comes from a failed reload.
pub fn order_sessions(master: &mut Master<'_>) {
    let (now, serving) = (now(), master.fleet.generation());
    let (context, workers) = (&master.contexts.serving, &mut master.workers);
    match master.fleet.stop_deadline() {
        Some(until) if until <= now => {
            workers.signal_reserved(Signal::SIGQUIT, true);
            workers.sessions.adopted.kill_all();
        }
        Some(until) => {
            // The pool processes leave when nothing uses them any more.
            workers.signal_reserved(Signal::SIGTERM, false);
            (workers.sessions.adopted).order(|_| true, DirectOrder::Stop, until);
        }
        None => {
            let drain_timeout = context.settings.workers.drain_timeout;
            let drain_until = now + drain_timeout.as_millis() as Millis;
            let scoreboard = workers.board.records();
            workers.sessions.set_serving(scoreboard, serving, context);
            let is_other = |generation| generation != serving;
            (workers.sessions.adopted).order(is_other, DirectOrder::Drain, drain_until);
        }
    }
}

/// Writes into the scoreboard which generation serves each isolated listener. Acceptors read it to learn whether
/// another acceptor takes over.
pub fn note_serving(master: &mut Master<'_>) {
    let generation = master.fleet.generation();
    let scoreboard = master.workers.board.records();
    let sessions = &mut master.workers.sessions;
    sessions.set_serving(scoreboard, generation, &master.contexts.serving);
}

/// Kills overdue sessions without an acceptor, and at the end of a stop the remaining children of the program
/// before an upgrade. Returns whether the master must wait for any of them.
pub fn kill_overdue_children(master: &mut Master<'_>) -> bool {
    master.workers.sessions.adopted.pass_time(now());
    if overdue_at(master).is_some_and(|at| at <= now()) {
        master.workers.signal_reserved(Signal::SIGKILL, true);
    }
    let stops = master.exit_code.is_some();
    !master.workers.sessions.adopted.is_empty() || stops && master.workers.has_reserved()
}

/// Returns when a stop kills the remaining children of the program before an upgrade; `None` if there are none.
pub fn overdue_at(master: &Master<'_>) -> Option<Millis> {
    let until = master.fleet.stop_deadline()?;
    master
        .workers
        .has_reserved()
        .then_some(until + STOP_KILL_DELAY)
}
