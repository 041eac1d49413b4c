//! Tests peers of unix sockets that attach descriptors whose close blocks (SO_LINGER with unsent bytes):
//! clients, pool programs, workers under an attacker's control. No one else may notice.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::descriptors::{LINGER, allow, borrow, lingering, send, sockets_of};
use crate::support::{Client, Daemon, PATIENCE, control, frame, wait_for};

const UNIX: &str = "[workers]\ncount = 1\n[[listen]]\naddress = \"unix:u.sock\"\n";

/// Fails if this takes about as long as the close of an attached descriptor.
#[track_caller]
fn at_once<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let done = run();
    let took = begin.elapsed();
    assert!(took < LINGER / 2, "{what} took {took:?}");
    done
}

#[track_caller]
fn ping(daemon: &Daemon) {
    let mut client = Client::connect_unix(&daemon.dir().join("u.sock"));
    at_once("a call of another client", || {
        assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
    });
}

fn daemon() -> Daemon {
    Daemon::builder().config(UNIX).start()
}

/// Returns `None` if this process may not trace others.
fn borrowed(pid: i32, fd: RawFd) -> Option<OwnedFd> {
    let copy = borrow(pid, fd);
    if let Err(error) = &copy {
        println!("not run: {error}");
    }
    copy.ok()
}

/// Sends calls with a descriptor whose close blocks, one on each connection.
fn attack(path: &PathBuf) -> Vec<(UnixStream, TcpStream)> {
    let one = |_| {
        let client = UnixStream::connect(path).unwrap();
        let (fd, deaf) = lingering();
        // Since Linux 6.16 the kernel refuses it if the listener is set so.
        let _ = send(&client, &frame(br#"{"in":"ping"}"#), &[fd.as_raw_fd()]);
        (client, deaf)
    };
    (0..4).map(one).collect()
}

#[test]
fn a_client_that_attaches_a_descriptor_delays_nobody() {
    let daemon = daemon();
    let path = daemon.dir().join("u.sock");
    let clients = attack(&path);
    ping(&daemon);
    // This includes unread ones in a connection when it is closed.
    drop(clients);
    ping(&daemon);
}

/// Makes the listeners accept descriptors, as on older kernels, or as if a service manager had passed them with
/// connections in them. Returns false if this process may not do that.
fn allow_at_listeners(daemon: &Daemon) -> bool {
    for (_, fd) in sockets_of(daemon.pid()) {
        let Some(socket) = borrowed(daemon.pid(), fd) else {
            return false;
        };
        if getsockopt(&socket, sockopt::AcceptConn) == Ok(true) {
            allow(&socket);
        }
    }
    true
}

#[test]
fn a_client_that_can_attach_a_descriptor_is_closed_and_delays_nobody() {
    let daemon = daemon();
    let path = daemon.dir().join("u.sock");
    if !allow_at_listeners(&daemon) {
        return;
    }
    for _ in 0..3 {
        for (mut client, _deaf) in attack(&path) {
            ping(&daemon);
            client.set_read_timeout(Some(LINGER / 2)).unwrap();
            let end = client.read(&mut [0]).unwrap_err();
            assert_eq!(
                end.kind(),
                ErrorKind::ConnectionReset,
                "its call is not received"
            );
        }
    }
    ping(&daemon);
}

/// Returns a worker's packet sockets: those to the master, and those of the adoption queue, which the
/// master has too.
fn packet_sockets(daemon: &Daemon, worker: i32) -> Option<(Vec<OwnedFd>, Vec<OwnedFd>)> {
    let of_master = sockets_of(daemon.pid());
    let (mut reports, mut queue) = (Vec::new(), Vec::new());
    for (inode, fd) in sockets_of(worker) {
        let socket = borrowed(worker, fd)?;
        if getsockopt(&socket, sockopt::SockType) == Ok(SockType::SeqPacket) {
            let is_shared = of_master.iter().any(|(other, _)| *other == inode);
            if is_shared { &mut queue } else { &mut reports }.push(socket);
        }
    }
    assert!(!reports.is_empty() && queue.len() == 2);
    Some((reports, queue))
}

/// Returns a report of a worker (src/link/message.rs).
fn report(kind: u32, worker: i32) -> Vec<u8> {
    let mut packet = b"pfd\x01".to_vec();
    packet.extend(kind.to_le_bytes());
    packet.extend(worker.to_le_bytes());
    packet.extend(1_u32.to_le_bytes());
    packet.resize(32, 0);
    packet
}

#[test]
fn a_worker_that_attaches_descriptors_to_its_reports_does_not_stop_the_master() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\n")
        .expect_log("ended by SIGKILL")
        .start();
    let worker = daemon.ready_workers()[0];
    let Some((reports, _)) = packet_sockets(&daemon, worker) else {
        return;
    };
    let mut deaf = Vec::new();
    for socket in reports.iter().cycle().take(8) {
        let (fd, peer) = lingering();
        deaf.push(peer);
        let _ = send(socket, &report(101, worker), &[fd.as_raw_fd()]);
    }
    at_once("the status", || daemon.status());
    at_once("the successor of a killed worker", || {
        kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
        wait_for("a successor", PATIENCE, || {
            let ready = daemon.ready_workers();
            ready.len() == 2 && !ready.contains(&worker)
        });
    });
}

#[test]
fn a_worker_that_passes_on_what_is_no_connection_does_not_stop_its_siblings() {
    let daemon = Daemon::builder()
        .config(UNIX)
        .expect_log("an adopted connection is closed: its handoff packet is invalid")
        .start();
    let worker = daemon.ready_workers()[0];
    let Some((_, queue)) = packet_sockets(&daemon, worker) else {
        return;
    };
    // An empty packet of a connection that must be closed at once (src/link/adoption_queue.rs).
    let mut closing = b"pfh\x02\x80".to_vec();
    closing.resize(16, 0);
    let mut deaf = Vec::new();
    for packet in [&closing[..], b"nothing that is known"] {
        for end in &queue {
            let fds: Vec<OwnedFd> = (0..3)
                .map(|_| {
                    let (fd, peer) = lingering();
                    deaf.push(peer);
                    fd
                })
                .collect();
            let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
            send(end, packet, &numbers[..1]).unwrap();
            send(end, packet, &numbers).unwrap();
        }
    }
    for _ in 0..20 {
        ping(&daemon);
    }
    daemon.wait_log("its handoff packet is invalid");
}

#[test]
fn a_command_that_attaches_a_descriptor_does_not_stop_the_master() {
    let daemon = Daemon::start();
    let socket = daemon.dir().join("control.sock");
    let (fd, _deaf) = lingering();
    let client = control::connect(&socket);
    let _ = send(&client, control::STATUS, &[fd.as_raw_fd()]);
    drop((fd, client));
    at_once("the status", || control::status(&socket));
}

/// Answers with a descriptor attached, or without it if it is refused.
const PROGRAM: &str = r#"
import array, json, socket, struct
calls = socket.socket(fileno=3)
deaf = socket.create_server(("127.0.0.1", 0))
while head := calls.recv(4, socket.MSG_WAITALL):
    calls.recv(struct.unpack("<I", head)[0], socket.MSG_WAITALL)
    evil = socket.create_connection(deaf.getsockname())
    evil.setblocking(False)
    try:
        while True: evil.send(bytes(65536))
    except BlockingIOError:
        pass
    evil.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
    body = json.dumps({"out": "ok", "result": 1}).encode()
    answer = struct.pack("<I", len(body)) + body
    try:
        calls.sendmsg([answer], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [evil.fileno()]))])
        evil.close()
    except OSError:
        calls.sendall(answer)
        evil.detach()
