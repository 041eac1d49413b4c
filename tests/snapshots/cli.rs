//! Records the command line: options, exit codes, the output of `check` and `status`, and the titles in
//! `ps`.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::{assert_recorded, mask, mask_between};
use crate::support::{Daemon, Dir, PATIENCE, binary, control, example, process, source, wait_for};

const COMMANDS: [&str; 13] = [
    "", "run", "check", "status", "reload", "upgrade", "scale", "stop", "observe", "top", "call",
    "map", "bench",
];

const JOB_COMMANDS: [&str; 14] = [
    "", "enqueue", "wait", "cancel", "list", "show", "retry", "purge", "pause", "resume", "export",
    "import", "check", "schema",
];

/// Runs a command of preforkd in a nearly empty environment.
fn run(words: &[&str], stdin: &str) -> Output {
    let mut command = Command::new(binary());
    command.args(words).env_clear().current_dir(source());
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that reads nothing may have ended already.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn help_names_the_recorded_commands_options_and_defaults() {
    let mut all = String::new();
    for command in COMMANDS {
        let words = [command, "--help"];
        let output = run(words.split_at(usize::from(command.is_empty())).1, "");
        all += &format!("{}\n", help_without_prose(&text(&output.stdout)));
    }
    for command in JOB_COMMANDS {
        let mut words = vec!["job", command, "--help"];
        words.retain(|word| !word.is_empty());
        let output = run(&words, "");
        all += &format!("{}\n", help_without_prose(&text(&output.stdout)));
    }
    assert_recorded("cli/help.txt", &all);
}

/// Returns a help text without descriptions: usage, and in each section the names with their defaults and
/// possible values. A default that is prose is masked too.
fn help_without_prose(help: &str) -> String {
    let mut shown = String::new();
    let mut section = "";
    for line in help.lines() {
        let word = line.trim_start();
        let indent = line.len() - word.len();
        let is_name = match section {
            "Commands:" | "Arguments:" => indent == 2,
            "Options:" => word.starts_with('-') && !word.starts_with("- "),
            _ => false,
        };
        if line.starts_with("Usage: ") {
            shown += &format!("{line}\n");
        } else if indent == 0 && !line.is_empty() {
            section = if line.ends_with(':') { line } else { "" };
        } else if is_name {
            let name = word.split_once("  ").map_or(word, |(name, _)| name);
            shown += &format!("  {name}\n");
        } else if let Some((value, _)) = word.strip_prefix("- ").and_then(|it| it.split_once(':')) {
            shown += &format!("    value {value}\n");
        }
        if !section.is_empty()
            && let Some((_, default)) = line.split_once("[default: ")
        {
            let default = default.split_once(']').map(|(value, _)| value);
            let default = default.filter(|value| !value.contains(' ')).unwrap_or("*");
            shown += &format!("    default {default}\n");
        }
    }
    shown
}

#[test]
fn check_prints_what_is_recorded_for_each_sample() {
    let mut all = String::new();
    for directory in ["config", "fuzz/corpus/config"] {
        let entries = fs::read_dir(source().join(directory)).unwrap();
        let files = entries
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.path().is_file());
        let names = files.map(|entry| entry.file_name().into_string().unwrap());
        // A file that fuzzing has found is named by its hash.
        let mut names: Vec<String> = names.filter(|name| name.len() < 40).collect();
        names.sort();
        for name in names {
            let file = format!("{directory}/{name}");
            let output = run(&["check", "--config", &file], "");
            all += &format!("$ preforkd check --config {file}\n");
            all += &format!("exit {}\n", output.status.code().unwrap());
            text(&output.stderr)
                .lines()
                .filter_map(place)
                .for_each(|it| all += &it);
            let printed = mask_machine(&text(&output.stdout));
            for line in printed.lines() {
                all += &format!("{}\n", format!("  {line}").trim_end());
            }
            all += "\n";
        }
    }
    assert_recorded("cli/check.txt", &all);
}

/// Returns file, line, column and key of an error; `None` for a warning.
fn place(line: &str) -> Option<String> {
    let line = line.strip_prefix("preforkd: ").unwrap_or(line);
    let line = line.strip_prefix(&format!("{}/", source().display()))?;
    let mut parts = line.split(": ");
    let at = parts.next()?;
    let key = parts.next().filter(|key| !key.contains(' ')).unwrap_or("-");
    Some(format!("error {at} {key}\n"))
}

/// Masks values that depend on the machine and its user: the number of CPUs, a share of its memory,
/// default directories.
fn mask_machine(text: &str) -> String {
    let mut shown = text.to_owned();
    for (start, end) in [
        ("\ncount = ", '\n'),
        ("\nunfinished = \"", '"'),
        ("\npid-file = \"", '"'),
        ("\ncontrol-socket = \"", '"'),
    ] {
        let masked = mask_between(shown.as_bytes(), start.as_bytes(), end as u8);
        shown = String::from_utf8(masked).unwrap();
    }
    shown
}

