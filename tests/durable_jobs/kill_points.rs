//! Kills the jobs process at chosen points: before a commit, behind it and before the answer, behind a claim, and before
//! an executor knows that an outcome is stored. The ledger of the handlers shows what was lost or repeated.

use std::fs;

use serde_json::json;

use super::kills::check_ledger;
use super::{enqueue_job, jobs_process, query, result};
use crate::support::{Daemon, Dir, PATIENCE, wait_for};

const CONFIG: &str = r#"
[workers]
count = 1
respawn-max-delay = "0s"
[jobs]
store = "sqlite:jobs.db"
[methods.note]
command = ["sh", "job.sh"]
directory = "."
"#;

/// Writes into the ledger, and ends when the file `go` exists.
const COMMAND: &str = r#"
note() { read -r up _ < /proc/uptime; echo "$PREFORKD_JOB $PREFORKD_ATTEMPT $1 $up" >> ledger; }
note begin
while ! [ -e go ]; do sleep 0.01; done
note end
echo null
"#;

/// When the file that orders the kill is created.
#[derive(Clone, Copy, PartialEq)]
enum Moment {
    BeforeTheEnqueue,
    WhileAttemptsRun,
}

/// Kills the jobs process at a point. Three jobs are stored once, have one attempt each, and are done.
#[track_caller]
fn kill_at(point: &str, moment: Moment) {
    if std::env::var_os("PREFORKD_BINARY").is_some() {
        println!("not tested: only builds with debug assertions have kill points");
        return;
    }
    let orders = Dir::new();
    let order = orders.join("kill");
    let daemon = Daemon::builder()
        .config(CONFIG)
        .file("job.sh", COMMAND)
        .env(
            "PREFORKD_KILL_POINT",
            format!("{point}:{}", order.display()),
        )
        .expect_log("ended by SIGKILL")
        .start();
    let first = jobs_process(&daemon);
    let go = daemon.dir().join("go");
    let store = daemon.dir().join("jobs.db");
    if moment == Moment::BeforeTheEnqueue {
        fs::write(&go, "").unwrap();
        fs::write(&order, "").unwrap();
    }
    let client = &mut daemon.client();
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(enqueue_job(client, &json!({"method": "note"})));
    }
    if moment == Moment::WhileAttemptsRun {
        // Then no further commit comes before those of the outcomes.
        wait_for("attempts whose programs are known", PATIENCE, || {
            query(&store, "SELECT count(*) FROM queue WHERE pid > 0") > 0
        });
        let sql = "SELECT count(*) FROM queue WHERE running AND pid IS NULL";
        wait_for("no other attempt", PATIENCE, || query(&store, sql) == 0);
        fs::write(&order, "").unwrap();
        fs::write(&go, "").unwrap();
    }
    for job in &jobs {
        let wait = json!({"job": job, "timeout_ms": 10_000});
        let record = result(client, "rpc.job.wait", &wait);
        assert_eq!(
            (&record["state"], &record["attempt"], &record["cause"]),
            (&json!("done"), &json!(1), &json!("result")),
            "{record}"
        );
    }
    assert!(!order.exists(), "{point} was never reached");
    assert_ne!(jobs_process(&daemon), first, "it was not killed");
    let ledger = daemon.dir().read("ledger");
    check_ledger(&ledger, &jobs.iter().cloned().collect());
    assert_eq!(
        ledger.lines().count(),
        6,
        "an attempt is repeated: {ledger}"
    );
    assert_eq!(query(&store, "SELECT count(*) FROM job"), 3, "stored twice");
    assert_eq!(query(&store, "SELECT count(*) FROM queue"), 0);
}

#[test]
fn a_kill_before_the_commit_of_an_enqueue_loses_no_job() {
    kill_at("before-commit", Moment::BeforeTheEnqueue);
}

#[test]
fn a_kill_before_the_answer_to_an_enqueue_stores_no_job_twice() {
    kill_at("after-commit", Moment::BeforeTheEnqueue);
}

#[test]
fn a_kill_after_a_claim_counts_no_attempt() {
    kill_at("after-claim", Moment::BeforeTheEnqueue);
}

#[test]
fn a_kill_before_the_commit_of_an_outcome_repeats_no_attempt() {
    kill_at("before-commit", Moment::WhileAttemptsRun);
}

#[test]
fn a_kill_before_an_outcome_is_acknowledged_repeats_no_attempt() {
    kill_at("before-acknowledgement", Moment::WhileAttemptsRun);
}
