//! System calls of a worker, seen by strace(1).

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Daemon, PATIENCE, process, wait_for};

/// A trace of all threads of a worker and of what it starts.
pub struct Strace {
    child: Child,
    file: PathBuf,
}

impl Strace {
    /// Attaches to a worker. `calls` names the system calls. `None` if there is no strace here.
    #[track_caller]
    pub fn attach(daemon: &Daemon, worker: i32, calls: &str) -> Option<Self> {
        let version = Command::new("strace")
            .arg("-V")
            .stdout(Stdio::null())
            .status();
        if version.is_err() {
            println!("not tested: there is no strace here");
            return None;
        }
        let file = daemon.dir().join("trace");
        let child = Command::new("strace")
            .args(["-f", "-qq", "-s", "100", "-e", "signal=none", "-e"])
            .args([&format!("trace={calls}"), "-p", &worker.to_string(), "-o"])
            .arg(&file)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("strace to have attached", PATIENCE, || {
            process::tasks(worker)
                .iter()
                .all(|&task| process::field(task, "TracerPid").is_some_and(|pid| pid != "0"))
        });
        Some(Strace { child, file })
    }

    /// Detaches, and returns the lines of the trace.
    pub fn end(mut self) -> Vec<String> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT).unwrap();
        self.child.wait().unwrap();
        let text = std::fs::read_to_string(&self.file).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}
