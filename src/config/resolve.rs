//! From the mirror to [`Settings`]: defaults, bounds, paths, the account, and what goes together.
//!
//! Each default and each bound stands here once, in the line that reads its key; methods have a
//! file of their own. It looks up users and looks at paths, and is otherwise a function of its
//! arguments. The first thing wrong is the error.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::LevelFilter;

use super::address::{Address, check_unix_path};
use super::check::{Check, MILLISECOND, command_line};
use super::environment::Environment;
use super::overrides::Overrides;
use super::raw::{Count, Raw, RawLimits, RawLog, RawWorkers};
use super::settings::{
    LimitsConfig, ListenConfig, LogConfig, LogFormat, MethodKind, Settings, WorkersConfig,
};
use super::source_map::SourceMap;
use super::units::{ByteSize, DurationValue};
use super::{exposed, guarded, listeners, methods, pools, program_text, variables};
use crate::error::Result;
use crate::protocol::detect::FRAME_LIMIT_MAX;
use crate::sys::account::{Account, AccountError};

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// Below it a healthy worker, which ticks once a second at the slowest, would count as stuck.
const SHORTEST_HEARTBEAT: Duration = Duration::from_secs(1);
/// Of `max-memory` and `max-lifetime`, where they are set: below it, a worker would do little else
/// than start.
const LEAST_MEMORY: u64 = 1 << 20;
/// What is meant to be more is meant to be no limit.
const MOST_MEMORY: u64 = 1 << 50;
const SHORTEST_LIFETIME: Duration = Duration::from_secs(1);

const OWN_PATH: &str = "give each a path of its own";
/// Told where the workers run as root.
pub(super) const ROOT_WORKERS: &str = "workers run as root, and so does whatever goes wrong in a handler; set \
                                       user to an account without rights";

/// Makes settings of the mirror `raw`, whose keys stand at `places`.
pub(super) fn resolve(
    raw: &Raw,
    places: &SourceMap<'_>,
    overrides: &Overrides,
    here: &Environment,
) -> Result<Settings> {
    let check = Check {
        places,
        overrides,
        here,
    };
    unsupported(&check, raw)?;
    let name = overrides.name();
    let runtime = here.runtime_directories(name).next();
    let runtime = runtime.unwrap_or_else(|| Path::new("/run").join(name));
    let pid_name = format!("{name}.pid");
    let pid_file = check.path_or("pid-file", raw.pid_file.as_deref(), &runtime, &pid_name)?;
    let control_socket = check.path_or(
        "control-socket",
        raw.control_socket.as_deref(),
        &runtime,
        "control.sock",
    )?;
    check_unix_path(&control_socket)
        .map_err(|problem| places.error("control-socket", problem, ""))?;
    let account = account(&check, raw)?;
    let log = log(&check, &raw.log)?;
    let daemon = daemon(&check, raw, &log)?;
    let workers = workers(&check, &raw.workers)?;
    let limits = limits(&check, &raw.limits, &workers)?;
    let listen = listeners::resolve(&check, raw)?;
    let mut warnings = Vec::new();
    if here.uid == 0 && account.is_none() {
        // `check` may run as another user than the server.
        let is_told = |warning: &String| !here.is_check || warning != ROOT_WORKERS;
        warnings.extend(root_warnings(&listen).filter(is_told));
    }
    let ids = account
        .as_ref()
        .map_or((here.uid, here.gid), |account| (account.uid, account.gid));
    let pools = pools::resolve(raw, &check, (&workers, ids), &mut warnings)?;
    let methods = methods::resolve(raw, &check, (&workers, ids), (&limits, &pools))?;
    let command = methods
        .iter()
        .find(|(_, method)| matches!(method.kind, MethodKind::Command(_) | MethodKind::Pool(_)));
    if let Some((name, _)) = command
        && let Some(listen) = listen.iter().find(|listen| listen.address.is_public())
    {
        warnings.push(format!(
            "{} can be reached from other machines, and whoever is there can run the program of \
             {name}; listen on 127.0.0.1 or a unix socket, or be sure of that network",
            listen.address
        ));
    }
    let mut settings = Settings {
        file: places.main().map(Path::to_owned),
        daemon,
        pid_file,
        control_socket,
        account,
        http_origins: http_origins(&check, raw)?,
        methods,
        pools,
        log,
        workers,
        limits,
        listen,
        warnings,
        needs_restart: Vec::new(),
    };
    paths_differ(&check, &settings)?;
    let mut more = guarded::warnings(&settings, here, ids);
    more.extend(exposed::warnings(
        &settings,
        raw,
        places,
        (here.uid, here.gid),
    ));
    more.extend(program_text::warnings(&settings));
    more.extend(variables::warnings(&settings, here));
    settings.warnings.extend(more);
    Ok(settings)
}

