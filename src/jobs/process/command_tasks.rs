//! Holds the tasks of operators' commands that have no reply yet, and the channel from their threads to the event loop.
//!
//! A command runs in a thread of its own, which waits for the reply. The event loop never waits for a command.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::store_event::RequestHold;
use crate::handler::registry::Registry;
use crate::jobs::control::{ControlReply, ControlStore, ControlTask, ControlThreads};
use crate::sys::waker::Waker;

pub type TaskReply = Result<ControlReply, String>;

/// Sends tasks from the thread of a command to the event loop.
struct TaskSender {
    tasks: Sender<(ControlTask, Sender<TaskReply>)>,
    waker: Arc<Waker>,
    registry: Arc<Registry>,
}

impl ControlStore for TaskSender {
    fn run(&self, task: ControlTask) -> TaskReply {
        let (sender, reply) = bounded(1);
        let sent = self.tasks.send((task, sender));
        self.waker.wake();
        let reply = sent.ok().and_then(|()| reply.recv().ok());
        reply.unwrap_or_else(|| Err("the jobs process is exiting; try again".to_owned()))
    }

    fn has_method(&self, method: &str) -> bool {
        self.registry.find(method, false).is_some()
    }
}

/// A task that was passed to a thread of the store.
pub struct AwaitedTask {
    pub reply: Sender<TaskReply>,
    /// `Some` for a change.
    pub hold: Option<Arc<RequestHold>>,
    pub due_ms: u64,
}

/// The commands, and their tasks without a reply.
pub struct Commands {
    threads: ControlThreads,
    pub tasks: Receiver<(ControlTask, Sender<TaskReply>)>,
    pub awaited: BTreeMap<u64, AwaitedTask>,
    pub next: u64,
}

impl Commands {
    pub fn new(waker: &Arc<Waker>, registry: &Arc<Registry>) -> Self {
        let (sender, tasks) = unbounded();
        let store = Arc::new(TaskSender {
            tasks: sender,
            waker: Arc::clone(waker),
            registry: Arc::clone(registry),
        });
        Commands {
            threads: ControlThreads::new(store),
            tasks,
            awaited: BTreeMap::new(),
            next: 0,
        }
    }

    /// Serves a connection that the master has passed on.
    pub fn serve(&self, connection: OwnedFd) {
        self.threads.serve(connection);
    }

    /// Returns when `pass_time` is due.
    pub fn next_ms(&self) -> Option<u64> {
        self.awaited.values().map(|task| task.due_ms).min()
    }
}