/// Starts a daemon and makes a reload, three deaths and a quarantined call.
fn eventful() -> Daemon {
    let daemon = Daemon::builder()
        .program(example("misbehave"))
        .config("[workers]\ncount = 1\nrespawn-max-delay = \"0s\"\n")
        .expect_log("ended by SIG")
        .start();
    assert!(daemon.command(&["reload"]).status.success());
    // A crash in a draining worker does not count.
    wait_for("the old generation to leave", PATIENCE, || {
        let children = process::children(daemon.pid()).len();
        children == 2 && daemon.workers().len() == 1
    });
    let mut client = daemon.client();
    for deaths in 1..=3 {
        client.call(&json!({"in": "crash-inline"}));
        wait_for("the death counted", PATIENCE, || {
            let children = process::children(daemon.pid()).len();
            let counted = daemon.status()["deaths"].as_array().unwrap().len();
            counted == deaths && children == 2 && daemon.ready_workers().len() == 1
        });
    }
    daemon
}

#[test]
fn status_has_the_recorded_members_and_columns() {
    let daemon = eventful();
    let mut client = daemon.client();
    client.send(r#"{"in":"wait","params":3000}"#);
    daemon.wait_running(1);
    let stop = r#"{"command":"stop","after_ms":60000}"#;
    control::ask(&daemon.dir().join("control.sock"), stop);
    let status = text(&daemon.command(&["status", "--json"]).stdout);
    let mut members = Vec::new();
    list_members("", &serde_json::from_str(&status).unwrap(), &mut members);
    // It depends on the user whether there is one.
    members.retain(|member| member != ".master.warnings[] string");
    let page = text(&daemon.command(&["status"]).stdout);
    let is_of_row = |c: char| c.is_lowercase() || c.is_numeric();
    let is_head = |line: &&str| !line.is_empty() && !line.contains(is_of_row);
    let heads = page.lines().filter(is_head).map(str::split_whitespace);
    let heads = heads.map(|words| words.collect::<Vec<_>>().join(" "));
    let heads: String = heads.map(|head| format!("columns {head}\n")).collect();
    assert_recorded("cli/status.txt", &(members.join("\n") + "\n" + &heads));
}

/// Lists each member with its type, in alphabetical order.
fn list_members(path: &str, value: &Value, members: &mut Vec<String>) {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(values) => {
            values
                .iter()
                .for_each(|it| list_members(&format!("{path}[]"), it, members));
            "array"
        }
        Value::Object(inner) => {
            let name = |name: &str| format!("{path}.{name}");
            inner
                .iter()
                .for_each(|(key, it)| list_members(&name(key), it, members));
            return;
        }
    };
    let line = format!("{path} {kind}");
    if !members.contains(&line) {
        members.push(line);
    }
}

const CONFIG: &str = "
[workers]
count = 1
threads = 2
[methods.sleep]
builtin = \"sleep\"
[methods.program]
pool = \"naps\"
[pools.naps]
command = [\"sleep\", \"1000\"]
processes = 1
ready = \"alive\"
";

#[test]
fn processes_and_threads_have_the_recorded_names() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut lines = Vec::new();
    // A process or thread has the name of its creator until it sets its own.
    wait_for("a name for everything", PATIENCE, || {
        lines = names(&daemon);
        let mut titles: Vec<&str> = lines
            .iter()
            .filter_map(|line| line.split(" | ").nth(1))
            .collect();
        let count = titles.len();
        titles.sort_unstable();
        titles.dedup();
        count == titles.len()
            && count >= 4
            && !lines.iter().any(|line| line.contains("thread preforkd"))
    });
    assert_recorded("cli/processes.txt", &(lines.join("\n") + "\n"));
}

/// Returns the comm and the title of each process of a daemon, and the name of each other thread.
fn names(daemon: &Daemon) -> Vec<String> {
    let mut lines = Vec::new();
    for pid in [vec![daemon.pid()], process::descendants(daemon.pid())].concat() {
        let own = process::comm(pid);
        let title = process::title(pid).replace(&daemon.dir().display().to_string(), "DIR");
        lines.push(format!("{own} | {title}"));
        let others = process::tasks(pid).into_iter().filter(|task| *task != pid);
        lines.extend(others.map(|task| format!("{own} thread {}", process::comm(task))));
    }
    lines.sort();
    lines
}

