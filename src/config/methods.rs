//! Resolves the methods: those of the file, those that the program has registered, and `ping`.
//!
//! A name has one handler: a builtin, a command, a pool or a function. A function that is not in the file
//! has the defaults. No method can run longer than a drain waits for it. `slow` of a method is refused without
//! `[slow-log]`, because it would have no effect.

use std::collections::BTreeMap;
use std::time::Duration;

use super::check::{Check, KeyValue, MILLISECOND};
use super::commands;
use super::pools;
use super::programs::Ids;
use super::raw::{Raw, RawMethod};
use super::remedies::nearest;
use super::settings::{
    Builtin, LimitsConfig, MethodConfig, MethodKind, PoolConfig, SlowLogConfig, WorkersConfig,
};
use super::source_map::join;
use super::units::DurationValue;
use crate::error::{Error, Result};
use crate::protocol::call::is_reserved;

type Pools = BTreeMap<String, PoolConfig>;

/// The longest name of a method, in bytes.
const NAME_MAX: usize = 128;

/// Returns all methods by name.
pub(super) fn resolve(
    raw: &Raw,
    check: &Check<'_>,
    (workers, ids): (&WorkersConfig, Ids),
    (limits, pools): (&LimitsConfig, &Pools),
) -> Result<BTreeMap<String, MethodConfig>> {
    let functions = &check.overrides.functions;
    for name in functions {
        let problem = match name.as_str() {
            "ping" => Err("it is the name of a builtin".to_owned()),
            _ => check_name(name),
        };
        problem.map_err(|problem| {
            Error::Usage(format!(
                "this program registers a method {name:?}: {problem}; register it under another \
                 name"
            ))
        })?;
    }
    let mut methods = BTreeMap::new();
    for (name, raw) in &raw.methods {
        let key = join("methods", name);
        check_name(name)
            .map_err(|problem| check.places.error(&key, problem, "give it another name"))?;
        methods.insert(
            name.clone(),
            method(name, &key, raw, check, (limits, (pools, ids)))?,
        );
    }
    let with_defaults = |kind| MethodConfig {
        kind,
        timeout: limits.timeout,
        concurrency: 0,
        rate: 0,
        slow: None,
        kills_abandoned: false,
    };
    for name in functions {
        let entry = methods.entry(name.clone());
        entry.or_insert_with(|| with_defaults(MethodKind::Function));
    }
    let ping = methods.entry("ping".to_owned());
    ping.or_insert_with(|| with_defaults(MethodKind::Builtin(Builtin::Ping)));
    for (name, method) in &methods {
        fits_into_a_drain(name, method, check, workers)?;
    }
    Ok(methods)
}

/// Refuses a name that the protocol or a log line would make ambiguous.
fn check_name(name: &str) -> std::result::Result<(), String> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-/:".contains(&byte);
    if name.is_empty() || name.len() > NAME_MAX {
        Err(format!(
            "a method's name has 1 to {NAME_MAX} bytes, and this one {}",
            name.len()
        ))
    } else if !name.bytes().all(good) {
        Err("a method's name is made of letters, digits and _ . - / :".to_owned())
    } else if is_reserved(name) {
        Err("names that begin with rpc. belong to the protocol".to_owned())
    } else if name == "_OTHER" {
        Err("metrics count the calls of all other methods under that name".to_owned())
    } else if name == "error" {
        Err("every error answer has the name `error`".to_owned())
    } else {
        Ok(())
    }
}

fn method(
    name: &str,
    key: &str,
    raw: &RawMethod,
    check: &Check<'_>,
    (limits, programs): (&LimitsConfig, (&Pools, Ids)),
) -> Result<MethodConfig> {
    // The handler comes last, so that `check` also reports errors of the other keys.
    let timeout = raw.timeout.unwrap_or(DurationValue(limits.timeout));
    Ok(MethodConfig {
        timeout: check.duration(&join(key, "timeout"), timeout, MILLISECOND)?,
        concurrency: raw.concurrency.value(check, &join(key, "concurrency"))?,
        rate: raw.rate.value(check, &join(key, "rate"))?,
        // `slow_log` sets it, because it needs its table.
        slow: None,
        kills_abandoned: kills_abandoned(key, raw, check, programs.0)?,
        kind: kind(name, key, raw, check, programs)?,
    })
}

/// Returns whether a program is killed as soon as its call of this method is abandoned.
fn kills_abandoned(key: &str, raw: &RawMethod, check: &Check<'_>, pools: &Pools) -> Result<bool> {
    let pool = raw.pool.as_ref().and_then(|name| pools.get(name));
    match (pool, &raw.when_abandoned) {
        (Some(pool), Some(word)) => {
            pools::kills_abandoned(&join(key, "when-abandoned"), word, pool.concurrency, check)
        }
        (Some(pool), None) => Ok(pool.kills_abandoned),
        (None, Some(_)) if raw.pool.is_none() => Err(check.places.error(
            &join(key, "when-abandoned"),
            "only a method with pool has this key",
            "remove it, or set pool",
        )),
        // The check of `kind` refuses a pool that does not exist.
        (None, _) => Ok(false),
    }
}

