//! Logs panics: all of preforkd's own, and a limited number of those of handlers.
//!
//! A handler that panics at each call would fill the disk at the rate of its callers. In each period the
//! first panics are logged, the others are counted.

use std::cell::{Cell, RefCell};
use std::panic::PanicHookInfo;
use std::sync::Mutex;
use std::time::Duration;

use super::text::pluralize;
use crate::sys::lock::lock;
use crate::sys::process::monotonic;

/// The number of handler panics logged in each `WHILE`.
const MOST: u32 = 10;
const WHILE: Duration = Duration::from_secs(10);

/// The number of characters of a call id that are logged.
const LONGEST_ID: usize = 100;

thread_local! {
    static SPARING: Cell<bool> = const { Cell::new(false) };
    /// The method and id of the call that this thread runs. It is set before the call, because a panic
    /// can end the process.
    static CALL: RefCell<String> = const { RefCell::new(String::new()) };
}

static BUDGET: Mutex<Budget> = Mutex::new(Budget {
    since: Duration::ZERO,
    seen: 0,
});

/// Runs `may_panic`, which runs a call of `method` and catches its panics. They are logged with the
/// method and the id of the call, at a limited rate.
pub fn rate_limit_panics<T>(
    (method, id): (&str, Option<&str>),
    may_panic: impl FnOnce() -> T,
) -> T {
    let before = SPARING.replace(true);
    // No allocation once the string has enough capacity.
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

/// Sends panics to the log, because standard error may be closed and operators do not read it.
pub fn log_panics() {
    std::panic::set_hook(Box::new(log_panic));
}

fn log_panic(panic: &PanicHookInfo<'_>) {
    let mut withheld = 0;
    let mut call = String::new();
    if SPARING.get() {
        call = CALL.with_borrow(|call| format!(" in a call of {call}"));
        let mut budget = lock(&BUDGET);
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
        log::error!("{more} not logged individually");
    }
    let place = panic.location().map_or_else(String::new, |place| {
        format!(" at {}:{}", place.file(), place.line())
    });
    let payload = panic.payload();
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic with a payload that is not text");
    log::error!("panic{place}{call}: {text}");
}

/// Limits the number of panics that are logged.
struct Budget {
    since: Duration,
    seen: u32,
}

impl Budget {
    /// Returns whether a panic at `now` may be logged, and how many before it were not.
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
    fn many_panics_are_ten_lines_and_a_count() {
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
