//! Formats log lines and passes them to the output.
//!
//! env_logger makes the lines (levels, RUST_LOG) in one of three forms. They go to a `LogOutput`, which
//! never blocks and never fails. A line that cannot be written is counted, and the count is logged as
//! soon as writing works again. In a worker a thread writes the lines, so a slow disk or a full queue
//! loses lines but delays no call. The master has no second thread and writes its lines itself.

mod access_file;
mod control_peer;
mod members;
mod output;
mod panics;
mod partial_line;
mod record;
mod startup_forward;
mod text;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::Duration;

use crate::sys::lock::{lock, read, write};
use crate::sys::signal::with_signals_blocked;
use crossbeam_channel::{Sender, TrySendError, bounded};
use log::{LevelFilter, Log, Metadata, Record};

pub use access_file::{AccessFile, BATCH_BYTES, LINE_BYTES};
pub use control_peer::ControlPeer;
pub use members::with_members;
pub use output::LogOutput;
use output::LostLines;
pub use panics::{log_panics, rate_limit_panics};
use record::{COMMAND, MASTER, OBSERVER, ROLE, write_record};
pub use record::{LineFormat, LoggedCall, with_call};
pub use startup_forward::{
    LONGEST as LONGEST_FORWARDED, forwarding_fd, start_forwarding, stop_forwarding,
};
pub use text::{HumanDuration, escape_unprintable, pluralize, printable, printable_json};

/// The number of lines that may wait for a worker's writer thread.
const QUEUE: usize = 4096;

/// The configured form, for the one line that env_logger does not format.
static FORM: Mutex<LineFormat> = Mutex::new(LineFormat::Text);
static LOGGER: RwLock<Option<env_logger::Logger>> = RwLock::new(None);
static OUTPUT: Mutex<Option<LogOutput>> = Mutex::new(None);
static QUEUED: RwLock<Option<Sender<WriterCommand>>> = RwLock::new(None);
static LOST: LostLines = LostLines::new();
/// Whether the next line starts the writer thread.
static IS_WRITER_DUE: AtomicBool = AtomicBool::new(false);
/// The output again, for lines of the access log: these do not go through the queue, where they would displace
/// others. `Some` in processes that write such lines.
static BESIDE: Mutex<Option<LogOutput>> = Mutex::new(None);

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
    if let Some(beside) = lock(&BESIDE).as_mut()
        && let Ok(copy) = output.duplicate()
    {
        *beside = copy;
    }
    let before = lock_output().replace(output);
    let queued = read(&QUEUED);
    if let Some(queue) = queued.as_ref() {
        // A full queue wakes the thread as well.
        let _ = queue.try_send(WriterCommand::TakeOutput);
    }
    before
}

/// Returns whether the output is a file that was removed from this path.
pub fn is_output_removed(path: &Path) -> bool {
    let output = lock_output();
    output
        .as_ref()
        .is_some_and(|output| output.is_removed(path))
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

/// Marks this process as the observer. It unmaps the memory that it shares with other processes, so its log must not
/// use that.
pub fn init_observer_log() {
    ROLE.store(OBSERVER, Ordering::Relaxed);
    LOST.reset();
    if let Some(output) = lock_output().as_mut() {
        output.leave_shared_memory();
    }
}

/// Marks this process as the acceptor in `slot`. It has one thread, which also writes.
pub fn init_acceptor_log(slot: u16) {
    ROLE.store(i32::from(slot), Ordering::Relaxed);
    LOST.reset();
}

/// Marks this process as the worker in `slot` and starts the writer thread. If no thread can be created,
/// the thread that logs also writes, as in the master. `has_access` says whether lines of the access log go to the
/// log.
pub fn init_worker_log(slot: u16, has_access: bool) {
    init_session_log(slot, has_access);
    start_writer_if_due();
}

/// Marks this process as the session in `slot`. The writer thread starts with its first line, because most sessions
/// log none.
pub fn init_session_log(slot: u16, has_access: bool) {
    ROLE.store(i32::from(slot), Ordering::Relaxed);
    // The master reports its own lost lines.
    LOST.reset();
    if has_access {
        let copy = lock_output().as_ref().map(LogOutput::duplicate);
        *lock(&BESIDE) = copy.and_then(Result::ok);
    }
    IS_WRITER_DUE.store(true, Ordering::Release);
}

/// Starts the writer thread if that is still to be done.
fn start_writer_if_due() {
    if IS_WRITER_DUE.load(Ordering::Acquire) {
        // Other threads that log wait for the lock, so they find the queue.
        let mut queued = write(&QUEUED);
        if IS_WRITER_DUE.swap(false, Ordering::AcqRel) {
            *queued = start_writer();
        }
    }
}

/// Starts the writer thread. Returns its queue; `None` if no thread can be created.
fn start_writer() -> Option<Sender<WriterCommand>> {
    let mut output = lock_output().take()?;
    let spare = output.duplicate();
    let (sender, receiver) = bounded(QUEUE);
    let body = move || {
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
    };
    let builder = std::thread::Builder::new().name("log".into());
    // The thread inherits the signal mask. Signals are for the thread that waits for them.
    match with_signals_blocked(|| builder.stack_size(256 * 1024).spawn(body)) {
        Ok(_) => Some(sender),
        Err(_) => {
            *lock_output() = spare.ok();
            None
        }
    }
}

/// Writes a line of the access log at level info, with these members if lines are JSON. It waits for no thread.
/// Returns whether it was written.
pub fn write_access_line(text: &str, members: &str) -> bool {
    let form = *lock(&FORM);
    let mut line = Vec::new();
    with_members(members, || {
        let mut record = Record::builder();
        record.level(log::Level::Info);
        // Writing to memory cannot fail.
        let _ = write_record(
            &mut line,
            form,
            &record.args(format_args!("{text}")).build(),
        );
    });
    let mut output = lock(&BESIDE);
    let lost = LostLines::new();
    if let Some(output) = output.as_mut() {
        output.write_line(&line, &lost, notice);
    }
    output.is_some() && lost.unreported() == 0
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
    start_writer_if_due();
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
