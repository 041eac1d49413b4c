//! Tests the policy in scenarios of a server's life, with a simulated kernel.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::Signal;

use super::action::{Action, NotReady};
use super::death_log::DeathReason;
use super::event::{Event, Exit, PolicyLimits, StopMode};
use super::fleet_world::{LIMITS, SEGV, World};
use crate::link::ids::{Generation, Pid, Slot};
use crate::protocol::control::WorkerPhase;

fn reload(count: usize) -> Event {
    let limits = PolicyLimits { count, ..LIMITS };
    Event::Reload { limits }
}

// Start-up

#[test]
fn a_start_is_done_when_the_last_worker_is_ready_and_not_before() {
    let mut world = World::new(LIMITS);
    assert_eq!(world.living.len(), 4);
    for slot in [2, 0, 3] {
        world.ready(world.pid(slot));
    }
    assert!(!world.did(&Action::StartUpDone(Ok(()))));
    world.ready(world.pid(1));
    assert!(world.did(&Action::StartUpDone(Ok(()))));
    assert_eq!(world.fleet.ready_count(), 4);
}

/// Checks a start that has failed: it gives the reason, ends the other children, and exits with 71.
fn assert_failed_start(mut world: World, reason: &str) {
    let verdict = world.history.iter().find_map(|(_, action)| match action {
        Action::StartUpDone(Err(reason)) => Some(reason.to_string()),
        _ => None,
    });
    assert!(verdict.unwrap().contains(reason));
    world.let_leave();
    assert!(world.did(&Action::Exit { code: 71 }));
    assert_eq!(world.fleet.next_deadline(), None);
}

#[test]
fn a_worker_that_dies_before_ready_fails_the_start() {
    let mut world = World::new(LIMITS);
    world.ready(world.pid(0));
    let pid = world.pid(1);
    world.die(pid, Exit::Code(3));
    assert_failed_start(world, "worker 102 (slot 1) ended by exit code 3");
}

#[test]
fn a_worker_that_misses_boot_timeout_fails_the_start() {
    let mut world = World::new(LIMITS);
    (0..3).for_each(|slot| world.ready(world.pid(slot)));
    let late = world.pid(3);
    world.pass(29_999);
    assert_eq!(world.signalled(late, Signal::SIGKILL), None);
    world.pass(1);
    assert_eq!(world.signalled(late, Signal::SIGKILL), Some(31_000));
    assert_failed_start(world, "not ready within boot-timeout (30 s)");
}

#[test]
fn a_refused_fork_fails_the_start() {
    let mut world = World::new(LIMITS);
    world.hold_forks = true;
    world.refuse_forks = true;
    // A worker retires before the others are ready, and its successor cannot be forked.
    let pid = world.pid(0);
    world.send(Event::Retiring { pid });
    world.do_fork();
    assert_failed_start(world, "slot 0 could not be forked");
}

#[test]
fn a_worker_that_dies_after_ready_is_replaced_during_the_start() {
    let mut world = World::new(LIMITS);
    let pid = world.pid(0);
    world.ready(pid);
    world.die(pid, SEGV);
    world.all_ready();
    assert!(world.did(&Action::StartUpDone(Ok(()))));
}

#[test]
fn a_stop_during_the_start_answers_whoever_waits_for_it() {
    let mut world = World::new(LIMITS);
    world.send(Event::Stop);
    let reason = NotReady::Stopped(StopMode::Stop);
    assert!(world.did(&Action::StartUpDone(Err(reason))));
    let pid = *world.living.keys().next().unwrap();
    world.pass(500);
    assert!(
        world.signalled(pid, Signal::SIGTERM).is_some(),
        "still starting"
    );
    world.let_leave();
    assert!(world.did(&Action::Exit { code: 0 }));
}

// Deaths and the throttle

#[test]
fn a_crash_is_replaced_at_once_and_told_with_all_that_is_known() {
    let mut world = World::serving(LIMITS);
    world.pass(3_200);
    let pid = world.pid(2);
    world.die(pid, SEGV);
    assert_eq!(world.forks(2), [1_000, world.now]);
    let lines = world.lines();
    assert_eq!(
        lines.last().unwrap().1,
        "worker 103 (slot 2) ended by SIGSEGV (core dumped) after 3.2 s: crashed, last method add; \
         replaced at once slot=2 pid=103 generation=1 signal=SIGSEGV core=true uptime_ms=3200 \
         method=add call=103.12 job=ID"
    );
    let death = world.fleet.deaths().iter().next().unwrap();
    assert_eq!((death.pid, death.slot, death.uptime), (pid, Slot(2), 3_200));
    assert_eq!(world.view(2).state, WorkerPhase::Starting);
    assert_eq!(world.view(2).young_deaths, 1);
}

