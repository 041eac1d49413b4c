#![allow(clippy::unwrap_used)]

use super::*;
use crate::handler::builtin::{Echo, Sleep};
use crate::handler::{Context, Handler, Placement};
use crate::protocol::body::Form;
use crate::protocol::reply::{AnswerFormat, Framing};
use crate::sys::waker::Waker;
use crate::worker::connection::AnswerPosition;

/// Stands for the methods of a pool; only its lane is asked for.
struct Pooled;

impl Handler for Pooled {
    fn call(&self, _: &str, _: &Context<'_>, _: &mut Vec<u8>) -> Result<(), RpcError> {
        unreachable!("its lane has no threads here")
    }

    fn placement(&self) -> Placement {
        Placement::Pool(0)
    }
}

fn registry() -> Arc<Registry> {
    let method = |name: &str, concurrency, rate| Method {
        name: name.into(),
        handler: match name {
            "sleep" => Arc::new(Sleep),
            "pooled" => Arc::new(Pooled),
            _ => Arc::new(Echo),
        },
        timeout: Duration::from_secs(30),
        concurrency,
        rate,
    };
    Arc::new(Registry::new(vec![
        method("echo", 0, 0),
        method("sleep", 0, 0),
        method("few", 1, 0),
        method("slow", 0, 10),
        method("pooled", 0, 0),
    ]))
}

fn reply(place: AnswerPosition) -> PendingAnswer {
    let shape = AnswerFormat {
        form: Form::Plain,
        wrap: Framing::Frame,
    };
    PendingAnswer {
        place,
        shape,
        mark: Default::default(),
    }
}

fn add(calls: &mut CallScheduler, method: usize, id: Option<&str>) -> CallKey {
    let place = if id.is_some() {
        AnswerPosition::Anywhere
    } else {
        AnswerPosition::InOrder(0)
    };
    calls.add(
        (Token::for_test(1), reply(place), id),
        None,
        (method, "3600"),
        (5, u64::MAX / 2),
    )
}

fn hand_out(calls: &mut CallScheduler, threads: &mut Threads) {
    assert_eq!(calls.hand_out(threads, 5, |_, _| 0), None);
}

/// Waits for one report of the threads.
fn report(threads: &mut Threads) -> Done {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(done) = threads.take_done().next() {
            return done;
        }
        assert!(std::time::Instant::now() < deadline, "no report in 10 s");
        std::thread::yield_now();
    }
}

#[test]
fn a_call_that_waits_is_given_up_unbegun_and_never_handed_out() {
    let registry = registry();
    let mut threads =
        Threads::start(1, None, 0, &registry, &Arc::new(Waker::new().unwrap())).unwrap();
    let mut calls = CallScheduler::new(registry, 10);
    let key = add(&mut calls, 0, Some("7"));
    assert_eq!(calls.find(Token::for_test(1), "7"), Some(key));
    let ended = calls.give_up(key).unwrap();
    assert!(!ended.begun);
    assert_eq!(ended.id.as_deref(), Some("7"));
    assert!(calls.give_up(key).is_none());
    hand_out(&mut calls, &mut threads);
    assert!(calls.is_empty());
    assert_eq!(calls.counts(&threads), (0, 0, 0));
}

#[test]
fn a_running_call_that_is_given_up_is_lost_until_its_thread_reports() {
    let registry = registry();
    let mut threads =
        Threads::start(1, None, 0, &registry, &Arc::new(Waker::new().unwrap())).unwrap();
    let mut calls = CallScheduler::new(registry, 10);
    let key = add(&mut calls, 1, None);
    hand_out(&mut calls, &mut threads);
    while !calls.get_mut(key).unwrap().state.is_running() {
        std::thread::yield_now();
    }
    assert_eq!(calls.oldest(), Some((1, 5)));
    assert!(calls.give_up(key).unwrap().begun);
    assert_eq!(calls.counts(&threads), (0, 0, 1));
    let done = report(&mut threads);
    assert!(calls.done(&done).is_none());
    assert_eq!((calls.counts(&threads), calls.oldest()), ((0, 0, 0), None));
}

