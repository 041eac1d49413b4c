//! Tests starts: detached, with anything at the path of the pid file. Disturbed starts are in
//! `start_races`.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Daemon, Dir, PATIENCE, binary, example, process, wait_for};

/// A configuration with its own socket and log, so that no port is needed.
pub const DETACHED: &str = "daemon = true
pid-file = \"p.pid\"
control-socket = \"c.sock\"
log.file = \"log\"
[workers]
count = 2
threads = 2
";
pub const OWN_SOCKET: &str = "[[listen]]\naddress = \"unix:rpc.sock\"\n";

pub fn preforkd(dir: &Dir, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command
        .args(arguments)
        .arg("--config")
        .arg(dir.join("p.toml"))
        .env("TMPDIR", &**dir)
        .stdin(Stdio::null());
    command
}

fn run(dir: &Dir, config: &str) -> Output {
    dir.write("p.toml", config);
    preforkd(dir, &["run"]).output().unwrap()
}

/// The master in the pid file. It is stopped at the end of the test in any case.
pub struct Running<'a>(pub &'a Dir);

impl Running<'_> {
    pub fn pid(&self) -> i32 {
        self.0.read("p.pid").trim().parse().unwrap()
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = preforkd(self.0, &["stop", "--now"]).output();
    }
}

#[test]
fn the_shell_of_a_daemon_goes_on_when_all_workers_are_ready() {
    let dir = Dir::new();
    let started = run(&dir, &format!("{DETACHED}{OWN_SOCKET}"));
    assert!(started.status.success(), "{started:?}");
    let daemon = Running(&dir);
    let status = preforkd(&dir, &["status", "--json"]).output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["master"]["pid"], daemon.pid());
    let workers = status["workers"].as_array().unwrap();
    assert_eq!(workers.len(), 2);
    assert!(workers.iter().all(|worker| worker["state"] == "ready"));
    assert_ne!(
        process::parent(daemon.pid()),
        Some(std::process::id().cast_signed())
    );

    // The log is moved in the master and in the workers, which log their retirement.
    std::fs::rename(dir.join("log"), dir.join("log.1")).unwrap();
    kill(Pid::from_raw(daemon.pid()), Signal::SIGUSR1).unwrap();
    wait_for("a new log", PATIENCE, || {
        dir.read("log").contains("reopened")
    });
    let worker = process::workers(daemon.pid())[0];
    kill(Pid::from_raw(worker), Signal::SIGTERM).unwrap();
    wait_for("lines of both in it", PATIENCE, || {
        let log = dir.read("log");
        log.contains("retires: asked by SIGTERM") && log.contains("a new worker takes its slot")
    });
    assert!(!dir.read("log.1").contains("retires"));

    // A second start finds the lock held.
    let second = run(&dir, &format!("{DETACHED}{OWN_SOCKET}"));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(71), "{said}");
    assert!(said.contains("another master holds the lock"), "{said}");
    assert!(
        said.contains("with another pid-file") && !said.contains("--name"),
        "{said}"
    );

    let stopped = preforkd(&dir, &["stop"]).output().unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
    assert!(!dir.join("p.pid").exists() && !dir.join("rpc.sock").exists());
}

#[test]
fn a_daemon_that_can_not_start_says_why_and_gives_the_shell_its_code() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let in_use = format!("{DETACHED}[[listen]]\naddress = \"{address}\"\n");
    let no_log = DETACHED.replace("log.file = \"log\"\n", "");
    let cases = [
        (in_use, 71, ["another server has it", &address.to_string()]),
        (format!("{DETACHED}color = 1\n"), 78, ["p.toml:8:", "color"]),
        (no_log, 78, ["log.file", "daemon"]),
    ];
    for (config, code, reasons) in cases {
        let dir = Dir::new();
        let failed = run(&dir, &config);
        let said = String::from_utf8_lossy(&failed.stderr).into_owned();
        assert_eq!(failed.status.code(), Some(code), "{said}");
        for reason in reasons {
            assert!(said.contains(reason), "no {reason:?} in {said}");
        }
        assert!(!dir.join("c.sock").exists());
    }
}