/// Command lines without a running server, each with its stdin. `DIR` is the server's directory,
/// `ADDRESS` its address.
const WITHOUT: &[&str] = &[
    "",
    "--help",
    "--version",
    "help",
    "frobnicate",
    "run --frobnicate",
    "run --config DIR/nonexistent.toml",
    "run --config DIR/wrong.toml",
    "run --config DIR/other.toml --daemon",
    "run --config DIR/other.toml --listen nonsense",
    "run --config DIR/other.toml --listen ADDRESS",
    "run --config DIR/preforkd.toml",
    "check --config DIR/nonexistent.toml",
    "check --config DIR/wrong.toml",
    "check --config DIR/other.toml",
    "status --control-socket DIR/nonexistent",
    "status --config DIR/other.toml",
    "status --config DIR/other.toml --control-socket DIR/nonexistent",
    "reload --control-socket DIR/nonexistent",
    "upgrade --control-socket DIR/nonexistent",
    "scale",
    "scale 0",
    "scale 1025",
    "scale many",
    "scale 2 --control-socket DIR/nonexistent",
    "stop --control-socket DIR/nonexistent",
    "stop --now --after 1s",
    "stop --after soon",
    "call",
    "call ping {bad",
    "call ping --timeout soon",
    "call ping --address nonsense",
    "call ping --address unix:DIR/nonexistent",
    "map",
    "map ping --parallel 0",
    "map ping --address unix:DIR/nonexistent",
    "bench",
    "bench ping --dialect morse",
    "bench ping --threads 2 --connections 1",
    "bench ping --count 1 --duration 1s",
    "bench ping --address unix:DIR/nonexistent --count 1",
];

/// The same with a running server, in this order. The output of `call` and `map` is compared too. An
/// object is a request to the control socket.
const WITH: &[(&str, &str)] = &[
    ("call ping --address ADDRESS", ""),
    ("call ping [1,2.0] --config DIR/preforkd.toml", ""),
    ("call ping - --address ADDRESS", "{\"a\": 1e400}\n"),
    ("call ping - --address ADDRESS", "{bad"),
    ("call ping -1 --id 7 --address ADDRESS", ""),
    ("call ping [1] --id x --jsonrpc --address ADDRESS", ""),
    ("call ping 1 --jsonrpc --address ADDRESS", ""),
    ("call nope --address ADDRESS", ""),
    ("call sleep \"x\" --address ADDRESS", ""),
    ("call sleep 30 --timeout 100ms --address ADDRESS", ""),
    ("map ping --address ADDRESS", "1\n\n[2, 2.0]\n\"x\"\n"),
    (
        "map ping --tag --parallel 2 --timeout 5s --address ADDRESS",
        "1\n2\n",
    ),
    ("map sleep --address ADDRESS", "0\n\"x\"\n0\n"),
    ("map ping --address ADDRESS", "{bad\n"),
    ("bench ping --count 5 --connections 1 --address ADDRESS", ""),
    (
        "bench ping --count 5 --connections 1 --json --dialect http --address ADDRESS",
        "",
    ),
    ("bench nope --count 5 --connections 1 --address ADDRESS", ""),
    ("status --control-socket DIR/control.sock", ""),
    ("status --json --config DIR/preforkd.toml", ""),
    ("reload --control-socket DIR/control.sock", ""),
    ("scale 1 --control-socket DIR/control.sock", ""),
    ("scale 1 --config DIR/preforkd.toml", ""),
    ("{\"command\":\"stop\",\"after_ms\":60000}", ""),
    ("reload --control-socket DIR/control.sock", ""),
    ("upgrade --control-socket DIR/control.sock", ""),
    ("{\"command\":\"nonsense\"}", ""),
    ("stop --control-socket DIR/control.sock", ""),
    ("status --control-socket DIR/control.sock", ""),
    ("stop --config DIR/preforkd.toml", ""),
];

#[test]
fn commands_end_with_the_recorded_exit_codes() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let dir: &Dir = daemon.dir();
    dir.write("wrong.toml", "color = 1\n");
    dir.write(
        "other.toml",
        "pid-file = \"other.pid\"\ncontrol-socket = \"other.sock\"\n[workers]\ncount = 1\n",
    );
    let (path, address) = (dir.display().to_string(), daemon.address().to_string());
    let mut all = String::new();
    let without = WITHOUT.iter().map(|line| (*line, ""));
    for (line, stdin) in without.chain(WITH.iter().copied()) {
        if line.starts_with('{') {
            let answer = control::ask(&dir.join("control.sock"), line);
            all += &format!("$ {line}\n  {}\n", text(&mask(answer.as_bytes())));
            continue;
        }
        let words = line.replace("DIR", &path).replace("ADDRESS", &address);
        let output = run(&words.split_whitespace().collect::<Vec<_>>(), stdin);
        all += format!("$ preforkd {line}").trim_end();
        all += &format!("\nexit {}\n", output.status.code().unwrap());
        if line.starts_with("call") || line.starts_with("map") {
            text(&output.stdout)
                .lines()
                .for_each(|line| all += &format!("  {line}\n"));
        }
    }
    assert_recorded("cli/exit_codes.txt", &all);
}
