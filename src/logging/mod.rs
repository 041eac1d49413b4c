//! The log: what a line looks like, and where it goes.
//!
//! Lines are made by env_logger (levels, RUST_LOG) in one of three forms and go to an `LogOutput`
//! that never blocks and never fails: a line that can't be written is counted, and the count is
//! written as soon as something can be. In a worker a thread does the writing, so that a slow disk
//! or a full queue costs lines and never a call; the master, which has no second thread, writes
//! for itself.

mod output;
mod panics;
mod partial_line;
mod startup_forward;
mod text;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Sender, TrySendError, bounded};
use log::{LevelFilter, Log, Metadata, Record};
use serde::Serialize;

pub use output::LogOutput;
pub use panics::{log_panics, rate_limit_panics};
pub use startup_forward::{
    LONGEST as LONGEST_TOLD, forwarding_fd, start_forwarding, stop_forwarding,
};
pub use text::{escape_unprintable, pluralize, printable, printable_json};

/// Lines that wait for the writing thread of a worker.
const QUEUE: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineFormat {
    /// Time, level, who, message.
    Text,
    /// The same without the time, behind the priority that journald reads (sd-daemon(3)).
    Journal,
    Json,
}

/// Who writes, for every line of this process.
static ROLE: AtomicI32 = AtomicI32::new(COMMAND);
const COMMAND: i32 = -2;
const MASTER: i32 = -1;
/// From here on the slots of pool processes; see `link::ids::Slot`.
const FIRST_POOL: i32 = 0x8000;

/// The form that is configured, for the one line that no logger makes.
static FORM: Mutex<LineFormat> = Mutex::new(LineFormat::Text);
static LOGGER: RwLock<Option<env_logger::Logger>> = RwLock::new(None);
static OUTPUT: Mutex<Option<LogOutput>> = Mutex::new(None);
static QUEUED: RwLock<Option<Sender<WriterCommand>>> = RwLock::new(None);
static LOST: AtomicU64 = AtomicU64::new(0);

/// What the writing thread is asked to do.
enum WriterCommand {
    Line(Vec<u8>),
    /// The output has changed: the old one is let go, though nothing is to be written.
    TakeOutput,
    /// Answered when everything before it was written.
    Flush(Sender<()>),
}

/// Hands each record to the logger that is configured now: it can change at a reload, and the
/// log crate takes one logger for life.
struct ReloadableLogger;

impl Log for ReloadableLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let logger = LOGGER.read().unwrap_or_else(PoisonError::into_inner);
        logger
            .as_ref()
            .is_some_and(|logger| logger.enabled(metadata))
    }

    fn log(&self, record: &Record<'_>) {
        let logger = LOGGER.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(logger) = logger.as_ref() {
            logger.log(record);
        }
        startup_forward::pass_on(record);
    }

    fn flush(&self) {}
}

/// Sets level and form, at start and at each reload. RUST_LOG, where it is set, wins over
/// `level`.
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
    *FORM.lock().unwrap_or_else(PoisonError::into_inner) = form;
    *LOGGER.write().unwrap_or_else(PoisonError::into_inner) = Some(logger);
    // Refused from the second time on: it is set already.
    let _ = log::set_logger(&ReloadableLogger);
}

/// Where lines go from now on, in the master and in whatever is forked from it; returns where they
/// went before. In a worker its writing thread takes the output over, and closes the old one: a file that
/// was rotated away takes its space as long as one process has it open.
pub fn set_output(output: LogOutput) -> Option<LogOutput> {
    let before = lock_output().replace(output);
    let queued = QUEUED.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(queue) = queued.as_ref() {
        // A full queue wakes the thread as well.
        let _ = queue.try_send(WriterCommand::TakeOutput);
    }
    before
}

/// Logs nothing from now on, and closes nothing: for a keeper, whose worker closes the descriptor at
/// a rotation and gives the number to something else.
pub fn forget_output() {
    std::mem::forget(lock_output().take());
}

