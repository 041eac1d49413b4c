//! Tests processes that make their environment very long or block its read (PR_SET_MM_MAP,
//! PR_SET_MM(2const)). They cost the worker and the master neither memory nor time.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use serde_json::{Value, json};

use crate::lifecycle::start::{OWN_SOCKET, preforkd};
use crate::support::installed::Installed;
use crate::support::leftover_check::gone;
use crate::support::{Client, Daemon, Dir, PATIENCE, assert_within, binary, process, wait_for};

/// Leaves a process behind, which writes its pid to the file of the first argument. The kernel shows as
/// its environment a gigabyte of zeros that takes no memory (`huge`), or the same behind the mark of its
/// call (`marked`). With `wall` its memory is locked until the file of the third argument can be read.
/// With a fourth argument it leaves another, unchanged process and waits itself.
const LEAVE: &str = r#"
import ctypes, mmap, os, struct, sys, threading, time
pids, kind = sys.argv[1:3]
libc = ctypes.CDLL(None, use_errno=True)
libc.sbrk.restype = libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
def note(pid):
    with open(pids, "a") as file:
        file.write("%d\n" % pid)
def show(address, size):
    with open("/proc/self/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    field = lambda number: int(fields[number - 3])
    table = struct.pack("12QII", field(26), field(27), field(45), field(46), field(47), libc.sbrk(0),
                        field(28), field(48), field(49), address, address + size, 0, 0, 0xffffffff)
    return libc.prctl(35, 14, table, ctypes.c_size_t(len(table)), ctypes.c_ulong(0)) == 0
def wait_for_d(path):
    looks = 0
    while looks < 3:
        with open(path) as file:
            looks = looks + 1 if file.read().rsplit(")", 1)[1].split()[0] == "D" else 0
        time.sleep(0.02)
def hide():
    if kind == "wall":
        kept.extend([os.open(sys.argv[3], os.O_RDONLY), os.open(sys.argv[3], os.O_RDONLY)])
        thread = threading.Thread(target=os.pread, args=(kept[0], 1, 0), daemon=True)
        thread.start()
        wait_for_d("/proc/self/task/%d/stat" % thread.native_id)
        return True
    size = 1 << 30
    place = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE,
                      mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1, 0)
    if kind == "marked":
        mark = b"PREFORKD_CALL=" + os.environb[b"PREFORKD_CALL"]
        ctypes.memmove(place, mark, len(mark))
    return show(place, size)
kept = []
def leave(prepare):
    mine, theirs = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            done = prepare()
            note(os.getpid())
            os.write(theirs, b"%d %s" % (os.getpid(), b"y" if done else b"n"))
            for fd in set(range(64)) - set(kept):
                try:
                    os.close(fd)
                except OSError:
                    pass
            if kept:
                # Waits for the page that the thread waits for, with the lock of this process's memory.
                libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE, kept[1], 0)
            time.sleep(3600)
        os._exit(0)
    os.close(theirs)
    pid, done = os.read(mine, 64).decode().split()
    if kind == "wall" and prepare is hide:
        wait_for_d("/proc/%s/stat" % pid)
    return done
print(leave(hide), end="", flush=True)
if len(sys.argv) > 4:
    leave(lambda: True)
    time.sleep(3600)
"#;

/// A file system in user space with one file, `wall`, whose read never ends (linux/fuse.h). Every second
/// open bypasses its cache. Prints `up` when it is mounted. At the end of its standard input it exits,
/// which ends all reads.
const WALL: &str = r#"
import ctypes, os, select, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
fuse = os.open("/dev/fuse", os.O_RDWR)
options = b"fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other" % fuse
if libc.mount(b"wall", os.fsencode(sys.argv[1]), b"fuse", 0, options) != 0:
    sys.exit("mount: " + os.strerror(ctypes.get_errno()))
