//! Tests the death records of pools in `status`.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{PROGRAM, call, config, pid, setting};
use crate::support::{Daemon, Dir, PATIENCE, process, wait_for};

fn deaths(daemon: &Daemon) -> Vec<Value> {
    daemon.status()["deaths"].as_array().unwrap().clone()
}

/// The last death, once there are `count`.
fn death(daemon: &Daemon, count: usize) -> Value {
    wait_for("a death record", PATIENCE, || deaths(daemon).len() == count);
    deaths(daemon).remove(count - 1)
}

#[test]
fn deaths_of_programs_and_pool_processes_are_death_records() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let keys = "ready = \"message\"\nwhen-abandoned = \"kill\"\nrespawn-burst = 100";
    let mut builder = Daemon::builder().config(&config(&program, "ready", "", keys));
    for line in [
        "SIGSEGV",
        "exit code",
        "no valid answer",
        "ended by SIGKILL",
        "descriptor 3",
    ] {
        builder = builder.expect_log(line);
    }
    let daemon = &builder.start();
    let mut client = daemon.client();
    let mut first = None;
    for (number, (method, params, exit, signal, reason)) in [
        ("die", json!("SIGSEGV"), None, Some("SIGSEGV"), "SIGSEGV"),
        ("leave", json!(3), Some(3), None, "exit code 3"),
        (
            "raw",
            json!("\u{ff}\u{ff}\u{ff}\u{7f}"),
            None,
            Some("SIGKILL"),
            "no valid answer",
        ),
        (
            "hang_up",
            json!(null),
            None,
            Some("SIGKILL"),
            "descriptor 3",
        ),
        ("nap", json!(60), None, Some("SIGKILL"), "timeout was over"),
    ]
    .into_iter()
    .enumerate()
    {
        let program = pid(&mut client);
        first = first.or(Some(program));
        client.call(&json!({"in": method, "params": params, "timeout_ms": 2_000}));
        let told = death(daemon, number + 1);
        assert_eq!(told["kind"], "program", "{told}");
        assert_eq!(told["name"], "p", "{told}");
        assert_eq!(told["slot"], Value::Null, "{told}");
        assert_eq!(told["pid"], program, "{told}");
        assert_eq!(told["exit"], json!(exit), "{told}");
        assert_eq!(told["signal"], json!(signal), "{told}");
        assert_eq!(told["method"], method, "{told}");
        assert!(told["reason"].as_str().unwrap().contains(reason), "{told}");
        assert!(told["rss_bytes"].as_u64().unwrap() > 1 << 20, "{told}");
        assert!(told["at"].as_u64().unwrap() > 1_700_000_000, "{told}");
    }
    // One that never becomes ready, after one that had nothing to do.
    let program = pid(&mut client);
    dir.write("program.py", "import sys; sys.exit(9)");
    kill(Pid::from_raw(program), Signal::SIGKILL).unwrap();
    wait_for("two more deaths", PATIENCE, || deaths(daemon).len() >= 7);
    let idle = &deaths(daemon)[5];
    assert_eq!(
        (&idle["pid"], &idle["method"]),
        (&json!(program), &Value::Null)
    );
    let unready = &deaths(daemon)[6];
    assert_eq!(
        (&unready["kind"], &unready["exit"]),
        (&json!("program"), &json!(9))
    );
    assert!(
        unready["reason"]
            .as_str()
            .unwrap()
            .contains("before it was ready")
    );
    dir.write("program.py", PROGRAM);
    wait_for("a program that serves", PATIENCE, || {
        call(&mut client, "echo", &json!(1))["out"] == "echo"
    });

    let pool = daemon.pool();
    kill(Pid::from_raw(pool), Signal::SIGKILL).unwrap();
    let is_pool = |death: &Value| death["kind"] == "pool";
    wait_for("its record", PATIENCE, || {
        deaths(daemon).iter().any(is_pool)
    });
    let told = deaths(daemon).into_iter().find(is_pool).unwrap();
    assert_eq!(told["pid"], pool, "{told}");
    assert_eq!((&told["name"], &told["slot"]), (&json!("p"), &Value::Null));
    assert!(told["rss_bytes"].as_u64() > Some(0), "{told}");
    let output = daemon.command(&["status"]);
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(page.contains("program  p"), "{page}");
    // They outlive their pool process, and so does what the master knows of them.
    assert!(deaths(daemon).iter().any(|it| it["pid"] == json!(first)));

    let worker = daemon.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    let is_worker = |death: &Value| death["kind"] == "worker";
    wait_for("its record", PATIENCE, || {
        deaths(daemon).iter().any(is_worker)
    });
    let told = deaths(daemon).into_iter().find(is_worker).unwrap();
    assert_eq!(told["pid"], worker, "{told}");
    assert_eq!((&told["name"], &told["slot"]), (&Value::Null, &json!(0)));
}

#[test]
fn ordinary_ends_of_programs_are_no_death_records() {
    let setting = setting("", "max-calls = 2\nidle-timeout = \"300ms\"", &[]);
    let daemon = &setting.daemon;
    let mut client = daemon.client();
    let first = pid(&mut client);
    wait_for("a recycled program", PATIENCE, || pid(&mut client) != first);
    let pool = daemon.pool();
    wait_for("no program", PATIENCE, || {
        process::children(pool).is_empty()
    });
    pid(&mut client);
    assert!(daemon.command(&["reload"]).status.success());
    wait_for("the end of the old pool process", PATIENCE, || {
        !process::runs(pool)
    });
    assert_eq!(deaths(daemon), Vec::<Value>::new());
}
