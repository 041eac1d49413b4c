//! Detaching from the terminal, and telling the launching shell how it went.
//!
//! The daemonize crate does the detaching alone (fork, setsid, fork); pid file, privileges and
//! umask are handled elsewhere. The launcher waits on a pipe: it leaves with 0 when the master
//! says that every worker is ready, else with the master's own sentence and exit code, and a
//! master that dies without a word is an error too.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use nix::sys::signal::Signal;

use super::{process, signal};

/// The exit code for what the system refuses (sysexits(3head), EX_OSERR).
const OS_ERROR: u8 = 71;

/// The daemon's end of the pipe to the launching shell.
#[derive(Debug)]
pub struct Launcher(PipeWriter);

/// Which side of the detaching this is.
#[derive(Debug)]
pub enum Detached {
    /// The launching process, with what the daemon said: an exit code, and its sentence where
    /// that is not 0. `None`: it ended without a word.
    Launcher(Option<(u8, String)>),
    /// The daemon, in a session of its own, in `/`, with its standard streams on /dev/null.
    Daemon(Launcher),
}

/// Detaches. In the launching process this returns when the daemon has said how it went.
///
/// # Errors
/// When there is no descriptor or no process to be had.
///
/// # Panics
/// When this process has more than one thread, as `process::fork` does.
pub fn detach() -> io::Result<Detached> {
    let (reader, writer) = io::pipe()?;
    // Ignored by whoever started us, it would reap the first child before it is waited for.
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
            // Half detached: the launcher has to say it, and this process is nobody's.
            Launcher(writer).failed(OS_ERROR, &format!("detach from the terminal: {error}"));
            process::exit_now(i32::from(OS_ERROR));
        }
    }
}

/// Waits for the daemon's word: an exit code, then its sentence.
fn outcome(mut reader: PipeReader) -> io::Result<Option<(u8, String)>> {
    let mut word = Vec::new();
    reader.read_to_end(&mut word)?;
    Ok(word
        .split_first()
        .map(|(&code, sentence)| (code, String::from_utf8_lossy(sentence).into_owned())))
}

impl Launcher {
    /// Its descriptor, for a list of what to keep.
    pub fn raw_descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Every worker is ready: the launching shell may go on.
    pub fn ready(mut self) {
        let _ = self.0.write_all(&[0]);
    }

    /// The start has failed: the exit code, which is not 0, and why.
    pub fn failed(mut self, code: u8, sentence: &str) {
        let word = [&[code], sentence.as_bytes()].concat();
        let _ = self.0.write_all(&word);
    }
}
