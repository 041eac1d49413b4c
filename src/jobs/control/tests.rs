#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::jobs::policy::states::{AttemptEnd, RetryRules};
use crate::jobs::policy::turns::QueueShare;
use crate::jobs::store::conformance_tests::{Fixture, id, job, owner};
use crate::jobs::store::request::{
    ClaimRequest, JobSelection, Settlement, StoreReply, StoreRequest,
};

/// A store whose tasks run in the thread of the command.
struct DirectStore(Mutex<Fixture>);

impl ControlStore for DirectStore {
    fn run(&self, task: ControlTask) -> Result<ControlReply, String> {
        let mut fixture = self.0.lock().unwrap();
        let error = |error: crate::jobs::store::error::StoreError| error.to_string();
        Ok(match task {
            ControlTask::Write(request) => ControlReply::Written(fixture.one(request)),
            ControlTask::List(filter) => {
                // Small pages, so that the tests have several.
                ControlReply::Listed(fixture.reader.list(&filter, 2).map_err(error)?)
            }
            ControlTask::Details(id) => {
                let found = fixture.reader.details(id).map_err(error)?;
                ControlReply::Details(found.map(Box::new))
            }
            ControlTask::Export(after) => {
                let (jobs, last) = fixture.reader.export(after).map_err(error)?;
                ControlReply::Exported(jobs, last)
            }
        })
    }

    fn has_method(&self, method: &str) -> bool {
        method != "typo"
    }
}

struct AwayStore;

impl ControlStore for AwayStore {
    fn run(&self, _: ControlTask) -> Result<ControlReply, String> {
        Err("the store is away: disk gone".into())
    }

    fn has_method(&self, _: &str) -> bool {
        true
    }
}

/// Runs a command as the program does. Returns the lines of the answer behind the first one.
fn command(store: &Arc<dyn ControlStore>, input: &str) -> Vec<Value> {
    let threads = ControlThreads::new(Arc::clone(store));
    let (mut own, other) = UnixStream::pair().unwrap();
    other.set_nonblocking(true).unwrap();
    threads.serve(other.into());
    own.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    own.write_all(input.as_bytes()).unwrap();
    let lines = BufReader::new(own).lines();
    let lines: Vec<Value> = lines
        .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
        .collect();
    assert_eq!(lines[0], json!({"ok": true}));
    lines[1..].to_vec()
}

