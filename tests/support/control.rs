//! The master's control socket, asked without a command in between.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use super::PATIENCE;

/// What `status --json` prints, once the master has closed the connection that it was asked on: who
/// looks at its descriptors next finds those that it has at rest.
#[track_caller]
pub fn status(socket: &Path) -> Value {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"{\"command\":\"status\"}\n").unwrap();
    let mut answers = BufReader::new(stream);
    let mut line = String::new();
    answers.read_line(&mut line).unwrap();
    let mut answer: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(answer["ok"], true, "{answer}");
    assert_eq!(
        answers.read(&mut [0]).unwrap(),
        0,
        "one answer, and the end"
    );
    answer["status"].take()
}