opened = []
def attributes(node):
    mode = 0o40755 if node == 1 else 0o100444
    return struct.pack("6Q10I", node, 1 << 20, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
def answer(opcode, node):
    if opcode == 26:
        return struct.pack("IIIIHHIIHHI28x", 7, 31, 4096, 1, 12, 9, 4096, 1, 1, 0, 0)
    if opcode == 1:
        return struct.pack("QQQQII", 2, 0, 3600, 3600, 0, 0) + attributes(2)
    if opcode == 3:
        return struct.pack("QII", 3600, 0, 0) + attributes(node)
    if opcode in (14, 27):
        # An open leaves the cache alone (FOPEN_KEEP_CACHE). Each second one is not through the cache, so that
        # its pages are thrown out before they are mapped (FOPEN_DIRECT_IO).
        opened.append(node)
        return struct.pack("QII", 0, 2 | len(opened) % 2 ^ 1, 0)
    if opcode in (18, 25, 29):
        return b""
while True:
    ready = select.select([fuse, 0], [], [])[0]
    if 0 in ready and not os.read(0, 1):
        break
    if fuse in ready:
        request = os.read(fuse, 1 << 20)
        opcode, unique, node = struct.unpack_from("=IQQ", request, 4)
        if opcode not in (2, 15, 36, 42):
            body = answer(opcode, node)
            error = -38 if body is None else 0
            body = body or b""
            os.write(fuse, struct.pack("IiQ", 16 + len(body), error, unique) + body)
        if opcode == 26:
            print("up", flush=True)
libc.umount2(os.fsencode(sys.argv[1]), 2)
"#;

/// This file system, mounted until it is dropped.
struct Wall {
    server: Child,
    input: Option<ChildStdin>,
    file: PathBuf,
}

impl Wall {
    fn new(dir: &Dir) -> Self {
        let at = dir.join("mounted");
        std::fs::create_dir(&at).unwrap();
        let mut server = Command::new("python3");
        let server = server.args(["-c", WALL]).arg(&at);
        let mut server = server
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut output = BufReader::new(server.stdout.take().unwrap());
        output.read_line(&mut said).unwrap();
        assert_eq!(said, "up\n", "it could not be mounted");
        Wall {
            input: server.stdin.take(),
            server,
            file: at.join("wall"),
        }
    }
}

impl Drop for Wall {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.server.wait();
    }
}

/// A method that leaves processes behind, and the file with their pids.
struct Leaver {
    dir: Dir,
    command: String,
}

impl Leaver {
    fn new() -> Self {
        let dir = Dir::new();
        let program = dir.write("leave.py", LEAVE);
        let command = format!("\"python3\", {program:?}, {:?}", dir.join("pids"));
        Leaver { dir, command }
    }

    /// Returns `[methods.NAME]` of one kind.
    fn method(&self, name: &str, more: &str) -> String {
        let command = &self.command;
        format!("[methods.{name}]\ncommand = [{command}, {more}]\ntimeout = \"20s\"\n")
    }

    /// Returns the pids, once there are `count`.
    fn left(&self, count: usize) -> Vec<i32> {
        let read = || std::fs::read_to_string(self.dir.join("pids")).unwrap_or_default();
        wait_for("pids", PATIENCE, || read().lines().count() >= count);
        read().lines().map(|pid| pid.parse().unwrap()).collect()
    }
}

/// Returns whether the kernel lets a process choose its environment (CONFIG_CHECKPOINT_RESTORE).
fn is_possible(answer: &Value) -> bool {
    if answer["result"] == "n" {
        println!("not run: this kernel does not let a process choose what it shows: {answer}");
        return false;
    }
    assert_eq!(answer["result"], "y", "{answer}");
    true
}

/// Returns the highest memory that a process had, in KiB.
fn peak_kib(pid: i32) -> u64 {
    let peak = process::field(pid, "VmHWM").unwrap();
    peak.trim_end_matches("kB").trim().parse().unwrap()
}

#[test]
fn a_leftover_that_shows_a_gigabyte_costs_the_worker_no_memory() {
    let leaver = Leaver::new();
    let config = format!(
        "[workers]\ncount = 1\n{}",
        leaver.method("huge", "\"huge\"")
    );
    let mut daemon = Daemon::builder().config(&config).start();
    let worker = daemon.ready_workers()[0];
    if !is_possible(&daemon.client().call(&json!({"in": "huge"}))) {
        return;
    }
    let pids = leaver.left(1);
    // Each end of a call checks it again.
    for _ in 0..3 {
        daemon.client().call(&json!({"in": "huge"}));
    }
    let peak = peak_kib(worker);
    assert!(peak < 200 * 1024, "the worker had {peak} KiB");
    wait_for("the end of the leftover", PATIENCE, || {
        !process::runs(pids[0])
    });
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait_exit().success());
    for pid in leaver.left(4) {
        assert!(!process::runs(pid), "{pid} has outlived its worker");
    }
}

