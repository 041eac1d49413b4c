//! `[pools.NAME]`: programs that live long and answer many calls.
//!
//! The program itself is `programs`' business. A pool that is wrong is refused also when no method
//! uses it, which is worth a word of its own.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use log::Level;

use super::check::{Check, MILLISECOND};
use super::programs::{self, Ids};
use super::raw::{Count, Raw, RawPool};
use super::settings::{PoolConfig, WorkersConfig};
use super::source_map::join;
use super::units::{ByteSize, DurationValue};
use crate::error::Result;

const DEFAULT_BOOT: Duration = Duration::from_secs(30);
const NAME_MAX: usize = 64;
const PROCESSES: RangeInclusive<i64> = 1..=1024;
const CONCURRENCY: RangeInclusive<i64> = 1..=65_536;

/// All pools by name.
pub(super) fn resolve(
    raw: &Raw,
    check: &Check<'_>,
    (workers, ids): (&WorkersConfig, Ids),
    warnings: &mut Vec<String>,
) -> Result<BTreeMap<String, PoolConfig>> {
    let mut pools = BTreeMap::new();
    for (name, pool) in &raw.pools {
        let key = join("pools", name);
        check_name(name, &key, check)?;
        let pool = resolve_one(&key, pool, check, (workers, ids))?;
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

/// It stands in each line of the log.
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
    let example = "[\"python3\", \"/srv/model.py\"]";
    let ready = raw.ready.as_deref().unwrap_or("message");
    let number = |name: &str, value, default, most| {
        check.integer(&key_of(name), value, default, 0..=most, "")
    };
    let or_never =
        |name: &str, value| check.duration(&key_of(name), value, Duration::ZERO, Duration::ZERO);
    let boot_key = key_of("boot-timeout");
    let boot_timeout = check.duration(
        &boot_key,
        raw.boot_timeout,
        DEFAULT_BOOT.min(workers.boot_timeout),
        MILLISECOND,
    )?;
    if boot_timeout > workers.boot_timeout {
        let limit = DurationValue(workers.boot_timeout);
        return Err(check.places.error(
            &boot_key,
            format!(
                "{} is longer than workers.boot-timeout ({limit}), after which the worker is \
                 given up",
                DurationValue(boot_timeout)
            ),
            format!("give {limit} at most, or raise workers.boot-timeout"),
        ));
    }
    let concurrency = check.integer(&key_of("concurrency"), raw.concurrency, 1, CONCURRENCY, "")?;
    let when_abandoned = raw.when_abandoned.as_deref().unwrap_or("finish");
    Ok(PoolConfig {
        processes: processes(&key_of("processes"), raw, check)?,
        concurrency,
        kills_abandoned: kills_abandoned(
            &key_of("when-abandoned"),
            when_abandoned,
            concurrency,
            check,
        )?,
        handshake: check.choice(&key_of("ready"), ready, &["alive", "message"])? == "message",
        boot_timeout,
        idle_timeout: or_never("idle-timeout", raw.idle_timeout)?,
        max_calls: number("max-calls", raw.max_calls, 0, i64::MAX)?,
        max_memory: raw.max_memory.map_or(0, |ByteSize(bytes)| bytes),
        max_lifetime: or_never("max-lifetime", raw.max_lifetime)?,
        respawn_burst: check.integer(
            &key_of("respawn-burst"),
            raw.respawn_burst,
            5,
            0..=1_000_000,
            "",
        )?,
        respawn_max_delay: check
            .respawn_max_delay(&key_of("respawn-max-delay"), raw.respawn_max_delay)?,
        stderr_level: stderr_level(&key_of("stderr-level"), raw, check)?,
        // Last, so that `check` tells of the rest too.
        program: match &raw.command {
            Some(command) => programs::resolve(key, (command, example), &raw.into(), check, ids)?,
            None => {
                let remedy = format!("add command = {example}");
                return Err(check.places.error(key, "the pool has no program", remedy));
            }
        },
    })
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

/// The level of what its programs write to standard error.
fn stderr_level(key: &str, raw: &RawPool, check: &Check<'_>) -> Result<Level> {
    let Some(level) = &raw.stderr_level else {
        return Ok(Level::Warn);
    };
    let levels = ["error", "warn", "info", "debug", "trace"];
    let level = check.choice(key, level, &levels)?;
    Ok(level
        .parse()
        .expect("each of the listed levels is one of log's"))
}

/// How many programs the server has of the pool.
fn processes(key: &str, raw: &RawPool, check: &Check<'_>) -> Result<usize> {
    match &raw.processes {
        None => check.integer(key, None, 1, PROCESSES, ""),
        Some(Count::Number(number)) => {
            check.integer(key, Some(*number), 1, PROCESSES, "or \"auto\"")
        }
        Some(Count::Auto) => Ok(check.here.cpus.clamp(1, 1024)),
    }
}

/// A relative path in the arguments is the program's to resolve, by its directory. Where it is
/// not there, but beside the file that names it, that is most likely what was meant.
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
