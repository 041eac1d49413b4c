//! Starts: detached, over whatever lies where the pid file goes. Disturbed ones are in `storms`.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Daemon, Dir, PATIENCE, binary, process, wait_for};

/// A configuration with a socket and a log of its own, so that no port is needed.
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

/// The master that the pid file names, stopped when the test ends, however it ends.
struct Running<'a>(&'a Dir);

impl Running<'_> {
    fn pid(&self) -> i32 {
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

    // The log moves on, in the master and in the workers, which tell of their retirement.
    std::fs::rename(dir.join("log"), dir.join("log.1")).unwrap();
    kill(Pid::from_raw(daemon.pid()), Signal::SIGUSR1).unwrap();
    wait_for("a new log", PATIENCE, || {
        dir.read("log").contains("reopened")
    });
    let worker = process::workers(daemon.pid())[0];
    kill(Pid::from_raw(worker), Signal::SIGTERM).unwrap();
    wait_for("lines of both in it", PATIENCE, || {
        let log = dir.read("log");
        log.contains("retires: asked by SIGTERM") && log.contains("gets a fresh one")
    });
    assert!(!dir.read("log.1").contains("retires"));

    // A second one finds the lock held.
    let second = run(&dir, &format!("{DETACHED}{OWN_SOCKET}"));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(71), "{said}");
    assert!(said.contains("another master holds the lock"), "{said}");

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
        // Nobody holds the lock: nobody is stopped.
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

/// What the descriptors of a process lead to, sockets by their number.
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
            // The listener, and the queue's two ends.
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
