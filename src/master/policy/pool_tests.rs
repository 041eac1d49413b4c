//! Pool processes in the policy: a start and a reload wait for them, and they are the last to exit. A start
//! and a reload wait for acceptors too, which exit with the workers.

#![allow(clippy::unwrap_used)]

use super::action::{Action, NotReady};
use super::death_log::Death;
use super::event::{Event, KeptPool, Millis, PolicyLimits, PoolStep};
use super::fleet::Fleet;
use super::fleet_world::{LIMITS, SEGV, World};
use super::shutdown::AFTER_WORKERS;
use crate::link::ids::{Generation, Pid, Slot};
use crate::protocol::control::{DeathKind, WorkerPhase};
use crate::sys::process::Exit;

const POOLS: PolicyLimits = PolicyLimits {
    count: 2,
    pools: 1,
    ..LIMITS
};

/// Returns the pool process of a generation that was forked last.
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
    world.send(Event::Reload { limits: POOLS });
    let new = pool(&world, 2);
    world.die(new, Exit::Code(3));
    let is_refused = |action: &Action| matches!(action, Action::ReloadDone { result: Err(_), .. });
    assert!(world.history.iter().any(|(_, action)| is_refused(action)));
    assert!(world.fleet.can_reload());
    assert!(!is_told_to_leave(&world, old));
}

#[test]
fn the_old_pool_process_leaves_behind_the_last_worker_that_uses_it() {
    let mut world = World::serving(POOLS);
    let (old, old_workers) = (pool(&world, 1), workers(&world));
    world.send(Event::Reload { limits: POOLS });
    world.all_ready();
    assert!(world.did(&Action::ReloadDone {
        generation: Generation(2),
        result: Ok(())
    }));
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
    world.send(Event::Reload { limits: POOLS });
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
    assert_eq!(world.fleet.pools().len(), 1, "no worker uses it any more");
}

#[test]
fn pool_processes_leave_last_at_a_stop() {
    let mut world = World::serving(POOLS);
    let (pool, workers) = (pool(&world, 1), workers(&world));
    world.send(Event::Stop);
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
    world.send(Event::Scale { count: 1 });
    assert!(!is_told_to_leave(&world, second));
    assert_eq!(world.fleet.pools()[0].pid, Some(second));
}

#[test]
fn a_pool_process_that_is_asked_to_retire_serves_until_its_successor_does() {
    let mut world = World::serving(POOLS);
    let first = pool(&world, 1);
    world.send(Event::Retiring { pid: first });
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
    assert!(state.children.iter().all(|child| child.pid != old));
    assert!(
        state
            .slots
            .iter()
            .all(|slot| Slot(slot.slot).pool().is_none())
    );
    world.living.remove(&old);
    world.cross();
    assert_eq!(world.fleet.pools()[0].state, WorkerPhase::Throttled);
    world.pass(3_000);
    world.ready(pool(&world, 1));
    assert_eq!(world.fleet.pools()[0].state, WorkerPhase::Ready);
}

#[test]
fn an_upgrade_replaces_no_pool_process_of_the_program_before_it() {
    let mut world = World::serving(POOLS);
    let old = pool(&world, 1);
    world.living.remove(&old);
    world.cross();
    world.send(Event::Reload { limits: POOLS });
    world.all_ready();
    assert!(world.did(&reload_done(2)));
    world.pass(5_000);
    let generations: Vec<Generation> =
        (world.fleet.pools().iter().map(|view| view.generation)).collect();
    assert_eq!(generations, [Generation(2)]);
}

/// Begins a reload at which the only pool process stays.
fn reload_and_keep(world: &mut World) {
    let slot = Slot::of_pool(0);
    let pools = vec![KeptPool {
        from: slot,
        to: slot,
    }];
    world.send(Event::KeepPools { pools });
    world.send(Event::Reload { limits: POOLS });
}

fn updated(world: &mut World, pid: Pid, generation: u32, outcome: Result<(), String>) {
    world.send(Event::PoolUpdated {
        pid,
        generation: Generation(generation),
        outcome,
    });
}