/// Returns the processes of a server that have this file open.
fn holders_of(daemon: &Daemon, file: &Path) -> Vec<i32> {
    let holds = |pid: &i32| {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten();
        open.flatten()
            .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|path| path == file))
    };
    let all = process::descendants(daemon.pid()).into_iter();
    all.chain([daemon.pid()]).filter(holds).collect()
}

#[test]
fn a_rotated_log_is_open_in_no_process_after_usr1() {
    let daemon = Daemon::builder()
        .config(
            "log.file = \"server.log\"\n[workers]\ncount = 2\n\
             [pools.sleeper]\ncommand = [\"sleep\", \"600\"]\nready = \"alive\"\nprocesses = 1\n\
             [methods.sleeper]\npool = \"sleeper\"\n",
        )
        .start();
    let (file, rotated) = (
        daemon.dir().join("server.log"),
        daemon.dir().join("rotated"),
    );
    std::fs::rename(&file, &rotated).unwrap();
    let holders = || holders_of(&daemon, &rotated);
    // The master, two workers with a keeper each, and the pool process.
    assert_eq!(holders().len(), 6);
    daemon.signal(Signal::SIGUSR1);
    wait_for("the old log closed", PATIENCE, || holders().is_empty());
}

#[test]
fn a_stale_pid_file_stops_no_start_and_its_pid_gets_no_signal() {
    let mut bystander = Command::new("sleep").arg("600").spawn().unwrap();
    let alive = bystander.id().to_string();
    for content in [
        alive.as_str(),
        "1\n",
        "",
        "no pid at all, and long",
        "-1",
        "99999999999",
    ] {
        let dir = Dir::new();
        dir.write("p.pid", content);
        dir.write("p.toml", format!("{DETACHED}{OWN_SOCKET}"));
        // No process holds the lock, so no process is stopped.
        let stopped = preforkd(&dir, &["stop"]).output().unwrap();
        assert_eq!(stopped.status.code(), Some(69), "{content:?}: {stopped:?}");
        let started = preforkd(&dir, &["run"]).output().unwrap();
        assert!(started.status.success(), "{content:?}: {started:?}");
        let pid = Running(&dir).pid();
        assert_ne!(pid.to_string(), content);
        wait_for("its end", PATIENCE, || !process::runs(pid));
    }
    assert!(process::runs(bystander.id().cast_signed()));
    bystander.kill().unwrap();
    bystander.wait().unwrap();
}

#[test]
fn a_pid_file_that_is_a_link_or_a_directory_is_refused() {
    let dir = Dir::new();
    let target = dir.write("target", "precious");
    std::os::unix::fs::symlink(&target, dir.join("p.pid")).unwrap();
    let refused = run(&dir, &format!("{DETACHED}{OWN_SOCKET}"));
    assert_eq!(refused.status.code(), Some(71), "{refused:?}");
    assert_eq!(dir.read("target"), "precious");
    std::fs::remove_file(dir.join("p.pid")).unwrap();
    std::fs::create_dir(dir.join("p.pid")).unwrap();
    let refused = run(&dir, &format!("{DETACHED}{OWN_SOCKET}"));
    assert_eq!(refused.status.code(), Some(71), "{refused:?}");
}

#[test]
fn a_start_says_ready_only_once_and_a_title_each() {
    let daemon = Daemon::start();
    let ready = |line: &&String| *line == "READY=1";
    assert_eq!(daemon.notifications().iter().filter(ready).count(), 1);
    let file = daemon.dir().join("preforkd.toml");
    assert_eq!(
        process::title(daemon.pid()),
        format!("preforkd: master {}", file.display())
    );
    assert_eq!(process::comm(daemon.pid()), "preforkd master");
    for (slot, worker) in daemon.ready_workers().into_iter().enumerate() {
        assert_eq!(process::title(worker), format!("preforkd: worker {slot}"));
        assert_eq!(process::comm(worker), "preforkd worker");
    }
}

/// Returns what the descriptors of a process refer to; sockets by their number.
fn descriptors(pid: i32) -> BTreeSet<String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = entries.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    targets
        .map(|target| target.to_string_lossy().into_owned())
        .collect()
}

