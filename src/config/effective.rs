//! The configuration in effect, written as a file that reads to the same settings: `check`.
//!
//! Every key that this version supports is there, with the value that holds. It goes through the
//! mirror, so quoting and names are serde's business and can't differ from what is read.

use super::raw::{
    Count, Raw, RawLimits, RawListen, RawLog, RawMethod, RawPool, RawRlimits, RawWorkers,
    StrictTable,
};
use super::settings::{
    CommandConfig, HttpMethods, LogConfig, MethodConfig, MethodKind, PoolConfig, RlimitsConfig,
    Settings,
};
use super::units::{ByteSize, DurationValue};
use crate::sys::account::NamedId;

impl Settings {
    /// The effective configuration as TOML. Read with the same functions registered, it makes
    /// equal settings (paths that are not UTF-8 excepted, which TOML can't hold).
    pub fn to_toml(&self) -> String {
        toml::to_string(&mirror(self))
            .expect("plain strings, numbers and tables always have a text")
    }
}

fn mirror(settings: &Settings) -> Raw {
    let account = settings.account.as_ref();
    Raw {
        daemon: Some(settings.daemon),
        pid_file: Some(settings.pid_file.to_string_lossy().into()),
        control_socket: Some(settings.control_socket.to_string_lossy().into()),
        user: account.map(|account| account.name.clone()),
        group: account.map(|account| account.group.clone()),
        include: None,
        http_origins: Some(settings.http_origins.clone()),
        log: StrictTable(log(&settings.log)),
        workers: StrictTable(workers(settings)),
        limits: StrictTable(limits(settings)),
        listen: Some(listen(settings)),
        methods: settings
            .methods
            .iter()
            .map(|(name, method)| (name.clone(), StrictTable(self::method(method))))
            .collect(),
        pools: settings
            .pools
            .iter()
            .map(|(name, pool)| (name.clone(), StrictTable(self::pool(pool))))
            .collect(),
    }
}

fn log(log: &LogConfig) -> RawLog {
    RawLog {
        level: Some(log.level.as_str().to_ascii_lowercase()),
        format: Some(log.format.name().into()),
        file: log.file.as_ref().map(|path| path.to_string_lossy().into()),
    }
}

fn workers(settings: &Settings) -> RawWorkers {
    let workers = &settings.workers;
    RawWorkers {
        count: Some(Count::Number(workers.count as i64)),
        threads: Some(workers.threads as i64),
        boot_timeout: Some(DurationValue(workers.boot_timeout)),
        drain_timeout: Some(DurationValue(workers.drain_timeout)),
        heartbeat_timeout: Some(DurationValue(workers.heartbeat_timeout)),
        respawn_burst: Some(workers.respawn_burst.into()),
        respawn_max_delay: Some(DurationValue(workers.respawn_max_delay)),
        keep_connections: Some(workers.keep_connections),
        max_calls: Some(workers.max_calls as i64),
        max_memory: Some(ByteSize(workers.max_memory)),
        max_lifetime: Some(DurationValue(workers.max_lifetime)),
        max_unavailable: Some(workers.max_unavailable as i64),
        ..RawWorkers::default()
    }
}

fn limits(settings: &Settings) -> RawLimits {
    let limits = &settings.limits;
    RawLimits {
        connections: Some(limits.connections as i64),
        frame: Some(ByteSize(limits.frame as u64)),
        unfinished: Some(ByteSize(limits.unfinished as u64)),
        depth: Some(limits.depth as i64),
        pipeline: Some(limits.pipeline as i64),
        batch: Some(limits.batch as i64),
        queue: Some(limits.queue as i64),
        timeout: Some(DurationValue(limits.timeout)),
        read_timeout: Some(DurationValue(limits.read_timeout)),
        write_timeout: Some(DurationValue(limits.write_timeout)),
        idle_timeout: Some(DurationValue(limits.idle_timeout)),
    }
}

