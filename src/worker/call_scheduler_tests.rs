#![allow(clippy::unwrap_used)]

use super::*;
use crate::handler::builtin::{Echo, Sleep};
use crate::handler::{Context, Handler, Placement};
use crate::protocol::body::Form;
use crate::protocol::reply::{AnswerFormat, Framing};
use crate::sys::process::monotonic_ms;
use crate::sys::waker::Waker;
use crate::worker::connection::AnswerPosition;
use crate::worker::lane::MOST_BYTES;
use crate::worker::{call_room, remote_calls};

/// A method of a pool; only its lane matters.
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
        kills_abandoned: false,
    };
    Arc::new(Registry::new(vec![
        method("echo", 0, 0),
        method("sleep", 0, 0),
        method("few", 1, 0),
        method("slow", 0, 10),
        method("pooled", 0, 0),
    ]))
}

/// Returns a scheduler without threads.
fn scheduler(limit: usize) -> CallScheduler {
    let registry = registry();
    let queue = Arc::new(RunQueue::new(registry.methods().len()));
    CallScheduler::new(registry, limit, queue)
}

fn numbered(number: u64) -> CallIdentity {
    CallIdentity {
        number,
        ..CallIdentity::default()
    }
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
        (Token::for_test(1), reply(place), id, numbered(1)),
        (None, Source::Unknown),
        (method, "3600"),
        (5, u64::MAX / 2),
    )
}

/// Requests room for a call of a connection that uses as much as any other.
fn room(
    calls: &mut CallScheduler,
    method: usize,
    size: usize,
    threads: usize,
) -> Result<(), RpcError> {
    let owner = (Source::Unknown, Token::for_test(1));
    let mut evicted = Vec::new();
    let made = call_room::make_room(calls, (method, size), owner, threads, &mut evicted);
    assert!(evicted.is_empty());
    made
}

