//! Checks what the process of a connection serves, what it can reach, and when it ends.

use std::fs;
use std::io::Read;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{acceptor, builder, isolated, ping, session_of, status, wait_running};
use crate::support::wire::{Dialect, Wire, post};
use crate::support::{PATIENCE, assert_within, has_landlock, process, wait_for};

/// Such clients would hold all processes of the listener.
#[test]
fn a_client_that_says_nothing_is_ended_by_the_read_timeout() {
    let daemon = builder("[limits]\nread-timeout = \"1s\"\n", "spare = 0\n").start();
    let (mut silent, mut other) = (daemon.client(), daemon.client());
    ping(&mut other);
    let begin = Instant::now();
    silent.assert_closed();
    assert_within("the end", begin.elapsed(), Duration::from_secs(4));
    wait_for("the end of its process", PATIENCE, || {
        status(&daemon)["running"] == 1
    });
    // After its first call, a client may be idle for longer.
    ping(&mut other);
}

#[test]
fn each_connection_has_a_process_that_ends_with_it() {
    let daemon = isolated("spare = 2\n");
    let acceptor = acceptor(&daemon);
    let address = daemon.address();
    assert_eq!(
        process::title(acceptor),
        format!("preforkd: acceptor {address}")
    );
    wait_for("two spare processes", PATIENCE, || {
        status(&daemon)["spare"] == 2
    });
    let (mut one, mut other) = (daemon.client(), daemon.client());
    ping(&mut one);
    ping(&mut other);
    let pids = [session_of(&one), session_of(&other)];
    assert_ne!(pids[0], pids[1]);
    assert!(
        pids.iter()
            .all(|&pid| process::parent(pid) == Some(acceptor))
    );
    wait_for("two connections and two spares", PATIENCE, || {
        let shown = status(&daemon);
        shown["running"] == 2 && shown["spare"] == 2 && shown["limit"] == 256
    });
    let table = daemon.command(&["status", "--connections"]).stdout;
    let table = String::from_utf8(table).unwrap();
    let peer = one.stream().local_addr().unwrap().to_string();
    assert!(table.contains(&peer), "{table}");
    let table = daemon.command(&["status"]).stdout;
    assert!(!String::from_utf8(table).unwrap().contains(&peer));
    drop(one);
    wait_for("the end of its process", PATIENCE, || {
        !process::runs(pids[0])
    });
    ping(&mut other);
    process::wait_for_no_zombies(acceptor);
}

