//! Tests `preforkd top`: text and JSON for pipes, and keys, sizes and the end in a terminal.

use std::process::{Command, Output, Stdio};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{Daemon, Dir, PATIENCE, wait_for};

/// Runs `top` in a pseudo-terminal, types, resizes, ends it as `argv[1]` says, and prints what was seen and
/// whether the terminal is as before.
const IN_A_TERMINAL: &str = r#"
import fcntl, json, os, pty, re, select, signal, struct, sys, termios, time
how, command = sys.argv[1], sys.argv[2:]
own, terminal = pty.openpty()
def resize(columns, rows):
    fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
resize(120, 40)
before = termios.tcgetattr(terminal)
child = os.fork()
if child == 0:
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in range(3): os.dup2(terminal, number)
    os.environ["TERM"] = "xterm"
    if "LIBRARY" in os.environ: os.environ["LD_PRELOAD"] = os.environ["LIBRARY"]
    os.execv(command[0], command)
seen, text, screen, at = b"", "", {}, [0, 0]
def draw():
    # What a terminal would show: a frame sends only the cells that have changed.
    global text
    for move, kind, letter in re.findall(r"\x1b\[([?0-9;]*)([A-Za-z])|([^\x1b])", text):
        if kind == "H": at[:] = [int(part or 1) - 1 for part in (move + ";").split(";")[:2]]
        elif kind == "J": screen.clear()
        elif letter: screen[tuple(at)] = letter; at[1] += 1
    text = ""
def receive(limit):
    global seen, text
    if not select.select([own], [], [], max(0, limit))[0]: return False
    data = os.read(own, 65536)
    seen, text = seen + data, text + data.decode(errors="replace")
    # An escape sequence may have come in part.
    if not re.search(r"\x1b[^A-Za-z]*$", text): draw()
    return True
def lines():
    return ["".join(screen.get((y, x), " ") for x in range(120)) for y in range(40)]
def read_until(wanted, limit=30):
    end = time.monotonic() + limit
    while not any(wanted in line for line in lines()):
        if not receive(end - time.monotonic()):
            sys.exit(f"no {wanted!r} in\n" + "\n".join(line.rstrip() for line in lines()))
def type_(text): os.write(own, text.encode())
read_until("[1 workers]")
raw = termios.tcgetattr(terminal)
for keys, wanted in (("2", "[2 methods]"), ("/", "Enter keep"), ("pin\r", 'filter "pin"'), ("?", "longer or shorter"),
                     ("\x1b", "1 rows"), ("\r", "Method: "), ("\x1b", "1 rows"), ("\x1b", "3 rows"), ("\t", "[3 pools]"),
                     ("4", "[4 events]"), ("5", "slow log off"), ("6", "no durable jobs"), (" ", "paused"), (" ", "every"), ("+", "2s")):
    type_(keys); read_until(wanted)
for size in ((1, 1), (19, 4), (30, 6), (120, 40)):
    resize(*size); type_("1")
read_until("[1 workers]")
if how == "key": type_("q")
elif how == "interrupt": type_("\x03")
elif how == "hangup": os.kill(child, signal.SIGHUP)
elif how == "panic":
    open(os.environ["NO_CLOCK"], "w").close()
    type_("1")
else: os.kill(child, getattr(signal, how))
while b"\x1b[?1049l" not in seen:
    if not receive(30): sys.exit("it does not leave the alternate screen")
status = os.waitpid(child, 0)[1]
while receive(0): pass
left = seen.index(b"\x1b[?1049l")
print(json.dumps({"code": os.waitstatus_to_exitcode(status), "same": termios.tcgetattr(terminal) == before,
                  "raw": raw != before, "colors": b"\x1b[38;5;" in seen, "shown": seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l"),
                  "panicked": b"panicked" in seen[left:]}))
"#;

const CONFIG: &str = "[workers]\ncount = 2\n[methods.sleep]\nbuiltin = \"sleep\"\n";

fn daemon() -> Daemon {
    let daemon = Daemon::builder().config(CONFIG).start();
    daemon.client().call(&json!({"in": "ping"}));
    daemon
}

