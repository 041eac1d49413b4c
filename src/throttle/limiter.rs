//! How often a repeated trouble may be logged: a few lines at once, then one a period.
//!
//! A crash loop must not fill a disk, so what comes too often is counted instead, and the count is
//! told with the next line (or by itself, when no other comes). It can't fail.

use std::sync::{Mutex, PoisonError};

use super::Millis;
use crate::sys::process::monotonic;

/// A bucket of log lines.
#[derive(Debug, Clone)]
pub struct Limiter {
    /// One line more is allowed after each period.
    period: Millis,
    /// So many lines may come at once.
    burst: u64,
    /// When the bucket is full again.
    full_at: Millis,
    /// Lines not written since the last one that was.
    held_back: u32,
}

impl Limiter {
    /// For what others can cause again and again: one line, then one each ten seconds.
    pub fn rare() -> Self {
        Limiter::new(1, 10_000)
    }

    /// `burst` lines at once, one more each `period`.
    pub const fn new(burst: u64, period: Millis) -> Self {
        Limiter {
            period,
            burst,
            full_at: 0,
            held_back: 0,
        }
    }

    /// A line wants to be written. `Some` allows it, and says how many before it were not.
    pub fn admit(&mut self, now: Millis) -> Option<u32> {
        let full_at = self.full_at.max(now) + self.period;
        if full_at - now > self.burst * self.period {
            self.held_back = self.held_back.saturating_add(1);
            return None;
        }
        self.full_at = full_at;
        Some(std::mem::take(&mut self.held_back))
    }

    /// How many lines were held back, once there is room to say so.
    pub fn flush(&mut self, now: Millis) -> Option<u32> {
        self.flush_at().filter(|at| *at <= now)?;
        self.admit(now)
    }

    /// When [`Limiter::flush`] will have something to say.
    pub fn flush_at(&self) -> Option<Millis> {
        let room_at = (self.full_at + self.period).saturating_sub(self.burst * self.period);
        (self.held_back > 0).then_some(room_at)
    }
}

/// A bucket of log lines that all threads of a process share: for what callers can cause.
#[derive(Debug)]
pub struct SharedLimiter(Mutex<Limiter>);

impl SharedLimiter {
    /// Five lines at once, then one each ten seconds.
    pub const fn new() -> Self {
        SharedLimiter(Mutex::new(Limiter::new(5, 10_000)))
    }

    /// Logs this text with the number of lines that were held back before it, or holds it back as well.
    pub fn log(&self, level: log::Level, text: String) {
        let now = Millis::try_from(monotonic().as_millis()).unwrap_or(Millis::MAX);
        let mut limiter = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match limiter.admit(now) {
            Some(more) => log::log!(level, "{}", with_suppressed_count(text, more)),
            None => log::debug!("{text}"),
        }
    }
}

/// A line that tells how many before it were not written.
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
    fn a_flood_becomes_a_burst_and_then_one_line_a_period_that_counts_the_rest() {
        let mut limiter = Limiter::new(2, 1000);
        let admitted: Vec<_> = (0..5).map(|_| limiter.admit(10)).collect();
        assert_eq!(admitted, [Some(0), Some(0), None, None, None]);
        assert_eq!(limiter.flush(1009), None);
        assert_eq!(limiter.flush_at(), Some(1010));
        assert_eq!(limiter.flush(1010), Some(3));
        assert_eq!((limiter.flush_at(), limiter.flush(9000)), (None, None));
    }
}