#[test]
fn workers_share_the_listener_and_the_adoption_queue_and_no_other_socket() {
    let daemon = Daemon::builder().config("[workers]\ncount = 3\n").start();
    let master = descriptors(daemon.pid());
    assert!(master.iter().any(|target| target.ends_with("preforkd.pid")));
    let workers: Vec<_> = daemon
        .ready_workers()
        .into_iter()
        .map(descriptors)
        .collect();
    for (slot, worker) in workers.iter().enumerate() {
        assert!(!worker.iter().any(|target| target.ends_with("preforkd.pid")));
        let others = workers
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != slot);
        for other in others.map(|(_, other)| other).chain([&master]) {
            let shared = worker.intersection(other);
            let sockets = shared.filter(|target| target.starts_with("socket:"));
            // The listener, and both ends of the queue.
            assert_eq!(sockets.count(), 3, "{worker:?} and {other:?}");
        }
    }
}

#[test]
#[ignore = "needs root, to give it up; tests/run runs it"]
fn workers_give_up_root_for_good() {
    let daemon = Daemon::builder()
        .config("user = \"nobody\"\n[workers]\ncount = 2\n")
        .start();
    assert_eq!(process::field(daemon.pid(), "Uid").unwrap(), "0\t0\t0\t0");
    let nobody = process::field(daemon.ready_workers()[0], "Uid").unwrap();
    for worker in daemon.ready_workers() {
        let field = |key: &str| process::field(worker, key).unwrap_or_default();
        assert_eq!(field("Uid"), nobody);
        assert!(!field("Uid").split('\t').any(|uid| uid == "0"));
        assert!(!field("Gid").split('\t').any(|gid| gid == "0"));
        assert!(!field("Groups").split(' ').any(|gid| gid == "0"));
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(set).trim_start_matches('0'), "", "{set}");
        }
        assert_eq!(field("NoNewPrivs"), "1");
    }
    println!("Uid of the workers: {nobody}");
    daemon.client().call_text(r#"{"in":"ping"}"#);
}

/// During a reload, refused or not, no process continues to write to a log that was moved away.
#[test]
fn a_log_that_moves_on_during_a_reload_stays_there_when_that_is_refused() {
    let dir = Dir::new();
    let config = format!("{DETACHED}boot-timeout = \"3s\"\n{OWN_SOCKET}");
    assert!(run(&dir, &config).status.success());
    let daemon = Running(&dir);
    let pool = "[pools.late]\nprocesses = 1\ncommand = [\"sleep\", \"1000\"]\nready = \"message\"\n\
                [methods.late]\npool = \"late\"\n";
    dir.write("p.toml", format!("{config}{pool}"));
    kill(Pid::from_raw(daemon.pid()), Signal::SIGHUP).unwrap();
    wait_for("a reload under way", PATIENCE, || {
        dir.read("log").contains("reload: reading") && process::workers(daemon.pid()).len() > 2
    });
    std::fs::rename(dir.join("log"), dir.join("log.1")).unwrap();
    kill(Pid::from_raw(daemon.pid()), Signal::SIGUSR1).unwrap();
    wait_for("the verdict in the new log", PATIENCE, || {
        std::fs::read_to_string(dir.join("log")).is_ok_and(|log| log.contains("reload refused"))
    });
    assert!(!dir.read("log.1").contains("reload refused"));
}

/// Does job control like a shell: a background group of a terminal that stops writing processes.
#[test]
fn a_server_in_the_background_of_a_terminal_that_wants_no_output_serves_all_the_same() {
    const SHELL: &str = "
import os, pty, sys, termios
pid, terminal = pty.fork()
if pid == 0:
    flags = termios.tcgetattr(0)
    flags[3] |= termios.TOSTOP
    termios.tcsetattr(0, termios.TCSANOW, flags)
    server = os.fork()
    if server == 0:
        os.setpgid(0, 0)
        os.execv(sys.argv[1], sys.argv[1:])
    os._exit(os.WEXITSTATUS(os.waitpid(server, 0)[1]))
try:
    while piece := os.read(terminal, 4096):
        sys.stdout.buffer.write(piece)
        sys.stdout.flush()
except OSError:
    pass
sys.exit(os.WEXITSTATUS(os.waitpid(pid, 0)[1]))
";
    let dir = Dir::new();
    let config = DETACHED
        .replace("daemon = true\n", "")
        .replace("log.file = \"log\"\n", "");
    dir.write("p.toml", format!("{config}{OWN_SOCKET}"));
    let mut shell = Command::new("python3");
    shell
        .args(["-c", SHELL])
        .arg(binary())
        .args(["run", "--config"]);
    let shell = shell.arg(dir.join("p.toml")).stdout(Stdio::piped());
    let shell = shell.spawn().unwrap();
    let daemon = Running(&dir);
    wait_for("a server", PATIENCE, || {
        preforkd(&dir, &["status"])
            .output()
            .unwrap()
            .status
            .success()
    });
    let stopped = preforkd(&dir, &["stop"]).output().unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
    drop(daemon);
    let output = shell.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("] master exits"),
        "{said}"
    );
}