#[test]
fn a_crash_loop_is_throttled_and_shown_and_the_other_slots_go_on() {
    let mut world = World::serving(LIMITS);
    for _ in 0..6 {
        let pid = world.pid(1);
        world.die(pid, Exit::Code(1));
    }
    let view = world.view(1);
    assert_eq!(
        (view.state, view.pid, view.young_deaths),
        (WorkerPhase::Throttled, None, 6)
    );
    assert_eq!(view.next_fork, Some(world.now + 100));
    assert!(
        world
            .lines()
            .last()
            .unwrap()
            .1
            .contains("next try in 100 ms: 6 young deaths")
    );
    assert_eq!(world.fleet.ready_count(), 3);
    let other = world.pid(0);
    world.die(other, SEGV);
    assert_eq!(world.forks(0).len(), 2);
    world.pass(100);
    assert_eq!(world.view(1).state, WorkerPhase::Starting);
    world.all_ready();
    world.pass(60_000);
    assert_eq!(world.view(1).young_deaths, 0, "a minute of health");
}

/// For `span` milliseconds, all workers die as soon as they are forked.
fn crash_loop(world: &mut World, span: u64) {
    let end = world.now + span;
    while world.now < end {
        while let Some(pid) = world.first(WorkerPhase::Starting) {
            world.die(pid, Exit::Code(1));
        }
        let wake = world.fleet.next_deadline().unwrap_or(end).min(end);
        world.pass(wake - world.now);
    }
}

#[test]
fn a_crash_loop_of_all_slots_writes_at_most_twenty_lines_a_minute() {
    let mut world = World::serving(LIMITS);
    for slot in 0..4 {
        let pid = world.pid(slot);
        world.die(pid, Exit::Code(1));
    }
    crash_loop(&mut world, 600_000);
    let lines = world.lines();
    for (at, _) in &lines {
        let minute = lines.iter().filter(|(t, _)| (*at..at + 60_000).contains(t));
        assert!(minute.count() <= 20);
    }
    let forks = world.forks(3);
    let after_burst = &forks[6..];
    assert!(after_burst.windows(13).all(|w| w[12] - w[0] >= 60_000));
    assert!(lines.iter().any(|(_, line)| line.contains("suppressed")));
}

#[test]
fn one_crash_in_seventy_seconds_is_always_replaced_at_once() {
    let mut world = World::serving(LIMITS);
    for _ in 0..10 {
        world.pass(70_000);
        let pid = world.pid(0);
        world.die(pid, SEGV);
        assert_eq!(world.forks(0).last(), Some(&world.now));
        world.all_ready();
    }
}

#[test]
fn without_a_throttle_ten_thousand_deaths_are_ten_thousand_forks() {
    let mut world = World::serving(PolicyLimits {
        respawn_max_delay: 0,
        count: 1,
        ..LIMITS
    });
    // Clear the history, because the checks of the world would be slow otherwise.
    for _ in 0..10_000 {
        world.history.clear();
        let pid = world.pid(0);
        world.die(pid, SEGV);
        assert_eq!(world.forks(0).len(), 1);
    }
    assert_eq!(world.fleet.deaths().total(), 10_000);
    assert_eq!(world.fleet.deaths().iter().len(), 100);
}

#[test]
fn refused_forks_are_tried_again_and_full_strength_is_back_within_two_seconds() {
    let mut world = World::serving(LIMITS);
    world.refuse_forks = true;
    for slot in [0, 1] {
        let pid = world.pid(slot);
        world.die(pid, SEGV);
    }
    assert_eq!(world.view(0).state, WorkerPhase::Throttled);
    let before = world.lines().len();
    world.pass(10_000);
    assert!(world.view(0).refused_forks > 8);
    assert!(world.lines().len() - before <= 10);
    world.refuse_forks = false;
    world.pass(1_000);
    world.all_ready();
    assert_eq!(world.fleet.ready_count(), 4);
}

