//! Limits how long sessions may live. An acceptor checks its own, and the master those without an acceptor.

use std::fmt::{self, Display, Formatter};
use std::time::Duration;

/// A session that has not exited this long after its deadline, in milliseconds, is killed.
pub const OVERDUE_MS: u64 = 250;
/// If a tick is this late, in milliseconds, this process was paused, or the machine is very busy.
const LATE_TICK_MS: u64 = 750;

/// How long a session may live, in milliseconds; `u64::MAX` if there is no limit.
#[derive(Debug)]
pub struct SessionTimes {
    /// The longest time since its event loop last ran.
    silent_ms: u64,
    /// The longest time since it got its connection.
    open_ms: u64,
}

impl SessionTimes {
    /// Returns which time a session with a connection has exceeded. `since_ms` is when it got the connection, and
    /// `heartbeat_ms` when its event loop last ran.
    pub fn exceeded(
        &self,
        (since_ms, heartbeat_ms): (u64, u64),
        now_ms: u64,
    ) -> Option<ExceededTime> {
        let silent_ms = now_ms.saturating_sub(heartbeat_ms.max(since_ms));
        if silent_ms > self.silent_ms {
            return Some(ExceededTime::Silent(silent_ms));
        }
        (now_ms.saturating_sub(since_ms) > self.open_ms).then_some(ExceededTime::Open)
    }
}

/// The limit that a session has exceeded. The session is killed for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExceededTime {
    /// Its event loop has not run for this time, in milliseconds.
    Silent(u64),
    /// Its connection has been open for longer than `max-lifetime` and `workers.drain-timeout` together.
    Open,
}

impl Display for ExceededTime {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            ExceededTime::Silent(ms) => write!(
                f,
                "its event loop has not run for {ms} ms (workers.heartbeat-timeout)"
            ),
            ExceededTime::Open => f.write_str(
                "it has outlived max-lifetime of the listener and workers.drain-timeout",
            ),
        }
    }
}

/// The limits of the configuration, in milliseconds.
#[derive(Debug)]
pub struct SessionLimits {
    heartbeat_ms: u64,
    /// `u64::MAX` if there is no limit.
    open_ms: u64,
    /// The time of the last tick.
    ticked_ms: u64,
    /// Until this time no session counts as stuck.
    trusted_until_ms: u64,
}

impl SessionLimits {
    /// Creates the limits. `lifetime` is `max-lifetime` of the listener; zero if there is no limit.
    pub fn new(heartbeat: Duration, drain: Duration, lifetime: Duration) -> Self {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX / 4);
        SessionLimits {
            heartbeat_ms: ms(heartbeat),
            open_ms: match ms(lifetime) {
                0 => u64::MAX,
                lifetime => lifetime + ms(drain) + OVERDUE_MS,
            },
            ticked_ms: 0,
            trusted_until_ms: 0,
        }
    }

    /// Returns the limits at a tick of the process that checks them.
    pub fn at_tick(&mut self, now_ms: u64) -> SessionTimes {
        // After a pause of this process, the sessions may have been paused, too.
        let last = std::mem::replace(&mut self.ticked_ms, now_ms);
        if last > 0 && now_ms > last + LATE_TICK_MS {
            self.trusted_until_ms = now_ms + self.heartbeat_ms;
        }
        SessionTimes {
            silent_ms: match now_ms < self.trusted_until_ms {
                true => u64::MAX,
                false => self.heartbeat_ms,
            },
            open_ms: self.open_ms,
        }
    }
}
