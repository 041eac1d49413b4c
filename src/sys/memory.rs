//! What the allocator keeps for itself (mallopt(3)); nothing where it is not glibc's.

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
