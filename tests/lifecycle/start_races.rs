//! Tests disturbed starts: by a signal at any time, and by forty-nine other starts.
//!
//! `PREFORKD_STARTS` and `PREFORKD_ROUNDS` set their number, and `PREFORKD_SEED` repeats a run.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lifecycle::start::{DETACHED, OWN_SOCKET, preforkd};
use crate::support::{
    Dice, Dir, PATIENCE, alone, assert_within, from_environment, process, wait_for,
};

const SIGNALS: [Signal; 10] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGCHLD,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
];
const ENDING: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT];

/// Log lines of a master that got a signal meant for a worker.
const MASTERS_OWN: [&str; 6] = [
    "reload: reading",
    "nothing to reopen",
    "SIGUSR2",
    "upgrade",
    "number of workers",
    "stopping",
];

/// The longest time for any step.
const MOST: Duration = Duration::from_secs(2);

/// Writes a configuration that needs no port and stays in the foreground.
fn foreground(dir: &Dir) {
    let config = format!("{DETACHED}{OWN_SOCKET}")
        .replace("daemon = true\n", "")
        .replace("log.file = \"log\"\n", "");
    dir.write("p.toml", config);
}

/// A start in progress, in its own process group. It is killed with its workers at the end of the test in
/// any case.
struct Start<'a> {
    dir: &'a Dir,
    master: Child,
    /// Its log, by device and inode.
    log: (u64, u64),
    ended: Option<ExitStatus>,
}

impl<'a> Start<'a> {
    fn new(dir: &'a Dir) -> Self {
        let log = File::create(dir.join("log")).unwrap();
        let seen = log.metadata().unwrap();
        let mut command = preforkd(dir, &["run"]);
        let master = command.process_group(0).stderr(log).spawn().unwrap();
        Start {
            dir,
            master,
            log: (seen.dev(), seen.ino()),
            ended: None,
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.master.id().cast_signed())
    }

    /// Returns the master and its workers.
    fn processes(&self) -> Vec<i32> {
        process::with_standard_error(self.log)
    }

    fn has_ended(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended = self.master.try_wait().unwrap();
        }
        self.ended.is_some()
    }

    fn holds_the_pid_file(&self) -> bool {
        self.dir.read("p.pid").trim() == self.pid().to_string()
    }

    /// Returns its first worker, as soon as there is one.
    fn worker(&mut self) -> Option<Pid> {
        let pid = self.pid();
        let children = format!("/proc/{pid}/task/{pid}/children");
        let end = Instant::now() + PATIENCE;
        while !self.has_ended() && Instant::now() < end {
            let text = std::fs::read_to_string(&children).unwrap_or_default();
            if let Some(child) = text.split_whitespace().next() {
                return child.parse().ok().map(Pid::from_raw);
            }
        }
        None
    }
}

