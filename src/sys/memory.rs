//! Limits the allocator's arenas (mallopt(3), glibc only), and reads the memory limit and the number of
//! out-of-memory kills.

#![allow(unsafe_code)]

use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::sysinfo::sysinfo;

/// Limits the number of malloc arenas that the threads of this process share. An arena keeps freed memory
/// for its own threads. With one arena per thread, a few large results use about eight times their
/// memory. If the operator has set MALLOC_ARENA_MAX, that setting is kept.
pub fn limit_malloc_arenas(most: i32) {
    #[cfg(target_env = "gnu")]
    if std::env::var_os("MALLOC_ARENA_MAX").is_none() {
        // SAFETY: passes a number to the allocator, which takes its own lock.
        unsafe { nix::libc::mallopt(nix::libc::M_ARENA_MAX, most) };
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = most;
}

/// Maps zeroed memory that stays for the life of this process. A page needs memory from its first use on.
///
/// # Errors
/// If there is not enough memory.
pub fn zeroed(length: NonZeroUsize) -> io::Result<&'static mut [u8]> {
    let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: the kernel chooses the address of the new mapping, so it overlaps no other memory.
    let start = unsafe { mmap_anonymous(None, length, rights, MapFlags::MAP_PRIVATE) }?;
    // SAFETY: a new, zeroed mapping of that length, never unmapped, and returned only once.
    Ok(unsafe { std::slice::from_raw_parts_mut(start.as_ptr().cast(), length.get()) })
}

/// Returns how many bytes of memory this process may use: the machine's memory, or the limit of its
/// control groups (memory.max, cgroups(7)) if that is lower. Returns 1 GiB if nothing can be read.
pub fn memory_limit() -> u64 {
    // A service manager may hide /proc/meminfo (ProcSubset=pid). In some containers only that file has their limit.
    let machine = read_machine().or_else(|| Some(sysinfo().ok()?.ram_total()));
    let machine = machine.unwrap_or(1 << 30);
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    group_files(&groups, ["memory.max", "memory.limit_in_bytes"])
        .filter_map(|file| std::fs::read_to_string(file).ok()?.trim().parse().ok())
        .fold(machine, u64::min)
}

/// Reads MemTotal of /proc/meminfo (proc_meminfo(5)).
fn read_machine() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

/// Returns a file of each group in /proc/self/cgroup that controls memory, and of their parent groups, the inner ones
/// first. The two names are those in version 2 and 1 of control groups. A container sees its own group as the outermost
/// one.
fn group_files(groups: &str, [file, old_file]: [&'static str; 2]) -> impl Iterator<Item = PathBuf> {
    groups.lines().flat_map(move |line| {
        let mut parts = line.splitn(3, ':');
        let (hierarchy, controllers) = (parts.next(), parts.next().unwrap_or_default());
        let (root, file) = match hierarchy {
            Some("0") => ("/sys/fs/cgroup", file),
            _ if controllers.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", old_file)
            }
            _ => return Vec::new(),
        };
        let path = parts.next().unwrap_or("/");
        let around = Path::new(path).ancestors();
        around
            .map(|group| {
                let inside = group.strip_prefix("/").unwrap_or(group);
                Path::new(root).join(inside).join(file)
            })
            .collect()
    })
}

/// Returns how many processes the kernel has killed because memory ran out: since boot, on the machine or in a group
/// (oom_kill in /proc/vmstat, Linux 4.13); or, if a service manager hides that file, in the own group (memory.events).
/// The kernel counts a process before it sends SIGKILL. Returns `None` if the count cannot be read.
pub fn oom_kill_count() -> Option<u64> {
    let count = |file: &Path| {
        let text = std::fs::read_to_string(file).ok()?;
        let mut lines = text.lines();
        let count = lines.find_map(|line| line.strip_prefix("oom_kill "))?;
        count.trim().parse().ok()
    };
    count(Path::new("/proc/vmstat")).or_else(|| {
        let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let mut files = group_files(&groups, ["memory.events", "memory.oom_control"]);
        files.find_map(|file| count(&file))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_of_all_parent_groups_count() {
        let files = |groups: &str| -> Vec<String> {
            group_files(groups, ["memory.max", "memory.limit_in_bytes"])
                .map(|file| file.display().to_string())
                .collect()
        };
        assert_eq!(
            files("0::/system.slice/x.service\n"),
            [
                "/sys/fs/cgroup/system.slice/x.service/memory.max",
                "/sys/fs/cgroup/system.slice/memory.max",
                "/sys/fs/cgroup/memory.max",
            ]
        );
        assert_eq!(
            files("5:cpu:/a\n4:hugetlb,memory:/a\n"),
            [
                "/sys/fs/cgroup/memory/a/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            ]
        );
        assert!(memory_limit() > 1 << 20);
        let machine = read_machine().unwrap();
        assert!(sysinfo().unwrap().ram_total() >= machine - machine / 10);
    }
}
