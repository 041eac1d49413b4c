//! Stores that cannot be used, and faults while a server runs. Calls that are no jobs continue.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{CONFIG, enqueue, error, jobs_process, kill_all, later, query, result};
use crate::support::{Client, Daemon, PATIENCE, assert_within, process, strace, wait_for};

#[test]
fn a_store_that_cannot_be_used_fails_the_start_with_path_and_reason() {
    for (name, content, says) in [
        (
            "jobs.db",
            "this is a text file, not a database",
            "it is no SQLite database",
        ),
        ("jobs.db", "SQLite format 3\0", "jobs.db"),
    ] {
        let failure = Daemon::builder()
            .config(CONFIG)
            .file(name, content)
            .try_start()
            .err()
            .unwrap();
        assert_eq!(failure.code, Some(71), "{failure:?}");
        assert!(failure.log.contains("job store /"), "{}", failure.log);
        assert!(failure.log.contains(says), "{}", failure.log);
    }
}

#[test]
fn a_store_that_cannot_be_used_refuses_the_reload_and_calls_continue() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n")
        .file("jobs.db", "this is a text file, not a database")
        .expect_log("reload refused")
        .expect_log("could not serve")
        .start();
    let said = daemon.refused_reload(CONFIG);
    assert!(said.contains("jobs.db: "), "{said}");
    assert_eq!(
        result(&mut daemon.client(), "ping", &json!(null)),
        json!(null)
    );
    fs::remove_file(daemon.dir().join("jobs.db")).unwrap();
    daemon.reload_with(CONFIG);
    enqueue(&mut daemon.client(), &json!(1));
}

#[test]
fn the_store_of_a_corrected_reload_is_locked_and_the_one_of_the_failed_reload_is_free() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n")
        .file("wrong.db", "this is a text file, not a database")
        .expect_log("reload refused")
        .expect_log("could not serve")
        .start();
    daemon.refused_reload(&CONFIG.replace("jobs.db", "wrong.db"));
    daemon.reload_with(CONFIG);
    enqueue(&mut daemon.client(), &json!(1));
    let second = |name: &str| {
        let store = daemon.dir().join(name);
        let config = format!("[jobs]\nstore = \"sqlite:{}\"\n", store.display());
        Daemon::builder().config(&config).try_start()
    };
    let failure = second("jobs.db").err().unwrap();
    let text = format!("the server with pid {} uses it", daemon.pid());
    assert!(failure.log.contains(&text), "{}", failure.log);
    fs::remove_file(daemon.dir().join("wrong.db")).unwrap();
    assert!(second("wrong.db").is_ok());
}

#[test]
fn a_second_server_is_refused_and_names_the_first() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let store = daemon.dir().join("jobs.db");
    let config = format!("[jobs]\nstore = \"sqlite:{}\"\n", store.display());
    let failure = Daemon::builder().config(&config).try_start().err().unwrap();
    assert_eq!(failure.code, Some(71), "{failure:?}");
    let text = format!("the server with pid {} uses it", daemon.pid());
    assert!(failure.log.contains(&text), "{}", failure.log);
    enqueue(&mut daemon.client(), &json!(1));
}

#[test]
fn a_server_whose_store_is_still_in_use_by_a_killed_one_serves_calls_and_gets_it_later() {
    let mut first = Daemon::builder()
        .config(CONFIG)
        .expect_log("the master has died")
        .start();
    let store = first.dir().join("jobs.db");
    let job = enqueue(&mut first.client(), &json!(1));
    // A worker of the killed master still has the lock.
    let worker = first.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGSTOP).unwrap();
    kill(Pid::from_raw(first.pid()), Signal::SIGKILL).unwrap();
    first.wait_exit();
    let config = format!(
        "[workers]\ncount = 1\n[jobs]\nstore = \"sqlite:{}\"\nenqueue-timeout = \"300ms\"\n",
        store.display()
    );
    let second = Daemon::builder().config(&config).start();
    second.wait_log("job store away: enqueues are answered with unavailable");
    let client = &mut second.client();
    assert_eq!(result(client, "ping", &json!(null)), json!(null));
    let away = error(client, "rpc.job.enqueue", &later(&json!(2)));
    assert_eq!(
        (&away["name"], &away["started"]),
        (&json!("unavailable"), &json!(false))
    );
    kill_all(&mut first);
    second.wait_log("job store back after ");
    assert_eq!(
        result(client, "rpc.job.get", &json!({"job": job}))["state"],
        "waiting"
    );
    enqueue(client, &json!(3));
}

