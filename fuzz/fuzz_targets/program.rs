//! What a pool program sends: frames, each an answer, the word that it is ready, or nothing of both;
//! whole, and split in two at any place.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::frame::{DecodedFrame, decode};
use preforkd::internals::program::{self, Sent};
use serde_json::value::RawValue;

const LIMIT: usize = 64;
const DEPTH: usize = 8;

/// What is made of all that has come, and whether the program is to be ended.
fn sent(bytes: &[u8], split: usize) -> (Vec<String>, bool) {
    let (mut found, mut at) = (Vec::new(), 0);
    for end in [split, bytes.len()] {
        loop {
            match decode(&bytes[at..end], LIMIT) {
                DecodedFrame::Whole { body, used } => {
                    at += used;
                    match program::read(body, DEPTH) {
                        Ok(sent) => found.push(told(sent)),
                        Err(why) => {
                            assert!(!why.is_empty());
                            return (found, true);
                        }
                    }
                }
                DecodedFrame::Partial { .. } => break,
                DecodedFrame::TooLarge { .. } => return (found, true),
            }
        }
    }
    (found, false)
}

/// An answer's result, and an error's data, are JSON on one line.
fn told(sent: Sent<'_>) -> String {
    let Sent::Answer(answer) = sent else {
        return "ready".to_owned();
    };
    let (name, outcome) = program::outcome(answer, "m");
    let json = match outcome {
        Ok(result) => String::from_utf8(result).expect("it was text"),
        Err(error) => error.data.map_or("null".to_owned(), |data| data.get().to_owned()),
    };
    assert!(!json.contains(['\n', '\r']));
    serde_json::from_str::<&RawValue>(&json).expect("it is JSON still");
    format!("{name:?} {json}")
}

fuzz_target!(|input: &[u8]| {
    let Some((split, bytes)) = input.split_first_chunk::<2>() else {
        return;
    };
    let split = usize::from(u16::from_le_bytes(*split)) % (bytes.len() + 1);
    assert_eq!(sent(bytes, split), sent(bytes, 0));
    // any bytes as one body
    if let Ok(answer) = program::read(bytes, DEPTH) {
        told(answer);
    }
});