fn did_step(world: &World, wanted: PoolStep) -> bool {
    let is_wanted =
        |action: &Action| matches!(action, Action::Pool { step, .. } if *step == wanted);
    world.history.iter().any(|(_, action)| is_wanted(action))
}

fn reload_done(generation: u32) -> Action {
    Action::ReloadDone {
        generation: Generation(generation),
        result: Ok(()),
    }
}

#[test]
fn a_pool_process_that_stays_is_waited_for_and_serves_both_generations() {
    let mut world = World::serving(POOLS);
    let (kept, old_workers) = (pool(&world, 1), workers(&world));
    reload_and_keep(&mut world);
    world.all_ready();
    assert!(!world.did(&reload_done(2)));
    assert!(did_step(&world, PoolStep::Update) && !did_step(&world, PoolStep::Move));
    updated(&mut world, kept, 2, Ok(()));
    assert!(world.did(&reload_done(2)));
    assert!(did_step(&world, PoolStep::Move));
    let slot_id = (Generation(2), Slot::of_pool(0));
    world.living.get_mut(&kept).unwrap().slot_id = slot_id;
    let pools = world.fleet.pools();
    assert_eq!(pools.len(), 1);
    assert_eq!(pools[0].pid, Some(kept));
    assert_eq!(pools[0].generation, Generation(2));
    // The next reload replaces it. It exits after the last worker of both generations.
    assert_eq!(
        world.fleet.oldest_served(slot_id.1, slot_id.0),
        Generation(1)
    );
    let second_workers: Vec<Pid> = workers(&world);
    world.send(Event::Reload { limits: POOLS });
    world.all_ready();
    for pid in second_workers {
        if !old_workers.contains(&pid) {
            world.die(pid, Exit::Code(0));
        }
    }
    assert!(!is_told_to_leave(&world, kept));
    for pid in old_workers {
        world.die(pid, Exit::Code(0));
    }
    assert!(is_told_to_leave(&world, kept));
    assert!(!is_told_to_leave(&world, pool(&world, 3)));
}

#[test]
fn a_pool_process_that_cannot_take_the_next_table_fails_the_reload_and_stays() {
    let mut world = World::serving(POOLS);
    let kept = pool(&world, 1);
    reload_and_keep(&mut world);
    updated(&mut world, kept, 2, Err("its program has left".into()));
    let is_refused = |action: &Action| matches!(action, Action::ReloadDone { result: Err(NotReady::PoolRefused(why)), .. } if why.contains("has left"));
    assert!(world.history.iter().any(|(_, action)| is_refused(action)));
    assert!(did_step(&world, PoolStep::Revert) && !is_told_to_leave(&world, kept));
    // A late report is not taken for an answer to the next reload.
    reload_and_keep(&mut world);
    world.all_ready();
    updated(&mut world, kept, 2, Ok(()));
    assert!(!did_step(&world, PoolStep::Move));
    // A reload also fails if the pool process never answers.
    world.pass(2 * LIMITS.boot_timeout + 1);
    assert!(world.refusal().unwrap().contains("may still have calls"));
    assert!(world.fleet.can_reload() && !is_told_to_leave(&world, kept));
}

#[test]
fn a_pool_process_that_is_to_stay_and_dies_fails_the_reload_and_is_replaced() {
    let mut world = World::serving(POOLS);
    let kept = pool(&world, 1);
    reload_and_keep(&mut world);
    world.die(kept, SEGV);
    let is_refused = |action: &Action| {
        matches!(
            action,
            Action::ReloadDone {
                result: Err(NotReady::Died(..)),
                ..
            }
        )
    };
    assert!(world.history.iter().any(|(_, action)| is_refused(action)));
    world.all_ready();
    let pools = world.fleet.pools();
    assert_eq!((pools.len(), pools[0].generation), (1, Generation(1)));
    assert_eq!(pools[0].state, WorkerPhase::Ready);
    // A pool process that does not serve is replaced by the reload.
    world.die(pool(&world, 1), SEGV);
    reload_and_keep(&mut world);
    world.all_ready();
    assert!(world.did(&reload_done(3)));
    assert_eq!(world.fleet.pools()[0].generation, Generation(3));
}