#[test]
fn a_leftover_with_its_mark_before_a_gigabyte_is_found() {
    let leaver = Leaver::new();
    let config = leaver.method("marked", "\"marked\"");
    let config = format!("[workers]\ncount = 1\n{config}");
    let daemon = Daemon::builder().config(&config).start();
    if !is_possible(&daemon.client().call(&json!({"in": "marked"}))) {
        return;
    }
    let pids = leaver.left(1);
    assert!(!process::runs(pids[0]), "{pids:?}");
}

/// Descendants are found by data of the kernel about each process, including its name.
#[test]
fn a_name_that_is_no_text_hides_no_process_from_the_end_of_its_call() {
    const NAMELESS: &str = r#"
import ctypes, os, sys, time
if len(sys.argv) > 2:
    ctypes.CDLL(None).prctl(15, b"\xff) \xfe", 0, 0, 0)
    os.setsid()
    with open(sys.argv[1], "a") as file:
        file.write("%d\n" % os.getpid())
elif os.fork() == 0:
    program = os.readlink("/proc/self/exe")
    os.execve(program, [program] + sys.argv + ["named"], {})
time.sleep(3600)
"#;
    let mut leaver = Leaver::new();
    let program = leaver.dir.write("nameless.py", NAMELESS);
    leaver.command = format!("\"python3\", {program:?}");
    let pids = format!("{:?}", leaver.dir.join("pids"));
    let config = leaver.method("nameless", &pids);
    let daemon = Daemon::builder()
        .config(&format!("[workers]\ncount = 1\n{config}"))
        .start();
    let mut client = daemon.client();
    client.send(r#"{"in": "nameless", "id": 1}"#);
    let pids = leaver.left(1);
    client.send(r#"{"in": "rpc.cancel", "params": {"id": 1}}"#);
    assert_eq!(client.recv_json()["result"]["name"], "cancelled");
    gone(&pids, "cancelled");
}

#[test]
#[ignore = "needs root, to mount a file system whose reads never end; tests/run runs it"]
fn a_leftover_whose_environment_cannot_be_read_holds_up_no_call() {
    let leaver = Leaver::new();
    let wall = Wall::new(&leaver.dir);
    let config = format!(
        "[workers]\ncount = 1\nthreads = 2\n[methods.true]\ncommand = [\"true\"]\n{}",
        leaver.method("hide", &format!("\"wall\", {:?}", wall.file))
    );
    let mut daemon = Daemon::builder().config(&config).start();
    // It must be dropped before the daemon, which could not exit if it waited for a read.
    let wall = wall;
    let worker = daemon.ready_workers()[0];
    let mut client = daemon.client();
    let began = Instant::now();
    if !is_possible(&client.call(&json!({"in": "hide"}))) {
        return;
    }
    assert_within("the first call", began.elapsed(), Duration::from_secs(2));
    let pids = leaver.left(1);
    daemon.wait_log("could not read the environment of process");
    // It is not read again.
    let began = Instant::now();
    for _ in 0..20 {
        assert_eq!(client.call(&json!({"in": "true"}))["result"], "");
    }
    assert_within("20 calls", began.elapsed(), Duration::from_secs(1));
    // Hidden in the same way, and more of them than threads may be stuck.
    for _ in 0..6 {
        assert_eq!(client.call(&json!({"in": "hide"}))["result"], "y");
    }
    let began = Instant::now();
    assert_eq!(client.call(&json!({"in": "true"}))["result"], "");
    assert_within("a call", began.elapsed(), Duration::from_secs(1));
    assert_eq!(daemon.ready_workers(), [worker], "it serves on");
    assert!(process::runs(pids[0]), "nothing says whose it is");
    // A stuck read does not keep the worker from exiting.
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait_exit().success());
    daemon.wait_group_gone();
    drop(wall);
    for pid in leaver.left(7) {
        wait_for("its end", PATIENCE, || !process::runs(pid));
    }
}

/// A server whose master is PID 1 of a namespace, as in a container.
struct PidOne {
    dir: Dir,
    unshare: Child,
    wall: Option<Wall>,
}

impl PidOne {
    fn start(config: &str, wall: Wall) -> Self {
        let dir = Dir::new();
        let own = "pid-file = \"p.pid\"\ncontrol-socket = \"c.sock\"\nlog.file = \"log\"\n";
        dir.write("p.toml", format!("{own}{config}{OWN_SOCKET}"));
        let mut unshare = Command::new("unshare");
        let unshare = unshare
            .args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"])
            .arg(binary())
            .args(["run", "--config"])
            .arg(dir.join("p.toml"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let wall = Some(wall);
        let server = PidOne { dir, unshare, wall };
        wait_for("a server", PATIENCE, || server.answers());
        server
    }

    /// Returns whether the master answers a command.
    fn answers(&self) -> bool {
        let status = preforkd(&self.dir, &["status"]).output().unwrap();
        status.status.success()
    }

    fn master(&self) -> i32 {
        process::children(self.unshare.id().cast_signed())[0]
    }

    fn client(&self) -> Client {
        Client::connect_unix(&self.dir.join("rpc.sock"))
    }
}

impl Drop for PidOne {
    fn drop(&mut self) {
        // Do this first, because a master that waits in a read could not be killed.
        drop(self.wall.take());
        if let Some(master) = process::children(self.unshare.id().cast_signed()).first() {
            let _ = kill(Pid::from_raw(*master), Signal::SIGKILL);
        }
        let _ = self.unshare.wait();
        if std::thread::panicking() {
            eprintln!("its log:\n{}", self.dir.read("log"));
        }
    }
}

/// Returns how many Python processes a server has. The pids that they write belong to the namespace, and
/// their command lines cannot be read while their memory is locked.
fn count_of_pythons(master: i32) -> usize {
    let below = process::descendants(master).into_iter();
    let runs = |pid: &i32| process::runs(*pid) && process::comm(*pid).starts_with("python");
    below.filter(runs).count()
}

#[test]
#[ignore = "needs root, for a namespace of processes and a file system; tests/run runs it"]
fn a_master_that_is_pid_1_neither_waits_for_an_environment_nor_spares_what_it_can_read() {
    let leaver = Leaver::new();
    let wall = Wall::new(&leaver.dir);
    let busy = format!("\"wall\", {:?}, \"busy\"", wall.file);
    let config = format!(
        "[workers]\ncount = 1\n{}{}",
        leaver.method("huge", "\"huge\""),
        leaver.method("busy", &busy)
    );
    let mut server = PidOne::start(&config, wall);
    let master = server.master();
    let mut client = server.client();
    client.send(r#"{"in": "busy"}"#);
    leaver.left(2);
    // Beside a call that runs, because the worker ends an unmarked process after the calls beside it.
    if !is_possible(&server.client().call(&json!({"in": "huge"}))) {
        return;
    }
    leaver.left(3);
    assert_eq!(count_of_pythons(master), 4);
    let worker = process::workers(master)[0];
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    // The process without a mark and the unreadable one remain; the command and the unchanged process do
    // not.
    let mut slowest = Duration::ZERO;
    wait_for("the end of what has a mark", PATIENCE, || {
        let began = Instant::now();
        assert!(server.answers(), "the master");
        slowest = slowest.max(began.elapsed());
        count_of_pythons(master) == 2
    });
    assert_within("each answer", slowest, Duration::from_secs(1));
    let mut client = server.client();
    let ping = client.call(&json!({"in": "ping", "params": 1}));
    assert_eq!(ping["result"], 1);
    wait_for("the other one is told of", PATIENCE, || {
        server
            .dir
            .read("log")
            .contains("could not read the environment of process")
    });
    let peak = peak_kib(master);
    assert!(peak < 200 * 1024, "the master had {peak} KiB");
    // The stuck reader ends with the file system, and is reaped.
    drop(server.wall.take());
    wait_for("no reader", PATIENCE, || {
        let children = process::children(master).into_iter();
        !children
            .map(process::comm)
            .any(|name| name.ends_with("reader"))
    });
    process::wait_for_no_zombies(master);
    assert!(server.answers());
}

/// Kills the worker that runs `busy` while the master is between two programs: a shell, which reaps no children, waits
/// for a line in a FIFO. So the master adopts what the call has left behind. Then the upgrade continues. `before` is
/// the number of pids that were written earlier. Returns the pids of the hidden and of the unchanged process.
fn adopted_during_upgrade(
    installed: &Installed,
    daemon: &Daemon,
    leaver: &Leaver,
    before: usize,
) -> [i32; 2] {
    let worker = daemon.ready_workers()[0];
    let mut client = daemon.client();
    client.send(r#"{"in": "busy"}"#);
    let pids = leaver.left(before + 2);
    let [hidden, unchanged] = pids[before..] else {
        panic!("{pids:?}");
    };
    mkfifo(&installed.file("go"), Mode::S_IRWXU).unwrap();
    installed.script(
        "if [ $when = exec ]; then : >$dir/between; read -r word <$dir/go; fi\nexec $good \"$@\"",
    );
    daemon.signal(Signal::SIGUSR2);
    wait_for("the exec", PATIENCE, || installed.file("between").exists());
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    wait_for("adopted processes", PATIENCE, || {
        let mut both = [hidden, unchanged].into_iter();
        both.all(|pid| process::parent(pid) == Some(daemon.pid()))
    });
    std::fs::write(installed.file("go"), "go\n").unwrap();
    [hidden, unchanged]
}

#[track_caller]
fn wait_upgraded(daemon: &Daemon) {
    wait_for("the upgrade", PATIENCE, || {
        daemon.status()["master"]["last_upgrade"]["ok"] == true
    });
}

#[test]
fn a_leftover_with_its_mark_before_a_gigabyte_is_found_after_an_upgrade() {
    let leaver = Leaver::new();
    let config = format!(
        "[workers]\ncount = 1\n{}{}",
        leaver.method("marked", "\"marked\""),
        leaver.method("busy", "\"marked\", \"-\", \"busy\"")
    );
    let other = Daemon::builder().config(&config).start();
    if !is_possible(&other.client().call(&json!({"in": "marked"}))) {
        return;
    }
    drop(other);
    let installed = Installed::new();
    let daemon = installed
        .daemon(&config)
        .expect_log("ended by SIGKILL")
        .start();
    let left = adopted_during_upgrade(&installed, &daemon, &leaver, 1);
    wait_for("the end of what has a mark", PATIENCE, || {
        left.iter().all(|pid| !process::runs(*pid))
    });
    wait_upgraded(&daemon);
    let peak = peak_kib(daemon.pid());
    assert!(peak < 200 * 1024, "the master had {peak} KiB");
}

#[test]
#[ignore = "needs root, to mount a file system whose reads never end; tests/run runs it"]
fn a_master_that_takes_over_waits_for_no_environment() {
    let leaver = Leaver::new();
    let wall = Wall::new(&leaver.dir);
    let busy = format!("\"wall\", {:?}, \"busy\"", wall.file);
    let config = format!("[workers]\ncount = 1\n{}", leaver.method("busy", &busy));
    let installed = Installed::new();
    let daemon = installed
        .daemon(&config)
        .expect_log("ended by SIGKILL")
        .start();
    // It must be dropped before the daemon, which could not exit if it waited for a read.
    let wall = wall;
    let [hidden, unchanged] = adopted_during_upgrade(&installed, &daemon, &leaver, 0);
    daemon.status();
    let mut slowest = Duration::ZERO;
    wait_for("the end of what has a mark", PATIENCE, || {
        let began = Instant::now();
        daemon.status();
        slowest = slowest.max(began.elapsed());
        !process::runs(unchanged)
    });
    assert_within("each answer", slowest, Duration::from_secs(1));
    daemon.wait_log("could not read the environment of process");
    wait_upgraded(&daemon);
    assert!(process::runs(hidden), "nothing says whose it is");
    kill(Pid::from_raw(hidden), Signal::SIGKILL).unwrap();
    drop(wall);
    wait_for("its end", PATIENCE, || !process::runs(hidden));
    process::wait_for_no_zombies(daemon.pid());
}
