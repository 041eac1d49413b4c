//! HTTP requests out of a connection's bytes: whole, and split in two at any place.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::http::{DecodedRequest, ParseProgress, RequestLimits, decode};

/// The requests at the head of the bytes, the status of the refusal that ended them, and how many
/// bytes they took.
fn requests(bytes: &[u8], split: usize) -> (Vec<(String, Vec<u8>)>, Option<u16>, usize) {
    let origins = ["https://a.example".to_owned()];
    let rules = RequestLimits {
        body: 100,
        origins: &origins,
        traces: true,
        request_ids: true,
        jobs: true,
    };
    let (mut found, mut at, mut progress) = (Vec::new(), 0, ParseProgress::default());
    for end in [split, bytes.len()] {
        loop {
            match decode(&bytes[at..end], &mut progress, &rules) {
                DecodedRequest::Whole { head, body, used } => {
                    assert!(used > 0 && at + used <= end && body.len() <= 100);
                    found.push((format!("{head:?}"), body.into_owned()));
                    at += used;
                }
                DecodedRequest::Blank { used } => at += used,
                DecodedRequest::Partial { .. } => break,
                DecodedRequest::Refused(refusal) => {
                    assert!((400..600).contains(&refusal.status) && !refusal.error.started);
                    return (found, Some(refusal.status), at);
                }
            }
        }
    }
    (found, None, at)
}

fuzz_target!(|input: &[u8]| {
    let Some((split, bytes)) = input.split_first_chunk::<2>() else {
        return;
    };
    let split = usize::from(u16::from_le_bytes(*split)) % (bytes.len() + 1);
    assert_eq!(requests(bytes, split), requests(bytes, 0));
});
