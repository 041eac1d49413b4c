//! A program that is started for calls, and what can be known of it before: whether it and its
//! directory are there, whom it runs as, what its environment and its limits are. Commands and pools
//! have these keys in common.
//!
//! It looks at the file system as the master sees it. What changes afterwards is told when it is
//! started.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::check::Check;
use super::raw::{RawMethod, RawPool, RawRlimits};
use super::settings::{ProgramConfig, RlimitsConfig};
use super::source_map::join;
use super::units::{ByteSize, DurationValue};
use super::variables;
use crate::error::Result;
use crate::sys::account::{Account, AccountError};

/// Where a program is looked for that is a name and no path, and its PATH, unless its own environment has one.
pub const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const MIB: u64 = 1 << 20;

/// The user and the group that the workers have.
pub(super) type Ids = (u32, u32);

/// The keys that commands and pools have in common.
pub(super) struct Keys<'a> {
    environment: &'a Option<BTreeMap<String, String>>,
    environment_file: &'a Option<String>,
    directory: &'a Option<String>,
    user: &'a Option<String>,
    group: &'a Option<String>,
    rlimits: Option<&'a RawRlimits>,
    guard: Option<bool>,
}

macro_rules! keys_of {
    ($raw:ty) => {
        impl<'a> From<&'a $raw> for Keys<'a> {
            fn from(raw: &'a $raw) -> Self {
                Keys {
                    environment: &raw.environment,
                    environment_file: &raw.environment_file,
                    directory: &raw.directory,
                    user: &raw.user,
                    group: &raw.group,
                    rlimits: raw.rlimits.as_deref(),
                    guard: raw.guard,
                }
            }
        }
    };
}

keys_of!(RawMethod);
keys_of!(RawPool);

/// The program that `command` names, with what stands beside it in the table `key`; `example` is
/// a command that would do.
pub(super) fn resolve(
    key: &str,
    (command, example): (&[String], &str),
    keys: &Keys<'_>,
    check: &Check<'_>,
    workers: Ids,
) -> Result<ProgramConfig> {
    let environment = keys.environment.clone().unwrap_or_default();
    let variables = variables::resolve(key, environment, keys.environment_file.as_deref(), check)?;
    let directory = directory(&join(key, "directory"), keys, check)?;
    let rlimits = match keys.rlimits {
        Some(raw) => rlimits(&join(key, "rlimits"), raw, check)?,
        None => RlimitsConfig::default(),
    };
    let command_key = join(key, "command");
    let (file, arguments) = arguments(&command_key, (command, example), &variables.values, check)?;
    Ok(ProgramConfig {
        file,
        arguments,
        environment: variables.written,
        environment_file: variables.file,
        variables: variables.values,
        directory,
        account: account(key, keys, check, workers)?,
        rlimits,
        guard: keys.guard.unwrap_or(true),
    })
}

/// The program's file, and the arguments as it will see them.
fn arguments(
    key: &str,
    (command, example): (&[String], &str),
    environment: &BTreeMap<String, String>,
    check: &Check<'_>,
) -> Result<(PathBuf, Vec<String>)> {
    let error = |problem: String, remedy: &str| Err(check.places.error(key, problem, remedy));
    let Some(name) = command.first().filter(|name| !name.is_empty()) else {
        let remedy = format!("name it first, as in {example}");
        return error("there is no program in it".into(), &remedy);
    };
    for argument in command {
        if argument.contains('\0') {
            return error("an argument can't have a NUL byte".into(), "take it out");
        }
    }
    let mut arguments = command.to_vec();
    let program = if name.contains('/') {
        let path = check.beside(key, Path::new(name));
        arguments[0] = path.to_string_lossy().into_owned();
        path
    } else {
        let path = environment.get("PATH").map_or(SEARCH_PATH, String::as_str);
        let mut places = path.split(':').filter(|place| place.starts_with('/'));
        let Some(found) = places.find_map(|place| {
            let file = Path::new(place).join(name);
            is_executable(&file).then_some(file)
        }) else {
            return error(
                format!("there is no program {name:?} in {path}"),
                "install it, or give its path",
            );
        };
        // Not the name: Python and others find their own files by it.
        arguments[0] = found.to_string_lossy().into_owned();
        found
    };
    if check.here.has_served {
        return Ok((program, arguments));
    }
    if !program.exists() {
        let problem = format!("there is no program {}", program.display());
        return error(problem, "install it, or correct the path");
    }
    if program.is_dir() {
        let problem = format!("{} is a directory", program.display());
        return error(problem, "name a program in it");
    }
    if !is_executable(&program) {
        let problem = format!("{} is not executable", program.display());
        return error(problem, "make it so with chmod +x, or name another one");
    }
    if let Some(problem) = wrong_script(&program) {
        let problem = format!("{} {problem}", program.display());
        let remedy = "begin it with its interpreter, as in #!/bin/sh, or name that in front of it";
        return error(problem, remedy);
    }
    Ok((program, arguments))
}

/// Whether somebody may execute it. Who will is told by the system when he tries.
fn is_executable(path: &Path) -> bool {
    let any_x = |file: std::fs::Metadata| file.is_file() && file.permissions().mode() & 0o111 != 0;
    path.metadata().is_ok_and(any_x)
}

