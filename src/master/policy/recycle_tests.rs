//! Recycling in a simulated kernel: which workers are replaced, when, and why not before.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::Signal;
use proptest::prelude::*;

use super::event::{Event, Exit, Millis, PolicyLimits};
use super::fleet_world::{LIMITS, SEGV, World};
use crate::link::ids::{Pid, Slot};
use crate::protocol::control::WorkerPhase;

const LIFETIME: Millis = 600_000;

fn reach_max_calls(world: &mut World, slot: u16) -> Pid {
    let pid = world.pid(slot);
    world.send(Event::MaxCallsReached { pid, calls: 1_000 });
    pid
}

fn has_line(world: &World, text: &str) -> bool {
    world.lines().iter().any(|(_, line)| line.contains(text))
}

#[test]
fn a_worn_worker_serves_until_its_successor_is_ready_and_its_end_is_no_death() {
    let mut world = World::serving(LIMITS);
    let old = reach_max_calls(&mut world, 1);
    assert!(has_line(
        &world,
        "worker 102 (slot 1) is recycled once its successor is ready: max-calls \
                              reached (1000 calls) slot=1 pid=102 generation=1"
    ));
    let new = world.first(WorkerPhase::Starting).unwrap();
    assert_eq!(
        (world.view(1).pid, world.view(1).state),
        (Some(old), WorkerPhase::Ready)
    );
    assert!(
        world.drained().is_empty(),
        "not before the successor is ready"
    );
    world.ready(new);
    assert_eq!(world.drained(), [old].into());
    assert_eq!(world.pid(1), new);
    assert_eq!(world.fleet.ready_count(), 4);
    world.let_leave();
    assert_eq!(
        (world.fleet.deaths().total(), world.fleet.recycles()),
        (0, 0)
    );
}

#[test]
fn a_worker_stuck_in_the_kernel_delays_no_other_recycle() {
    let mut world = World::serving(LIMITS);
    let old = reach_max_calls(&mut world, 1);
    world.all_ready();
    world.living.get_mut(&old).unwrap().stuck = true;
    reach_max_calls(&mut world, 2);
    world.pass(60_000);
    assert!(has_line(&world, "the kernel holds it"));
    assert!(has_line(&world, "no replacement is needed"));
    assert!(world.forks(2).len() > 1, "slot 2 is recycled all the same");
}

#[test]
fn a_repeated_report_or_one_of_an_unknown_pid_changes_nothing() {
    let mut world = World::serving(LIMITS);
    let old = reach_max_calls(&mut world, 1);
    world.send(Event::MaxCallsReached {
        pid: old,
        calls: 2_000,
    });
    world.send(Event::MaxCallsReached {
        pid: Pid(7),
        calls: 1,
    });
    world.all_ready();
    world.send(Event::MaxCallsReached {
        pid: old,
        calls: 3_000,
    });
    world.let_leave();
    assert_eq!(world.forks(1).len(), 2);
    assert_eq!(world.living.len(), 4);
}

#[test]
fn one_budget_holds_for_all_reasons_until_the_old_worker_is_gone() {
    let mut world = World::serving(PolicyLimits {
        max_unavailable: 2,
        max_memory: 1 << 20,
        ..LIMITS
    });
    reach_max_calls(&mut world, 0);
    let fat = world.pid(1);
    world.living.get_mut(&fat).unwrap().rss_bytes = 2 << 20;
    world.pass(2_000);
    reach_max_calls(&mut world, 2);
    assert_eq!(
        (world.living.len(), world.recycles()),
        (6, 2),
        "the third one waits"
    );
    world.all_ready();
    assert_eq!(world.living.len(), 6, "both old ones still drain");
    let gone = *world.drained().first().unwrap();
    world.die(gone, Exit::Code(0));
    assert_eq!(
        (world.living.len(), world.recycles()),
        (6, 2),
        "now it is its turn"
    );
    world.all_ready();
    world.let_leave();
    assert_eq!(world.living.len(), 4);
}

#[test]
fn memory_counts_when_it_is_seen_above_its_limit_twice_in_a_row() {
    let mut world = World::serving(PolicyLimits {
        max_memory: 1 << 20,
        ..LIMITS
    });
    // From here on each second has one check.
    world.pass(500);
    let pid = world.pid(3);
    for rss_bytes in [2 << 20, 1 << 20, 2 << 20, 0] {
        world.living.get_mut(&pid).unwrap().rss_bytes = rss_bytes;
        world.pass(1_000);
    }
    assert_eq!(world.forks(3).len(), 1);
    world.living.get_mut(&pid).unwrap().rss_bytes = (1 << 20) + 1;
    world.pass(2_000);
    assert_eq!(world.forks(3).len(), 2);
    assert!(has_line(
        &world,
        "max-memory exceeded (1048577 bytes resident, limit 1048576)"
    ));
}

