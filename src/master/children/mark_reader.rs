//! Reads the marks of processes in a short-lived child, to find out which worker started them. The mark is the variable
//! PREFORKD_CALL in the environment, which begins with the pid of that worker.
//!
//! The owner of a process chooses the length of its environment, and can make a read wait forever (`sys::bounded`).
//! So the master does not read it itself. It forks a reader, which writes each answer to a pipe. The main loop polls
//! the pipe and reaps the reader like any other child. At the deadline the reader gets SIGKILL. A reader that is
//! stuck in the kernel is reaped whenever it ends.

#![allow(unsafe_code)]

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::sys::signal::Signal;

use crate::handler::command::sweep::call_of;
use crate::master::policy::event::Millis;
use crate::sys::process::{self, Fork, Pid, exit_now, fork};
use crate::sys::socket::nonblocking_pipe;
use crate::sys::title::{self, TitleArea};
use crate::sys::{clone_files, descriptor, signal};

/// The longest time for one reader.
const LIMIT: Millis = 2_000;
/// The largest number of processes for one reader, so that its answers fit into a pipe.
pub(crate) const MOST_ASKED: usize = 256;
/// The bytes of one answer: the pid of the worker, or 0 without a mark.
const ANSWER: usize = size_of::<i32>();

/// The memory for the title, and the program's name, for a reader.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReaderTitle<'a> {
    pub title: Option<TitleArea>,
    pub program: &'a str,
}

#[derive(Debug)]
pub(crate) struct MarkReader {
    /// The reader, which the main loop reaps.
    pub pid: Pid,
    pipe: PipeReader,
    /// Whether the pipe is at its end.
    ended: bool,
    /// The processes in the order of the answers; `None` once reaped.
    asked: Vec<Option<Pid>>,
    answers: Vec<u8>,
    /// When the reader gets SIGKILL.
    pub deadline: Millis,
    pub was_reaped: bool,
}

impl MarkReader {
    /// Forks a reader for the marks of `asked`, at most [`MOST_ASKED`] processes. Only the parent returns.
    ///
    /// # Errors
    /// If the system refuses the process or a descriptor.
    pub fn start(asked: Vec<Pid>, reader_title: ReaderTitle<'_>, now: Millis) -> io::Result<Self> {
        let (pipe, writer) = nonblocking_pipe()?;
        let master = Pid::current();
        // Signals stay blocked in the child, because the inherited handlers would wake the master.
        signal::block_all();
        let forked = match fork() {
            Ok(Fork::Child) => {
                let read = || read_marks(&asked, writer, reader_title, master);
                // A panic must not unwind into the master's code.
                let _ = catch_unwind(AssertUnwindSafe(read));
                exit_now(0)
            }
            Ok(Fork::Parent(pid)) => Ok(pid),
            Err(error) => Err(error),
        };
        signal::unblock_all();
        let pid = forked?;
        Ok(MarkReader {
            pid,
            pipe,
            ended: false,
            asked: asked.into_iter().map(Some).collect(),
            answers: Vec::new(),
            deadline: now + LIMIT,
            was_reaped: false,
        })
    }

    /// Returns the pipe for poll(2); `None` at its end.
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        (!self.ended).then(|| self.pipe.as_fd())
    }

    /// Reads the answers that are there, without waiting.
    pub fn listen(&mut self) {
        let most = self.asked.len() * ANSWER;
        let mut buffer = [0; MOST_ASKED * ANSWER];
        while !self.ended {
            match self.pipe.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(length) => self.answers.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.ended = true,
            }
            self.ended |= self.answers.len() > most;
        }
    }

    /// Ignores the answer for a child that was reaped, because its pid may belong to another process.
    pub fn forget(&mut self, pid: Pid) {
        let mut asked = self.asked.iter_mut();
        if let Some(asked) = asked.find(|asked| **asked == Some(pid)) {
            *asked = None;
        }
    }

    /// Sends SIGKILL. The main loop reaps it.
    pub fn kill(&self) {
        process::kill(self.pid, Signal::SIGKILL);
    }

    /// Returns each answered process that was not reaped, with the worker that started it. Also returns the first
    /// process without an answer, whose read may be stuck.
    pub fn answers(mut self) -> (Vec<(Pid, Option<Pid>)>, Option<Pid>) {
        self.listen();
        let answers = self.answers.chunks_exact(ANSWER);
        let missing = self.asked.get(answers.len()).copied().flatten();
        let worker = |bytes: &[u8]| {
            let worker = Pid(i32::from_ne_bytes(bytes.try_into().unwrap_or_default()));
            (worker.0 > 0).then_some(worker)
        };
        let asked = self.asked.iter().zip(answers);
        let found = asked.filter_map(|(pid, bytes)| Some(((*pid)?, worker(bytes))));
        (found.collect(), missing)
    }
}

/// Runs the reader: drops what belongs to the master, reads, and returns.
fn read_marks(asked: &[Pid], mut writer: PipeWriter, reader_title: ReaderTitle<'_>, master: Pid) {
    // 1. All descriptors except the pipe: the lock of the pid file would outlive a killed master, and a
    //    port would stay in use.
    // SAFETY: this child never returns to the master's code, which owns the descriptors.
    unsafe { descriptor::close_all_but(&[writer.as_raw_fd()]) };
    // 2. The session and the terminal.
    if process::leave_session().is_err() {
        return;
    }
    // 3. The kernel ends the reader with the master.
    if !matches!(clone_files::end_with_parent(master), Ok(true)) {
        return;
    }
    // 4. `ps` shows what it is.
    if let Some(area) = reader_title.title {
        area.set(&format!("{}: environment reader", reader_title.program));
    }
    title::set_comm(reader_title.program, "reader");
    for &pid in asked {
        let worker = call_of(pid).map_or(0, |(worker, _)| worker.0);
        if writer.write_all(&worker.to_ne_bytes()).is_err() {
            return;
        }
    }
}