#[test]
fn what_is_no_worker_is_reaped_and_its_reports_are_ignored() {
    let mut world = World::serving(LIMITS);
    world.die(Pid(4711), SEGV);
    world.ready(Pid(4711));
    world.send(Event::Retiring { pid: Pid(4711) });
    let pid = world.pid(0);
    world.ready(pid);
    assert_eq!(world.fleet.ready_count(), 4);
    assert_eq!(world.fleet.deaths().total(), 0);
    assert!(
        world
            .lines()
            .last()
            .unwrap()
            .1
            .contains("ready for a second time")
    );
}

// Retiring and the drain deadline

#[test]
fn a_retiring_worker_gets_a_successor_at_once_and_its_end_is_no_death() {
    let mut world = World::serving(LIMITS);
    for _ in 0..20 {
        let pid = world.pid(1);
        world.send(Event::Retiring { pid });
        world.send(Event::Retiring { pid });
        assert_ne!(world.pid(1), pid);
        world.all_ready();
        world.die(pid, Exit::Code(0));
    }
    assert_eq!(world.forks(1).len(), 21);
    assert_eq!(world.fleet.deaths().total(), 0);
    assert_eq!(world.view(1).young_deaths, 0);
}

#[test]
fn a_drain_past_its_deadline_gets_term_and_then_kill() {
    let mut world = World::serving(LIMITS);
    let (pid, start) = (world.pid(0), world.now);
    world.send(Event::Retiring { pid });
    world.all_ready();
    world.pass(21_000);
    assert_eq!(world.signalled(pid, Signal::SIGTERM), Some(start + 20_100));
    assert_eq!(world.signalled(pid, Signal::SIGKILL), Some(start + 20_400));
    world.let_leave();
    let death = world.fleet.deaths().iter().next().unwrap();
    assert_eq!(
        death.reason.to_string(),
        "not done by its drain deadline; S asleep in read(0x5, ...)"
    );
    assert_eq!(world.fleet.ready_count(), 4);
}

// Watching

#[test]
fn a_stuck_event_loop_gets_abrt_then_kill_and_is_replaced() {
    let mut world = World::serving(LIMITS);
    let (pid, start) = (world.pid(3), world.now);
    world.living.get_mut(&pid).unwrap().stuck = true;
    world.pass(12_000);
    assert_eq!(world.signalled(pid, Signal::SIGABRT), Some(start + 10_000));
    assert_eq!(world.signalled(pid, Signal::SIGKILL), Some(start + 10_500));
    world.let_leave();
    let death = world.fleet.deaths().iter().next().unwrap();
    assert_eq!(
        death.reason.to_string(),
        "event loop stuck for 10 s; S asleep in read(0x5, ...)"
    );
    assert_eq!(world.forks(3).len(), 2);
}

#[test]
fn a_stop_does_not_put_off_the_end_of_a_stuck_worker() {
    let mut world = World::serving(LIMITS);
    let (pid, start) = (world.pid(3), world.now);
    world.living.get_mut(&pid).unwrap().stuck = true;
    world.pass(10_100);
    world.send(Event::Stop);
    world.pass(400);
    assert_eq!(world.signalled(pid, Signal::SIGKILL), Some(start + 10_500));
}

#[test]
fn nobody_is_killed_because_the_master_was_paused() {
    let mut world = World::serving(LIMITS);
    let pid = world.pid(0);
    world.send(Event::Retiring { pid });
    let starting = world.pid(0);
    let now = world.now + 100_000;
    world.now = now;
    let actions = world.fleet.tick(now); // No heartbeat was read.
    let killed = |action: &Action| matches!(action, Action::Kill { .. });
    assert!(!actions.iter().any(killed), "{actions:?}");
    world.ready(starting);
    world.pass(900);
    assert_eq!(world.signalled(pid, Signal::SIGTERM), None);
    world.pass(100);
    assert!(
        world.signalled(pid, Signal::SIGTERM).is_some(),
        "only a grace"
    );
}

