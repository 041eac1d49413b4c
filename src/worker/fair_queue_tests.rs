#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

fn key(serial: u64) -> CallKey {
    let index = serial as usize;
    CallKey { index, serial }
}

fn call(serial: u64, line: Option<usize>, since_ms: u64, deadline_ms: u64) -> Waiting {
    Waiting {
        key: key(serial),
        method: 0,
        // A call without a line has its own connection.
        token: Token::for_test(line.unwrap_or(100 + serial as usize)),
        client: 0,
        in_order: line.is_some(),
        since_ms,
        deadline_ms,
        can_be_sent: true,
        expected: None,
    }
}

fn take(queue: &mut FairQueue<()>, now_ms: u64) -> Option<u64> {
    let key = queue.next(now_ms)?.key;
    queue.take(key);
    Some(key.serial)
}

/// Returns an overloaded queue of four calls; its oldest call missed its deadline at 200 ms and is gone.
fn behind(lines: [Option<usize>; 5]) -> FairQueue<()> {
    let mut queue = FairQueue::<()>::default();
    for (serial, line) in (1..).zip(lines) {
        queue.push(call(serial, line, 0, 1000), (), 0);
    }
    let oldest = queue.next(200).unwrap().key;
    queue.record_timeout(oldest, 200);
    queue.remove(oldest);
    queue
}

#[test]
fn the_oldest_call_is_first_while_all_are_in_time() {
    let mut queue = FairQueue::<()>::default();
    (1..=3).for_each(|serial| queue.push(call(serial, None, 0, 60_000), (), 0));
    assert_eq!(take(&mut queue, 5000), Some(1));
    // A call with a short timeout among others is no sign of overload.
    queue.record_timeout(key(3), 5000);
    assert_eq!(take(&mut queue, 5000), Some(2));
    assert_eq!(take(&mut queue, 5000), Some(3));
    assert_eq!(take(&mut queue, 5000), None);
}

#[test]
fn the_newest_call_is_first_once_the_queue_is_overloaded() {
    let mut queue = behind([None; 5]);
    assert_eq!(take(&mut queue, 200), Some(5));
    assert_eq!(take(&mut queue, 299), Some(4));
    // No other call has missed its deadline since.
    assert_eq!(take(&mut queue, 300), Some(2));
}

#[test]
fn connections_take_turns_however_many_calls_each_sends_ahead() {
    for in_order in [true, false] {
        let mut queue = FairQueue::<()>::default();
        let of = |connection, serial| Waiting {
            in_order,
            ..call(serial, Some(connection), 0, 60_000)
        };
        (1..=4).for_each(|serial| queue.push(of(1, serial), (), 0));
        assert_eq!(take(&mut queue, 0), Some(1));
        (5..=6).for_each(|serial| queue.push(of(2, serial), (), 0));
        queue.push(of(3, 7), (), 0);
        let order: Vec<u64> = std::iter::from_fn(|| take(&mut queue, 0)).collect();
        assert_eq!(order, [2, 5, 7, 3, 6, 4]);
        assert!(queue.lines.is_empty() && queue.turns.is_empty() && queue.is_empty());
    }
}

#[test]
fn a_connection_with_two_calls_gets_turns_among_many_with_one() {
    let mut queue = FairQueue::<()>::default();
    (1..=2).for_each(|serial| queue.push(call(serial, Some(1), 0, 60_000), (), 0));
    (3..=10).for_each(|serial| queue.push(call(serial, Some(serial as usize), 0, 60_000), (), 0));
    // Each of them calls again as soon as it is served.
    let mut order = Vec::new();
    for serial in 11..=30 {
        let key = queue.next(0).unwrap().key;
        let line = queue.call_at(key.index).unwrap().token;
        queue.take(key);
        order.push(key.serial);
        queue.push(
            Waiting {
                token: line,
                ..call(serial, Some(1), 0, 60_000)
            },
            (),
            0,
        );
    }
    assert!(order[..10].contains(&2), "{order:?}");
}