/// The origins as browsers write them: an entry that no browser sends would never match.
fn http_origins(check: &Check<'_>, raw: &Raw) -> Result<Vec<String>> {
    let origins = raw.http_origins.clone().unwrap_or_default();
    for (index, origin) in origins.iter().enumerate() {
        let host = origin
            .strip_prefix("http://")
            .or_else(|| origin.strip_prefix("https://"));
        let written = |host: &str| {
            let plain = |byte: u8| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-._:[]".contains(&byte)
            };
            !host.is_empty() && host.bytes().all(plain)
        };
        if !host.is_some_and(written) {
            return Err(check.places.error(
                &format!("http-origins[{index}]"),
                format!("{origin:?} is no origin"),
                "write it as a browser does: scheme, host and port alone, in lower case, such as \
                 \"https://app.example.com\" or \"http://localhost:3000\"",
            ));
        }
    }
    Ok(origins)
}

/// Refuses what this version knows by name only.
fn unsupported(check: &Check<'_>, raw: &Raw) -> Result<()> {
    let workers = &raw.workers;
    if let Some(events) = &workers.events {
        let key = "workers.events";
        if events == "io_uring" {
            return Err(check.places.error(
                key,
                "\"io_uring\" is not supported yet",
                "take \"auto\" or \"epoll\"",
            ));
        }
        // Without it: what is suggested must not be refused at the next attempt.
        check.choice(key, events, &["auto", "epoll"])?;
    }
    Ok(())
}

/// What is told where the workers run as root and accept on `listen`.
pub(super) fn root_warnings(listen: &[ListenConfig]) -> impl Iterator<Item = String> {
    let public = listen.iter().filter(|listen| listen.address.is_public());
    let warnings = public.map(|listen| {
        format!(
            "{} can be reached from other machines and workers run as root; anyone there can \
             call every method; set user, or listen on 127.0.0.1 or a unix socket",
            listen.address
        )
    });
    std::iter::once(ROOT_WORKERS.to_owned()).chain(warnings)
}

/// Whom the workers become, which is nobody new when it is who we are.
fn account(check: &Check<'_>, raw: &Raw) -> Result<Option<Account>> {
    let is_root = check.here.uid == 0;
    let Some(user) = &raw.user else {
        if raw.group.is_some() {
            return Err(check.places.error(
                "group",
                "it is set without a user",
                "set user beside it, or take it out",
            ));
        }
        return Ok(None);
    };
    let account = Account::lookup(user, raw.group.as_deref()).map_err(|error| {
        let (key, remedy) = match error {
            AccountError::NoUser(_) => ("user", "create it, or name one that exists"),
            AccountError::NoGroup(_) => ("group", "create it, or name one that exists"),
            AccountError::GroupUnknown(_) => ("user", "set group beside it"),
            AccountError::System(_) => ("user", ""),
        };
        check.places.error(key, error.to_string(), remedy)
    })?;
    if account.uid == check.here.uid && account.gid == check.here.gid {
        return Ok(None);
    }
    if account.uid == 0 && is_root {
        return Err(check.places.error(
            "group",
            "workers that run as root can't leave its group",
            "set a user that is not root, or take group out",
        ));
    }
    if !is_root {
        let problem = format!(
            "only root can start workers as {}:{}, and this is uid {}, gid {}",
            account.name, account.group, check.here.uid, check.here.gid
        );
        return Err(check.places.error(
            "user",
            problem,
            "start as root, or take user and group out",
        ));
    }
    Ok(Some(account))
}

fn log(check: &Check<'_>, raw: &RawLog) -> Result<LogConfig> {
    let level = match &raw.level {
        None => LevelFilter::Info,
        Some(level) => {
            let levels = ["off", "error", "warn", "info", "debug", "trace"];
            let level = check.choice("log.level", level, &levels)?;
            level
                .parse()
                .expect("each of the listed levels is one of log's")
        }
    };
    let format = match &raw.format {
        None => LogFormat::Text,
        Some(format) => match check.choice("log.format", format, &["text", "json"])? {
            "json" => LogFormat::Json,
            _ => LogFormat::Text,
        },
    };
    let file = match &raw.file {
        None => None,
        Some(text) => Some(log_file(check, text)?),
    };
    Ok(LogConfig {
        level,
        format,
        file,
    })
}

