//! Tests `job check` and `job schema`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::support::{Dir, binary};

fn run(arguments: &[&str]) -> Output {
    Command::new(binary()).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Writes a configuration with this store, and returns its path.
fn config(dir: &Dir, store: &str) -> String {
    let path = dir.write("jobs.toml", format!("[jobs]\nstore = \"{store}\"\n"));
    path.to_str().unwrap().to_owned()
}

/// Creates a store with the schema that the program prints.
fn create_store(path: &Path) {
    let schema = run(&["job", "schema"]);
    assert!(schema.status.success(), "{schema:?}");
    let script = "
import sqlite3, sys
store = sqlite3.connect(sys.argv[1])
store.executescript(sys.argv[2])
store.execute(\"INSERT INTO meta VALUES ('secret', x'01'), ('full', x'00')\")
store.commit()
";
    let made = Command::new("python3")
        .args(["-c", script])
        .arg(path)
        .arg(text(&schema.stdout))
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
}

#[test]
fn a_store_is_tested_without_a_server_and_with_one() {
    let dir = Dir::new();
    let config = config(&dir, "sqlite:jobs.db");
    let store = Path::new(&config).with_file_name("jobs.db");
    let check = || run(&["job", "check", "--config", &config]);
    let output = check();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(
        text(&output.stdout).contains("does not exist yet"),
        "{output:?}"
    );
    assert!(!store.exists(), "nothing is created");

    create_store(&store);
    let output = check();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let expected = "intact, not used by a server\nschema=1.0 waiting=0 running=0 durable=";
    assert!(text(&output.stdout).contains(expected), "{output:?}");

    // As a server holds the lock of a store.
    let script = "
import fcntl, sys
lock = open(sys.argv[1] + '.lock', 'w')
fcntl.flock(lock, fcntl.LOCK_EX)
fcntl.lockf(lock, fcntl.LOCK_EX, 1)
print('locked', flush=True)
sys.stdin.read()
";
    let mut server = Command::new("python3")
        .args(["-c", script])
        .arg(&store)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let stdout = server.stdout.take().unwrap();
    BufReader::new(stdout).read_line(&mut line).unwrap();
    let output = check();
    let used = format!("used by the server with pid {}", server.id());
    assert!(text(&output.stdout).contains(&used), "{output:?}");
    fs::remove_file(&store).unwrap();
    let output = check();
    assert_eq!(output.status.code(), Some(71), "{output:?}");
    let gone = format!(
        "there is no store, although the server with pid {}",
        server.id()
    );
    assert!(text(&output.stderr).contains(&gone), "{output:?}");
    drop(server.stdin.take());
    server.wait().unwrap();
    let output = check();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let gone = "there is no store, although a server has used one there";
    assert!(text(&output.stdout).contains(gone), "{output:?}");
}

#[test]
fn a_store_that_cannot_be_used_is_named_with_reason_and_remedy() {
    let dir = Dir::new();
    let config = config(&dir, "sqlite:jobs.db");
    let store = Path::new(&config).with_file_name("jobs.db");
    let refused = |reason: &str| {
        let output = run(&["job", "check", "--config", &config]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(71), "{said}");
        assert!(said.contains(store.to_str().unwrap()), "{said}");
        assert!(said.contains(reason), "{said}");
    };
    fs::write(&store, "a text\n").unwrap();
    refused("it is no SQLite database; name a file of its own");
    fs::remove_file(&store).unwrap();
    fs::create_dir(&store).unwrap();
    let output = run(&["job", "check", "--config", &config]);
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    fs::remove_dir(&store).unwrap();
    create_store(&store);
    let content = fs::read(&store).unwrap();
    fs::write(&store, &content[..content.len() - 4096]).unwrap();
    refused("; restore it from `preforkd job export`");
}

#[test]
fn a_configuration_without_jobs_has_no_store_to_test() {
    let dir = Dir::new();
    let config = dir.write("empty.toml", "");
    let output = run(&["job", "check", "--config", config.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    let said = text(&output.stderr);
    assert!(
        said.contains("this configuration has no table [jobs]; "),
        "{said}"
    );
}

#[test]
fn a_postgres_store_is_not_supported_yet_and_its_password_is_not_shown() {
    let dir = Dir::new();
    let config = config(&dir, "postgres://jobs:pass-word@db.example/app");
    for arguments in [
        &["check", "--config", &config][..],
        &["run", "--config", &config],
        &["job", "check", "--config", &config],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(78), "{output:?}");
        let said = text(&output.stderr);
        assert!(said.contains("jobs.toml:2:9: jobs.store: "), "{said}");
        assert!(
            said.contains("postgres://jobs:***@db.example/app"),
            "{said}"
        );
        assert!(said.contains("is not supported yet"), "{said}");
        assert!(!format!("{output:?}").contains("pass-word"), "{said}");
    }
}
