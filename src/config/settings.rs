//! The validated configuration: what every layer above works with.
//!
//! Plain data without an `Option` where a default exists; whoever holds it need check nothing.
//! `resolve` is the only maker, `effective` writes it out again, `diff` compares two.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use log::{Level, LevelFilter};

pub use super::address::Address;
use crate::sys::account::{Account, NamedId};

/// The whole configuration in effect: the file, what it includes, the command line, the defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The absolute path of the main file; `None` when there was none to read.
    pub file: Option<PathBuf>,
    /// Whether the master leaves the terminal; `log.file` is `Some` then.
    pub daemon: bool,
    /// Where the master's pid stands and its lock is held. Absolute; its directory may be missing.
    pub pid_file: PathBuf,
    /// The socket of `status`, `reload` and the like. Absolute; its directory may be missing.
    pub control_socket: PathBuf,
    /// Whom the workers become. `None`: they stay who the master is, because none was asked for,
    /// or because the one asked for is who the master is.
    pub account: Option<Account>,
    /// The origins whose web pages may call, each as a browser sends it.
    pub http_origins: Vec<String>,
    pub log: LogConfig,
    pub workers: WorkersConfig,
    /// What a worker takes at most.
    pub limits: LimitsConfig,
    /// The listeners, at least one, no two at the same address.
    pub listen: Vec<ListenConfig>,
    /// The methods by name; `ping` is always there.
    pub methods: BTreeMap<String, MethodConfig>,
    /// The pools by name; each method that names one names one of these.
    pub pools: BTreeMap<String, PoolConfig>,
    /// What is allowed and yet worth a word, a sentence each, for the log and for `check`.
    pub warnings: Vec<String>,
    /// The keys whose new values a reload could not bring into effect.
    pub needs_restart: Vec<&'static str>,
}

impl Settings {
    /// What is told of the keys that wait for a restart, if there are any.
    pub fn restart_warning(&self) -> Option<String> {
        let keys = self.needs_restart.join(", ");
        (!keys.is_empty())
            .then(|| format!("{keys} can't change while the master runs: restart it for that"))
    }
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// The least severe level that is written, unless `RUST_LOG` says otherwise.
    pub level: LevelFilter,
    /// How a line looks.
    pub format: LogFormat,
    /// The absolute path of the file; `None` is stderr.
    pub file: Option<PathBuf>,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people, with journald's priorities under systemd.
    Text,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    pub fn name(self) -> &'static str {
        match self {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        }
    }
}

/// `[workers]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkersConfig {
    /// How many, 1 to 1024; `"auto"` has become the number of CPUs.
    pub count: usize,
    /// Handler threads of each, 1 to 1024.
    pub threads: usize,
    /// How long a worker may take until it is ready; at least 1 ms.
    pub boot_timeout: Duration,
    /// How long a worker that drains may take; at least 1 ms, and no shorter than any method's
    /// timeout.
    pub drain_timeout: Duration,
    /// How old a worker's last tick may be before it counts as stuck; at least 1 s.
    pub heartbeat_timeout: Duration,
    /// Young deaths of a slot that are replaced at once; 0 delays from the first.
    pub respawn_burst: u32,
    /// Where the doubling delay ends; zero means no throttle, else at least 100 ms.
    pub respawn_max_delay: Duration,
    /// Whether a crash of a worker spares its other connections.
    pub keep_connections: bool,
    /// Calls after which a worker is recycled; 0 is never.
    pub max_calls: u64,
    /// Bytes of resident memory above which a worker is recycled, 1 MiB at least; 0 is never.
    pub max_memory: u64,
    /// The age at which a worker is recycled, 1 s at least; zero is never.
    pub max_lifetime: Duration,
    /// How many workers may be recycled at one time, 1 to 1024.
    pub max_unavailable: usize,
}

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitsConfig {
    /// Connections of a worker at one time, 1 to 1,048,576.
    pub connections: usize,
    /// Bytes of a frame's body, 1 KiB to 128 MiB.
    pub frame: usize,
    /// Bytes of all unfinished frames, lines and requests of a worker, one frame's at least.
    pub unfinished: usize,
    /// Nesting of a JSON document, 1 to 10,000.
    pub depth: usize,
    /// Unanswered calls of a connection before reading stops, 1 to 1,000,000.
    pub pipeline: usize,
    /// Calls in a JSON-RPC batch, 1 to 1,000,000.
    pub batch: usize,
    /// Calls that wait for a thread, per worker, 1 to 1,000,000.
    pub queue: usize,
    /// The time of a call whose method sets none; at least 1 ms.
    pub timeout: Duration,
    /// How long a started frame may take until it is whole; at least 1 ms.
    pub read_timeout: Duration,
    /// How long a reader may take nothing; at least 1 ms.
    pub write_timeout: Duration,
    /// How long a connection may be idle; zero is for ever.
    pub idle_timeout: Duration,
}

/// A program that is started for calls, and what surrounds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramConfig {
    pub file: PathBuf,
    /// Its arguments, its own name first: as written, but for a relative path of the program.
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

