//! The probe of an upgrade: the program that is installed now, started beside us, to see whether it
//! can take over.
//!
//! It gets what the master knows on its standard input and reads the configuration, as if it were
//! the next master; it says one line when it could, and its last lines are the reason when it could
//! not. Nothing is waited for: what it writes and its end are events of the master's loop. A probe
//! that hangs is killed at its deadline, and one whose master dies is killed by the kernel.

use std::ffi::{CStr, CString, OsStr};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::super::policy::event::{HumanDuration, Millis};
use super::start_params::StartParams;
use super::{PROBE_PASSED, VARIABLE};
use crate::error::{Error, Result};
use crate::sys::memory_file;
use crate::sys::process::{Exit, Pid};
use crate::sys::reexec;
use crate::sys::reexec::c_string;
use crate::sys::socket::nonblocking_pipe;
use crate::sys::spawn::{ChildProcess, ProcessLimits, SpawnTemplate, Stdio, spawn_dying_with_us};

/// What is kept of what it writes: its end.
const MAX_DEATH_RECORDS: usize = 4096;
/// Read from it at once; it may write without end, and we have other things to do.
const MOST_AT_ONCE: usize = 64 * 1024;
/// How many of its last lines tell why.
const LINES: usize = 10;

#[derive(Debug)]
pub struct Probe {
    child: ChildProcess,
    output: io::PipeReader,
    /// The end of what it has written.
    said: Vec<u8>,
    /// Nothing more comes.
    ended: bool,
    /// It has said that it could take over.
    passed: bool,
    started: Millis,
    deadline: Millis,
    /// Killed at its deadline; the verdict was given.
    pub given_up: bool,
    file: FileIdentity,
}

/// A file and its content, as far as stat(2) tells.
pub type FileIdentity = Option<(u64, u64, u64, i64, i64)>;

/// What stands at `path` now.
pub fn identity(path: &Path) -> FileIdentity {
    let found = fs::metadata(path).ok()?;
    Some((
        found.dev(),
        found.ino(),
        found.size(),
        found.mtime(),
        found.mtime_nsec(),
    ))
}

impl Probe {
    /// Starts one, with `state` to read.
    ///
    /// # Errors
    /// When there is no such program, or it can't be executed.
    pub fn start(origin: &StartParams, state: &[u8], now: Millis, limit: Millis) -> Result<Self> {
        let path = origin.path.display();
        let cant = |error| Error::system(format!("start {path} as a probe"), error);
        let file = identity(&origin.path);
        let template = SpawnTemplate {
            program: c_string(&origin.path).map_err(cant)?,
            directory: c_string(directory(origin)).map_err(cant)?,
            account: None,
            limits: ProcessLimits::default(),
            // It is the next master: what it starts has to be as free as what we start.
            guard: false,
        };
        let arguments = arguments(origin).map_err(cant)?;
        // It is not what the service manager waits to hear from.
        let environment =
            reexec::environment(&["NOTIFY_SOCKET"], &[(VARIABLE, OsStr::new("probe"))]);
        let stdin = memory_file::create(state).map_err(cant)?;
        let (output, stdout) = nonblocking_pipe().map_err(cant)?;
        let stdio = Stdio {
            stdin: stdin.as_fd(),
            stdout: stdout.as_fd(),
            stderr: stdout.as_fd(),
            calls: None,
        };
        let child = spawn_dying_with_us(
            &template,
            &strings(&arguments),
            &strings(&environment),
            stdio,
        )
        .map_err(|error| Error::Refused(format!("{path} could not be started: {error}")))?;
        Ok(Probe {
            child,
            output,
            said: Vec::new(),
            ended: false,
            passed: false,
            started: now,
            deadline: now + limit,
            given_up: false,
            file,
        })
    }

    pub fn pid(&self) -> Pid {
        self.child.pid()
    }

    /// What it writes; `None` once nothing more comes.
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        (!self.ended).then(|| self.output.as_fd())
    }

    /// When it is given up.
    pub fn deadline(&self) -> Option<Millis> {
        (!self.given_up).then_some(self.deadline)
    }

    /// Takes in what it has written.
    pub fn listen(&mut self) {
        let mut buffer = [0; MAX_DEATH_RECORDS];
        let mut taken = 0;
        while !self.ended && taken < MOST_AT_ONCE {
            match self.output.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(length) => {
                    taken += length;
                    self.said.extend_from_slice(&buffer[..length]);
                    // looked for before it is cut: it is shorter than what is kept
                    self.passed |= self
                        .said
                        .split(|&byte| byte == b'\n')
                        .any(|line| line == PROBE_PASSED.as_bytes());
                    let surplus = self.said.len().saturating_sub(MAX_DEATH_RECORDS);
                    self.said.drain(..surplus);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.ended = true,
            }
        }
    }

    /// Its time is over: it is killed, and reaped like any other. Says why.
    pub fn give_up(&mut self, why: Option<&str>) -> String {
        self.given_up = true;
        self.child.kill();
        self.listen();
        let lasted = HumanDuration(self.deadline - self.started);
        match why {
            Some(why) => why.to_owned(),
            None => format!(
                "it was not done within workers.boot-timeout ({lasted}){}",
                self.last_lines()
            ),
        }
    }

    /// It was reaped: whether it could take over, or why not.
    pub fn verdict(mut self, exit: Exit) -> std::result::Result<FileIdentity, String> {
        self.child.was_reaped();
        self.listen();
        match exit {
            Exit::Code(0) if self.passed => Ok(self.file),
            Exit::Code(0) => Err(format!(
                "it ended without a word: is it a server built on preforkd?{}",
                self.last_lines()
            )),
            exit => Err(format!("it ended by {exit}{}", self.last_lines())),
        }
    }

    /// What it said last, behind a colon.
    fn last_lines(&self) -> String {
        let text = String::from_utf8_lossy(&self.said);
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| !line.trim().is_empty() && *line != PROBE_PASSED)
            .collect();
        match lines.len() {
            0 => String::new(),
            count => format!(": {}", lines[count.saturating_sub(LINES)..].join("; ")),
        }
    }
}

/// Where the program is started: where this one was, if that is still there.
pub fn directory(origin: &StartParams) -> &Path {
    match origin.directory.is_dir() {
        true => &origin.directory,
        false => Path::new("/"),
    }
}

/// The arguments of the first start.
///
/// # Errors
/// None that arguments of a start can cause.
pub fn arguments(origin: &StartParams) -> io::Result<Vec<CString>> {
    origin.arguments.iter().map(c_string).collect()
}

fn strings(all: &[CString]) -> Vec<&CStr> {
    all.iter().map(CString::as_c_str).collect()
}
