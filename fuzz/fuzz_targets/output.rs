//! What a command wrote: a result on one line of JSON or a sentence, and the end of its standard error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::config::OutputFormat;
use preforkd::internals::output::{self, Tail};
use preforkd::internals::answer;
use preforkd::internals::json;
use serde_json::value::RawValue;

const DEPTH: usize = 8;

fuzz_target!(|input: &[u8]| {
    let Some((piece, bytes)) = input.split_first() else {
        return;
    };
    // A byte order mark is passed over.
    let unmarked = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let readable = std::str::from_utf8(bytes).is_ok();
    for kind in [OutputFormat::Text, OutputFormat::Line, OutputFormat::Json] {
        let mut result = b"before".to_vec();
        match output::append(kind, bytes.to_vec(), (DEPTH, usize::MAX), &mut result) {
            Ok(()) => {
                let result = &result[6..];
                assert!(readable && !result.contains(&b'\n') && !result.contains(&b'\r'));
                let text = std::str::from_utf8(result).expect("a result is text");
                match kind {
                    OutputFormat::Text => {
                        let written: String = serde_json::from_str(text).expect("a string");
                        assert_eq!(written.as_bytes(), bytes);
                    }
                    OutputFormat::Line => {
                        let written: String = serde_json::from_str(text).expect("a string");
                        assert_eq!(written.as_bytes(), bytes.strip_suffix(b"\n").unwrap_or(bytes));
                    }
                    OutputFormat::Json => {
                        let result: serde_json::Value =
                            serde_json::from_str(text).unwrap_or_default();
                        let written: serde_json::Value =
                            serde_json::from_slice(unmarked).unwrap_or_default();
                        assert_eq!(result, written);
                    }
                }
                let mut out = Vec::new();
                answer::result(&mut out, "command", text, None);
                serde_json::from_slice::<&RawValue>(&out).expect("its answer is JSON");
            }
            Err(why) => {
                assert!(!why.is_empty() && result == b"before");
                match kind {
                    OutputFormat::Text | OutputFormat::Line => assert!(!readable),
                    OutputFormat::Json => assert!(
                        json::text(bytes, DEPTH).is_err()
                            || serde_json::from_slice::<&RawValue>(unmarked).is_err()
                    ),
                }
            }
        }
    }
    let mut tail = Tail::default();
    for piece in bytes.chunks(usize::from(*piece) * 37 + 1) {
        tail.add(piece);
    }
    let text = tail.into_text();
    let whole = String::from_utf8_lossy(bytes);
    if bytes.len() <= 4096 {
        assert_eq!(text, whole);
    } else {
        assert!(text.len() <= 3 * 4096);
        assert!(!readable || whole.ends_with(&text));
    }
});