fn kind(
    name: &str,
    key: &str,
    raw: &RawMethod,
    check: &Check<'_>,
    (pools, ids): (&Pools, Ids),
) -> Result<MethodKind> {
    let is_function = check.overrides.functions.contains(name);
    let builtin_key = join(key, "builtin");
    let by_program = [
        ("command", raw.command.is_some()),
        ("pool", raw.pool.is_some()),
    ];
    if let Some((word, _)) = by_program.iter().find(|(_, is_set)| *is_set) {
        let (problem, remedy) = match &raw.builtin {
            _ if raw.command.is_some() && raw.pool.is_some() => (
                "the method has a pool as well",
                "take out one of the two".to_owned(),
            ),
            Some(_) => (
                "builtin answers this method already",
                "take out one of the two".to_owned(),
            ),
            None if is_function => (
                "the program registers a function of that name",
                format!("take {word} out, or rename one"),
            ),
            None if name == "ping" => (
                "`ping` always answers pong",
                "give it another name".to_owned(),
            ),
            None => return by_program_kind(key, raw, check, (pools, ids)),
        };
        return Err(check.places.error(&join(key, word), problem, &remedy));
    }
    if let Some(set) = raw.of_commands() {
        let problem = "only a method with command has this key";
        return Err(check
            .places
            .error(&join(key, set), problem, "remove it, or set command"));
    }
    if raw.builtin.is_none() {
        return if is_function {
            Ok(MethodKind::Function)
        } else if name == "ping" {
            Ok(MethodKind::Builtin(Builtin::Ping))
        } else {
            Err(check.places.error(
                key,
                "nothing answers this method",
                "add command = [\"PROGRAM\", …], pool = \"NAME\", builtin = \"echo\", \"ping\" or \"sleep\", or register a function \
                 of that name",
            ))
        };
    };
    if is_function {
        let problem = "the program registers a function of that name";
        return Err(check
            .places
            .error(&builtin_key, problem, "take builtin out, or rename one"));
    }
    let builtin = check.word(&builtin_key, raw.builtin.as_ref(), Builtin::Ping)?;
    if name == "ping" && builtin != Builtin::Ping {
        let problem = "`ping` always answers pong";
        return Err(check
            .places
            .error(&builtin_key, problem, "give it another name"));
    }
    Ok(MethodKind::Builtin(builtin))
}

/// Resolves a method with a command or a pool.
fn by_program_kind(
    key: &str,
    raw: &RawMethod,
    check: &Check<'_>,
    (pools, ids): (&Pools, Ids),
) -> Result<MethodKind> {
    if let Some(command) = &raw.command {
        let command = commands::resolve(key, command, raw, check, ids)?;
        return Ok(MethodKind::Command(Box::new(command)));
    }
    let name = raw.pool.as_deref().unwrap_or_default();
    if let Some(set) = raw.of_commands() {
        return Err(check.places.error(
            &join(key, set),
            "only a method with command has this key",
            format!("remove it, or set it in [pools.{name}] where that has it"),
        ));
    }
    if pools.contains_key(name) {
        return Ok(MethodKind::Pool(name.to_owned()));
    }
    let names: Vec<&str> = pools.keys().map(String::as_str).collect();
    let remedy = match nearest(name, &names) {
        Some(near) => format!("did you mean {near:?}?"),
        None => "add [pools.NAME] with its command".to_owned(),
    };
    let problem = format!("there is no pool {name:?}");
    Err(check.places.error(&join(key, "pool"), problem, &remedy))
}

/// Resolves `[slow-log]`, and sets the thresholds of methods.
pub(super) fn slow_log(
    check: &Check<'_>,
    raw: &Raw,
    methods: &mut BTreeMap<String, MethodConfig>,
) -> Result<Option<SlowLogConfig>> {
    let table = match &raw.slow_log {
        None => None,
        Some(table) => Some(SlowLogConfig {
            threshold: (table.threshold).value(check, "slow-log.threshold")?,
            params: table.params.value(check, "slow-log.params")?,
            lines: table.lines.value(check, "slow-log.lines")?,
        }),
    };
    for (name, raw) in &raw.methods {
        let slow = own_threshold(check, &join(&join("methods", name), "slow"), raw)?;
        if let Some(method) = methods.get_mut(name) {
            method.slow = slow;
        }
        if slow.is_some() && table.is_none() {
            return Err(check.places.error(
                &join(&join("methods", name), "slow"),
                "there is no [slow-log], so it has no effect",
                "add the table [slow-log], or take slow out",
            ));
        }
    }
    Ok(table)
}

fn own_threshold(check: &Check<'_>, key: &str, raw: &RawMethod) -> Result<Option<Duration>> {
    let slow = raw.slow.map(|slow| check.duration(key, slow, MILLISECOND));
    slow.transpose()
}

/// Refuses a timeout that is longer than the drain, because each reload would cut calls. The error is at
/// the key that is set: the method's timeout or the default one.
fn fits_into_a_drain(
    name: &str,
    method: &MethodConfig,
    check: &Check<'_>,
    workers: &WorkersConfig,
) -> Result<()> {
    let drain = DurationValue(workers.drain_timeout);
    if method.timeout <= drain.0 {
        return Ok(());
    }
    let timeout = DurationValue(method.timeout);
    let own = join(&join("methods", name), "timeout");
    let key = if check.places.is_set(&own) {
        own.as_str()
    } else {
        "limits.timeout"
    };
    Err(check.places.error(
        key,
        format!(
            "{timeout} is longer than workers.drain-timeout ({drain}), so a reload would cut calls"
        ),
        format!("give {drain} at most, or raise workers.drain-timeout"),
    ))
}