fn queue(calls: &mut CallScheduler) {
    calls.queue_calls(5, |_, _| Some(0));
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
fn a_waiting_call_that_is_given_up_never_begins() {
    let registry = registry();
    let threads = Threads::start(
        (1, None),
        None,
        (0, &[]),
        &registry,
        &Arc::new(Waker::new().unwrap()),
    )
    .unwrap();
    let mut calls = CallScheduler::new(registry, 10, Arc::clone(&threads.queue));
    let key = add(&mut calls, 0, Some("7"));
    assert_eq!(calls.find(Token::for_test(1), "7"), Some(key));
    let ended = calls.give_up(key).unwrap();
    assert!(!ended.begun);
    assert_eq!(ended.id.as_deref(), Some("7"));
    assert!(calls.give_up(key).is_none());
    queue(&mut calls);
    assert!(calls.is_empty());
    assert_eq!(calls.counts(&threads), (0, 0, 0));
}

#[test]
fn a_running_call_that_is_given_up_is_lost_until_its_thread_reports() {
    let registry = registry();
    let mut threads = Threads::start(
        (1, None),
        None,
        (0, &[]),
        &registry,
        &Arc::new(Waker::new().unwrap()),
    )
    .unwrap();
    let mut calls = CallScheduler::new(registry, 10, Arc::clone(&threads.queue));
    let key = add(&mut calls, 1, None);
    queue(&mut calls);
    while !calls.get_mut(key).unwrap().state.is_running() {
        std::thread::yield_now();
    }
    let oldest = calls
        .oldest(&threads)
        .map(|call| (call.method, call.read_ms));
    assert_eq!(oldest, Some((1, 5)));
    assert!(calls.give_up(key).unwrap().begun);
    assert_eq!(calls.counts(&threads), (0, 0, 1));
    let done = report(&mut threads);
    assert!(calls.done(&done).is_none());
    assert_eq!(calls.counts(&threads), (0, 0, 0));
    assert!(calls.oldest(&threads).is_none());
}

#[test]
fn queue_concurrency_and_rate_are_limits() {
    let mut calls = scheduler(2);
    add(&mut calls, 0, None);
    assert!(room(&mut calls, 0, 1, 0).is_ok());
    add(&mut calls, 2, None);
    assert!(
        room(&mut calls, 0, 1, 0)
            .unwrap_err()
            .message
            .contains("the queue of 2 for a thread is full")
    );
    assert!(
        room(&mut calls, 0, 1, 1).is_ok(),
        "an idle thread would begin one at once"
    );
    let mut admit = |method, source, now_ms| {
        let source = Source::User(source);
        let checked = call_room::check_limits(&mut calls, method, source, now_ms);
        checked.map_err(|error| error.message)?;
        call_room::count_call(&mut calls, method, source);
        Ok::<_, String>(())
    };
    assert!(admit(2, 1, 1).unwrap_err().contains("concurrency of 1"));
    for _ in 0..10 {
        assert_eq!(admit(3, 1, 1_000_000), Ok(()));
    }
    assert!(admit(3, 2, 1_000_000).unwrap_err().contains("rate of 10"));
    assert_eq!(admit(3, 1, 1_000_100), Ok(()));
    assert!(admit(3, 1, 1_000_100).is_err());
    let error = admit(3, 1, 1_000_200).unwrap_err();
    assert!(error.contains("another client"), "{error}");
    assert_eq!(admit(3, 2, 1_000_200), Ok(()));
}

/// Behind a call that never ends nothing accumulates: neither done calls, nor calls that were given up
/// while they waited.
#[test]
fn finished_calls_do_not_accumulate_behind_a_stuck_one() {
    let registry = registry();
    let mut threads = Threads::start(
        (2, None),
        None,
        (0, &[]),
        &registry,
        &Arc::new(Waker::new().unwrap()),
    )
    .unwrap();
    let mut calls = CallScheduler::new(registry, 10, Arc::clone(&threads.queue));
    let stuck = add(&mut calls, 1, None);
    for _ in 0..1000 {
        add(&mut calls, 0, None);
        queue(&mut calls);
        calls.done(&report(&mut threads)).unwrap();
    }
    add(&mut calls, 1, None);
    queue(&mut calls);
    for _ in 0..1000 {
        let key = add(&mut calls, 1, Some("7"));
        queue(&mut calls);
        assert!(!calls.give_up(key).unwrap().begun);
    }
    assert_eq!((calls.table.len(), calls.lanes[0].local), (2, 2));
    assert_eq!(calls.lanes[0].queue.first(), None);
    assert!(calls.give_up(stuck).unwrap().begun);
}

/// A running call uses no place in the queue.
#[test]
fn a_running_call_uses_no_place_in_the_queue() {
    let registry = registry();
    let threads = Threads::start(
        (1, None),
        None,
        (0, &[]),
        &registry,
        &Arc::new(Waker::new().unwrap()),
    )
    .unwrap();
    let mut calls = CallScheduler::new(registry, 2, Arc::clone(&threads.queue));
    let runs = add(&mut calls, 1, None);
    queue(&mut calls);
    for _ in 0..2 {
        assert!(room(&mut calls, 1, 1, 1).is_ok());
        add(&mut calls, 1, None);
        queue(&mut calls);
    }
    assert!(room(&mut calls, 1, 1, 1).is_err());
    calls.give_up(runs).unwrap();
}

/// If a client does not read, only its own calls are held back. They continue in their order when it
/// reads again.
#[test]
fn calls_of_a_connection_with_a_backlog_wait_and_delay_no_others() {
    let registry = registry();
    let mut threads = Threads::start(
        (1, None),
        None,
        (0, &[]),
        &registry,
        &Arc::new(Waker::new().unwrap()),
    )
    .unwrap();
    let mut calls = CallScheduler::new(registry, 10, Arc::clone(&threads.queue));
    let lagging: Vec<CallKey> = (0..3).map(|_| add(&mut calls, 0, None)).collect();
    let other = calls.add(
        (
            Token::for_test(2),
            reply(AnswerPosition::Anywhere),
            None,
            numbered(2),
        ),
        (None, Source::Unknown),
        (0, "1"),
        (5, u64::MAX / 2),
    );
    let full = |token: Token, _| {
        let is_full = token == Token::for_test(1);
        Some(if is_full { HIGH_WATER } else { 0 })
    };
    calls.queue_calls(5, full);
    let done = report(&mut threads);
    assert_eq!(done.key, other);
    calls.done(&done).unwrap();
    assert!(calls.are_parked() && calls.counts(&threads) == (0, 3, 0));
    calls.give_up(lagging[1]).unwrap();
    calls.unpark(Token::for_test(1));
    queue(&mut calls);
    for key in [lagging[0], lagging[2]] {
        let done = report(&mut threads);
        assert_eq!(done.key, key);
        calls.done(&done).unwrap();
    }
    assert!(calls.is_empty() && !calls.are_parked());
}

/// Once the run time of such calls is known, a call that cannot meet its deadline is not begun. A call
/// that finds an idle thread always begins.
#[test]
fn a_waiting_call_with_too_little_time_left_is_reported_instead_of_begun() {
    let registry = registry();
    let mut threads = Threads::start(
        (1, None),
        None,
        (0, &[]),
        &registry,
        &Arc::new(Waker::new().unwrap()),
    )
    .unwrap();
    let mut calls = CallScheduler::new(registry, 10, Arc::clone(&threads.queue));
    calls.lanes[0].queue.expect(0, Duration::from_secs(50));
    let shape = reply(AnswerPosition::Anywhere);
    let token = Token::for_test(1);
    let now_ms = monotonic_ms();
    let late = calls.add(
        (token, shape, None, numbered(1)),
        (None, Source::Unknown),
        (0, "1"),
        (now_ms - 20, now_ms + 25_000),
    );
    queue(&mut calls);
    let done = report(&mut threads);
    assert_eq!((done.key, done.outcome.is_none()), (late, true));
    assert!(!calls.done(&done).unwrap().begun);
    let enough = now_ms + 100_000;
    let in_time = calls.add(
        (token, shape, None, numbered(1)),
        (None, Source::Unknown),
        (0, "1"),
        (now_ms - 20, enough),
    );
    queue(&mut calls);
    let done = report(&mut threads);
    assert_eq!((done.key, done.outcome.is_some()), (in_time, true));
    assert!(calls.done(&done).unwrap().begun);
    // It has found an idle thread.
    let now_ms = monotonic_ms() + 1000;
    let at_once = calls.add(
        (token, shape, None, numbered(1)),
        (None, Source::Unknown),
        (0, "1"),
        (now_ms, now_ms + 25_000),
    );
    queue(&mut calls);
    let done = report(&mut threads);
    assert_eq!((done.key, done.outcome.is_some()), (at_once, true));
}

/// Queued calls are held back when unsent answers accumulate, and continue when those are read.
#[test]
fn queued_calls_are_held_back_when_their_connection_has_too_many_unsent_answers() {
    let mut calls = scheduler(10);
    let keys: Vec<CallKey> = (0..3).map(|_| add(&mut calls, 0, None)).collect();
    queue(&mut calls);
    calls.park(Token::for_test(2));
    assert_eq!(calls.lanes[0].local, 3);
    calls.park(Token::for_test(1));
    calls.queue_calls(5, |_, _| Some(HIGH_WATER));
    assert!(calls.lanes[0].local == 0 && calls.are_parked());
    assert_eq!(calls.lanes[0].queue.first(), None);
    calls.unpark(Token::for_test(1));
    queue(&mut calls);
    assert_eq!(calls.lanes[0].queue.first(), Some(keys[0]));
    // A connection that is gone needs no room for answers.
    calls.park(Token::for_test(1));
    calls.queue_calls(5, |_, _| None);
    assert_eq!(calls.lanes[0].local, 3);
    for key in keys {
        assert!(!calls.give_up(key).unwrap().begun);
    }
    assert!(calls.is_empty() && calls.lanes[0].local == 0);
}

/// Many connections may each have large waiting calls: there is a limit for all of them together.
#[test]
fn the_params_of_all_connections_together_are_limited() {
    let mut calls = scheduler(10);
    assert!(
        room(&mut calls, 0, MOST_BYTES + 1, 0).is_ok(),
        "one of any size"
    );
    let key = add(&mut calls, 0, None);
    // The lanes of the threads and of a pool have half of it each.
    let most = MOST_BYTES / 2;
    assert!(room(&mut calls, 0, most - 10, 0).is_ok());
    let refused = room(&mut calls, 0, most, 0).unwrap_err();
    assert!(refused.message.contains("33554432 bytes"), "{refused}");
    assert!(room(&mut calls, 4, most, 0).is_ok(), "another lane's");
    calls.give_up(key).unwrap();
    assert!(room(&mut calls, 0, most, 0).is_ok());
}

/// A pool without programs fills only its own queue.
#[test]
fn lanes_have_queues_and_limits_of_their_own() {
    let registry = registry();
    let mut threads = Threads::start(
        (1, None),
        None,
        (0, &[]),
        &registry,
        &Arc::new(Waker::new().unwrap()),
    )
    .unwrap();
    let mut calls = CallScheduler::new(registry, 2, Arc::clone(&threads.queue));
    let pooled: Vec<CallKey> = (0..2).map(|_| add(&mut calls, 4, None)).collect();
    assert!(room(&mut calls, 4, 1, 0).is_err());
    assert!(room(&mut calls, 0, 1, 0).is_ok());
    let on_thread = add(&mut calls, 0, None);
    queue(&mut calls);
    let done = report(&mut threads);
    assert_eq!(done.key, on_thread);
    calls.done(&done).unwrap();
    assert_eq!(calls.counts(&threads), (0, 2, 0));
    assert_eq!(calls.lanes[1].queue.first(), Some(pooled[0]));
    assert_eq!(calls.lanes[0].queue.first(), None);
    assert_eq!(remote_calls::sendable(&calls, 1, &threads, 5), 2);
    for key in pooled {
        assert!(!calls.give_up(key).unwrap().begun);
    }
    assert!(calls.is_empty());
}

/// A connection with few calls gets room at the cost of one with many, whose newest call is refused.
#[test]
fn the_connection_with_the_most_calls_makes_room() {
    let mut calls = scheduler(3);
    let add = |calls: &mut CallScheduler, token: usize, source| {
        let caller = (
            Token::for_test(token),
            reply(AnswerPosition::Anywhere),
            None,
            numbered(3),
        );
        let time = (5, u64::MAX / 2);
        calls.add(caller, (None, Source::User(source)), (0, "1"), time)
    };
    let greedy: Vec<CallKey> = (0..3).map(|_| add(&mut calls, 1, 1)).collect();
    queue(&mut calls);
    let mut evicted = Vec::new();
    let mut ask = |calls: &mut CallScheduler, token, source| {
        let owner = (Source::User(source), Token::for_test(token));
        call_room::make_room(calls, (0, 1), owner, 0, &mut evicted)
    };
    assert!(ask(&mut calls, 1, 1).is_err());
    ask(&mut calls, 2, 1).unwrap();
    let modest = add(&mut calls, 2, 1);
    queue(&mut calls);
    ask(&mut calls, 3, 2).unwrap();
    let other = add(&mut calls, 3, 2);
    queue(&mut calls);
    assert!(
        ask(&mut calls, 2, 1).is_err(),
        "both of its source have one"
    );
    assert!(
        ask(&mut calls, 3, 2).is_err(),
        "its source would have as much"
    );
    let keys: Vec<CallKey> = evicted.iter().map(|done| done.key).collect();
    assert_eq!(keys, [greedy[2], greedy[1]]);
    for done in evicted {
        let ended = calls.done(&done).unwrap();
        assert!(
            !ended.begun
                && done
                    .outcome
                    .unwrap()
                    .unwrap_err()
                    .message
                    .contains("is full")
        );
    }
    for key in [greedy[0], modest, other] {
        assert!(!calls.give_up(key).unwrap().begun);
    }
    assert!(calls.is_empty());
    assert_eq!(
        (
            calls.lanes[0].local,
            calls.lanes[0].bytes,
            calls.lanes[0].evicted
        ),
        (0, 0, 0)
    );
}

/// Its connection has no place for its answer any more.
#[test]
fn a_held_back_call_that_was_evicted_and_given_up_is_not_looked_at_again() {
    let mut calls = scheduler(2);
    let add = |calls: &mut CallScheduler, place| {
        let caller = (Token::for_test(1), reply(place), None, numbered(3));
        let time = (5, u64::MAX / 2);
        calls.add(caller, (None, Source::User(1)), (0, "1"), time)
    };
    add(&mut calls, AnswerPosition::InOrder(1));
    let newest = add(&mut calls, AnswerPosition::InOrder(2));
    calls.queue_calls(5, |_, _| Some(HIGH_WATER));
    assert!(calls.are_parked());
    let mut evicted = Vec::new();
    let other = (Source::User(2), Token::for_test(2));
    call_room::make_room(&mut calls, (0, 1), other, 0, &mut evicted).unwrap();
    assert_eq!(evicted[0].key, newest);
    // Its deadline passes before the eviction is reported.
    assert!(!calls.give_up(newest).unwrap().begun);
    calls.unpark(Token::for_test(1));
    calls.queue_calls(5, |_, place| {
        assert!(matches!(place, AnswerPosition::InOrder(1)), "{place:?}");
        Some(0)
    });
    assert!(calls.done(&evicted.remove(0)).is_none());
    assert_eq!(calls.lanes[0].local, 1);
}
