//! Resolves `[pools.NAME]`: programs that run for a long time and answer many calls.
//!
//! `programs` resolves the program itself. A pool that no method uses is checked too, and gets a warning.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use log::Level;

use super::check::{Check, KeyValue, MILLISECOND};
use super::programs::{self, Ids};
use super::raw::{Count, Raw, RawPool};
use super::settings::{
    ListenConfig, PoolConfig, PoolReload, PoolScope, StackSignal, WorkersConfig,
};
use super::source_map::join;
use super::units::{ByteSize, DurationValue};
use crate::error::Result;

const DEFAULT_BOOT: Duration = Duration::from_secs(30);
const NAME_MAX: usize = 64;

/// Returns all pools by name.
pub(super) fn resolve(
    raw: &Raw,
    check: &Check<'_>,
    (workers, ids): (&WorkersConfig, Ids),
    listeners: &[ListenConfig],
    warnings: &mut Vec<String>,
) -> Result<BTreeMap<String, PoolConfig>> {
    let mut pools = BTreeMap::new();
    for (name, pool) in &raw.pools {
        let key = join("pools", name);
        check_name(name, &key, check)?;
        let pool = resolve_one(&key, pool, check, (workers, ids))?;
        check_scope(check, &key, pool.scope, listeners)?;
        let is_used = |method: &super::raw::RawMethod| method.pool.as_ref() == Some(name);
        if !raw.methods.values().any(|method| is_used(method)) {
            warnings.push(format!(
                "no method uses the pool {name}, so its program is not started; add pool = \
                 \"{name}\" to a method, or take the pool out"
            ));
        }
        warnings.extend(misplaced(name, &key, &pool, check));
        pools.insert(name.clone(), pool);
    }
    Ok(pools)
}

/// Refuses a name that does not fit into log lines.
fn check_name(name: &str, key: &str, check: &Check<'_>) -> Result<()> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if !name.is_empty() && name.len() <= NAME_MAX && name.bytes().all(good) {
        return Ok(());
    }
    let problem = format!("a pool's name is made of letters, digits and _ . -, {NAME_MAX} at most");
    Err(check.places.error(key, problem, "give it another name"))
}

fn resolve_one(
    key: &str,
    raw: &RawPool,
    check: &Check<'_>,
    (workers, ids): (&WorkersConfig, Ids),
) -> Result<PoolConfig> {
    let key_of = |name: &str| join(key, name);
    let scope = scope(key, raw, check)?;
    let example = "[\"python3\", \"/srv/model.py\"]";
    let ready = raw.ready.as_deref().unwrap_or("message");
    let boot_key = key_of("boot-timeout");
    let boot_timeout = raw
        .boot_timeout
        .unwrap_or(DurationValue(DEFAULT_BOOT.min(workers.boot_timeout)));
    let boot_timeout = check.duration(&boot_key, boot_timeout, MILLISECOND)?;
    if boot_timeout > workers.boot_timeout {
        let limit = DurationValue(workers.boot_timeout);
        return Err(check.places.error(
            &boot_key,
            format!(
                "{} is longer than workers.boot-timeout ({limit}), after which the process \
                 that starts it is killed",
                DurationValue(boot_timeout)
            ),
            format!("give {limit} at most, or raise workers.boot-timeout"),
        ));
    }
    let concurrency: usize = raw.concurrency.value(check, &key_of("concurrency"))?;
    let when_abandoned = raw.when_abandoned.as_deref().unwrap_or("finish");
    Ok(PoolConfig {
        scope,
        processes: check.count(
            &key_of("processes"),
            // Each connection has one program of its own.
            raw.processes.unwrap_or(match scope {
                PoolScope::Shared => Count::Auto,
                PoolScope::Connection => Count::Number(1),
            }),
        )?,
        concurrency,
        kills_abandoned: kills_abandoned(
            &key_of("when-abandoned"),
            when_abandoned,
            concurrency,
            check,
        )?,
        handshake: check.choice(&key_of("ready"), ready, &["alive", "message"])? == "message",
        reload: check.word(&key_of("reload"), raw.reload.as_ref(), PoolReload::Replace)?,
        boot_timeout,
        idle_timeout: raw.idle_timeout.value(check, &key_of("idle-timeout"))?,
        max_calls: raw.max_calls.value(check, &key_of("max-calls"))?,
        max_memory: raw.max_memory.map_or(0, |ByteSize(bytes)| bytes),
        max_lifetime: raw.max_lifetime.value(check, &key_of("max-lifetime"))?,
        health: raw.health.unwrap_or(false),
        respawn_burst: raw.respawn_burst.value(check, &key_of("respawn-burst"))?,
        respawn_max_delay: (raw.respawn_max_delay).value(check, &key_of("respawn-max-delay"))?,
        stderr_level: check.word(
            &key_of("stderr-level"),
            raw.stderr_level.as_ref(),
            Level::Warn,
        )?,
        stack_signal: match &raw.stack_signal {
            Some(word) => {
                Some(check.word(&key_of("stack-signal"), Some(word), StackSignal::Usr1)?)
            }
            None => None,
        },
        // This comes last, so that `check` also reports errors of the other keys.
        program: match &raw.command {
            Some(command) => programs::resolve(key, (command, example), &raw.into(), check, ids)?,
            None => {
                let remedy = format!("add command = {example}");
                return Err(check.places.error(key, "the pool has no program", remedy));
            }
        },
    })
}

