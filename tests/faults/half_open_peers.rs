//! Tests peers that vanish: the network between them and the daemon is removed, so nothing that they
//! send, acknowledge or end arrives any more.
//!
//! Two network namespaces with a link between them each belong to a thread of this test, so they end with
//! it. The daemon runs in one, its clients in the other.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;
use serde_json::json;

use crate::support::{
    Client, Daemon, PATIENCE, Sweep, alone, process, raise_descriptor_limit, wait_for,
};

const SERVER: &str = "192.0.2.1";
const CLIENT: &str = "192.0.2.2";
const PORT: u16 = 4747;

/// All other times end before it.
const IDLE: Duration = Duration::from_secs(12);
const READ: Duration = Duration::from_secs(5);
const WRITE: Duration = Duration::from_secs(6);
/// The run time of the calls whose answers reach no client.
const CALL: Duration = Duration::from_secs(3);
/// Extra time for a busy machine.
const SLACK: Duration = Duration::from_secs(2);

const IDLERS: usize = 1000;
const MID_FRAME: usize = 100;
const UNREAD: usize = 10;
const UNHEARD: usize = 20;
/// More than the kernel accepts for a peer that reads nothing.
const ANSWER: usize = 6 << 20;

fn config() -> String {
    // A worker whose threads are all busy would get a link to the other one, which is one more
    // descriptor.
    let threads = UNHEARD + UNREAD;
    format!(
        "[workers]
count = 2
threads = {threads}
[limits]
idle-timeout = \"{}s\"
read-timeout = \"{}s\"
write-timeout = \"{}s\"
[methods.echo]
builtin = \"echo\"
[methods.sleep]
builtin = \"sleep\"
[[listen]]
address = \"{SERVER}:{PORT}\"
",
        IDLE.as_secs(),
        READ.as_secs(),
        WRITE.as_secs()
    )
}

/// Runs `ip` in the namespace of this thread.
#[track_caller]
fn ip(words: &str) {
    let done = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(done.status.success(), "ip {words}: {done:?}");
}

/// Clients in a separate namespace, which ends with them.
struct Elsewhere {
    go: Sender<()>,
    done: Receiver<()>,
    thread: JoinHandle<()>,
}

impl Elsewhere {
    /// Creates a namespace at the other end of a link.
    fn new() -> Self {
        let (go, told) = channel();
        let (tell, done) = channel();
        let (who, thread_id) = channel();
        let thread = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            who.send(gettid()).unwrap();
            told.recv().unwrap();
            ip(&format!("address add {CLIENT}/24 dev far"));
            ip("link set far up");
            let clients = connect(format!("{SERVER}:{PORT}").parse().unwrap());
            tell.send(()).unwrap();
            told.recv().unwrap();
            ip("link set far down");
            tell.send(()).unwrap();
            // They stay alive without contact until the end of the test.
            let _ = told.recv();
            drop(clients);
        });
        let thread_id = thread_id.recv().unwrap();
        ip(&format!(
            "link add near type veth peer name far netns {thread_id}"
        ));
        ip(&format!("address add {SERVER}/24 dev near"));
        ip("link set near up");
        Elsewhere { go, done, thread }
    }

    /// Starts the next step: they connect; their network is removed.
    fn next(&self) {
        self.go.send(()).unwrap();
        self.done.recv().expect("its thread has not failed");
    }

    fn end(self) {
        drop(self.go);
        self.thread.join().unwrap();
    }
}

/// Connects clients: idle ones, ones in the middle of a frame, ones that do not read a long answer, and
/// ones whose answers come when they are gone.
fn connect(address: SocketAddr) -> Vec<Client> {
    let mut clients: Vec<Client> = (0..IDLERS).map(|_| Client::connect(address)).collect();
    for client in &mut clients {
        assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
    }
    let long = json!({"in": "echo", "params": "x".repeat(ANSWER)}).to_string();
    let calls = [
        (MID_FRAME, "\0"),
        (UNREAD, &long),
        (UNHEARD, r#"{"in": "sleep", "params": 1}"#),
    ];
    for (count, call) in calls {
        for _ in 0..count {
            let mut client = Client::connect(address);
            match call {
                "\0" => client.send_raw(b"\x40\0\0\0{\"in\": \"ping\", \"params\": \""),
                call => client.send(call),
            }
            clients.push(client);
        }
    }
    clients
}

/// Returns the number of connections in the namespace of this thread, including ended ones.
fn kernel_sockets() -> usize {
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
    let states = table.lines().skip(1);
    let states = states.filter_map(|line| line.split_whitespace().nth(3));
    states.filter(|state| *state != "0A").count()
}

fn peers_vanish() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ip("link set lo up");
    let elsewhere = Elsewhere::new();
    let daemon = Daemon::builder().config(&config()).start();
    let sweep = Sweep::of(&daemon);
    let workers = daemon.ready_workers();
    let open = || -> usize { workers.iter().map(|pid| process::descriptors(*pid)).sum() };
    let before = open();
    elsewhere.next();
    let all = IDLERS + MID_FRAME + UNREAD + UNHEARD;
    wait_for("all of them connected", PATIENCE, || open() == before + all);
    elsewhere.next();
    let gone = Instant::now();
    let until = |what: &str, left: usize, most: Duration| {
        wait_for(what, PATIENCE, || open() <= before + left);
        let took = gone.elapsed();
        println!("{what}: {took:.2?} after the network had gone, {most:?} is the limit");
        assert!(took <= most + SLACK, "{what}: {took:?}");
    };
    until(
        "100 in the middle of a frame are ended",
        all - MID_FRAME,
        READ,
    );
    until(
        "10 with a long answer unread are ended",
        IDLERS + UNHEARD,
        WRITE,
    );
    until(
        "20 whose answers are not acknowledged are ended",
        IDLERS,
        CALL + WRITE,
    );
    until("1,000 idle ones are ended", 0, IDLE);
    wait_for("nothing left in the kernel", PATIENCE, || {
        kernel_sockets() == 0
    });
    let took = gone.elapsed();
    println!("nothing of them is left in the kernel: {took:.2?}");
    // The kernel checks TCP_USER_TIMEOUT at each retransmission, and doubles the time between them.
    assert!(took <= IDLE + 2 * WRITE + SLACK, "{took:?}");
    sweep.assert_same(&daemon);
    elsewhere.end();
}

#[test]
#[ignore = "needs root, for namespaces, and ip; tests/run runs it"]
fn peers_whose_network_is_gone_are_ended_by_their_deadlines() {
    let _alone = alone();
    raise_descriptor_limit();
    // The namespace belongs to a thread, which could be the main thread here.
    thread::spawn(peers_vanish).join().unwrap();
}
