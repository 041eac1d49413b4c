//! Checks that a reload, an upgrade or a stop reaches all sessions, also those without an acceptor, and that
//! no process waits or spins meanwhile.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{METHODS, acceptor, builder, isolated, ping, session_of, status, wait_running};
use crate::support::{Daemon, PATIENCE, assert_within, descriptors, pass, process, wait_for};

/// A pool program. Its first argument is the number of seconds until it is ready, the second the number of seconds
/// for each call.
pub const POOL: &str = "import json, socket, struct, sys, time
calls = socket.socket(fileno=3)
def say(message):
    body = json.dumps(message).encode()
    calls.sendall(struct.pack('<I', len(body)) + body)
time.sleep(float(sys.argv[1]))
say({'out': 'ready'})
while True:
    head = calls.recv(4)
    if not head:
        break
    call = json.loads(calls.recv(struct.unpack('<I', head)[0]).decode())
    time.sleep(float(sys.argv[2]))
    say({'out': call['in'], 'result': 'done'})
";

pub fn pool(ready: f64, call: f64, timeout: &str) -> String {
    format!(
        "[pools.p]\ncommand = [\"python3\", \"pool.py\", \"{ready}\", \"{call}\"]\nready = \"message\"\n\
         processes = 1\ndirectory = \".\"\n[methods.work]\npool = \"p\"\ntimeout = \"{timeout}\"\n"
    )
}

pub fn config(tables: &str) -> String {
    format!("{METHODS}[workers]\ncount = 1\n{tables}")
}

pub fn end_acceptor(daemon: &Daemon) {
    let first = acceptor(daemon);
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    wait_for("another acceptor", PATIENCE, || {
        let all = daemon.status()["isolated"].clone();
        let all = all.as_array().unwrap();
        all.iter().any(|it| {
            let pid = it["pid"].as_i64().unwrap_or(0);
            it["state"] == "ready" && pid > 0 && pid != i64::from(first)
        })
    });
}

#[test]
fn a_new_generation_accepts_when_its_pool_programs_are_ready() {
    let daemon = builder(&pool(0.0, 0.0, "1s"), "")
        .file("pool.py", POOL)
        .start();
    daemon.configure(&config(&pool(2.5, 0.0, "1s")));
    let mut reload = daemon.asking(&["reload"]).spawn().unwrap();
    let result = loop {
        let answer = daemon.client().call(&json!({"in": "work"}));
        assert_eq!(answer["result"], "done", "{answer}");
        pass(Duration::from_millis(20));
        if let Some(result) = reload.try_wait().unwrap() {
            break result;
        }
    };
    assert!(result.success());
}

