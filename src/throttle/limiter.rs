//! Limits how often a repeated warning is logged: a few lines at once, then one per period.
//!
//! A crash loop must not fill the disk. Suppressed lines are counted, and the next line reports the
//! count. If no line follows, `flush` reports it. It cannot fail.

use std::sync::Mutex;

use super::Millis;
use crate::sys::lock::lock;
use crate::sys::process::monotonic;

/// A token bucket of log lines.
#[derive(Debug, Clone)]
pub struct Limiter {
    /// One more line is allowed after each period.
    period: Millis,
    /// This many lines may be logged at once.
    burst: u64,
    /// When the bucket is full again.
    full_at: Millis,
    /// The number of lines suppressed since the last logged line.
    held_back: u32,
}

impl Limiter {
    /// For events that others can cause repeatedly: one line, then one every ten seconds.
    pub fn rare() -> Self {
        Limiter::new(1, 10_000)
    }

    /// Allows `burst` lines at once, and one more per `period`.
    pub const fn new(burst: u64, period: Millis) -> Self {
        Limiter {
            period,
            burst,
            full_at: 0,
            held_back: 0,
        }
    }

    /// Asks to log a line. `Some` allows it and holds the number of lines suppressed before it.
    pub fn admit(&mut self, now: Millis) -> Option<u32> {
        let full_at = self.full_at.max(now) + self.period;
        if full_at - now > self.burst * self.period {
            self.held_back = self.held_back.saturating_add(1);
            return None;
        }
        self.full_at = full_at;
        Some(std::mem::take(&mut self.held_back))
    }

    /// Returns the number of suppressed lines, if a line may be logged now.
    pub fn flush(&mut self, now: Millis) -> Option<u32> {
        self.flush_at().filter(|at| *at <= now)?;
        self.admit(now)
    }

    /// Returns when [`Limiter::flush`] will return a number.
    pub fn flush_at(&self) -> Option<Millis> {
        let room_at = (self.full_at + self.period).saturating_sub(self.burst * self.period);
        (self.held_back > 0).then_some(room_at)
    }
}

/// A token bucket of log lines, shared by all threads of a process. It is for events that callers can
/// cause.
#[derive(Debug)]
pub struct SharedLimiter(Mutex<Limiter>);

impl SharedLimiter {
    /// Allows five lines at once, then one every ten seconds.
    pub const fn new() -> Self {
        SharedLimiter(Mutex::new(Limiter::new(5, 10_000)))
    }

    /// Logs `text` with the number of lines suppressed before it. If it is suppressed too, it is logged only as debug.
    pub fn log(&self, level: log::Level, text: String) {
        let now = Millis::try_from(monotonic().as_millis()).unwrap_or(Millis::MAX);
        let mut limiter = lock(&self.0);
        match limiter.admit(now) {
            Some(more) => log::log!(level, "{}", with_suppressed_count(text, more)),
            None => log::debug!("{text}"),
        }
    }
}

/// Returns a line that says how many lines before it were suppressed.
pub fn with_suppressed_count(text: String, more: u32) -> String {
    match more {
        0 => text,
        more => format!("{text} held_back_before={more}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_lines_become_a_burst_and_then_one_line_per_period_with_a_count() {
        let mut limiter = Limiter::new(2, 1000);
        let admitted: Vec<_> = (0..5).map(|_| limiter.admit(10)).collect();
        assert_eq!(admitted, [Some(0), Some(0), None, None, None]);
        assert_eq!(limiter.flush(1009), None);
        assert_eq!(limiter.flush_at(), Some(1010));
        assert_eq!(limiter.flush(1010), Some(3));
        assert_eq!((limiter.flush_at(), limiter.flush(9000)), (None, None));
    }
}
