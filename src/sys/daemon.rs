//! Detaches from the terminal, and reports the result of the start to the launching shell.
//!
//! The daemonize crate only detaches (fork, setsid, fork). Pid file, privileges and umask are handled
//! elsewhere. The launcher waits on a pipe. If the master reports that every worker is ready, the
//! launcher exits with 0. If the start fails, it prints the master's error and exits with its exit code.
//! If the master dies without a report, that is an error too.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use nix::sys::signal::Signal;

use super::{process, signal};

/// The exit code for what the system refuses (sysexits(3head), EX_OSERR).
const OS_ERROR: u8 = 71;

/// The daemon's end of the pipe to the launching process.
#[derive(Debug)]
pub struct Launcher(PipeWriter);

/// The process in which `detach` returns.
#[derive(Debug)]
pub enum Detached {
    /// The launching process, with the daemon's report: an exit code, and an error message if the code is
    /// not 0. `None`: the daemon ended without a report.
    Launcher(Option<(u8, String)>),
    /// The daemon. It has its own session, its directory is `/`, and its standard streams are /dev/null.
    Daemon(Launcher),
}

/// Detaches. In the launching process it returns when the daemon has reported the result of the start.
///
/// # Errors
/// If no descriptor is left or no process can be created.
///
/// # Panics
/// If this process has more than one thread, as `process::fork` does.
pub fn detach() -> io::Result<Detached> {
    let (reader, writer) = io::pipe()?;
    // If SIGCHLD was ignored by the parent, the kernel would reap the first child before we can wait for
    // it.
    signal::default_action(Signal::SIGCHLD);
    let threads = process::thread_count();
    assert!(threads <= 1, "daemonize with {threads} threads alive");
    match daemonize::Daemonize::new().umask(0o022).execute() {
        daemonize::Outcome::Parent(Ok(_)) => {
            drop(writer);
            outcome(reader).map(Detached::Launcher)
        }
        daemonize::Outcome::Child(Ok(_)) => Ok(Detached::Daemon(Launcher(writer))),
        daemonize::Outcome::Parent(Err(error)) => Err(io::Error::other(error)),
        daemonize::Outcome::Child(Err(error)) => {
            // Detached halfway: the launcher must report the error, because no other process waits for
            // this one.
            Launcher(writer).failed(OS_ERROR, &format!("detach from the terminal: {error}"));
            process::exit_now(i32::from(OS_ERROR));
        }
    }
}

/// Waits for the daemon's report: an exit code, then a message.
fn outcome(mut reader: PipeReader) -> io::Result<Option<(u8, String)>> {
    let mut word = Vec::new();
    reader.read_to_end(&mut word)?;
    Ok(word
        .split_first()
        .map(|(&code, sentence)| (code, String::from_utf8_lossy(sentence).into_owned())))
}

impl Launcher {
    /// Returns the descriptor of the pipe, for a list of descriptors to keep.
    pub fn raw_descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Reports that every worker is ready, so the launching process exits with 0.
    pub fn ready(mut self) {
        let _ = self.0.write_all(&[0]);
    }

    /// Reports that the start has failed: a nonzero exit code and the reason.
    pub fn failed(mut self, code: u8, sentence: &str) {
        let word = [&[code], sentence.as_bytes()].concat();
        let _ = self.0.write_all(&word);
    }
}
