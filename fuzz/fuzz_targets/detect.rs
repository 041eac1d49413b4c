//! The dialect of a connection by its first bytes, and its bytes read as that: the same however they are
//! split, and never as two dialects.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::detect::{self, Dialect, FRAME_LIMIT_MAX};
use preforkd::internals::{frame, http, line};

const LIMIT: usize = 1 << 12;

/// The slow way to say the same.
fn judged(first: [u8; 4]) -> Dialect {
    if u32::from_le_bytes(first) < 0x0900_0000 {
        return Dialect::Frame;
    }
    match first {
        [0xEF, 0xBB, 0xBF, b' ' | b'\t' | b'\n' | b'\r' | b'{' | b'['] => return Dialect::Line,
        _ => {}
    }
    match first[0] {
        b' ' | b'\t' | b'\n' | b'\r' | b'{' | b'[' => return Dialect::Line,
        _ => {}
    }
    let methods = [
        "GET ", "HEAD ", "POST ", "PUT ", "DELETE ", "CONNECT ", "OPTIONS ", "TRACE ", "PATCH ",
        "PRI ",
    ];
    match methods.iter().any(|name| name.as_bytes()[..4] == first) {
        true => Dialect::Http,
        false => Dialect::Unknown,
    }
}

/// How many bodies some bytes have in a dialect, and whether a rule was broken behind them.
fn bodies(dialect: Dialect, bytes: &[u8], split: usize) -> (usize, bool) {
    let rules = http::RequestLimits {
        body: LIMIT,
        origins: &[],
        traces: true,
        request_ids: true,
        jobs: true,
    };
    let (mut found, mut at, mut scanned) = (0, 0, 0);
    let mut progress = http::ParseProgress::default();
    for (end, ended) in [(split, false), (bytes.len(), true)] {
        loop {
            let rest = &bytes[at..end];
            let (body, used) = match dialect {
                Dialect::Frame => match frame::decode(rest, LIMIT) {
                    frame::DecodedFrame::Whole { used, .. } => (true, used),
                    frame::DecodedFrame::Partial { .. } => break,
                    frame::DecodedFrame::TooLarge { .. } => return (found, true),
                },
                Dialect::Line => match line::decode(rest, scanned, LIMIT, ended) {
                    line::DecodedLine::Whole { used, .. } => (true, used),
                    line::DecodedLine::Blank { used } => (false, used),
                    line::DecodedLine::Partial => {
                        scanned = rest.len();
                        break;
                    }
                    line::DecodedLine::TooLarge => return (found, true),
                },
                Dialect::Http => match http::decode(rest, &mut progress, &rules) {
                    http::DecodedRequest::Whole { used, .. } => (true, used),
                    http::DecodedRequest::Blank { used } => (false, used),
                    http::DecodedRequest::Partial { .. } => break,
                    http::DecodedRequest::Refused(_) => return (found, true),
                },
                Dialect::Unknown => return (0, true),
            };
            assert!(used > 0 && at + used <= end);
            (found, at, scanned) = (found + usize::from(body), at + used, 0);
        }
    }
    (found, false)
}

fuzz_target!(|input: &[u8]| {
    let Some((split, bytes)) = input.split_first_chunk::<2>() else {
        return;
    };
    let Some(first) = bytes.first_chunk::<4>() else {
        return;
    };
    let dialect = detect::detect(*first);
    assert_eq!(dialect, judged(*first));
    match dialect {
        Dialect::Frame => assert!(first[3] < 9 && !detect::is_line(first[3])),
        _ => assert!(u32::from_le_bytes(*first) as usize > FRAME_LIMIT_MAX),
    }
    assert_eq!(
        dialect == Dialect::Line,
        first[3] > 8 && detect::is_line(first[0])
    );
    // A dialect is told once four bytes are there; the rest comes in any pieces.
    let split = 4 + usize::from(u16::from_le_bytes(*split)) % (bytes.len() - 3);
    assert_eq!(bodies(dialect, bytes, split), bodies(dialect, bytes, 4));
});
