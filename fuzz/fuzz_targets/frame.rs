//! Frames out of a connection's bytes: whole, and split in two at any place.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::frame::{self, DecodedFrame};

const LIMIT: usize = 1 << 16;

/// The bodies at the head of the bytes, how many bytes they took, and what stands behind them.
fn frames(bytes: &[u8]) -> (Vec<&[u8]>, usize, DecodedFrame<'_>) {
    let (mut bodies, mut at) = (Vec::new(), 0);
    loop {
        match frame::decode(&bytes[at..], LIMIT) {
            DecodedFrame::Whole { body, used } => {
                assert_eq!(used, body.len() + frame::HEADER);
                bodies.push(body);
                at += used;
            }
            last => return (bodies, at, last),
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((split, bytes)) = input.split_first_chunk::<2>() else {
        return;
    };
    let (bodies, used, last) = frames(bytes);
    match last {
        DecodedFrame::Partial { need } => assert!(need > bytes.len() - used),
        DecodedFrame::TooLarge { length } => assert!(length as usize > LIMIT),
        DecodedFrame::Whole { .. } => unreachable!("the loop above takes these"),
    }

    let split = usize::from(u16::from_le_bytes(*split)) % (bytes.len() + 1);
    let (mut in_two, first_used, _) = frames(&bytes[..split]);
    let (rest, ..) = frames(&bytes[first_used..]);
    in_two.extend(rest);
    assert_eq!(in_two, bodies);

    let mut written = Vec::new();
    for body in &bodies {
        let mark = frame::begin(&mut written);
        written.extend_from_slice(body);
        assert!(frame::finish(&mut written, mark));
    }
    assert_eq!(written, bytes[..used]);
});
