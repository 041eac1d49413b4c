//! Serves the commands of operators in the jobs process: `job list`, `show`, `retry`, `purge`, `pause`, `resume`,
//! `export` and `import`.
//!
//! The master has accepted the connection and passes it on ([`crate::protocol::job_control`] has the messages).
//! Each connection has a thread, which reads and writes without hurry: the other threads of the process never
//! wait for a command.
//!
//! - [`command`]: one command, and what it needs of the store.

mod command;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

pub use command::{ControlReply, ControlStore, ControlTask};
use command::{OperatorCommand, UNAVAILABLE};

use crate::protocol::control::{ControlResponse, to_line};
use crate::sys::signal::with_signals_blocked;

/// The largest number of commands at one time.
const MOST_COMMANDS: usize = 8;

/// The threads of commands.
pub struct ControlThreads {
    store: Arc<dyn ControlStore>,
    running: Arc<AtomicUsize>,
}

impl ControlThreads {
    pub fn new(store: Arc<dyn ControlStore>) -> Self {
        ControlThreads {
            store,
            running: Arc::default(),
        }
    }

    /// Serves a connection that the master has passed on. If there are too many, the command is refused.
    pub fn serve(&self, connection: OwnedFd) {
        let stream = UnixStream::from(connection);
        if self.running.load(Ordering::Relaxed) >= MOST_COMMANDS {
            return refuse(
                stream,
                "too many other commands use the jobs; try again later",
            );
        }
        let running = CountedCommand::new(&self.running);
        let store = Arc::clone(&self.store);
        let serve = move || {
            let _running = running;
            match OperatorCommand::new(stream, &*store) {
                Ok(command) => command.serve(),
                Err(error) => log::warn!("a job command is not served: {error}"),
            }
        };
        let thread = thread::Builder::new().name("job command".into());
        // Without a thread the connection is dropped, and the command says that the process has ended.
        if let Err(error) = with_signals_blocked(|| thread.spawn(serve)) {
            log::warn!("no thread for a job command: {error}");
        }
    }
}

/// Counts a command as running until it is dropped, also by a panic.
struct CountedCommand(Arc<AtomicUsize>);

impl CountedCommand {
    fn new(running: &Arc<AtomicUsize>) -> Self {
        running.fetch_add(1, Ordering::Relaxed);
        CountedCommand(Arc::clone(running))
    }
}

impl Drop for CountedCommand {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Refuses a connection without waiting.
fn refuse(mut stream: UnixStream, reason: &str) {
    let answer = ControlResponse::refused(reason, UNAVAILABLE);
    // The command is gone if this fails.
    let _ = to_line(&answer).and_then(|line| stream.write_all(&line));
}

#[cfg(test)]
mod tests;