/// The keys of a method with `command`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandConfig {
    /// What is run.
    pub program: ProgramConfig,
    /// What it reads from its standard input.
    pub stdin: Stdin,
    /// What its standard output is taken for.
    pub output: OutputFormat,
    /// Bytes that it may write there, 1 to 128 MiB.
    pub max_output: usize,
}

impl Settings {
    /// The names of the pools that a method uses, in their order. The others are not started.
    pub fn used_pools(&self) -> Vec<&String> {
        let is_used = |name: &&String| {
            let mut methods = self.methods.values();
            methods.any(|method| matches!(&method.kind, MethodKind::Pool(pool) if pool == *name))
        };
        self.pools.keys().filter(is_used).collect()
    }
}

/// One `[pools.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// What is run.
    pub program: ProgramConfig,
    /// Programs of the server, 1 to 1024.
    pub processes: usize,
    /// Calls at once in one program, 1 to 65,536. Above 1 calls carry an id.
    pub concurrency: usize,
    /// What its methods have if they do not say it.
    pub kills_abandoned: bool,
    /// Whether it says when it is ready; else it is when it has been alive for 50 ms.
    pub handshake: bool,
    /// How long it may take to say so; 1 ms to `workers.boot_timeout`.
    pub boot_timeout: Duration,
    /// How long it may have nothing to do before it is ended; zero is for ever.
    pub idle_timeout: Duration,
    /// Calls after which it is replaced; 0 is never.
    pub max_calls: u64,
    /// Bytes of resident memory above which it is replaced; 0 is never.
    pub max_memory: u64,
    /// The age at which it is replaced; zero is never.
    pub max_lifetime: Duration,
    /// Young deaths that are followed by a start at once; 0 delays from the first.
    pub respawn_burst: u32,
    /// Where the doubling delay ends; zero means no throttle, else at least 100 ms.
    pub respawn_max_delay: Duration,
    /// The level of its standard error in the log.
    pub stderr_level: Level,
}

/// What a command reads from its standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdin {
    /// The params as JSON.
    Params,
    /// The params, which must be a string, without quotes and escapes.
    Text,
    /// Nothing.
    None,
}

impl Stdin {
    pub fn name(self) -> &'static str {
        match self {
            Stdin::Params => "params",
            Stdin::Text => "text",
            Stdin::None => "none",
        }
    }
}

/// What a command's standard output is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputFormat {
    /// Text: the result is a string.
    Text,
    /// The same without the newline at its end.
    Line,
    /// One JSON value: it is the result.
    Json,
}

impl OutputFormat {
    pub fn name(self) -> &'static str {
        match self {
            OutputFormat::Text => "text",
            OutputFormat::Line => "line",
            OutputFormat::Json => "json",
        }
    }
}

/// Resource limits of a program (getrlimit(2)); `None` leaves those of the workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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

/// One `[[listen]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenConfig {
    /// Where; a unix path is absolute and at most 107 bytes long.
    pub address: Address,
    /// The name of the service manager's socket that takes its place, where one of that name is
    /// passed (FileDescriptorName= of systemd.socket(5)).
    pub name: Option<String>,
    /// Connections that may wait for accept(2), 1 to 2,147,483,647; the kernel caps it at
    /// net.core.somaxconn.
    pub backlog: u32,
    /// The permission bits of a unix socket, 0 to 0o777; `None` leaves them to the umask.
    pub mode: Option<u32>,
    /// The owner of a unix socket; `None`: the workers' user.
    pub socket_user: Option<NamedId>,
    /// The group of a unix socket; `None`: the workers' group.
    pub socket_group: Option<NamedId>,
    /// Where an HTTP request may name its method.
    pub http_methods: HttpMethods,
}

/// Where an HTTP request may name its method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpMethods {
    /// In its path or in a call in its body.
    Any,
    /// In its path, so that a proxy sees it.
    Path,
}

/// One `[methods.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MethodConfig {
    /// What answers it.
    pub kind: MethodKind,
    /// The time of a call, 1 ms to `workers.drain_timeout`.
    pub timeout: Duration,
    /// Calls at once per worker; 0 is no limit but the threads.
    pub concurrency: usize,
    /// Calls a second per worker; 0 is no limit.
    pub rate: u32,
    /// Whether the program of a pool is killed as soon as its call is abandoned. If not, it may finish the call
    /// within `timeout`.
    pub kills_abandoned: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MethodKind {
    /// A program, one process for each call.
    Command(Box<CommandConfig>),
    /// The programs of the pool of this name.
    Pool(String),
    /// A handler of the server's own.
    Builtin(Builtin),
    /// A handler that the program registered under this name.
    Function,
}

/// The handlers that the server brings along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Builtin {
    /// Answers `pong` and the params.
    Ping,
    /// Answers the params.
    Echo,
    /// Waits for as many seconds as the params say.
    Sleep,
}

impl Builtin {
    pub fn name(self) -> &'static str {
        match self {
            Builtin::Ping => "ping",
            Builtin::Echo => "echo",
            Builtin::Sleep => "sleep",
        }
    }
}
