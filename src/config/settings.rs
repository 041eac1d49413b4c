//! The validated configuration, which all layers above use.
//!
//! Plain data, with an `Option` only where there is no default. Its users need not check anything. Only
//! `resolve` makes it, `effective` writes it, and `restart` compares two.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::LevelFilter;

use super::keys::Word;

pub use super::address::Address;
pub use super::job_config::{JobRules, JobsConfig};
pub use super::observe::ObserveConfig;
pub use super::program_config::{
    PoolConfig, PoolReload, PoolScope, ProgramConfig, RlimitsConfig, StackSignal,
};
use crate::sys::account::{Account, NamedId};

/// The whole configuration in effect: the file, included files, the command line, defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The absolute path of the main file; `None` if there is none.
    pub file: Option<PathBuf>,
    /// Whether the master leaves the terminal; `log.file` is `Some` then.
    pub daemon: bool,
    /// The pid file, which is locked by the master. Absolute. Its directory may not exist.
    pub pid_file: PathBuf,
    /// The socket for `status`, `reload` and other commands. Absolute. Its directory may not exist.
    pub control_socket: PathBuf,
    /// The account of the workers; `None` if it is that of the master.
    pub account: Option<Account>,
    /// The origins whose web pages may call, each as a browser sends it.
    pub http_origins: Vec<String>,
    pub log: LogConfig,
    pub workers: WorkersConfig,
    /// The limits of a worker.
    pub limits: LimitsConfig,
    pub observe: ObserveConfig,
    /// `None` without `[access-log]`.
    pub access_log: Option<AccessLogConfig>,
    /// `None` without `[slow-log]`.
    pub slow_log: Option<SlowLogConfig>,
    /// Whether trace context is read and passed on (`[trace]`).
    pub trace: bool,
    /// `None` without `[jobs]`.
    pub jobs: Option<JobsConfig>,
    /// The listeners: at least one, no two with the same address.
    pub listen: Vec<ListenConfig>,
    /// The methods by name. `ping` always exists.
    pub methods: BTreeMap<String, MethodConfig>,
    /// The pools by name.
    pub pools: BTreeMap<String, PoolConfig>,
    /// What is valid but may be a mistake: a sentence each, for the log and for `check`.
    pub warnings: Vec<String>,
    /// The keys whose new values need a restart.
    pub needs_restart: Vec<&'static str>,
}

impl Settings {
    /// Returns the file of the access log.
    pub fn access_log_file(&self) -> Option<&Path> {
        self.access_log.as_ref()?.file.as_deref()
    }

    /// Returns the longest drain of a worker or pool process: of its calls, or of its attempts of jobs.
    pub fn longest_drain(&self) -> Duration {
        let jobs = self.jobs.iter();
        let rules = jobs.flat_map(|jobs| [&jobs.defaults].into_iter().chain(jobs.methods.values()));
        let longest = rules.map(|rules| rules.drain_timeout).max();
        self.workers.drain_timeout.max(longest.unwrap_or_default())
    }

    /// Returns the warning about keys that need a restart, if there are any.
    pub fn restart_warning(&self) -> Option<String> {
        let keys = self.needs_restart.join(", ");
        (!keys.is_empty()).then(|| {
            format!(
                "{keys} cannot change while the master runs; restart the server to apply the change"
            )
        })
    }
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// The least severe level that is written, unless `RUST_LOG` is set.
    pub level: LevelFilter,
    pub format: LogFormat,
    /// The absolute path of the file; `None` for standard error.
    pub file: Option<PathBuf>,
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Plain text, with journald's priorities under systemd.
    Text,
    /// One JSON object for each line.
    Json,
}

impl Word for LogFormat {
    const WORDS: &'static [(&'static str, Self)] =
        &[("text", LogFormat::Text), ("json", LogFormat::Json)];
}

/// `[access-log]`.
#[derive(Debug, Clone, PartialEq)]
pub struct AccessLogConfig {
    /// The absolute path of the file; `None`: the log.
    pub file: Option<PathBuf>,
    /// The format of the file.
    pub format: LogFormat,
    /// The share of the calls that have a line, 0 to 1.
    pub sample: f64,
    /// Calls that take longer always have one; zero: there is no such rule.
    pub always_above: Duration,
    /// The methods whose calls may have a line; empty: all.
    pub methods: Vec<String>,
}

