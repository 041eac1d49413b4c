//! Tests the policy with random histories of events. After each history the policy must return to full strength, or
//! stop. `World` checks the invariants of each action.

use nix::sys::signal::Signal;
use proptest::prelude::*;

use super::event::{Event, Exit, Millis, PolicyLimits};
use super::fleet_world::{LIMITS, World};
use crate::link::ids::Pid;
use crate::protocol::control::WorkerPhase;

/// An event of a random history. A number chooses one of the living children.
#[derive(Debug, Clone)]
enum Happening {
    Passes(Millis),
    MasterPaused(Millis),
    Ready(usize),
    Dies(usize, Exit),
    Leaves(usize),
    Retires(usize),
    SurvivesKill(usize),
    MaxCallsReached(usize),
    Grows(usize),
    AllThreadsStuck(usize),
    Reload(usize),
    Scale(usize),
    ScaleBy(i32),
    ForksRefused(bool),
    Upgrade,
    ForksHeld(bool),
    OddReport(i32),
    Stop,
    StopNow,
}

fn exit() -> impl Strategy<Value = Exit> {
    let signal = |(number, core_dumped)| Exit::Signal {
        number,
        core_dumped,
    };
    prop_oneof![
        (0..256).prop_map(Exit::Code),
        (1..65, any::<bool>()).prop_map(signal),
    ]
}

fn happening() -> impl Strategy<Value = Happening> {
    use Happening::*;
    prop_oneof![
        8 => (0u64..3_000).prop_map(Passes),
        2 => (0u64..70_000).prop_map(Passes),
        1 => (0u64..70_000).prop_map(MasterPaused),
        20 => any::<usize>().prop_map(Ready),
        8 => (any::<usize>(), exit()).prop_map(|(who, how)| Dies(who, how)),
        8 => any::<usize>().prop_map(Leaves),
        2 => any::<usize>().prop_map(Retires),
        1 => any::<usize>().prop_map(SurvivesKill),
        3 => any::<usize>().prop_map(MaxCallsReached),
        2 => any::<usize>().prop_map(Grows),
        2 => any::<usize>().prop_map(AllThreadsStuck),
        2 => (0usize..6).prop_map(Reload),
        1 => (0usize..8).prop_map(Scale),
        1 => (-3..4).prop_map(ScaleBy),
        1 => any::<bool>().prop_map(ForksRefused),
        2 => any::<bool>().prop_map(ForksHeld),
        2 => Just(Upgrade),
        1 => (0..400).prop_map(OddReport),
    ]
}

fn limits() -> impl Strategy<Value = PolicyLimits> {
    let delays = prop_oneof![Just(0u64), 1u64..5_000, Just(30_000)];
    let heartbeats = prop_oneof![Just(0u64), 1_000u64..20_000];
    // A lifetime is much longer than the quiet time at the end of a test. Otherwise a recycle could be under way when
    // the test checks.
    let lifetimes = prop_oneof![3 => Just(0u64), 1 => Just(10_000_000u64)];
    let recycling = (prop_oneof![Just(0u64), Just(1 << 20)], lifetimes, 1usize..4);
    let respawn = (0u32..7, delays);
    (1usize..6, respawn, heartbeats, 0u64..40_000, recycling).prop_map(
        |(count, respawn, heartbeat_timeout, drain_timeout, recycling)| PolicyLimits {
            count,
            respawn_burst: respawn.0,
            respawn_max_delay: respawn.1,
            heartbeat_timeout,
            drain_timeout,
            max_memory: recycling.0,
            max_lifetime: recycling.1,
            max_unavailable: recycling.2,
            ..LIMITS
        },
    )
}

/// Chooses a living child by a random number.
fn pick(world: &World, number: usize) -> Option<Pid> {
    let at = number.checked_rem(world.living.len())?;
    world.living.keys().nth(at).copied()
}

