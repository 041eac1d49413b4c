//! A process of a pool: its descriptors, what is to be written to it and what it has sent. What it
//! says on its standard output and error goes to the log.
//!
//! Nothing here waits, but for the end of what was killed. What the bytes mean, and what follows
//! from an end, is the keeper's to say.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use log::Level;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{MsgFlags, recv, send};
use nix::unistd::{pipe2, read};

use super::Pool;
use super::lines::Lines;
use crate::handler::command::sweep::Running;
use crate::protocol::frame::{Decoded, decode};
use crate::protocol::program;
use crate::sys::process::{Exit, Pid, resident_bytes};
use crate::sys::socket::{has_unread, stream_pair};
use crate::sys::spawn::{Child, SpawnError, Stdio, Step, null, spawn};
use crate::throttle::Millis;

/// As much as is read at once.
const PIECE: usize = 64 * 1024;
/// A buffer that was larger is given back: one large call need not keep its room for ever.
const KEPT: usize = 4 * PIECE;
/// Reads of what is left in a pipe or a socket at the end. What has left the process's group may
/// write on for ever.
const LEFT: usize = 16;

/// How long an exit may take that has closed the calls already.
const EXITING: Duration = Duration::from_millis(200);

/// Why there is no process.
pub(super) enum NotStarted {
    /// The worker leaves.
    Leaving,
    /// The system would not.
    Refused(SpawnError),
}

/// How a process ended.
pub(super) struct Ended {
    /// `None`: it hangs in the kernel.
    pub exit: Option<Exit>,
    /// It had not read all that it was sent, so what came last can't have begun.
    pub left_unread: bool,
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
    child: Child,
    /// Its part in the worker's table of what runs, for as long as it lives. Dropped after the
    /// child is reaped: what is left of it by then is swept.
    _running: Running,
    /// The other end of its descriptor 3; `None` once it was told to leave.
    calls: Option<OwnedFd>,
    outputs: [Output; 2],
    unsent: Vec<u8>,
    sent: usize,
    received: Vec<u8>,
    piece: Box<[u8]>,
    /// What stands before it in the log.
    tag: String,
    /// It has ended, and waits to be reaped.
    pub has_ended: bool,
    /// It can't send any more.
    pub is_closed: bool,
    left_unread: bool,
}

impl Process {
    /// Starts a program of the pool.
    pub fn start(pool: &Pool) -> Result<Self, NotStarted> {
        let running = Running::begin().ok_or(NotStarted::Leaving)?;
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
        Ok(Process {
            tag: format!("pool {} [{}]", pool.name, child.pid()),
            child,
            _running: running,
            calls: Some(calls),
            outputs: [
                output(our_stdout, Level::Info),
                output(our_stderr, Level::Warn),
            ],
            unsent: Vec::new(),
            sent: 0,
            received: Vec::new(),
            piece: vec![0; PIECE].into_boxed_slice(),
            has_ended: false,
            is_closed: false,
            left_unread: false,
        })
    }

    /// Its pid.
    pub fn pid(&self) -> Pid {
        self.child.pid()
    }

    /// Memory that it has resident, its children's left out.
    pub fn resident_bytes(&self) -> u64 {
        resident_bytes(self.child.pid())
    }

