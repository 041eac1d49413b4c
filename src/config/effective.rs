//! Writes the configuration in effect as a file that gives the same settings, for `check`.
//!
//! The file has every key of this version with its value. It is made with the types of `raw`, so quoting
//! and names are serde's and are those that are read.

use super::keys::{Integer, Lifetime, RespawnDelay, Time, Word, WorkerMemory};
use super::raw::{
    Count, Raw, RawLimits, RawListen, RawLog, RawMethod, RawPool, RawRlimits, RawSlowLog, RawTrace,
    RawWorkers, StrictTable,
};
use super::settings::{
    CommandConfig, IsolationConfig, LogConfig, MethodConfig, MethodKind, PoolConfig, PoolScope,
    RlimitsConfig, Settings, SlowLogConfig,
};
use super::units::{ByteSize, DurationValue};
use crate::sys::account::NamedId;

impl Settings {
    /// Returns the effective configuration as TOML. If it is read with the same functions, it gives equal
    /// settings, except for paths that are not UTF-8.
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
        observe: StrictTable(settings.observe.to_raw()),
        access_log: (settings.access_log.as_ref()).map(|table| StrictTable(table.to_raw())),
        slow_log: settings.slow_log.as_ref().map(slow_log),
        trace: Some(StrictTable(RawTrace {
            propagate: Some(settings.trace),
        })),
        listen: Some(listen(settings)),
        jobs: settings
            .jobs
            .as_ref()
            .map(|jobs| StrictTable(jobs.to_raw())),
        methods: settings
            .methods
            .iter()
            .map(|(name, method)| {
                let jobs = settings.jobs.as_ref();
                let raw = RawMethod {
                    job: jobs
                        .and_then(|jobs| jobs.method_to_raw(name))
                        .map(StrictTable),
                    ..self::method(method)
                };
                (name.clone(), StrictTable(raw))
            })
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
        level: Some(log.level.word()),
        format: Some(log.format.word()),
        file: log.file.as_ref().map(|path| path.to_string_lossy().into()),
    }
}

fn workers(settings: &Settings) -> RawWorkers {
    let workers = &settings.workers;
    RawWorkers {
        count: Some(Count::Number(workers.count as i64)),
        threads: Integer::of(workers.threads),
        boot_timeout: Time(Some(DurationValue(workers.boot_timeout))),
        drain_timeout: Time(Some(DurationValue(workers.drain_timeout))),
        heartbeat_timeout: Time(Some(DurationValue(workers.heartbeat_timeout))),
        respawn_burst: Integer::of(workers.respawn_burst),
        respawn_max_delay: RespawnDelay(Some(DurationValue(workers.respawn_max_delay))),
        keep_connections: Some(workers.keep_connections),
        max_calls: Integer::of(workers.max_calls),
        max_memory: WorkerMemory(Some(ByteSize(workers.max_memory))),
        max_lifetime: Lifetime(Some(DurationValue(workers.max_lifetime))),
        max_unavailable: Integer::of(workers.max_unavailable),
        ..RawWorkers::default()
    }
}

fn limits(settings: &Settings) -> RawLimits {
    let limits = &settings.limits;
    RawLimits {
        connections: Integer::of(limits.connections),
        frame: Some(ByteSize(limits.frame as u64)),
        unfinished: Some(ByteSize(limits.unfinished as u64)),
        depth: Integer::of(limits.depth),
        pipeline: Integer::of(limits.pipeline),
        batch: Integer::of(limits.batch),
        queue: Integer::of(limits.queue),
        timeout: Some(DurationValue(limits.timeout)),
        read_timeout: Time(Some(DurationValue(limits.read_timeout))),
        write_timeout: Time(Some(DurationValue(limits.write_timeout))),
        idle_timeout: Time(Some(DurationValue(limits.idle_timeout))),
    }
}

fn slow_log(table: &SlowLogConfig) -> StrictTable<RawSlowLog> {
    StrictTable(RawSlowLog {
        threshold: Time(Some(DurationValue(table.threshold))),
        params: Integer::of(table.params),
        lines: Integer::of(table.lines),
    })
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
                backlog: Integer::of(listen.backlog),
                mode: listen.mode.map(|mode| format!("{mode:04o}")),
                socket_user: name(&listen.socket_user),
                socket_group: name(&listen.socket_group),
                http_methods: Some(listen.http_methods.word()),
                per_source: Integer::of(listen.per_source),
                ..isolation(listen.isolation.as_ref())
            })
        })
        .collect()
}

fn isolation(isolation: Option<&IsolationConfig>) -> RawListen {
    let Some(isolation) = isolation else {
        return RawListen {
            isolation: Some("shared".into()),
            ..RawListen::default()
        };
    };
    let account = isolation.account.as_ref();
    RawListen {
        isolation: Some("connection".into()),
        processes: Integer::of(isolation.processes),
        spare: Some(isolation.spare as i64),
        max_lifetime: Lifetime(Some(DurationValue(isolation.max_lifetime))),
        unfinished: Some(ByteSize(isolation.unfinished as u64)),
        user: account.map(|account| account.name.clone()),
        group: account.map(|account| account.group.clone()),
        ..RawListen::default()
    }
}

fn method(method: &MethodConfig) -> RawMethod {
    let of_kind = match &method.kind {
        MethodKind::Builtin(builtin) => RawMethod {
            builtin: Some(builtin.word()),
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
        concurrency: Integer::of(method.concurrency),
        rate: Integer::of(method.rate),
        slow: method.slow.map(DurationValue),
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
        stdin: Some(command.stdin.word()),
        output: Some(command.output.word()),
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
    let is_shared = pool.scope == PoolScope::Shared;
    RawPool {
        command: Some(program.arguments.clone()),
        scope: Some(pool.scope.word()),
        processes: is_shared.then_some(Count::Number(pool.processes as i64)),
        concurrency: Integer::of(pool.concurrency),
        when_abandoned: Some(when_abandoned(pool.kills_abandoned)),
        ready: Some(if pool.handshake { "message" } else { "alive" }.into()),
        reload: is_shared.then(|| pool.reload.word()),
        boot_timeout: Some(DurationValue(pool.boot_timeout)),
        idle_timeout: Time(is_shared.then_some(DurationValue(pool.idle_timeout))),
        max_calls: Integer(is_shared.then_some(pool.max_calls as i64)),
        max_memory: is_shared.then_some(ByteSize(pool.max_memory)),
        max_lifetime: Time(is_shared.then_some(DurationValue(pool.max_lifetime))),
        health: is_shared.then_some(pool.health),
        respawn_burst: Integer(is_shared.then_some(pool.respawn_burst.into())),
        respawn_max_delay: RespawnDelay(is_shared.then_some(DurationValue(pool.respawn_max_delay))),
        stderr_level: Some(pool.stderr_level.word()),
        stack_signal: pool.stack_signal.map(Word::word),
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
    // None of them is too large for an i64, because they were read as one.
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