#[test]
fn a_server_serves_calls_while_programs_of_a_killed_one_run_attempts() {
    let config = format!(
        "{CONFIG}[methods.nap]\ncommand = [\"sleep\", \"600\"]\n[methods.nap.job]\ntimeout = \"20m\"\n"
    );
    let mut first = Daemon::builder().config(&config).start();
    let store = first.dir().join("jobs.db");
    result(
        &mut first.client(),
        "rpc.job.enqueue",
        &json!({"method": "nap"}),
    );
    wait_for("the attempt", PATIENCE, || {
        query(&store, "SELECT count(*) FROM queue WHERE pid > 0") == 1
    });
    kill_all(&mut first);
    // Another process stands for a program that the kernel has not ended yet.
    let mut left = Command::new("sleep").arg("600").spawn().unwrap();
    let pid = left.id() as i32;
    let start = process::start_ticks(pid).unwrap();
    let script = "
import sqlite3, sys
with sqlite3.connect(sys.argv[1]) as store:
    store.execute('UPDATE queue SET pid = ?, pid_start = ?', sys.argv[2:])
";
    let mut python = Command::new("python3");
    python.args(["-c", script]).arg(&store);
    python.args([pid.to_string(), start.to_string()]);
    assert!(python.status().unwrap().success());
    let config = format!("[jobs]\nstore = \"sqlite:{}\"\n", store.display());
    let second = Daemon::builder()
        .config(&config)
        .expect_log("runs an attempt of a server that was killed")
        .start();
    let client = &mut second.client();
    assert_eq!(result(client, "ping", &json!(null)), json!(null));
    assert_eq!(left.try_wait().unwrap(), None, "it gets SIGKILL after 5 s");
    assert_eq!(second.status()["jobs"]["state"], "away");
    left.kill().unwrap();
    left.wait().unwrap();
    second.wait_log("job store back after ");
    enqueue(client, &json!(1));
}

#[test]
fn a_stopped_jobs_process_makes_jobs_unavailable_and_delays_no_call() {
    // It stays stopped for longer than a command waits for its answer.
    let config = CONFIG.replace("count = 2", "count = 2\nheartbeat-timeout = \"120s\"");
    let config = format!("{config}enqueue-timeout = \"500ms\"\n");
    let daemon = Daemon::builder().config(&config).start();
    let client = &mut daemon.client();
    let first = enqueue(client, &json!(1));
    let jobs = jobs_process(&daemon);
    kill(Pid::from_raw(jobs), Signal::SIGSTOP).unwrap();
    let begun = Instant::now();
    let sent = error(client, "rpc.job.enqueue", &later(&json!(2)));
    let took = begun.elapsed();
    assert_eq!(
        (&sent["name"], &sent["started"]),
        (&json!("unavailable"), &json!(true))
    );
    assert!(took >= Duration::from_millis(500), "{took:?}");
    assert_within("the error", took, Duration::from_secs(2));
    let doubtful = sent["data"]["job"].as_str().unwrap().to_owned();
    assert_eq!(result(client, "ping", &json!(null)), json!(null));
    // When the workers have noticed, nothing is sent any more.
    wait_for("an enqueue that was not sent", PATIENCE, || {
        error(client, "rpc.job.enqueue", &later(&json!(3)))["started"] == false
    });
    wait_for("the state in the status", PATIENCE, || {
        daemon.status()["jobs"]["state"] == "away"
    });
    let list = daemon.command(&["job", "list"]);
    assert_eq!(list.status.code(), Some(69), "{list:?}");
    let said = String::from_utf8_lossy(&list.stderr).into_owned();
    assert!(said.contains("the jobs process or the master"), "{said}");
    kill(Pid::from_raw(jobs), Signal::SIGCONT).unwrap();
    let third = enqueue(client, &json!(4));
    for job in [&first, &third] {
        let record = result(client, "rpc.job.get", &json!({"job": job}));
        assert_eq!(record["state"], "waiting", "{record}");
    }
    // Whether it is stored or not, the client sends it again with its id.
    let mut again = later(&json!(2));
    again["id"] = json!(doubtful);
    let stored = result(client, "rpc.job.enqueue", &again);
    assert_eq!(stored["job"], doubtful);
}

