//! Tests a server that runs in a terminal: workers and their processes have no access to it, and Ctrl-C
//! ends everything.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::lifecycle::start::{OWN_SOCKET, preforkd};
use crate::support::{Client, Dir, PATIENCE, binary, process, wait_for};

/// Runs a program in a session with its own terminal, as a login shell does. The terminal's output goes
/// to standard output. At the end of standard input Ctrl-C is pressed. It exits as the program does.
const TERMINAL: &str = "
import os, pty, select, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
wanted = [terminal, 0]
try:
    while True:
        ready = select.select(wanted, [], [])[0]
        if 0 in ready and not os.read(0, 1):
            wanted = [terminal]
            os.write(terminal, b'\\x03')
        if terminal in ready:
            piece = os.read(terminal, 4096)
            if not piece:
                break
            sys.stdout.buffer.write(piece)
            sys.stdout.flush()
except OSError:
    pass
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.exit(code if code >= 0 else 128 - code)
";

/// The first action of a hostile handler: it looks for a terminal, by name and by descriptors, and prints
/// its session and group.
const LOOK: &str = "import json, os, sys, time
def opens(path, flags):
    try:
        os.close(os.open(path, flags))
        return True
    except OSError:
        return False
look = {'dev_tty': opens('/dev/tty', os.O_RDWR), 'isatty': [os.isatty(fd) for fd in range(64)].count(True),
        'leads': os.getsid(0) == os.getpid() == os.getpgid(0)}
";

/// A server in a terminal, which is stopped at the end of the test in any case.
struct InTerminal {
    dir: Dir,
    shell: Child,
    master: i32,
}

impl InTerminal {
    /// `methods` makes the rest of the configuration from the path of a program that runs `LOOK` and then
    /// `rest`.
    fn start(rest: &str, methods: impl Fn(PathBuf) -> String) -> Self {
        let dir = Dir::new();
        let program = dir.write("look.py", format!("{LOOK}{rest}"));
        dir.write(
            "p.toml",
            format!(
                "pid-file = \"p.pid\"\ncontrol-socket = \"c.sock\"\n[workers]\ncount = 1\n\
                 {OWN_SOCKET}{}",
                methods(program)
            ),
        );
        let mut shell = Command::new("python3");
        let shell = shell
            .args(["-c", TERMINAL])
            .arg(binary())
            .args(["run", "--config"])
            .arg(dir.join("p.toml"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let shell = shell.spawn().unwrap();
        let status = || {
            let status = preforkd(&dir, &["status"]).output();
            status.unwrap().status.success()
        };
        wait_for("a server in a terminal", PATIENCE, status);
        let master = dir.read("p.pid").trim().parse().unwrap();
        InTerminal { dir, shell, master }
    }

    fn client(&self) -> Client {
        Client::connect_unix(&self.dir.join("rpc.sock"))
    }
}

impl Drop for InTerminal {
    fn drop(&mut self) {
        let _ = preforkd(&self.dir, &["stop", "--now"]).output();
        let _ = self.shell.wait();
    }
}

/// The result if no terminal is found.
fn none() -> Value {
    json!({"dev_tty": false, "isatty": 0, "leads": true})
}

#[test]
fn neither_commands_nor_programs_nor_workers_have_the_operators_terminal() {
    let server = InTerminal::start(
        "if len(sys.argv) > 1:\n    with open(sys.argv[1] + '.new', 'w') as file:\n        \
         json.dump(look, file)\n    os.rename(sys.argv[1] + '.new', sys.argv[1])\n    \
         os.read(3, 1)\nelse:\n    print(json.dumps(look))\n",
        |program| {
            let seen = program.with_file_name("seen");
            format!(
                "[methods.look]\ncommand = [\"python3\", {program:?}]\noutput = \"json\"\n\
                 [methods.pooled]\npool = \"p\"\n\
                 [pools.p]\nprocesses = 1\ncommand = [\"python3\", {program:?}, {seen:?}]\nready = \"alive\"\n"
            )
        },
    );
    let answer = server.client().call(&json!({"in": "look"}));
    assert_eq!(answer["result"], none(), "a command: {answer}");
    wait_for("the program's look", PATIENCE, || {
        server.dir.join("seen").exists()
    });
    let seen: Value = serde_json::from_str(&server.dir.read("seen")).unwrap();
    assert_eq!(seen, none(), "a program of a pool");

    let workers = process::workers(server.master);
    let keepers = process::wait_for_keepers(server.master, 1);
    assert_ne!(process::terminal(server.master), Some(0), "the master's");
    for pid in workers.iter().chain(&keepers) {
        let descriptor = |number| fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap();
        assert_eq!(process::terminal(*pid), Some(0), "of {pid}");
        assert_eq!(process::session(*pid), Some(workers[0]), "of {pid}");
        assert_eq!(descriptor(0), PathBuf::from("/dev/null"), "of {pid}");
        assert_eq!(descriptor(1), descriptor(2), "of {pid}");
    }
}

#[test]
fn ctrl_c_in_the_terminal_stops_the_server_and_all_that_it_runs() {
    let mut server = InTerminal::start(
        "open(sys.argv[1], 'w').close()\ntime.sleep(3600)\n",
        |program| {
            let runs = program.with_file_name("runs");
            format!("[methods.wait]\ncommand = [\"python3\", {program:?}, {runs:?}]\n")
        },
    );
    let mut client = server.client();
    client.send(r#"{"in": "wait"}"#);
    wait_for("the command", PATIENCE, || server.dir.join("runs").exists());
    let all = process::descendants(server.master);
    assert_eq!(all.len(), 3, "a worker, its keeper and the command");
    drop(server.shell.stdin.take());
    let status = server.shell.wait().unwrap();
    let mut said = String::new();
    let mut stdout = server.shell.stdout.take().unwrap();
    stdout.read_to_string(&mut said).unwrap();
    assert!(
        status.success() && said.contains("] master exits"),
        "{status}: {said}"
    );
    for pid in all {
        wait_for("the end of all", PATIENCE, || !process::runs(pid));
    }
}