#[test]
fn lifetimes_end_at_different_times_in_their_last_tenth() {
    let mut world = World::serving(PolicyLimits {
        max_lifetime: LIFETIME,
        max_unavailable: 4,
        ..LIMITS
    });
    let first = world.now;
    world.pass(LIFETIME);
    let ends: Vec<Millis> = (0..4).map(|slot| world.forks(slot)[1] - first).collect();
    assert!(
        ends.iter()
            .all(|end| (LIFETIME * 9 / 10..=LIFETIME).contains(end)),
        "{ends:?}"
    );
    let mut sorted = ends.clone();
    sorted.sort_unstable();
    assert!(
        sorted.windows(2).all(|pair| pair[1] - pair[0] > 100),
        "{ends:?}"
    );
    assert!(has_line(&world, "max-lifetime reached ("));
}

#[test]
fn without_limits_nothing_is_looked_at_and_nothing_is_due() {
    let world = World::serving(PolicyLimits {
        heartbeat_timeout: 0,
        ..LIMITS
    });
    assert_eq!(world.fleet.next_deadline(), None);
    assert!(world.fleet.to_sample(world.now + 100_000).is_empty());
}

#[test]
fn a_successor_that_dies_is_throttled_and_the_old_worker_serves_on() {
    let mut world = World::serving(LIMITS);
    let old = reach_max_calls(&mut world, 2);
    for _ in 0..6 {
        let new = world.first(WorkerPhase::Starting).unwrap();
        world.die(new, Exit::Code(3));
    }
    assert_eq!(world.first(WorkerPhase::Throttled), None);
    let throttled: Vec<_> = world
        .fleet
        .workers()
        .into_iter()
        .filter(|v| v.next_fork.is_some())
        .collect();
    assert_eq!(
        (throttled[0].slot, throttled[0].next_fork),
        (Slot(2), Some(world.now + 100))
    );
    assert_eq!((world.pid(2), world.fleet.ready_count()), (old, 4));
    assert_eq!(world.fleet.deaths().total(), 6);
    assert!(has_line(
        &world,
        "died before it was ready, last method add; the worker that it was to \
                              replace continues; next try in 100 ms: 6 young deaths"
    ));
    world.pass(100);
    world.all_ready();
    assert_eq!(world.drained(), [old].into());
}

#[test]
fn a_successor_that_can_not_be_forked_or_never_gets_ready_is_tried_again() {
    let mut world = World::serving(LIMITS);
    world.refuse_forks = true;
    let old = reach_max_calls(&mut world, 0);
    assert!(has_line(
        &world,
        "slot 0 has no successor: fork was refused"
    ));
    world.refuse_forks = false;
    world.pass(100);
    let late = world.first(WorkerPhase::Starting).unwrap();
    world.pass(30_000);
    assert!(world.signalled(late, Signal::SIGKILL).is_some());
    assert_eq!(world.pid(0), old);
    world.let_leave();
    assert!(world.first(WorkerPhase::Starting).is_some());
}

#[test]
fn a_worker_that_dies_or_retires_while_its_successor_starts_leaves_it_the_slot() {
    for retires in [true, false] {
        let mut world = World::serving(LIMITS);
        let old = reach_max_calls(&mut world, 1);
        let new = world.first(WorkerPhase::Starting).unwrap();
        if retires {
            world.send(Event::Retiring { pid: old });
        } else {
            world.die(old, SEGV);
        }
        assert_eq!(world.pid(1), new);
        assert_eq!(world.forks(1).len(), 2, "no second successor");
        world.all_ready();
        world.let_leave();
        assert_eq!((world.living.len(), world.fleet.recycles()), (4, 0));
    }
}

#[test]
fn a_throttled_successor_is_forked_at_once_when_the_old_worker_is_gone() {
    let mut world = World::serving(PolicyLimits {
        respawn_burst: 0,
        respawn_max_delay: 30_000,
        ..LIMITS
    });
    let old = reach_max_calls(&mut world, 1);
    let new = world.first(WorkerPhase::Starting).unwrap();
    world.die(new, Exit::Code(3));
    world.pass(50);
    world.send(Event::Retiring { pid: old });
    assert_eq!(world.forks(1).last(), Some(&world.now));
    world.pass(1_000);
    assert_eq!(
        world.forks(1).len(),
        3,
        "and the throttled fork is forgotten"
    );
}

