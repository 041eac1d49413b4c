//! What is acknowledged is stored: after the kill of all processes, through kills of the jobs process, reloads and
//! upgrades, and nothing is stored twice.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{
    CONFIG, call, enqueue, error, jobs_process, kill_all, later, query, result, send_kills,
};
use crate::support::{Daemon, PATIENCE, SetOnDrop, assert_within, process, wait_for};

/// What clients were answered while something happened to the server.
#[derive(Default)]
struct Answers {
    acknowledged: Vec<String>,
    others: Vec<Value>,
    longest_gap: Duration,
}

/// Each job has its own params, so that one which is stored twice is found.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Enqueues jobs one after the other until `is_over`, on one connection after the other. Stops when the server is gone.
fn enqueue_until(daemon: &Daemon, is_over: &AtomicBool) -> Answers {
    let mut answers = Answers::default();
    let (mut client, mut last) = (daemon.try_client().ok(), Instant::now());
    while !is_over.load(Ordering::Relaxed) {
        let Some(open) = &mut client else {
            break;
        };
        let params = later(&json!(NEXT.fetch_add(1, Ordering::Relaxed)));
        let text = json!({"in": "rpc.job.enqueue", "params": params}).to_string();
        // A worker that drains or dies may close a connection. Then it is unknown whether the job is stored.
        let Some(answer) = open.try_send(&text).ok().and_then(|()| open.recv().ok()) else {
            client = daemon.try_client().ok();
            continue;
        };
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        match answer["result"]["job"].as_str() {
            Some(job) => answers.acknowledged.push(job.to_owned()),
            None => answers.others.push(answer),
        }
        answers.longest_gap = answers.longest_gap.max(last.elapsed());
        last = Instant::now();
    }
    answers
}

/// Lets two clients enqueue while `act` runs.
fn enqueue_during(daemon: &Daemon, act: impl FnOnce()) -> Answers {
    let is_over = AtomicBool::new(false);
    let mut all = Answers::default();
    thread::scope(|scope| {
        let is_over = &is_over;
        let client = || scope.spawn(move || enqueue_until(daemon, is_over));
        let over = SetOnDrop(is_over);
        let clients = [client(), client()];
        act();
        drop(over);
        for client in clients {
            let mut answers = client.join().unwrap();
            all.acknowledged.append(&mut answers.acknowledged);
            all.others.append(&mut answers.others);
            all.longest_gap = all.longest_gap.max(answers.longest_gap);
        }
    });
    all
}

/// Asserts that all acknowledged jobs are stored, each once, and no others.
#[track_caller]
fn assert_stored(daemon: &Daemon, answers: &Answers) {
    assert!(answers.others.is_empty(), "{:?}", answers.others);
    let unique: BTreeSet<&String> = answers.acknowledged.iter().collect();
    assert_eq!(unique.len(), answers.acknowledged.len());
    assert!(unique.len() > 20, "only {} jobs", unique.len());
    let client = &mut daemon.client();
    for job in unique {
        let record = result(client, "rpc.job.get", &json!({"job": job}));
        assert_eq!(record["state"], "waiting", "{record}");
    }
    let store = daemon.dir().join("jobs.db");
    let sql = "SELECT count(DISTINCT params) - count(*) FROM job";
    assert_eq!(query(&store, sql), 0, "a job was stored twice");
}

#[test]
fn acknowledged_jobs_survive_the_kill_of_all_processes() {
    let mut daemon = Daemon::builder().config(CONFIG).start();
    let client = &mut daemon.client();
    let jobs: Vec<String> = (0..50)
        .map(|number| enqueue(client, &json!(number)))
        .collect();
    kill_all(&mut daemon);
    let daemon = daemon.start_again();
    daemon.wait_log("job store opened: 50 waiting, 0 running");
    let client = &mut daemon.client();
    for (number, job) in jobs.iter().enumerate() {
        let record = result(client, "rpc.job.get", &json!({"job": job}));
        assert_eq!(record["state"], "waiting", "job {number}: {record}");
    }
    assert_eq!(
        result(client, "rpc.job.cancel", &json!({"job": jobs[0]})),
        true
    );
}

/// Returns the number of jobs in the store.
fn stored(daemon: &Daemon) -> i64 {
    query(&daemon.dir().join("jobs.db"), "SELECT count(*) FROM job")
}

