use std::io;
use std::num::NonZeroUsize;

use super::*;
use crate::sys::shared_memory::OwnedArray;

fn call(number: u64) -> SlowCall {
    SlowCall {
        call: CallId { pid: 7, number },
        trace_id: Some(format!("{:032x}", 5)),
        method: "score".into(),
        runner: 8,
        at_ms: 1_700_000_000_000 + number,
        began_ns: 1_000,
        end: None,
        evidence: "thread S asleep".into(),
    }
}

#[test]
fn a_record_is_completed_and_the_last_ones_are_kept() -> io::Result<()> {
    let ring = &OwnedArray::<SlowRing>::new(NonZeroUsize::MIN)?[0];
    assert_eq!(ring.read().count(), 0);
    let number = ring.add(&call(1), 5, 0);
    assert_eq!(ring.read().collect::<Vec<_>>(), [call(1)]);
    ring.end(number, "timeout", 77);
    let ended = ring.read().next().and_then(|call| call.end);
    assert_eq!(ended, Some(("timeout".into(), 77)));
    for number in 2..=300 {
        ring.add(&call(number), 5, 0);
    }
    // It was replaced, so its end changes nothing.
    ring.end(number, "late", 78);
    let mut numbers: Vec<u64> = ring.read().map(|call| call.call.number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, Vec::from_iter(173..=300));
    assert!(ring.read().all(|call| call.end.is_none()));
    Ok(())
}

#[test]
fn the_master_adds_to_records_of_the_process_that_asks() -> io::Result<()> {
    let ring = &OwnedArray::<SlowRing>::new(NonZeroUsize::MIN)?[0];
    let (asks, other) = (ring.add(&call(1), 0, 42), ring.add(&call(2), 0, 0));
    assert_eq!(ring.answered(asks), None);
    assert_eq!(ring.answered(other), Some("thread S asleep".into()));
    ring.answer(9, |_, _| "of another process".into());
    assert_eq!(ring.answered(asks), None);
    ring.answer(8, |thread, known| format!("{known} of {thread}"));
    assert_eq!(ring.answered(asks), Some("thread S asleep of 42".into()));
    Ok(())
}

#[test]
fn the_calls_of_a_dead_process_have_crashed() -> io::Result<()> {
    let ring = &OwnedArray::<SlowRing>::new(NonZeroUsize::MIN)?[0];
    let done = ring.add(&call(1), 5, 0);
    ring.end(done, "done", 3);
    ring.add(&call(2), 5, 0);
    assert_eq!(ring.close(9, 2_000), []);
    assert_eq!(ring.close(8, 2_000), [call(2)]);
    assert_eq!(ring.close(8, 3_000), []);
    let ends: Vec<_> = ring.read().map(|call| call.end).collect();
    let expected = [("done", 3), ("crashed", 1_000)];
    assert_eq!(ends, expected.map(|(end, ns)| Some((end.to_owned(), ns))));
    Ok(())
}

#[test]
fn a_process_that_lies_harms_no_reader() -> io::Result<()> {
    let ring = &OwnedArray::<SlowRing>::new(NonZeroUsize::MIN)?[0];
    ring.count.store(u64::MAX, Relaxed);
    for entry in &ring.entries {
        entry.number.store(u64::MAX, Relaxed);
        for length in [
            &entry.method_length,
            &entry.outcome_length,
            &entry.evidence_length,
        ] {
            length.store(u32::MAX, Relaxed);
        }
        entry.evidence[0].store(u64::MAX, Relaxed);
    }
    assert_eq!(ring.read().count(), KEPT);
    assert!(
        ring.read()
            .all(|call| call.method.len() <= 3 * 8 * METHOD_WORDS)
    );
    Ok(())
}

#[test]
fn each_method_has_its_threshold() -> io::Result<()> {
    let rules = &OwnedArray::<SlowRules>::new(NonZeroUsize::MIN)?[0];
    assert_eq!((rules.is_on(), rules.lowest_ns()), (false, None));
    assert_eq!(rules.threshold_ns(3), NEVER);
    let mut limits = SlowLimits {
        params: 1 << 40,
        lines: 1 << 40,
        threshold_ns: 1_000,
        own_ns: vec![(3, 200), (4, NEVER), (999, 1)],
    };
    rules.write(Some(&limits));
    assert_eq!(rules.lowest_ns(), Some(1));
    limits.own_ns.pop();
    rules.write(Some(&limits));
    assert_eq!((rules.is_on(), rules.lowest_ns()), (true, Some(200)));
    let thresholds = [3, 4, 5, 999].map(|place| rules.threshold_ns(place));
    assert_eq!(thresholds, [200, NEVER, 1_000, NEVER]);
    assert_eq!((rules.params(), rules.lines()), (4096, MOST_LINES));
    limits.threshold_ns = NEVER;
    limits.own_ns.clear();
    rules.write(Some(&limits));
    assert_eq!((rules.is_on(), rules.lowest_ns()), (true, None));
    rules.write(None);
    assert_eq!((rules.is_on(), rules.lowest_ns()), (false, None));
    assert_eq!(rules.changes(), 4);
    Ok(())
}
