#![allow(clippy::unwrap_used)]

use super::enqueue::*;
use crate::protocol::http::respond_async::{self, JobRequestHead};
use crate::protocol::job_id::JobId;
use crate::protocol::{Code, RpcError};

const NOW: u64 = 1_800_000_000_000;

const DAY: u64 = 86_400_000;

fn defaults(method: &str) -> Option<EnqueueDefaults> {
    (method == "mail").then_some(EnqueueDefaults {
        priority: 2,
        max_attempts: 10,
        timeout_ms: 60_000,
    })
}

fn rules() -> EnqueueRules<'static> {
    EnqueueRules {
        method: &defaults,
        most_items: 3,
        most_params: 20,
        secret: Some(b"secret"),
        now: NOW,
    }
}

/// Parses with ids that count from 1.
fn read(params: &str) -> Result<(Vec<NewJob>, bool), RpcError> {
    let mut last = 0;
    parse(params, &rules(), Some("trace"), || {
        last += 1;
        JobId([last; 16])
    })
}

fn one(params: &str) -> NewJob {
    let (mut jobs, is_array) = read(params).unwrap();
    assert!(!is_array && jobs.len() == 1);
    jobs.remove(0)
}

#[test]
fn an_enqueue_with_a_method_alone_gets_all_defaults() {
    let expected = NewJob {
        id: JobId([1; 16]),
        method: "mail".into(),
        params: "null".into(),
        key: None,
        due: DueTime::Now,
        priority: 2,
        max_attempts: 10,
        timeout_ms: 60_000,
        expires_ms: None,
        trace: Some("trace".into()),
    };
    assert_eq!(one(r#"{"method":"mail"}"#), expected);
}

#[test]
fn each_member_is_read_and_params_keep_their_bytes() {
    let job = one(concat!(
        r#"{"method":"mail","params":[1e0,  "\u0041"],"#,
        r#""id":"017F22E2-79B0-7CC3-98C4-DC0C0C07398F","key":"k","delay_ms":5,"#,
        r#""priority":-9,"max_attempts":3,"timeout_ms":10,"expires_ms":6}"#
    ));
    assert_eq!(&*job.params, r#"[1e0,  "\u0041"]"#);
    assert_eq!(job.id.to_string(), "017f22e2-79b0-7cc3-98c4-dc0c0c07398f");
    assert_eq!(job.key.as_deref(), Some("k"));
    assert_eq!((job.due, job.priority), (DueTime::After(5), -9));
    assert_eq!((job.max_attempts, job.timeout_ms), (3, 10));
    assert_eq!(job.expires_ms, Some(6));
}

#[test]
fn attempts_and_timeout_only_lower_the_values_of_the_server() {
    let job = one(r#"{"method":"mail","max_attempts":11,"timeout_ms":60001}"#);
    assert_eq!((job.max_attempts, job.timeout_ms), (10, 60_000));
}

#[test]
fn a_time_that_has_passed_is_now() {
    let due = |at: u64| {
        one(&format!(r#"{{"method":"mail","at_ms":{at}}}"#))
            .due
            .at(NOW)
    };
    assert_eq!(due(0), NOW);
    assert_eq!(due(NOW + 1), NOW + 1);
    assert_eq!(due(NOW + 365 * DAY), NOW + 365 * DAY);
    assert_eq!(DueTime::After(u64::MAX).at(NOW), u64::MAX);
}

#[test]
fn each_refusal_names_the_member() {
    let huge = NOW + 366 * DAY;
    let key = "k".repeat(256);
    for (member, named) in [
        (r#""id":"1""#.to_owned(), "`id`"),
        (r#""key":"""#.to_owned(), "`key`"),
        (format!(r#""key":"{key}""#), "`key`"),
        (r#""key":7"#.to_owned(), "`key`"),
        (
            r#""delay_ms":1,"at_ms":1"#.to_owned(),
            "`delay_ms` and `at_ms`",
        ),
        (r#""delay_ms":-1"#.to_owned(), "`delay_ms`"),
        (r#""delay_ms":31536000001"#.to_owned(), "`delay_ms`"),
        (r#""delay_ms":1e3"#.to_owned(), "`delay_ms`"),
        (r#""at_ms":-1"#.to_owned(), "`at_ms`"),
        (format!(r#""at_ms":{huge}"#), "`at_ms`"),
        (r#""at_ms":1e300"#.to_owned(), "`at_ms`"),
        (r#""priority":10"#.to_owned(), "`priority`"),
        (r#""priority":-10"#.to_owned(), "`priority`"),
        (r#""max_attempts":0"#.to_owned(), "`max_attempts`"),
        (r#""timeout_ms":0"#.to_owned(), "`timeout_ms`"),
        (r#""expires_ms":0"#.to_owned(), "`expires_ms`"),
        (r#""expires_ms":5,"delay_ms":5"#.to_owned(), "`expires_ms`"),
        (r#""group":"g""#.to_owned(), "`group` is not supported yet"),
        (r#""retries":3"#.to_owned(), "`retries`"),
        (
            r#""priority":1,"priority":1"#.to_owned(),
            "`priority` occurs twice",
        ),
        (r#""params":"012345678901234567890""#.to_owned(), "`params`"),
    ] {
        let error = read(&format!(r#"{{"method":"mail",{member}}}"#)).unwrap_err();
        assert_eq!(error.table_code(), Some(Code::InvalidParams), "{member}");
        assert!(
            !error.started && error.message.contains(named),
            "{member}: {error}"
        );
    }
}

#[test]
fn params_that_are_no_jobs_are_refused() {
    for params in [
        "null",
        "7",
        "[]",
        "[7]",
        "{}",
        r#"{"method":7}"#,
        "[{},{},{},{}]",
        "[",
        "{",
    ] {
        let error = read(params).unwrap_err();
        assert_eq!(
            error.table_code(),
            Some(Code::InvalidParams),
            "{params}: {error}"
        );
    }
}

#[test]
fn unknown_methods_and_those_of_the_server_are_no_jobs() {
    for method in ["post", "rpc.discover", "rpc.job.enqueue", ""] {
        let error = read(&format!(r#"{{"method":"{method}"}}"#)).unwrap_err();
        assert_eq!(
            error.table_code(),
            Some(Code::MethodNotFound),
            "{method}: {error}"
        );
        assert!(!error.started);
    }
}

#[test]
fn an_array_is_refused_as_a_whole_and_the_error_names_the_item() {
    let (jobs, is_array) = read(r#" [{"method":"mail"},{"method":"mail","params":2}]"#).unwrap();
    assert!(is_array);
    assert_eq!((jobs[0].id, &*jobs[1].params), (JobId([1; 16]), "2"));
    let error = read(r#"[{"method":"mail"},{"method":"post"}]"#).unwrap_err();
    assert!(error.message.starts_with("params[1]: "), "{error}");
    assert_eq!(error.table_code(), Some(Code::MethodNotFound));
}

#[test]
fn an_idempotency_key_fixes_the_id() {
    let request = |method: &str, key: Option<&str>| {
        let key = key.map(str::to_owned);
        let head = Some(JobRequestHead { key });
        let (_, params) = respond_async::translate(&head, method.to_owned(), "[1]");
        let (mut jobs, is_array) = parse(&params, &rules(), None, || JobId([9; 16]))?;
        assert!(!is_array);
        Ok::<_, RpcError>(jobs.remove(0))
    };
    let (one, other) = (request("mail", Some("k")), request("mail", Some("k")));
    assert_eq!(one.as_ref().unwrap(), other.as_ref().unwrap());
    let one = one.unwrap();
    assert_eq!(one.id, JobId::derived(b"secret", "mail", "k"));
    assert_eq!((&*one.method, &*one.params), ("mail", "[1]"));
    assert_eq!(request("mail", None).unwrap().id, JobId([9; 16]));
    let long = "k".repeat(256);
    for key in ["", &long] {
        assert!(
            request("mail", Some(key))
                .unwrap_err()
                .message
                .contains("Idempotency-Key")
        );
    }
    assert_eq!(
        request("post", None).unwrap_err().table_code(),
        Some(Code::MethodNotFound)
    );
}

#[test]
fn the_other_methods_name_their_job() {
    let text = "017f22e2-79b0-7cc3-98c4-dc0c0c07398f";
    let id = JobId::parse(text).unwrap();
    let params = format!(r#"{{"job":"{text}"}}"#);
    assert_eq!(parse_job(&params, false).unwrap(), (id, None));
    let wait = format!(r#"{{"job":"{text}","timeout_ms":0}}"#);
    assert_eq!(parse_job(&wait, true).unwrap(), (id, Some(0)));
    for (params, named) in [
        (wait.as_str(), "`timeout_ms`"),
        ("{}", "`job` is required"),
        (r#"{"job":"x"}"#, "`job` must be"),
        ("null", "must be an object"),
    ] {
        let error = parse_job(params, false).unwrap_err();
        assert!(error.message.contains(named), "{params}: {error}");
    }
}