#[test]
fn all_dialects_commands_and_threads_work_in_a_session() {
    let command =
        "[methods.parent]\ncommand = [\"sh\", \"-c\", \"echo $PPID\"]\noutput = \"line\"\n";
    let daemon = builder(command, "").start();
    for dialect in [Dialect::Frame, Dialect::Line, Dialect::Http] {
        let mut wire = Wire::to(&daemon);
        let answer = wire
            .ask(dialect, r#"{"in": "sleep", "params": 0.01}"#)
            .answer(dialect);
        assert!(answer.unwrap().contains("0.01"), "{dialect:?}");
    }
    let mut wire = Wire::to(&daemon);
    assert_eq!(wire.send(post("/ping", "7")).response().json(), json!(7));
    let mut client = daemon.client();
    let parent = client.call(&json!({"in": "parent"}));
    assert_eq!(
        parent["result"],
        session_of(&client).to_string(),
        "{parent}"
    );
    assert!(
        process::threads(session_of(&client)) <= 4,
        "threads start on demand"
    );
}

#[test]
fn at_the_limit_connections_wait_until_one_ends() {
    let daemon = isolated("processes = 2\nspare = 1\n");
    let (mut one, mut two, mut three) = (daemon.client(), daemon.client(), daemon.client());
    ping(&mut one);
    ping(&mut two);
    daemon.wait_log("2 connections are open, as many as processes");
    three.send(r#"{"in": "ping"}"#);
    assert_eq!(status(&daemon)["running"], 2);
    drop(one);
    assert_eq!(three.recv_json()["out"], "pong");
    ping(&mut two);
}

#[test]
fn a_session_ends_at_its_max_lifetime_between_two_calls() {
    let daemon = isolated("max-lifetime = \"1s\"\n");
    let mut client = daemon.client();
    let begin = Instant::now();
    let slept = client.call(&json!({"in": "sleep", "params": 1.5}));
    assert_eq!(slept["result"], 1.5, "{slept}");
    client.assert_closed();
    assert_within("the end", begin.elapsed(), Duration::from_secs(6));
}

/// A program of a pool that answers each call with its pid.
const POOL: &str = "import json, os, socket, struct
calls = socket.socket(fileno=3)
while True:
    head = calls.recv(4)
    if not head:
        break
    call = json.loads(calls.recv(struct.unpack('<I', head)[0]).decode())
    body = json.dumps({'out': call['in'], 'result': os.getpid()}).encode()
    calls.sendall(struct.pack('<I', len(body)) + body)
";
const POOL_TABLES: &str = "[pools.p]\nprocesses = 1\ncommand = [\"python3\", \"pool.py\"]\nready = \"alive\"\n\
                           directory = \".\"\nreload = \"keep\"\n[methods.who]\npool = \"p\"\n";

#[test]
fn the_calls_of_a_pool_go_to_its_programs() {
    let builder = builder(POOL_TABLES, "").file("pool.py", POOL);
    let daemon = builder.expect_log("SIGKILL").start();
    let (mut one, mut other) = (daemon.client(), daemon.client());
    let who = json!({"in": "who"});
    let program = one.call(&who)["result"].clone();
    assert!(program.is_i64(), "{program}");
    assert_eq!(other.call(&who)["result"], program);
    // Links are made when the connection comes.
    let mut third = daemon.client();
    ping(&mut third);
    wait_for("the link of the third one", PATIENCE, || {
        third.call(&who)["result"] == program
    });
    kill(Pid::from_raw(acceptor(&daemon)), Signal::SIGKILL).unwrap();
    assert_eq!(third.call(&who)["result"], program);
}

#[test]
fn sessions_of_both_generations_use_a_pool_process_that_stays_at_a_reload() {
    let builder = builder(POOL_TABLES, "spare = 1\n").file("pool.py", POOL);
    let daemon = builder.start();
    let who = json!({"in": "who"});
    let (mut client, mut busy) = (daemon.client(), daemon.client());
    let program = client.call(&who)["result"].clone();
    assert_eq!(busy.call(&who)["result"], program);
    let before = session_of(&client);
    // A connection with a running call stays in its process.
    busy.send(r#"{"in": "sleep", "params": 2.0}"#);
    wait_running(&daemon, session_of(&busy));
    assert!(daemon.command(&["reload"]).status.success());
    wait_for("another process", PATIENCE, || !process::runs(before));
    assert_eq!(client.call(&who)["result"], program);
    assert_eq!(daemon.client().call(&who)["result"], program);
    busy.send(r#"{"in": "who"}"#);
    let answers = [busy.recv_json(), busy.recv_json()];
    assert!(
        answers.iter().any(|it| it["result"] == program),
        "{answers:?}"
    );
}

#[test]
fn a_pool_process_stays_as_long_as_a_session_without_an_acceptor() {
    let tables = POOL_TABLES.replace("reload = \"keep\"\n", "");
    let builder = builder(&tables, "").file("pool.py", POOL);
    let daemon = builder.expect_log("SIGKILL").start();
    let who = json!({"in": "who"});
    let mut client = daemon.client();
    let program = client.call(&who)["result"].clone();
    kill(Pid::from_raw(acceptor(&daemon)), Signal::SIGKILL).unwrap();
    ping(&mut daemon.client());
    client.send(r#"{"in": "sleep", "params": 2.0}"#);
    wait_for("the running call", PATIENCE, || {
        // Its session has no acceptor, so it is in another row than the other ones.
        daemon.status()["isolated"]
            .to_string()
            .contains("\"calls\":2")
    });
    assert!(daemon.command(&["reload"]).status.success());
    wait_for("the end of the old worker", PATIENCE, || {
        process::workers(daemon.pid()).len() == 1
    });
    let begin = Instant::now();
    client.send(r#"{"in": "who"}"#);
    let answers = [client.recv_json(), client.recv_json()];
    assert!(
        answers.iter().any(|it| it["result"] == program),
        "{answers:?}"
    );
    assert_within("both answers", begin.elapsed(), Duration::from_secs(6));
}

#[test]
fn a_session_has_nothing_but_its_own_descriptors() {
    let daemon = isolated("");
    let (mut client, mut other) = (daemon.client(), daemon.client());
    ping(&mut client);
    ping(&mut other);
    let pid = session_of(&client);
    let mut kinds: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
        .map(|target| target.display().to_string())
        .filter(|target| !target.starts_with("anon_inode:[event"))
        .collect();
    kinds.sort();
    kinds.dedup();
    let count = |kind: &str| kinds.iter().filter(|it| it.starts_with(kind)).count();
    // The client, the acceptor, the sending end of the adoption queue, and both ends of the signal pipe.
    assert_eq!(count("socket:"), 5, "{kinds:?}");
    assert_eq!(count("pipe:"), 1, "the master's: {kinds:?}");
    assert_eq!(kinds.len() - 6, count("/"), "{kinds:?}");
}

#[test]
fn a_session_cannot_open_the_memory_of_acceptor_worker_or_another_session() {
    if !has_landlock() {
        return;
    }
    let script = "import os, sys\nfor pid in sys.argv[1].split():\n    try:\n        \
                  os.close(os.open('/proc/%s/mem' % pid, os.O_RDONLY))\n        print('open', pid)\n    \
                  except PermissionError:\n        print('refused')\n";
    let method = "[methods.look]\ncommand = [\"python3\", \"look.py\", \"{pids}\"]\nguard = false\ndirectory = \".\"\n";
    let builder = builder(method, "").file("look.py", script);
    let daemon = builder.start();
    let (mut client, mut other) = (daemon.client(), daemon.client());
    ping(&mut other);
    let mut pids = vec![acceptor(&daemon), session_of(&other)];
    pids.extend(process::workers(daemon.pid()));
    let words: Vec<String> = pids.iter().map(i32::to_string).collect();
    let call = json!({"in": "look", "params": {"pids": words.join(" ")}});
    let answer = client.call(&call);
    let text = answer["result"].as_str().unwrap_or_default();
    assert_eq!(text.matches("refused").count(), pids.len(), "{answer}");
}

#[test]
fn acceptor_and_sessions_ignore_term_and_wait_for_the_master() {
    let daemon = isolated("");
    let mut client = daemon.client();
    ping(&mut client);
    let pids = [acceptor(&daemon), session_of(&client)];
    for pid in pids {
        kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    }
    for _ in 0..3 {
        ping(&mut client);
        ping(&mut daemon.client());
    }
    assert_eq!(pids, [acceptor(&daemon), session_of(&client)]);
}

#[test]
fn a_stop_answers_the_running_call_and_closes_the_connection() {
    let mut daemon = isolated("");
    let (mut busy, mut idle) = (daemon.client(), daemon.client());
    ping(&mut idle);
    busy.send(r#"{"in": "sleep", "params": 0.5}"#);
    let session = session_of(&busy);
    wait_running(&daemon, session);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(busy.recv_json()["result"], 0.5);
    idle.assert_closed();
    let mut rest = Vec::new();
    let _ = busy.stream().take(1).read_to_end(&mut rest);
    assert!(rest.is_empty());
    drop(busy);
    assert!(daemon.wait_exit().success());
    daemon.wait_group_gone();
}

/// Whatever the account of the workers is.
#[test]
fn acceptor_and_sessions_run_as_the_user_of_their_listener() {
    if !nix::unistd::geteuid().is_root() {
        return println!("not run: it needs root");
    }
    let command = "[methods.who]\ncommand = [\"id\", \"-u\"]\noutput = \"line\"\n";
    let daemon = builder(command, "user = 54321\ngroup = 54322\n").start();
    let mut client = daemon.client();
    assert_eq!(client.call(&json!({"in": "who"}))["result"], "54321");
    let field = |pid, key: &str| process::field(pid, key).unwrap();
    let all = |id: &str| [id; 4].join("\t");
    for pid in [acceptor(&daemon), session_of(&client)] {
        assert_eq!(field(pid, "Uid"), all("54321"), "of {pid}");
        assert_eq!(field(pid, "Gid"), all("54322"), "of {pid}");
        assert_eq!(field(pid, "Groups"), "54322", "of {pid}");
        assert_eq!(field(pid, "CapEff").trim_start_matches('0'), "");
        assert_eq!(field(pid, "NoNewPrivs"), "1");
    }
    assert_eq!(field(daemon.ready_workers()[0], "Uid"), all("0"));
}
