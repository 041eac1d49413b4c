//! Records what a server writes for durable jobs, while it is killed, reloaded, stopped and started again.
//!
//! recorder.c is loaded into all its processes. The client appends to the same log what it was answered. So the log says
//! which writes and syncs came before an answer.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::disk::{self, DATABASE, Disk, LOG, NAMES, Record};
use super::{LATER, jobs_process, kill_all, result};
use crate::support::{Client, Daemon, Dice, Dir, PATIENCE, source, wait_for};

/// What a client was told about jobs.
pub const STORED: usize = 0;
pub const CANCELLED: usize = 1;
pub const ENDED: usize = 2;

const CONFIG: &str = "
[workers]
count = 1
respawn-max-delay = \"0s\"
[jobs]
store = \"sqlite:jobs.db\"
";

/// What happened, in order.
pub struct Recording {
    pub records: Vec<Record>,
    /// The number of jobs of each array, which is stored as a whole or not at all. The params of a job begin with the
    /// number of its array.
    pub arrays: Vec<usize>,
    /// The number of enqueues that were acknowledged.
    pub commits: usize,
    /// Whether the jobs process was killed between a write and its sync.
    pub is_killed_before_sync: bool,
}

/// Builds the library. It needs a C compiler.
fn library(dir: &Dir) -> PathBuf {
    let library = dir.join("recorder.so");
    let compiled = Command::new("cc")
        .args([
            "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o",
        ])
        .arg(&library)
        .arg(source().join("tests/durable_jobs/recorder.c"))
        .output();
    let compiled = compiled.expect("a C compiler");
    assert!(compiled.status.success(), "{compiled:?}");
    library
}

/// A client that enqueues and records what it was answered.
struct Producer {
    client: Client,
    log: File,
    dice: Dice,
    arrays: Vec<usize>,
    cancellable: Vec<String>,
}

impl Producer {
    fn note(&mut self, kind: usize, jobs: &[String]) {
        let id = |job: &String| {
            let number = u128::from_str_radix(&job.replace('-', ""), 16);
            number.unwrap().to_be_bytes()
        };
        let jobs: Vec<[u8; 16]> = jobs.iter().map(id).collect();
        self.log.write_all(&disk::answer(kind, &jobs)).unwrap();
    }

    /// Enqueues arrays of jobs. Half of the arrays are due at once. Sometimes waits for a job, or cancels one.
    fn enqueue(&mut self, arrays: usize) {
        for _ in 0..arrays {
            // Some arrays are short and have params that need several pages.
            let (jobs, pad) = match self.dice.roll(8) {
                0 => (1 + self.dice.roll(4), self.dice.roll(9_000)),
                _ => (1 + self.dice.roll(70), self.dice.roll(50)),
            };
            let (number, pad) = (self.arrays.len(), "x".repeat(pad));
            self.arrays.push(jobs);
            let is_due = self.dice.roll(2) == 0;
            let job = json!({
                "method": "ping",
                "params": format!("{number}:{pad}"),
                "delay_ms": u64::from(!is_due) * LATER,
            });
            let stored = result(&mut self.client, "rpc.job.enqueue", &json!(vec![job; jobs]));
            let id = |stored: &Value| stored["job"].as_str().unwrap().to_owned();
            let ids: Vec<String> = stored.as_array().unwrap().iter().map(id).collect();
            assert_eq!(ids.len(), jobs);
            self.note(STORED, &ids);
            if !is_due {
                self.cancellable.push(ids[0].clone());
            } else if self.dice.roll(3) == 0 {
                self.wait(&ids[jobs - 1]);
            }
            if self.dice.roll(6) == 0
                && let Some(job) = self.cancellable.pop()
            {
                let params = json!({"job": job});
                let answer = result(&mut self.client, "rpc.job.cancel", &params);
                assert_eq!(answer, true);
                self.note(CANCELLED, &[job]);
            }
        }
    }

