//! What a worker knows of its stuck calls and the master can't see: which method, of which id, on which thread.
//!
//! It crosses beside the report as a small file of memory. The master reads it with care, for a
//! child is never trusted: what is too long or no such list is no list.

use std::io;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use crate::sys::socket;

/// Calls that are told of; a worker may have more threads.
pub const MOST: usize = 32;
/// Characters of an id that are told.
const LONGEST_ID: usize = 64;
/// Bytes of a file: each call has a method's name, an id and three numbers.
const MOST_BYTES: u64 = 64 * 1024;

/// A call that runs past its deadline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StuckCall {
    /// The thread that runs it; 0 if that is not known.
    pub thread: i32,
    /// Its method.
    pub method: String,
    /// Its id as JSON, if it has one; a long one is cut.
    pub id: Option<String>,
    /// For how long it has been in the worker, in milliseconds.
    pub age_ms: u64,
}

/// Puts them into a file.
///
/// # Errors
/// When there is no descriptor or no memory left.
pub fn pack(calls: &[StuckCall]) -> io::Result<OwnedFd> {
    let mut calls: Vec<StuckCall> = calls.iter().take(MOST).cloned().collect();
    for id in calls.iter_mut().filter_map(|call| call.id.as_mut()) {
        if let Some((end, _)) = id.char_indices().nth(LONGEST_ID) {
            id.truncate(end);
        }
    }
    socket::memory_file(&serde_json::to_vec(&calls)?)
}

/// Reads them back; `None` when it is no such file.
pub fn unpack(file: OwnedFd) -> Option<Vec<StuckCall>> {
    let bytes = socket::read_memory_file(file, MOST_BYTES).ok()?;
    serde_json::from_slice(&bytes).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn calls_cross_in_a_file_and_what_is_none_does_not() {
        let call = StuckCall {
            thread: 42,
            method: "hang".into(),
            id: Some("\"é\"".into()),
            age_ms: 1_250,
        };
        assert_eq!(
            unpack(pack(std::slice::from_ref(&call)).unwrap()),
            Some(vec![call.clone()])
        );
        let long = StuckCall {
            id: Some("é".repeat(5_000)),
            ..call
        };
        let back = unpack(pack(&vec![long; 1_000]).unwrap()).unwrap();
        assert_eq!(
            (back.len(), back[0].id.as_ref().unwrap().chars().count()),
            (MOST, LONGEST_ID)
        );
        assert_eq!(unpack(socket::memory_file(b"[{}]").unwrap()), None);
        assert_eq!(unpack(socket::memory_file(&[b' '; 100_000]).unwrap()), None);
        let (reader, _writer) = io::pipe().unwrap();
        assert_eq!(unpack(reader.into()), None, "which would never end");
    }
}
