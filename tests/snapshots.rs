//! Compares what clients and operators see with recorded files, byte for byte.
//!
//! `wire/` has transcripts of connections (format: [`transcript`]), `cli/` the output of the commands.
//! `PREFORKD_RECORD=1` writes the files again; record an intended change of behaviour in its own commit.
//! Texts that may be reworded are masked ([`mask`]).

mod cli;
mod transcript;
mod wire;

use std::fs;

use crate::support::{from_environment, source};

/// JSON members whose strings may change: prose, and the version.
const MASKED_MEMBERS: [&str; 4] = ["message", "detail", "error", "version"];

/// Replaces what may differ between runs or be reworded: the strings of [`MASKED_MEMBERS`] and the value
/// of a `Date` header. Expects the compact JSON that the server writes.
fn mask(bytes: &[u8]) -> Vec<u8> {
    let mut masked = bytes.to_vec();
    for name in MASKED_MEMBERS {
        let start = format!("\"{name}\":\"");
        masked = mask_between(&masked, start.as_bytes(), b'"');
    }
    mask_between(&masked, b"\r\nDate: ", b'\r')
}

/// Replaces the text between each `start` and the next unescaped `end` by `*`.
fn mask_between(bytes: &[u8], start: &[u8], end: u8) -> Vec<u8> {
    let mut masked = Vec::new();
    let mut rest = bytes;
    while let Some(at) = rest.windows(start.len()).position(|it| it == start) {
        let (before, after) = rest.split_at(at + start.len());
        masked.extend_from_slice(before);
        masked.push(b'*');
        let mut at = 0;
        while at < after.len() && after[at] != end {
            at += if after[at] == b'\\' { 2 } else { 1 };
        }
        rest = &after[at.min(after.len())..];
    }
    masked.extend_from_slice(rest);
    masked
}

/// Fails unless `tests/snapshots/NAME` has this text; or writes it, if requested.
#[track_caller]
fn assert_recorded(name: &str, text: &str) {
    let path = source().join("tests/snapshots").join(name);
    let recorded = fs::read_to_string(&path).unwrap_or_default();
    if recorded == text {
        return;
    }
    if from_environment("PREFORKD_RECORD", 0) != 0 {
        fs::write(path, text).unwrap();
        return;
    }
    panic!(
        "{name}: - is recorded, + is what came; PREFORKD_RECORD=1 records it\n{}",
        difference(&recorded, text)
    );
}

/// Returns the lines that differ, with one line before and after.
fn difference(old: &str, new: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    let mut shown = String::new();
    let (mut a, mut b) = (0, 0);
    while a < old.len() || b < new.len() {
        if old.get(a) == new.get(b) {
            (a, b) = (a + 1, b + 1);
            continue;
        }
        // The nearest pair of equal lines ends the difference.
        let far = old.len() - a + new.len() - b;
        let (skip, add) = (0..=far)
            .flat_map(|sum| (0..=sum).map(move |skip| (skip, sum - skip)))
            .find(|(skip, add)| old.get(a + skip) == new.get(b + add))
            .expect("both end");
        if let Some(before) = a.checked_sub(1) {
            shown += &format!("{:4}   {}\n", a, old[before]);
        }
        for line in &old[a..a + skip] {
            shown += &format!("     - {line}\n");
        }
        for line in &new[b..b + add] {
            shown += &format!("     + {line}\n");
        }
        (a, b) = (a + skip, b + add);
    }
    shown
}

#[test]
fn prose_is_masked_and_nothing_else() {
    let answer = br#"{"code":1,"message":"a \"b\" c","data":{"detail":"d\\"},"x":"message"}"#;
    let masked = br#"{"code":1,"message":"*","data":{"detail":"*"},"x":"message"}"#;
    assert_eq!(mask(answer), masked);
    let head = b"HTTP/1.1 200 OK\r\nDate: today\r\nX: y\r\n\r\n";
    assert_eq!(mask(head), b"HTTP/1.1 200 OK\r\nDate: *\r\nX: y\r\n\r\n");
    assert_eq!(mask(br#""message":"no end\"#), br#""message":"*"#);
}

#[test]
fn a_difference_shows_the_lines_that_differ() {
    let shown = difference("a\nb\nc\nd\n", "a\nx\nc\nd\ne\n");
    assert_eq!(shown, "   1   a\n     - b\n     + x\n   4   d\n     + e\n");
}