#[test]
fn queue_concurrency_and_rate_are_limits() {
    let mut calls = CallScheduler::new(registry(), 2);
    add(&mut calls, 0, None);
    assert!(calls.has_room(0, 1, 0).is_ok());
    add(&mut calls, 2, None);
    assert!(
        calls
            .has_room(0, 1, 0)
            .unwrap_err()
            .message
            .contains("the queue of 2 for a thread is full")
    );
    assert!(
        calls.has_room(0, 1, 1).is_ok(),
        "an idle thread would begin one at once"
    );
    assert!(
        calls
            .has_room(2, 1, 5)
            .unwrap_err()
            .message
            .contains("concurrency of 1")
    );
    for _ in 0..10 {
        assert!(calls.admit(3, 1_000_000).is_ok());
    }
    assert!(
        calls
            .admit(3, 1_000_000)
            .unwrap_err()
            .message
            .contains("rate of 10")
    );
    assert!(calls.admit(3, 1_000_100).is_ok());
    assert!(calls.admit(3, 1_000_100).is_err());
}

/// Behind a call that never ends nothing piles up: neither of those that are done, nor of those
/// that were given up while they waited.
#[test]
fn calls_that_are_over_leave_nothing_behind_a_stuck_one() {
    let registry = registry();
    let mut threads =
        Threads::start(2, None, 0, &registry, &Arc::new(Waker::new().unwrap())).unwrap();
    let mut calls = CallScheduler::new(registry, 10);
    let stuck = add(&mut calls, 1, None);
    for _ in 0..1000 {
        add(&mut calls, 0, None);
        hand_out(&mut calls, &mut threads);
        calls.done(&report(&mut threads)).unwrap();
    }
    assert!(
        calls.lanes[0].handed_out.len() < 100,
        "{}",
        calls.lanes[0].handed_out.len()
    );
    while calls.lanes[0].out < 2 {
        add(&mut calls, 1, None);
        hand_out(&mut calls, &mut threads);
    }
    for _ in 0..1000 {
        let key = add(&mut calls, 1, Some("7"));
        calls.give_up(key).unwrap();
    }
    assert_eq!(calls.lanes[0].queue.len(), 0);
    assert!(calls.give_up(stuck).unwrap().begun);
}

/// What runs does not wait: it takes no place in the queue, whenever it was handed out.
#[test]
fn a_running_call_leaves_the_whole_queue_to_those_that_wait() {
    let registry = registry();
    let mut threads =
        Threads::start(1, None, 0, &registry, &Arc::new(Waker::new().unwrap())).unwrap();
    let mut calls = CallScheduler::new(registry, 2);
    let runs = add(&mut calls, 1, None);
    hand_out(&mut calls, &mut threads);
    for _ in 0..2 {
        assert!(calls.has_room(1, 1, 1).is_ok());
        add(&mut calls, 1, None);
        hand_out(&mut calls, &mut threads);
    }
    assert!(calls.has_room(1, 1, 1).is_err());
    calls.give_up(runs).unwrap();
}

/// A client that does not read has its calls held back, and nobody else's; they go on in their
/// order when it reads again.
#[test]
fn calls_of_a_connection_with_a_backlog_wait_and_hold_up_nobody() {
    let registry = registry();
    let mut threads =
        Threads::start(1, None, 0, &registry, &Arc::new(Waker::new().unwrap())).unwrap();
    let mut calls = CallScheduler::new(registry, 10);
    let lagging: Vec<CallKey> = (0..3).map(|_| add(&mut calls, 0, None)).collect();
    let other = calls.add(
        (Token::for_test(2), reply(AnswerPosition::Anywhere), None),
        None,
        (0, "1"),
        (5, 9),
    );
    let full = |token: Token, _| {
        if token == Token::for_test(1) {
            HIGH_WATER
        } else {
            0
        }
    };
    assert_eq!(calls.hand_out(&mut threads, 5, full), None);
    let done = report(&mut threads);
    assert_eq!(done.key, other);
    calls.done(&done).unwrap();
    assert!(calls.are_parked() && calls.counts(&threads) == (0, 3, 0));
    calls.give_up(lagging[1]).unwrap();
    calls.unpark(Token::for_test(1), 5);
    hand_out(&mut calls, &mut threads);
    for key in [lagging[0], lagging[2]] {
        let done = report(&mut threads);
        assert_eq!(done.key, key);
        calls.done(&done).unwrap();
    }
    assert!(calls.is_empty() && !calls.are_parked());
}

