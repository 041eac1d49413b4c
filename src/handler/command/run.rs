//! Runs the process of a call: writes its input and reads its output concurrently until the call's
//! deadline. So neither side waits for a full pipe of the other.
//!
//! The call ends when the program has ended, even if another process still has its pipes. Then the bytes
//! that are in the pipes belong to the output, and its process group is killed. If the call is given up or out of time
//! before, or the output is too long, the group and all descendants are killed.

use std::borrow::Cow;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{pipe2, read, write};

use super::in_progress::ShownCommand;
use crate::handler::Context;
use crate::sys::descriptor;
use crate::sys::process::Exit;
use crate::sys::spawn::{ChildProcess, SpawnError, SpawnStep, SpawnTemplate, Stdio, null, spawn};
use crate::sys::waker::Waker;

/// The size of one read in bytes.
const PIECE: usize = 16 * 1024;

/// The result of a command that has ended.
pub(super) struct Ran {
    pub exit: Exit,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

/// Why a command was killed.
pub(super) enum Stopped {
    TimedOut,
    GivenUp,
    /// The system did not say how it ended.
    Failed,
    /// Its output was too long.
    TooMuch {
        stderr: String,
    },
}

pub(super) struct CommandProcess {
    child: ChildProcess,
    /// `None` once it is closed.
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    waker: Arc<Waker>,
}

thread_local! {
    /// Wakes this handler thread. It is created once, because that costs two system calls.
    static WAKER: OnceLock<Arc<Waker>> = const { OnceLock::new() };
}

fn waker() -> io::Result<Arc<Waker>> {
    WAKER.with(|cell| match cell.get() {
        Some(waker) => Ok(Arc::clone(waker)),
        None => {
            let waker = Arc::new(Waker::new()?);
            Ok(Arc::clone(cell.get_or_init(|| waker)))
        }
    })
}

/// Starts a command. `feeds` says whether it gets input.
pub(super) fn start(
    template: &SpawnTemplate,
    arguments: &[Cow<'_, CStr>],
    environment: &[&CStr],
    feeds: bool,
) -> Result<CommandProcess, SpawnError> {
    let none_left = |errno| SpawnError {
        step: SpawnStep::Descriptors,
        errno,
    };
    let of_io = |error: io::Error| none_left(Errno::from_raw(error.raw_os_error().unwrap_or(0)));
    let waker = waker().map_err(of_io)?;
    let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(none_left);
    let stdin = if feeds { Some(pipe()?) } else { None };
    let ((our_stdout, stdout), (our_stderr, stderr)) = (pipe()?, pipe()?);
    let ours = [
        stdin.as_ref().map(|(_, writer)| writer),
        Some(&our_stdout),
        Some(&our_stderr),
    ];
    for end in ours.into_iter().flatten() {
        // Only on our ends, because a program expects blocking pipes.
        nix::fcntl::fcntl(end, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(none_left)?;
    }
    let arguments: Vec<&CStr> = arguments.iter().map(|argument| &**argument).collect();
    let stdio = Stdio {
        stdin: match &stdin {
            Some((reader, _)) => reader.as_fd(),
            None => null().map_err(of_io)?,
        },
        stdout: stdout.as_fd(),
        stderr: stderr.as_fd(),
        calls: None,
    };
    // This thread waits for the command, so the death signal comes only if the whole process dies. It is
    // for the case that master, worker and keeper die together, and no process kills the group.
    let child = spawn(template, &arguments, environment, stdio)?;
    Ok(CommandProcess {
        child,
        stdin: stdin.map(|(_, writer)| writer),
        stdout: Some(our_stdout),
        stderr: Some(our_stderr),
        waker,
    })
}

impl CommandProcess {
    /// Writes `input` to it, and reads its output until it has ended.
    pub fn finish(
        mut self,
        input: &[u8],
        max_output: usize,
        context: &Context<'_>,
    ) -> Result<Ran, Stopped> {
        let waker = Arc::clone(&self.waker);
        let mut stdout = Vec::new();
        let shown = ShownCommand::new(context.number(), self.child.pid());
        let ended = context.waking(&waker, || {
            self.attend(input, &mut stdout, &shown, max_output, context)
        });
        if let Err(why) = ended {
            self.child.kill_with_descendants();
            return Err(match why {
                End::TimedOut => Stopped::TimedOut,
                End::GivenUp => Stopped::GivenUp,
                End::Failed => Stopped::Failed,
                End::TooMuch => Stopped::TooMuch {
                    stderr: shown.into_stderr(),
                },
            });
        }
        // While it is not reaped, its process group id cannot be reused.
        self.child.kill();
        pull_what_is_there(&mut self.stdout, |piece| stdout.extend_from_slice(piece));
        pull_what_is_there(&mut self.stderr, |piece| shown.stderr().add(piece));
        let too_much = stdout.len() > max_output;
        let exit = self.child.reap().map(|child| child.exit);
        let stderr = shown.into_stderr();
        match exit {
            _ if too_much => Err(Stopped::TooMuch { stderr }),
            Some(exit) => Ok(Ran {
                exit,
                stdout,
                stderr,
            }),
            // No other code reaps it. If it was reaped, its exit status is unknown.
            None => Err(Stopped::Failed),
        }
    }

    /// Serves the pipes until the program has ended.
    fn attend(
        &mut self,
        input: &[u8],
        stdout: &mut Vec<u8>,
        shown: &ShownCommand,
        max_output: usize,
        context: &Context<'_>,
    ) -> Result<(), End> {
        let mut input = input;
        self.feed(&mut input);
        loop {
            if context.is_cancelled() {
                return Err(End::GivenUp);
            }
            let left = context.remaining();
            if left.is_zero() {
                return Err(End::TimedOut);
            }
            // Add a millisecond: poll(2) rounds down, and waking too early means waking twice.
            let left = left.saturating_add(Duration::from_millis(1));
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [(); 5].map(|()| PollFd::new(self.child.as_fd(), PollFlags::POLLIN));
            fds[1] = PollFd::new(self.waker.as_fd(), PollFlags::POLLIN);
            let pipes = [
                (&self.stdout, PollFlags::POLLIN),
                (&self.stderr, PollFlags::POLLIN),
                (&self.stdin, PollFlags::POLLOUT),
            ];
            let mut count = 2;
            for (pipe, flags) in pipes {
                if let Some(pipe) = pipe {
                    fds[count] = PollFd::new(pipe.as_fd(), flags);
                    count += 1;
                }
            }
            match poll(&mut fds[..count], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                // A temporary lack of memory; without poll there is no way to wait.
                Err(_) => return Err(End::Failed),
            }
            let has_ended = fds[0].any().unwrap_or(false);
            if has_ended {
                return Ok(());
            }
            self.feed(&mut input);
            pull(&mut self.stdout, |piece| stdout.extend_from_slice(piece));
            if stdout.len() > max_output {
                return Err(End::TooMuch);
            }
            pull(&mut self.stderr, |piece| shown.stderr().add(piece));
        }
    }

    /// Writes as much as it accepts. Closes its input at the end, or if it has closed it.
    fn feed(&mut self, input: &mut &[u8]) {
        while let Some(pipe) = &self.stdin {
            match write(pipe, input) {
                Ok(count) if count < input.len() => *input = &input[count..],
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                // Everything is written, or the program closed its input, which is no error.
                Ok(_) | Err(_) => self.stdin = None,
            }
        }
    }
}

enum End {
    TimedOut,
    GivenUp,
    Failed,
    TooMuch,
}

/// Reads the bytes that are in a pipe now. A process that left the group may write for ever.
fn pull_what_is_there(pipe: &mut Option<OwnedFd>, mut take: impl FnMut(&[u8])) {
    let mut left = pipe.as_ref().map_or(0, descriptor::readable_bytes);
    while left > 0
        && pull(pipe, |piece| {
            left = left.saturating_sub(piece.len());
            take(piece);
        })
    {}
}

/// Reads once from an open pipe, without waiting. Returns whether there were bytes.
fn pull(pipe: &mut Option<OwnedFd>, mut take: impl FnMut(&[u8])) -> bool {
    let Some(fd) = pipe else {
        return false;
    };
    let mut piece = [0; PIECE];
    match read(fd, &mut piece) {
        Ok(count @ 1..) => {
            take(&piece[..count]);
            true
        }
        Err(Errno::EAGAIN | Errno::EINTR) => false,
        // The end.
        Ok(0) | Err(_) => {
            *pipe = None;
            false
        }
    }
}