#[test]
fn a_pool_process_that_reports_stuck_threads_gets_no_successor() {
    let mut world = World::serving(POOLS);
    let kept = pool(&world, 1);
    reload_and_keep(&mut world);
    assert!(!world.fleet.wants_diagnosis(kept));
    let evidence = "1 of 1 threads".to_owned();
    let wedged = Event::AllThreadsStuck {
        pid: kept,
        evidence,
    };
    world.send(wedged);
    assert_eq!(pool(&world, 1), kept);
    world.all_ready();
    updated(&mut world, kept, 2, Ok(()));
    assert!(world.did(&reload_done(2)));
    assert_eq!(world.fleet.pools().len(), 1);
}

#[test]
fn a_pool_process_that_is_to_stay_and_survives_sigkill_fails_the_reload() {
    let mut world = World::serving(POOLS);
    let kept = pool(&world, 1);
    reload_and_keep(&mut world);
    world.all_ready();
    world.living.get_mut(&kept).unwrap().stuck = true;
    world.pass(LIMITS.heartbeat_timeout + 5_000);
    assert!(world.refusal().unwrap().contains("survived SIGKILL"));
    let replaced = pool(&world, 1);
    assert_ne!(replaced, kept);
    updated(&mut world, kept, 2, Ok(()));
    assert!(!did_step(&world, PoolStep::Move));
    world.ready(replaced);
    world.die(kept, SEGV);
    let pools = world.fleet.pools();
    assert_eq!((pools.len(), pools[0].pid), (1, Some(replaced)));
}

#[test]
fn a_pool_process_that_stays_gets_its_time_again_after_a_pause_of_the_master() {
    let mut world = World::serving(POOLS);
    let kept = pool(&world, 1);
    reload_and_keep(&mut world);
    world.all_ready();
    world.now += 2 * LIMITS.boot_timeout + 10_000;
    world.tick();
    assert_eq!(world.refusal(), None);
    updated(&mut world, kept, 2, Ok(()));
    assert!(world.did(&reload_done(2)));
}

#[test]
fn deaths_in_pools_cross_beside_those_of_workers() {
    let mut world = World::serving(POOLS);
    let process = pool(&world, 1);
    world.die(process, SEGV);
    let death = world.fleet.deaths().iter().next().unwrap().clone();
    assert_eq!(death.kind, DeathKind::Pool);
    let of_program = Death {
        kind: DeathKind::Program,
        name: Some("model".to_owned()),
        ..death.clone()
    };
    world.fleet.keep_death_of_program(of_program.clone());
    let worker = world.view(0).pid.unwrap();
    world.die(worker, SEGV);
    let state = world.fleet.export();
    assert_eq!(state.deaths.len(), 1, "a program that knows workers only");
    assert_eq!(state.deaths[0].pid, worker);
    let fleet = Fleet::import(state, world.now).unwrap();
    let deaths: Vec<_> = fleet.deaths().iter().cloned().collect();
    assert_eq!(deaths.len(), 3);
    assert!(deaths.contains(&death) && deaths.contains(&of_program));
}

const ACCEPTORS: PolicyLimits = PolicyLimits {
    acceptors: 1,
    ..POOLS
};

/// Returns the acceptor of a generation that was forked last.
fn acceptor(world: &World, generation: u32) -> Pid {
    let slot_id = (Generation(generation), Slot::of_acceptor(0));
    let mut found = world.living.iter().rev();
    *found.find(|(_, it)| it.slot_id == slot_id).unwrap().0
}