/// What can't be in time any more is not begun, once it is known how long such calls take; what
/// finds a thread idle is begun in any case.
#[test]
fn a_waiting_call_with_too_little_time_left_is_named_in_place_of_being_begun() {
    let registry = registry();
    let mut threads =
        Threads::start(1, None, 0, &registry, &Arc::new(Waker::new().unwrap())).unwrap();
    let mut calls = CallScheduler::new(registry, 10);
    calls.loads[0].record_run(Duration::from_millis(50), false);
    let shape = reply(AnswerPosition::Anywhere);
    let token = Token::for_test(1);
    let late = calls.add((token, shape, None), None, (0, "1"), (100, 145));
    let fresh = calls.add((token, shape, None), None, (0, "1"), (120, 220));
    assert_eq!(calls.hand_out(&mut threads, 120, |_, _| 0), Some(late));
    assert!(!calls.give_up(late).unwrap().begun);
    assert_eq!(calls.hand_out(&mut threads, 120, |_, _| 0), None);
    assert_eq!(report(&mut threads).key, fresh);
    let at_once = calls.add((token, shape, None), None, (0, "1"), (300, 310));
    calls.lanes[0].out = 0;
    assert_eq!(calls.hand_out(&mut threads, 300, |_, _| 0), None);
    assert_eq!(report(&mut threads).key, at_once);
}

/// Many connections may each have large calls waiting: all together they have a bound too.
#[test]
fn the_params_of_all_connections_together_have_a_bound() {
    let mut calls = CallScheduler::new(registry(), 10);
    assert!(
        calls.has_room(0, MOST_BYTES + 1, 0).is_ok(),
        "one of any size"
    );
    let key = add(&mut calls, 0, None);
    // the threads' lane and that of a pool have half of it each
    let most = MOST_BYTES / 2;
    assert!(calls.has_room(0, most - 10, 0).is_ok());
    let refused = calls.has_room(0, most, 0).unwrap_err();
    assert!(refused.message.contains("33554432 bytes"), "{refused}");
    assert!(calls.has_room(4, most, 0).is_ok(), "another lane's");
    calls.give_up(key).unwrap();
    assert!(calls.has_room(0, most, 0).is_ok());
}

/// A pool that has nobody to serve its calls fills its own queue and no other.
#[test]
fn lanes_have_queues_and_limits_of_their_own() {
    let registry = registry();
    let mut threads =
        Threads::start(1, None, 0, &registry, &Arc::new(Waker::new().unwrap())).unwrap();
    let mut calls = CallScheduler::new(registry, 2);
    let pooled: Vec<CallKey> = (0..2).map(|_| add(&mut calls, 4, None)).collect();
    assert!(calls.has_room(4, 1, 0).is_err());
    assert!(calls.has_room(0, 1, 0).is_ok());
    let on_thread = add(&mut calls, 0, None);
    hand_out(&mut calls, &mut threads);
    let done = report(&mut threads);
    assert_eq!(done.key, on_thread);
    calls.done(&done).unwrap();
    assert_eq!(calls.counts(&threads), (0, 2, 0));
    // held back and let go again, they come to their own queue, in their order
    for key in &pooled {
        let &waiting = calls.lanes[1].queue.next(5).unwrap();
        assert_eq!(waiting.key, *key);
        calls.lanes[1].queue.remove(*key);
        let held_back = calls.blocked_on_output.entry(Token::for_test(1));
        held_back.or_default().push(waiting);
    }
    calls.unpark(Token::for_test(1), 5);
    let queue = &calls.lanes[1].queue;
    assert_eq!((queue.next(5).unwrap().key, queue.len()), (pooled[0], 2));
    assert_eq!(calls.lanes[0].queue.len(), 0);
    for key in pooled {
        assert!(!calls.give_up(key).unwrap().begun);
    }
    assert!(calls.is_empty());
}
