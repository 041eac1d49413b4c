//! Counts the instructions of other processes with perf_event_open(2).
//!
//! A virtual machine often has no such counter, and a system may refuse it. Then opening fails, and the
//! caller continues without it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{FromRawFd, RawFd};

use nix::libc;

use super::server::Stat;

const HARDWARE: u32 = 0;
const INSTRUCTIONS: u64 = 1;
/// Threads and processes that a counted thread starts are counted too.
const INHERIT: u64 = 1 << 1;
const EXCLUDE_KERNEL: u64 = 1 << 5;
const CLOEXEC: libc::c_ulong = 1 << 3;

/// `struct perf_event_attr` in its first version, which every kernel accepts.
#[repr(C)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    breakpoint_address: u64,
}

/// Running counters.
pub struct Instructions {
    counters: Vec<File>,
}

impl Instructions {
    /// Starts to count for all threads of these processes: also in the kernel if that is allowed,
    /// otherwise only in user space.
    pub fn of(processes: &[Stat]) -> io::Result<Self> {
        Self::with(processes, INHERIT).or_else(|error| match error.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => Self::with(processes, INHERIT | EXCLUDE_KERNEL),
            _ => Err(error),
        })
    }

    fn with(processes: &[Stat], flags: u64) -> io::Result<Self> {
        let mut counters = Vec::new();
        for process in processes {
            for thread in fs::read_dir(format!("/proc/{}/task", process.pid))? {
                let id = thread?.file_name().to_string_lossy().parse();
                counters.push(open(id.map_err(io::Error::other)?, flags)?);
            }
        }
        Ok(Instructions { counters })
    }

    /// Returns the number of instructions so far.
    pub fn count(&mut self) -> io::Result<u64> {
        let mut sum = 0;
        for counter in &mut self.counters {
            let mut bytes = [0; 8];
            counter.read_exact(&mut bytes)?;
            sum += u64::from_ne_bytes(bytes);
        }
        Ok(sum)
    }
}

fn open(thread: libc::pid_t, flags: u64) -> io::Result<File> {
    let attributes = Attributes {
        kind: HARDWARE,
        size: size_of::<Attributes>() as u32,
        config: INSTRUCTIONS,
        sample_period: 0,
        sample_type: 0,
        read_format: 0,
        flags,
        wakeup_events: 0,
        breakpoint_type: 0,
        breakpoint_address: 0,
    };
    let (any_cpu, no_group): (libc::c_int, RawFd) = (-1, -1);
    // SAFETY: the structure is as long as its `size` says, and lives during the call, which only reads
    // it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            thread,
            any_cpu,
            no_group,
            CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just returned this descriptor, so it has no other owner.
    Ok(unsafe { File::from_raw_fd(fd as RawFd) })
}