#[test]
fn a_boot_timeout_in_service_is_a_young_death() {
    let mut world = World::serving(LIMITS);
    let pid = world.pid(0);
    world.die(pid, SEGV);
    let pid = world.pid(0);
    world.pass(30_000);
    assert!(world.signalled(pid, Signal::SIGKILL).is_some());
    world.ready(pid); // Too late.
    world.let_leave();
    assert_eq!(world.view(0).young_deaths, 2);
    assert_ne!(world.pid(0), pid);
}

// Reload

#[test]
fn a_reload_starts_a_canary_then_the_rest_and_drains_the_old_after_the_verdict() {
    let mut world = World::serving(LIMITS);
    world.send(reload(3));
    assert!(!world.fleet.can_reload());
    assert_eq!(world.living.len(), 5, "the canary alone");
    world.ready(world.pid_in(2, 0));
    assert_eq!(world.living.len(), 7);
    world.ready(world.pid_in(2, 1));
    assert!(world.drained().is_empty());
    world.ready(world.pid_in(2, 2));
    assert!(world.did(&Action::ReloadDone {
        generation: Generation(2),
        result: Ok(())
    }));
    assert_eq!(world.drained().len(), 4);
    assert_eq!(
        (world.fleet.generation(), world.fleet.target_count()),
        (Generation(2), 3)
    );
    world.let_leave();
    assert_eq!(
        (world.living.len(), world.count(WorkerPhase::Ready)),
        (3, 3)
    );
    assert_eq!(world.fleet.deaths().total(), 0);
}

#[test]
fn a_canary_that_dies_leaves_the_old_generation_untouched() {
    let mut world = World::serving(LIMITS);
    let before: Vec<_> = world.fleet.pids().collect();
    world.send(reload(4));
    let canary = world.pid_in(2, 0);
    world.die(canary, Exit::Code(70));
    let refusal = world.refusal().unwrap();
    assert!(refusal.starts_with(
        "generation 2 did not become ready: worker 105 (slot 0) ended by exit code 70"
    ));
    assert_eq!(world.fleet.pids().collect::<Vec<_>>(), before);
    assert!(world.drained().is_empty() && world.fleet.can_reload());
    // The next valid reload succeeds.
    world.send(reload(4));
    world.all_ready();
    assert_eq!(world.fleet.generation(), Generation(3));
}

#[test]
fn a_late_or_unforkable_newcomer_fails_the_reload_and_its_generation_drains() {
    let mut world = World::serving(LIMITS);
    world.send(reload(4));
    world.ready(world.pid_in(2, 0));
    let (canary, late) = (world.pid_in(2, 0), world.pid_in(2, 3));
    for slot in [1, 2] {
        world.ready(world.pid_in(2, slot));
    }
    world.pass(30_000);
    assert!(
        world
            .refusal()
            .unwrap()
            .contains("(slot 3): not ready within boot-timeout")
    );
    assert!(world.signalled(late, Signal::SIGKILL).is_some());
    assert!(world.drained().contains(&canary) && world.drained().len() == 3);
    world.let_leave();

    world.refuse_forks = true;
    world.send(reload(4));
    assert!(
        world
            .refusal()
            .unwrap()
            .contains("slot 0 could not be forked")
    );
    assert_eq!((world.fleet.ready_count(), world.living.len()), (4, 4));
}

#[test]
fn an_old_worker_that_dies_during_the_reload_is_replaced_in_its_own_generation() {
    let mut world = World::serving(LIMITS);
    world.send(reload(4));
    let pid = world.pid_in(1, 2);
    world.die(pid, SEGV);
    world.ready(world.pid_in(1, 2));
    let canary = world.pid_in(2, 0);
    world.die(canary, SEGV);
    assert_eq!((world.fleet.ready_count(), world.living.len()), (4, 4));
}

#[test]
fn a_reload_ends_the_throttle() {
    let mut world = World::serving(LIMITS);
    for _ in 0..12 {
        world.pass(world.view(1).next_fork.map_or(0, |at| at - world.now));
        let pid = world.pid(1);
        world.die(pid, Exit::Code(1));
    }
    assert_eq!(world.view(1).state, WorkerPhase::Throttled);
    world.send(reload(4));
    world.all_ready();
    assert_eq!(world.fleet.ready_count(), 4);
    assert_eq!(world.view(1).young_deaths, 0);
}

