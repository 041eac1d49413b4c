//! Seven ways to hang, each named by its state, its system call and the right process.

use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};

use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::stat::Mode;
use serde_json::Value;

use super::{evidence, record, records, send};
use crate::support::Daemon;

const CONFIG: &str = r#"
[workers]
count = 1
threads = 8
[limits]
timeout = "4s"
[slow-log]
threshold = "200ms"
lines = 1000
[methods.sleep]
command = ["sleep", "60"]
[methods.spin]
command = ["sh", "-c", "while :; do :; done"]
[methods.lock]
command = ["flock", "lock", "true"]
directory = "."
[methods.fifo]
command = ["cat", "fifo"]
directory = "."
[methods.backlog]
command = ["python3", "connect.py"]
directory = "."
[methods.grandchild]
command = ["sh", "-c", "sh -c 'echo working >&2; sleep 60; true'; true"]
[methods.deadlock]
pool = "p"
[pools.p]
processes = 1
command = ["python3", "program.py"]
directory = "."
"#;

const CONNECT: &str = r#"
import socket
socket.socket(socket.AF_UNIX).connect("full.sock")
"#;

const PROGRAM: &str = r#"
import threading
from preforkd import method, serve
@method
def deadlock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
serve()
"#;

#[test]
fn seven_stalls_are_named_by_state_system_call_and_process() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .python_program(PROGRAM)
        .file("connect.py", CONNECT)
        .file("lock", "")
        .start();
    let path = |name: &str| daemon.dir().join(name);
    let lock = File::open(path("lock")).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    nix::unistd::mkfifo(&path("fifo"), Mode::S_IRWXU).unwrap();
    let _writer = nix::fcntl::open(&path("fifo"), OFlag::O_RDWR, Mode::empty()).unwrap();
    let _listener = UnixListener::bind(path("full.sock")).unwrap();
    let _full = fill(&path("full.sock"));

    // The method, what its evidence begins with, and what follows.
    let expected: [(&str, &str, &[&str]); 7] = [
        (
            "sleep",
            "command sleep ",
            &[" S asleep in clock_nanosleep("],
        ),
        ("spin", "command sh ", &[" R running"]),
        ("lock", "command flock ", &[" S asleep in flock("]),
        ("fifo", "command cat ", &[" S asleep in read("]),
        ("backlog", "command python3 ", &[" S asleep in connect("]),
        (
            "grandchild",
            "command sh ",
            &[
                " S asleep in wait4(",
                "; sh ",
                "; sleep ",
                " S asleep in clock_nanosleep(",
                "; stderr \"working\\n\"",
            ],
        ),
        (
            "deadlock",
            "pool p program python3 ",
            &[" S asleep in futex("],
        ),
    ];
    let _calls = expected.map(|(method, _, _)| send(&daemon, method, &Value::Null));
    for (method, begin, parts) in expected {
        let text = evidence(&daemon, method);
        println!("{method}: {text}");
        assert!(text.starts_with(begin), "{method}: {text}");
        let mut rest = text.as_str();
        for part in parts {
            let at = rest.find(part);
            let at = at.unwrap_or_else(|| panic!("{method}: no {part:?} in {text}"));
            rest = &rest[at + part.len()..];
        }
        let runs = record(&daemon, method, |_| true);
        assert_eq!(
            (&runs["done"], &runs["outcome"]),
            (&false.into(), &Value::Null),
            "{runs}"
        );
    }
    // The pids are those of the processes, and the calls those of the server.
    for record in records(&daemon) {
        let text = record["evidence"].as_str().unwrap();
        let pid = text.split(' ').find_map(|word| word.parse::<i32>().ok());
        let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.unwrap())).unwrap();
        assert!(text.contains(name.trim()), "{name}: {text}");
        let worker = daemon.ready_workers()[0].to_string();
        assert!(
            record["call"].as_str().unwrap().starts_with(&worker),
            "{record}"
        );
    }
    for (method, _, _) in expected {
        let done = record(&daemon, method, |it| it["done"] == true);
        assert_eq!(done["outcome"], "timeout", "{done}");
        let call = done["call"].as_str().unwrap();
        daemon.wait_log(&format!("slow call {call} {method} 0."));
        daemon.wait_log(&format!("slow call {call} {method}: timeout after "));
    }
}

/// Connects until no further connection fits into the queue of a listener.
fn fill(path: &std::path::Path) -> Vec<UnixStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    use std::os::fd::AsRawFd;

    let address = UnixAddr::new(path).unwrap();
    let mut streams = Vec::new();
    loop {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let one = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        match connect(one.as_raw_fd(), &address) {
            Ok(()) => streams.push(UnixStream::from(one)),
            Err(_) => return streams,
        }
    }
}
