//! Decides whether a failed call is repeated, and after which delay. Pure.
//!
//! A call is repeated only if it certainly did not begin, and if it may succeed the next time. For example, a
//! restarting server will accept calls again, but a missing method stays missing. Enqueues with an id and waits
//! are repeated even if they may have begun, because the repeat changes nothing.

use std::io::ErrorKind;
use std::time::Duration;

use super::error::ClientError;
use crate::protocol::code::Code;

/// The delay after the second failure in a row. Each further failure doubles it.
const FIRST_DELAY: Duration = Duration::from_millis(5);
/// The longest delay.
const LONGEST_DELAY: Duration = Duration::from_secs(1);

/// How a pool or a command repeats calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Retry {
    /// How long after its first failure a call is repeated.
    pub(crate) patience: Duration,
}

impl Retry {
    /// Returns the delay before a failed call is repeated; `None` if it is not repeated. `error` is the last of its
    /// `failures`, and `since` the time since the first one.
    pub(super) fn after(
        self,
        error: &ClientError,
        failures: u32,
        since: Duration,
    ) -> Option<Duration> {
        if !error.is_safe_to_repeat() || !may_go_better(error) {
            return None;
        }
        self.delay(error, failures, since)
    }

    /// Returns the delay as `after` does, for a call that may be sent again although it has begun.
    pub(crate) fn after_repeatable(
        self,
        error: &ClientError,
        failures: u32,
        since: Duration,
    ) -> Option<Duration> {
        let is_lost = match error {
            ClientError::Gone(_) | ClientError::TimedOut(_) | ClientError::Protocol(_) => true,
            ClientError::Refused(error) => error.table_code() == Some(Code::Timeout),
            _ => false,
        };
        if !is_lost && !may_go_better(error) {
            return None;
        }
        self.delay(error, failures, since)
    }

    fn delay(self, error: &ClientError, failures: u32, since: Duration) -> Option<Duration> {
        if since >= self.patience {
            return None;
        }
        // Mostly the connection was closed while it was idle, and a new one works.
        let Some(doublings) = failures.checked_sub(2) else {
            return Some(match error {
                ClientError::NotSent(_) | ClientError::Closed => Duration::ZERO,
                _ => FIRST_DELAY,
            });
        };
        let delay = FIRST_DELAY.saturating_mul(2_u32.saturating_pow(doublings));
        Some(delay.min(LONGEST_DELAY).min(self.patience - since))
    }
}

fn may_go_better(error: &ClientError) -> bool {
    match error {
        ClientError::NotSent(_) | ClientError::Closed => true,
        // A unix socket that does not exist may be bound soon, but a missing permission stays.
        ClientError::NoServer { source, .. } => source.kind() != ErrorKind::PermissionDenied,
        ClientError::Refused(error) => matches!(
            error.table_code(),
            Some(Code::Overloaded | Code::Stopping | Code::Crashed | Code::Unavailable)
        ),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::protocol::rpc_error::RpcError;
    use std::io;

    const RETRY: Retry = Retry {
        patience: Duration::from_secs(10),
    };

    fn refused(code: Code, started: bool) -> ClientError {
        ClientError::Refused(RpcError::of(code, "", started))
    }

    #[test]
    fn only_what_did_not_begin_and_may_go_better_is_repeated() {
        let broken = || io::Error::from(ErrorKind::ConnectionReset);
        for (error, again) in [
            (refused(Code::Overloaded, false), true),
            (refused(Code::Stopping, false), true),
            (refused(Code::Crashed, false), true),
            (refused(Code::Unavailable, false), true),
            (refused(Code::Unavailable, true), false),
            (refused(Code::Overloaded, true), false),
            (refused(Code::Stopping, true), false),
            (refused(Code::Crashed, true), false),
            (refused(Code::MethodNotFound, false), false),
            (refused(Code::InvalidParams, false), false),
            (refused(Code::Timeout, false), false),
            (ClientError::NotSent(broken()), true),
            (ClientError::Closed, true),
            (ClientError::Gone(broken()), false),
            (ClientError::TimedOut(Duration::ZERO), false),
            (ClientError::Protocol(String::new()), false),
            (ClientError::Ended, false),
        ] {
            let delay = RETRY.after(&error, 1, Duration::ZERO);
            assert_eq!(delay.is_some(), again, "{error:?}");
        }
    }

    #[test]
    fn an_enqueue_is_repeated_although_it_may_have_begun() {
        let broken = || io::Error::from(ErrorKind::ConnectionReset);
        for (error, again) in [
            (refused(Code::Unavailable, true), true),
            (refused(Code::Crashed, true), true),
            (refused(Code::Timeout, true), true),
            (refused(Code::MethodNotFound, false), false),
            (refused(Code::Conflict, false), false),
            (ClientError::Gone(broken()), true),
            (ClientError::TimedOut(Duration::ZERO), true),
            (ClientError::Ended, false),
        ] {
            let delay = RETRY.after_repeatable(&error, 1, Duration::ZERO);
            assert_eq!(delay.is_some(), again, "{error:?}");
        }
        let late = RETRY.after_repeatable(&refused(Code::Timeout, true), 9, RETRY.patience);
        assert_eq!(late, None);
    }

    #[test]
    fn the_delay_doubles_up_to_a_second_and_ends_with_the_patience() {
        let error = refused(Code::Overloaded, false);
        let after = |failures, since_s| RETRY.after(&error, failures, Duration::from_secs(since_s));
        assert_eq!(after(1, 0), Some(FIRST_DELAY));
        assert_eq!(after(3, 0), Some(FIRST_DELAY * 2));
        assert_eq!(after(40, 0), Some(LONGEST_DELAY));
        assert_eq!(after(u32::MAX, 9), Some(LONGEST_DELAY));
        assert_eq!(after(40, 10), None);
        let stale = ClientError::Closed;
        assert_eq!(RETRY.after(&stale, 1, Duration::ZERO), Some(Duration::ZERO));
        let never = Retry {
            patience: Duration::ZERO,
        };
        assert_eq!(never.after(&stale, 1, Duration::ZERO), None);
    }
}