fn happen(world: &mut World, limits: PolicyLimits, happening: Happening) {
    match happening {
        Happening::Passes(span) => world.pass(span),
        Happening::MasterPaused(span) => {
            world.now += span;
            world.tick();
        }
        Happening::Ready(who) => {
            if let Some(pid) = pick(world, who) {
                world.ready(pid);
            }
        }
        Happening::Dies(who, how) => {
            if let Some(pid) = pick(world, who) {
                world.die(pid, how);
            }
        }
        Happening::Leaves(who) => {
            if let Some(pid) = pick(world, who).filter(|pid| world.living[pid].leaves) {
                world.die(pid, Exit::Code(0));
            }
        }
        Happening::Retires(who) => {
            if let Some(pid) = pick(world, who) {
                world.send(Event::Retiring { pid });
            }
        }
        Happening::SurvivesKill(who) => {
            if let Some(pid) = pick(world, who)
                && let Some(process) = world.living.get_mut(&pid)
            {
                process.stuck = true;
            }
        }
        Happening::MaxCallsReached(who) => {
            if let Some(pid) = pick(world, who) {
                world.send(Event::MaxCallsReached { pid, calls: 1_000 });
            }
        }
        Happening::Grows(who) => {
            if let Some(pid) = pick(world, who)
                && let Some(process) = world.living.get_mut(&pid)
            {
                process.rss_bytes = 2 << 20;
            }
        }
        Happening::AllThreadsStuck(who) => {
            if let Some(pid) = pick(world, who) {
                let evidence = "all 2 handler threads are stuck".to_owned();
                world.send(Event::AllThreadsStuck { pid, evidence });
            }
        }
        Happening::Reload(count) => {
            if world.fleet.can_reload() {
                let limits = PolicyLimits { count, ..limits };
                world.send(Event::Reload { limits });
            }
        }
        Happening::Scale(count) => world.send(Event::Scale { count }),
        Happening::ScaleBy(by) => world.send(Event::ScaleBy { by }),
        Happening::Upgrade => world.cross(),
        Happening::ForksRefused(refused) => world.refuse_forks = refused,
        Happening::ForksHeld(held) => {
            world.hold_forks = held;
            world.do_forks();
        }
        Happening::OddReport(pid) => {
            let pid = Pid(pid);
            if !world.living.contains_key(&pid) {
                world.ready(pid);
                world.die(pid, Exit::Code(1));
            }
            let at = Millis::from(pid.0.unsigned_abs()) * 1_000;
            world.send(Event::Heartbeat { pid, at });
        }
        Happening::Stop => world.send(Event::Stop),
        Happening::StopNow => world.send(Event::StopNow),
    }
}

/// Lets `span` milliseconds pass without a fault: forks succeed, workers become ready, and exit when ordered.
fn be_quiet(world: &mut World, span: Millis) {
    world.refuse_forks = false;
    world.hold_forks = false;
    world.do_forks();
    let end = world.now + span;
    while world.now < end && !world.exited {
        world.let_leave();
        world.all_ready();
        let wake = world.fleet.next_deadline().unwrap_or(end);
        let step = wake.clamp(world.now + 1, end) - world.now;
        world.pass(step);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn after_any_history_quiet_time_brings_full_strength(
        limits in limits(),
        history in prop::collection::vec(happening(), 0..120),
    ) {
        let mut world = World::new(limits);
        world.all_ready();
        for happening in history {
            happen(&mut world, limits, happening);
        }
        be_quiet(&mut world, 200_000);
        prop_assert_eq!(world.fleet.ready_count(), world.fleet.target_count());
        prop_assert_eq!(world.living.len(), world.fleet.target_count());
        prop_assert_eq!(world.count(WorkerPhase::Ready), world.fleet.target_count());
        prop_assert!(world.fleet.can_reload());
        prop_assert!(world.fleet.deaths().iter().len() <= 100);
    }

    #[test]
    fn after_a_stop_the_master_exits(
        limits in limits(),
        before in prop::collection::vec(happening(), 0..40),
        now in any::<bool>(),
        after in prop::collection::vec(happening(), 0..40),
        ready in any::<bool>(),
    ) {
        let mut world = World::new(limits);
        if ready {
            world.all_ready();
        }
        let stop = if now { Happening::StopNow } else { Happening::Stop };
        let history = before.into_iter().chain([stop]).chain(after);
        for happening in history {
            // After a failed start the master has exited before the end of the history.
            if !world.exited {
                happen(&mut world, limits, happening);
            }
        }
        be_quiet(&mut world, 1_000_000);
        prop_assert!(world.exited);
        prop_assert_eq!(world.fleet.next_deadline(), None);
    }

    #[test]
    fn after_the_burst_no_minute_has_more_than_twelve_forks(
        limits in limits(),
        lives in prop::collection::vec(0u64..59_000, 30..60),
        short in any::<bool>(),
    ) {
        let limits = PolicyLimits { count: 1, respawn_max_delay: limits.respawn_max_delay.max(1), ..limits };
        let mut world = World::new(limits);
        world.all_ready();
        for life in lives {
            world.pass(if short { life / 100 } else { life });
            world.let_leave();
            if let Some(pid) = world.first(WorkerPhase::Ready) {
                world.die(pid, Exit::Signal { number: Signal::SIGSEGV as i32, core_dumped: false });
            }
            world.all_ready();
        }
        let forks = world.forks(0);
        let after = forks.get(1 + limits.respawn_burst as usize..).unwrap_or_default();
        prop_assert!(after.windows(13).all(|w| w[12] - w[0] >= 60_000), "{:?}", after);
    }
}
