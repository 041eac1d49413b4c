//! Reads which workers some children of the master belong to, in a short-lived child of its own.
//!
//! The owner of a process chooses the length of its environment, and can make its read block (`sys::bounded`).
//! So the master reads no environment: it forks a reader, which reads one after the other and writes
//! each answer to a pipe. The master's loop polls that pipe, and the reader's end is a death like any
//! other. At the deadline the reader gets SIGKILL; one that hangs in the kernel is reaped whenever it ends.
//! Fails with the system's error where there is no process or no descriptor to be had.

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

/// How long one reader may take.
const LIMIT: Millis = 2_000;
/// Processes that one reader is asked about: its answers fit into a pipe.
pub(crate) const MOST_ASKED: usize = 256;
/// Bytes of an answer: the pid of a worker; 0 where there is no mark.
const ANSWER: usize = size_of::<i32>();

/// What a reader is forked with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin<'a> {
    /// Where its title goes.
    pub title: Option<TitleArea>,
    pub program: &'a str,
}

#[derive(Debug)]
pub(crate) struct MarkReader {
    /// Its pid; it is reaped by the master's loop.
    pub pid: Pid,
    pipe: PipeReader,
    /// Nothing more comes.
    ended: bool,
    /// The processes that it was asked about, in the order of its answers; `None` once reaped.
    asked: Vec<Option<Pid>>,
    answers: Vec<u8>,
    /// When it is to be killed.
    pub deadline: Millis,
    /// It has ended.
    pub was_reaped: bool,
}

impl MarkReader {
    /// Forks one, to read the marks of `asked`, [`MOST_ASKED`] at most. Only the parent returns.
    ///
    /// # Errors
    /// When there is no process or no descriptor to be had.
    pub fn start(asked: Vec<Pid>, origin: Origin<'_>, now: Millis) -> io::Result<Self> {
        let (pipe, writer) = nonblocking_pipe()?;
        let master = Pid::current();
        // They stay blocked in the child: its handlers, which are the master's, would wake the master.
        signal::block_all();
        let forked = match fork() {
            Ok(Fork::Child) => {
                let read = || read_marks(&asked, writer, origin, master);
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

    /// What it writes to, to be polled; `None` once nothing more comes.
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        (!self.ended).then(|| self.pipe.as_fd())
    }

    /// Takes in what it has written, without waiting.
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

    /// A child was reaped: what is said of it is not to be believed, as its pid may be another's by now.
    pub fn forget(&mut self, pid: Pid) {
        let mut asked = self.asked.iter_mut();
        if let Some(asked) = asked.find(|asked| **asked == Some(pid)) {
            *asked = None;
        }
    }

    /// Kills it. It is reaped like any other child.
    pub fn kill(&self) {
        process::kill(self.pid, Signal::SIGKILL);
    }

    /// What it has found out: each process that it has answered for and that is not reaped, with the
    /// worker that the process belongs to; and the process that it was at, if it has not answered for all.
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

/// Is the reader: leaves everything that is the master's, reads, and returns to be ended.
fn read_marks(asked: &[Pid], mut writer: PipeWriter, origin: Origin<'_>, master: Pid) {
    // 1. All descriptors but the pipe: the pid file's lock would outlive a killed master, and a port
    //    would stay taken.
    // SAFETY: this child never returns to the master's code, which owns the descriptors.
    unsafe { descriptor::close_all_but(&[writer.as_raw_fd()]) };
    // 2. The session and the terminal.
    if process::leave_session().is_err() {
        return;
    }
    // 3. The kernel ends it with the master.
    if !matches!(clone_files::end_with_parent(master), Ok(true)) {
        return;
    }
    // 4. From here on `ps` says who this is.
    if let Some(area) = origin.title {
        area.set(&format!("{}: environment reader", origin.program));
    }
    title::set_comm(origin.program, "reader");
    for &pid in asked {
        let worker = call_of(pid).map_or(0, |(worker, _)| worker.0);
        if writer.write_all(&worker.to_ne_bytes()).is_err() {
            return;
        }
    }
}