/// The jobs 1 and 2 wait, 3 is dead, and 4 was cancelled.
fn store() -> Arc<dyn ControlStore> {
    let mut fixture = Fixture::model();
    for number in 1..=4 {
        let method = if number == 2 { "b" } else { "a" };
        fixture.one(StoreRequest::Enqueue(vec![job(number, method)]));
    }
    fixture.one(StoreRequest::Cancel(id(4)));
    fixture.one(StoreRequest::Cancel(id(1)));
    let claimed = fixture.one(StoreRequest::Claim(ClaimRequest {
        owner: owner(1),
        shares: vec![QueueShare {
            method: "a".into(),
            most: 1,
        }],
        most: 1,
    }));
    let StoreReply::Claimed(claimed) = claimed else {
        panic!("{claimed:?}");
    };
    assert_eq!(claimed[0].id, id(3));
    fixture.one(StoreRequest::Settle(Settlement {
        id: id(3),
        token: claimed[0].token,
        end: AttemptEnd::error(r#"{"code":7,"name":"error","message":"x","data":{"retry":false}}"#),
        rules: RetryRules {
            backoff_ms: 1,
            max_backoff_ms: 1,
            max_crashes: 1,
            max_result: 64,
        },
        jitter: 0,
    }));
    fixture.one(StoreRequest::Retry(JobSelection::Ids(vec![id(1)])));
    Arc::new(DirectStore(Mutex::new(fixture)))
}

fn ids(lines: &[Value]) -> Vec<String> {
    let jobs = lines.iter().filter_map(|line| line["job"].as_str());
    jobs.map(str::to_owned).collect()
}

fn names(numbers: &[u8]) -> Vec<String> {
    numbers
        .iter()
        .map(|number| id(*number).to_string())
        .collect()
}

#[test]
fn a_list_has_all_pages_and_only_what_was_asked_for() {
    let store = store();
    let mut all = ids(&command(&store, "{\"job\":\"list\"}\n"));
    all.sort();
    assert_eq!(all, names(&[1, 2, 3, 4]));
    for (filter, expected) in [
        (r#""state":"dead""#, &[3][..]),
        (r#""state":"waiting","method":"b""#, &[2]),
        (r#""state":"done""#, &[]),
    ] {
        let lines = command(&store, &format!("{{\"job\":\"list\",{filter}}}\n"));
        assert_eq!(ids(&lines), names(expected), "{filter}");
        assert_eq!(lines.last().unwrap(), &json!({"ok": true}));
    }
    let refused = command(&store, "{\"job\":\"list\",\"state\":\"died\"}\n");
    assert_eq!(refused[0]["code"], 64);
}

#[test]
fn a_job_is_shown_with_its_params() {
    let store = store();
    let shown = command(
        &store,
        &format!("{{\"job\":\"show\",\"id\":\"{}\"}}\n", id(3)),
    );
    assert_eq!(shown[0]["state"], "dead");
    assert_eq!(shown[0]["error"]["code"], 7);
    assert!(shown[0].get("params").is_some(), "{shown:?}");
    let unknown = command(
        &store,
        &format!("{{\"job\":\"show\",\"id\":\"{}\"}}\n", id(9)),
    );
    assert_eq!(
        (&unknown[0]["ok"], &unknown[0]["code"]),
        (&json!(false), &json!(1))
    );
}

#[test]
fn jobs_that_are_left_alone_are_named_with_the_reason() {
    let store = store();
    let request =
        json!({"job": "retry", "ids": [id(3).to_string(), id(2).to_string(), id(9).to_string()]});
    let lines = command(&store, &format!("{request}\n"));
    assert_eq!(
        lines[0],
        json!({"job": id(2).to_string(), "left": "it is waiting"})
    );
    assert_eq!(lines[1]["left"], "it is unknown or was removed");
    let expected = json!({"ok": false, "error": "1 job waits again, 2 left alone", "code": 1});
    assert_eq!(lines[2], expected);
}

#[test]
fn a_state_selects_all_its_jobs() {
    let store = store();
    for (request, answer) in [
        (
            r#"{"job":"retry","state":"dead","method":"b"}"#,
            "0 jobs wait again",
        ),
        (r#"{"job":"retry","state":"dead"}"#, "1 job waits again"),
        (
            r#"{"job":"purge","state":"cancelled"}"#,
            "1 job was removed",
        ),
    ] {
        let lines = command(&store, &format!("{request}\n"));
        assert_eq!(lines, [json!({"ok": true, "message": answer})], "{request}");
    }
    for request in [
        r#"{"job":"purge","state":"waiting"}"#,
        r#"{"job":"retry","state":"done"}"#,
        r#"{"job":"purge","ids":["x"]}"#,
        r#"{"job":"fly"}"#,
        "7",
    ] {
        let lines = command(&store, &format!("{request}\n"));
        assert_eq!(
            (lines.len(), &lines[0]["code"]),
            (1, &json!(64)),
            "{request}"
        );
    }
}

#[test]
fn a_method_is_paused_and_resumed() {
    let store = store();
    let said = |name: &str, method: &str| {
        let request = json!({"job": name, "method": method});
        let lines = command(&store, &format!("{request}\n"));
        lines[0]["message"].as_str().unwrap().to_owned()
    };
    assert!(said("pause", "a").starts_with("a is paused: "));
    assert!(said("resume", "a").starts_with("a is not paused: "));
    let unknown = "there is no method of this name now";
    assert!(said("pause", "typo").ends_with(unknown));
    assert!(!said("pause", "a").ends_with(unknown));
}

#[test]
fn an_export_is_imported_into_another_store_and_known_jobs_are_left_alone() {
    let exported = command(&store(), "{\"job\":\"export\"}\n");
    let (last, jobs) = exported.split_last().unwrap();
    assert_eq!(last["message"], "4 jobs were exported");
    let lines: String = jobs.iter().map(|job| format!("{job}\n")).collect();
    let target: Arc<dyn ControlStore> = Arc::new(DirectStore(Mutex::new(Fixture::model())));
    for message in [
        "4 jobs were stored, 0 left out (their id or key exists)",
        "0 jobs were stored, 4 left out (their id or key exists)",
    ] {
        let answer = command(&target, &format!("{{\"job\":\"import\"}}\n{lines}\n"));
        assert_eq!(answer, [json!({"ok": true, "message": message})]);
    }
    let mut ids = ids(&command(&target, "{\"job\":\"list\"}\n"));
    ids.sort();
    assert_eq!(ids, names(&[1, 2, 3, 4]));
}

#[test]
fn an_import_with_a_wrong_line_names_it() {
    let exported = command(&store(), "{\"job\":\"export\"}\n");
    let target: Arc<dyn ControlStore> = Arc::new(DirectStore(Mutex::new(Fixture::model())));
    let lines = format!("{}\n{{\"job\":7}}\n\n", exported[0]);
    let answer = command(&target, &format!("{{\"job\":\"import\"}}\n{lines}"));
    let said = answer[0]["error"].as_str().unwrap();
    assert!(said.starts_with("line 2: `job` must be a UUID"), "{said}");
    assert!(
        said.ends_with("; nothing from line 1 on is stored"),
        "{said}"
    );
}

#[test]
fn a_store_that_is_away_refuses_commands_with_the_reason() {
    let store: Arc<dyn ControlStore> = Arc::new(AwayStore);
    let lines = command(&store, "{\"job\":\"list\"}\n");
    let expected = json!({"ok": false, "error": "the store is away: disk gone", "code": 69});
    assert_eq!(lines, [expected]);
}

#[test]
fn a_command_that_leaves_early_changes_nothing() {
    let target: Arc<dyn ControlStore> = Arc::new(DirectStore(Mutex::new(Fixture::model())));
    let exported = command(&store(), "{\"job\":\"export\"}\n");
    let (own, other) = UnixStream::pair().unwrap();
    let input = format!("{{\"job\":\"import\"}}\n{}\n", exported[0]);
    (&own).write_all(input.as_bytes()).unwrap();
    own.shutdown(std::net::Shutdown::Write).unwrap();
    let threads = ControlThreads::new(Arc::clone(&target));
    threads.serve(other.into());
    let answer: Vec<_> = BufReader::new(own).lines().map(Result::unwrap).collect();
    assert_eq!(
        answer,
        [r#"{"ok":true}"#],
        "no answer follows the first line"
    );
    assert_eq!(ids(&command(&target, "{\"job\":\"list\"}\n")), names(&[]));
}

#[test]
fn too_many_commands_are_refused_and_a_place_becomes_free() {
    let store = store();
    let threads = ControlThreads::new(Arc::clone(&store));
    let mut open = Vec::new();
    for _ in 0..MOST_COMMANDS {
        let (own, other) = UnixStream::pair().unwrap();
        threads.serve(other.into());
        open.push(own);
    }
    let (own, other) = UnixStream::pair().unwrap();
    threads.serve(other.into());
    let mut refused = String::new();
    BufReader::new(own).read_line(&mut refused).unwrap();
    assert!(refused.contains("\"code\":69"), "{refused}");
    drop(open);
    while threads.running.load(Ordering::Relaxed) > 0 {
        thread::yield_now();
    }
}
