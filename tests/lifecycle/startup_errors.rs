//! Tests the error message of a failed reload or start: the result, its reason, and the log of the new
//! workers.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::{Client, Daemon, Dir, PATIENCE, binary, process, wait_for};

const GOOD: &str = "[workers]\ncount = 2\nthreads = 2\n";
const REASON: &str = "this worker could not start handler threads";

#[test]
fn a_refused_reload_quotes_what_the_new_worker_has_logged() {
    let daemon = Daemon::builder()
        .config(GOOD)
        .expect_log(REASON)
        .expect_log("reload refused")
        .start();
    let before = daemon.ready_workers();
    let descriptors = process::descriptors_at_rest(daemon.pid());
    daemon.cramp();
    let refused = daemon.command(&["reload"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    println!("{said}");
    assert_eq!(refused.status.code(), Some(1), "{said}");
    let quoted = format!("(slot 0) logged: ERROR {REASON}");
    assert!(
        said.contains("did not become ready") && said.contains(&quoted),
        "{said}"
    );
    // The log already has both, once each.
    assert_eq!(daemon.log().matches(REASON).count(), 1);
    assert_eq!(daemon.ready_workers(), before);
    process::wait_for_descriptors(daemon.pid(), descriptors);
    // The next result does not quote lines of an earlier one.
    daemon.configure("color = 1\n");
    let refused = daemon.command(&["reload"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("color") && !said.contains("logged"), "{said}");
    daemon.configure(GOOD);
    daemon.uncramp();
    assert!(daemon.command(&["reload"]).status.success());
}

#[test]
fn the_shell_of_a_daemon_that_can_not_start_is_told_what_its_workers_have_logged() {
    // The memory that a serving daemon needs, but not enough for the stack of another thread.
    let room = {
        let daemon = Daemon::start();
        process::virtual_kib(daemon.pid()) + 768
    };
    for detach in ["--daemon", "--listen=127.0.0.1:0"] {
        let dir = Dir::new();
        let config = format!(
            "pid-file = \"p.pid\"\ncontrol-socket = \"c.sock\"\nlog.file = \"log\"\n{GOOD}\
             [[listen]]\naddress = \"127.0.0.1:0\"\n"
        );
        dir.write("p.toml", config);
        let failed = Command::new("/bin/sh")
            .args(["-c", &format!("ulimit -v {room}; exec \"$@\""), "sh"])
            .arg(binary())
            .args(["run", detach, "--config"])
            .arg(dir.join("p.toml"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&failed.stderr).into_owned();
        println!("{said}");
        assert_eq!(failed.status.code(), Some(71), "{said}");
        assert!(said.contains("not every worker became ready"), "{said}");
        assert!(said.contains(&format!("logged: ERROR {REASON}")), "{said}");
        assert!(!dir.join("p.pid").exists() && !dir.join("c.sock").exists());
    }
}

#[test]
fn a_hup_that_comes_during_a_reload_runs_after_it() {
    let daemon = Daemon::builder().config(GOOD).start();
    // With this many threads a start takes a while.
    daemon.configure("[workers]\ncount = 2\nthreads = 1000\n");
    daemon.signal(Signal::SIGHUP);
    daemon.wait_log("reload: reading the configuration");
    daemon.configure("[workers]\ncount = 3\nthreads = 2\n");
    daemon.signal(Signal::SIGHUP);
    daemon.wait_log("reload: generation 3 serves");
    assert_eq!(daemon.ready_workers().len(), 3);
    let log = daemon.log();
    let order: Vec<&str> = log
        .lines()
        .filter_map(|line| Some(line.split_once("reload: ")?.1))
        .collect();
    println!("{order:#?}");
    let reads = "reading the configuration";
    assert_eq!(order.len(), 4, "{order:?}");
    assert!(order[0] == reads && order[1].contains("2 serves"));
    assert!(order[2] == reads && order[3].contains("3 serves"));
}

/// Sends a call that runs in the ready worker, while `others` calls run in others.
fn call_to_the_newest(daemon: &Daemon, others: u64) -> Client {
    loop {
        let mut client = daemon.client();
        client.send(&json!({"in": "sleep", "params": 25, "id": 1}).to_string());
        let run = |wanted: u64| {
            wait_for("the call to run, or to be over", PATIENCE, || {
                let workers = daemon.workers();
                workers.iter().map(|it| it.running).sum::<u64>() == wanted
            });
        };
        run(others + 1);
        let workers = daemon.workers();
        let ready = workers.iter().find(|it| it.state == "ready");
        if ready.is_some_and(|it| it.running == 1) {
            return client;
        }
        // A worker that has not received its order to drain was faster.
        client.reset();
        run(others);
    }
}

#[test]
fn a_reload_waits_while_four_old_generations_drain_and_its_caller_is_told() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\nthreads = 2\n[methods.sleep]\nbuiltin = \"sleep\"\n")
        .start();
    let mut held: Vec<Client> = (0..4)
        .map(|number| {
            let client = call_to_the_newest(&daemon, number);
            assert!(daemon.command(&["reload"]).status.success());
            client
        })
        .collect();
    assert_eq!(daemon.workers().len(), 5);
    let mut command = daemon.asking(&["reload"]);
    let mut waiting = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut hint = String::new();
    BufReader::new(waiting.stderr.take().unwrap())
        .read_line(&mut hint)
        .unwrap();
    println!("{hint}");
    assert_eq!(waiting.try_wait().unwrap(), None);
    assert!(
        daemon
            .log()
            .contains("the reload waits: 4 older generations")
    );
    assert_eq!(daemon.status()["master"]["generation"], 5);
    // Its client is gone, so no one waits for that call, and its worker exits.
    held.remove(0).reset();
    assert!(waiting.wait().unwrap().success());
    assert!(
        hint.contains("one of the 4 generations that still drain"),
        "{hint}"
    );
    assert_eq!(daemon.status()["master"]["generation"], 6);
    held.into_iter().for_each(Client::reset);
}
