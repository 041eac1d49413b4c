//! Frames of an internal link: what another process of the server sent.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::call_frame::{DecodedCallFrame, Frame};

const MAX_BODY: usize = 1 << 16;

fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    while let DecodedCallFrame::Whole(frame, used) = Frame::decode(rest, MAX_BODY) {
        let mut again = Vec::new();
        assert!(frame.encode(&mut again));
        let DecodedCallFrame::Whole(same, _) = Frame::decode(&again, MAX_BODY) else {
            panic!("{frame:?} is not read back");
        };
        assert_eq!(format!("{same:?}"), format!("{frame:?}"));
        rest = &rest[used..];
    }
});
