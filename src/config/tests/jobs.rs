//! `[jobs]` and `[methods.NAME.job]`.

#![cfg(feature = "jobs-sqlite")]

use super::*;

fn jobs(text: &str) -> JobsConfig {
    settings(&root(), text).unwrap().jobs.unwrap()
}

fn refusal(text: &str) -> String {
    let error = settings(&root(), text).unwrap_err();
    assert_eq!(error.exit_code(), 78, "{error}");
    error.to_string().replace("/etc/x.toml:", "")
}

#[test]
fn a_store_alone_has_all_defaults() {
    assert_eq!(settings(&root(), "").unwrap().jobs, None);
    let jobs = jobs("[jobs]\nstore = 'sqlite:jobs.db'");
    let seconds = Duration::from_secs;
    let day = seconds(86_400);
    let expected = JobsConfig {
        store: JobStore::Sqlite("/etc/jobs.db".into()),
        concurrency: 4,
        defaults: JobRules {
            max_attempts: 10,
            backoff: seconds(5),
            max_backoff: seconds(3_600),
            max_crashes: 3,
            timeout: seconds(600),
            drain_timeout: seconds(30),
            priority: 0,
            keep_done: day,
            keep_dead: 30 * day,
            keep_cancelled: day,
        },
        methods: Default::default(),
        lease: seconds(30),
        poll: seconds(1),
        enqueue_timeout: seconds(5),
        max_jobs: 1_000_000,
        max_size: 10 << 30,
        result: 64 << 10,
    };
    assert_eq!(jobs, expected);
    assert_eq!(jobs.rules("any"), &expected.defaults);
}

#[test]
fn defaults_follow_threads_drain_and_frame() {
    let with = |more: &str| jobs(&format!("{more}\n[jobs]\nstore = 'sqlite:/jobs.db'"));
    assert_eq!(with("[workers]\nthreads = 1").concurrency, 1);
    assert_eq!(with("[workers]\nthreads = 9").concurrency, 4);
    assert_eq!(with("[limits]\nframe = '2KiB'").result, 2 << 10);
    let drain = with("[workers]\ndrain-timeout = '7s'")
        .defaults
        .drain_timeout;
    assert_eq!(drain, Duration::from_secs(7));
}

#[test]
fn a_method_has_its_own_values_and_otherwise_those_of_jobs() {
    let text = "[jobs]\nstore = 'sqlite:/jobs.db'\nmax-attempts = 4\ntimeout = '2h'\n\
                retention = { done = '2d' }\n\
                [methods.ping.job]\npriority = -9\nmax-crashes = 1\nretention = { dead = '1h' }";
    let jobs = jobs(text);
    let rules = jobs.rules("ping");
    assert_eq!(
        (rules.max_attempts, rules.max_crashes, rules.priority),
        (4, 1, -9)
    );
    // A timeout of attempts may exceed the drain.
    assert_eq!(rules.timeout, Duration::from_secs(7_200));
    assert_eq!(rules.keep_done, Duration::from_secs(2 * 86_400));
    assert_eq!(rules.keep_dead, Duration::from_secs(3_600));
    assert_eq!(jobs.rules("other").max_crashes, 3);
}

#[test]
fn no_error_has_the_password() {
    for (store, shown) in [
        (
            "postgres://jobs:pass%40word@db.example/app",
            "\"postgres://jobs:***@db.example/app\" is not supported yet",
        ),
        (
            "postgresql://db/app?password=pass%40word",
            "\"postgresql://db/app?password=***\" is not supported yet",
        ),
        (
            "mysql://root:pass%40word@db/x",
            "\"mysql://root:***@db/x\" has an unknown scheme",
        ),
        (
            "jobs:pass%40word@db",
            "\"jobs:***@db\" has an unknown scheme",
        ),
    ] {
        let error = refusal(&format!("[jobs]\nstore = '{store}'"));
        assert!(error.starts_with("2:9: jobs.store: "), "{error}");
        assert!(
            error.contains(shown) && !error.contains("pass%40word"),
            "{error}"
        );
        let error = refusal(&format!("[jobs]\nstore = {store}"));
        assert!(!error.contains("pass%40word"), "{error}");
        assert!(error.contains("write store = \"...\""), "{error}");
        let error = refusal(&format!("[jobs]\nstore = ['{store}']"));
        assert!(!error.contains("pass%40word"), "{error}");
        assert!(error.contains("sqlite:PATH"), "{error}");
    }
}