/// The log is created, its directory is not: one that is missing is most likely misspelt.
fn log_file(check: &Check<'_>, text: &str) -> Result<PathBuf> {
    let key = "log.file";
    let path = check.path(key, text)?;
    if path.is_dir() {
        let problem = format!("{} is a directory", path.display());
        return Err(check.places.error(key, problem, "name a file in it"));
    }
    match path.parent() {
        Some(parent) if !parent.is_dir() => Err(check.places.error(
            key,
            format!("there is no directory {}", parent.display()),
            "create it, or log elsewhere",
        )),
        _ => Ok(path),
    }
}

fn daemon(check: &Check<'_>, raw: &Raw, log: &LogConfig) -> Result<bool> {
    let by_file = raw.daemon.unwrap_or(false);
    let daemon = by_file || check.overrides.daemon;
    if daemon && log.file.is_none() {
        let problem = "the log of a daemon goes nowhere without log.file";
        let remedy = "set log.file, or run in the foreground under a service manager";
        return Err(if by_file {
            check.places.error("daemon", problem, remedy)
        } else {
            command_line("--daemon", problem, remedy)
        });
    }
    Ok(daemon)
}

fn workers(check: &Check<'_>, raw: &RawWorkers) -> Result<WorkersConfig> {
    const COUNTS: RangeInclusive<i64> = 1..=1024;
    let count = match raw.count {
        Some(Count::Number(number)) => {
            check.integer("workers.count", Some(number), 1, COUNTS, "or \"auto\"")?
        }
        Some(Count::Auto) | None => check.here.cpus.clamp(1, 1024),
    };
    let timeout = |key, value, least| check.duration(key, value, DEFAULT_TIMEOUT, least);
    Ok(WorkersConfig {
        count,
        threads: check.integer("workers.threads", raw.threads, 8, COUNTS, "")?,
        boot_timeout: timeout("workers.boot-timeout", raw.boot_timeout, MILLISECOND)?,
        drain_timeout: timeout("workers.drain-timeout", raw.drain_timeout, MILLISECOND)?,
        heartbeat_timeout: timeout(
            "workers.heartbeat-timeout",
            raw.heartbeat_timeout,
            SHORTEST_HEARTBEAT,
        )?,
        respawn_burst: check.integer(
            "workers.respawn-burst",
            raw.respawn_burst,
            5,
            0..=1_000_000,
            "",
        )?,
        respawn_max_delay: check
            .respawn_max_delay("workers.respawn-max-delay", raw.respawn_max_delay)?,
        keep_connections: raw.keep_connections.unwrap_or(true),
        max_calls: check.integer("workers.max-calls", raw.max_calls, 0, 0..=1 << 50, "")?,
        max_memory: max_memory(check, raw)?,
        max_lifetime: max_lifetime(check, raw)?,
        max_unavailable: check.integer(
            "workers.max-unavailable",
            raw.max_unavailable,
            1,
            COUNTS,
            "",
        )?,
    })
}

/// Zero is no limit; less than any worker has from its start on would recycle without end.
fn max_memory(check: &Check<'_>, raw: &RawWorkers) -> Result<u64> {
    let ByteSize(bytes) = raw.max_memory.unwrap_or(ByteSize(0));
    if bytes == 0 || (LEAST_MEMORY..=MOST_MEMORY).contains(&bytes) {
        return Ok(bytes);
    }
    Err(check.places.error(
        "workers.max-memory",
        format!("{} is out of range", ByteSize(bytes)),
        format!(
            "give {} to {}, or \"0\" for no limit",
            ByteSize(LEAST_MEMORY),
            ByteSize(MOST_MEMORY)
        ),
    ))
}

/// Zero is no limit.
fn max_lifetime(check: &Check<'_>, raw: &RawWorkers) -> Result<Duration> {
    match raw.max_lifetime {
        Some(DurationValue(time)) if !time.is_zero() => check.duration(
            "workers.max-lifetime",
            raw.max_lifetime,
            Duration::ZERO,
            SHORTEST_LIFETIME,
        ),
        _ => Ok(Duration::ZERO),
    }
}

/// How much of a worker's share of the memory may be unfinished calls: what is whole, what runs and what
/// is answered needs some too.
const UNFINISHED_SHARE: u64 = 4;