/// Waits until the store has this number of jobs.
#[track_caller]
fn wait_stored(daemon: &Daemon, count: i64) {
    wait_for("jobs in the store", PATIENCE, || stored(daemon) >= count);
}

/// Waits until the store has this number of jobs more.
#[track_caller]
fn wait_more_stored(daemon: &Daemon, more: i64) {
    wait_stored(daemon, stored(daemon) + more);
}

#[test]
fn acknowledged_jobs_survive_a_kill_of_all_processes_under_load() {
    let mut daemon = Daemon::builder().config(CONFIG).start();
    for round in 1..=3 {
        let mut answers = enqueue_during(&daemon, || {
            wait_stored(&daemon, 40 * round);
            send_kills(&daemon);
        });
        // A keeper that is killed after its worker may have answered that the job is perhaps stored.
        let is_doubtful = |answer: &Value| {
            let error = &answer["result"];
            error["name"] == "crashed" && error["started"] == true
        };
        answers.others.retain(|answer| !is_doubtful(answer));
        kill_all(&mut daemon);
        daemon = daemon.start_again();
        // A thread of the killed server may still have the lock.
        let mut client = daemon.client();
        wait_for("the store", PATIENCE, || {
            let unknown = json!({"job": "01890000-0000-7000-8000-000000000000"});
            error(&mut client, "rpc.job.get", &unknown)["name"] == "no-such-job"
        });
        assert_stored(&daemon, &answers);
    }
}

#[test]
fn a_stop_at_once_loses_no_acknowledged_job() {
    let mut daemon = Daemon::builder().config(CONFIG).start();
    let mut took = Duration::ZERO;
    let mut answers = enqueue_during(&daemon, || {
        wait_stored(&daemon, 40);
        let begun = Instant::now();
        let output = daemon.command(&["stop", "--now"]);
        assert!(output.status.success(), "{output:?}");
        took = begun.elapsed();
    });
    assert_within("a stop at once", took, Duration::from_secs(2));
    daemon.wait_exit();
    answers
        .others
        .retain(|answer| answer["result"]["name"] != "stopping");
    let daemon = daemon.start_again();
    assert_stored(&daemon, &answers);
}

#[test]
fn a_stop_answers_what_was_read_and_closes_the_store() {
    let mut daemon = Daemon::builder().config(CONFIG).start();
    let client = &mut daemon.client();
    let job = enqueue(client, &json!(1));
    let wait = json!({"in": "rpc.job.wait", "params": {"job": job}});
    client.send(&wait.to_string());
    let mut other = daemon.client();
    other.send(&json!({"in": "rpc.job.enqueue", "params": later(&json!(2))}).to_string());
    assert_eq!(other.recv_json()["result"]["new"], true);
    let begun = Instant::now();
    daemon.signal(Signal::SIGTERM);
    let answer = client.recv_json();
    assert_eq!(answer["result"]["ended"], false, "{answer}");
    assert!(daemon.wait_exit().success());
    assert_within("the stop", begun.elapsed(), Duration::from_secs(5));
    daemon.wait_group_gone();
    let log = fs::metadata(daemon.dir().join("jobs.db-wal"));
    assert!(
        log.is_err() || log.unwrap().len() == 0,
        "the log was not written back"
    );
    assert_eq!(
        query(
            &daemon.dir().join("jobs.db"),
            "SELECT count(*) FROM instance"
        ),
        0
    );
    let daemon = daemon.start_again();
    daemon.wait_log("job store opened: 2 waiting, 0 running");
}

#[test]
fn no_acknowledged_job_is_lost_in_reloads() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let answers = enqueue_during(&daemon, || {
        for _ in 0..4 {
            daemon.reload();
            wait_more_stored(&daemon, 10);
        }
    });
    assert_stored(&daemon, &answers);
    let gap = answers.longest_gap;
    assert_within(
        "an acknowledgement during reloads",
        gap,
        Duration::from_secs(2),
    );
    wait_for("one jobs process", PATIENCE, || {
        super::jobs_processes(&daemon).len() == 1
    });
}

