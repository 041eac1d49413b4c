//! Describes a child process before it is started, and the step at which a start failed.

use std::ffi::CString;
use std::fmt;

use nix::errno::Errno;

use crate::sys::account::Account;

/// The settings that all children of one kind share.
#[derive(Debug, Clone)]
pub struct SpawnTemplate {
    /// The absolute path of the program; no search path is used.
    pub program: CString,
    pub directory: CString,
    /// The user of the child, if it differs from ours.
    pub account: Option<Account>,
    pub limits: ProcessLimits,
    /// Whether the child is guarded (see `guard`), if the kernel supports it.
    pub guard: bool,
}

/// Resource limits (getrlimit(2)); `None` keeps the inherited one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProcessLimits {
    /// Seconds of CPU time. Then comes SIGXCPU, and SIGKILL one second later.
    pub cpu_seconds: Option<u64>,
    /// Bytes of address space.
    pub memory: Option<u64>,
    /// Open descriptors.
    pub files: Option<u64>,
    /// Processes of the child's user, including threads.
    pub processes: Option<u64>,
}

/// The step of a start that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpawnStep {
    Create,
    Session,
    Descriptors,
    Limits,
    Account,
    Guard,
    Directory,
    Execute,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpawnError {
    pub step: SpawnStep,
    pub errno: Errno,
}

impl SpawnError {
    /// Returns whether the failure is a temporary lack of resources.
    pub fn is_temporary(&self) -> bool {
        matches!(
            self.errno,
            Errno::EAGAIN | Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE
        )
    }
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = match self.step {
            SpawnStep::Create => "no process could be created",
            SpawnStep::Session => "it could not create a session",
            SpawnStep::Descriptors => "its descriptors could not be set up",
            SpawnStep::Limits => "its limits could not be set",
            SpawnStep::Account => "it could not become its user",
            SpawnStep::Guard => "its guard could not be set up",
            SpawnStep::Directory => "it could not enter its directory",
            SpawnStep::Execute => "the program could not be executed",
        };
        write!(f, "{step}: {}", self.errno.desc())
    }
}

impl std::error::Error for SpawnError {}
