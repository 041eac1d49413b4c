//! Drops root privileges for good, and proves it.
//!
//! The order matters: supplementary groups, bounding set, group, user, then the proof that root cannot be
//! regained, then the other capability sets, then no_new_privs. If a step fails, the caller must exit, because
//! a partial drop is not safe.

#![allow(unsafe_code)]

use std::io;

use nix::errno::Errno;
use nix::libc;
use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};

use super::account::Account;

/// Becomes `account`. If this process already is that user and not root, it only empties its capability sets and sets
/// no_new_privs.
///
/// # Errors
/// The error of the system call that failed, or that root could be regained.
pub fn drop_to(account: &Account) -> io::Result<()> {
    let (user, group) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    if geteuid().is_root() {
        let groups: Vec<Gid> = account
            .groups
            .iter()
            .map(|&gid| Gid::from_raw(gid))
            .collect();
        setgroups(&groups)?;
        // It needs CAP_SETPCAP, so do it before the change of user.
        drop_bounding_set()?;
        setresgid(group, group, group)?;
        setresuid(user, user, user)?;
    } else if geteuid() != user {
        return Err(Errno::EPERM.into());
    }
    if !user.is_root() {
        let back = setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0));
        if back.is_ok() || geteuid() != user {
            return Err(io::Error::other(
                "root could be regained after it was dropped",
            ));
        }
    }
    if !user.is_root() {
        drop_inheritable()?;
    }
    nix::sys::prctl::set_no_new_privs()?;
    Ok(())
}

/// Empties the inheritable, permitted and effective sets, because a change of user keeps parts of them
/// (capset(2)).
fn drop_inheritable() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    // _LINUX_CAPABILITY_VERSION_3; each of its three sets consists of two words.
    let header = Header {
        version: 0x2008_0522,
        pid: 0,
    };
    let sets = [0_u32; 6];
    // SAFETY: both pointers are to live values with the layout of version 3.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// Removes every capability from the bounding set and the ambient set (capabilities(7)).
fn drop_bounding_set() -> io::Result<()> {
    for capability in 0..64 {
        // SAFETY: prctl takes plain numbers here.
        let done = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if done != 0 {
            match Errno::last() {
                // The first number that this kernel does not know.
                Errno::EINVAL => break,
                error => return Err(error.into()),
            }
        }
    }
    // SAFETY: as above. Kernels before 4.3 have no ambient set, so the error does not matter.
    unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        )
    };
    Ok(())
}
