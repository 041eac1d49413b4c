//! Defines what the master tells the jobs process about the end of a worker or pool process: whether an attempt of a
//! job has caused it.
//!
//! It must fit into the value of a message. So it names an attempt by a mark of 29 bits, and not by its id. A mark is
//! enough, because the jobs process knows the few attempts that the executor had at its end.

use super::attempt_frame::{AttemptId, is_attempt_key};

const MARK_BITS: u32 = 29;
const MARK: u64 = (1 << MARK_BITS) - 1;

const ORDERED: u64 = 0;
const OUTSIDE: u64 = 1;
const UNCLEAR: u64 = 2;
const OTHER_CALL: u64 = 3;
const ATTEMPT: u64 = 4;

/// Why a worker or pool process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecutorCause {
    /// The master has ordered it, or has killed it because it did not obey an order in time.
    Ordered,
    /// Another process has killed it.
    Outside,
    /// It exited by itself, was stuck, or was killed by the OOM killer. The evidence names no call and no attempt.
    Unclear,
    /// The evidence names a call.
    OtherCall,
    /// The evidence names the attempt with this mark.
    Attempt(u32),
}

/// The end of a worker or pool process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExecutorEnd {
    pub pid: i32,
    pub cause: ExecutorCause,
}

/// Returns the cause if the evidence names the call or attempt with this key; 0: it names neither.
pub fn cause_of_key(key: u64) -> ExecutorCause {
    match key {
        0 => ExecutorCause::Unclear,
        key if is_attempt_key(key) => ExecutorCause::Attempt(mark_of(key)),
        _ => ExecutorCause::OtherCall,
    }
}

/// Returns the mark of an attempt.
pub fn attempt_mark(id: AttemptId) -> u32 {
    mark_of(id.key())
}

fn mark_of(key: u64) -> u32 {
    (key >> 3 & MARK) as u32
}

impl ExecutorEnd {
    /// Returns the end as the value of a message.
    pub fn encode(self) -> u64 {
        let (kind, mark) = match self.cause {
            ExecutorCause::Ordered => (ORDERED, 0),
            ExecutorCause::Outside => (OUTSIDE, 0),
            ExecutorCause::Unclear => (UNCLEAR, 0),
            ExecutorCause::OtherCall => (OTHER_CALL, 0),
            ExecutorCause::Attempt(mark) => (ATTEMPT, u64::from(mark) & MARK),
        };
        u64::from(self.pid as u32) << 32 | kind << MARK_BITS | mark
    }

    /// Reads the value of a message; `None` if its kind is unknown.
    pub fn decode(value: u64) -> Option<Self> {
        let cause = match value >> MARK_BITS & 7 {
            ORDERED => ExecutorCause::Ordered,
            OUTSIDE => ExecutorCause::Outside,
            UNCLEAR => ExecutorCause::Unclear,
            OTHER_CALL => ExecutorCause::OtherCall,
            ATTEMPT => ExecutorCause::Attempt((value & MARK) as u32),
            _ => return None,
        };
        Some(ExecutorEnd {
            pid: (value >> 32) as i32,
            cause,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_an_executor_fits_into_a_message() {
        let id = AttemptId {
            job: [9; 16],
            token: 3,
        };
        let attempt = cause_of_key(id.key());
        assert_eq!(attempt, ExecutorCause::Attempt(attempt_mark(id)));
        assert_eq!(cause_of_key(7), ExecutorCause::OtherCall);
        assert_eq!(cause_of_key(0), ExecutorCause::Unclear);
        for cause in [
            ExecutorCause::Ordered,
            ExecutorCause::Outside,
            ExecutorCause::Unclear,
            ExecutorCause::OtherCall,
            attempt,
            ExecutorCause::Attempt(MARK as u32),
        ] {
            let end = ExecutorEnd { pid: 4242, cause };
            assert_eq!(ExecutorEnd::decode(end.encode()), Some(end));
        }
        assert_eq!(ExecutorEnd::decode(7 << MARK_BITS), None);
    }
}
