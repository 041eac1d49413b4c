//! Makes a line of the log from a record: text, text for journald, or JSON. Each line names the process, its thread
//! and, during a call, the call.

use std::cell::Cell;
use std::io::{self, Write};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::SystemTime;

use log::Record;
use serde::Serialize;

use super::members;
use super::text::{printable, printable_json};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineFormat {
    /// Time, level, process, thread, message.
    Text,
    /// Process, thread and message, without time and level. The line begins with the priority, from which
    /// journald gets the level (sd-daemon(3)).
    Journal,
    Json,
}

/// The role of this process, which is part of each line.
pub(super) static ROLE: AtomicI32 = AtomicI32::new(COMMAND);
pub(super) const COMMAND: i32 = -2;
pub(super) const OBSERVER: i32 = -3;
pub(super) const MASTER: i32 = -1;
/// Slots of processes of other kinds start here; see `link::ids::Slot`.
const FIRST_POOL: i32 = 0x8000;
const JOBS: i32 = 0xBFFF;
const FIRST_ACCEPTOR: i32 = 0xC000;
const FIRST_SESSION: i32 = 0xD000;

/// A call, as lines name it: the pid of the process with its connection (0 for this process), and its number in that
/// process.
pub type LoggedCall = (i32, u64);

thread_local! {
    /// The call that the lines of this thread name.
    static CALL: Cell<Option<LoggedCall>> = const { Cell::new(None) };
}

/// Runs `run`. All lines that this thread logs meanwhile name `call`, if there is one.
pub fn with_call<T>(call: Option<LoggedCall>, run: impl FnOnce() -> T) -> T {
    if call.is_none() {
        return run();
    }
    CALL.set(call);
    let result = run();
    CALL.set(None);
    result
}

/// Returns the id of the call that the next line names.
fn current_call(own_pid: u32) -> Option<String> {
    let (home, number) = CALL.get()?;
    Some(match home {
        0 => format!("{own_pid}.{number}"),
        home => format!("{home}.{number}"),
    })
}

#[derive(Serialize)]
struct JsonLine<'a> {
    time: String,
    level: &'a str,
    pid: u32,
    role: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    slot: Option<i32>,
    thread: &'a str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    call: Option<String>,
}

/// Returns the kind of the process in a slot, and the first slot of that kind.
fn role_of(slot: i32) -> (&'static str, i32) {
    match slot {
        FIRST_SESSION.. => ("connection", FIRST_SESSION),
        FIRST_ACCEPTOR.. => ("acceptor", FIRST_ACCEPTOR),
        JOBS => ("jobs", JOBS),
        FIRST_POOL.. => ("pool", FIRST_POOL),
        _ => ("worker", 0),
    }
}

pub(super) fn write_record(
    to: &mut impl Write,
    form: LineFormat,
    record: &Record<'_>,
) -> io::Result<()> {
    let slot = ROLE.load(Ordering::Relaxed);
    let current = std::thread::current();
    let (role, thread) = match (slot, current.name()) {
        (COMMAND, thread) => ("command", thread),
        (MASTER, thread) => ("master", thread),
        (OBSERVER, thread) => ("observer", thread),
        (slot, Some("main") | None) => (role_of(slot).0, Some("loop")),
        (slot, thread) => (role_of(slot).0, thread),
    };
    let thread = thread.unwrap_or("main");
    // There is one jobs process, so it has no number.
    let slot = (slot >= 0 && slot != JOBS).then(|| slot - role_of(slot).1);
    let pid = std::process::id();
    let time = || humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    if form == LineFormat::Json {
        let line = JsonLine {
            time: time(),
            level: record.level().as_str(),
            pid,
            role,
            slot,
            thread,
            message: record.args().to_string(),
            call: current_call(pid),
        };
        let mut line = serde_json::to_string(&line)?;
        members::add_members(&mut line);
        return writeln!(to, "{}", printable_json(&line));
    }
    if form == LineFormat::Journal {
        let priority = match record.level() {
            log::Level::Error => 3,
            log::Level::Warn => 4,
            log::Level::Info => 6,
            log::Level::Debug | log::Level::Trace => 7,
        };
        write!(to, "<{priority}>")?;
    } else {
        write!(to, "{} {:<5} ", time(), record.level())?;
    }
    write!(to, "[{pid} {role}")?;
    if let Some(slot) = slot {
        write!(to, " {slot}")?;
    }
    write!(to, " {thread}] {}", printable(&record.args().to_string()))?;
    if let Some(call) = current_call(pid) {
        write!(to, " call={call}")?;
    }
    writeln!(to)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn line(form: LineFormat, message: &str) -> String {
        let mut line = Vec::new();
        let record = Record::builder();
        write_record(
            &mut line,
            form,
            &{ record }
                .level(log::Level::Warn)
                .args(format_args!("{message}"))
                .build(),
        )
        .unwrap();
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn a_message_stays_on_its_line() {
        let text = line(LineFormat::Text, "one\ntwo \u{1b}[2J");
        assert!(text.ends_with("one\\ntwo \\u{1b}[2J\n"), "{text}");
        assert!(text.contains(" WARN  ["), "{text}");
        assert!(line(LineFormat::Journal, "x").starts_with("<4>["));
    }

    #[test]
    fn a_line_names_the_call_during_which_it_is_logged() {
        for (call, id) in [
            (7, "7.12".to_owned()),
            (0, format!("{}.12", std::process::id())),
        ] {
            let call = Some((call, 12));
            let text = with_call(call, || line(LineFormat::Text, "x"));
            assert!(text.ends_with(&format!("] x call={id}\n")), "{text}");
            let text = with_call(call, || line(LineFormat::Json, "x"));
            assert!(
                text.ends_with(&format!("\"message\":\"x\",\"call\":\"{id}\"}}\n")),
                "{text}"
            );
        }
        let text = with_call(None, || line(LineFormat::Json, "x"));
        assert!(text.ends_with("\"message\":\"x\"}\n"), "{text}");
        assert!(line(LineFormat::Text, "x").ends_with("] x\n"));
    }

    #[test]
    fn a_json_line_is_json() {
        let value: serde_json::Value =
            serde_json::from_str(&line(LineFormat::Json, "a\n\"b\"")).unwrap();
        assert_eq!(value["message"], "a\n\"b\"");
        let text = line(LineFormat::Json, "\u{9b}31m\u{202e}");
        assert!(text.contains(r"\u009b31m\u202e"), "{text}");
        assert_eq!(value["level"], "WARN");
        assert_eq!(value["pid"], std::process::id());
    }
}
