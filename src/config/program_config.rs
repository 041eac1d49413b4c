//! The validated tables of programs that are started for calls, and of pools. Plain data: `programs` and `pools`
//! are the only makers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use log::Level;
use serde::{Deserialize, Serialize};

use super::keys::Word;
use crate::sys::account::Account;

/// A program that is started for calls, and what surrounds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramConfig {
    pub file: PathBuf,
    /// The arguments, the program's name first. They are as written, except that a relative path of the program is
    /// made absolute.
    pub arguments: Vec<String>,
    /// `environment` as written: a value may refer to a variable of the server.
    pub environment: BTreeMap<String, String>,
    /// `environment-file`, absolute.
    pub environment_file: Option<PathBuf>,
    /// Its environment, beside `PREFORKD_CALL`. Values of it are secret, so nothing prints them.
    pub variables: BTreeMap<String, String>,
    /// Its working directory, absolute.
    pub directory: PathBuf,
    /// Whom it runs as; `None`: as the workers do.
    pub account: Option<Account>,
    /// Its resource limits.
    pub rlimits: RlimitsConfig,
    /// Whether it is kept from the memory of processes that it did not start, and from setuid files.
    pub guard: bool,
}

/// Resource limits of a program (getrlimit(2)); `None` leaves those of the workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RlimitsConfig {
    /// CPU time; whole seconds, 1 s at least.
    pub cpu: Option<Duration>,
    /// Bytes of address space, 1 MiB at least.
    pub memory: Option<u64>,
    /// Open descriptors, 3 to 1,048,576.
    pub files: Option<u64>,
    /// Processes of its user, 1 to 4,194,304.
    pub processes: Option<u64>,
}

/// One `[pools.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolConfig {
    /// What is run.
    pub program: ProgramConfig,
    /// Who shares its programs.
    #[serde(default)]
    pub scope: PoolScope,
    /// Programs of the server, 1 to 1024; of each connection, 1.
    pub processes: usize,
    /// Calls at once in one program, 1 to 65,536. Above 1 calls carry an id.
    pub concurrency: usize,
    /// Whether a program is killed when its call is abandoned, for methods that do not set `when-abandoned`.
    pub kills_abandoned: bool,
    /// Whether a program sends a message when it is ready. Otherwise it counts as ready when it has been alive for 50
    /// ms.
    pub handshake: bool,
    /// What a reload does to its programs.
    pub reload: PoolReload,
    /// How long a program may take to become ready; 1 ms to `workers.boot_timeout`.
    pub boot_timeout: Duration,
    /// How long it may have nothing to do before it is ended; zero is for ever.
    pub idle_timeout: Duration,
    /// Calls after which it is replaced; 0 is never.
    pub max_calls: u64,
    /// Bytes of resident memory above which it is replaced; 0 is never.
    pub max_memory: u64,
    /// The age at which it is replaced; zero is never.
    pub max_lifetime: Duration,
    /// Whether `/healthz` answers 503 when no program has been ready for `boot_timeout`.
    #[serde(default)]
    pub health: bool,
    /// Young deaths that are followed by a start at once; 0 delays from the first.
    pub respawn_burst: u32,
    /// Where the doubling delay ends; zero means no throttle, else at least 100 ms.
    pub respawn_max_delay: Duration,
    /// The level of its standard error in the log.
    #[serde(with = "level_name")]
    pub stderr_level: Level,
    /// The signal that a program gets when its call is slow.
    #[serde(default)]
    pub stack_signal: Option<StackSignal>,
}

/// A signal for the programs of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StackSignal {
    Usr1,
    Usr2,
}

impl Word for StackSignal {
    const WORDS: &'static [(&'static str, Self)] =
        &[("USR1", StackSignal::Usr1), ("USR2", StackSignal::Usr2)];
}

impl StackSignal {
    /// The name of the signal, as in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            StackSignal::Usr1 => "USR1",
            StackSignal::Usr2 => "USR2",
        }
    }
}

impl PoolConfig {
    /// Returns for how many milliseconds the pool may have no ready program before `/healthz` answers 503;
    /// `None` if it does not matter to `/healthz`.
    pub fn health_limit_ms(&self) -> Option<u64> {
        let limit = u64::try_from(self.boot_timeout.as_millis()).unwrap_or(u64::MAX);
        self.health.then_some(limit)
    }
}

/// Who shares the programs of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PoolScope {
    /// All workers and sessions.
    #[default]
    Shared,
    /// None: each connection of an isolated listener has a program of its own.
    Connection,
}

impl Word for PoolScope {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("shared", PoolScope::Shared),
        ("connection", PoolScope::Connection),
    ];
}

/// What a reload does to the programs of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PoolReload {
    /// The next generation has a pool process of its own, with programs of its own.
    Replace,
    /// The pool process stays, and its programs are replaced one by one.
    Rolling,
    /// The pool process and its programs stay if the table of the pool has not changed.
    Keep,
}

impl Word for PoolReload {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("replace", PoolReload::Replace),
        ("rolling", PoolReload::Rolling),
        ("keep", PoolReload::Keep),
    ];
}

/// A level of the log as its name.
mod level_name {
    use log::Level;
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(level: &Level, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(level.as_str())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Level, D::Error> {
        String::deserialize(from)?
            .parse()
            .map_err(de::Error::custom)
    }
}