#[test]
fn a_start_and_a_reload_wait_for_acceptors() {
    let mut world = World::new(ACCEPTORS);
    for pid in world.living.keys().copied().collect::<Vec<_>>() {
        if pid != acceptor(&world, 1) {
            world.ready(pid);
        }
    }
    assert!(!world.did(&Action::StartUpDone(Ok(()))));
    world.ready(acceptor(&world, 1));
    assert!(world.did(&Action::StartUpDone(Ok(()))));
    world.send(Event::Reload { limits: ACCEPTORS });
    world.die(acceptor(&world, 2), Exit::Code(71));
    let is_refused = |action: &Action| matches!(action, Action::ReloadDone { result: Err(_), .. });
    assert!(world.history.iter().any(|(_, action)| is_refused(action)));
    assert!(!is_told_to_leave(&world, acceptor(&world, 1)));
}

#[test]
fn an_acceptor_leaves_with_its_workers_and_before_the_pool_processes() {
    let mut world = World::serving(ACCEPTORS);
    let (old, old_pool) = (acceptor(&world, 1), pool(&world, 1));
    world.send(Event::Scale { count: 1 });
    assert!(!is_told_to_leave(&world, old), "a scale leaves it alone");
    world.send(Event::Reload { limits: ACCEPTORS });
    world.all_ready();
    assert!(is_told_to_leave(&world, old));
    let workers: Vec<Pid> = (world.living.iter())
        .filter(|(_, it)| it.slot_id.0 == Generation(1) && it.slot_id.1.is_worker())
        .map(|(pid, _)| *pid)
        .collect();
    for pid in workers {
        world.die(pid, Exit::Code(0));
    }
    assert!(
        !is_told_to_leave(&world, old_pool),
        "its sessions may use it"
    );
    world.die(old, Exit::Code(0));
    assert!(is_told_to_leave(&world, old_pool));
    world.send(Event::Stop);
    assert!(is_told_to_leave(&world, acceptor(&world, 2)));
}

#[test]
fn an_acceptor_that_dies_is_replaced_and_leaves_a_record() {
    let mut world = World::serving(ACCEPTORS);
    let first = acceptor(&world, 1);
    world.die(first, SEGV);
    let second = acceptor(&world, 1);
    assert_ne!(first, second);
    world.ready(second);
    assert_eq!(world.fleet.acceptors()[0].pid, Some(second));
    assert_eq!(world.fleet.ready_count(), 2);
    let death = world.fleet.deaths().iter().next().unwrap();
    assert_eq!((death.pid, death.kind), (first, DeathKind::Acceptor));
}

const JOBS: PolicyLimits = PolicyLimits {
    has_jobs: true,
    ..POOLS
};

/// Returns the jobs process of a generation that was forked last.
fn jobs(world: &World, generation: u32) -> Pid {
    let slot_id = (Generation(generation), Slot::JOBS);
    let mut found = world.living.iter().rev();
    *found.find(|(_, it)| it.slot_id == slot_id).unwrap().0
}

#[test]
fn a_start_and_a_reload_wait_for_the_jobs_process() {
    let mut world = World::new(JOBS);
    let first = jobs(&world, 1);
    for pid in world.living.keys().copied().collect::<Vec<_>>() {
        if pid != first {
            world.ready(pid);
        }
    }
    assert!(!world.did(&Action::StartUpDone(Ok(()))));
    world.ready(first);
    assert!(world.did(&Action::StartUpDone(Ok(()))));
    world.send(Event::Reload { limits: JOBS });
    world.die(jobs(&world, 2), Exit::Code(71));
    let is_refused = |action: &Action| matches!(action, Action::ReloadDone { result: Err(_), .. });
    assert!(world.history.iter().any(|(_, action)| is_refused(action)));
    assert!(!is_told_to_leave(&world, first));
}