#[test]
fn enqueues_that_wait_for_the_store_have_a_limit() {
    let config = CONFIG.replace("count = 2", "count = 1");
    let config = format!("{config}enqueue-timeout = \"20s\"\n");
    let daemon = Daemon::builder().config(&config).start();
    let jobs = jobs_process(&daemon);
    kill(Pid::from_raw(jobs), Signal::SIGSTOP).unwrap();
    let params = later(&json!("x".repeat(1 << 20)));
    let text = json!({"in": "rpc.job.enqueue", "params": params}).to_string();
    let mut clients: Vec<_> = (0..6).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.send(&text);
    }
    // 4 MiB are three of them, because each is a little longer than 1 MiB.
    wait_for("three refused calls", PATIENCE, || {
        daemon.workers().iter().map(|it| it.errors).sum::<u64>() == 3
    });
    kill(Pid::from_raw(jobs), Signal::SIGCONT).unwrap();
    let receive = |client: &mut Client| client.recv_json();
    let answers: Vec<_> = clients.iter_mut().map(receive).collect();
    for answer in answers.iter().filter(|it| it["out"] == "error") {
        let error = &answer["result"];
        assert_eq!(
            (&error["name"], &error["started"]),
            (&json!("overloaded"), &json!(false))
        );
    }
    let stored = answers.iter().filter(|it| it["result"]["new"] == true);
    assert_eq!(stored.count(), 3);
}

/// Holds the write lock of a store until it is dropped.
struct StoreLock(Child);

impl StoreLock {
    fn take(store: &Path) -> Self {
        let script = "
import sqlite3, sys
store = sqlite3.connect(sys.argv[1], timeout=20, isolation_level=None)
store.execute('BEGIN IMMEDIATE')
print('locked', flush=True)
sys.stdin.read()
";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .arg(store)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "locked\n");
        StoreLock(child)
    }
}