fn listen(settings: &Settings) -> Vec<StrictTable<RawListen>> {
    let name = |id: &Option<NamedId>| Some(id.as_ref()?.name.clone());
    settings
        .listen
        .iter()
        .map(|listen| {
            StrictTable(RawListen {
                address: Some(listen.address.to_string()),
                name: listen.name.clone(),
                backlog: Some(listen.backlog.into()),
                mode: listen.mode.map(|mode| format!("{mode:04o}")),
                socket_user: name(&listen.socket_user),
                socket_group: name(&listen.socket_group),
                http_methods: Some(match listen.http_methods {
                    HttpMethods::Any => "any".into(),
                    HttpMethods::Path => "path".into(),
                }),
            })
        })
        .collect()
}

fn method(method: &MethodConfig) -> RawMethod {
    let of_kind = match &method.kind {
        MethodKind::Builtin(builtin) => RawMethod {
            builtin: Some(builtin.name().into()),
            ..RawMethod::default()
        },
        MethodKind::Command(command) => self::command(command),
        MethodKind::Pool(name) => RawMethod {
            pool: Some(name.clone()),
            when_abandoned: Some(when_abandoned(method.kills_abandoned)),
            ..RawMethod::default()
        },
        MethodKind::Function => RawMethod::default(),
    };
    RawMethod {
        timeout: Some(DurationValue(method.timeout)),
        concurrency: Some(method.concurrency as i64),
        rate: Some(method.rate.into()),
        ..of_kind
    }
}

fn when_abandoned(kills: bool) -> String {
    if kills { "kill" } else { "finish" }.to_owned()
}

fn command(command: &CommandConfig) -> RawMethod {
    let program = &command.program;
    let account = program.account.as_ref();
    RawMethod {
        command: Some(program.arguments.clone()),
        stdin: Some(command.stdin.name().into()),
        output: Some(command.output.name().into()),
        max_output: Some(ByteSize(command.max_output as u64)),
        environment: Some(program.environment.clone()),
        environment_file: program
            .environment_file
            .as_ref()
            .map(|path| path.to_string_lossy().into()),
        directory: Some(program.directory.to_string_lossy().into()),
        user: account.map(|account| account.name.clone()),
        group: account.map(|account| account.group.clone()),
        rlimits: rlimits(&program.rlimits),
        guard: Some(program.guard),
        ..RawMethod::default()
    }
}

fn pool(pool: &PoolConfig) -> RawPool {
    let program = &pool.program;
    let account = program.account.as_ref();
    RawPool {
        command: Some(program.arguments.clone()),
        processes: Some(Count::Number(pool.processes as i64)),
        concurrency: Some(pool.concurrency as i64),
        when_abandoned: Some(when_abandoned(pool.kills_abandoned)),
        ready: Some(if pool.handshake { "message" } else { "alive" }.into()),
        boot_timeout: Some(DurationValue(pool.boot_timeout)),
        idle_timeout: Some(DurationValue(pool.idle_timeout)),
        max_calls: Some(pool.max_calls as i64),
        max_memory: Some(ByteSize(pool.max_memory)),
        max_lifetime: Some(DurationValue(pool.max_lifetime)),
        respawn_burst: Some(pool.respawn_burst.into()),
        respawn_max_delay: Some(DurationValue(pool.respawn_max_delay)),
        stderr_level: Some(pool.stderr_level.as_str().to_lowercase()),
        environment: Some(program.environment.clone()),
        environment_file: program
            .environment_file
            .as_ref()
            .map(|path| path.to_string_lossy().into()),
        directory: Some(program.directory.to_string_lossy().into()),
        user: account.map(|account| account.name.clone()),
        group: account.map(|account| account.group.clone()),
        rlimits: rlimits(&program.rlimits),
        guard: Some(program.guard),
    }
}

fn rlimits(limits: &RlimitsConfig) -> Option<StrictTable<RawRlimits>> {
    // None of them can be above what an i64 holds: they were one.
    let integer = |value: Option<u64>| value.map(|value| value as i64);
    (*limits != RlimitsConfig::default()).then(|| {
        StrictTable(RawRlimits {
            cpu: limits.cpu.map(DurationValue),
            memory: limits.memory.map(ByteSize),
            files: integer(limits.files),
            processes: integer(limits.processes),
        })
    })
}