impl Drop for Start<'_> {
    fn drop(&mut self) {
        let _ = self.master.kill();
        let _ = self.master.wait();
        for pid in self.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn spin(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

/// Runs one start with a signal. Returns how long the longest step took, or what was wrong.
fn disturb(dir: &Dir, dice: &mut Dice) -> Result<Duration, String> {
    let signal = dice.pick(&SIGNALS);
    let to_worker = dice.roll(4) == 0;
    let moment = Duration::from_micros(dice.roll(50_000) as u64);
    let wait_until_ready = dice.roll(2) == 0;
    let mut start = Start::new(dir);
    let target = if to_worker {
        let Some(worker) = start.worker() else {
            return Err(format!("no worker came: {}", dir.read("log")));
        };
        spin(moment / 20);
        worker
    } else {
        spin(moment);
        start.pid()
    };
    // Once it holds the pid file, only an order to stop may end it.
    let established = start.holds_the_pid_file();
    match kill(target, signal) {
        Ok(()) => {}
        Err(Errno::ESRCH) if to_worker => {}
        Err(error) => return Err(format!("{signal} was not sent: {error}")),
    }
    let case = format!(
        "{signal} to the {} after {moment:?}",
        if to_worker { "worker" } else { "master" }
    );
    let serves = established && !ENDING.contains(&signal);
    let mut slowest = Duration::ZERO;
    if serves && wait_until_ready {
        let begin = Instant::now();
        wait_for(&format!("readiness in spite of {case}"), PATIENCE, || {
            dir.read("log").contains("ready: ") || start.has_ended()
        });
        slowest = begin.elapsed();
        let log = dir.read("log");
        if start.has_ended() {
            return Err(format!("{case} ended it: {log}"));
        }
        let heard = MASTERS_OWN.iter().find(|text| log.contains(**text));
        if let Some(heard) = heard.filter(|_| to_worker) {
            return Err(format!("{case} was heard by the master, {heard:?}: {log}"));
        }
    }
    let begin = Instant::now();
    let _ = kill(start.pid(), Signal::SIGTERM);
    // SIGTTIN and SIGTTOU stop a process that does not handle them yet.
    let _ = kill(start.pid(), Signal::SIGCONT);
    wait_for(&format!("the end after {case} and TERM"), PATIENCE, || {
        start.has_ended()
    });
    wait_for(&format!("no orphan after {case}"), PATIENCE, || {
        start.processes().is_empty()
    });
    slowest = slowest.max(begin.elapsed());
    let status = start.ended.unwrap();
    if serves && !status.success() {
        let log = dir.read("log");
        return Err(format!("{case}, then TERM: {status}: {log}"));
    }
    // A failed start gives its reason; one that a signal ended did not hold the pid file.
    if status.code().is_some_and(|code| code != 0) && dir.read("log").is_empty() {
        return Err(format!("{case}: {status} without a word"));
    }
    if established && status.signal().is_some() {
        return Err(format!("{case}: {status} with the pid file held"));
    }
    Ok(slowest)
}

#[test]
fn a_signal_at_any_moment_of_a_start_leaves_no_process_that_hangs() {
    let _alone = alone();
    let starts = from_environment("PREFORKD_STARTS", 200);
    let mut dice = Dice::of_the_day("PREFORKD_SEED");
    let dir = Dir::new();
    foreground(&dir);
    let mut faults = Vec::new();
    let mut slowest = Duration::ZERO;
    for _ in 0..starts {
        match disturb(&dir, &mut dice) {
            Ok(took) => slowest = slowest.max(took),
            Err(fault) => faults.push(fault),
        }
    }
    println!(
        "{starts} starts, a signal within 50 ms of each: {} faults, the slowest step took {slowest:?}",
        faults.len()
    );
    assert!(faults.is_empty(), "{:#?}", &faults[..faults.len().min(5)]);
    assert_within("the slowest", slowest, MOST);
    assert!(!dir.join("p.pid").exists() || !dir.read("p.pid").is_empty());
}

/// Reads the pid file continuously and returns the contents that it saw.
fn watch(dir: &Dir, until: &AtomicBool) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let path = dir.join("p.pid");
    while !until.load(Ordering::Relaxed) {
        if let Ok(text) = std::fs::read_to_string(&path) {
            seen.insert(text);
        }
    }
    seen
}

/// Starts fifty at once with one pid file. Returns how long the slowest failed one took.
fn race(count: usize) -> Duration {
    let dir = Dir::new();
    foreground(&dir);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(&dir, &over));
        let mut masters: Vec<(Child, Instant)> = (0..count)
            .map(|_| {
                let mut command = preforkd(&dir, &["run"]);
                let child = command.stderr(Stdio::null()).spawn().unwrap();
                (child, Instant::now())
            })
            .collect();
        let mut codes = Vec::new();
        let mut slowest = Duration::ZERO;
        wait_for("all but one to give up", PATIENCE, || {
            masters.retain_mut(|(master, since)| match master.try_wait().unwrap() {
                Some(status) => {
                    codes.push(status.code());
                    slowest = slowest.max(since.elapsed());
                    false
                }
                None => true,
            });
            masters.len() <= 1
        });
        let survivor = &mut masters.first_mut().expect("one lives").0;
        let pid = survivor.id().cast_signed();
        wait_for("the survivor's pid", PATIENCE, || {
            dir.read("p.pid") == format!("{pid}\n")
        });
        over.store(true, Ordering::Relaxed);
        let seen = watcher.join().unwrap();
        kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
        assert!(survivor.wait().unwrap().success());
        assert!(codes.iter().all(|code| *code == Some(71)), "{codes:?}");
        assert_eq!(seen, BTreeSet::from([format!("{pid}\n")]), "never another");
        slowest
    })
}

#[test]
fn of_fifty_masters_started_at_once_one_lives() {
    let _alone = alone();
    let rounds = from_environment("PREFORKD_ROUNDS", 5);
    let slowest = (0..rounds).map(|_| race(50)).max().unwrap();
    println!(
        "{rounds} rounds of 50 masters: one lived each time, the others gave up within {slowest:?}"
    );
    assert_within("the slowest", slowest, MOST);
}