impl Drop for StoreLock {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn a_locked_store_is_away_until_it_is_free_and_the_doubtful_job_is_stored() {
    let config = format!("{CONFIG}enqueue-timeout = \"400ms\"\n");
    let daemon = Daemon::builder().config(&config).start();
    let client = &mut daemon.client();
    let store = daemon.dir().join("jobs.db");
    let lock = StoreLock::take(&store);
    let first = error(client, "rpc.job.enqueue", &later(&json!(1)));
    assert_eq!(
        (&first["name"], &first["started"]),
        (&json!("unavailable"), &json!(true))
    );
    let doubtful = first["data"]["job"].as_str().unwrap().to_owned();
    daemon.wait_log("job store away: enqueues are answered with unavailable, calls continue");
    let second = error(client, "rpc.job.enqueue", &later(&json!(2)));
    assert_eq!(second["name"], "unavailable");
    assert_eq!(result(client, "ping", &json!(null)), json!(null));
    drop(lock);
    daemon.wait_log("job store back after ");
    wait_for("the doubtful job", PATIENCE, || {
        let answer = super::call(client, "rpc.job.get", &json!({"job": doubtful}));
        answer["result"]["state"] == "waiting"
    });
    enqueue(client, &json!(3));
}

#[test]
fn a_full_store_is_an_answer() {
    let config = format!("{CONFIG}max-jobs = 2\n");
    let daemon = Daemon::builder().config(&config).start();
    let client = &mut daemon.client();
    let first = enqueue(client, &json!(1));
    enqueue(client, &json!(2));
    let full = error(client, "rpc.job.enqueue", &later(&json!(3)));
    assert_eq!(
        (&full["name"], &full["started"]),
        (&json!("overloaded"), &json!(false))
    );
    assert!(
        full["message"].as_str().unwrap().contains("jobs.max-jobs"),
        "{full}"
    );
    result(client, "rpc.job.cancel", &json!({"job": first}));
    enqueue(client, &json!(3));
}

#[test]
fn only_the_jobs_process_has_the_store_open() {
    let daemon = Daemon::builder().config(CONFIG).start();
    enqueue(&mut daemon.client(), &json!(1));
    let jobs = jobs_process(&daemon);
    let store = daemon.dir().join("jobs.db").canonicalize().unwrap();
    let holders = |suffix: &str| -> Vec<i32> {
        let path = format!("{}{suffix}", store.display());
        let has = |pid: &i32| {
            let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else {
                return false;
            };
            let mut open = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
            open.any(|target| target.to_string_lossy() == path)
        };
        daemon.processes().into_iter().filter(has).collect()
    };
    assert_eq!(holders(""), [jobs]);
    assert_eq!(holders("-wal"), [jobs]);
    let with_lock = holders(".lock");
    assert!(
        with_lock.contains(&jobs) && with_lock.contains(&daemon.pid()),
        "{with_lock:?}"
    );
    assert!(
        daemon
            .ready_workers()
            .iter()
            .all(|pid| with_lock.contains(pid)),
        "{with_lock:?}"
    );
    let mode = |suffix: &str| {
        use std::os::unix::fs::PermissionsExt;
        let path = format!("{}{suffix}", store.display());
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    };
    assert_eq!([mode(""), mode("-wal"), mode(".lock")], [0o600; 3]);
    assert!(process::runs(jobs));
    assert_eq!(query(&store, "SELECT count(*) FROM job"), 1);
}

/// Makes a system call of all threads of a process fail, until it is dropped.
struct FailingCall(Child);

impl FailingCall {
    /// Attaches to a process. `None` if there is no strace here.
    #[track_caller]
    fn inject(pid: i32, call: &str, error: &str) -> Option<Self> {
        let trace = format!("trace={call}");
        let inject = format!("inject={call}:error={error}");
        let options = ["-e", &trace, "-e", &inject];
        strace::attach(pid, &options, Path::new("/dev/null")).map(FailingCall)
    }
}

impl Drop for FailingCall {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGINT);
        let _ = self.0.wait();
    }
}

#[test]
fn a_sync_that_failed_is_never_taken_for_success() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("a sync failed, so the jobs process exits")
        .expect_log("could not serve: a sync of the job store failed")
        .expect_log("ended by exit code 71")
        .start();
    let client = &mut daemon.client();
    let before = enqueue(client, &json!(1));
    let first = jobs_process(&daemon);
    let Some(fault) = FailingCall::inject(first, "fdatasync", "EIO") else {
        return;
    };
    // The next jobs process is not traced. It gets the call again, and stores it once.
    let job = enqueue(client, &json!(2));
    drop(fault);
    assert_ne!(jobs_process(&daemon), first);
    for job in [before, job] {
        assert_eq!(
            result(client, "rpc.job.get", &json!({"job": job}))["state"],
            "waiting"
        );
    }
    let store = daemon.dir().join("jobs.db");
    assert_eq!(query(&store, "SELECT count(*) FROM job"), 2);
}

#[test]
fn a_full_disk_is_an_answer_until_there_is_room() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let client = &mut daemon.client();
    enqueue(client, &json!(1));
    let Some(fault) = FailingCall::inject(jobs_process(&daemon), "pwrite64", "ENOSPC") else {
        return;
    };
    let begun = Instant::now();
    let full = error(client, "rpc.job.enqueue", &later(&json!(2)));
    assert_eq!(
        (&full["name"], &full["started"]),
        (&json!("unavailable"), &json!(false))
    );
    assert_within("the answer", begun.elapsed(), Duration::from_secs(2));
    daemon.wait_log("job store full: enqueues are answered with unavailable");
    assert_eq!(result(client, "ping", &json!(null)), json!(null));
    drop(fault);
    wait_for("room", PATIENCE, || {
        super::call(client, "rpc.job.enqueue", &later(&json!(3)))["result"]["new"] == true
    });
    daemon.wait_log("job store back after ");
    let store = daemon.dir().join("jobs.db");
    assert_eq!(
        query(&store, "SELECT count(*) FROM job"),
        2,
        "refused means not stored"
    );
}