/// Opens a log file to append to, or standard error where there is none.
///
/// # Errors
/// When the file can't be opened.
pub fn open(file: Option<&Path>) -> io::Result<LogOutput> {
    match file {
        Some(file) => {
            let output = LogOutput::file(file)?;
            if ROLE.load(Ordering::Relaxed) == COMMAND {
                // At the start: nobody of this server writes yet.
                output.look_at_end();
            }
            Ok(output)
        }
        None => LogOutput::standard_error(),
    }
}

/// Whether standard error goes to journald: JOURNAL_STREAM names its device and inode
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

/// The descriptor that lines are written to by this process itself, for a list of what to keep.
pub fn output_descriptor() -> Option<RawFd> {
    lock_output()
        .as_ref()
        .map(|output| output.as_fd().as_raw_fd())
}

/// From now on this process is the master.
pub fn init_master_log() {
    ROLE.store(MASTER, Ordering::Relaxed);
}

/// From now on this process is the worker in `slot`; starts the thread that writes. Without a
/// thread to be had, lines are written by whoever logs, as in the master.
pub fn init_worker_log(slot: u16) {
    ROLE.store(i32::from(slot), Ordering::Relaxed);
    // What the master has lost is the master's to tell.
    LOST.store(0, Ordering::Relaxed);
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
        Ok(_) => *QUEUED.write().unwrap_or_else(PoisonError::into_inner) = Some(sender),
        Err(_) => *lock_output() = spare.ok(),
    }
}

/// Waits, at most `limit`, until what was logged is written: the last thing before `_exit`.
pub fn flush(limit: Duration) {
    let queued = QUEUED.read().unwrap_or_else(PoisonError::into_inner);
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

/// Lines of this process that are lost, and not told of in the log: it can't be written now.
pub fn lost_lines() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// Tells of lost lines, if that can be done by now; else the next line does.
pub fn report_lost_lines() {
    if lost_lines() > 0 {
        submit(Vec::new());
    }
}

fn lock_output() -> std::sync::MutexGuard<'static, Option<LogOutput>> {
    OUTPUT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has a line written, or counts it as lost. An empty one tells of those that are.
fn submit(line: Vec<u8>) {
    let counts = u64::from(!line.is_empty());
    let queued = QUEUED.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(queue) = queued.as_ref() {
        if let Err(TrySendError::Full(_)) = queue.try_send(WriterCommand::Line(line)) {
            LOST.fetch_add(counts, Ordering::Relaxed);
        }
    } else if let Some(output) = lock_output().as_mut() {
        output.write_line(&line, &LOST, notice);
    }
}

/// What env_logger writes to: always takes the line.
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
}

fn write_record(to: &mut impl Write, form: LineFormat, record: &Record<'_>) -> io::Result<()> {
    let slot = ROLE.load(Ordering::Relaxed);
    let current = std::thread::current();
    let (role, thread) = match (slot, current.name()) {
        (COMMAND, thread) => ("command", thread),
        (MASTER, thread) => ("master", thread),
        (FIRST_POOL.., Some("main") | None) => ("pool", Some("loop")),
        (FIRST_POOL.., thread) => ("pool", thread),
        (_, Some("main") | None) => ("worker", Some("loop")),
        (_, thread) => ("worker", thread),
    };
    let thread = thread.unwrap_or("main");
    let slot = (slot >= 0).then_some(slot % FIRST_POOL);
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
        };
        let line = serde_json::to_string(&line)?;
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
    writeln!(to, " {thread}] {}", printable(&record.args().to_string()))
}

/// The line that tells of lost ones. Written whatever the level, for nobody knows what is missing.
fn notice(missing: u64) -> Vec<u8> {
    let form = *FORM.lock().unwrap_or_else(PoisonError::into_inner);
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
    // Into memory: it can't fail.
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
