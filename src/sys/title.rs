//! Sets the title of a process in `ps`: the argv area for the long form, and the 15-character comm.
//!
//! The kernel shows the memory between arg_start and env_end (proc_pid_cmdline(5)). The environment
//! behind the arguments is moved to the heap, so a title may be longer than the command line. It never
//! fails: if /proc does not give the area, only comm is set.

#![allow(unsafe_code)]

use std::env;
use std::ffi::CString;
use std::fs;

/// The memory that holds the title.
#[derive(Debug, Clone, Copy)]
pub struct TitleArea {
    start: usize,
    end: usize,
}

impl TitleArea {
    /// Finds the area and moves the environment out of it. Call it once, early. Returns `None` if /proc
    /// does not give the area.
    ///
    /// # Safety
    /// The process must have one thread, because the environment is rewritten and another thread may read
    /// it (setenv(3)).
    pub unsafe fn claim() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // The name in parentheses may contain any bytes; count the fields behind it (proc_pid_stat(5)).
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<usize>().ok();
        let (start, arguments_end) = (field(48)?, field(49)?);
        let (environment, end) = (field(50)?, field(51)?);
        if start == 0 || arguments_end <= start + 1 {
            return None;
        }
        let variables: Vec<_> = env::vars_os().collect();
        for (name, value) in &variables {
            // A variable with such a name cannot be set or looked up.
            if name.is_empty() || name.as_encoded_bytes().contains(&b'=') {
                continue;
            }
            // SAFETY: the caller promises that there is one thread.
            unsafe {
                // glibc keeps the old string if the value does not change, so remove the variable first.
                env::remove_var(name);
                env::set_var(name, value);
            }
        }
        Some(TitleArea {
            start,
            end: if environment == arguments_end {
                end.max(arguments_end)
            } else {
                arguments_end
            },
        })
    }

    /// Writes `title` into the argv area, cut to its size.
    pub fn set(self, title: &str) {
        let room = self.end - self.start;
        let length = title.len().min(room - 1);
        // SAFETY: start to end is the writable memory of this process's arguments and environment.
        // `claim` moved the environment. std::env::args() reads the arguments here. So this crate reads
        // them only before the first title, and `Server::run` documents that handlers must not read them.
        // The last byte stays 0, so even such a read ends within the area.
        let area = unsafe { std::slice::from_raw_parts_mut(self.start as *mut u8, room) };
        area.fill(0);
        // A zero byte behind the title tells the kernel that the arguments end there.
        area[..length].copy_from_slice(&title.as_bytes()[..length]);
    }
}

/// The bytes of comm without its NUL (PR_SET_NAME(2const)).
const COMM: usize = 15;

/// Sets comm, which `ps -e`, `top` and `pgrep` show, to the program's name and its role. The name is cut
/// if both do not fit.
pub fn set_comm(program: &str, role: &str) {
    if let Ok(name) = CString::new(comm(program, role)) {
        let _ = nix::sys::prctl::set_name(&name);
    }
}

fn comm(program: &str, role: &str) -> Vec<u8> {
    let room = COMM.saturating_sub(role.len() + 1);
    let program = program.bytes().filter(|&byte| byte != 0).take(room);
    program.chain([b' ']).chain(role.bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_and_never_the_role() {
        assert_eq!(comm("preforkd", "worker"), b"preforkd worker");
        assert_eq!(comm("parallel_sum", "keeper"), b"parallel keeper");
        assert_eq!(comm("a\0b", "master"), b"ab master");
    }
}