/// What is wrong with a script's first line, by which the kernel finds its interpreter (execve(2)). What can't be
/// known here is believed: what we may not look at, and what this system was taught to run.
fn wrong_script(path: &Path) -> Option<String> {
    let mut head = Vec::new();
    File::open(path)
        .and_then(|file| file.take(256).read_to_end(&mut head))
        .ok()?;
    let Some(line) = head.strip_prefix(b"#!") else {
        let is_text = !head.contains(&0) && !head.starts_with(b"\x7fELF");
        let known = !is_text || knows_more_kinds();
        return (!known).then(|| "is a script that does not say what it is for".into());
    };
    let line = line.split(|&byte| byte == b'\n').next()?;
    let mut words = line.split(|byte| b" \t\0".contains(byte));
    let interpreter = words.find(|word| !word.is_empty()).unwrap_or_default();
    let file = Path::new(OsStr::from_bytes(interpreter));
    let is_there = match file.metadata() {
        Err(error) => error.kind() == ErrorKind::PermissionDenied,
        Ok(_) => is_executable(file),
    };
    // A relative one is looked for in the directory that it will run in.
    if is_there || file.is_relative() && !interpreter.is_empty() {
        return None;
    }
    let name = interpreter.escape_ascii();
    Some(format!("is a script for \"{name}\", which is no program"))
}

/// Whether this system was taught to run more than programs and scripts (binfmt_misc): whatever has an entry
/// beside the two that are always there.
fn knows_more_kinds() -> bool {
    std::fs::read_dir("/proc/sys/fs/binfmt_misc").is_ok_and(|entries| entries.count() > 2)
}

fn directory(key: &str, keys: &Keys<'_>, check: &Check<'_>) -> Result<PathBuf> {
    let Some(text) = keys.directory else {
        return Ok("/".into());
    };
    let path = check.path(key, text)?;
    if path.is_dir() || check.here.has_served {
        return Ok(path);
    }
    let problem = format!("there is no directory {}", path.display());
    Err(check
        .places
        .error(key, problem, "create it, or name another one"))
}

/// Whom a command runs as.
fn account(key: &str, keys: &Keys<'_>, check: &Check<'_>, workers: Ids) -> Result<Option<Account>> {
    let (user_key, group_key) = (join(key, "user"), join(key, "group"));
    let Some(user) = keys.user else {
        return match keys.group {
            None => Ok(None),
            Some(_) => Err(check.places.error(
                &group_key,
                "it is set without a user",
                "set user beside it, or take it out",
            )),
        };
    };
    let account = Account::lookup(user, keys.group.as_deref()).map_err(|error| {
        let (key, remedy) = match error {
            AccountError::NoUser(_) => (&user_key, "create it, or name one that exists"),
            AccountError::NoGroup(_) => (&group_key, "create it, or name one that exists"),
            AccountError::GroupUnknown(_) => (&user_key, "set group beside it"),
            AccountError::System(_) => (&user_key, ""),
        };
        check.places.error(key, error.to_string(), remedy)
    })?;
    // Who the workers are already is kept as well: a reload can't change them, and the file may say so.
    if workers.0 != 0 && (account.uid, account.gid) != workers {
        let problem = format!(
            "workers run as uid {}, gid {}, and only root's can run a program as {}:{}",
            workers.0, workers.1, account.name, account.group
        );
        let remedy = "take it out, or start as root with no user at the top of the file";
        return Err(check.places.error(&user_key, problem, remedy));
    }
    Ok(Some(account))
}

fn rlimits(key: &str, raw: &RawRlimits, check: &Check<'_>) -> Result<RlimitsConfig> {
    const SECOND: Duration = Duration::from_secs(1);
    let integer = |name: &str, value: Option<i64>, least: i64, most: i64| {
        let key = join(key, name);
        let value = value.map(|value| check.integer(&key, Some(value), 0, least..=most, ""));
        value.transpose()
    };
    let cpu_key = join(key, "cpu");
    let cpu = match raw.cpu {
        None => None,
        Some(DurationValue(cpu)) => {
            let cpu = check.duration(&cpu_key, Some(DurationValue(cpu)), SECOND, SECOND)?;
            // The kernel counts whole seconds; less than was said would be a surprise.
            Some(Duration::from_secs(
                cpu.as_secs() + u64::from(cpu.subsec_nanos() > 0),
            ))
        }
    };
    let memory = raw.memory.map(|ByteSize(bytes)| bytes);
    if let Some(bytes) = memory.filter(|bytes| !(MIB..=i64::MAX as u64).contains(bytes)) {
        return Err(check.places.error(
            &join(key, "memory"),
            format!("{} is out of range", ByteSize(bytes)),
            "give 1MiB to less than 8EiB (no program starts with less, and no machine has more)",
        ));
    }
    Ok(RlimitsConfig {
        cpu,
        memory,
        files: integer("files", raw.files, 3, 1 << 20)?,
        processes: integer("processes", raw.processes, 1, 1 << 22)?,
    })
}
