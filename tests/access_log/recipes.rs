//! Runs what docs/logs.md and the shipped logrotate file tell operators to do.

use std::fs;
use std::process::Command;

use serde_json::json;

use super::{CONFIG, balance, lines_of};
use crate::support::markdown;
use crate::support::{Daemon, PATIENCE, source, wait_for};

/// Makes calls of which each recipe finds some.
fn call_all_kinds(daemon: &Daemon) {
    let mut client = daemon.client();
    client.call(&json!({"in": "ping", "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}));
    client.call(&json!({"in": "none"}));
    client.call(&json!({"in": "sleep", "params": 5, "timeout_ms": 20}));
    // The second one waits for the only thread.
    client.send(&json!({"in": "sleep", "params": 0.1, "id": 1}).to_string());
    client.send(&json!({"in": "sleep", "params": 0, "id": 2}).to_string());
    client.recv_json();
    client.recv_json();
    daemon.reload();
    daemon.client().call(&json!({"in": "ping"}));
    balance(daemon);
}

#[test]
fn each_recipe_of_the_page_finds_calls() {
    if let Err(error) = Command::new("jq").arg("--version").output() {
        return println!("not run: jq: {error}");
    }
    let one_thread = CONFIG.replace("threads = 2", "threads = 1");
    let daemon = Daemon::builder()
        .config(&format!("{one_thread}[trace]\npropagate = true\n"))
        .start();
    call_all_kinds(&daemon);
    let page = fs::read_to_string(source().join("docs/logs.md")).unwrap();
    let (_, recipes) = page.split_once("### Six recipes").unwrap();
    let (recipes, _) = recipes.split_once("\n## ").unwrap();
    let mut recipes = markdown::blocks(recipes);
    recipes.retain(|block| block.language == "sh");
    assert_eq!(recipes.len(), 6);
    for recipe in recipes {
        let done = Command::new("bash")
            .args(["-euo", "pipefail", "-c", &recipe.text])
            .current_dir(&**daemon.dir())
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&done.stdout).into_owned();
        println!("{}{output}", recipe.text);
        assert!(done.status.success(), "{}{done:?}", recipe.text);
        assert!(!output.trim().is_empty(), "{} finds nothing", recipe.text);
    }
}

/// Debian's logrotate with the shipped file, whose paths and whose signal are those of the test.
#[test]
fn the_shipped_logrotate_file_rotates_both_logs() {
    if let Err(error) = Command::new("/usr/sbin/logrotate")
        .arg("--version")
        .output()
    {
        return println!("not run: logrotate: {error}");
    }
    let daemon = Daemon::builder()
        .config(&format!("[log]\nfile = \"preforkd.log\"\n{CONFIG}"))
        .start();
    let shipped = fs::read_to_string(source().join("config/logrotate/preforkd.logrotate")).unwrap();
    let directory = daemon.dir().display().to_string();
    let kill = format!("kill -USR1 {}", daemon.pid());
    let rules = shipped
        .replace("/var/log/preforkd", &directory)
        .replace("systemctl kill -s USR1 --kill-whom=main preforkd", &kill);
    assert!(
        rules.contains(&kill) && rules.contains(&directory),
        "{rules}"
    );
    let rules = daemon.dir().write("rules", rules);
    for turn in 1..=2 {
        daemon.client().call(&json!({"in": "ping"}));
        balance(&daemon);
        let done = Command::new("/usr/sbin/logrotate")
            .args(["--force", "--state"])
            .arg(daemon.dir().join("state"))
            .arg(&rules)
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
        wait_for("new files", PATIENCE, || {
            ["access.log", "preforkd.log"]
                .iter()
                .all(|name| daemon.dir().join(name).exists())
        });
        let rotated = daemon.dir().join(format!(
            "access.log.{turn}{}",
            if turn > 1 { ".gz" } else { "" }
        ));
        assert!(rotated.exists(), "{}", rotated.display());
    }
    wait_for("a line in the new file", PATIENCE, || {
        daemon.client().call(&json!({"in": "ping"}));
        !lines_of(&daemon, "access.log").is_empty()
    });
    let (_, lost) = balance(&daemon);
    assert_eq!(lost, 0);
}