#[test]
fn a_reload_waits_while_four_old_generations_drain() {
    let mut world = World::serving(LIMITS);
    for _ in 0..4 {
        assert!(world.fleet.can_reload());
        world.send(reload(4));
        world.all_ready();
    }
    assert!(!world.fleet.can_reload());
    world.let_leave();
    assert!(world.fleet.can_reload());
}

// Scale

#[test]
fn scaling_forks_what_is_missing_and_drains_the_highest_slots() {
    let mut world = World::serving(LIMITS);
    world.send(Event::Scale { count: 6 });
    world.all_ready();
    assert_eq!(world.fleet.ready_count(), 6);
    let highest = [world.pid(2), world.pid(3), world.pid(4), world.pid(5)];
    world.send(Event::Scale { count: 2 });
    assert_eq!(world.drained().into_iter().collect::<Vec<_>>(), highest);
    for _ in 0..5 {
        world.send(Event::ScaleBy { by: -1 });
    }
    assert_eq!(world.fleet.target_count(), 1);
    world.send(Event::ScaleBy { by: 1 });
    assert_eq!(
        (world.view(1).state, world.fleet.target_count()),
        (WorkerPhase::Starting, 2)
    );
    world.send(Event::Scale { count: 5_000 });
    assert_eq!(world.fleet.target_count(), 1024);
}

#[test]
fn a_scale_during_a_reload_counts_after_it() {
    let mut world = World::serving(LIMITS);
    world.send(reload(3));
    world.send(Event::Scale { count: 5 });
    world.send(Event::ScaleBy { by: 1 });
    assert_eq!(world.fleet.target_count(), 4);
    world.all_ready();
    assert_eq!(
        (world.fleet.target_count(), world.fleet.ready_count()),
        (6, 6)
    );
    world.send(reload(3));
    world.all_ready();
    assert_eq!(
        world.fleet.target_count(),
        3,
        "back to the configured count"
    );
}

#[test]
fn a_slot_given_up_and_wanted_again_while_it_is_forked_is_forked_once() {
    let mut world = World::serving(LIMITS);
    world.hold_forks = true;
    world.send(Event::Scale { count: 5 });
    world.send(Event::Scale { count: 4 });
    world.send(Event::Scale { count: 5 });
    assert_eq!(world.ordered.len(), 1);
    world.send(Event::Scale { count: 4 });
    world.do_fork();
    assert_eq!(world.drained().len(), 1, "it is not needed any more");
    assert_eq!(world.fleet.workers().len(), 5);
    for count in [6, 4, 6] {
        world.send(Event::Scale { count });
    }
    world.hold_forks = false;
    world.do_forks();
    world.all_ready();
    assert_eq!(world.fleet.ready_count(), 6, "wanted again, and kept");
}

// Stop

#[test]
fn a_stop_drains_all_and_leaves_when_the_last_is_gone() {
    let mut world = World::serving(LIMITS);
    let draining = world.pid(0);
    world.send(Event::Retiring { pid: draining });
    world.all_ready();
    world.send(Event::Stop);
    assert_eq!(world.drained().len(), 5, "those that drain already, too");
    world.pass(15_000);
    assert!(!world.did(&Action::Exit { code: 0 }));
    world.let_leave();
    assert!(world.did(&Action::Exit { code: 0 }));
    assert_eq!(world.fleet.deaths().total(), 0);
}

#[test]
fn a_drain_that_a_term_hurries_is_no_death_and_a_crash_in_it_is_one() {
    let mut world = World::serving(LIMITS);
    let (hurried, crashed) = (world.pid(0), world.pid(1));
    world.send(Event::Stop);
    let term = Exit::Signal {
        number: 15,
        core_dumped: false,
    };
    world.die(hurried, term);
    assert_eq!(world.fleet.deaths().total(), 0);
    world.die(crashed, SEGV);
    let death = world.fleet.deaths().iter().next().cloned();
    assert_eq!(
        death.map(|death| death.reason),
        Some(DeathReason::DrainCrashed)
    );
}

#[test]
fn a_stop_ends_what_is_left_within_half_a_second_of_its_deadline() {
    let mut world = World::serving(LIMITS);
    let (pid, start) = (world.pid(0), world.now);
    world.send(Event::Stop);
    world.pass(20_400);
    assert_eq!(world.signalled(pid, Signal::SIGTERM), Some(start + 20_100));
    assert_eq!(world.signalled(pid, Signal::SIGKILL), Some(start + 20_400));
}

