//! Pool processes in the policy: waited for at a start and a reload, last to leave.

#![allow(clippy::unwrap_used)]

use super::event::{Action, Event, PolicyLimits};
use super::fleet_world::{LIMITS, SEGV, World};
use crate::link::ids::{Generation, Pid, Slot};
use crate::protocol::control::WorkerPhase;
use crate::sys::process::Exit;

const POOLS: PolicyLimits = PolicyLimits {
    count: 2,
    pools: 1,
    ..LIMITS
};

/// The pool process of a generation that was forked last.
fn pool(world: &World, generation: u32) -> Pid {
    let slot_id = (Generation(generation), Slot::of_pool(0));
    let mut found = world.living.iter().rev();
    *found.find(|(_, it)| it.slot_id == slot_id).unwrap().0
}

fn workers(world: &World) -> Vec<Pid> {
    let living = world.living.iter();
    let workers = living.filter(|(_, it)| it.slot_id.1.pool().is_none());
    workers.map(|(pid, _)| *pid).collect()
}

fn is_told_to_leave(world: &World, pid: Pid) -> bool {
    let told = |action: &Action| matches!(action, Action::Drain { pid: of, .. } if *of == pid);
    world.history.iter().any(|(_, action)| told(action))
}

#[test]
fn a_start_waits_for_pool_processes() {
    let mut world = World::new(POOLS);
    assert_eq!(world.living.len(), 3);
    for pid in workers(&world) {
        world.ready(pid);
    }
    assert!(!world.did(&Action::StartUpDone(Ok(()))));
    world.ready(pool(&world, 1));
    assert!(world.did(&Action::StartUpDone(Ok(()))));
    assert_eq!(world.fleet.ready_count(), 2);
    assert_eq!(world.fleet.workers().len(), 2);
    assert_eq!(world.fleet.pools()[0].state, WorkerPhase::Ready);
}

#[test]
fn a_pool_process_that_fails_fails_the_reload_and_nothing_else() {
    let mut world = World::serving(POOLS);
    let old = pool(&world, 1);
    world.tell(Event::Reload { limits: POOLS });
    let new = pool(&world, 2);
    world.die(new, Exit::Code(3));
    let is_refused = |action: &Action| matches!(action, Action::ReloadDone(Err(_)));
    assert!(world.history.iter().any(|(_, action)| is_refused(action)));
    assert!(world.fleet.can_reload());
    assert!(!is_told_to_leave(&world, old));
}

#[test]
fn the_old_pool_process_leaves_behind_the_last_worker_that_uses_it() {
    let mut world = World::serving(POOLS);
    let (old, old_workers) = (pool(&world, 1), workers(&world));
    world.tell(Event::Reload { limits: POOLS });
    world.all_ready();
    assert!(world.did(&Action::ReloadDone(Ok(Generation(2)))));
    for pid in old_workers {
        assert!(is_told_to_leave(&world, pid) && !is_told_to_leave(&world, old));
        world.die(pid, Exit::Code(0));
    }
    assert!(is_told_to_leave(&world, old));
    assert!(!is_told_to_leave(&world, pool(&world, 2)));
}

#[test]
fn an_old_pool_process_is_replaced_as_long_as_a_worker_uses_it() {
    let mut world = World::serving(POOLS);
    let (old, old_workers) = (pool(&world, 1), workers(&world));
    world.tell(Event::Reload { limits: POOLS });
    world.all_ready();
    world.die(old, SEGV);
    world.all_ready();
    let replaced = pool(&world, 1);
    assert!(replaced != old && !is_told_to_leave(&world, replaced));
    assert!(world.fleet.has_pools_before(Generation(2)));
    for pid in old_workers {
        world.die(pid, Exit::Code(0));
    }
    assert!(is_told_to_leave(&world, replaced));
    assert!(!world.fleet.has_pools_before(Generation(2)));
    world.die(replaced, Exit::Code(0));
    assert_eq!(world.fleet.pools().len(), 1, "nobody uses it any more");
}

#[test]
fn pool_processes_leave_last_at_a_stop() {
    let mut world = World::serving(POOLS);
    let (pool, workers) = (pool(&world, 1), workers(&world));
    world.tell(Event::Stop);
    for pid in workers {
        assert!(is_told_to_leave(&world, pid) && !is_told_to_leave(&world, pool));
        world.die(pid, Exit::Code(0));
    }
    assert!(is_told_to_leave(&world, pool));
    world.die(pool, Exit::Code(0));
    assert!(world.did(&Action::Exit { code: 0 }));
}

#[test]
fn a_pool_process_that_dies_is_replaced_and_a_scale_leaves_it_alone() {
    let mut world = World::serving(POOLS);
    let first = pool(&world, 1);
    world.die(first, SEGV);
    let second = pool(&world, 1);
    assert_ne!(first, second);
    world.ready(second);
    world.tell(Event::Scale { count: 1 });
    assert!(!is_told_to_leave(&world, second));
    assert_eq!(world.fleet.pools()[0].pid, Some(second));
}

#[test]
fn a_pool_process_that_is_asked_to_retire_serves_until_its_successor_does() {
    let mut world = World::serving(POOLS);
    let first = pool(&world, 1);
    world.tell(Event::Retiring { pid: first });
    let second = pool(&world, 1);
    assert!(first != second && !is_told_to_leave(&world, first));
    world.ready(second);
    assert!(is_told_to_leave(&world, first) && !is_told_to_leave(&world, second));
}

#[test]
fn another_program_gets_no_pool_process_and_forks_its_own() {
    let mut world = World::serving(POOLS);
    let old = pool(&world, 1);
    let state = world.fleet.export();
    assert!(state.children.iter().all(|child| child.pid != old.0));
    assert!(
        state
            .seats
            .iter()
            .all(|seat| Slot(seat.slot).pool().is_none())
    );
    world.living.remove(&old);
    world.cross();
    assert_eq!(world.fleet.pools()[0].state, WorkerPhase::Throttled);
    world.pass(3_000);
    world.ready(pool(&world, 1));
    assert_eq!(world.fleet.pools()[0].state, WorkerPhase::Ready);
}