#[test]
fn no_acknowledged_job_is_lost_in_an_upgrade_and_the_instance_stays() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let store = daemon.dir().join("jobs.db");
    let instance = "SELECT count(*) FROM instance";
    let pid = "SELECT pid FROM instance";
    assert_eq!(
        (query(&store, instance), query(&store, pid)),
        (1, daemon.pid().into())
    );
    let before = jobs_process(&daemon);
    let answers = enqueue_during(&daemon, || {
        wait_stored(&daemon, 10);
        let output = daemon.command(&["upgrade"]);
        assert!(output.status.success(), "{output:?}");
        wait_more_stored(&daemon, 20);
    });
    assert_stored(&daemon, &answers);
    let gap = answers.longest_gap;
    assert_within(
        "an acknowledgement during an upgrade",
        gap,
        Duration::from_secs(2),
    );
    wait_for("the old jobs process to exit", PATIENCE, || {
        !process::runs(before)
    });
    assert_eq!(
        (query(&store, instance), query(&store, pid)),
        (1, daemon.pid().into())
    );
    // The lock still names the master, so no other server takes the store.
    let check = daemon.dir().join("preforkd.toml");
    let output = std::process::Command::new(crate::support::binary())
        .args(["job", "check", "--config"])
        .arg(check)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains(&format!("used by the server with pid {}", daemon.pid())),
        "{text}"
    );
}

#[test]
fn a_killed_jobs_process_loses_no_call_and_stores_nothing_twice() {
    let config = CONFIG.replace("count = 2", "count = 2\nrespawn-max-delay = \"0s\"");
    let daemon = Daemon::builder()
        .config(&config)
        .expect_log("ended by SIGKILL")
        .start();
    let answers = enqueue_during(&daemon, || {
        for round in 1..=5 {
            let first = jobs_process(&daemon);
            wait_stored(&daemon, 10 * round);
            kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
            wait_for("the next jobs process", PATIENCE, || {
                super::jobs_processes(&daemon)
                    .iter()
                    .any(|pid| *pid != first)
            });
        }
        jobs_process(&daemon);
    });
    assert_stored(&daemon, &answers);
    assert_within(
        "an acknowledgement",
        answers.longest_gap,
        Duration::from_secs(3),
    );
}

#[test]
fn an_enqueue_whose_client_does_not_wait_is_stored() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let store = daemon.dir().join("jobs.db");
    for number in 0..20 {
        let mut client = daemon.client();
        let text = json!({"in": "rpc.job.enqueue", "params": later(&json!(number))});
        client.send(&text.to_string());
        match number % 2 {
            0 => drop(client),
            _ => client.reset(),
        }
    }
    // A reset may overtake the bytes, so half of them are certain.
    wait_for("10 jobs", PATIENCE, || {
        query(&store, "SELECT count(*) FROM job") >= 10
    });
    let _ = call(&mut daemon.client(), "ping", &json!(null));
}

#[test]
fn jobs_are_added_by_a_reload() {
    let daemon = Daemon::builder().config("[workers]\ncount = 1\n").start();
    assert_eq!(
        call(&mut daemon.client(), "rpc.job.enqueue", &later(&json!(1)))["out"],
        "error"
    );
    daemon.reload_with(CONFIG);
    // The old worker may accept a last connection.
    let mut client = daemon.client();
    wait_for("a worker with jobs", PATIENCE, || {
        client = daemon.client();
        call(&mut client, "rpc.job.get", &json!({}))["result"]["name"] == "invalid-params"
    });
    let client = &mut client;
    let job = enqueue(client, &json!(1));
    assert_eq!(
        result(client, "rpc.job.get", &json!({"job": job}))["job"],
        job
    );
    // The store stays when the table is removed: that needs a restart.
    daemon.reload_with("[workers]\ncount = 1\n");
    let client = &mut daemon.client();
    assert_eq!(
        result(client, "rpc.job.get", &json!({"job": job}))["job"],
        job
    );
}

/// A service manager may send SIGTERM to all processes, and workers need a jobs process until another one serves.
#[test]
fn a_jobs_process_that_gets_term_serves_until_its_successor_does() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let first = jobs_process(&daemon);
    let answers = enqueue_during(&daemon, || {
        wait_stored(&daemon, 10);
        kill(Pid::from_raw(first), Signal::SIGTERM).unwrap();
        wait_for("its end", PATIENCE, || !process::runs(first));
        wait_more_stored(&daemon, 20);
    });
    assert_stored(&daemon, &answers);
    let gap = answers.longest_gap;
    assert_within("an acknowledgement", gap, Duration::from_secs(2));
    assert_ne!(jobs_process(&daemon), first);
    assert_eq!(daemon.status()["deaths"], json!([]));
}