    /// Adds the four descriptors that it is waited for by.
    pub fn watch<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        // One that is closed leaves its place to one that tells nothing.
        let pid = self.child.as_fd();
        let nothing = || PollFd::new(pid, PollFlags::empty());
        fds.push(PollFd::new(pid, PollFlags::POLLIN));
        let mut flags = PollFlags::POLLIN;
        flags.set(PollFlags::POLLOUT, !self.has_sent_all());
        let calls = self.calls.as_ref().filter(|_| !self.is_closed);
        fds.push(calls.map_or_else(nothing, |fd| PollFd::new(fd.as_fd(), flags)));
        for output in &self.outputs {
            let pipe = output.pipe.as_ref();
            fds.push(pipe.map_or_else(nothing, |fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        }
    }

    /// Does once what poll(2) has told of these four.
    pub fn attend(&mut self, ready: [bool; 4], now: Millis) {
        self.has_ended |= ready[0];
        if ready[1] {
            self.flush();
            self.receive();
        }
        for (number, ready) in ready[2..].iter().enumerate() {
            if *ready {
                self.listen(number, now);
            }
        }
    }

    /// Writes a call; what does not fit goes out as it is read.
    pub fn write(&mut self, method: &str, params: &str) -> bool {
        let whole = program::call(&mut self.unsent, method, params);
        self.flush();
        whole
    }

    /// Whether all that was written is with the kernel.
    pub fn has_sent_all(&self) -> bool {
        self.sent == self.unsent.len()
    }

    /// Whether it has not read all of that yet.
    pub fn has_unread(&self) -> bool {
        !self.has_sent_all() || self.calls.as_ref().is_some_and(has_unread)
    }

    fn flush(&mut self) {
        let Some(fd) = &self.calls else { return };
        while self.sent < self.unsent.len() {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match send(fd.as_raw_fd(), &self.unsent[self.sent..], flags) {
                Ok(count) => self.sent += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                // It reads no more. What it has sent counts all the same: `receive` finds its end.
                Err(_) => {
                    self.left_unread = true;
                    break;
                }
            }
        }
        self.unsent.clear();
        self.unsent.shrink_to(KEPT);
        self.sent = 0;
    }

    /// Reads once; tells whether there was something.
    pub fn receive(&mut self) -> bool {
        let Some(fd) = self.calls.as_ref().filter(|_| !self.is_closed) else {
            return false;
        };
        match recv(fd.as_raw_fd(), &mut self.piece, MsgFlags::MSG_DONTWAIT) {
            Ok(count @ 1..) => {
                self.received.extend_from_slice(&self.piece[..count]);
                return true;
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // So the kernel says that the other end was closed with bytes unread (unix(7)).
            Err(Errno::ECONNRESET) => (self.left_unread, self.is_closed) = (true, true),
            Ok(0) | Err(_) => self.is_closed = true,
        }
        false
    }

    /// The frame at the head of what it has sent.
    pub fn frame(&self, limit: usize) -> Decoded<'_> {
        decode(&self.received, limit)
    }

    /// Whether it has sent something that is not consumed.
    pub fn has_received(&self) -> bool {
        !self.received.is_empty()
    }

    /// Drops the head of what it has sent.
    pub fn consume(&mut self, used: usize) {
        self.received.drain(..used);
        if self.received.is_empty() {
            self.received.shrink_to(KEPT);
        }
    }

    /// Reads once from one of its outputs; tells whether there was something.
    fn listen(&mut self, number: usize, now: Millis) -> bool {
        let output = &mut self.outputs[number];
        let Some(fd) = &output.pipe else {
            return false;
        };
        let level = output.level;
        let tag = &self.tag;
        let mut say = |line: &str| log::log!(level, "{tag}: {line}");
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

    /// Tells it to leave: the end of its calls.
    pub fn dismiss(&mut self) {
        self.calls = None;
    }

    /// Tells it once more, by SIGTERM.
    pub fn terminate(&self) {
        self.child.terminate();
    }

    /// Waits a moment for its end, which closes its descriptors first; tells whether it has come.
    pub fn ends_soon(&mut self) -> bool {
        self.has_ended = self.has_ended || self.child.ends_within(EXITING);
        self.has_ended
    }

    /// Ends it with all that it has started.
    pub fn end(mut self, now: Millis) -> Ended {
        let exit = if self.has_ended {
            // While it is not reaped its group's number can't be another's.
            self.child.kill();
            self.child.reap()
        } else {
            self.child.kill_with_descendants()
        };
        let whole = self.has_sent_all();
        for _ in 0..LEFT {
            if !self.receive() {
                break;
            }
            self.received.clear();
        }
        for number in 0..self.outputs.len() {
            for _ in 0..LEFT {
                if !self.listen(number, now) {
                    break;
                }
            }
            let (tag, output) = (&self.tag, &mut self.outputs[number]);
            let level = output.level;
            let say = &mut |line: &str| log::log!(level, "{tag}: {line}");
            output.lines.end(now, say);
        }
        Ended {
            exit,
            left_unread: self.left_unread || !whole,
        }
    }
}

fn no_descriptor(errno: Errno) -> NotStarted {
    NotStarted::Refused(SpawnError {
        step: Step::Descriptors,
        errno,
    })
}

fn of_io(error: &io::Error) -> NotStarted {
    no_descriptor(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}
