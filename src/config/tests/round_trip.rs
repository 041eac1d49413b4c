//! The output of `check` gives the same settings, whatever they are.

use std::collections::BTreeMap;
use std::time::Duration;

use log::LevelFilter;
use proptest::prelude::*;

use super::*;
use crate::config::settings::{
    AccessLogConfig, IsolationConfig, JobRules, JobsConfig, LogConfig, PoolReload, RlimitsConfig,
    SlowLogConfig,
};
use crate::sys::account::{self, Account};

fn duration(least_ms: u64) -> impl Strategy<Value = Duration> {
    prop_oneof![
        (least_ms..100_000).prop_map(Duration::from_millis),
        (least_ms.max(1) * 1_000_000..10_000_000_000).prop_map(Duration::from_nanos),
        (1..400_000u64).prop_map(|minutes| Duration::from_secs(60 * minutes)),
    ]
}

/// Zero, which has a special meaning, in half of the cases.
fn or_zero(least_ms: u64) -> impl Strategy<Value = Duration> {
    prop_oneof![Just(Duration::ZERO), duration(least_ms)]
}

fn path() -> impl Strategy<Value = PathBuf> {
    // Quotes, blanks, escapes and letters beyond ASCII, which a path may contain.
    "/run/[a-z \"'\\\\#=é\t]{1,20}[a-z]".prop_map(PathBuf::from)
}

fn address() -> impl Strategy<Value = Address> {
    prop_oneof![
        any::<([u8; 4], u16)>().prop_map(|at| Address::Tcp(at.into())),
        any::<([u16; 8], u16)>().prop_map(|at| Address::Tcp(at.into())),
        path().prop_map(Address::Unix),
    ]
}

prop_compose! {
    fn listener()(
        address in address(), backlog in 1..=i32::MAX as u32, mode in 0..=0o777u32, with: bool, spare in 0..=256usize, max_lifetime in or_zero(1000),
    ) -> ListenConfig {
        let http_methods = if with { HttpMethods::Path } else { HttpMethods::Any };
        let with = with && matches!(address, Address::Unix(_));
        ListenConfig {
            address,
            name: Some(format!("socket {backlog}")),
            backlog,
            mode: with.then_some(mode),
            http_methods,
            per_source: spare * 7,
            socket_user: with.then(|| account::lookup_user("54321").unwrap()),
            socket_group: with.then(|| account::lookup_group("root").unwrap()),
            isolation: (spare % 2 == 1).then_some(IsolationConfig {
                processes: 256 + spare,
                spare,
                max_lifetime,
                account: None,
                unfinished: 1024 + spare,
            }),
        }
    }
}

prop_compose! {
    fn workers()(
        count in 1..=1024usize, threads in 1..=1024usize, boot_timeout in duration(1),
        heartbeat_timeout in duration(1000), respawn_burst in 0..=1_000_000u32,
        respawn_max_delay in or_zero(100), keep_connections: bool, max_unavailable in 1..=1024usize,
        max_calls in 0..=1u64 << 50, max_memory in prop_oneof![Just(0), 1u64 << 20..=1 << 50],
        max_lifetime in or_zero(1000),
    ) -> WorkersConfig {
        WorkersConfig {
            count, threads, boot_timeout, heartbeat_timeout, respawn_burst, respawn_max_delay,
            keep_connections, max_calls, max_memory, max_lifetime, max_unavailable,
            drain_timeout: Duration::from_secs(365 * 86_400),
        }
    }
}

prop_compose! {
    fn limits()(
        connections in 1..=1usize << 20, frame in 1usize << 10..=128 << 20,
        more in 0usize..=1 << 40, depth in 1..=10_000usize,
        counts in [1..=1_000_000usize, 1..=1_000_000, 1..=1_000_000],
        times in [duration(1), duration(1), duration(1)], idle_timeout in or_zero(1),
    ) -> LimitsConfig {
        let [pipeline, batch, queue] = counts;
        let [timeout, read_timeout, write_timeout] = times;
        LimitsConfig {
            connections, frame, depth, unfinished: frame + more, pipeline, batch, queue, timeout, read_timeout,
            write_timeout, idle_timeout,
        }
    }
}

