//! Runs a program that does all it can to leave processes behind, and checks what is left of them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Daemon, Dir, PATIENCE, assert_within, process, wait_for};

/// The number of processes of [`HOSTILE`].
const PROCESSES: usize = 5;

/// Ignores all signals that can be ignored, and forks twice with a new session, in the middle and at the
/// end. Each process writes its pid. All except the first one and one that exits sleep for an hour, with
/// all their inherited descriptors open.
const HOSTILE: &str = r#"
import os, signal, sys, time
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
def note():
    with open(sys.argv[1], "a") as file:
        file.write("%d\n" % os.getpid())
note()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid() if os.getpid() != os.getsid(0) else None
        note()
        if os.fork() == 0:
            os.setpgid(0, 0)
            note()
        time.sleep(3600)
    note()
    os._exit(0)
if os.fork() == 0:
    note()
    time.sleep(3600)
"#;

/// A daemon of one worker that runs such a program.
pub struct Hostile {
    pub daemon: Daemon,
    /// The file with the pids.
    pids: PathBuf,
    _dir: Dir,
}

impl Hostile {
    /// Starts it. Its first process continues with `rest` (Python). `config` makes the configuration from
    /// the beginning of its command line (`"python3", "…", "…"`). `expect` lists lines for its log.
    #[track_caller]
    pub fn start(rest: &str, config: impl Fn(&str) -> String, expect: &[&str]) -> Self {
        let dir = Dir::new();
        let program = dir.write("hostile.py", format!("{HOSTILE}{rest}"));
        let pids = dir.join("pids");
        let command = format!(
            "\"python3\", {:?}, {:?}",
            program.to_str().unwrap(),
            pids.to_str().unwrap()
        );
        let config = format!("[workers]\ncount = 1\n{}", config(&command));
        let mut builder = Daemon::builder().config(&config);
        for line in expect {
            builder = builder.expect_log(line);
        }
        Hostile {
            daemon: builder.start(),
            pids,
            _dir: dir,
        }
    }

    /// Returns all processes that were ever started.
    pub fn all(&self) -> Vec<i32> {
        let text = std::fs::read_to_string(&self.pids).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Returns the processes of `programs` programs, once all have written their pids.
    #[track_caller]
    pub fn started(&self, programs: usize) -> Vec<i32> {
        let count = programs * PROCESSES;
        wait_for("all processes of a program", PATIENCE, || {
            self.all().len() >= count
        });
        let mut pids = self.all();
        pids.truncate(count);
        pids
    }

    /// Ends the pool process with a signal. Waits until none of `pids` is left and there is another pool
    /// process.
    #[track_caller]
    pub fn end_pool(&self, signal: Signal, pids: &[i32], what: &str) {
        let pool = self.daemon.pool();
        kill(Pid::from_raw(pool), signal).unwrap();
        gone(pids, what);
        wait_for("a fresh pool process and no zombie", PATIENCE, || {
            let status = self.daemon.status();
            let now = &status["pools"][0];
            now["state"] == "ready"
                && now["pid"] != pool
                && process::zombies(self.daemon.pid()).is_empty()
        });
    }

    /// Ends the worker with a signal. Waits until none of `pids` is left and there is another worker.
    #[track_caller]
    pub fn end_worker(&self, signal: Signal, pids: &[i32], what: &str) {
        let worker = self.daemon.ready_workers()[0];
        kill(Pid::from_raw(worker), signal).unwrap();
        gone(pids, what);
        wait_for("a fresh worker and no zombie", PATIENCE, || {
            let now = self.daemon.ready_workers();
            now.len() == 1 && now[0] != worker && process::zombies(self.daemon.pid()).is_empty()
        });
    }
}

/// Waits until none of them is left, not even as a zombie, and prints how long that took.
#[track_caller]
pub fn gone(pids: &[i32], what: &str) {
    let began = Instant::now();
    wait_for("the end of all processes of a program", PATIENCE, || {
        pids.iter().all(|&pid| process::state(pid).is_none())
    });
    let took = began.elapsed();
    let what = format!("{what}, {} processes gone", pids.len());
    assert_within(&what, took, Duration::from_secs(1));
}