/// `[slow-log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlowLogConfig {
    /// The run time from which on a call is slow, at least 1 ms; zero: only methods with a threshold of their
    /// own.
    pub threshold: Duration,
    /// The bytes of params in a record, 0 to 4096.
    pub params: usize,
    /// The records per second and worker, 1 to 10,000.
    pub lines: usize,
}

/// `[workers]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkersConfig {
    /// The number of workers, 1 to 1024. `"auto"` is resolved to the number of CPUs.
    pub count: usize,
    /// The number of handler threads of each worker, 1 to 1024.
    pub threads: usize,
    /// The longest time from a worker's fork until it is ready; at least 1 ms.
    pub boot_timeout: Duration,
    /// The longest time of a drain; at least 1 ms, and not shorter than any method's timeout.
    pub drain_timeout: Duration,
    /// The greatest age of a worker's last heartbeat; at least 1 s.
    pub heartbeat_timeout: Duration,
    /// Young deaths of a slot that are replaced at once; 0 delays from the first.
    pub respawn_burst: u32,
    /// The longest delay of a respawn; zero means no throttle, otherwise at least 100 ms.
    pub respawn_max_delay: Duration,
    /// Whether a worker's other connections survive its crash.
    pub keep_connections: bool,
    /// Calls after which a worker is recycled; 0 means never.
    pub max_calls: u64,
    /// Resident memory above which a worker is recycled, in bytes, at least 1 MiB; 0 means never.
    pub max_memory: u64,
    /// The age at which a worker is recycled, at least 1 s; zero means never.
    pub max_lifetime: Duration,
    /// The largest number of workers that are recycled at one time, 1 to 1024.
    pub max_unavailable: usize,
}

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitsConfig {
    /// The largest number of connections of a worker at one time, 1 to 1,048,576.
    pub connections: usize,
    /// The largest number of bytes of a frame's body, 1 KiB to 128 MiB.
    pub frame: usize,
    /// The largest number of bytes of all unfinished frames, lines and requests of a worker; at least one frame.
    pub unfinished: usize,
    /// The deepest nesting of a JSON document, 1 to 10,000.
    pub depth: usize,
    /// Unanswered calls of a connection after which reading stops, 1 to 1,000,000.
    pub pipeline: usize,
    /// The largest number of calls in a JSON-RPC batch, 1 to 1,000,000.
    pub batch: usize,
    /// The largest number of calls that wait for a thread in a worker, 1 to 1,000,000.
    pub queue: usize,
    /// The timeout of methods that set none; at least 1 ms.
    pub timeout: Duration,
    /// The longest time to receive a frame that has begun; at least 1 ms.
    pub read_timeout: Duration,
    /// The longest time in which a client may read nothing; at least 1 ms.
    pub write_timeout: Duration,
    /// The longest time in which a connection may be idle; zero means no limit.
    pub idle_timeout: Duration,
}

/// The keys of a method with `command`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandConfig {
    pub program: ProgramConfig,
    pub stdin: Stdin,
    /// How its standard output is read.
    pub output: OutputFormat,
    /// The largest number of bytes of its standard output, 1 to 128 MiB.
    pub max_output: usize,
}

impl Settings {
    /// Returns the programs of all commands and pools, each with its table and name.
    pub(super) fn programs(&self) -> impl Iterator<Item = (&'static str, &String, &ProgramConfig)> {
        let commands = self
            .methods
            .iter()
            .filter_map(|(name, method)| match &method.kind {
                MethodKind::Command(command) => Some(("methods", name, &command.program)),
                _ => None,
            });
        let pools = self.pools.iter();
        commands.chain(pools.map(|(name, pool)| ("pools", name, &pool.program)))
    }

    /// Returns the listeners with a process for each connection, with their indices in `listen`. The
    /// position in this list is the number of the acceptor.
    pub fn isolated(&self) -> impl Iterator<Item = (usize, &IsolationConfig)> {
        let listen = self.listen.iter().enumerate();
        listen.filter_map(|(index, listen)| Some((index, listen.isolation.as_ref()?)))
    }

    /// Returns the names of the pools that a method uses: first those of the server, then those of connections.
    /// Other pools are not started.
    pub fn used_pools(&self) -> Vec<&String> {
        let is_used = |name: &&String| {
            let mut methods = self.methods.values();
            methods.any(|method| matches!(&method.kind, MethodKind::Pool(pool) if pool == *name))
        };
        let mut used: Vec<&String> = self.pools.keys().filter(is_used).collect();
        used.sort_by_key(|name| self.is_of_connections(name));
        used
    }

