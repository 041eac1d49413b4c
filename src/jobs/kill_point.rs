//! Kills the jobs process at a chosen point, so that tests can look at what remains.
//!
//! The variable `PREFORKD_KILL_POINT` is `POINT:FILE`. The process that reaches the point and can remove the file kills
//! itself with SIGKILL. So a test creates the file when the kill is to happen, and the next process continues. Only
//! builds with debug assertions have this. In other builds the function is empty, and the variable has no effect.

#[cfg(debug_assertions)]
use std::{env, fs};

#[cfg(debug_assertions)]
use nix::sys::signal::Signal;

#[cfg(debug_assertions)]
use crate::sys::process::{self, Pid};

/// A point at which the jobs process can be killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KillPoint {
    /// All requests of a group were executed, and their transaction is not committed.
    BeforeCommit,
    /// A group is committed, and no process outside this one knows it.
    AfterCommit,
    /// Jobs were claimed, and no executor has got them.
    AfterClaim,
    /// The outcome of an attempt is stored, and its executor does not know it.
    BeforeAcknowledgement,
}

#[cfg(debug_assertions)]
impl KillPoint {
    /// Returns the name in the variable.
    const fn name(self) -> &'static str {
        match self {
            KillPoint::BeforeCommit => "before-commit",
            KillPoint::AfterCommit => "after-commit",
            KillPoint::AfterClaim => "after-claim",
            KillPoint::BeforeAcknowledgement => "before-acknowledgement",
        }
    }

    /// Returns the file that orders a kill at this point. `order` is the value of the variable.
    fn file(self, order: &str) -> Option<&str> {
        let (name, file) = order.split_once(':')?;
        (name == self.name()).then_some(file)
    }
}

/// Kills this process if it is ordered to die here.
#[cfg(debug_assertions)]
pub fn reached(point: KillPoint) {
    let order = env::var("PREFORKD_KILL_POINT").unwrap_or_default();
    // Removing the file decides which process dies, and that only one does.
    if let Some(file) = point.file(&order)
        && fs::remove_file(file).is_ok()
    {
        process::kill(Pid::current(), Signal::SIGKILL);
    }
}

/// Does nothing.
#[cfg(not(debug_assertions))]
pub const fn reached(_: KillPoint) {}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::*;

    #[test]
    fn an_order_names_one_point_and_a_file() {
        let order = "after-claim:/tmp/a:b";
        assert_eq!(KillPoint::AfterClaim.file(order), Some("/tmp/a:b"));
        assert_eq!(KillPoint::AfterCommit.file(order), None);
        assert_eq!(KillPoint::AfterClaim.file("after-claim"), None);
        assert_eq!(KillPoint::AfterClaim.file(""), None);
        for point in [
            KillPoint::BeforeCommit,
            KillPoint::AfterCommit,
            KillPoint::AfterClaim,
            KillPoint::BeforeAcknowledgement,
        ] {
            reached(point);
        }
    }
}