/// Bytes of all unfinished calls of a worker: one frame at least. Where nothing is said, whole mebibytes.
fn unfinished(
    check: &Check<'_>,
    set: Option<ByteSize>,
    (frame, workers): (u64, &WorkersConfig),
) -> Result<usize> {
    let bytes = match set {
        Some(ByteSize(bytes)) if bytes < frame => {
            let (problem, remedy) = (
                format!("{} is less than one frame", ByteSize(bytes)),
                format!("give {} (limits.frame) or more", ByteSize(frame)),
            );
            return Err(check.places.error("limits.unfinished", problem, remedy));
        }
        Some(ByteSize(bytes)) => bytes,
        None => {
            let share = check.here.memory / UNFINISHED_SHARE / workers.count as u64;
            ((share >> 20) << 20).max(frame)
        }
    };
    Ok(usize::try_from(bytes).unwrap_or(usize::MAX))
}

fn limits(check: &Check<'_>, raw: &RawLimits, workers: &WorkersConfig) -> Result<LimitsConfig> {
    const COUNTS: RangeInclusive<i64> = 1..=1_000_000;
    let frame = raw.frame.map_or(16 << 20, |ByteSize(bytes)| bytes);
    if !(1 << 10..=FRAME_LIMIT_MAX as u64).contains(&frame) {
        return Err(check.places.error(
            "limits.frame",
            format!("{} is out of range", ByteSize(frame)),
            // Section 3 of the protocol: a longer one could be taken for text.
            "give 1KiB to 128MiB (the length of a longer frame would look like text)",
        ));
    }
    let timeout = |key, value| check.duration(key, value, DEFAULT_TIMEOUT, MILLISECOND);
    Ok(LimitsConfig {
        connections: check.integer(
            "limits.connections",
            raw.connections,
            16_384,
            1..=1 << 20,
            "",
        )?,
        frame: frame as usize,
        unfinished: unfinished(check, raw.unfinished, (frame, workers))?,
        depth: check.integer("limits.depth", raw.depth, 128, 1..=10_000, "")?,
        pipeline: check.integer("limits.pipeline", raw.pipeline, 1024, COUNTS, "")?,
        batch: check.integer("limits.batch", raw.batch, 1000, COUNTS, "")?,
        queue: check.integer("limits.queue", raw.queue, 4096, COUNTS, "")?,
        // Who shortens the drain alone wants shorter calls as well, and need not say so.
        timeout: match raw.timeout {
            None => DEFAULT_TIMEOUT.min(workers.drain_timeout),
            set => timeout("limits.timeout", set)?,
        },
        read_timeout: timeout("limits.read-timeout", raw.read_timeout)?,
        write_timeout: timeout("limits.write-timeout", raw.write_timeout)?,
        idle_timeout: check.duration(
            "limits.idle-timeout",
            raw.idle_timeout,
            Duration::ZERO,
            Duration::ZERO,
        )?,
    })
}

/// The pid file, the sockets and the log must not overwrite each other.
fn paths_differ(check: &Check<'_>, settings: &Settings) -> Result<()> {
    let own = [
        ("pid-file", Some(&settings.pid_file)),
        ("control-socket", Some(&settings.control_socket)),
        ("log.file", settings.log.file.as_ref()),
    ];
    let own = own
        .iter()
        .filter_map(|(key, path)| Some((*key, path.as_ref()?.as_path())));
    let shared =
        |path: &Path, other: &str| format!("{} is the path of {other} too", path.display());
    let sockets = settings.listen.iter().map(|listen| match &listen.address {
        Address::Unix(path) => Some(path.as_path()),
        Address::Tcp(_) => None,
    });
    // The pid file is written, and removed at the end: whoever names the configuration loses it.
    let mut seen: Vec<(&str, &Path)> = settings
        .file
        .iter()
        .map(|file| ("this file", file.as_path()))
        .collect();
    for (key, path) in own {
        if let Some((other, _)) = seen.iter().find(|(_, other)| *other == path) {
            return Err(check.places.error(key, shared(path, other), OWN_PATH));
        }
        seen.push((key, path));
    }
    for (index, path) in sockets.enumerate() {
        if let Some((other, path)) = seen.iter().find(|(_, other)| Some(*other) == path) {
            return Err(listeners::error(
                check,
                index,
                shared(path, other),
                OWN_PATH,
            ));
        }
    }
    Ok(())
}