prop_compose! {
    fn observe()(
        address in prop::option::of(address()), mode in 0..=0o777u32, page: bool,
        steps in prop::collection::btree_set(4..40u64, 1..20),
    ) -> ObserveConfig {
        let is_unix = matches!(address, Some(Address::Unix(_)));
        ObserveConfig {
            address, page,
            mode: is_unix.then_some(mode),
            hosts: if page { vec!["node_1.example.com".into()] } else { Vec::new() },
            histograms: if page { vec![Histogram::Run, Histogram::Queue] } else { Vec::new() },
            buckets: steps.into_iter().map(|step| Duration::from_micros(step * 250)).collect(),
        }
    }
}

prop_compose! {
    fn slow_log()(
        threshold in or_zero(1), params in 0..=4096usize, lines in 1..=10_000usize,
    ) -> SlowLogConfig {
        SlowLogConfig { threshold, params, lines }
    }
}

prop_compose! {
    fn access_log()(
        has_file: bool, json: bool, sample in 0.0..=1.0, always_above in or_zero(1), ping: bool,
    ) -> AccessLogConfig {
        AccessLogConfig {
            file: has_file.then(|| "/var/access.log".into()),
            format: if json { LogFormat::Json } else { LogFormat::Text },
            sample,
            always_above,
            methods: if ping { vec!["ping".into()] } else { Vec::new() },
        }
    }
}

prop_compose! {
    fn job_rules()(
        counts in [1..=1000u32, 1..=1000], backoff in or_zero(1), longer in or_zero(1),
        timeout in duration(1), drain_timeout in duration(1), priority in -9..=9i8,
        kept in [or_zero(1), or_zero(1), or_zero(1)],
    ) -> JobRules {
        let [max_attempts, max_crashes] = counts;
        let [keep_done, keep_dead, keep_cancelled] = kept;
        JobRules {
            max_attempts, backoff, max_crashes, timeout, drain_timeout, priority, keep_done,
            keep_dead, keep_cancelled,
            max_backoff: (backoff + longer).min(Duration::from_secs(365 * 86_400)),
        }
    }
}

prop_compose! {
    fn jobs()(
        file in "/[a-z \"'\\\\#=é]{1,20}[a-z]\\.db", concurrency in 1..=1024usize, defaults in job_rules().boxed(),
        ping in prop::option::of(job_rules().boxed()), lease in 5_000..=600_000u64, poll in duration(10),
        enqueue_timeout in duration(1), max_jobs in 1..=1u64 << 40, max_size in 1u64 << 20..=1 << 50,
        result in 1..=128usize << 20,
    ) -> JobsConfig {
        JobsConfig {
            store: JobStore::Sqlite(file.into()),
            concurrency,
            // `[jobs]` has no priority.
            defaults: JobRules { priority: 0, ..defaults },
            methods: ping.into_iter().map(|rules| ("ping".to_owned(), rules)).collect(),
            lease: Duration::from_millis(lease),
            poll, enqueue_timeout, max_jobs, max_size, result,
        }
    }
}

prop_compose! {
    fn program()(
        more in prop::collection::vec("[a-z '\"\\\\-]{0,8}|\\{[a-z]{1,4}\\}", 0..4),
        user: bool,
        environment in prop::collection::btree_map("[A-OQ-Z][A-Z_]{0,5}", "[^\0]{0,9}", 0..3),
        cpu in prop::option::of(1..1000u64), memory in prop::option::of(1u64 << 20..1 << 40),
        files in prop::option::of(3..1000u64), processes in prop::option::of(1..1000u64), guard: bool,
        has_file: bool,
    ) -> ProgramConfig {
        let file = PathBuf::from("/bin/sh").canonicalize().unwrap();
        let name = file.to_str().unwrap().to_owned();
        ProgramConfig {
            file,
            arguments: [name].into_iter().chain(more).collect(),
            variables: environment.clone(),
            environment,
            environment_file: has_file.then(|| "/dev/null".into()),
            directory: "/etc".into(),
            account: user.then(|| Account::lookup("nobody", Some("root")).unwrap()),
            rlimits: RlimitsConfig { cpu: cpu.map(Duration::from_secs), memory, files, processes },
            guard,
        }
    }
}