    fn wait(&mut self, job: &str) {
        let params = json!({"job": job, "timeout_ms": 10_000});
        let record = result(&mut self.client, "rpc.job.wait", &params);
        // A worker that drains answers with the record as it is.
        if record["ended"] == true {
            self.note(ENDED, &[job.to_owned()]);
        }
    }
}

/// Records `commits` enqueues of a real server. The jobs process is killed between a write and its sync, and while it is
/// idle. The server is reloaded, stopped, started again, and killed at the end.
pub fn record(commits: usize, dice: Dice) -> Recording {
    let dir = Dir::new();
    let library = library(&dir);
    let (log, kill) = (dir.join("records"), dir.join("kill"));
    let started = |log: &Path| File::options().append(true).create(true).open(log).unwrap();
    // The path of the store must be known before the server has its directory.
    let store = dir.join(NAMES[0]);
    let config = CONFIG.replace("jobs.db", store.to_str().unwrap());
    let mut daemon = Daemon::builder()
        .config(&config)
        .env("LD_PRELOAD", library)
        .env("RECORDER_STORE", &store)
        .env("RECORDER_LOG", &log)
        .env("RECORDER_KILL", &kill)
        .expect_log("ended by SIGKILL")
        .start();
    let mut producer = Producer {
        client: daemon.client(),
        log: started(&log),
        dice,
        arrays: Vec::new(),
        cancellable: Vec::new(),
    };
    let part = commits / 8;
    producer.enqueue(part);
    fs::write(&kill, "").unwrap();
    producer.enqueue(part);
    let is_killed_before_sync = fs::remove_file(&kill).is_err();
    if !is_killed_before_sync {
        // No commit was synced. The images show what that means.
        let jobs = jobs_process(&daemon);
        signal::kill(Pid::from_raw(jobs), Signal::SIGKILL).unwrap();
    }
    daemon.reload();
    producer.client = daemon.client();
    producer.enqueue(commits - 4 * part);
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    daemon.wait_group_gone();
    daemon = daemon.start_again();
    producer.client = daemon.client();
    producer.enqueue(2 * part);
    wait_for("the end of all jobs that are due", PATIENCE, || {
        let jobs = &daemon.status()["jobs"];
        jobs["due"] == 0 && jobs["running"] == 0
    });
    // A jobs process that is idle writes nothing, so its last write is recorded.
    kill_all(&mut daemon);
    let records = disk::records(&fs::read(&log).unwrap());
    let mut end = Disk::default();
    records.iter().for_each(|record| end.apply(record));
    for (name, content) in NAMES.iter().zip(end.now()) {
        let found = fs::read(dir.join(name)).ok();
        assert!(
            found == content,
            "the recorder has missed a change of {name}"
        );
    }
    assert_covered(&records);
    Recording {
        records,
        arrays: producer.arrays,
        commits,
        is_killed_before_sync,
    }
}

/// Asserts that all happened that a store does: checkpoints, and a log that was begun again in the same file.
fn assert_covered(records: &[Record]) {
    let (mut length, mut begun, mut again, mut cut, mut synced) = (0, 0, 0, 0, 0);
    for record in records {
        match record {
            Record::Write(LOG, offset, bytes) => {
                begun += u32::from(*offset == 0);
                again += u32::from(*offset == 0 && length > 0);
                length = length.max(offset + bytes.len());
            }
            Record::Cut(LOG, to) => (length, cut) = (*to, cut + 1),
            Record::Unlink(LOG) => length = 0,
            Record::Sync(DATABASE) => synced += 1,
            _ => {}
        }
    }
    println!(
        "{} records: the log was begun {begun} times, {again} times without being cut before; the database was synced \
         {synced} times",
        records.len()
    );
    assert!(again > 0, "no log was begun again in the same file");
    assert!(cut > 2 && synced > 3, "there were too few checkpoints");
}
