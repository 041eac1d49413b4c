//! Makes [`Settings`] of the file: defaults, bounds, paths, the account, and rules for several keys.
//!
//! Most defaults and bounds are in the types of the keys (`keys`). Methods have a file of their own. It looks up users
//! and reads paths, and is otherwise a function of its arguments. The first error is returned.

use std::path::Path;
use std::time::Duration;

use log::LevelFilter;

use super::address::{Address, check_unix_path};
use super::check::{Check, KeyValue, MILLISECOND, command_line};
use super::environment::Environment;
use super::overrides::Overrides;
use super::raw::{Count, Raw, RawLimits, RawLog, RawWorkers};
use super::settings::{
    JobsConfig, LimitsConfig, ListenConfig, LogConfig, LogFormat, MethodKind, Settings,
    WorkersConfig,
};
use super::source_map::SourceMap;
use super::units::ByteSize;
use super::{
    access_log, exposed, guarded, jobs, listeners, methods, missing, observe, pools, program_text,
};
use crate::error::Result;
use crate::protocol::detect::FRAME_LIMIT_MAX;
use crate::sys::account::Account;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
const OWN_PATH: &str = "give each a path of its own";
/// A warning, if the workers run as root.
pub(super) const ROOT_WORKERS: &str = "workers run as root, so a fault in a handler has the rights of root; set \
                                       user to an account without rights";

/// Makes settings of `raw`, whose keys have their positions in `places`.
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
    let pools = pools::resolve(raw, &check, (&workers, ids), &listen, &mut warnings)?;
    let mut methods = methods::resolve(raw, &check, (&workers, ids), (&limits, &pools))?;
    let command = methods
        .iter()
        .find(|(_, method)| matches!(method.kind, MethodKind::Command(_) | MethodKind::Pool(_)));
    if let Some((name, _)) = command
        && let Some(listen) = listen.iter().find(|listen| listen.address.is_public())
    {
        warnings.push(format!(
            "{} can be reached from other machines, and any user there can run the program of \
             {name}; listen on 127.0.0.1 or a unix socket, or use only a network that you trust",
            listen.address
        ));
    }
    let observe = observe::resolve(&check, &raw.observe)?;
    let slow_log = methods::slow_log(&check, raw, &mut methods)?;
    let jobs = jobs::resolve(&check, raw, &workers, &limits)?;
    let access_log =
        access_log::resolve(&check, raw.access_log.as_deref(), &methods, jobs.is_some())?;
    warnings.extend(access_log::warning(access_log.as_ref(), &log));
    warnings.extend(observe.warning());
    if places.is_set("observe") {
        warnings.extend(observe::idle_warning(&raw.observe));
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
        observe,
        access_log,
        slow_log,
        trace: (raw.trace.as_ref()).is_some_and(|trace| trace.propagate.unwrap_or(true)),
        jobs,
        listen,
        warnings,
        needs_restart: Vec::new(),
    };
    paths_differ(&check, &settings)?;
    let listen = settings.listen.iter().map(|listen| &listen.address);
    observe::refuse_collisions(&check, &settings.observe, listen)?;
    let mut more = guarded::warnings(&settings, here, ids);
    more.extend(exposed::warnings(
        &settings,
        raw,
        places,
        (here.uid, here.gid),
    ));
    more.extend(missing::warnings(&settings, raw, here));
    more.extend(program_text::warnings(&settings));
    more.extend(super::variables::warnings(&settings, here));
    settings.warnings.extend(more);
    Ok(settings)
}

/// Checks the origins: they must be as browsers write them, because others would never match.
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
                format!("{origin:?} is not an origin"),
                "write it as a browser does: scheme, host and port alone, in lower case, such as \
                 \"https://app.example.com\" or \"http://localhost:3000\"",
            ));
        }
    }
    Ok(origins)
}

/// Refuses keys and values that this version knows but does not support.
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
        // Without it, because the suggested value must be accepted.
        check.choice(key, events, &["auto", "epoll"])?;
    }
    Ok(())
}

/// Returns the warnings for workers that run as root and accept on `listen`.
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

