//! Requests to the observer: whole, and split in two at any place. The same requests are found either way.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::http::ParseProgress;
use preforkd::internals::http::get::{PageRefusal, PageRequest, decode_page};

/// The requests at the head of the bytes, and the refusal that ended them.
fn requests(bytes: &[u8], split: usize) -> (Vec<PageRequest>, Option<PageRefusal>) {
    let (mut found, mut at, mut progress) = (Vec::new(), 0, ParseProgress::default());
    for end in [split, bytes.len()] {
        loop {
            match decode_page(&bytes[at..end], &mut progress) {
                Ok(Some(request)) => {
                    assert!(request.used > 0 && at + request.used <= end);
                    assert!(request.path.starts_with('/') && request.path.is_ascii());
                    at += request.used;
                    found.push(request);
                }
                Ok(None) => break,
                Err(refusal) => {
                    assert!(matches!(refusal.status, 400 | 405 | 431 | 501 | 505));
                    return (found, Some(refusal));
                }
            }
        }
    }
    (found, None)
}

fuzz_target!(|input: &[u8]| {
    let Some((split, bytes)) = input.split_first_chunk::<2>() else {
        return;
    };
    let split = usize::from(u16::from_le_bytes(*split)) % (bytes.len() + 1);
    assert_eq!(requests(bytes, split), requests(bytes, 0));
});
