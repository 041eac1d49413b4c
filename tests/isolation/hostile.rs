//! Attacks an acceptor as hostile code in one of its sessions does: over the adoption queue and the table of
//! sessions. No other session may notice.

use std::fs::{self, File};
use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, getsockopt, recv, socketpair, sockopt,
};
use nix::unistd::Pid;
use serde_json::json;

use super::takeovers::{POOL, pool};
use super::{acceptor, builder, isolated, ping, session_of, status};
use crate::support::descriptors::{borrow, send, sockets_of};
use crate::support::{Daemon, PATIENCE, pass, process, wait_for};

/// The bytes of a record of the table, and the places of its fields.
const RECORD: u64 = 512;
const STATE: u64 = 256;
const PID: u64 = 260;
const START: u64 = 264;
const ACCEPTOR: u64 = 272;
const GENERATION: u64 = 276;
/// In the first record. The second one is where older versions had the generation that serves.
const CLAIMED: u64 = 332;
const SERVING: u64 = 336;
const OPEN: u32 = 2;

/// The table of sessions, as each session can write it.
struct Table(File);

impl Table {
    fn of(daemon: &Daemon) -> Self {
        let entries = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
        let mut files = entries.filter_map(|entry| {
            let path = entry.unwrap().path();
            let target = fs::read_link(&path).ok()?;
            let is_shared = target.to_string_lossy().contains("preforkd-shared");
            is_shared.then(|| File::options().read(true).write(true).open(path).ok())?
        });
        // It is by far the longest one.
        let table = files.find(|file| file.metadata().unwrap().len() == 64 * 4096 * RECORD);
        Table(table.expect("a master with an isolated listener has the table"))
    }

    fn read(&self, record: u64, field: u64) -> u32 {
        let mut bytes = [0; 4];
        let at = record * RECORD + field;
        self.0.read_exact_at(&mut bytes, at).unwrap();
        u32::from_ne_bytes(bytes)
    }

    fn write(&self, record: u64, field: u64, value: u32) {
        let at = record * RECORD + field;
        self.0.write_all_at(&value.to_ne_bytes(), at).unwrap();
    }

    fn record_of(&self, pid: i32) -> u64 {
        let found = (0..64).find(|&record| self.read(record, PID) == pid.cast_unsigned());
        found.expect("the session has a record")
    }

    /// Lets a record say that this process is a session of a dead acceptor.
    fn claim(&self, record: u64, generation: u32) {
        let own = process::start_ticks(std::process::id().cast_signed()).unwrap();
        let at = record * RECORD + START;
        self.0.write_all_at(&own.to_ne_bytes(), at).unwrap();
        self.write(record, GENERATION, generation);
        self.write(record, ACCEPTOR, 1);
        self.write(record, PID, std::process::id());
        self.write(record, STATE, OPEN);
    }
}

/// Returns the end of the adoption queue at which a session sends; `None` if this process may not trace others.
fn queue_of(session: i32, acceptor: i32) -> Option<OwnedFd> {
    for (_, fd) in sockets_of(session) {
        let socket = borrow(session, fd)
            .inspect_err(|error| println!("not run: {error}"))
            .ok()?;
        let is_packet = getsockopt(&socket, sockopt::SockType) == Ok(SockType::SeqPacket);
        let maker = getsockopt(&socket, sockopt::PeerCredentials);
        // The acceptor has made the other one, the link.
        if is_packet && maker.is_ok_and(|it| it.pid() != acceptor) {
            return Some(socket);
        }
    }
    panic!("a session has an end of the queue");
}

/// Sends a link of this process as that of a session whose acceptor has died. Returns the other end.
fn rejoin(queue: &OwnedFd) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (own, sent) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    // An acceptor that watches the link without reading it never sleeps again.
    nix::unistd::write(&own, &[0; 32]).unwrap();
    wait_for("room in the queue", PATIENCE, || {
        send(queue, b"pfr\x01", &[sent.as_raw_fd()]).is_ok()
    });
    own
}

#[track_caller]
fn wait_closed(link: &OwnedFd) {
    wait_for("the end of the link", PATIENCE, || {
        let flags = MsgFlags::MSG_DONTWAIT;
        !matches!(
            recv(link.as_raw_fd(), &mut [0; 64], flags),
            Err(Errno::EAGAIN) | Ok(1..)
        )
    });
}

#[test]
fn a_session_cannot_make_its_acceptor_hold_links() {
    let daemon = isolated("");
    let (mut client, mut other) = (daemon.client(), daemon.client());
    ping(&mut client);
    ping(&mut other);
    let (acceptor, table) = (acceptor(&daemon), Table::of(&daemon));
    let Some(queue) = queue_of(session_of(&client), acceptor) else {
        return;
    };
    let before = process::descriptors_at_rest(acceptor);
    let victim = session_of(&other);
    let record = table.record_of(victim);
    let generation = table.read(record, GENERATION);
    let mut bytes = [0; RECORD as usize];
    table.0.read_exact_at(&mut bytes, record * RECORD).unwrap();
    // The record of a living session.
    table.claim(record, generation);
    wait_closed(&rejoin(&queue));
    table.0.write_all_at(&bytes, record * RECORD).unwrap();
    // Many records that no process has.
    table.write(0, CLAIMED, 4096);
    let links: Vec<OwnedFd> = (2000..2020)
        .map(|record| {
            table.claim(record, generation);
            let link = rejoin(&queue);
            wait_closed(&link);
            table.write(record, STATE, 0);
            link
        })
        .collect();
    process::wait_for_descriptors(acceptor, before);
    drop(links);
    ping(&mut client);
    ping(&mut other);
    ping(&mut daemon.client());
}

