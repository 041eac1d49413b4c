//! System calls of a worker, seen by strace(1).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Daemon, PATIENCE, process, wait_for};

/// A trace of all threads of a worker and of what it starts.
pub struct Strace {
    child: Child,
    file: PathBuf,
}

/// Attaches strace(1) to all threads of a process, with these options. `None` if there is no strace here.
#[track_caller]
pub fn attach(pid: i32, options: &[&str], output: &Path) -> Option<Child> {
    let version = Command::new("strace")
        .arg("-V")
        .stdout(Stdio::null())
        .status();
    if version.is_err() {
        println!("not tested: there is no strace here");
        return None;
    }
    let child = Command::new("strace")
        .args(["-f", "-qq", "-p", &pid.to_string()])
        .args(options)
        .arg("-o")
        .arg(output)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("strace to have attached", PATIENCE, || {
        process::tasks(pid)
            .iter()
            .all(|&task| process::field(task, "TracerPid").is_some_and(|pid| pid != "0"))
    });
    Some(child)
}

impl Strace {
    /// Attaches to a worker. `calls` names the system calls. `None` if there is no strace here.
    #[track_caller]
    pub fn attach(daemon: &Daemon, worker: i32, calls: &str) -> Option<Self> {
        let file = daemon.dir().join("trace");
        let trace = format!("trace={calls}");
        let options = ["-s", "100", "-e", "signal=none", "-e", &trace];
        let child = attach(worker, &options, &file)?;
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
