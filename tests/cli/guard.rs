//! Tests the guard: a command and a pool program cannot read the worker that started them, as the same
//! user. Everything else is as without it.

use serde_json::{Value, json};

use crate::support::{Daemon, has_landlock, landlock_version, process};

/// A user id that no other process has.
const USER: u32 = 54_321;

/// Tries to open the files of its worker that give access to memory, calls and keys. For root the last
/// two prove nothing, because the kernel lets CAP_PERFMON read them.
const ATTACK: &str = "files='mem fd/0 environ maps'; \
                      if [ $(id -u) = 0 ]; then files='mem fd/0'; fi; for file in $files; do \
                      if (exec 4<$0/$file) 2>/dev/null; then echo $file opened; \
                      else echo $file refused; fi; done";

/// A pool program that runs a shell script for each call, because the shell's `$PPID` would be the
/// program itself.
const PROGRAM: &str = r#"
import json, os, socket, struct, subprocess
calls = socket.socket(fileno=3)
while True:
    head = calls.recv(4, socket.MSG_WAITALL)
    if len(head) < 4:
        break
    call = json.loads(calls.recv(struct.unpack("<I", head)[0], socket.MSG_WAITALL))
    script, worker = call["params"], "/proc/%d" % os.getppid()
    text = subprocess.run(["/bin/sh", "-c", script, worker], capture_output=True, text=True).stdout
    body = json.dumps({"out": call["in"], "result": text}).encode()
    calls.sendall(struct.pack("<I", len(body)) + body)
"#;

fn config(guard: bool) -> String {
    // In both cases `$0` of the script is the /proc directory of its worker.
    let command = r#"command = ["sh", "-c", "exec sh -c \"$1\" /proc/$PPID", "sh", "{script}"]"#;
    format!(
        "[workers]\ncount = 1\n\
         [methods.run]\n{command}\nguard = {guard}\n\
         [pools.model]\nprocesses = 1\ncommand = [\"python3\", \"-c\", {PROGRAM:?}]\nready = \"alive\"\nguard = {guard}\n\
         environment = {{ PATH = \"/usr/bin:/bin\" }}\n\
         [methods.score]\npool = \"model\"\n"
    )
}

/// Returns what the script prints when a command and a pool program run it.
fn both(daemon: &Daemon, script: &str) -> [String; 2] {
    let mut client = daemon.client();
    [
        ("run", json!({ "script": script })),
        ("score", json!(script)),
    ]
    .map(|(method, params)| {
        let answer = client.call(&json!({"in": method, "params": params}));
        match &answer["result"] {
            Value::String(text) => text.clone(),
            _ => panic!("{answer}"),
        }
    })
}

/// Returns each file of the attack and whether it could be opened.
fn attack(daemon: &Daemon) -> [String; 2] {
    both(daemon, ATTACK)
}

fn assert_guard_holds(start: impl Fn(&str) -> Daemon) {
    if !has_landlock() {
        println!("not run: this kernel has no Landlock");
        return;
    }
    let guarded = start(&config(true));
    let is_root = process::field(guarded.pid(), "Uid").is_some_and(|ids| ids.starts_with("0\t"));
    let files = ["mem", "fd/0", "environ", "maps"];
    let files = if is_root { &files[..2] } else { &files[..] };
    let line = |file: &&str, outcome: &str| format!("{file} {outcome}\n");
    let all = |outcome: &str| -> String { files.iter().map(|file| line(file, outcome)).collect() };
    assert_eq!(attack(&guarded), [all("refused"), all("refused")]);
    // The guard is on by default.
    let default = config(true).replace("guard = true\n", "");
    assert_eq!(attack(&start(&default)), [all("refused"), all("refused")]);
    // Without the guard, only the system's own rules for ptrace(2) stop the same attack.
    let yama = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let mut opened = all("opened");
    if !matches!(yama.trim(), "" | "0") {
        opened = opened.replace("mem opened", "mem refused");
    }
    assert_eq!(attack(&start(&config(false))), [opened.as_str(); 2]);
}

#[test]
fn a_guarded_program_cannot_open_the_memory_of_its_worker() {
    assert_guard_holds(|config| Daemon::builder().config(config).start());
}

/// No process of the server is root, as with the shipped unit or a server of an ordinary user.
#[test]
#[ignore = "needs root, to become another user; tests/run runs it"]
fn a_guarded_program_of_an_unprivileged_server_cannot_open_the_memory_of_its_worker() {
    assert_guard_holds(|config| Daemon::builder().config(config).user(USER).start());
}

/// A process of the same user could otherwise end its worker, or with it the whole server.
#[test]
fn a_guarded_program_sends_signals_only_to_what_it_has_started() {
    if landlock_version() < 6 {
        println!("not run: this kernel's Landlock does not know signals");
        return;
    }
    let signals = "(kill -0 ${0#/proc/}) 2>/dev/null && echo worker; \
                   sleep 60 & kill -TERM $! && wait $!; [ $? = 143 ] && echo child";
    let guarded = Daemon::builder().config(&config(true)).start();
    assert_eq!(both(&guarded, signals), ["child\n"; 2]);
    let unguarded = Daemon::builder().config(&config(false)).start();
    assert_eq!(both(&unguarded, signals), ["worker\nchild\n"; 2]);
}

#[test]
fn a_guarded_program_looks_into_what_it_has_started() {
    let daemon = Daemon::builder().config(&config(true)).start();
    let own = "sleep 60 & (exec 4</proc/$!/mem) && echo opened; kill $!";
    assert_eq!(both(&daemon, own), ["opened\n"; 2]);
}

/// Compare inodes, because mv(1) copies a file that it cannot rename.
#[test]
fn a_guarded_program_renames_and_links_across_directories() {
    let daemon = Daemon::builder().config(&config(true)).start();
    let script = "set -e; d=$(mktemp -d); cd \"$d\"; mkdir a b a/d; : >a/x; before=$(stat -c %i a/x); \
                  mv a/x b/y; [ \"$before\" = \"$(stat -c %i b/y)\" ] && echo renamed; \
                  before=$(stat -c %i a/d); mv a/d b/d; \
                  [ \"$before\" = \"$(stat -c %i b/d)\" ] && echo moved; \
                  ln b/y a/z && echo linked; rm -r \"$d\"";
    assert_eq!(both(&daemon, script), ["renamed\nmoved\nlinked\n"; 2]);
}

#[test]
fn guard_false_leaves_a_program_its_setuid_files() {
    if !has_landlock() {
        println!("not run: this kernel has no Landlock");
        return;
    }
    let privileges = |guard| {
        let daemon = Daemon::builder().config(&config(guard)).start();
        both(&daemon, "grep NoNewPrivs /proc/self/status")
    };
    assert_eq!(privileges(true), ["NoNewPrivs:\t1\n"; 2]);
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = own
        .lines()
        .find(|line| line.starts_with("NoNewPrivs"))
        .unwrap();
    assert_eq!(privileges(false), [format!("{own}\n"), format!("{own}\n")]);
}

#[test]
fn the_status_of_a_system_with_landlock_has_no_warning_about_it() {
    let daemon = Daemon::builder().config(&config(true)).start();
    let warnings = daemon.status()["master"]["warnings"].to_string();
    assert_eq!(
        warnings.contains("without a guard"),
        !has_landlock(),
        "{warnings}"
    );
}
