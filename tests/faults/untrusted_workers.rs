//! Tests a worker that writes false data to the memory that it shares with its master: only that worker
//! is affected.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::descriptors::{self, borrow, sockets_of};
use crate::support::{Daemon, Dir, PATIENCE, process, wait_for};

fn daemon() -> Daemon {
    Daemon::builder()
        .config("[workers]\ncount = 1\n")
        .expect_log("ended by SIGKILL")
        .start()
}

/// Returns the memory that the master shares with its workers.
fn shared(daemon: &Daemon) -> File {
    let entries = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    let is_shared = |path: &std::path::PathBuf| {
        fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("preforkd-shared"))
    };
    let mut found = entries.map(|entry| entry.unwrap().path()).filter(is_shared);
    let path = found.next().expect("a master has a scoreboard");
    assert_eq!(found.next(), None, "which of them is it?");
    File::options().read(true).write(true).open(path).unwrap()
}

/// Changes the keeper's pid in the shared memory from `keeper` to `other`, as the worker could do.
fn claim(daemon: &Daemon, keeper: i32, other: i32) {
    let shared = shared(daemon);
    let mut bytes = vec![0; 1 << 20];
    shared.read_exact_at(&mut bytes, 0).unwrap();
    let places: Vec<usize> = bytes
        .chunks_exact(4)
        .enumerate()
        .filter(|(_, word)| *word == keeper.to_ne_bytes())
        .map(|(number, _)| number * 4)
        .collect();
    assert_eq!(places.len(), 1, "the keeper stands there once");
    let place = places[0] as u64;
    shared.write_all_at(&other.to_ne_bytes(), place).unwrap();
}

fn wait_successor(daemon: &Daemon, dead: i32) {
    wait_for("a fresh worker and its keeper alone", PATIENCE, || {
        let ready = daemon.ready_workers();
        ready.len() == 1 && ready[0] != dead && process::children(daemon.pid()).len() == 2
    });
}

#[test]
fn a_process_that_is_no_keeper_is_not_ended_because_a_worker_says_so() {
    let mut stranger = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = stranger.id().cast_signed();
    let mut daemon = daemon();
    let worker = daemon.ready_workers()[0];
    claim(&daemon, process::wait_for_keepers(daemon.pid(), 1)[0], pid);
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    wait_successor(&daemon, worker);
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait_exit().success());
    let ended = stranger.try_wait().unwrap();
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    assert_eq!(ended, None, "a stranger was ended");
}

/// The opposite case: the keeper was reaped in the same round, so it is not a child any more. The master must still
/// use what it wrote.
#[test]
fn a_keeper_that_ends_in_the_same_breath_as_its_worker_is_heard() {
    let daemon = daemon();
    let worker = daemon.ready_workers()[0];
    let keeper = process::wait_for_keepers(daemon.pid(), 1)[0];
    let mut client = daemon.client();
    assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
    daemon.signal(Signal::SIGSTOP);
    wait_for("a stopped master", PATIENCE, || {
        process::state(daemon.pid()) == Some('T')
    });
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    wait_for("two zombies", PATIENCE, || {
        [worker, keeper]
            .iter()
            .all(|pid| process::state(*pid) == Some('Z'))
    });
    daemon.signal(Signal::SIGCONT);
    daemon.wait_log(&format!(
        "worker {worker} crashed: 1 connection handed over"
    ));
    assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
    wait_successor(&daemon, worker);
}

/// All workers share the flags of a listener (O_NONBLOCK, fcntl(2)), so one of them can make the others
/// block.
#[test]
fn a_listener_that_was_made_to_wait_is_mended_at_the_next_tick() {
    let daemon = Daemon::builder().config("[workers]\ncount = 2\n").start();
    let worker = daemon.ready_workers()[0];
    let listener = sockets_of(worker).into_iter().find_map(|(_, fd)| {
        let socket = borrow(worker, fd).ok()?;
        (getsockopt(&socket, sockopt::AcceptConn) == Ok(true)).then_some(socket)
    });
    let Some(listener) = listener else {
        return println!("not run: this process may not trace others");
    };
    let flags = || OFlag::from_bits_retain(fcntl(&listener, FcntlArg::F_GETFL).unwrap());
    let blocking = flags() - OFlag::O_NONBLOCK;
    fcntl(&listener, FcntlArg::F_SETFL(blocking)).unwrap();
    wait_for("a listener that does not wait", PATIENCE, || {
        flags().contains(OFlag::O_NONBLOCK)
    });
    daemon.wait_log("another process has cleared O_NONBLOCK of a listener");
    for _ in 0..8 {
        assert_eq!(daemon.client().call(&json!({"in": "ping"}))["out"], "pong");
    }
    assert!(
        daemon.ready_workers().contains(&worker),
        "no worker was ended"
    );
}

/// An attacker in a pool process sends bytes that are not JSON as a result. The client must get `bad-output`, and no
/// answer for another call.
#[test]
fn a_result_that_is_no_json_reaches_no_client() {
    let dir = Dir::new();
    let program = dir.write("program.py", "import time; time.sleep(3600)");
    let daemon = Daemon::builder()
        .config(&format!(
            "[workers]\ncount = 1\n[pools.p]\nprocesses = 1\ncommand = [\"python3\", {program:?}]\nready = \"alive\"\n\
             [methods.wait]\npool = \"p\"\n"
        ))
        .start();
    let mut client = daemon.client();
    client.send(r#"{"in": "wait"}"#);
    daemon.wait_busy(1);
    let pool = daemon.pool();
    // The link is the stream socket that the master has made.
    let link = sockets_of(pool).into_iter().find_map(|(_, fd)| {
        let socket = borrow(pool, fd).ok()?;
        let is_stream = getsockopt(&socket, sockopt::SockType) == Ok(SockType::Stream);
        let made_by = getsockopt(&socket, sockopt::PeerCredentials).ok()?.pid();
        (is_stream && made_by == daemon.pid()).then_some(socket)
    });
    let Some(link) = link else {
        return println!("not run: this process may not trace others");
    };
    let mut fields = vec![3];
    fields.extend([1, 0].map(u64::to_le_bytes).concat());
    // What ran it: two pids, CPU time and memory.
    fields.extend([0; 24]);
    fields.extend([0, 0, 0, 0, 1]);
    fields.extend(b"1}\n{\"out\":\"wait\",\"result\":2");
    let mut frame = (fields.len() as u32).to_le_bytes().to_vec();
    frame.extend(fields);
    assert_eq!(descriptors::send(&link, &frame, &[]), Ok(frame.len()));
    let answer = client.recv_json();
    assert_eq!(answer["result"]["name"], "bad-output", "{answer}");
    daemon.wait_log("sent no result");
    assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
}
