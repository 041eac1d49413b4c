//! Panics in the log: each of preforkd's own, and so many of handlers as an operator can read.
//!
//! A handler that panics at each call would fill a disk at the pace of its callers. The first panics
//! of a while are logged whole, the rest is counted.

use std::cell::{Cell, RefCell};
use std::panic::PanicHookInfo;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::text::pluralize;
use crate::sys::process::monotonic;

/// So many panics of handlers are logged in each `WHILE`.
const MOST: u32 = 10;
const WHILE: Duration = Duration::from_secs(10);

/// Characters of a call's id that are logged.
const LONGEST_ID: usize = 100;

thread_local! {
    static SPARING: Cell<bool> = const { Cell::new(false) };
    /// The method of the call that this thread runs, and its id. A panic can end the process, so the text
    /// must be there before.
    static CALL: RefCell<String> = const { RefCell::new(String::new()) };
}

static BUDGET: Mutex<Budget> = Mutex::new(Budget {
    since: Duration::ZERO,
    seen: 0,
});

/// Runs `may_panic`, a call of `method` which catches its panics: they are logged sparingly, with the
/// method and the id of the call.
pub fn rate_limit_panics<T>(
    (method, id): (&str, Option<&str>),
    may_panic: impl FnOnce() -> T,
) -> T {
    let before = SPARING.replace(true);
    // No allocation once the text has its room.
    CALL.with_borrow_mut(|call| {
        call.clear();
        call.push_str(method);
        if let Some(id) = id {
            call.push_str(", id ");
            call.extend(id.chars().take(LONGEST_ID));
        }
    });
    let result = may_panic();
    SPARING.set(before);
    result
}

/// Sends panics to the log: standard error may be closed, and is not where an operator looks.
pub fn log_panics() {
    std::panic::set_hook(Box::new(log_panic));
}

fn log_panic(panic: &PanicHookInfo<'_>) {
    let mut withheld = 0;
    let mut call = String::new();
    if SPARING.get() {
        call = CALL.with_borrow(|call| format!(" in a call of {call}"));
        let mut budget = BUDGET.lock().unwrap_or_else(PoisonError::into_inner);
        match budget.spend(monotonic()) {
            Some(before) => withheld = before,
            None => return,
        }
    }
    if withheld > 0 {
        let more = pluralize(
            withheld as usize,
            "more panic of a handler was",
            "more panics of handlers were",
        );
        log::error!("{more} not logged one by one");
    }
    let place = panic.location().map_or_else(String::new, |place| {
        format!(" at {}:{}", place.file(), place.line())
    });
    let payload = panic.payload();
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic with a payload that is no text");
    log::error!("panic{place}{call}: {text}");
}

/// How many more may be logged.
struct Budget {
    since: Duration,
    seen: u32,
}

impl Budget {
    /// Whether one more may be logged at `now`, and how many before it were not.
    fn spend(&mut self, now: Duration) -> Option<u32> {
        let mut withheld = 0;
        if now.saturating_sub(self.since) >= WHILE || self.seen == 0 {
            withheld = self.seen.saturating_sub(MOST);
            *self = Budget {
                since: now,
                seen: 0,
            };
        }
        self.seen = self.seen.saturating_add(1);
        (self.seen <= MOST).then_some(withheld)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_of_panics_is_ten_lines_and_a_count() {
        let mut budget = Budget {
            since: Duration::ZERO,
            seen: 0,
        };
        let at = Duration::from_secs;
        let logged = (0..1000).filter(|_| budget.spend(at(100)) == Some(0));
        assert_eq!(logged.count(), 10);
        assert_eq!(budget.spend(at(109)), None);
        assert_eq!(budget.spend(at(110)), Some(991));
        assert_eq!(budget.spend(at(110)), Some(0));
        assert_eq!(budget.spend(at(500)), Some(0));
    }
}