#[test]
fn values_that_cannot_be_used_are_refused_with_key_and_remedy() {
    let store = "[jobs]\nstore = 'sqlite:/jobs.db'\n";
    for (text, said) in [
        ("[jobs]".to_owned(), "jobs: store is missing"),
        (
            "[jobs]\nstore = 'jobs.db'".to_owned(),
            "write \"sqlite:jobs.db\"",
        ),
        (
            format!("{store}concurrency = 9"),
            "3:15: jobs.concurrency: 9 is more than workers.threads (8)",
        ),
        (
            format!("{store}concurrency = 0"),
            "jobs.concurrency: 0 is out of range; give 1 to 8",
        ),
        (
            format!("{store}max-attempts = 1001"),
            "jobs.max-attempts: 1001 is out of range; give 1 to 1000",
        ),
        (
            format!("{store}backoff = '2h'"),
            "jobs.backoff: backoff (2h) is longer than max-backoff",
        ),
        (
            format!("{store}lease = '11m'"),
            "jobs.lease: 11m is out of range; give 5s to 10m",
        ),
        (
            format!("{store}result = '17MiB'"),
            "jobs.result: 17MiB is out of range; give 1 to 16MiB (limits.frame)",
        ),
        (
            format!("{store}max-size = '1KiB'"),
            "jobs.max-size: 1KiB is out of range",
        ),
        (
            format!("{store}password-file = '/x'"),
            "jobs.password-file: a SQLite store has no password",
        ),
        (
            format!("{store}[jobs.schedules]\nx = 1"),
            "jobs.schedules: it is not supported yet",
        ),
        (
            format!("{store}[methods.ping.job]\nrate = 1"),
            "methods.ping.job.rate: it is not supported yet",
        ),
        (
            format!("{store}[methods.ping.job]\nconcurrency = 1"),
            "methods.ping.job.concurrency: it is not supported yet",
        ),
        (
            format!("{store}[methods.ping.job]\npriority = 10"),
            "methods.ping.job.priority: 10 is out of range; give -9 to 9",
        ),
        (
            format!(
                "{store}[[listen]]\naddress = 'unix:/run/x'\nisolation = 'connection'\n[pools.p]\n\
                 command = ['/bin/true']\nscope = 'connection'\n[methods.m]\npool = 'p'\n[methods.m.job]"
            ),
            "methods.m.job: the pool \"p\" has scope = \"connection\"",
        ),
        (
            "[methods.ping.job]\npriority = 1".to_owned(),
            "methods.ping.job: this table has no effect without [jobs]",
        ),
    ] {
        let error = refusal(&text);
        assert!(error.contains(said), "{text}: {error}");
        let files = Files::of_text(Path::new("/etc/x.toml"), text.clone()).unwrap();
        let told = diagnostics::settings_or_faults(&root(), &files, &Overrides::default());
        let told: Vec<String> = told.unwrap_err().iter().map(Error::to_string).collect();
        assert_eq!(told.len(), 1, "{text}: {told:?}");
        assert!(told[0].contains(said), "{text}: {told:?}");
    }
}

#[test]
fn the_directory_of_the_store_must_exist() {
    let directory = tempfile::tempdir().unwrap();
    let of = |path: &str| {
        let path = directory.path().join(path);
        format!("[jobs]\nstore = 'sqlite:{}'", path.display())
    };
    assert!(jobs(&of("jobs.db")).path().starts_with(directory.path()));
    assert!(
        !directory.path().join("jobs.db").exists(),
        "nothing is created"
    );
    fs::write(directory.path().join("file"), "").unwrap();
    for (path, reason) in [
        ("missing/jobs.db", "there is no directory"),
        ("file/jobs.db", "is not a directory"),
        ("", "is a directory"),
    ] {
        let error = refusal(&of(path));
        assert!(
            error.starts_with("2:9: jobs.store: ") && error.contains(reason),
            "{error}"
        );
    }
}

#[test]
fn the_store_is_no_file_of_the_server() {
    let error = refusal("pid-file = '/run/x.db'\n[jobs]\nstore = 'sqlite:/run/x.db'");
    assert!(error.contains("is the path of pid-file too"), "{error}");
}