#[test]
fn a_scale_down_takes_worker_and_successor() {
    for forked in [true, false] {
        let mut world = World::serving(LIMITS);
        world.hold_forks = !forked;
        let old = reach_max_calls(&mut world, 3);
        world.send(Event::Scale { count: 3 });
        assert!(world.drained().contains(&old));
        world.hold_forks = false;
        world.do_forks();
        world.pass(500);
        world.let_leave();
        world.all_ready();
        assert_eq!((world.living.len(), world.fleet.ready_count()), (3, 3));
    }
}

#[test]
fn a_reload_does_not_wait_for_recycles_and_none_begins_before_its_result() {
    let mut world = World::serving(LIMITS);
    reach_max_calls(&mut world, 0);
    let half_way = world.first(WorkerPhase::Starting).unwrap();
    world.send(Event::Reload { limits: LIMITS });
    reach_max_calls(&mut world, 1);
    assert_eq!(world.forks(1).len(), 1, "it waits");
    world.ready(half_way);
    assert_eq!(world.pid_in(1, 0), half_way, "begun before, so it may end");
    let canary = world.pid_in(2, 0);
    world.die(canary, SEGV);
    assert!(world.refusal().is_some());
    world.let_leave();
    world.all_ready();
    world.let_leave();
    assert_eq!(world.forks(1).len(), 2, "refused: now it is recycled");
    reach_max_calls(&mut world, 2);
    world.send(Event::Reload { limits: LIMITS });
    world.all_ready();
    world.pass(500);
    world.let_leave();
    assert_eq!((world.living.len(), world.fleet.recycles()), (4, 0));
}

#[test]
fn a_stop_ends_worker_and_successor() {
    let mut world = World::serving(LIMITS);
    reach_max_calls(&mut world, 0);
    world.send(Event::Stop);
    world.pass(500);
    world.let_leave();
    assert!(world.exited);
}

/// What makes workers due, and what goes wrong meanwhile.
#[derive(Debug, Clone)]
enum Happening {
    Passes(Millis),
    MaxCallsReached(usize),
    Grows(usize),
    Ready(usize),
    Leaves(usize),
    Dies(usize),
}

fn happening() -> impl Strategy<Value = Happening> {
    use Happening::*;
    prop_oneof![
        4 => (0u64..3_000).prop_map(Passes),
        4 => any::<usize>().prop_map(MaxCallsReached),
        3 => any::<usize>().prop_map(Grows),
        8 => any::<usize>().prop_map(Ready),
        4 => any::<usize>().prop_map(Leaves),
        1 => any::<usize>().prop_map(Dies),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_more_recycles_run_than_allowed_and_no_healthy_slot_is_empty(
        count in 1usize..6,
        max_unavailable in 1usize..4,
        max_lifetime in prop_oneof![Just(0u64), 1_000u64..100_000],
        history in prop::collection::vec(happening(), 0..150),
    ) {
        let limits = PolicyLimits { count, max_unavailable, max_lifetime, max_memory: 1 << 20, ..LIMITS };
        let mut world = World::serving(limits);
        for happening in history {
            let pick = |number: usize| *world.living.keys().nth(number % world.living.len()).unwrap();
            let mut died = false;
            match happening {
                Happening::Passes(span) => world.pass(span),
                Happening::MaxCallsReached(who) => {
                    let pid = pick(who);
                    world.send(Event::MaxCallsReached { pid, calls: 1 });
                }
                Happening::Grows(who) => {
                    let pid = pick(who);
                    world.living.get_mut(&pid).unwrap().rss_bytes = 2 << 20;
                }
                Happening::Ready(who) => {
                    let pid = pick(who);
                    world.ready(pid);
                }
                Happening::Leaves(who) => {
                    let pid = pick(who);
                    if world.living[&pid].leaves {
                        world.die(pid, Exit::Code(0));
                    }
                }
                Happening::Dies(who) => {
                    let pid = pick(who);
                    died = !world.living[&pid].leaves;
                    if world.living.len() > 1 {
                        world.die(pid, SEGV);
                    }
                }
            }
            let under_way = world.recycles();
            prop_assert_eq!(under_way, world.fleet.recycles());
            prop_assert!(under_way <= max_unavailable, "{} under way", under_way);
            if died {
                break; // from here on a slot may be empty
            }
            prop_assert_eq!(world.fleet.ready_count(), count);
        }
    }
}
