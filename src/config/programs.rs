//! Resolves a program that is started for calls: its file and directory, its account, its environment and
//! its limits. Commands and pools have these keys in common.
//!
//! It reads the file system as the master sees it. A later change is reported when the program is started.

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
use super::units::ByteSize;
use super::variables;
use crate::error::Result;
use crate::sys::account::Account;

/// The directories in which a program without a path is looked for. Also its PATH, unless its environment
/// sets one.
pub const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const MIB: u64 = 1 << 20;

/// The user id and the group id of the workers.
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

/// Resolves the program of `command` with the other keys in the table `key`. `example` is a valid command,
/// for errors.
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

/// Returns the program's file, and its arguments as it gets them.
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
            return error("an argument can't have a NUL byte".into(), "remove it");
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
            let problem = format!("there is no program {name:?} in {path}");
            return error(
                problem,
                &one_by_one(command, "install it, or give its path"),
            );
        };
        // The path instead of the name, because Python and others find their own files by it.
        arguments[0] = found.to_string_lossy().into_owned();
        found
    };
    if check.here.has_served {
        return Ok((program, arguments));
    }
    if !program.exists() {
        let problem = format!("there is no program {}", program.display());
        return error(
            problem,
            &one_by_one(command, "install it, or correct the path"),
        );
    }
    if program.is_dir() {
        let problem = format!("{} is a directory", program.display());
        return error(problem, "name a program in it");
    }
    if !is_executable(&program) {
        let problem = format!("{} is not executable", program.display());
        return error(
            problem,
            "make it executable with chmod +x, or name another one",
        );
    }
    if let Some(problem) = wrong_script(&program) {
        let problem = format!("{} {problem}", program.display());
        let remedy = "begin the script with a #! line, such as #!/bin/sh, or put the interpreter before the script in command";
        return error(problem, remedy);
    }
    Ok((program, arguments))
}

/// Returns how to write a command whose first text has a program and its arguments, else `otherwise`.
fn one_by_one(command: &[String], otherwise: &str) -> String {
    let name = command.first().map_or("", String::as_str);
    let words = name.split_whitespace();
    let all: Vec<&str> = words
        .chain(command.iter().skip(1).map(String::as_str))
        .collect();
    match all.len() > command.len() {
        true => format!("no shell splits it: write {all:?}"),
        false => otherwise.to_owned(),
    }
}

/// Returns whether anybody may execute it. Whether the workers may is known at the start of the program.
fn is_executable(path: &Path) -> bool {
    let any_x = |file: std::fs::Metadata| file.is_file() && file.permissions().mode() & 0o111 != 0;
    path.metadata().is_ok_and(any_x)
}

/// Returns what is wrong with a script's first line, which names its interpreter (execve(2)). If the check is not
/// possible, there is no error: the file cannot be read, or the system may run this kind of file (binfmt_misc).
fn wrong_script(path: &Path) -> Option<String> {
    let mut head = Vec::new();
    File::open(path)
        .and_then(|file| file.take(256).read_to_end(&mut head))
        .ok()?;
    let Some(line) = head.strip_prefix(b"#!") else {
        let is_text = !head.contains(&0) && !head.starts_with(b"\x7fELF");
        let known = !is_text || knows_more_kinds();
        return (!known).then(|| "is a script without a #! line".into());
    };
    let line = line.split(|&byte| byte == b'\n').next()?;
    let mut words = line.split(|byte| b" \t\0".contains(byte));
    let interpreter = words.find(|word| !word.is_empty()).unwrap_or_default();
    let file = Path::new(OsStr::from_bytes(interpreter));
    let is_there = match file.metadata() {
        Err(error) => error.kind() == ErrorKind::PermissionDenied,
        Ok(_) => is_executable(file),
    };
    // A relative path is resolved in the directory in which the program runs.
    if is_there || file.is_relative() && !interpreter.is_empty() {
        return None;
    }
    let name = interpreter.escape_ascii();
    Some(format!(
        "is a script for \"{name}\", which is not a program"
    ))
}

/// Returns whether this system runs other kinds of files (binfmt_misc): there is an entry beside the two
/// that always exist.
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

/// Returns the account of a command.
fn account(key: &str, keys: &Keys<'_>, check: &Check<'_>, workers: Ids) -> Result<Option<Account>> {
    let Some(account) = check.account(key, keys.user.as_ref(), keys.group.as_ref())? else {
        return Ok(None);
    };
    // The account of the workers is kept too, because the file may name it.
    if workers.0 != 0 && (account.uid, account.gid) != workers {
        let problem = format!(
            "workers run as uid {}, gid {}, and only workers that run as root can run a program as {}:{}",
            workers.0, workers.1, account.name, account.group
        );
        let remedy = "remove it, or start as root with no user at the top of the file";
        return Err(check.places.error(&join(key, "user"), problem, remedy));
    }
    Ok(Some(account))
}

fn rlimits(key: &str, raw: &RawRlimits, check: &Check<'_>) -> Result<RlimitsConfig> {
    const SECOND: Duration = Duration::from_secs(1);
    let integer = |name: &str, value: Option<i64>, least: i64, most: i64| {
        let key = join(key, name);
        let value = value.map(|value| check.integer(&key, value, least..=most, ""));
        value.transpose()
    };
    let cpu_key = join(key, "cpu");
    let cpu = match raw.cpu {
        None => None,
        Some(cpu) => {
            let cpu = check.duration(&cpu_key, cpu, SECOND)?;
            // The kernel counts whole seconds, and the limit must not be shorter than configured.
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
