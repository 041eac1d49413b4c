//! Runs the program that is installed now as a probe, to find out whether it could take over.
//!
//! The probe gets the state on its standard input and reads the configuration like the next master. If it
//! could take over, it writes one line. Otherwise its last lines are the reason. Nothing here waits: its
//! output and its end are events of the main loop. A probe that hangs is killed at its deadline. If the
//! master dies, the kernel kills the probe.

use std::ffi::{CStr, CString, OsStr};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::super::policy::event::Millis;
use super::start_params::{PROBE_PASSED, StartParams, VARIABLE};
use crate::error::{Error, Result};
use crate::logging::HumanDuration;
use crate::sys::memory_file;
use crate::sys::process::{Exit, Pid};
use crate::sys::reexec;
use crate::sys::reexec::c_string;
use crate::sys::socket::nonblocking_pipe;
use crate::sys::spawn::{ChildProcess, ProcessLimits, SpawnTemplate, Stdio, spawn};

/// The largest number of bytes of its output that are kept. The last ones are kept.
const KEPT_BYTES: usize = 4096;
/// The largest number of bytes that are read in one turn of the main loop, because the probe may write without an end.
const MOST_AT_ONCE: usize = 64 * 1024;
/// The largest number of lines that are reported as the reason.
const LINES: usize = 10;

#[derive(Debug)]
pub struct Probe {
    child: ChildProcess,
    output: io::PipeReader,
    /// The last bytes of its output.
    kept_output: Vec<u8>,
    /// Whether the output is at its end.
    ended: bool,
    /// Whether it has written [`PROBE_PASSED`].
    passed: bool,
    started: Millis,
    deadline: Millis,
    /// Whether it was killed and its result reported.
    pub given_up: bool,
    file: FileIdentity,
}

/// Identifies a file and its content: device, inode, size and time of change.
pub type FileIdentity = Option<(u64, u64, u64, i64, i64)>;

/// Returns the identity of the file at `path` now.
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
    /// Starts a probe with `state` on its standard input. `limit` is the longest time that it may take.
    ///
    /// # Errors
    /// If there is no such program, or it cannot be executed.
    pub fn start(origin: &StartParams, state: &[u8], now: Millis, limit: Millis) -> Result<Self> {
        let path = origin.path.display();
        let cant = |error| Error::system(format!("start {path} as a probe"), error);
        let file = identity(&origin.path);
        let template = SpawnTemplate {
            program: c_string(&origin.path).map_err(cant)?,
            directory: c_string(directory(origin)).map_err(cant)?,
            account: None,
            limits: ProcessLimits::default(),
            // Its handlers must be able to do the same as ours.
            guard: false,
        };
        let arguments = arguments(origin).map_err(cant)?;
        // The service manager must not take its messages for the master's.
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
        let child = spawn(
            &template,
            &strings(&arguments),
            &strings(&environment),
            stdio,
        )
        .map_err(|error| Error::Refused(format!("{path} could not be started: {error}")))?;
        Ok(Probe {
            child,
            output,
            kept_output: Vec::new(),
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

    /// Returns its output for poll(2); `None` at the end.
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        (!self.ended).then(|| self.output.as_fd())
    }

    /// Returns when it is given up.
    pub fn deadline(&self) -> Option<Millis> {
        (!self.given_up).then_some(self.deadline)
    }

    /// Reads its output.
    pub fn listen(&mut self) {
        let mut buffer = [0; KEPT_BYTES];
        let mut taken = 0;
        while !self.ended && taken < MOST_AT_ONCE {
            match self.output.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(length) => {
                    taken += length;
                    self.kept_output.extend_from_slice(&buffer[..length]);
                    // Before the output is shortened: the line is shorter than what is kept.
                    self.passed |= self
                        .kept_output
                        .split(|&byte| byte == b'\n')
                        .any(|line| line == PROBE_PASSED.as_bytes());
                    let surplus = self.kept_output.len().saturating_sub(KEPT_BYTES);
                    self.kept_output.drain(..surplus);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.ended = true,
            }
        }
    }

    /// Kills it because its time is over, or because of `why`. The main loop reaps it. Returns the reason.
    pub fn give_up(&mut self, why: Option<&str>) -> String {
        self.given_up = true;
        self.child.kill();
        self.listen();
        let lasted = HumanDuration(self.deadline - self.started);
        match why {
            Some(why) => why.to_owned(),
            None => format!(
                "it gave no result within workers.boot-timeout ({lasted}){}",
                self.last_lines()
            ),
        }
    }

    /// Handles its end. Returns the program that could take over, or why it could not.
    pub fn result(mut self, exit: Exit) -> std::result::Result<FileIdentity, String> {
        self.child.set_reaped();
        self.listen();
        match exit {
            Exit::Code(0) if self.passed => Ok(self.file),
            Exit::Code(0) => Err(format!(
                "it exited without a result: is it a server built on preforkd?{}",
                self.last_lines()
            )),
            exit => Err(format!("it ended by {exit}{}", self.last_lines())),
        }
    }

    /// Returns its last lines behind a colon.
    fn last_lines(&self) -> String {
        let text = String::from_utf8_lossy(&self.kept_output);
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

/// Returns the directory of the start, or `/` if that does not exist any more.
pub fn directory(origin: &StartParams) -> &Path {
    match origin.directory.is_dir() {
        true => &origin.directory,
        false => Path::new("/"),
    }
}

/// Returns the arguments of the first start.
///
/// # Errors
/// Never for the arguments of a start.
pub fn arguments(origin: &StartParams) -> io::Result<Vec<CString>> {
    origin.arguments.iter().map(c_string).collect()
}

fn strings(all: &[CString]) -> Vec<&CStr> {
    all.iter().map(CString::as_c_str).collect()
}
