//! Shows what a program may do before its workers are forked. It may open files in `main` and in
//! `on_master_start`, and use threads for a computation.
//!
//! Run `RECORDS=/tmp cargo run --example before_fork -- run`. Then
//! `preforkd call record '["main", "a line"]'` appends a line to `/tmp/main`. `THREADS` is the number
//! of threads. If `/tmp/slow` exists, each thread ends only some time after its scope has waited for it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use preforkd::{Context, RpcError, Server, StartError};

/// How long a slow thread continues after its scope has waited for it.
const SLOW_END: Duration = Duration::from_millis(300);

/// The files that are opened in `on_master_start`. All workers share them.
type Files = BTreeMap<&'static str, File>;

/// Sleeps when it is dropped. The thread-local values of a thread are dropped after its scope has waited
/// for the thread.
struct SlowEnd;

impl Drop for SlowEnd {
    fn drop(&mut self) {
        thread::sleep(SLOW_END);
    }
}

thread_local! {
    static AT_END: RefCell<Option<SlowEnd>> = const { RefCell::new(None) };
}

fn main() -> ExitCode {
    let main = record("main").expect("RECORDS names a directory that may be written to");
    Server::new()
        .on_master_start(open_files)
        .on_master_start(sum_with_threads)
        .method_with(
            "record",
            move |call: &Context<'_>, (name, line): (String, String)| {
                let files = call.state::<Files>();
                let mut file = files.get(&*name).unwrap_or(&main);
                let line = format!("{line}\n");
                file.write_all(line.as_bytes())
                    .map_err(|error| RpcError::new(500, error.to_string()))
            },
        )
        .method_with("sum", |call: &Context<'_>, ()| Ok(*call.state::<u64>()))
        .run()
}

fn path(name: &str) -> PathBuf {
    let directory = std::env::var_os("RECORDS").map_or_else(std::env::temp_dir, PathBuf::from);
    directory.join(name)
}

/// Opens a file for whole lines. With O_APPEND, no process overwrites the lines of another process.
fn record(name: &str) -> io::Result<File> {
    File::options().create(true).append(true).open(path(name))
}

fn open_files() -> Result<Files, StartError> {
    // Open it without O_CLOEXEC, as a C library may do.
    let flags = OFlag::O_CREAT | OFlag::O_APPEND | OFlag::O_WRONLY;
    let library = open(&path("library"), flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
    Ok(Files::from([
        ("hook", record("hook")?),
        ("library", library.into()),
    ]))
}

fn sum_with_threads() -> Result<u64, StartError> {
    let count = std::env::var("THREADS").map_or(Ok(0), |count| count.parse())?;
    let is_slow = path("slow").exists();
    let sum = AtomicU64::new(0);
    // The scope waits until the threads have finished their work, but not until they have ended.
    thread::scope(|scope| {
        for number in 1..=count {
            let sum = &sum;
            scope.spawn(move || {
                if is_slow {
                    AT_END.set(Some(SlowEnd));
                }
                sum.fetch_add(number, Relaxed);
            });
        }
    });
    Ok(sum.into_inner())
}
