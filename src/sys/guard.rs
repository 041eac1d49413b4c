//! Guards programs before they are executed: no_new_privs and a Landlock domain (landlock(7)).
//!
//! The kernel refuses a process in such a domain access to processes outside it: ptrace(2),
//! process_vm_readv(2), and mem, environ, maps and fd below /proc/PID. That applies to root too, but with
//! CAP_PERFMON environ and maps can be read (seen on Linux 6.18). Since Linux 6.12 it also cannot send them
//! signals. Processes outside can still access processes in the domain. In a domain, setuid files, file
//! capabilities and mount(2) have no effect.
//! Access to files does not change: a domain has to handle at least one right; this one handles two and
//! grants both. Fails with the system's error. `missing` says whether the kernel supports it.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;

/// LANDLOCK_ACCESS_FS_MAKE_BLOCK. Few programs use this right, so checking it costs nothing.
const MAKE_BLOCK: u64 = 1 << 11;
/// LANDLOCK_ACCESS_FS_REFER. A domain that does not grant it refuses every rename and link across
/// directories with EXDEV, whether it handles this right or not.
const REFER: u64 = 1 << 13;
/// LANDLOCK_CREATE_RULESET_VERSION.
const VERSION: u32 = 1;
/// The first version that knows `REFER` (Linux 5.19).
const LEAST_VERSION: libc::c_long = 2;
/// LANDLOCK_SCOPE_SIGNAL. The process can send signals only to its own domain and to those below.
const SCOPE_SIGNAL: u64 = 1 << 1;
/// The first version that knows it (Linux 6.12).
const SCOPE_VERSION: libc::c_long = 6;
const PATH_BENEATH: u32 = 1;

/// struct landlock_ruleset_attr of version 6. An older kernel accepts unknown fields that are zero.
#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

#[repr(C, packed)]
struct PathBeneathAttr {
    allowed_access: u64,
    parent_fd: i32,
}

/// Returns why no program can be guarded on this system; `None` if programs can be.
pub fn missing() -> Option<&'static str> {
    match version() {
        Err(Errno::ENOSYS) => Some("this kernel has no Landlock"),
        Err(Errno::EOPNOTSUPP) => Some("Landlock is off in this kernel (lsm= at boot)"),
        Err(Errno::EPERM) => Some("a system call filter refuses landlock_create_ruleset"),
        Ok(..LEAST_VERSION) => Some("this kernel's Landlock refuses renames across directories"),
        // Any other error makes the start of a program fail, and is reported there.
        Ok(_) | Err(_) => None,
    }
}

fn version() -> Result<libc::c_long, Errno> {
    let none = ptr::null::<RulesetAttr>();
    // SAFETY: with this flag the kernel does not use the pointer and creates no descriptor.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION)
    })
}

/// Returns the rule set for `enter`, or `None` if no program can be guarded.
///
/// It is created once per process and reused. So a start takes half the time, and cannot fail later
/// because no descriptor is left. Its number is above 3, so the child does not overwrite it when it sets
/// up its descriptors.
///
/// # Errors
/// If it could not be created; the next call tries again.
pub(super) fn ruleset() -> Result<Option<RawFd>, Errno> {
    static RULESET: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let ruleset = if let Some(known) = RULESET.get() {
        known
    } else {
        let created = match missing() {
            Some(_) => None,
            None => Some(create()?),
        };
        RULESET.get_or_init(|| created)
    };
    Ok(ruleset.as_ref().map(OwnedFd::as_raw_fd))
}

fn create() -> Result<OwnedFd, Errno> {
    let handled = RulesetAttr {
        handled_access_fs: MAKE_BLOCK | REFER,
        handled_access_net: 0,
        scoped: if version()? >= SCOPE_VERSION {
            SCOPE_SIGNAL
        } else {
            0
        },
    };
    let size = size_of::<RulesetAttr>();
    // SAFETY: the pointer is to a live structure of the given size.
    let fd = Errno::result(unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const handled,
            size,
            0_u32,
        )
    })?;
    // SAFETY: the kernel has just created this descriptor (with CLOEXEC), so it has no other owner.
    let low = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    // SAFETY: plain numbers; the call returns a new descriptor.
    let fd = Errno::result(unsafe { libc::fcntl(low.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 4) })?;
    // SAFETY: as above.
    let ruleset = unsafe { OwnedFd::from_raw_fd(fd) };
    let root = open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    let rule = PathBeneathAttr {
        allowed_access: MAKE_BLOCK | REFER,
        parent_fd: root.as_raw_fd(),
    };
    // SAFETY: both descriptors are open, and the pointer is to a live structure with the layout of that
    // rule.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            PATH_BENEATH,
            &raw const rule,
            0_u32,
        )
    })?;
    Ok(ruleset)
}

/// Puts the calling thread, and everything that it executes or starts, into a new domain. This cannot be
/// undone.
///
/// # Safety
/// Call it in a child between clone and exec. It makes two system calls and nothing else.
pub(super) unsafe fn enter(ruleset: RawFd) -> Result<(), Errno> {
    // SAFETY: plain numbers.
    unsafe {
        // This comes first: without it only CAP_SYS_ADMIN may enter a domain.
        Errno::result(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        Errno::result(libc::syscall(
            libc::SYS_landlock_restrict_self,
            ruleset,
            0_u32,
        ))?;
    }
    Ok(())
}

/// Puts the calling process, which has one thread, into a new domain for good. Does nothing where no
/// program can be guarded.
///
/// # Errors
/// If the system refuses it.
pub fn enter_here() -> std::io::Result<()> {
    if missing().is_some() {
        return Ok(());
    }
    let ruleset = create()?;
    // SAFETY: two system calls about this thread alone; it needs no exec after them.
    Ok(unsafe { enter(ruleset.as_raw_fd()) }?)
}

/// Returns whether setuid files and file capabilities already have no effect in this process.
pub fn has_no_new_privs() -> bool {
    nix::sys::prctl::get_no_new_privs().unwrap_or(false)
}

/// Returns whether the file has capabilities (capabilities(7)); `false` if that cannot be read.
pub fn has_file_capabilities(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    let name = c"security.capability";
    // SAFETY: two strings that end with NUL; with size zero the kernel writes nothing.
    let size = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), ptr::null_mut(), 0) };
    size > 0
}