/// Each command that gives up leaves a connection in the queue of a stopped master.
#[test]
fn commands_do_not_wait_for_room_at_a_master_that_is_stopped() {
    let daemon = Daemon::start();
    daemon.signal(Signal::SIGSTOP);
    let path = daemon.dir().join("control.sock");
    let waiting: Vec<_> = std::iter::from_fn(|| {
        let socket = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Unix,
            nix::sys::socket::SockType::Stream,
            nix::sys::socket::SockFlag::SOCK_NONBLOCK,
            None,
        )
        .unwrap();
        let address = nix::sys::socket::UnixAddr::new(&path).unwrap();
        let connected = nix::sys::socket::connect(socket.as_raw_fd(), &address);
        connected.is_ok().then_some(socket)
    })
    .collect();
    let status = daemon.command(&["status"]);
    daemon.signal(Signal::SIGCONT);
    assert_eq!(status.status.code(), Some(69), "{status:?}");
    let said = String::from_utf8_lossy(&status.stderr);
    assert!(said.contains("the master does not answer"), "{said}");
    drop(waiting);
    assert!(daemon.command(&["status"]).status.success());
}

/// The Rust runtime ignores SIGPIPE, but a program that uses the library may restore its default action.
#[test]
fn a_log_pipe_without_reader_does_not_end_the_master() {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n")
        .program(example("mistakes"))
        .env("MISTAKE", "sigpipe")
        .stderr(writer)
        .start();
    drop(reader);
    let before = daemon.ready_workers();
    kill(Pid::from_raw(before[0]), Signal::SIGKILL).unwrap();
    wait_for("a worker in its place", PATIENCE, || {
        assert!(daemon.try_wait().is_none(), "the master has ended");
        let workers = process::workers(daemon.pid());
        workers.iter().any(|pid| !before.contains(pid))
    });
    wait_for("the worker to be ready", PATIENCE, || {
        daemon.ready_workers().len() == 1
    });
    assert!(daemon.status()["master"]["lost_log_lines"].as_u64() > Some(0));
}

#[test]
fn a_rotated_log_is_open_in_no_acceptor_session_or_jobs_process_after_usr1() {
    let has_jobs = cfg!(feature = "jobs-sqlite");
    let jobs = match has_jobs {
        true => "[jobs]\nstore = \"sqlite:jobs.db\"\n",
        false => "",
    };
    let daemon = Daemon::builder()
        .config(&format!(
            "log.file = \"server.log\"\n[workers]\ncount = 1\n[observe]\naddress = \"127.0.0.1:0\"\n{jobs}"
        ))
        .listen("isolation = \"connection\"\nspare = 1\n")
        .start();
    let mut client = daemon.client();
    let pong = r#"{"out":"pong","result":null}"#;
    assert_eq!(client.call_text(r#"{"in":"ping"}"#), pong);
    let rotated = daemon.dir().join("rotated");
    std::fs::rename(daemon.dir().join("server.log"), &rotated).unwrap();
    let holders = || holders_of(&daemon, &rotated);
    let before: Vec<String> = holders().into_iter().map(process::title).collect();
    let has = |text: &str| before.iter().any(|title| title.contains(text));
    assert!(has(": acceptor ") && has(": connection 127."), "{before:?}");
    assert_eq!(has(": jobs"), has_jobs, "{before:?}");
    daemon.signal(Signal::SIGUSR1);
    wait_for("the old log closed", PATIENCE, || holders().is_empty());
    assert_eq!(client.call_text(r#"{"in":"ping"}"#), pong);
}
