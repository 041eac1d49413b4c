//! Starts and ends a process of a pool, and logs its standard output and error. Its calls go over a
//! `wire`.
//!
//! Nothing here waits, except for the end of a killed process. The supervisor decides what follows from
//! an end.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use log::Level;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags};
use nix::unistd::{pipe2, read};

use super::boot::Boot;
use super::definition::Pool;
use super::entry::ProgramCalls;
use super::lines::{Lines, with_priority};
use super::wire::{LEFT, PIECE, Wire};
use crate::handler::command::sweep::RunningCommand;
use crate::logging;
use crate::sys::memory::oom_kill_count;
use crate::sys::process::{Pid, ReapedChild, resident_bytes};
use crate::sys::socket::stream_pair;
use crate::sys::spawn::{ChildProcess, SpawnError, SpawnStep, Stdio, null, spawn};
use crate::throttle::Millis;

/// The place of standard error among its outputs.
const STDERR: usize = 1;
/// How long an exit may take after the program has closed its socket.
const EXITING: Duration = Duration::from_millis(200);

/// Why a process was not started.
pub(super) enum NotStarted {
    /// The worker is exiting.
    Leaving,
    /// The system refused it.
    Refused(SpawnError),
}

/// One of the two output streams of a program.
struct Output {
    /// `None` after its end.
    pipe: Option<OwnedFd>,
    lines: Lines,
    level: Level,
}

/// A running program of a pool.
pub(super) struct Process {
    child: ChildProcess,
    /// The entry in the table of running commands. It is dropped after the child was reaped, so that the sweep then
    /// kills what the program has left behind.
    _running: RunningCommand,
    outputs: [Output; 2],
    /// Gets the lines that the program writes to standard error until it is ready; `None` if no start or reload waits
    /// for the program.
    boot: Option<Arc<Boot>>,
    piece: Box<[u8]>,
    /// The prefix of its lines in the log.
    tag: String,
    /// The calls to which its lines belong, once it serves.
    pub calls: Option<Arc<ProgramCalls>>,
    /// How many processes the kernel had killed for lack of memory when it was started; `None` if that does not matter.
    pub oom_kills: Option<u64>,
    /// Whether it has ended and waits to be reaped.
    pub has_ended: bool,
}

impl Process {
    /// Starts a program of the pool, and creates the wire to it. `boot` gets the lines that the program writes to
    /// standard error.
    pub fn start(pool: &Pool, boot: Option<Arc<Boot>>) -> Result<(Self, Wire), NotStarted> {
        let running = RunningCommand::begin_program().ok_or(NotStarted::Leaving)?;
        let (calls, theirs) = stream_pair().map_err(|error| of_io(&error))?;
        let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(no_descriptor);
        let ((our_stdout, stdout), (our_stderr, stderr)) = (pipe()?, pipe()?);
        for end in [&our_stdout, &our_stderr] {
            fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(no_descriptor)?;
        }
        let arguments: Vec<&CStr> = pool.arguments.iter().map(|argument| &**argument).collect();
        let stdio = Stdio {
            stdin: null().map_err(|error| of_io(&error))?,
            stdout: stdout.as_fd(),
            stderr: stderr.as_fd(),
            calls: Some(theirs.as_fd()),
        };
        let variable = running.variable();
        let environment = pool.program.environment(&variable, &[]);
        // The supervisor, whose thread this is, lives as long as its programs.
        let child = spawn(&pool.program.template, &arguments, &environment, stdio)
            .map_err(NotStarted::Refused)?;
        let output = |pipe, level| Output {
            pipe: Some(pipe),
            lines: Lines::default(),
            level,
        };
        let process = Process {
            boot,
            tag: format!("pool {} [{}]", pool.name, child.pid()),
            calls: None,
            child,
            _running: running,
            outputs: [
                output(our_stdout, Level::Info),
                output(our_stderr, pool.settings.stderr_level),
            ],
            piece: vec![0; PIECE].into_boxed_slice(),
            oom_kills: pool.has_jobs.then(oom_kill_count).flatten(),
            has_ended: false,
        };
        Ok((process, Wire::new(calls)))
    }

