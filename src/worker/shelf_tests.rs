#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use super::*;
use crate::handler::call_state::CallKey;

fn job(serial: u64, expected_us: Option<u64>) -> HandlerCall {
    HandlerCall {
        key: CallKey { index: 0, serial },
        method: 0,
        params: "".into(),
        id: None,
        peer: None,
        deadline: Duration::MAX,
        expected: expected_us.map(Duration::from_micros),
        state: Arc::default(),
    }
}

/// A shelf on which so many threads sleep.
fn sleepers(idle: usize) -> Shelf {
    let shelf = Shelf::default();
    shelf.lock().idle = idle;
    shelf
}

fn woken(shelf: &Shelf) -> usize {
    shelf.lock().waking
}

#[test]
fn one_thread_is_woken_for_a_handful_of_short_jobs_and_one_for_each_long_one() {
    let shelf = sleepers(8);
    (0..16).for_each(|serial| shelf.put(job(serial, Some(2))));
    shelf.ring();
    assert_eq!(woken(&shelf), 1);
    shelf.ring();
    assert_eq!(woken(&shelf), 1, "it is on its way");
    (0..3).for_each(|serial| shelf.put(job(serial, Some(5000))));
    shelf.put(job(0, None));
    shelf.ring();
    assert_eq!(woken(&shelf), 5);
    (0..20).for_each(|serial| shelf.put(job(serial, None)));
    shelf.ring();
    assert_eq!((woken(&shelf), shelf.lock().idle), (8, 0));
}

#[test]
fn who_is_at_a_short_job_will_be_back_and_who_is_at_a_long_one_will_not() {
    let shelf = sleepers(8);
    shelf.put(job(1, Some(2)));
    let (_, brisk) = shelf.take(false);
    assert!(brisk);
    shelf.put(job(2, Some(2)));
    shelf.ring();
    assert_eq!(woken(&shelf), 0);
    let (_, brisk) = shelf.take(brisk);
    assert!(brisk && !shelf.goes_on());
    shelf.put(job(3, Some(5000)));
    let (_, brisk) = shelf.take(brisk);
    assert!(!brisk);
    shelf.put(job(4, Some(2)));
    shelf.ring();
    assert_eq!(woken(&shelf), 1);
}

#[test]
fn what_lies_for_too_long_is_another_threads() {
    let shelf = sleepers(2);
    shelf.put(job(1, Some(2)));
    shelf.put(job(2, Some(2)));
    let (_, brisk) = shelf.take(false);
    assert!(brisk, "and now it takes an hour");
    assert!(shelf.look(10) && shelf.look(10));
    assert_eq!(woken(&shelf), 0, "it may just have come");
    assert!(shelf.look(11));
    assert_eq!(woken(&shelf), 1);
    let (_, _) = shelf.take(false);
    assert!(!shelf.look(12), "nothing lies there");
    shelf.put(job(3, Some(2)));
    assert!(shelf.look(13));
    assert_eq!(woken(&shelf), 1);
}

#[test]
fn a_shelf_that_waits_for_busy_threads_is_not_looked_at_all_the_time() {
    let shelf = sleepers(0);
    shelf.put(job(1, None));
    shelf.put(job(2, Some(2)));
    shelf.put(job(3, Some(2)));
    assert!(!shelf.take(false).1);
    assert!(!shelf.look(9) && !shelf.goes_on());
    assert!(shelf.take(false).1);
    assert!(
        shelf.look(10),
        "one may take it, and leave what it has done untold"
    );
    assert!(shelf.goes_on());
    assert!(shelf.look(11), "the loop takes it back at once");
    assert!(shelf.is_blocked());
    assert!(!shelf.goes_on(), "the loop would not hear of it");
    assert_eq!(shelf.take_back().len(), 1);
    assert!(!shelf.look(12));
    assert!(shelf.is_blocked(), "until a thread is done");
}

#[test]
fn every_job_is_taken_once_whatever_it_was_expected_to_take() {
    const JOBS: u64 = 20_000;
    let shelf = Arc::new(Shelf::default());
    let (sender, seen) = crossbeam_channel::unbounded();
    for _ in 0..4 {
        let (shelf, sender) = (Arc::clone(&shelf), sender.clone());
        thread::spawn(move || {
            let mut brisk = false;
            loop {
                let (job, of_it) = shelf.take(brisk);
                brisk = of_it;
                if sender.send(job.key.serial).is_err() {
                    return;
                }
            }
        });
    }
    for serial in 0..JOBS {
        shelf.put(job(
            serial,
            [None, Some(1), Some(60), Some(9999)][serial as usize % 4],
        ));
        if serial % 7 == 0 {
            shelf.ring();
        }
    }
    shelf.ring();
    let end = Instant::now() + Duration::from_secs(20);
    let (mut serials, mut now_ms) = (Vec::new(), 0);
    while serials.len() < JOBS as usize {
        match seen.recv_timeout(Duration::from_millis(1)) {
            Ok(serial) => serials.push(serial),
            Err(_) => {
                now_ms += 1;
                shelf.look(now_ms);
            }
        }
        assert!(Instant::now() < end, "{} of {JOBS}", serials.len());
    }
    serials.sort_unstable();
    assert!(serials.into_iter().eq(0..JOBS));
}
