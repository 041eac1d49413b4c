//! Formats log lines and passes them to the output.
//!
//! env_logger makes the lines (levels, RUST_LOG) in one of three forms. They go to a `LogOutput`, which
//! never blocks and never fails. A line that cannot be written is counted, and the count is logged as
//! soon as writing works again. In a worker a thread writes the lines, so a slow disk or a full queue
//! loses lines but delays no call. The master has no second thread and writes its lines itself.

mod members;
mod output;
mod panics;
mod partial_line;
mod startup_forward;
mod text;

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, SystemTime};

use crate::sys::lock::{lock, read, write};
use crossbeam_channel::{Sender, TrySendError, bounded};
use log::{LevelFilter, Log, Metadata, Record};
use serde::Serialize;

pub use members::with_members;
pub use output::LogOutput;
use output::LostLines;
pub use panics::{log_panics, rate_limit_panics};
pub use startup_forward::{
    LONGEST as LONGEST_TOLD, forwarding_fd, start_forwarding, stop_forwarding,
};
pub use text::{HumanDuration, escape_unprintable, pluralize, printable, printable_json};

/// The number of lines that may wait for a worker's writer thread.
const QUEUE: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineFormat {
    /// Time, level, role, message.
    Text,
    /// The same without the time. It begins with the priority that journald reads (sd-daemon(3)).
    Journal,
    Json,
}

/// The role of this process, which is part of each line.
static ROLE: AtomicI32 = AtomicI32::new(COMMAND);
const COMMAND: i32 = -2;
const OBSERVER: i32 = -3;
const MASTER: i32 = -1;
/// Slots of processes of other kinds start here; see `link::ids::Slot`.
const FIRST_POOL: i32 = 0x8000;
const FIRST_ACCEPTOR: i32 = 0xC000;
const FIRST_SESSION: i32 = 0xD000;

/// The configured form, for the one line that env_logger does not format.
static FORM: Mutex<LineFormat> = Mutex::new(LineFormat::Text);
static LOGGER: RwLock<Option<env_logger::Logger>> = RwLock::new(None);
static OUTPUT: Mutex<Option<LogOutput>> = Mutex::new(None);
static QUEUED: RwLock<Option<Sender<WriterCommand>>> = RwLock::new(None);
static LOST: LostLines = LostLines::new();

/// A command to the writer thread.
enum WriterCommand {
    Line(Vec<u8>),
    /// The output was replaced: close the old one, even if no line follows.
    TakeOutput,
    /// Reply when all earlier lines are written.
    Flush(Sender<()>),
}

/// Passes each record to the logger that is configured now. A reload can change that logger, but the log
/// crate accepts only one per process.
struct ReloadableLogger;

impl Log for ReloadableLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let logger = read(&LOGGER);
        logger
            .as_ref()
            .is_some_and(|logger| logger.enabled(metadata))
    }

    fn log(&self, record: &Record<'_>) {
        let logger = read(&LOGGER);
        if let Some(logger) = logger.as_ref() {
            logger.log(record);
        }
        startup_forward::pass_on(record);
    }

    fn flush(&self) {}
}

/// Sets level and form, at start and at each reload. RUST_LOG, if set, overrides `level`.
pub fn configure(level: LevelFilter, form: LineFormat) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level);
    if let Ok(filters) = std::env::var("RUST_LOG") {
        builder.parse_filters(&filters);
    }
    builder.target(env_logger::Target::Pipe(Box::new(QueueWriter)));
    builder.format(move |buffer, record| write_record(buffer, form, record));
    let logger = builder.build();
    log::set_max_level(logger.filter());
    *lock(&FORM) = form;
    *write(&LOGGER) = Some(logger);
    // Fails from the second call on, because it is already set.
    let _ = log::set_logger(&ReloadableLogger);
}

/// Sets the output of this process and of its future children; returns the previous one. In a worker the
/// writer thread takes the new output and closes the old one. A rotated file uses disk space until the
/// last process closes it.
pub fn set_output(output: LogOutput) -> Option<LogOutput> {
    let before = lock_output().replace(output);
    let queued = read(&QUEUED);
    if let Some(queue) = queued.as_ref() {
        // A full queue wakes the thread as well.
        let _ = queue.try_send(WriterCommand::TakeOutput);
    }
    before
}

/// Logs nothing from now on and closes nothing. It is for a keeper: at a rotation its worker closes the
/// descriptor, and the number is reused.
pub fn forget_output() {
    std::mem::forget(lock_output().take());
}

/// Logs nothing from now on and closes the output.
pub fn close_output() {
    drop(lock_output().take());
}

/// Opens a log file for appending, or standard error if `file` is `None`.
///
/// # Errors
/// If the file cannot be opened.
pub fn open(file: Option<&Path>) -> io::Result<LogOutput> {
    match file {
        Some(file) => {
            let output = LogOutput::file(file)?;
            if ROLE.load(Ordering::Relaxed) == COMMAND {
                // At the start, no other process of this server writes to the file yet.
                output.look_at_end();
            }
            Ok(output)
        }
        None => LogOutput::standard_error(),
    }
}