/// Returns the account of the workers; `None` if it is that of this process.
fn account(check: &Check<'_>, raw: &Raw) -> Result<Option<Account>> {
    let Some(account) = check.account("", raw.user.as_ref(), raw.group.as_ref())? else {
        return Ok(None);
    };
    let is_root = check.here.uid == 0;
    if account.uid == check.here.uid && account.gid == check.here.gid {
        return Ok(None);
    }
    if account.uid == 0 && is_root {
        return Err(check.places.error(
            "group",
            "workers that run as root can't leave the group of root",
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
    Ok(LogConfig {
        level: check.word("log.level", raw.level.as_ref(), LevelFilter::Info)?,
        format: check.word("log.format", raw.format.as_ref(), LogFormat::Text)?,
        file: (raw.file.as_ref())
            .map(|text| check.log_file("log.file", text))
            .transpose()?,
    })
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
    Ok(WorkersConfig {
        count: check.count("workers.count", raw.count.unwrap_or(Count::Auto))?,
        threads: raw.threads.value(check, "workers.threads")?,
        boot_timeout: raw.boot_timeout.value(check, "workers.boot-timeout")?,
        drain_timeout: raw.drain_timeout.value(check, "workers.drain-timeout")?,
        heartbeat_timeout: (raw.heartbeat_timeout).value(check, "workers.heartbeat-timeout")?,
        respawn_burst: raw.respawn_burst.value(check, "workers.respawn-burst")?,
        respawn_max_delay: (raw.respawn_max_delay).value(check, "workers.respawn-max-delay")?,
        keep_connections: raw.keep_connections.unwrap_or(true),
        max_calls: raw.max_calls.value(check, "workers.max-calls")?,
        max_memory: raw.max_memory.value(check, "workers.max-memory")?,
        max_lifetime: raw.max_lifetime.value(check, "workers.max-lifetime")?,
        max_unavailable: raw
            .max_unavailable
            .value(check, "workers.max-unavailable")?,
    })
}

/// The unfinished calls of a worker may use a quarter of its share of the memory. Complete calls, running
/// calls and answers need memory too.
const UNFINISHED_SHARE: u64 = 4;

/// Returns the bytes of all unfinished calls of a worker: at least one frame. The default is in whole
/// mebibytes.
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
    let frame = check.size(
        "limits.frame",
        raw.frame.unwrap_or(ByteSize(16 << 20)),
        1 << 10,
        FRAME_LIMIT_MAX as u64,
        // Section 3 of the protocol: the length of a longer frame could be taken for text.
        " (the length of a longer frame would look like text)",
    )?;
    Ok(LimitsConfig {
        connections: raw.connections.value(check, "limits.connections")?,
        frame: frame as usize,
        unfinished: unfinished(check, raw.unfinished, (frame, workers))?,
        depth: raw.depth.value(check, "limits.depth")?,
        pipeline: raw.pipeline.value(check, "limits.pipeline")?,
        batch: raw.batch.value(check, "limits.batch")?,
        queue: raw.queue.value(check, "limits.queue")?,
        // If only the drain is shortened, the default timeout becomes shorter as well.
        timeout: match raw.timeout {
            None => DEFAULT_TIMEOUT.min(workers.drain_timeout),
            Some(timeout) => check.duration("limits.timeout", timeout, MILLISECOND)?,
        },
        read_timeout: raw.read_timeout.value(check, "limits.read-timeout")?,
        write_timeout: raw.write_timeout.value(check, "limits.write-timeout")?,
        idle_timeout: raw.idle_timeout.value(check, "limits.idle-timeout")?,
    })
}

/// Refuses equal paths for the pid file, the sockets and the log, because they would overwrite each other.
fn paths_differ(check: &Check<'_>, settings: &Settings) -> Result<()> {
    let own = [
        ("pid-file", Some(settings.pid_file.as_path())),
        ("control-socket", Some(settings.control_socket.as_path())),
        ("log.file", settings.log.file.as_deref()),
        ("access-log.file", settings.access_log_file()),
        ("observe.address", settings.observe.path()),
        ("jobs.store", settings.jobs.as_ref().map(JobsConfig::path)),
    ];
    let own = own.iter().filter_map(|(key, path)| Some((*key, (*path)?)));
    let shared =
        |path: &Path, other: &str| format!("{} is the path of {other} too", path.display());
    let sockets = settings.listen.iter().map(|listen| match &listen.address {
        Address::Unix(path) => Some(path.as_path()),
        Address::Tcp(_) => None,
    });
    // The pid file is written and finally removed, so the configuration file would be lost.
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