#[test]
fn a_jobs_process_ends_its_claims_when_the_workers_leave_and_not_before() {
    let mut world = World::serving(JOBS);
    let old = jobs(&world, 1);
    world.send(Event::Reload { limits: JOBS });
    let new = jobs(&world, 2);
    assert!(!world.did(&Action::EndClaims { pid: old }));
    world.all_ready();
    assert!(world.did(&Action::EndClaims { pid: old }));
    assert!(!is_told_to_leave(&world, old));
    assert!(!world.did(&Action::EndClaims { pid: new }));
    // Its successor finishes attempts too, and begins none.
    world.die(old, SEGV);
    let successor = jobs(&world, 1);
    assert_ne!(successor, old);
    assert!(world.did(&Action::EndClaims { pid: successor }));
    world.send(Event::Stop);
    assert!(world.did(&Action::EndClaims { pid: new }));
}

/// Stops a server whose workers exit after this time. Returns when the pool process must have exited, counted from the
/// stop.
fn time_of_pool(workers_take: Millis) -> Millis {
    let mut world = World::serving(JOBS);
    let (first, stopped) = (pool(&world, 1), world.now);
    world.send(Event::Stop);
    world.pass(workers_take);
    let living = world.living.iter();
    let workers = living.filter(|(_, it)| it.slot_id.1.is_worker());
    for pid in workers.map(|(pid, _)| *pid).collect::<Vec<_>>() {
        world.die(pid, Exit::Code(0));
    }
    let deadline = world.history.iter().find_map(|(_, action)| match action {
        Action::Drain { pid, deadline, .. } if *pid == first => Some(*deadline),
        _ => None,
    });
    deadline.unwrap() - stopped
}

#[test]
fn a_pool_process_that_exits_after_the_workers_has_the_deadline_of_the_stop() {
    assert_eq!(time_of_pool(5_000), JOBS.drain_timeout);
    // If the workers needed all of that time, it still has some to end its programs.
    let late = JOBS.drain_timeout + 50;
    assert!(time_of_pool(late) >= JOBS.drain_timeout + AFTER_WORKERS);
}

#[test]
fn the_jobs_process_is_the_last_to_leave() {
    let mut world = World::serving(JOBS);
    let (old, old_pool) = (jobs(&world, 1), pool(&world, 1));
    world.send(Event::Reload { limits: JOBS });
    world.all_ready();
    let of_old = |world: &World| -> Vec<Pid> {
        let living = world.living.iter();
        let workers = living.filter(|(_, it)| it.slot_id.0 == Generation(1));
        let workers = workers.filter(|(_, it)| it.slot_id.1.is_worker());
        workers.map(|(pid, _)| *pid).collect()
    };
    for pid in of_old(&world) {
        world.die(pid, Exit::Code(0));
    }
    assert!(is_told_to_leave(&world, old_pool));
    assert!(
        !is_told_to_leave(&world, old),
        "the pool process may settle attempts"
    );
    world.die(old_pool, Exit::Code(0));
    assert!(is_told_to_leave(&world, old));
    world.die(old, Exit::Code(0));

    let (last, others) = (jobs(&world, 2), world.living.clone());
    world.send(Event::Stop);
    for pid in others.into_keys().filter(|pid| *pid != last) {
        assert!(!is_told_to_leave(&world, last));
        world.die(pid, Exit::Code(0));
    }
    assert!(is_told_to_leave(&world, last));
    world.die(last, Exit::Code(0));
    assert!(world.did(&Action::Exit { code: 0 }));
}

#[test]
fn a_jobs_process_that_dies_is_replaced_and_its_death_crosses_an_upgrade() {
    let mut world = World::serving(JOBS);
    let first = jobs(&world, 1);
    world.die(first, SEGV);
    let second = jobs(&world, 1);
    assert_ne!(first, second);
    world.ready(second);
    let death = world.fleet.deaths().iter().next().unwrap();
    assert_eq!((death.pid, death.kind), (first, DeathKind::Jobs));
    let state = world.fleet.export();
    assert!(
        state.other_deaths.is_empty(),
        "another version may not know it"
    );
    assert_eq!(state.jobs_deaths[0].pid, first);
    assert!(state.children.iter().all(|child| child.pid != second));
}
