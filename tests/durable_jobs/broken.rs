//! Tests a store that is damaged while a server uses it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{call, enqueue_job, error, jobs_process, later, query, result, wait_metric, with_jobs};
use crate::support::{Daemon, PATIENCE, assert_within, binary, wait_for};

/// Overwrites all pages of a store but the first one, as a failing disk may do. The log is written into the store
/// before, so that none of its pages is left there.
fn damage(daemon: &Daemon) {
    let store = daemon.dir().join("jobs.db");
    wait_for("an empty log", PATIENCE, || {
        query(&store, "PRAGMA wal_checkpoint(TRUNCATE)") == 0
    });
    let file = File::options().write(true).open(&store).unwrap();
    let length = file.metadata().unwrap().len();
    let garbage = vec![0xA5; usize::try_from(length).unwrap() - 4096];
    file.write_all_at(&garbage, 4096).unwrap();
}

#[test]
fn a_damaged_store_is_broken_until_an_operator_acts_and_calls_continue() {
    let config = "[workers]\ncount = 2\ndrain-timeout = \"10s\"\n[methods.short]\n\
         command = [\"sh\", \"-c\", \"touch begun; while ! [ -e go ]; do sleep 0.02; done\"]\ndirectory = \".\"\n";
    let daemon = with_jobs(config)
        .expect_log("job store broken: nothing more is written")
        .expect_log("could not serve: job store")
        .expect_log("reload refused, everything stays as it was")
        .start();
    let mut client = daemon.client();
    let running = enqueue_job(&mut client, &json!({"method": "short"}));
    let begun = daemon.dir().join("begun");
    wait_for("the attempt", PATIENCE, || begun.exists());
    damage(&daemon);
    wait_for("the first refused enqueue", PATIENCE, || {
        let answer = call(&mut client, "rpc.job.enqueue", &later(&json!(1)));
        answer["result"]["name"] == "unavailable"
    });
    daemon.wait_log("stop the server, then run preforkd job check");
    // The attempt ends, but its outcome is not stored.
    daemon.dir().write("go", "");
    let refused = error(&mut client, "rpc.job.enqueue", &later(&json!(2)));
    assert_eq!(
        (&refused["name"], &refused["started"]),
        (&json!("unavailable"), &json!(false)),
        "{refused}"
    );
    for method in ["rpc.job.get", "rpc.job.cancel"] {
        let refused = error(&mut client, method, &json!({"job": running}));
        assert_eq!(refused["name"], "unavailable", "{method}: {refused}");
    }
    assert_eq!(result(&mut client, "ping", &json!(7)), 7);
    wait_for("the state in the status", PATIENCE, || {
        daemon.status()["jobs"]["state"] == "broken"
    });
    wait_metric(&daemon, "preforkd_jobs_store_up 0");
    // A reload opens the store, and names what is wrong with it.
    let output = daemon.command(&["reload"]);
    assert!(!output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("jobs.db"), "{said}");
    assert_eq!(result(&mut client, "ping", &json!(8)), 8);
    let check = Command::new(binary())
        .args(["job", "check", "--config"])
        .arg(daemon.dir().join("preforkd.toml"))
        .output()
        .unwrap();
    assert!(!check.status.success(), "{check:?}");
    // It never tries again by itself, also when the disk works again.
    assert_eq!(daemon.log().matches("job store back").count(), 0);
    // A stop waits for no outcome that cannot be stored.
    let stop = Instant::now();
    let output = daemon.command(&["stop"]);
    assert!(output.status.success(), "{output:?}");
    assert_within("the stop", stop.elapsed(), Duration::from_secs(2));
}

#[test]
fn a_store_that_was_deleted_is_not_replaced_by_an_empty_one() {
    let daemon = with_jobs("[workers]\ncount = 1\n")
        .expect_log("job store broken: nothing more is written")
        .expect_log("could not serve: job store")
        .expect_log("reload refused, everything stays as it was")
        .expect_log("ended by SIGKILL")
        .start();
    let mut client = daemon.client();
    enqueue_job(&mut client, &later(&json!(1)));
    let store = daemon.dir().join("jobs.db");
    std::fs::remove_file(&store).unwrap();
    // Nothing is acknowledged that would be lost with the deleted file.
    let refused = error(&mut client, "rpc.job.enqueue", &later(&json!(2)));
    assert_eq!(refused["name"], "unavailable", "{refused}");
    let output = daemon.command(&["reload"]);
    assert!(!output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("was moved, deleted or emptied"), "{said}");
    // Neither does the next jobs process create one.
    let pid = jobs_process(&daemon);
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    wait_for("the state in the status", PATIENCE, || {
        let jobs = daemon.status()["jobs"].clone();
        jobs["state"] == "broken" && jobs["pid"] != pid
    });
    assert!(!store.exists());
    let refused = error(&mut client, "rpc.job.enqueue", &later(&json!(2)));
    assert_eq!(refused["name"], "unavailable", "{refused}");
}