/// Returns the command line of `top` for a daemon.
fn top(daemon: &Daemon, options: &[&str]) -> Vec<String> {
    let words = [&["top"], options].concat();
    let command = daemon.asking(&words);
    let all = std::iter::once(command.get_program()).chain(command.get_args());
    all.map(|word| word.to_str().unwrap().to_owned()).collect()
}

/// Runs `top` as a part of a shell command.
fn shell(daemon: &Daemon, options: &[&str], rest: &str) -> Output {
    let script = format!("set -o pipefail; \"$@\" {rest}");
    let mut shell = Command::new("bash");
    shell
        .args(["-c", &script, "bash"])
        .args(top(daemon, options));
    shell.output().unwrap()
}

#[track_caller]
fn in_a_terminal(daemon: &Daemon, how: &str, options: &[&str], no_color: bool) -> Option<Value> {
    let mut python = Command::new("python3");
    python
        .args(["-c", IN_A_TERMINAL, how])
        .args(top(daemon, options));
    python.env_remove("NO_COLOR").env_remove("COLUMNS");
    if no_color {
        python.env("NO_COLOR", "1");
    }
    let Ok(done) = python.output() else {
        println!("not run: there is no python3");
        return None;
    };
    assert!(
        done.status.success(),
        "{how}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    Some(serde_json::from_slice(&done.stdout).unwrap())
}

#[test]
fn one_frame_is_printed_for_a_pipe() {
    let daemon = daemon();
    let done = shell(&daemon, &["--once", "--interval", "100ms"], "");
    let text = String::from_utf8(done.stdout).unwrap();
    for wanted in [
        "workers 2 of 2 ready",
        "\nworkers:\n",
        "ping",
        "\nevents:\n",
        "slow log off",
        "no durable jobs",
    ] {
        assert!(text.contains(wanted), "no {wanted} in {text}");
    }
    assert!(
        done.status.success() && done.stderr.is_empty() && !text.contains('\x1b'),
        "{text}"
    );
    let done = shell(&daemon, &["--once", "--interval", "100ms"], "| head -1");
    let text = String::from_utf8(done.stdout).unwrap();
    assert!(
        text.contains("generation 1") && done.stderr.is_empty(),
        "{text}"
    );
    assert!(done.status.success(), "{:?}", done.status);
}

#[test]
fn json_is_what_the_status_page_gets() {
    let daemon = daemon();
    let script = "import json, sys\nfor number, line in enumerate(sys.stdin):\n    one = json.loads(line)\n    \
                  print(one['rates']['interval_ms'] > 0, len(one['rates']['processes']), one['totals']['calls'])\n    \
                  if number == 2: break";
    let done = shell(
        &daemon,
        &["--json", "--interval", "100ms"],
        &format!("| python3 -c \"{script}\""),
    );
    let text = String::from_utf8(done.stdout).unwrap();
    assert_eq!(text, "True 2 1\nTrue 2 1\nTrue 2 1\n", "{:?}", done.stderr);
    assert!(
        done.status.success() && done.stderr.is_empty(),
        "{:?}",
        done.stderr
    );
    let done = daemon.command(&["top", "--json", "--once", "--interval", "100ms"]);
    let one: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(one["master"]["pid"], daemon.pid());
    assert_eq!(one["reloads"], json!([]));
}

#[test]
fn json_ends_with_the_server() {
    let mut daemon = daemon();
    let mut command = daemon.asking(&["top", "--json", "--interval", "100ms"]);
    let mut top = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    let mut code = None;
    wait_for("the end of top", PATIENCE, || {
        code = top.try_wait().unwrap().and_then(|status| status.code());
        code.is_some()
    });
    assert_eq!(code, Some(69));
}

#[test]
fn without_a_terminal_it_says_what_to_give() {
    let daemon = daemon();
    let done = daemon.command(&["top"]);
    let text = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(64), "{text}");
    assert!(text.contains("--once") && text.contains("--json"), "{text}");
    let done = daemon.command(&["top", "--once", "--interval", "99ms"]);
    assert_eq!(done.status.code(), Some(64));
}

