//! Stuck workers in a simulated kernel: what is found out about them first, which ones are ended, and which
//! ones only get a successor.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::Signal;

use super::action::Action;
use super::event::{Event, Exit, PolicyLimits};
use super::fleet_world::{LIMITS, SEGV, World};
use crate::link::ids::Pid;
use crate::protocol::control::WorkerPhase;

const EVIDENCE: &str = "all 2 handler threads are stuck: hang (id 7) for 1.2 s";

fn wedge(world: &mut World, slot: u16) -> Pid {
    let pid = world.pid(slot);
    let evidence = EVIDENCE.to_owned();
    world.send(Event::AllThreadsStuck { pid, evidence });
    pid
}

fn reason(world: &World) -> String {
    world
        .fleet
        .deaths()
        .iter()
        .last()
        .unwrap()
        .reason
        .to_string()
}

#[test]
fn a_wedged_worker_waits_for_nobody_and_leaves_a_record_though_it_ends_in_order() {
    let mut world = World::serving(LIMITS);
    let worn = world.pid(0);
    world.send(Event::MaxCallsReached {
        pid: worn,
        calls: 1,
    });
    let wedged = wedge(&mut world, 1);
    assert_eq!(world.forks(1).len(), 2, "beyond the budget of one");
    assert!(world.drained().is_empty(), "the successor first");
    world.all_ready();
    assert_eq!(world.drained(), [worn, wedged].into());
    world.let_leave();
    assert_eq!(world.fleet.deaths().total(), 1, "the other one is no death");
    assert_eq!(reason(&world), EVIDENCE);
    let told =
        |(_, line): &(_, String)| line.starts_with("worker 102 (slot 1): all 2 handler threads");
    assert!(world.lines().iter().any(told));
}

#[test]
fn that_a_worker_is_wedged_is_news_once() {
    let mut world = World::serving(LIMITS);
    let first = world.pid(1);
    assert!(world.fleet.wants_diagnosis(first));
    let wedged = wedge(&mut world, 1);
    assert!(!world.fleet.wants_diagnosis(wedged));
    let lines = world.lines().len();
    world.send(Event::AllThreadsStuck {
        pid: wedged,
        evidence: "all 2 handler threads are stuck: something else".to_owned(),
    });
    assert_eq!(world.lines().len(), lines);
    world.all_ready();
    world.let_leave();
    assert_eq!(reason(&world), EVIDENCE);
    assert!(!world.fleet.wants_diagnosis(wedged), "it is gone");
}

#[test]
fn threads_that_stick_again_and_again_are_throttled_and_calls_on_the_loop_go_on() {
    let mut world = World::serving(LIMITS);
    for _ in 0..5 {
        wedge(&mut world, 2);
        world.all_ready();
        world.let_leave();
    }
    let sixth = wedge(&mut world, 2);
    assert_eq!(world.forks(2).len(), 6, "a first one, five at once");
    assert_eq!((world.pid(2), world.fleet.ready_count()), (sixth, 4));
    world.pass(100);
    assert_eq!(world.forks(2).len(), 7);
}

#[test]
fn a_worker_that_was_to_be_recycled_anyway_and_wedges_does_not_wait_any_more() {
    let mut world = World::serving(LIMITS);
    for slot in [0, 1] {
        let pid = world.pid(slot);
        world.send(Event::MaxCallsReached { pid, calls: 1 });
    }
    assert_eq!(world.forks(1).len(), 1);
    wedge(&mut world, 1);
    assert_eq!(world.forks(1).len(), 2);
}

#[test]
fn a_wedged_worker_is_replaced_during_a_reload_too() {
    let mut world = World::serving(LIMITS);
    world.send(Event::Reload { limits: LIMITS });
    let wedged = wedge(&mut world, 1);
    let successor = world
        .living
        .iter()
        .find(|(_, it)| it.slot_id == world.living[&wedged].slot_id && !it.leaves);
    assert!(successor.is_some());
    assert_eq!(world.forks(1).len(), 2);
    world.all_ready();
    world.let_leave();
    assert_eq!((world.living.len(), world.fleet.ready_count()), (4, 4));
}

#[test]
fn a_stuck_event_loop_is_found_out_in_time_whatever_program_is_there_by_then() {
    let mut world = World::serving(LIMITS);
    let pid = world.pid(1);
    world.living.get_mut(&pid).unwrap().stuck = true;
    let since = world.now;
    for _ in 0..3 {
        world.pass(3_000);
        world.cross();
    }
    world.pass(2_000);
    let found_out = world.signalled(pid, Signal::SIGABRT).unwrap();
    assert!((since + 9_000..=since + 10_500).contains(&found_out));
}

#[test]
fn a_stuck_event_loop_is_looked_at_before_it_gets_abrt() {
    let mut world = World::serving(LIMITS);
    let pid = world.pid(0);
    world.living.get_mut(&pid).unwrap().stuck = true;
    world.pass(10_000);
    let at = |wanted: &Action| {
        world
            .history
            .iter()
            .position(|(_, action)| action == wanted)
    };
    let abrt = Action::Kill {
        pid,
        signal: Signal::SIGABRT,
    };
    assert!(at(&Action::Diagnose { pid }).unwrap() < at(&abrt).unwrap());
    world.die(
        pid,
        Exit::Signal {
            number: 6,
            core_dumped: false,
        },
    );
    assert_eq!(
        reason(&world),
        "event loop stuck for 10 s; S asleep in read(0x5, ...)"
    );
}

#[test]
fn a_draining_worker_whose_event_loop_sticks_is_not_waited_for() {
    let mut world = World::serving(LIMITS);
    let pid = world.pid(0);
    world.send(Event::Retiring { pid });
    world.living.get_mut(&pid).unwrap().stuck = true;
    world.pass(10_000);
    assert_eq!(world.signalled(pid, Signal::SIGABRT), Some(world.now));
    world.pass(500);
    assert_eq!(world.signalled(pid, Signal::SIGKILL), Some(world.now));
    world.die(
        pid,
        Exit::Signal {
            number: 6,
            core_dumped: false,
        },
    );
    assert!(reason(&world).starts_with("event loop stuck for 10 s while it drained; "));
}

#[test]
fn the_master_does_not_wait_for_one_that_the_kernel_holds() {
    let mut world = World::serving(LIMITS);
    let pid = world.pid(3);
    world.living.get_mut(&pid).unwrap().stuck = true;
    world.pass(10_500);
    assert!(world.signalled(pid, Signal::SIGKILL).is_some());
    world.pass(2_999);
    assert_eq!(world.forks(3).len(), 1);
    world.pass(1);
    assert_eq!(world.forks(3).len(), 2);
    world.all_ready();
    assert_eq!(world.fleet.ready_count(), 4);
    assert_eq!(world.count(WorkerPhase::Draining), 1);
    world.pass(600_000);
    world.let_leave();
    assert_eq!(world.fleet.deaths().total(), 1);
    assert_eq!(world.living.len(), 4);
}

#[test]
fn a_newcomer_that_the_kernel_holds_fails_its_reload() {
    let mut world = World::serving(LIMITS);
    world.send(Event::Reload {
        limits: PolicyLimits {
            heartbeat_timeout: 1_000,
            ..LIMITS
        },
    });
    let canary = world.pid_in(2, 0);
    world.ready(canary);
    world.living.get_mut(&canary).unwrap().stuck = true;
    world.pass(4_500);
    assert!(world.refusal().unwrap().contains("survived SIGKILL"));
    world.die(canary, SEGV);
    world.pass(500);
    world.let_leave();
    assert_eq!(world.fleet.ready_count(), 4);
}