prop_compose! {
    fn command()(
        program in program(), stdin in 0..3usize, output in 0..3usize, max_output in 1..=128usize << 20,
    ) -> CommandConfig {
        CommandConfig {
            program,
            stdin: [Stdin::Params, Stdin::Text, Stdin::None][stdin],
            output: [OutputFormat::Text, OutputFormat::Line, OutputFormat::Json][output],
            max_output,
        }
    }
}

prop_compose! {
    fn pool()(
        program in program(), processes in 1..=1024usize, several in prop::option::of(2..=65_536usize),
        handshake: bool, kills_abandoned: bool, reload in 0..3usize,
        times in [or_zero(1), or_zero(1)], respawn_max_delay in or_zero(100),
        max_calls in 0..i64::MAX as u64, max_memory: u64, health: bool, respawn_burst in 0..=1_000_000u32,
    ) -> PoolConfig {
        let [idle_timeout, max_lifetime] = times;
        PoolConfig {
            concurrency: several.unwrap_or(1),
            kills_abandoned: kills_abandoned && several.is_none(),
            program, processes, handshake, idle_timeout, max_lifetime, respawn_max_delay,
            max_calls, max_memory, health, respawn_burst,
            boot_timeout: Duration::from_millis(1),
            scope: PoolScope::Shared,
            reload: [PoolReload::Replace, PoolReload::Rolling, PoolReload::Keep][reload],
            stderr_level: log::Level::Info,
            stack_signal: health.then_some(StackSignal::Usr2),
        }
    }
}

/// The same pool with a program for each connection.
fn of_connections(pool: PoolConfig) -> PoolConfig {
    PoolConfig {
        scope: PoolScope::Connection,
        processes: 1,
        reload: PoolReload::Replace,
        idle_timeout: Duration::ZERO,
        max_calls: 0,
        max_memory: 0,
        max_lifetime: Duration::ZERO,
        health: false,
        respawn_burst: 5,
        respawn_max_delay: Duration::from_secs(30),
        ..pool
    }
}

prop_compose! {
    fn method()(
        kind in 0..6usize, command in command(), timeout in duration(1),
        concurrency in 0..=1000usize, rate: u32, kills: bool, slow in prop::option::of(duration(1)),
    ) -> MethodConfig {
        let kind = match kind {
            4 => MethodKind::Command(Box::new(command)),
            5 => MethodKind::Pool("first".into()),
            0 => MethodKind::Function,
            1 => MethodKind::Builtin(Builtin::Ping),
            2 => MethodKind::Builtin(Builtin::Echo),
            _ => MethodKind::Builtin(Builtin::Sleep),
        };
        let kills_abandoned = kills && matches!(kind, MethodKind::Pool(_));
        MethodConfig { kind, timeout, concurrency, rate, slow, kills_abandoned }
    }
}

