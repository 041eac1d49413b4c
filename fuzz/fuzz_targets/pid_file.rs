//! A pid file's content, whoever wrote it: a pid that may be, or none.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::pid_in;

fuzz_target!(|content: &[u8]| {
    if let Some(pid) = pid_in(content) {
        assert!(pid > 0);
        let digits = content.trim_ascii().strip_prefix(b"+");
        let digits = digits.unwrap_or(content.trim_ascii());
        assert!(content.len() > 32 || !digits.is_empty());
        assert_eq!(pid_in(format!("{pid}\n").as_bytes()), Some(pid));
    }
});