#[test]
fn the_terminal_is_as_before_after_each_end() {
    let daemon = daemon();
    for how in ["key", "interrupt", "SIGTERM", "SIGINT", "hangup"] {
        let no_color = how == "key";
        let Some(seen) = in_a_terminal(&daemon, how, &["--interval", "1s"], no_color) else {
            return;
        };
        let expected = json!({"code": 0, "same": true, "raw": true, "colors": !no_color, "shown": true, "panicked": false});
        assert_eq!(seen, expected, "{how}");
    }
}

/// Runs `tmux` with a server of its own for this test.
fn tmux(socket: &str, words: &[&str]) -> Option<String> {
    let mut tmux = Command::new("tmux");
    tmux.args(["-L", socket, "-f", "/dev/null"]).args(words);
    let done = tmux.env("LC_ALL", "C.UTF-8").output().ok()?;
    Some(String::from_utf8_lossy(&done.stdout).into_owned())
}

#[test]
fn a_terminal_multiplexer_shows_the_frame_at_each_size() {
    let daemon = daemon();
    let socket = format!("preforkd-top-{}", daemon.pid());
    let mut command = vec!["new-session", "-d", "-x", "80", "-y", "24"];
    let top = top(&daemon, &[]);
    command.extend(top.iter().map(String::as_str));
    if tmux(&socket, &command).is_none() {
        return println!("not run: there is no tmux");
    }
    let screen = || tmux(&socket, &["capture-pane", "-p"]).unwrap();
    let wait_screen = |what: &str, wanted: &dyn Fn(&str) -> bool| {
        wait_for(what, PATIENCE, || wanted(&screen()));
    };
    wait_screen("a frame of 80 columns", &|text| {
        text.contains("[1 workers]") && text.contains("● ready") && !text.contains("Oldest call")
    });
    let resize = |columns: &str, rows: &str| {
        tmux(&socket, &["resize-window", "-x", columns, "-y", rows]);
    };
    resize("120", "40");
    wait_screen("more columns", &|text| text.contains("Oldest call"));
    resize("1", "1");
    resize("120", "40");
    tmux(&socket, &["send-keys", "2"]);
    wait_screen("the methods", &|text| {
        text.contains("[2 methods]") && text.contains("ping")
    });
    tmux(&socket, &["send-keys", "q"]);
    tmux(&socket, &["kill-server"]);
}

/// Makes clock_gettime(2) fail in the main thread when a file exists, so that the standard library panics.
const NO_CLOCK: &str = r#"
unsafe extern "C" { fn syscall(number: std::ffi::c_long, ...) -> std::ffi::c_long; fn access(path: *const u8, mode: i32) -> i32; }
const CLOCK_GETTIME: std::ffi::c_long = if cfg!(target_arch = "x86_64") { 228 } else { 113 };
#[unsafe(no_mangle)]
extern "C" fn clock_gettime(clock: i32, time: *mut std::ffi::c_void) -> i32 {
    static PATH: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    let path = PATH.get_or_init(|| { let mut path = std::env::var("NO_CLOCK").unwrap_or_default().into_bytes(); path.push(0); path });
    if unsafe { access(path.as_ptr(), 0) } == 0 { return -1; }
    unsafe { syscall(CLOCK_GETTIME, clock, time) as i32 }
}
"#;

#[test]
fn a_panic_leaves_the_terminal_as_it_was_and_its_message_in_sight() {
    let daemon = daemon();
    let dir = Dir::new();
    let code = dir.write("no_clock.rs", NO_CLOCK);
    let mut compiler = Command::new("rustc");
    compiler.args([
        "--edition=2024",
        "--crate-type=cdylib",
        "-Cpanic=abort",
        "-o",
    ]);
    let compiled = compiler
        .arg(dir.join("no_clock.so"))
        .arg(code)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{compiled:?}");
    let mut python = Command::new("python3");
    python
        .args(["-c", IN_A_TERMINAL, "panic"])
        .args(top(&daemon, &[]));
    python
        .env("LIBRARY", dir.join("no_clock.so"))
        .env("NO_CLOCK", dir.join("now"));
    let Ok(done) = python.output() else {
        return println!("not run: there is no python3");
    };
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let seen: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(
        (&seen["code"], &seen["same"]),
        (&json!(70), &json!(true)),
        "{seen}"
    );
    assert_eq!(
        (&seen["shown"], &seen["panicked"]),
        (&json!(true), &json!(true)),
        "{seen}"
    );
}