prop_compose! {
    fn any_settings()(
        daemon: bool, json: bool, level in 0..6usize, user: bool, file in path(),
        paths in [path(), path()], workers in workers().boxed(), limits in limits().boxed(), observe in observe().boxed(),
        slow_log in prop::option::of(slow_log()), access_log in prop::option::of(access_log().boxed()), jobs in prop::option::of(jobs().boxed()),
        listen in prop::collection::vec(listener().boxed(), 1..5),
        methods in prop::collection::btree_map("[a-z][A-Za-z0-9_./:-]{0,20}x", method().boxed(), 0..5),
        ping in method().boxed(), first in pool().boxed(), more in prop::option::of(pool().boxed()), is_of_connections: bool,
    ) -> Settings {
        let [pid_file, control_socket] = paths;
        let level = LevelFilter::iter().nth(level).unwrap();
        let format = if json { LogFormat::Json } else { LogFormat::Text };
        let kind = MethodKind::Builtin(Builtin::Ping);
        let methods: BTreeMap<_, _> = methods
            .into_iter()
            .map(|(name, method)| {
                let kills_abandoned = method.kills_abandoned && first.concurrency == 1;
                (name, MethodConfig { kills_abandoned, ..method })
            })
            .chain([("ping".to_owned(), MethodConfig { kind, kills_abandoned: false, ..ping })])
            .map(|(name, method)| {
                let slow = method.slow.filter(|_| slow_log.is_some());
                (name, MethodConfig { slow, ..method })
            })
            .collect();
        let mut first = first;
        if is_of_connections && listen.iter().any(|listen| listen.isolation.is_some()) {
            first = of_connections(first);
        }
        let mut pools = BTreeMap::from([("first".to_owned(), first)]);
        pools.extend(more.map(|pool| ("a.second-1".to_owned(), pool)));
        let programs = methods.values().filter_map(program_of);
        let has_account = programs
            .chain(pools.values().map(|pool| &pool.program))
            .any(|program| program.account.is_some());
        Settings {
            file: Some("/etc/x.toml".into()),
            daemon, pid_file, control_socket,
            http_origins: if json { vec!["https://a.example:8".into()] } else { Vec::new() },
            // Only workers that run as root can run a command as another user.
            account: (user && !has_account)
                .then(|| Account::lookup("nobody", Some("root")).unwrap()),
            log: LogConfig { level, format, file: daemon.then_some(file) },
            jobs: jobs.filter(|_| cfg!(feature = "jobs-sqlite")).map(|jobs| JobsConfig {
                concurrency: jobs.concurrency.min(workers.threads),
                result: jobs.result.min(limits.frame),
                ..jobs
            }),
            workers, limits, observe, access_log, slow_log, trace: json, listen, methods, pools,
            warnings: Vec::new(), needs_restart: Vec::new(),
        }
    }
}

fn program_of(method: &MethodConfig) -> Option<&ProgramConfig> {
    match &method.kind {
        MethodKind::Command(command) => Some(&command.program),
        _ => None,
    }
}

proptest! {
    #[test]
    fn what_check_prints_reads_to_the_same_settings(expected in any_settings()) {
        let text = expected.to_toml();
        let is_function = |method: &MethodConfig| method.kind == MethodKind::Function;
        let methods = expected.methods.iter();
        let names: Vec<&str> =
            methods.filter(|(_, m)| is_function(m)).map(|(name, _)| name.as_str()).collect();
        let found = match with(&root(), &text, &functions(&names)) {
            Ok(found) => found,
            // Two random listeners or files are equal, or a name is reserved.
            Err(error) if ["another listener", "can't be bound", "is the path of", "the protocol's own"]
                .iter().any(|reason| error.to_string().contains(reason)) => return Ok(()),
            Err(error) => panic!("{error}\n{text}"),
        };
        let mut found = Settings { warnings: Vec::new(), ..found };
        let of_methods = found.methods.values_mut().filter_map(|method| match &mut method.kind {
            MethodKind::Command(command) => Some(&mut command.program),
            _ => None,
        });
        let of_pools = found.pools.values_mut().map(|pool| &mut pool.program);
        for program in of_methods.chain(of_pools) {
            // Found by its name in another directory of the search path, or by its link.
            program.file = program.file.canonicalize().unwrap();
        }
        prop_assert_eq!(found, expected, "{}", text);
    }

    #[test]
    fn no_damage_to_a_file_is_more_than_an_error(
        cuts in prop::collection::vec((any::<prop::sample::Index>(), "\\PC{0,3}|[\\[\\]\"'=.\n]{1,3}"), 1..6),
    ) {
        let mut text = include_str!("../../../config/preforkd.toml").to_owned();
        for (at, with) in cuts {
            let at = at.index(text.len());
            let end = (at..=text.len()).find(|end| text.is_char_boundary(*end)).unwrap();
            let next = text[end..].chars().next().map_or(0, char::len_utf8);
            text.replace_range(end..end + next, &with);
        }
        if let Err(error) = settings(&root(), &text) {
            prop_assert_eq!(error.exit_code(), 78);
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
