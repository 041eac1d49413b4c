//! Lines out of a connection's bytes: whole, and split in two at any place.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::line::{DecodedLine, decode};

fn lines(bytes: &[u8], split: usize) -> (Vec<&[u8]>, bool) {
    let (mut found, mut at, mut scanned) = (Vec::new(), 0, 0);
    for (end, ended) in [(split, false), (bytes.len(), true)] {
        loop {
            match decode(&bytes[at..end], scanned, 64, ended) {
                DecodedLine::Whole { body, used } => {
                    assert!(!body.contains(&b'\n') && body.len() <= 64);
                    found.push(body);
                    (at, scanned) = (at + used, 0);
                }
                DecodedLine::Blank { used } => (at, scanned) = (at + used, 0),
                DecodedLine::Partial => {
                    scanned = end - at;
                    break;
                }
                DecodedLine::TooLarge => return (found, true),
            }
        }
    }
    (found, false)
}

fuzz_target!(|input: &[u8]| {
    let Some((split, bytes)) = input.split_first_chunk::<2>() else {
        return;
    };
    let split = usize::from(u16::from_le_bytes(*split)) % (bytes.len() + 1);
    assert_eq!(lines(bytes, split), lines(bytes, 0));
});
