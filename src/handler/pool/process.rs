//! A process of a pool: its start, its end, and what it says on its standard output and error, which
//! goes to the log. Its calls go over a `wire`.
//!
//! Nothing here waits, but for the end of what was killed. What follows from an end is the keeper's
//! to say.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use log::Level;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags};
use nix::unistd::{pipe2, read};

use super::Pool;
use super::lines::{Lines, with_priority};
use super::wire::{LEFT, PIECE, Wire};
use crate::handler::command::sweep::RunningCommand;
use crate::sys::process::{Exit, Pid, resident_bytes};
use crate::sys::socket::stream_pair;
use crate::sys::spawn::{ChildProcess, SpawnError, SpawnStep, Stdio, null, spawn};
use crate::throttle::Millis;

/// How long an exit may take that has closed the calls already.
const EXITING: Duration = Duration::from_millis(200);

/// Why there is no process.
pub(super) enum NotStarted {
    /// The worker leaves.
    Leaving,
    /// The system would not.
    Refused(SpawnError),
}

/// One of its two outputs.
struct Output {
    /// `None` once it is at its end.
    pipe: Option<OwnedFd>,
    lines: Lines,
    level: Level,
}

/// See the module.
pub(super) struct Process {
    child: ChildProcess,
    /// Its part in the worker's table of what runs, for as long as it lives. Dropped after the
    /// child is reaped: what is left of it by then is swept.
    _running: RunningCommand,
    outputs: [Output; 2],
    piece: Box<[u8]>,
    /// What stands before it in the log.
    tag: String,
    /// It has ended, and waits to be reaped.
    pub has_ended: bool,
}

impl Process {
    /// Starts a program of the pool, and the wire to it.
    pub fn start(pool: &Pool) -> Result<(Self, Wire), NotStarted> {
        let running = RunningCommand::begin().ok_or(NotStarted::Leaving)?;
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
        let environment = pool.program.environment(&variable);
        let child = spawn(&pool.program.template, &arguments, &environment, stdio)
            .map_err(NotStarted::Refused)?;
        let output = |pipe, level| Output {
            pipe: Some(pipe),
            lines: Lines::default(),
            level,
        };
        let process = Process {
            tag: format!("pool {} [{}]", pool.name, child.pid()),
            child,
            _running: running,
            outputs: [
                output(our_stdout, Level::Info),
                output(our_stderr, pool.settings.stderr_level),
            ],
            piece: vec![0; PIECE].into_boxed_slice(),
            has_ended: false,
        };
        Ok((process, Wire::new(calls)))
    }

    /// Its pid.
    pub fn pid(&self) -> Pid {
        self.child.pid()
    }

    /// Memory that it has resident, its children's left out.
    pub fn resident_bytes(&self) -> u64 {
        resident_bytes(self.child.pid())
    }

    /// Adds the three descriptors that it is waited for by.
    pub fn watch<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        // One that is closed leaves its place to one that tells nothing.
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

    /// Does once what poll(2) has told of these three.
    pub fn attend(&mut self, ready: [bool; 3], now: Millis) {
        self.has_ended |= ready[0];
        for (number, ready) in ready[1..].iter().enumerate() {
            if *ready {
                self.listen(number, now);
            }
        }
    }

    /// Room to read into.
    pub fn piece(&mut self) -> &mut [u8] {
        &mut self.piece
    }

    /// Reads once from one of its outputs; tells whether there was something.
    fn listen(&mut self, number: usize, now: Millis) -> bool {
        let output = &mut self.outputs[number];
        let Some(fd) = &output.pipe else {
            return false;
        };
        let level = output.level;
        let tag = &self.tag;
        let mut say = |line: &str| log_line(tag, level, line);
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

    /// Tells it to leave, by SIGTERM; the end of its wire has told it so before.
    pub fn terminate(&self) {
        self.child.terminate();
    }

    /// Waits a moment for its end, which closes its descriptors first; tells whether it has come.
    pub fn ends_soon(&mut self) -> bool {
        self.has_ended = self.has_ended || self.child.ends_within(EXITING);
        self.has_ended
    }

    /// Ends it with all that it has started; `None`: it hangs in the kernel.
    pub fn end(mut self, now: Millis) -> Option<Exit> {
        let exit = if self.has_ended {
            // While it is not reaped its group's number can't be another's.
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
            let level = output.level;
            let say = &mut |line: &str| log_line(tag, level, line);
            output.lines.end(now, say);
        }
        exit
    }
}

/// Logs a line of a program with its own level, else with `level`.
fn log_line(tag: &str, level: Level, line: &str) {
    let (level, line) = with_priority(line).unwrap_or((level, line));
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