#[test]
fn a_second_stop_leaves_at_once() {
    let mut world = World::serving(LIMITS);
    let (pid, start) = (world.pid(0), world.now);
    world.send(Event::Stop);
    world.pass(105);
    world.send(Event::Stop);
    world.send(Event::StopNow);
    assert_eq!(world.signalled(pid, Signal::SIGQUIT), Some(start + 105));
    world.pass(500);
    assert_eq!(world.signalled(pid, Signal::SIGKILL), Some(start + 605));
    world.let_leave();
    assert!(world.did(&Action::Exit { code: 0 }));
}

#[test]
fn two_stops_in_one_breath_are_one_and_a_stop_now_is_heard_at_once() {
    let mut world = World::serving(LIMITS);
    let (pid, start) = (world.pid(0), world.now);
    world.send(Event::Stop);
    world.send(Event::Stop);
    world.pass(99);
    world.send(Event::Stop);
    assert_eq!(world.signalled(pid, Signal::SIGQUIT), None);
    world.send(Event::StopNow);
    assert_eq!(world.signalled(pid, Signal::SIGQUIT), Some(start + 99));
}

#[test]
fn a_stop_after_a_while_serves_until_then_and_replaces_who_dies() {
    let mut world = World::serving(LIMITS);
    world.send(Event::StopAfter { delay: 5_000 });
    assert!(!world.fleet.can_reload(), "what is new would not live long");
    assert_eq!(world.fleet.stops_at(), Some(world.now + 5_000));
    let pid = world.pid(1);
    world.die(pid, SEGV);
    world.all_ready();
    world.pass(4_999);
    assert_eq!(world.count(WorkerPhase::Ready), 4);
    assert!(world.drained().is_empty() && !world.did(&Action::StopDue));
    world.pass(1);
    assert!(world.did(&Action::StopDue));
    world.send(Event::Stop);
    assert_eq!(world.drained().len(), 4);
    world.let_leave();
    assert!(world.did(&Action::Exit { code: 0 }));
}

#[test]
fn a_stop_overrides_one_that_was_to_come_later() {
    let mut world = World::serving(LIMITS);
    world.send(Event::StopAfter { delay: 60_000 });
    world.send(Event::StopAfter { delay: 5_000 });
    world.pass(1_000);
    world.send(Event::Stop);
    assert_eq!(world.drained().len(), 4);
    assert_eq!(world.fleet.stops_at(), None);
    world.send(Event::StopAfter { delay: 5_000 });
    assert_eq!(world.fleet.stops_at(), None, "it stops already");
    world.pass(10_000);
    assert!(!world.did(&Action::StopDue));
}

#[test]
fn a_stop_during_a_reload_gives_its_verdict_and_waits_for_forks_under_way() {
    let mut world = World::serving(LIMITS);
    world.hold_forks = true;
    world.send(reload(4));
    world.send(Event::Stop);
    assert!(world.refusal().unwrap().contains("the server stops"));
    world.let_leave();
    assert!(!world.did(&Action::Exit { code: 0 }), "a fork is under way");
    world.do_fork();
    world.let_leave();
    assert!(world.did(&Action::Exit { code: 0 }));
}

/// The exec of an upgrade took so long that boot-timeout of a worker has passed. Its ready report was not read yet.
#[test]
fn what_came_due_during_a_take_over_is_judged_after_the_reports_are_heard() {
    for late in [1, 900, 5_000] {
        let mut world = World::serving(LIMITS);
        let (first, second) = (world.pid(0), world.pid(1));
        world.die(first, SEGV);
        world.die(second, SEGV);
        let (quick, slow) = (world.pid(0), world.pid(1));
        world.now += LIMITS.boot_timeout + late;
        world.cross();
        assert_eq!(world.signalled(quick, Signal::SIGKILL), None);
        world.ready(quick);
        world.tick();
        assert_eq!(world.signalled(quick, Signal::SIGKILL), None, "{late}");
        world.pass(LIMITS.boot_timeout);
        assert!(world.signalled(slow, Signal::SIGKILL).is_some(), "{late}");
        assert_eq!(world.signalled(quick, Signal::SIGKILL), None, "{late}");
    }
}