"#;

#[test]
fn a_program_that_attaches_a_descriptor_delays_no_other_call() {
    let config = format!(
        "{UNIX}[pools.p]\nprocesses = 1\ncommand = [\"python3\", \"evil.py\"]\nready = \"alive\"\ndirectory = \".\"\n\
         environment = {{ PATH = \"/usr/local/bin:/usr/bin:/bin\" }}\n[methods.evil]\npool = \"p\"\n"
    );
    let daemon = Daemon::builder()
        .config(&config)
        .file("evil.py", PROGRAM)
        .start();
    let mut client = Client::connect_unix(&daemon.dir().join("u.sock"));
    // Its close is the last one only if it comes first.
    for _ in 0..10 {
        let answer = at_once("its own call", || {
            client.call(&json!({"in": "evil", "params": Value::Null}))
        });
        assert_eq!(answer["result"], 1, "{answer}");
        ping(&daemon);
    }
}

#[test]
fn a_client_of_the_observer_that_attaches_a_descriptor_delays_no_other() {
    const GET: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n[observe]\naddress = \"unix:o.sock\"\n")
        .start();
    let path = daemon.dir().join("o.sock");
    if !allow_at_listeners(&daemon) {
        return;
    }
    let hostile = |_| {
        let client = UnixStream::connect(&path).unwrap();
        let (fd, deaf) = lingering();
        let _ = send(&client, GET, &[fd.as_raw_fd()]);
        (client, deaf)
    };
    let clients: Vec<(UnixStream, TcpStream)> = (0..4).map(hostile).collect();
    let get = || {
        at_once("a page", || {
            let mut client = UnixStream::connect(&path).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client.write_all(GET).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        });
    };
    get();
    drop(clients);
    get();
}
