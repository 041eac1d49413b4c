//! What the allocator keeps for itself (mallopt(3)), nothing where it is not glibc's; and whom the
//! kernel ends when there is no memory left.

#![allow(unsafe_code)]

/// Lets all threads of this process share so many arenas at most. Each one keeps what was freed in it
/// for its own threads: with one for each, a few large results lie about eight times. An operator who
/// has set MALLOC_ARENA_MAX knows better.
pub fn share_arenas(most: i32) {
    #[cfg(target_env = "gnu")]
    if std::env::var_os("MALLOC_ARENA_MAX").is_none() {
        // SAFETY: a number for the allocator, which takes its own lock.
        unsafe { nix::libc::mallopt(nix::libc::M_ARENA_MAX, most) };
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = most;
}

/// How many processes the kernel has ended for want of memory, the machine's or a group's, since it
/// was booted (oom_kill in /proc/vmstat, Linux 4.13). It is counted before the victim gets its
/// SIGKILL. `None` where that can't be read.
pub fn kills_for_want_of_it() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/vmstat").ok()?;
    let count = text
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))?;
    count.trim().parse().ok()
}