    pub fn pid(&self) -> Pid {
        self.child.pid()
    }

    /// Returns its resident memory in bytes, without its children.
    pub fn resident_bytes(&self) -> u64 {
        resident_bytes(self.child.pid())
    }

    /// Adds the three descriptors to wait for.
    pub fn watch<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        // A closed output is replaced by a descriptor for which no events are asked.
        let pid = self.child.as_fd();
        let nothing = || PollFd::new(pid, PollFlags::empty());
        fds.push(if self.has_ended {
            nothing()
        } else {
            PollFd::new(pid, PollFlags::POLLIN)
        });
        for output in &self.outputs {
            let pipe = output.pipe.as_ref();
            fds.push(pipe.map_or_else(nothing, |fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        }
    }

    /// Handles the events of poll(2) for these three descriptors.
    pub fn attend(&mut self, ready: [bool; 3], now: Millis) {
        self.has_ended |= ready[0];
        for (number, ready) in ready[1..].iter().enumerate() {
            if *ready {
                self.listen(number, now);
            }
        }
    }

    /// Returns the buffer for reads.
    pub fn piece(&mut self) -> &mut [u8] {
        &mut self.piece
    }

    /// Reads once from one of its outputs. Returns whether there were bytes.
    fn listen(&mut self, number: usize, now: Millis) -> bool {
        let output = &mut self.outputs[number];
        let Some(fd) = &output.pipe else {
            return false;
        };
        let level = output.level;
        let (tag, boot) = (&self.tag, self.boot.as_ref().filter(|_| number == STDERR));
        let call = self.calls.as_ref().and_then(|calls| calls.call());
        let mut say = |line: &str| logging::with_call(call, || log_line((tag, boot), level, line));
        match read(fd, &mut self.piece) {
            Ok(count @ 1..) => {
                output.lines.add(&self.piece[..count], now, &mut say);
                true
            }
            Err(Errno::EAGAIN | Errno::EINTR) => false,
            Ok(0) | Err(_) => {
                output.lines.end(now, &mut say);
                output.pipe = None;
                false
            }
        }
    }

    /// Sends SIGTERM, because it has not exited although its wire was closed.
    pub fn terminate(&self) {
        self.child.terminate();
    }

    /// Waits briefly for the end of the program: at an exit its descriptors are closed shortly before the process
    /// ends. Returns whether it has ended.
    pub fn ends_soon(&mut self) -> bool {
        self.has_ended = self.has_ended || self.child.ends_within(EXITING);
        self.has_ended
    }

    /// Ends it with all that it has started; `None`: it hangs in the kernel.
    pub fn end(mut self, now: Millis) -> Option<ReapedChild> {
        let ended = if self.has_ended {
            // Kill the group before the reaping: until then no other group can get its number.
            self.child.kill();
            self.child.reap()
        } else {
            self.child.kill_with_descendants()
        };
        for number in 0..self.outputs.len() {
            for _ in 0..LEFT {
                if !self.listen(number, now) {
                    break;
                }
            }
            let (tag, output) = (&self.tag, &mut self.outputs[number]);
            let boot = self.boot.as_ref().filter(|_| number == STDERR);
            let level = output.level;
            let say = &mut |line: &str| log_line((tag, boot), level, line);
            output.lines.end(now, say);
        }
        ended
    }
}

/// Logs a line of a program with its own level, or with `level` if it has none.
fn log_line((tag, boot): (&str, Option<&Arc<Boot>>), level: Level, line: &str) {
    let (level, line) = with_priority(line).unwrap_or((level, line));
    boot.iter().for_each(|boot| boot.keep_line(line));
    log::log!(level, "{tag}: {line}");
}

fn no_descriptor(errno: Errno) -> NotStarted {
    NotStarted::Refused(SpawnError {
        step: SpawnStep::Descriptors,
        errno,
    })
}

fn of_io(error: &io::Error) -> NotStarted {
    no_descriptor(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}