/// Resolves `scope`. With `scope = "connection"`, keys about several programs or about a replacement are refused,
/// because the program keeps the state of one connection.
fn scope(key: &str, raw: &RawPool, check: &Check<'_>) -> Result<PoolScope> {
    let scope = check.word(&join(key, "scope"), raw.scope.as_ref(), PoolScope::Shared)?;
    if scope == PoolScope::Shared {
        return Ok(scope);
    }
    match raw.of_shared() {
        None => Ok(PoolScope::Connection),
        Some(name) => Err(check.places.error(
            &join(key, name),
            "the pool has scope = \"connection\": each connection has one program, from its first call to \
             its end",
            match name {
                "max-memory" => "remove it, and set memory in rlimits, or remove scope",
                "max-lifetime" | "idle-timeout" => {
                    "remove it, and set max-lifetime of the listener or limits.idle-timeout, or remove scope"
                }
                _ => "remove it, or remove scope",
            },
        )),
    }
}

/// Refuses a pool of connections if no connection has a process.
fn check_scope(
    check: &Check<'_>,
    key: &str,
    scope: PoolScope,
    listeners: &[ListenConfig],
) -> Result<()> {
    let has_sessions = listeners.iter().any(|listen| listen.isolation.is_some());
    if scope == PoolScope::Shared || has_sessions {
        return Ok(());
    }
    Err(check.places.error(
        &join(key, "scope"),
        "no listener has isolation = \"connection\", so no connection could call its methods",
        "add isolation = \"connection\" to a [[listen]], or remove scope",
    ))
}

/// Reads `when-abandoned`: whether a program is killed as soon as its call is abandoned.
pub(super) fn kills_abandoned(
    key: &str,
    word: &str,
    concurrency: usize,
    check: &Check<'_>,
) -> Result<bool> {
    let kills = check.choice(key, word, &["finish", "kill"])? == "kill";
    if kills && concurrency > 1 {
        return Err(check.places.error(
            key,
            format!(
                "the pool has concurrency = {concurrency}, so a kill would end other calls too"
            ),
            "set \"finish\", or concurrency = 1",
        ));
    }
    Ok(kills)
}

/// Warns of a relative path in the arguments that exists beside the configuration file but not in the
/// program's directory, because the program resolves it by its own directory.
fn misplaced(name: &str, key: &str, pool: &PoolConfig, check: &Check<'_>) -> Option<String> {
    let program = &pool.program;
    let key = join(key, "command");
    let argument = program.arguments[1..].iter().find(|argument| {
        let path = Path::new(argument);
        path.is_relative()
            && !argument.starts_with('-')
            && !argument.is_empty()
            && !program.directory.join(path).exists()
            && check.beside(&key, path).is_file()
    })?;
    let beside = check.beside(&key, Path::new(argument));
    Some(format!(
        "the program of the pool {name} runs in {}, where there is no {argument}; if {} is \
         meant, write that, or set directory",
        program.directory.display(),
        beside.display()
    ))
}
