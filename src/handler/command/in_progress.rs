//! The commands that run, for the slow log: which process a call has started, and what that has written to
//! standard error so far.

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard};

use super::output::Tail;
use crate::sys::lock::lock;
use crate::sys::process::Pid;

type SharedTail = Arc<Mutex<Tail>>;

/// The running commands, by the numbers of their calls in this process.
static RUNNING: Mutex<BTreeMap<u64, (Pid, SharedTail)>> = Mutex::new(BTreeMap::new());

/// A command from its start to its end.
pub(super) struct ShownCommand {
    call: u64,
    stderr: SharedTail,
}

impl ShownCommand {
    /// Shows the process `pid` of the call with this number.
    pub fn new(call: u64, pid: Pid) -> Self {
        let stderr = SharedTail::default();
        lock(&RUNNING).insert(call, (pid, Arc::clone(&stderr)));
        ShownCommand { call, stderr }
    }

    pub fn stderr(&self) -> MutexGuard<'_, Tail> {
        lock(&self.stderr)
    }

    /// Returns the end of standard error.
    pub fn into_stderr(self) -> String {
        let tail = mem::take(&mut *self.stderr());
        tail.into_text()
    }
}

impl Drop for ShownCommand {
    fn drop(&mut self) {
        lock(&RUNNING).remove(&self.call);
    }
}

/// Returns the process that a call has started, and at most the last `most` bytes of its standard error.
pub fn command_of(call: u64, most: usize) -> Option<(Pid, String)> {
    let (pid, stderr) = lock(&RUNNING).get(&call).cloned()?;
    let text = lock(&stderr).end(most);
    Some((pid, text))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_while_it_runs() {
        let call = u64::MAX;
        let shown = ShownCommand::new(call, Pid(7));
        shown.stderr().add("x\u{e9}yz".as_bytes());
        assert_eq!(command_of(call, 3), Some((Pid(7), "yz".into())));
        assert_eq!(command_of(call, 100), Some((Pid(7), "xéyz".into())));
        assert_eq!(shown.into_stderr(), "xéyz");
        assert_eq!(command_of(call, 3), None);
    }
}