/// With `is_done`, the stop comes after the upgrade, else while it is pending.
fn stop_at_an_upgrade(is_done: bool) {
    let tables = pool(0.0, 0.0, "1s");
    let builder = builder(&tables, "").file("pool.py", POOL);
    let mut daemon = match is_done {
        true => builder.start(),
        false => builder.expect_log("the server stops").start(),
    };
    let (mut busy, mut idle) = (daemon.client(), daemon.client());
    ping(&mut idle);
    assert_eq!(busy.call(&json!({"in": "work"}))["result"], "done");
    busy.send(r#"{"in": "sleep", "params": 2.0}"#);
    wait_running(&daemon, session_of(&busy));
    let master = daemon.pid();
    let old = process::children(master);
    let left = [acceptor(&daemon), session_of(&busy), session_of(&idle)];
    if is_done {
        assert!(daemon.command(&["upgrade"]).status.success());
        ping(&mut daemon.client());
    } else {
        daemon.signal(Signal::SIGUSR2);
        wait_for("the new program's children", PATIENCE, || {
            let children = process::children(master);
            children.iter().any(|pid| !old.contains(pid))
        });
    }
    daemon.signal(Signal::SIGTERM);
    assert_eq!(busy.recv_json()["result"], 2.0);
    drop(busy);
    assert!(daemon.wait_exit().success());
    let left: Vec<_> = left.iter().filter(|pid| process::runs(**pid)).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_stop_after_an_upgrade_waits_for_the_sessions_of_the_program_before() {
    stop_at_an_upgrade(true);
}

#[test]
fn a_stop_during_an_upgrade_waits_for_the_sessions_of_the_program_before() {
    stop_at_an_upgrade(false);
}

#[test]
fn crashes_are_noted_although_the_acceptor_is_of_the_program_before_an_upgrade() {
    let daemon = builder("", "").expect_log("SIGKILL").start();
    let mut clients: Vec<_> = (0..3).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.send(r#"{"in": "sleep", "params": 15}"#);
    }
    let sessions: Vec<i32> = clients.iter().map(session_of).collect();
    sessions.iter().for_each(|pid| wait_running(&daemon, *pid));
    let upgrade = daemon.command(&["upgrade"]);
    assert!(upgrade.status.success(), "{upgrade:?}");
    for pid in &sessions {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).unwrap();
    }
    wait_for("the death records", PATIENCE, || {
        let deaths = daemon.status()["deaths"].clone();
        let deaths = deaths.as_array().unwrap().iter();
        deaths.filter(|it| it["kind"] == "connection").count() == 3
    });
}

#[test]
fn connections_move_although_the_listener_is_full() {
    let daemon = isolated("processes = 8\n");
    let mut busy: Vec<_> = (0..4).map(|_| daemon.client()).collect();
    let mut idle: Vec<_> = (0..4).map(|_| daemon.client()).collect();
    idle.iter_mut().for_each(ping);
    let before: Vec<i32> = idle.iter().map(session_of).collect();
    for client in &mut busy {
        client.send(r#"{"in": "sleep", "params": 5}"#);
        wait_running(&daemon, session_of(client));
    }
    let listen = format!(
        "[[listen]]\naddress = \"{}\"\nisolation = \"connection\"\nprocesses = 4\n",
        daemon.address()
    );
    daemon.reload_with(&(config("") + &listen));
    wait_for("the end of the old processes", PATIENCE, || {
        !before.iter().any(|&pid| process::runs(pid))
    });
    let begin = Instant::now();
    idle.iter_mut().for_each(ping);
    assert_within("the calls", begin.elapsed(), Duration::from_secs(2));
}

#[test]
fn an_upgrade_that_shares_the_listener_ends_its_connections() {
    let daemon = isolated("");
    let mut client = daemon.client();
    client.send(r#"{"in": "sleep", "params": 0.5}"#);
    wait_running(&daemon, session_of(&client));
    let listen = format!("[[listen]]\naddress = \"{}\"\n", daemon.address());
    daemon.configure(&(METHODS.to_owned() + &listen));
    let upgrade = daemon.command(&["upgrade"]);
    assert!(upgrade.status.success(), "{upgrade:?}");
    assert_eq!(client.recv_json()["result"], 0.5);
    client.assert_closed();
    ping(&mut daemon.client());
}

#[test]
fn a_listener_that_was_shut_down_uses_no_cpu_and_the_server_stops() {
    let builder = builder("", "").expect_log("no connection can be accepted");
    let mut daemon = builder.start();
    let pid = acceptor(&daemon);
    let listener = descriptors::sockets_of(pid)
        .into_iter()
        .filter_map(|(_, fd)| descriptors::borrow(pid, fd).ok())
        .find(|fd| getsockopt(fd, sockopt::AcceptConn) == Ok(true))
        .unwrap();
    shutdown(listener.as_raw_fd(), Shutdown::Both).unwrap();
    drop(listener);
    daemon.wait_log("no connection can be accepted");
    let before = process::cpu_ticks(pid).unwrap();
    pass(Duration::from_secs(1));
    let used = process::cpu_ticks(pid).unwrap() - before;
    assert!(used < 25, "{used} ticks in a second");
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait_exit().success());
}

#[test]
fn a_second_term_ends_sessions_without_an_acceptor_at_once() {
    let mut daemon = builder("", "").expect_log("SIGKILL").start();
    let mut client = daemon.client();
    client.send(r#"{"in": "sleep", "params": 15}"#);
    wait_running(&daemon, session_of(&client));
    end_acceptor(&daemon);
    daemon.signal(Signal::SIGTERM);
    pass(Duration::from_millis(500));
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    assert_within("the stop", begin.elapsed(), Duration::from_secs(5));
}

#[test]
fn a_pool_process_stays_until_sessions_without_an_acceptor_have_their_answers() {
    let daemon = builder(&pool(0.0, 1.5, "20s"), "")
        .file("pool.py", POOL)
        .expect_log("SIGKILL")
        .start();
    let mut clients: Vec<_> = (0..2).map(|_| daemon.client()).collect();
    clients.iter_mut().for_each(ping);
    for client in &mut clients {
        client.send(r#"{"in": "work"}"#);
    }
    // A session gets its link to the pool process through its acceptor.
    wait_for("both calls at the pool process", PATIENCE, || {
        daemon.status()["pools"][0]["calls"] == 2
    });
    end_acceptor(&daemon);
    daemon.reload_with(&config(&pool(0.0, 0.0, "20s")));
    for client in &mut clients {
        let answer = client.recv_json();
        assert_eq!(answer["result"], "done", "{answer}");
    }
}

/// Opens the table of sessions: 512 bytes for each.
fn session_table(daemon: &Daemon) -> File {
    let directory = format!("/proc/{}/fd", daemon.pid());
    let is_table = |file: &File| file.metadata().unwrap().len() == 512 * 4096 * 64;
    fs::read_dir(directory)
        .unwrap()
        .filter_map(|fd| {
            let path = fd.unwrap().path();
            let name = fs::read_link(&path).ok()?.display().to_string();
            let open = || File::options().read(true).write(true).open(&path);
            name.contains("memfd:").then(open)?.ok()
        })
        .find(is_table)
        .unwrap()
}

/// Writes what a record has behind the part that is like that of a worker.
fn forge(daemon: &Daemon, place: u64, pid: i32, acceptor: i32) {
    let table = session_table(daemon);
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let start: u64 = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split(' ')
        .nth(20)
        .unwrap()
        .parse()
        .unwrap();
    let open: u32 = 2;
    let mut record = Vec::new();
    record.extend_from_slice(&open.to_le_bytes());
    record.extend_from_slice(&pid.to_le_bytes());
    record.extend_from_slice(&start.to_le_bytes());
    record.extend_from_slice(&acceptor.to_le_bytes());
    record.extend_from_slice(&1_u32.to_le_bytes());
    table.write_all_at(&record, place * 512 + 256).unwrap();
    let claimed = place as u32 + 1;
    table
        .write_all_at(&claimed.to_le_bytes(), 256 + 76)
        .unwrap();
}

#[test]
fn a_forged_record_makes_the_master_neither_kill_a_worker_nor_wait_for_it() {
    let builder = builder("drain-timeout = \"3s\"\n", "").expect_log("SIGKILL");
    let mut daemon = builder.start();
    let worker = process::workers(daemon.pid())[0];
    forge(&daemon, 20, worker, acceptor(&daemon));
    end_acceptor(&daemon);
    ping(&mut daemon.client());
    daemon.signal(Signal::SIGTERM);
    let begin = Instant::now();
    assert!(daemon.wait_exit().success());
    assert_within("the stop", begin.elapsed(), Duration::from_secs(10));
    assert!(
        !daemon
            .log()
            .contains(&format!("worker {worker} ended by SIGKILL"))
    );
}

/// Writes into the memory that a session shares with other processes, as code in this session could: old heartbeats,
/// old start times, and orders to exit. Returns how many mappings accepted it.
fn spoil(session: i32) -> usize {
    let memory = File::options()
        .write(true)
        .open(format!("/proc/{session}/mem"));
    let memory = memory.expect("root may write the memory of others");
    let maps = fs::read_to_string(format!("/proc/{session}/maps")).unwrap();
    let shared = maps
        .lines()
        .filter(|line| line.contains("/memfd:preforkd-shared"));
    let mut accepted = 0;
    for line in shared {
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        let is_table = end - start == 512 * 4096 * 64;
        let size = if is_table { 512 } else { 256 };
        let mut is_accepted = true;
        for record in (start..end).step_by(size).take(64) {
            is_accepted &= memory.write_all_at(&[0; 8], record).is_ok();
            if is_table {
                let _ = memory.write_all_at(&[0; 8], record + 256 + 24);
                let _ = memory.write_all_at(&2_u32.to_le_bytes(), record + 256 + 84);
            }
        }
        accepted += usize::from(is_accepted);
    }
    accepted
}

#[test]
fn a_session_ends_no_other_session_and_no_worker_by_what_it_writes() {
    let builder = builder("heartbeat-timeout = \"1s\"\n", "max-lifetime = \"1h\"\n");
    let daemon = builder.start();
    let mut hostile = daemon.client();
    let mut other = daemon.client();
    ping(&mut hostile);
    ping(&mut other);
    let (attacker, victim) = (session_of(&hostile), session_of(&other));
    let workers = process::workers(daemon.pid());
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        assert_eq!(spoil(attacker), 1, "only the table of sessions");
        pass(Duration::from_millis(20));
    }
    ping(&mut other);
    assert_eq!(session_of(&other), victim);
    assert_eq!(process::workers(daemon.pid()), workers);
    // A fresh session, too.
    ping(&mut daemon.client());
}

#[test]
fn forged_records_do_not_fill_a_listener() {
    let daemon = isolated("processes = 4\n");
    let running = |status: Value| status["running"].as_u64().unwrap();
    assert_eq!(running(status(&daemon)), 0);
    for place in 20..26 {
        forge(&daemon, place, daemon.pid(), 1);
    }
    // The acceptor counts at most once in 50 ms.
    pass(Duration::from_millis(200));
    for _ in 0..3 {
        ping(&mut daemon.client());
    }
}

#[test]
fn forged_records_do_not_keep_an_acceptor_from_forking() {
    let daemon = isolated("spare = 0\n");
    let mut living = daemon.client();
    ping(&mut living);
    let own = session_of(&living);
    let table = session_table(&daemon);
    // Open, with the pid of a session that writes it.
    for (place, pid) in (1..4096).zip([0, own].into_iter().cycle()) {
        let record: Vec<u8> = [2, pid].into_iter().flat_map(i32::to_le_bytes).collect();
        table.write_all_at(&record, place * 512 + 256).unwrap();
    }
    // The first search finds no record that was without a process before, and is repeated.
    for _ in 0..3 {
        ping(&mut daemon.client());
    }
    ping(&mut living);
    assert_eq!(session_of(&living), own);
}
