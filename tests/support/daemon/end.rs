//! Ends a test's daemon: on request or when it is dropped, and then checks its log.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::super::{PATIENCE, log, pause};
use super::Daemon;

impl Daemon {
    /// Stops it without checking its log. Returns its exit status and log, or what went wrong. It is for
    /// tests that make it fail.
    pub fn end(mut self) -> Result<(ExitStatus, String), Vec<String>> {
        let was_running = self.try_wait().is_none();
        let mut faults = self.end_group();
        // The test checks the exit status itself.
        faults.retain(|fault| !was_running || !fault.starts_with("TERM should"));
        let log = self.log();
        self.child = None;
        match (self.exited, faults.is_empty()) {
            (Some(status), true) => Ok((status, log)),
            _ => Err(faults),
        }
    }

    /// Asks the master to stop, and kills what is left after a while. Returns what went wrong.
    pub(super) fn end_group(&mut self) -> Vec<String> {
        let mut faults = Vec::new();
        let master = Pid::from_raw(self.pid());
        let was_running = self.try_wait().is_none();
        if was_running {
            // A master stopped by SIGSTOP could not handle SIGTERM.
            let _ = kill(master, Signal::SIGTERM);
            let _ = kill(master, Signal::SIGCONT);
        }
        let end = Instant::now() + PATIENCE;
        while (self.try_wait().is_none() || !self.processes().is_empty()) && Instant::now() < end {
            pause();
        }
        let left = self.processes();
        if !left.is_empty() {
            faults.push(format!(
                "still there {PATIENCE:?} after TERM, so killed: {left:?}"
            ));
            for pid in left {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        if let Some(child) = &mut self.child {
            self.exited = child.wait().ok();
        }
        match self.exited {
            Some(status) if was_running && !status.success() => faults.push(format!(
                "TERM should end it with code 0, but: code {:?}, signal {:?}",
                status.code(),
                status.signal()
            )),
            _ => {}
        }
        faults
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.is_none() {
            return;
        }
        let mut faults = self.end_group();
        let text = self.log();
        for line in log::unexpected(&text, &self.builder.expected) {
            faults.push(format!("unexpected in the log: {line}"));
        }
        for line in log::missing(&text, &self.builder.expected) {
            faults.push(format!("expected in the log, and never came: {line}"));
        }
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{text}\nand at its end: {faults:#?}");
        } else if !faults.is_empty() {
            panic!("the daemon's log:\n{text}\nbut: {faults:#?}");
        }
    }
}