/// Returns whether standard error goes to journald: JOURNAL_STREAM names its device and inode
/// (systemd.exec(5)).
pub fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    io::stderr()
        .as_fd()
        .try_clone_to_owned()
        .and_then(|fd| File::from(fd).metadata())
        .is_ok_and(|found| stream == format!("{}:{}", found.dev(), found.ino()))
}

/// Returns the descriptor that this process writes lines to, for a list of descriptors to keep.
pub fn output_descriptor() -> Option<RawFd> {
    lock_output()
        .as_ref()
        .map(|output| output.as_fd().as_raw_fd())
}

/// Marks this process as the master.
pub fn init_master_log() {
    ROLE.store(MASTER, Ordering::Relaxed);
}

/// Marks this process as the observer.
pub fn init_observer_log() {
    ROLE.store(OBSERVER, Ordering::Relaxed);
    LOST.reset();
}

/// Marks this process as the acceptor in `slot`. It has one thread, which also writes.
pub fn init_acceptor_log(slot: u16) {
    ROLE.store(i32::from(slot), Ordering::Relaxed);
    LOST.reset();
}

/// Marks this process as the worker in `slot` and starts the writer thread. If no thread can be created,
/// the thread that logs also writes, as in the master.
pub fn init_worker_log(slot: u16) {
    ROLE.store(i32::from(slot), Ordering::Relaxed);
    // The master reports its own lost lines.
    LOST.reset();
    let Some(mut output) = lock_output().take() else {
        return;
    };
    let spare = output.duplicate();
    let (sender, receiver) = bounded(QUEUE);
    let writer = std::thread::Builder::new()
        .name("log".into())
        .stack_size(256 * 1024)
        .spawn(move || {
            for order in receiver {
                if let Some(other) = lock_output().take() {
                    output = other;
                }
                match order {
                    WriterCommand::Line(line) => output.write_line(&line, &LOST, notice),
                    WriterCommand::TakeOutput => {}
                    WriterCommand::Flush(done) => drop(done.send(())),
                }
            }
        });
    match writer {
        Ok(_) => *write(&QUEUED) = Some(sender),
        Err(_) => *lock_output() = spare.ok(),
    }
}

/// Waits, at most `limit`, until all logged lines are written. This is the last step before `_exit`.
pub fn flush(limit: Duration) {
    let queued = read(&QUEUED);
    if let Some(queue) = queued.as_ref() {
        let (done, wait) = bounded(1);
        if queue
            .send_timeout(WriterCommand::Flush(done), limit)
            .is_ok()
        {
            let _ = wait.recv_timeout(limit);
        }
    }
}

/// Returns the number of lost lines that are not reported yet, because the log cannot be written.
pub fn lost_lines() -> u64 {
    LOST.unreported()
}

/// Returns the number of lines that this process has lost since the last call, or since it began to log.
pub fn take_uncounted_lines() -> u64 {
    LOST.take_uncounted()
}

/// Reports lost lines if the log can be written now; otherwise the next line does.
pub fn report_lost_lines() {
    if lost_lines() > 0 {
        submit(Vec::new());
    }
}

fn lock_output() -> std::sync::MutexGuard<'static, Option<LogOutput>> {
    lock(&OUTPUT)
}

/// Writes a line, or counts it as lost. An empty line only reports lost ones.
fn submit(line: Vec<u8>) {
    let counts = u64::from(!line.is_empty());
    let queued = read(&QUEUED);
    if let Some(queue) = queued.as_ref() {
        if let Err(TrySendError::Full(_)) = queue.try_send(WriterCommand::Line(line)) {
            LOST.add(counts);
        }
    } else if let Some(output) = lock_output().as_mut() {
        output.write_line(&line, &LOST, notice);
    }
}

/// The target of env_logger: accepts every line.
struct QueueWriter;

impl Write for QueueWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        submit(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A call, as lines name it: the pid of the process with its connection, 0 for this one, and its number there.
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

/// What the process in a slot is, and the first slot of its kind.
fn role_of(slot: i32) -> (&'static str, i32) {
    match slot {
        FIRST_SESSION.. => ("connection", FIRST_SESSION),
        FIRST_ACCEPTOR.. => ("acceptor", FIRST_ACCEPTOR),
        FIRST_POOL.. => ("pool", FIRST_POOL),
        _ => ("worker", 0),
    }
}

fn write_record(to: &mut impl Write, form: LineFormat, record: &Record<'_>) -> io::Result<()> {
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
    let slot = (slot >= 0).then(|| slot - role_of(slot).1);
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

/// Returns the line that reports lost lines. It is written at every level, because the lost lines may be
/// of any level.
fn notice(missing: u64) -> Vec<u8> {
    let form = *lock(&FORM);
    let mut line = Vec::new();
    let written = write_record(
        &mut line,
        form,
        &{ Record::builder() }
            .level(log::Level::Warn)
            .args(format_args!(
                "{missing} log lines were lost: the log could not be written"
            ))
            .build(),
    );
    // Writing to memory cannot fail.
    debug_assert!(written.is_ok());
    line
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
