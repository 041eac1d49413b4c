//! Checks what continues after the death of a session, an acceptor or the master.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{acceptor, builder, ping, session_of, status, wait_running};
use crate::support::{PATIENCE, pass, process, wait_for};

fn end(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

#[test]
fn a_crash_resets_its_connection_and_no_other() {
    let daemon = builder("", "spare = 2\n").expect_log("SIGKILL").start();
    let acceptor = acceptor(&daemon);
    let mut living: Vec<_> = (0..4).map(|_| daemon.client()).collect();
    living.iter_mut().for_each(ping);
    wait_for("two spares", PATIENCE, || status(&daemon)["spare"] == 2);
    let before = process::descriptors_at_rest(acceptor);
    let ways = [Signal::SIGSEGV, Signal::SIGABRT, Signal::SIGKILL];
    for number in 0..30 {
        let mut client = daemon.client();
        ping(&mut client);
        end(session_of(&client), ways[number % ways.len()]);
        client.assert_closed();
    }
    living.iter_mut().for_each(ping);
    assert_eq!(super::acceptor(&daemon), acceptor);
    process::wait_for_no_zombies(acceptor);
    wait_for("the record of each crash", PATIENCE, || {
        status(&daemon)["crashed"] == 30
    });
    let deaths = daemon.status()["deaths"].clone();
    let deaths = deaths.as_array().unwrap();
    let of_sessions: Vec<_> = deaths
        .iter()
        .filter(|it| it["kind"] == "connection")
        .collect();
    assert_eq!(of_sessions.len(), 30);
    let last = of_sessions.last().unwrap();
    assert_eq!(
        (&last["method"], &last["signal"]),
        (&json!("ping"), &json!("SIGKILL"))
    );
    assert!(
        last["name"].as_str().unwrap().starts_with("127.0.0.1:"),
        "{last}"
    );
    let reason = last["reason"].as_str().unwrap();
    assert!(reason.starts_with("killed from outside"), "{last}");
    daemon.wait_log("no other connection is affected");
    wait_for("two spares", PATIENCE, || status(&daemon)["spare"] == 2);
    process::wait_for_descriptors(acceptor, before);
}

#[test]
fn what_a_dead_session_has_left_is_killed() {
    let method = "[methods.leave]\ncommand = [\"sh\", \"-c\", \
                  \"setsid sleep 4321 > /dev/null 2>&1 & echo $!; sleep 60\"]\n";
    let builder = builder(method, "");
    let daemon = builder.expect_log("SIGKILL").start();
    let mut client = daemon.client();
    client.send(r#"{"in": "leave"}"#);
    let session = session_of(&client);
    let mut left = Vec::new();
    wait_for("what it starts", PATIENCE, || {
        left = process::descendants(session);
        left.len() >= 3
    });
    end(session, Signal::SIGKILL);
    client.assert_closed();
    wait_for("its end", PATIENCE, || {
        !left.iter().any(|&pid| process::runs(pid))
    });
    ping(&mut daemon.client());
}

#[test]
fn sessions_outlive_their_acceptor_and_another_one_accepts() {
    let daemon = builder("", "").expect_log("SIGKILL").start();
    let mut clients: Vec<_> = (0..3).map(|_| daemon.client()).collect();
    clients.iter_mut().for_each(ping);
    let (first, session) = (acceptor(&daemon), session_of(&clients[0]));
    end(first, Signal::SIGKILL);
    clients.iter_mut().for_each(ping);
    ping(&mut daemon.client());
    assert_ne!(acceptor(&daemon), first);
    assert_eq!(session_of(&clients[0]), session);
    assert_eq!(process::parent(session), Some(daemon.pid()));
    let is_counted = || {
        let all = daemon.status()["isolated"].clone();
        let running = |it: &serde_json::Value| it["running"].as_u64();
        all.as_array()
            .unwrap()
            .iter()
            .filter_map(running)
            .sum::<u64>()
            == 3
    };
    wait_for("all in the status", PATIENCE, is_counted);
    clients.truncate(1);
    wait_for("the others' end", PATIENCE, || {
        process::zombies(daemon.pid()).is_empty() && process::children(daemon.pid()).len() == 4
    });
    // A session without an acceptor obeys the master.
    clients[0].send(r#"{"in": "sleep", "params": 0.3}"#);
    pass(Duration::from_millis(100));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(clients[0].recv_json()["result"], 0.3);
    clients[0].assert_closed();
}

#[test]
fn an_acceptor_that_died_too_often_is_in_the_status() {
    let daemon = builder("respawn-burst = 1\n", "")
        .expect_log("SIGKILL")
        .start();
    let mut client = daemon.client();
    ping(&mut client);
    end(acceptor(&daemon), Signal::SIGKILL);
    wait_for("another acceptor", PATIENCE, || {
        status(&daemon)["state"] == "ready"
    });
    // The throttle doubles its delay until it is long enough to be seen.
    let throttled = || {
        let all = daemon.status();
        let is_throttled = |it: &&serde_json::Value| it["state"] == "throttled";
        let isolated = all["isolated"].as_array().unwrap();
        isolated.iter().find(is_throttled).cloned()
    };
    let mut row = None;
    wait_for("a throttled acceptor", PATIENCE, || {
        let pid = status(&daemon)["pid"].as_i64();
        if let Some(pid) = pid {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
        row = throttled();
        row.is_some()
    });
    let row = row.unwrap();
    assert_eq!(row["address"], daemon.address().to_string(), "{row}");
    assert!(row["throttle"]["failures"].as_u64() > Some(0), "{row}");
    ping(&mut client);
}

#[test]
fn sessions_without_an_acceptor_move_at_a_reload() {
    let daemon = builder("", "").expect_log("SIGKILL").start();
    let mut client = daemon.client();
    ping(&mut client);
    let before = session_of(&client);
    end(acceptor(&daemon), Signal::SIGKILL);
    ping(&mut daemon.client());
    assert!(daemon.command(&["reload"]).status.success());
    wait_for("another process", PATIENCE, || !process::runs(before));
    ping(&mut client);
    assert_ne!(session_of(&client), before);
}

#[test]
fn the_crash_of_a_session_from_before_an_upgrade_is_recorded() {
    let daemon = builder("", "").expect_log("SIGKILL").start();
    let mut client = daemon.client();
    client.send(r#"{"in": "sleep", "params": 20}"#);
    let (session, old) = (session_of(&client), acceptor(&daemon));
    wait_running(&daemon, session);
    assert!(daemon.command(&["upgrade"]).status.success());
    end(session, Signal::SIGKILL);
    client.assert_closed();
    let mut found = json!(null);
    wait_for("its death record", PATIENCE, || {
        let deaths = daemon.status()["deaths"].clone();
        let deaths = deaths.as_array().unwrap().iter();
        found = deaths.filter(|it| it["pid"] == session).cloned().collect();
        found != json!([])
    });
    assert_eq!(found[0]["kind"], "connection", "{found}");
    assert_eq!(found[0]["signal"], "SIGKILL", "{found}");
    // If the daemon stopped before this, the old acceptor could treat that as a death of the master, and log an error.
    wait_for("the end of the old acceptor", PATIENCE, || {
        !process::runs(old)
    });
}

#[test]
fn sessions_of_a_killed_master_answer_what_runs_and_leave() {
    let mut daemon = builder("", "").expect_log("the master has died").start();
    let (mut busy, mut idle) = (daemon.client(), daemon.client());
    ping(&mut idle);
    busy.send(r#"{"in": "sleep", "params": 0.5}"#);
    wait_running(&daemon, session_of(&busy));
    daemon.signal(Signal::SIGKILL);
    assert_eq!(busy.recv_json()["result"], 0.5);
    idle.assert_closed();
    daemon.wait_exit();
    drop(busy);
    daemon.wait_group_gone();
}