#[test]
fn a_connection_that_gives_up_calls_loses_no_turn() {
    let mut queue = FairQueue::<()>::default();
    (1..=4).for_each(|serial| queue.push(call(serial, Some(1), 0, 60_000), (), 0));
    (5..=6).for_each(|serial| queue.push(call(serial, Some(2), 0, 60_000), (), 0));
    for serial in 1..=3 {
        let key = key(serial);
        assert!(queue.remove(key).is_some() && queue.remove(key).is_none());
    }
    assert_eq!(take(&mut queue, 0), Some(4));
    assert_eq!(take(&mut queue, 0), Some(5));
}

#[test]
fn a_burst_is_no_overload() {
    let mut queue = FairQueue::<()>::default();
    (1..=3).for_each(|serial| queue.push(call(serial, None, 1000, 1020), (), 1000));
    queue.record_timeout(key(1), 1050);
    assert_eq!(take(&mut queue, 1050), Some(1));
    assert_eq!(take(&mut queue, 1050), Some(2));
    assert_eq!(take(&mut queue, 1050), Some(3));
    queue.push(call(4, None, 1060, 1100), (), 1060);
    queue.push(call(5, None, 1060, 1100), (), 1060);
    assert_eq!(take(&mut queue, 1110), Some(4), "it has been empty");
}

#[test]
fn calls_of_one_connection_always_begin_in_order() {
    let mut queue = behind([None, Some(7), Some(8), None, Some(7)]);
    let order: Vec<u64> = std::iter::from_fn(|| take(&mut queue, 200)).collect();
    // Call 5 is the newest, and waits for 2 of the same connection.
    assert_eq!(order, [2, 5, 4, 3]);
}

#[test]
fn a_returned_call_gets_its_old_place() {
    let mut queue = FairQueue::<()>::default();
    (1..=3).for_each(|serial| queue.push(call(serial, Some(1), 0, 60_000), (), 0));
    assert_eq!(take(&mut queue, 0), Some(1));
    queue.push(call(1, Some(1), 0, 60_000), (), 5);
    assert_eq!(take(&mut queue, 5), Some(1));
}

#[test]
fn a_call_is_late_if_it_has_waited_and_has_less_time_than_its_method_takes() {
    let expected = Some(Duration::from_millis(20));
    let waits = call(1, None, 100, 150);
    assert!(!waits.is_late(130, expected));
    assert!(waits.is_late(131, expected));
    assert!(!waits.is_late(149, None), "nothing is known of it");
    assert!(!call(1, None, 100, 110).is_late(104, expected), "at once");
}

/// Arrivals of calls with their times, on three lines or none.
fn arrivals() -> impl Strategy<Value = Vec<(u64, usize)>> {
    prop::collection::vec((0..30_u64, 0..4_usize), 1..300)
}

