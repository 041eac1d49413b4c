//! Sends requests to the master's control socket without a command.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use super::PATIENCE;

/// Asks for the status.
pub const STATUS: &[u8] = b"{\"command\":\"status\"}\n";

/// Connects to the control socket.
#[track_caller]
pub fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Returns what `status --json` prints, after the master has closed the connection. So a later check of
/// its descriptors does not find that connection.
#[track_caller]
pub fn status(socket: &Path) -> Value {
    let mut stream = connect(socket);
    stream.write_all(STATUS).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let mut answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(answer["ok"], true, "{answer}");
    answer["status"].take()
}

/// Sends a request and returns the first line of the answer. It is for requests that the master answers
/// at once, while the command of that name waits for more.
#[track_caller]
pub fn ask(socket: &Path, request: &str) -> String {
    let mut stream = connect(socket);
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer.trim_end().to_owned()
}
