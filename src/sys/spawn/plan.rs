//! Describes a child process before it is started, and the step at which a start failed.

use std::ffi::CString;
use std::fmt;

use nix::errno::Errno;

use crate::sys::account::Account;

/// What all children of one kind have in common.
#[derive(Debug, Clone)]
pub struct SpawnTemplate {
    /// The program; absolute, for no search path is asked.
    pub program: CString,
    pub directory: CString,
    /// Whom the child becomes, if anybody else.
    pub account: Option<Account>,
    pub limits: ProcessLimits,
    /// Whether it is guarded (see `guard`), where the kernel can do that.
    pub guard: bool,
}

/// Resource limits (getrlimit(2)); `None` leaves ours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProcessLimits {
    /// Seconds of CPU time: then SIGXCPU, and SIGKILL one second later.
    pub cpu_seconds: Option<u64>,
    /// Bytes of address space.
    pub memory: Option<u64>,
    /// Open descriptors.
    pub files: Option<u64>,
    /// Processes of the child's user, threads counted.
    pub processes: Option<u64>,
}

/// What a child could not do, which is why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpawnStep {
    Create,
    Session,
    Descriptors,
    Limits,
    /// Become its user.
    Account,
    Guard,
    Directory,
    /// Become its program.
    Execute,
}

/// Why there is no child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpawnError {
    /// What failed.
    pub step: SpawnStep,
    pub errno: Errno,
}

impl SpawnError {
    /// Whether the system just has nothing to give for now.
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
            SpawnStep::Session => "it could not lead a session",
            SpawnStep::Descriptors => "it could not take its descriptors",
            SpawnStep::Limits => "it could not take its limits",
            SpawnStep::Account => "it could not become its user",
            SpawnStep::Guard => "it could not enter its guard",
            SpawnStep::Directory => "it could not enter its directory",
            SpawnStep::Execute => "the program could not be executed",
        };
        write!(f, "{step}: {}", self.errno.desc())
    }
}

impl std::error::Error for SpawnError {}
