//! Tests `preforkd job …` with a real server: over the listener, and over the control socket.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{JOBS, enqueue_job, with_jobs};
use crate::support::{Daemon, PATIENCE, binary, wait_for};

const ID: &str = "018f0000-0000-7000-8000-000000000001";

#[track_caller]
fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone())
        .unwrap()
        .trim_end()
        .to_owned()
}

/// Returns a command over the listener.
fn calling(daemon: &Daemon, words: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.arg("job").args(words).arg("--address");
    command
        .arg(daemon.address().to_string())
        .env_remove("RUST_LOG");
    command.stdin(Stdio::null());
    command
}

/// Runs a command over the listener.
fn call(daemon: &Daemon, words: &[&str]) -> Output {
    calling(daemon, words).output().unwrap()
}

/// Runs a command over the control socket.
fn operate(daemon: &Daemon, words: &[&str]) -> Output {
    daemon.command(&[&["job"], words].concat())
}

fn jobs(daemon: &Daemon, filter: &[&str]) -> Vec<Value> {
    let lines = text(&operate(daemon, &[&["list", "--json"], filter].concat()));
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Returns the error of a command that must fail with this code.
#[track_caller]
fn refused(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_job_that_is_not_due_is_listed_shown_cancelled_retried_and_purged() {
    let daemon = with_jobs("").start();
    let id = text(&call(
        &daemon,
        &["enqueue", "echo", "[1e0,  2]", "--id", ID, "--delay", "1h"],
    ));
    assert_eq!(id, ID);
    let limits = ["--max-attempts", "3", "--expires", "2h", "--timeout", "1s"];
    let later = ["enqueue", "echo", "--delay", "1h", "--priority", "-3"];
    let other = text(&call(&daemon, &[&later[..], &limits].concat()));
    assert_eq!(other.len(), 36);
    let all = jobs(&daemon, &[]);
    assert_eq!(
        (all.len(), &all[0]["job"], &all[1]["priority"]),
        (2, &ID.into(), &(-3).into())
    );
    assert_eq!(all[1]["max_attempts"], 3, "{}", all[1]);
    assert!(all[1]["expires_at_ms"].is_u64(), "{}", all[1]);

    let row = text(&operate(&daemon, &["list", "--state", "waiting"]));
    let first = row.lines().next().unwrap();
    assert!(first.starts_with(&format!("{ID}  waiting  ")), "{row}");
    assert!(
        first.contains("0/10  due in 59m") && first.ends_with("  echo"),
        "{row}"
    );
    let shown = text(&operate(&daemon, &["show", ID]));
    assert!(shown.contains(r#""params":[1e0,  2],"#), "{shown}");

    let said = text(&call(&daemon, &["cancel", ID]));
    assert_eq!(
        said,
        format!("{ID} cancelled, or asked to end if it was running")
    );
    assert_eq!(
        text(&call(&daemon, &["cancel", ID])),
        format!("{ID} had ended before")
    );
    let said = refused(&call(&daemon, &["wait", ID]), 1);
    assert!(
        said.contains(&format!("job {ID} is cancelled without an attempt")),
        "{said}"
    );

    // It would be due at once.
    text(&operate(&daemon, &["pause", "echo"]));
    let said = text(&operate(&daemon, &["retry", ID]));
    assert_eq!(said, "1 job waits again");
    let left = operate(&daemon, &["purge", ID]);
    let said = refused(&left, 1);
    assert!(said.contains(&format!("{ID}: it is waiting")), "{said}");
    assert!(said.contains("0 jobs were removed, 1 left alone"), "{said}");

    text(&call(&daemon, &["cancel", &other]));
    assert_eq!(
        text(&operate(&daemon, &["purge", "--state", "cancelled"])),
        "1 job was removed"
    );
    assert!(!jobs(&daemon, &[]).iter().any(|job| job["job"] == *other));
    daemon.wait_log("control job-purge done: 1 job was removed command=job-purge result=done uid=");
    daemon.wait_log("control job-purge refused: ");
}

#[test]
fn enqueue_prints_the_result_if_it_waits() {
    let daemon = with_jobs("").start();
    let words = ["enqueue", "echo", r#"{"a": 1.50}"#, "--id", ID, "--wait"];
    assert_eq!(text(&call(&daemon, &words)), r#"{"a": 1.50}"#);
    assert_eq!(
        text(&call(&daemon, &words)),
        r#"{"a": 1.50}"#,
        "the same job"
    );
    assert_eq!(text(&call(&daemon, &["wait", ID])), r#"{"a": 1.50}"#);
    assert_eq!(jobs(&daemon, &["--state", "done"]).len(), 1);

    let said = refused(&call(&daemon, &["enqueue", "fails", "--wait"]), 1);
    assert!(
        said.contains(" is dead (attempts) after 1 attempt: command-failed: "),
        "{said}"
    );
    let said = refused(&call(&daemon, &["enqueue", "nothing"]), 1);
    assert!(
        said.contains("nothing: method-not-found (-32601): "),
        "{said}"
    );
    assert!(said.contains("(the call did not begin)"), "{said}");
    let said = refused(&call(&daemon, &["enqueue", "echo", "7", "--id", ID]), 1);
    assert!(said.contains("conflict (-32013)"), "{said}");
    let unknown = "018f0000-0000-7000-8000-00000000000f";
    let said = refused(&call(&daemon, &["wait", unknown]), 1);
    assert!(said.contains("no-such-job (-32014)"), "{said}");
}

#[test]
fn a_key_stands_for_one_live_job() {
    let daemon = with_jobs("").start();
    let enqueue = |delay| {
        text(&call(
            &daemon,
            &["enqueue", "echo", "--key", "k", "--delay", delay],
        ))
    };
    let first = enqueue("1h");
    assert_eq!(enqueue("1h"), first);
    text(&call(&daemon, &["cancel", &first]));
    assert_ne!(enqueue("1h"), first);
}

#[test]
fn a_paused_method_begins_no_attempt_until_it_is_resumed() {
    let daemon = with_jobs("").start();
    let said = text(&operate(&daemon, &["pause", "echo"]));
    assert!(said.starts_with("echo is paused: "), "{said}");
    text(&call(&daemon, &["enqueue", "echo", "7", "--id", ID]));
    wait_for("the paused method in the status", PATIENCE, || {
        let jobs = &daemon.status()["jobs"];
        jobs["methods"][0]["paused"] == true && jobs["waiting"] == 1
    });
    assert_eq!(jobs(&daemon, &[])[0]["state"], "waiting");
    text(&operate(&daemon, &["resume", "echo"]));
    assert_eq!(text(&call(&daemon, &["wait", ID])), "7");
}

#[test]
fn an_export_is_imported_by_another_server() {
    let daemon = with_jobs("").start();
    text(&call(
        &daemon,
        &["enqueue", "echo", "[1e0,  2]", "--id", ID, "--delay", "1h"],
    ));
    let broken = "[\n{\"ok\":true}\n,\r7]";
    text(&call(&daemon, &["enqueue", "echo", broken, "--wait"]));
    let exported = operate(&daemon, &["export"]);
    let lines = text(&exported);
    assert_eq!(lines.lines().count(), 2);
    assert!(lines.contains(r#""params":[1e0,  2],"#), "{lines}");
    let said = String::from_utf8(exported.stderr).unwrap();
    assert!(said.contains("2 jobs were exported"), "{said}");

    let other = with_jobs("").start();
    let import = |input: &str| {
        let mut command = other.asking(&["job", "import"]);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(input.as_bytes())
            .unwrap();
        child.wait_with_output().unwrap()
    };
    assert_eq!(
        text(&import(&lines)),
        "2 jobs were stored, 0 left out (their id or key exists)"
    );
    assert_eq!(
        text(&import(&lines)),
        "0 jobs were stored, 2 left out (their id or key exists)"
    );
    assert_eq!(text(&operate(&other, &["export"])), lines, "byte for byte");
    let said = refused(&import("{}\n"), 64);
    assert!(said.contains("line 1: `job` is required"), "{said}");
    assert_eq!(
        text(&call(&other, &["cancel", ID])).split(' ').next(),
        Some(ID)
    );
}

#[test]
fn a_server_without_jobs_says_what_to_add() {
    let daemon = Daemon::builder().expect_log("control job refused").start();
    let said = refused(&operate(&daemon, &["list"]), 1);
    assert!(
        said.contains("no durable jobs; add the table [jobs]"),
        "{said}"
    );
    let said = refused(&call(&daemon, &["enqueue", "ping"]), 1);
    assert!(said.contains("method-not-found"), "{said}");
    assert!(daemon.status()["jobs"].is_null());
    daemon.reload_with(JOBS);
    assert_eq!(
        text(&call(&daemon, &["enqueue", "echo", "7", "--wait"])),
        "7"
    );
    assert_eq!(jobs(&daemon, &[]).len(), 1);
}

#[test]
fn commands_are_served_while_the_server_drains_attempts_and_by_one_jobs_process_after_a_reload() {
    let daemon = with_jobs("").start();
    text(&call(
        &daemon,
        &["enqueue", "echo", "--id", ID, "--delay", "1h"],
    ));
    for _ in 0..3 {
        daemon.reload();
        assert_eq!(jobs(&daemon, &[])[0]["job"], ID);
    }
}

#[test]
fn a_wait_for_a_job_continues_over_a_restart_of_the_server() {
    let mut daemon = with_jobs("").start();
    let job = json!({"method": "echo", "params": "late", "delay_ms": 1_500});
    let id = enqueue_job(&mut daemon.client(), &job);
    let mut wait = calling(&daemon, &["wait", &id]);
    let wait = wait
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("the wait", PATIENCE, || {
        let status = daemon.status();
        let workers = status["workers"].as_array().unwrap().iter();
        workers.filter_map(|it| it["sent"].as_u64()).sum::<u64>() == 1
    });
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    let daemon = daemon.start_again();
    let output = wait.wait_with_output().unwrap();
    assert_eq!(text(&output), "\"late\"");
    drop(daemon);
}