    /// Returns how many used pools belong to the server. Each of them has a pool process.
    pub fn pool_processes(&self) -> usize {
        let used = self.used_pools().into_iter();
        used.filter(|name| !self.is_of_connections(name)).count()
    }

    fn is_of_connections(&self, pool: &str) -> bool {
        let pool = self.pools.get(pool);
        pool.is_some_and(|pool| pool.scope == PoolScope::Connection)
    }
}

/// What a command reads from its standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdin {
    /// The params as JSON.
    Params,
    /// The params without quotes and escapes. They must be a string.
    Text,
    /// Nothing.
    None,
}

impl Word for Stdin {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("params", Stdin::Params),
        ("text", Stdin::Text),
        ("none", Stdin::None),
    ];
}

/// How a command's standard output is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputFormat {
    /// As text: the result is a string.
    Text,
    /// As text without the newline at its end.
    Line,
    /// As one JSON value, which is the result.
    Json,
}

impl Word for OutputFormat {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("text", OutputFormat::Text),
        ("line", OutputFormat::Line),
        ("json", OutputFormat::Json),
    ];
}

/// One `[[listen]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenConfig {
    /// The address. A unix path is absolute and at most 107 bytes long.
    pub address: Address,
    /// The name of the service manager's socket that replaces it, if one is passed (FileDescriptorName= of
    /// systemd.socket(5)).
    pub name: Option<String>,
    /// The largest number of connections that wait for accept(2), 1 to 2,147,483,647. The kernel's limit is
    /// net.core.somaxconn.
    pub backlog: u32,
    /// The permission bits of a unix socket, 0 to 0o777; `None` for those of the umask.
    pub mode: Option<u32>,
    /// The owner of a unix socket; `None` for the workers' user.
    pub socket_user: Option<NamedId>,
    /// The group of a unix socket; `None` for the workers' group.
    pub socket_group: Option<NamedId>,
    /// Where an HTTP request may name its method.
    pub http_methods: HttpMethods,
    /// Connections of one source at one time, up to 1,000,000; 0 is no limit.
    pub per_source: usize,
    /// `Some` if each connection has a process; `None` if the workers accept.
    pub isolation: Option<IsolationConfig>,
}

/// The keys of a `[[listen]]` with `isolation = "connection"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IsolationConfig {
    /// The largest number of connections at one time in all generations together, 1 to 3,072.
    pub processes: usize,
    /// The number of processes that are forked ahead, 0 to `processes`, at most 256.
    pub spare: usize,
    /// The age at which a session is ended, at least 1 s; zero means never.
    pub max_lifetime: Duration,
    /// The account of acceptor and sessions; `None` for that of the workers.
    pub account: Option<Account>,
    /// The largest number of bytes of unfinished frames, lines and requests of one session.
    pub unfinished: usize,
}

/// Where an HTTP request may name its method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpMethods {
    /// In its path, or in a call in its body.
    Any,
    /// Only in its path, so that a proxy sees it.
    Path,
}

impl Word for HttpMethods {
    const WORDS: &'static [(&'static str, Self)] =
        &[("any", HttpMethods::Any), ("path", HttpMethods::Path)];
}

/// One `[methods.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MethodConfig {
    /// Its handler.
    pub kind: MethodKind,
    /// The longest time of a call, 1 ms to `workers.drain_timeout`.
    pub timeout: Duration,
    /// The largest number of calls at once in a worker; 0 means no limit except the threads.
    pub concurrency: usize,
    /// The largest number of calls per second in a worker; 0 means no limit.
    pub rate: u32,
    /// The run time from which on a call is slow, at least 1 ms; `None`: that of `[slow-log]`.
    pub slow: Option<Duration>,
    /// Whether the program of a pool is killed as soon as its call is abandoned. If not, it may finish the
    /// call within `timeout`.
    pub kills_abandoned: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MethodKind {
    /// A program; one process for each call.
    Command(Box<CommandConfig>),
    /// The programs of the pool with this name.
    Pool(String),
    /// A handler of the server.
    Builtin(Builtin),
    /// A handler that the program has registered under this name.
    Function,
}

/// The handlers of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Builtin {
    /// Returns `pong` and the params.
    Ping,
    /// Returns the params.
    Echo,
    /// Waits for the number of seconds in the params.
    Sleep,
}

impl Word for Builtin {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("ping", Builtin::Ping),
        ("echo", Builtin::Echo),
        ("sleep", Builtin::Sleep),
    ];
}
