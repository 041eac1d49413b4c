//! Warns about programs that do not work with the guard, and about systems that cannot guard a program.
//!
//! It knows a program by its file name, so it does not see what a script starts. Nothing here fails.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::environment::Environment;
use super::programs::Ids;
use super::settings::{ProgramConfig, Settings};
use crate::sys::guard;

/// Programs that inspect processes which they did not start.
const INSPECTORS: [&str; 16] = [
    "austin",
    "fuser",
    "gcore",
    "gdb",
    "gdbserver",
    "jcmd",
    "jmap",
    "jstack",
    "lldb",
    "lsof",
    "ltrace",
    "nsenter",
    "perf",
    "py-spy",
    "rbspy",
    "strace",
];
/// Programs that mount file systems.
const MOUNTERS: [&str; 8] = [
    "bwrap",
    "crun",
    "mount",
    "podman",
    "runc",
    "systemd-nspawn",
    "umount",
    "unshare",
];
/// Programs that send signals to processes which they did not start.
const SENDERS: [&str; 3] = ["kill", "killall", "pkill"];
const SETUID: u32 = 0o4000;
const SETGID: u32 = 0o2000;

/// Returns the warnings about `settings`. `ids` are those of the workers.
pub(super) fn warnings(settings: &Settings, here: &Environment, ids: Ids) -> Vec<String> {
    let mut guarded = (settings.programs()).filter(|(_, _, program)| program.guard);
    if let Some(reason) = here.guard_missing {
        let text = || {
            format!(
                "commands, pools and isolated connections run without a guard: {reason}. They can read the memory \
                 of a worker that runs as the same user. Enable Landlock (Linux 5.19 or later; in a \
                 unit, allow the landlock_* system calls), or give each program a user of its own, \
                 or accept this with guard = false"
            )
        };
        let has_any = guarded.next().is_some() || settings.isolated().next().is_some();
        return has_any.then(text).into_iter().collect();
    }
    let is_privileged = !here.no_new_privs && settings.account.is_none();
    guarded
        .filter_map(|(table, name, program)| {
            let what = in_the_way(program, is_privileged, ids)?;
            Some(format!(
                "{}, the program of {table}.{name}, {what}; if it needs that, set guard = false \
                 there",
                program.file.display()
            ))
        })
        .collect()
}

/// Returns what the program is, and what the guard prevents. `is_privileged` says whether setuid files have
/// an effect in the workers.
fn in_the_way(program: &ProgramConfig, is_privileged: bool, ids: Ids) -> Option<String> {
    let name = program.file.file_name()?.to_str()?;
    if INSPECTORS.iter().any(|known| is_named(name, known)) {
        return Some(
            "looks into processes, and the guard hides those that it did not start".into(),
        );
    }
    if SENDERS.iter().any(|known| is_named(name, known)) {
        return Some(
            "sends signals, and since Linux 6.12 the guard refuses those to other services".into(),
        );
    }
    if MOUNTERS.iter().any(|known| is_named(name, known)) {
        return Some("mounts file systems, and the guard refuses that".into());
    }
    let account = program.account.as_ref();
    // A change of user sets no_new_privs in any case.
    let changes = account.is_some_and(|account| (account.uid, account.gid) != ids);
    if changes || !is_privileged {
        return None;
    }
    let kind = gains(&program.file, ids)?;
    Some(format!("{kind}, which has no effect in the guard"))
}

/// Returns whether this is `known`, possibly with a version: `lldb-19`, but not `gdb.exe`.
fn is_named(name: &str, known: &str) -> bool {
    name.strip_prefix(known).is_some_and(|rest| {
        let version = rest.strip_prefix('-').unwrap_or("x");
        rest.is_empty() || version.starts_with(|first: char| first.is_ascii_digit())
    })
}

/// Returns how the file gives a process more rights than these ids have.
fn gains(file: &Path, (uid, gid): Ids) -> Option<&'static str> {
    let metadata = file.metadata().ok()?;
    let mode = metadata.mode();
    if mode & SETUID != 0 && metadata.uid() != uid {
        Some("is a setuid file")
    } else if mode & SETGID != 0 && metadata.gid() != gid {
        Some("is a setgid file")
    } else if uid != 0 && guard::has_file_capabilities(file) {
        Some("has file capabilities")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_program_is_known_by_its_name_and_its_version() {
        for name in ["gdb", "gdb-14"] {
            assert!(is_named(name, "gdb"), "{name}");
        }
        for name in ["gdbm", "gdb-add-index", "gd", "mygdb"] {
            assert!(!is_named(name, "gdb"), "{name}");
        }
    }

    #[test]
    fn a_file_of_another_user_gives_rights_and_an_own_one_does_not() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        let metadata = file.path().metadata().unwrap();
        let own = (metadata.uid(), metadata.gid());
        let of = |mode, ids| {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(file.path(), permissions).unwrap();
            gains(file.path(), ids)
        };
        let other = (own.0 + 1, own.1 + 1);
        assert_eq!(of(0o755, other), None);
        assert_eq!(of(0o4755, own), None);
        assert_eq!(of(0o4755, other), Some("is a setuid file"));
        assert_eq!(of(0o2755, other), Some("is a setgid file"));
    }
}
