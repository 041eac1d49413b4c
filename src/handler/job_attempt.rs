//! Describes the attempt of a job to its handler, and what is known of the program that ran it.
//!
//! A handler gets it from [`Context::job`](super::Context::job), a command from its environment, and a pool
//! program from its frame.

use std::ffi::CString;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};

use crate::protocol::job_id::JobId;
use crate::protocol::program::JobMember;

/// The variables of an attempt in the environment of a command.
pub(super) const JOB_VARIABLES: [&str; 2] = ["PREFORKD_JOB", "PREFORKD_ATTEMPT"];

/// The attempt of a job that a handler runs.
///
/// A job may be attempted again after its handler has done its work, for example after a power failure. The id
/// is the same in each attempt, so a handler can store it with its effect and find out that it is done.
#[derive(Debug)]
pub struct JobAttempt {
    id: Box<str>,
    attempt: u32,
    max_attempts: u32,
    /// A value of `ProgramEnd`.
    program_end: AtomicU8,
    must_end_now: AtomicBool,
}

/// How a program ended that ran an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProgramEnd {
    /// It has not ended, or was killed because it sent no valid answer.
    None = 0,
    /// By its own fault, and it ran nothing but the attempt.
    Fault = 1,
    /// By its own fault, and it also ran others.
    SharedFault = 2,
    /// By a signal from outside.
    Killed = 3,
    /// By an order, or because of another call that it ran.
    Other = 4,
}

impl JobAttempt {
    /// The attempt with the number `attempt` (from 1) of the job with this id.
    pub(crate) fn new(id: impl Into<Box<str>>, attempt: u32, max_attempts: u32) -> Self {
        JobAttempt {
            id: id.into(),
            attempt,
            max_attempts,
            program_end: AtomicU8::new(ProgramEnd::None as u8),
            must_end_now: AtomicBool::new(false),
        }
    }

    /// Returns the id of the job, a UUID in lower case.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the id as the number that shared memory has.
    pub(crate) fn bits(&self) -> u128 {
        let digits = self.id.chars().filter_map(|digit| digit.to_digit(16));
        digits.fold(0, |bits, digit| bits << 4 | u128::from(digit))
    }

    /// Returns the number of the attempt, from 1. An attempt that did not begin, or that the server interrupted,
    /// is not counted.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Returns after how many failed attempts the job is dead.
    pub fn max_attempts(&self) -> u32 {
        self.max_attempts
    }

    /// Returns whether the job is dead if this attempt fails.
    pub fn is_last(&self) -> bool {
        self.attempt >= self.max_attempts
    }

    /// Records how its program ended. Only its supervisor does that, before it reports the result.
    pub(crate) fn set_program_end(&self, end: ProgramEnd) {
        self.program_end.store(end as u8, Relaxed);
    }

    /// Returns how its program ended. The channel of the result orders this read after the write.
    pub(crate) fn program_end(&self) -> ProgramEnd {
        match self.program_end.load(Relaxed) {
            1 => ProgramEnd::Fault,
            2 => ProgramEnd::SharedFault,
            3 => ProgramEnd::Killed,
            4 => ProgramEnd::Other,
            _ => ProgramEnd::None,
        }
    }

    /// Returns the member in the frame of a pool program.
    pub(super) fn member(&self) -> JobMember<'_> {
        JobMember {
            id: &self.id,
            attempt: self.attempt,
            max_attempts: self.max_attempts,
        }
    }

    /// Lets its program end at once when the attempt is given up, instead of at the end of its timeout.
    pub(crate) fn end_now(&self) {
        self.must_end_now.store(true, Relaxed);
    }

    /// Returns whether its program must end at once.
    pub(super) fn must_end_now(&self) -> bool {
        self.must_end_now.load(Relaxed)
    }

    /// Returns the variables for the environment of a command.
    pub(super) fn variables(&self) -> [CString; 2] {
        let [job, attempt] = JOB_VARIABLES;
        let variable = |text: String| CString::new(text).expect("a UUID and a number have no NUL");
        [
            variable(format!("{job}={}", self.id)),
            variable(format!("{attempt}={}", self.attempt)),
        ]
    }
}

/// Returns the id of the job that shared memory has; `None` if it is 0.
pub(crate) fn recorded_job(bits: u128) -> Option<String> {
    (bits != 0).then(|| JobId(bits.to_be_bytes()).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_attempt_is_known_and_the_end_of_a_program_is_kept() {
        let attempt = JobAttempt::new("0-1", 2, 3);
        assert_eq!((attempt.id(), attempt.attempt()), ("0-1", 2));
        assert!(!attempt.is_last() && JobAttempt::new("0-1", 3, 3).is_last());
        for end in [
            ProgramEnd::None,
            ProgramEnd::Fault,
            ProgramEnd::SharedFault,
            ProgramEnd::Killed,
            ProgramEnd::Other,
        ] {
            attempt.set_program_end(end);
            assert_eq!(attempt.program_end(), end);
        }
        assert!(!attempt.must_end_now());
        attempt.end_now();
        assert!(attempt.must_end_now());
        let variables = attempt.variables().map(|it| it.into_string().ok());
        let expected = ["PREFORKD_JOB=0-1", "PREFORKD_ATTEMPT=2"];
        assert_eq!(variables, expected.map(|it| Some(it.to_owned())));
    }

    #[test]
    fn shared_memory_keeps_the_id_of_a_job() {
        let mut job = JobId([0; 16]);
        (job.0[0], job.0[15]) = (0x01, 0xFE);
        let attempt = JobAttempt::new(job.to_string(), 1, 1);
        assert_eq!(attempt.bits(), u128::from_be_bytes(job.0));
        assert_eq!(recorded_job(attempt.bits()), Some(job.to_string()));
        assert_eq!(recorded_job(0), None);
    }
}
