//! Defines the methods `rpc.job.*`, which the jobs process answers.
//!
//! Their calls are those of one more lane, behind the lanes of all pools. A worker sends them to the jobs process. On
//! the link they have fixed numbers, because the two processes may be of different generations.

use std::sync::Arc;

use super::{Context, Handler, Placement};
use crate::protocol::call;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;

/// A method of durable jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobMethod {
    Enqueue,
    Get,
    Wait,
    Cancel,
}

impl JobMethod {
    /// All of them, in the order of their numbers.
    pub const ALL: [JobMethod; 4] = [
        JobMethod::Enqueue,
        JobMethod::Get,
        JobMethod::Wait,
        JobMethod::Cancel,
    ];

    /// Returns the name.
    pub const fn name(self) -> &'static str {
        match self {
            JobMethod::Enqueue => call::JOB_ENQUEUE,
            JobMethod::Get => call::JOB_GET,
            JobMethod::Wait => call::JOB_WAIT,
            JobMethod::Cancel => call::JOB_CANCEL,
        }
    }

    /// Returns what the method does, for `rpc.discover`.
    pub const fn summary(self) -> &'static str {
        match self {
            JobMethod::Enqueue => "Stores a call, or an array of calls, and runs it later",
            JobMethod::Get => "Answers the record of the job with the id in params, {\"job\": ID}",
            JobMethod::Wait => "Answers the record of a job when it has ended, or after timeout_ms",
            JobMethod::Cancel => "Cancels the job with the id in params, {\"job\": ID}",
        }
    }

    /// Returns the number in a call frame. No method of a generation has it.
    pub const fn frame_number(self) -> u32 {
        u32::MAX - self as u32
    }

    /// Returns the method with this number in a call frame.
    pub fn from_frame(number: u32) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|method| method.frame_number() == number)
    }
}

/// Stands for the jobs process in the table of methods.
struct JobsProcess {
    /// The number of pools: the number of the lane, minus one.
    pools: usize,
}

impl Handler for JobsProcess {
    fn call(&self, _: &str, _: &Context<'_>, _: &mut Vec<u8>) -> Result<(), RpcError> {
        let text = "the calls of this method run in the jobs process";
        Err(RpcError::of(Code::Internal, text, false))
    }

    fn placement(&self) -> Placement {
        Placement::Pool(self.pools)
    }
}

/// Returns the handler of all four methods, behind those of `pools` pools.
pub fn handler(pools: usize) -> Arc<dyn Handler> {
    Arc::new(JobsProcess { pools })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_on_the_link_gives_its_method() {
        for (place, method) in JobMethod::ALL.into_iter().enumerate() {
            assert_eq!(method as usize, place);
            assert_eq!(JobMethod::from_frame(method.frame_number()), Some(method));
        }
        assert_eq!(JobMethod::from_frame(0), None);
        assert_eq!(JobMethod::from_frame(u32::MAX - 4), None);
    }
}
