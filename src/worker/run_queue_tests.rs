#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use super::*;

/// Returns a call that was read long ago, with its own connection and a late deadline.
fn call(serial: u64, expected_us: Option<u64>) -> (Waiting, HandlerCall) {
    let index = serial as usize;
    let key = CallKey { index, serial };
    let waiting = Waiting {
        key,
        method: 0,
        token: Token::for_test(serial as usize),
        client: 0,
        in_order: false,
        since_ms: 0,
        deadline_ms: u64::MAX,
        can_be_sent: true,
        expected: expected_us.map(Duration::from_micros),
    };
    let call = HandlerCall {
        key,
        method: 0,
        params: "".into(),
        id: None,
        peer: None,
        deadline: Duration::MAX,
        expected: expected_us.map(Duration::from_micros),
        state: Arc::default(),
    };
    (waiting, call)
}

fn put(queue: &RunQueue, calls: impl IntoIterator<Item = (u64, Option<u64>)>) {
    let calls = calls.into_iter();
    queue.put(calls.map(|(serial, expected)| call(serial, expected)), 0);
}

/// Returns a queue with this number of sleeping threads.
fn sleepers(idle: usize) -> RunQueue {
    let queue = RunQueue::new(1);
    queue.lock().idle = idle;
    queue
}

fn woken(queue: &RunQueue) -> usize {
    queue.lock().waking
}

#[test]
fn short_calls_share_a_woken_thread_and_long_ones_get_one_each() {
    let queue = sleepers(8);
    put(&queue, (0..16).map(|serial| (serial, Some(2))));
    assert_eq!(woken(&queue), 1);
    put(&queue, [(16, Some(2))]);
    assert_eq!(woken(&queue), 1, "it is on its way");
    put(&queue, (17..20).map(|serial| (serial, Some(5000))));
    put(&queue, [(20, None)]);
    assert_eq!(woken(&queue), 5);
    put(&queue, (21..41).map(|serial| (serial, None)));
    assert_eq!((woken(&queue), queue.lock().idle), (8, 0));
}

#[test]
fn a_thread_at_a_short_call_counts_as_free_and_one_at_a_long_call_does_not() {
    let queue = sleepers(8);
    put(&queue, [(1, Some(2))]);
    queue.lock().waking = 0;
    assert!(queue.take(false).is_short);
    put(&queue, [(2, Some(2))]);
    assert_eq!(woken(&queue), 0);
    assert!(queue.take(true).is_short && !queue.may_take_more());
    put(&queue, [(3, Some(5000))]);
    assert!(!queue.take(true).is_short);
    put(&queue, [(4, Some(2))]);
    assert_eq!(woken(&queue), 1);
}

#[test]
fn a_call_that_waits_for_a_millisecond_gets_another_thread() {
    let queue = sleepers(2);
    put(&queue, [(1, Some(2)), (2, Some(2))]);
    queue.lock().waking = 0;
    assert!(queue.take(false).is_short, "and now it takes an hour");
    queue.lock().idle = 1;
    assert!(queue.look(10) && queue.look(10));
    assert_eq!(woken(&queue), 0, "it may just have come");
    assert!(queue.look(11));
    assert_eq!(woken(&queue), 1);
    queue.take(false);
    assert!(!queue.look(12), "nothing waits");
}

#[test]
fn a_queue_behind_long_calls_is_not_polled_and_can_be_sent() {
    let queue = sleepers(0);
    put(&queue, [(1, None), (2, Some(2)), (3, Some(2))]);
    assert!(!queue.take(false).is_short);
    assert!(queue.look(9), "once, to send what waits");
    assert!(!queue.look(9) && !queue.may_take_more());
    assert_eq!(queue.sendable(0), 2, "all threads are at long calls");
    assert!(queue.take(false).is_short);
    put(&queue, [(4, Some(2))]);
    assert_eq!(queue.sendable(0), 0, "the short one will soon be done");
    assert_eq!(queue.sendable(SHORT_WAIT_MS), 2, "it is not");
    assert!(queue.look(10) && queue.may_take_more());
    assert!(queue.look(11), "once, to send what waits");
    assert!(
        !queue.may_take_more(),
        "the event loop would not be woken for it"
    );
    assert!(!queue.look(12));
    assert_eq!(queue.sendable(0), 2, "until a thread takes a call");
    queue.take(true);
    assert_eq!(queue.sendable(0), 0);
}

#[test]
fn a_call_is_sent_unless_it_is_late_and_taken_out_once() {
    let queue = RunQueue::new(1);
    put(&queue, [(1, None), (2, None), (3, None)]);
    let sent = queue.next_to_send(false, 7).unwrap().unwrap();
    assert_eq!(sent.key.serial, 1);
    assert!(!queue.remove(sent.key));
    let second = call(2, None).0.key;
    assert!(queue.remove(second) && !queue.remove(second));
    let late = Waiting {
        deadline_ms: 8,
        ..call(0, None).0
    };
    queue.put([(late, call(0, None).1)], 0);
    queue.expect(0, Duration::from_secs(1));
    queue.remove(call(3, None).0.key);
    assert_eq!(queue.next_to_send(false, 7).unwrap_err(), late.key);
    assert!(!queue.take(false).begins);
    assert_eq!(
        queue.next_to_send(false, 7).unwrap().map(|call| call.key),
        None
    );
    assert_eq!(queue.lock().work, Duration::ZERO);
}

#[test]
fn every_call_is_taken_once_for_any_expected_run_time() {
    const CALLS: u64 = 20_000;
    let queue = Arc::new(RunQueue::new(1));
    let (sender, seen) = crossbeam_channel::unbounded();
    for _ in 0..4 {
        let (queue, sender) = (Arc::clone(&queue), sender.clone());
        thread::spawn(move || {
            let mut was_short = false;
            loop {
                let taken = queue.take(was_short);
                was_short = taken.is_short;
                if sender.send(taken.call.key.serial).is_err() {
                    return;
                }
            }
        });
    }
    let expected = [None, Some(1), Some(60), Some(9999)];
    for first in (0..CALLS).step_by(7) {
        let serials = first..CALLS.min(first + 7);
        put(
            &queue,
            serials.map(|serial| (serial, expected[serial as usize % 4])),
        );
    }
    let end = Instant::now() + Duration::from_secs(20);
    let (mut serials, mut now_ms) = (Vec::new(), 0);
    while serials.len() < CALLS as usize {
        match seen.recv_timeout(Duration::from_millis(1)) {
            Ok(serial) => serials.push(serial),
            Err(_) => {
                now_ms += 1;
                queue.look(now_ms);
            }
        }
        assert!(Instant::now() < end, "{} of {CALLS}", serials.len());
    }
    serials.sort_unstable();
    assert!(serials.into_iter().eq(0..CALLS));
}