proptest! {
    /// Compares the queue with a list of all calls, for random operations.
    #[test]
    fn it_has_the_calls_that_were_not_taken_out(
        steps in prop::collection::vec((0..3_usize, 0..4_usize, any::<prop::sample::Index>()), 0..200)
    ) {
        let mut queue = FairQueue::<u64>::default();
        let (mut model, mut out): (Vec<u64>, Vec<u64>) = (Vec::new(), Vec::new());
        let mut last = 0;
        for (step, line, which) in steps {
            match step {
                // Sometimes a removed call returns.
                0 => {
                    let serial = match out.is_empty() || line > 0 {
                        true => { last += 1; last }
                        false => out.remove(which.index(out.len())),
                    };
                    queue.push(call(serial, Some(serial as usize % 4), 0, 60_000), serial, 0);
                    model.push(serial);
                    model.sort_unstable();
                }
                1 if !model.is_empty() => {
                    let serial = model.remove(which.index(model.len()));
                    prop_assert_eq!(queue.remove(key(serial)).map(|(_, call)| call), Some(serial));
                    prop_assert!(queue.remove(key(serial)).is_none());
                    out.push(serial);
                }
                _ => if let Some(&next) = queue.next(0) {
                    let line = next.key.serial % 4;
                    prop_assert_eq!(model.iter().find(|it| *it % 4 == line), Some(&next.key.serial));
                    prop_assert_eq!(queue.take(next.key), Some(next.key.serial));
                    model.retain(|it| *it != next.key.serial);
                    out.push(next.key.serial);
                }
            }
            let all: Vec<u64> = queue.all().map(|call| call.key.serial).collect();
            prop_assert_eq!(&all, &model);
            prop_assert_eq!((queue.len(), queue.sendable()), (model.len(), model.len()));
            prop_assert!(queue.turns.len() <= 2 * queue.lines.len() + 64);
        }
        let token = Token::for_test(1);
        let taken = queue.take_all_of(token);
        prop_assert_eq!(taken, model.iter().copied().filter(|it| it % 4 == 1).collect::<Vec<_>>());
        while let Some(&next) = queue.next(0) {
            queue.take(next.key);
        }
        prop_assert!(queue.lines.is_empty() && queue.turns.is_empty());
    }

    /// With random arrivals, each call leaves exactly once, and those of a line in order.
    #[test]
    fn each_call_leaves_once_and_lines_keep_their_order(arrivals in arrivals(), pace in 1..4_usize) {
        let mut queue = FairQueue::<()>::default();
        let (mut now, mut left) = (0, Vec::new());
        for (serial, (after, line)) in (1..).zip(&arrivals) {
            now += after;
            let line = (*line > 0).then_some(*line);
            queue.push(call(serial, line, now, now + 50), (), now);
            if serial as usize % 4 < pace {
                left.extend(turn(&mut queue, now));
            }
        }
        while !queue.is_empty() {
            now += 1;
            left.extend(turn(&mut queue, now));
        }
        let mut sorted = left.clone();
        sorted.sort_unstable();
        prop_assert_eq!(sorted, (1..=arrivals.len() as u64).collect::<Vec<_>>());
        for line in 1..4 {
            let of_line: Vec<_> = left.iter().filter(|it| arrivals[**it as usize - 1].1 == line).collect();
            prop_assert!(of_line.is_sorted(), "line {}: {:?}", line, of_line);
        }
    }

    /// With five times the calls that one thread can run, nine tenths of its capacity are answered in
    /// time, for any timeouts longer than a run. Slightly too many calls do no harm either.
    #[test]
    fn an_overloaded_worker_still_uses_its_capacity(
        run_ms in 5..20_u64, patience in 3..20_u64, times in prop::sample::select(vec![11, 15, 20, 50])
    ) {
        let mut queue = FairQueue::<()>::default();
        let (mut serial, mut busy_until, mut in_time) = (0, 0, 0_u64);
        let length = 20_000;
        for now in 0..length {
            while serial * run_ms * 10 < now * times {
                serial += 1;
                queue.push(call(serial, None, now, now + patience * run_ms), (), now);
            }
            expire(&mut queue, now);
            while busy_until <= now && let Some(&next) = queue.next(now) {
                if next.is_late(now, Some(Duration::from_millis(run_ms))) {
                    queue.record_timeout(next.key, now);
                } else {
                    busy_until = now + run_ms;
                    // A millisecond for the transfer.
                    in_time += u64::from(busy_until < next.deadline_ms);
                }
                queue.remove(next.key);
            }
        }
        let most = length / run_ms;
        prop_assert!(in_time * 10 >= most * 9, "{} of {}", in_time, most);
    }
}

/// Begins one call, after those that missed their deadline have left.
fn turn(queue: &mut FairQueue<()>, now_ms: u64) -> Vec<u64> {
    let mut left = expire(queue, now_ms);
    left.extend(take(queue, now_ms));
    left
}

fn expire(queue: &mut FairQueue<()>, now_ms: u64) -> Vec<u64> {
    let over: Vec<Waiting> = queue.all().copied().collect();
    let over = over.into_iter().filter(|call| call.deadline_ms <= now_ms);
    over.map(|call| {
        queue.record_timeout(call.key, now_ms);
        queue.remove(call.key);
        call.key.serial
    })
    .collect()
}