#[test]
fn a_session_cannot_exceed_the_processes_of_its_listener() {
    let daemon = isolated("processes = 4\nspare = 1\n");
    let mut client = daemon.client();
    ping(&mut client);
    let acceptor = acceptor(&daemon);
    let Some(queue) = queue_of(session_of(&client), acceptor) else {
        return;
    };
    let mut fresh = [0; 16];
    fresh[..4].copy_from_slice(b"pfh\x01");
    let mut ends: Vec<UnixStream> = (0..110)
        .map(|_| {
            let (own, sent) = UnixStream::pair().unwrap();
            wait_for("room in the queue", PATIENCE, || {
                send(&queue, &fresh, &[sent.as_raw_fd()]).is_ok()
            });
            own
        })
        .collect();
    // Those on their way at a reload, beside `processes`.
    let most = 4 + 64;
    wait_for("the bound", PATIENCE, || status(&daemon)["running"] == most);
    let ticks = process::cpu_ticks(acceptor).unwrap();
    pass(Duration::from_millis(500));
    assert_eq!(status(&daemon)["running"], most);
    let used = process::cpu_ticks(acceptor).unwrap() - ticks;
    assert!(used <= 15, "{used} ticks of 10 ms while the queue waits");
    ping(&mut client);
    // The others get a process when one has ended.
    for mut end in ends.drain(..60) {
        end.shutdown(Shutdown::Write).unwrap();
        let _ = end.read(&mut [0; 1]);
    }
    wait_for("the rest", PATIENCE, || status(&daemon)["running"] == 51);
    drop(ends);
    wait_for("the end of all others", PATIENCE, || {
        status(&daemon)["running"] == 1
    });
    ping(&mut daemon.client());
    ping(&mut client);
}

#[test]
fn a_session_cannot_make_a_reload_close_connections() {
    let daemon = isolated("");
    let mut clients: Vec<_> = (0..5).map(|_| daemon.client()).collect();
    clients.iter_mut().for_each(ping);
    let before: Vec<i32> = clients.iter().map(session_of).collect();
    let (old, table) = (acceptor(&daemon), Table::of(&daemon));
    // The session writes after the master has done so and before the acceptor reads.
    kill(Pid::from_raw(old), Signal::SIGSTOP).unwrap();
    let reloaded = daemon.command(&["reload"]);
    table.write(0, SERVING, 0);
    kill(Pid::from_raw(old), Signal::SIGCONT).unwrap();
    assert!(reloaded.status.success(), "{reloaded:?}");
    wait_for("other processes", PATIENCE, || {
        before.iter().all(|&pid| !process::runs(pid))
    });
    clients.iter_mut().for_each(ping);
}

#[test]
fn a_session_cannot_fill_the_log_of_a_pool_process() {
    let daemon = builder(&pool(0.0, 0.0, "5s"), "")
        .file("pool.py", POOL)
        .expect_log("invalid frame")
        .start();
    let mut client = daemon.client();
    let session = session_of(&client);
    for _ in 0..10 {
        wait_for("an answer over a new link", PATIENCE, || {
            client.call(&json!({"in": "work"}))["result"] == "done"
        });
        let copies = sockets_of(session).into_iter();
        let copies: Vec<_> = copies
            .filter_map(|(_, fd)| borrow(session, fd).ok())
            .collect();
        let is_link = |socket: &&OwnedFd| {
            let maker = getsockopt(*socket, sockopt::PeerCredentials);
            getsockopt(*socket, sockopt::SockType) == Ok(SockType::Stream)
                && maker.is_ok_and(|it| it.pid() == daemon.pid())
        };
        let Some(link) = copies.iter().find(is_link) else {
            assert!(copies.is_empty(), "the session has no link to its pool");
            return println!("not run: this process may not trace others");
        };
        send(link, &[0xFF; 64], &[]).unwrap();
        wait_closed(link);
    }
    daemon.wait_log("an invalid frame");
    let log = daemon.log();
    let lines = log.lines().filter(|line| line.contains("an invalid frame"));
    // Five at once, and one every ten seconds.
    assert!((1..=7).contains(&lines.count()), "{log}");
}

#[test]
fn only_the_master_can_write_the_header_of_the_metrics_board() {
    let daemon = builder(&pool(0.0, 0.0, "5s"), "")
        .file("pool.py", POOL)
        .start();
    let mut client = daemon.client();
    ping(&mut client);
    let may_write_header = |pid: i32| {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let mut lines = maps
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        assert!(maps.contains("preforkd-metrics"), "{}", process::title(pid));
        lines.any(|line| {
            let is_header = line.len() > 5 && line[5].contains("preforkd-metrics");
            is_header && line[2] == "00000000" && line[1].contains('w')
        })
    };
    assert!(may_write_header(daemon.pid()));
    let mut seen = Vec::new();
    for pid in process::descendants(daemon.pid()) {
        let title = process::title(pid);
        let roles = ["worker", "pool", "acceptor", "connection", "keeper"];
        if let Some(role) = roles.iter().find(|it| title.contains(&format!(": {it} "))) {
            assert!(!may_write_header(pid), "{title}");
            seen.push(*role);
        }
    }
    for role in ["worker", "pool", "acceptor", "connection"] {
        assert!(seen.contains(&role), "{role}: {seen:?}");
    }
}
