//! What the control socket carries, both ways: a request that a master reads, an answer that a command
//! reads.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::control::{ControlRequest, ControlResponse, to_line};

fn one_line(line: &[u8]) -> &[u8] {
    let (last, line) = line.split_last().expect("it is not empty");
    assert!(*last == b'\n' && !line.contains(&b'\n'));
    line
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = serde_json::from_slice::<ControlRequest>(bytes) {
        let line = to_line(&request).expect("a request can be written");
        let again: ControlRequest = serde_json::from_slice(one_line(&line)).expect("and read");
        assert_eq!(again, request);
    }
    if let Ok(response) = serde_json::from_slice::<ControlResponse>(bytes) {
        let line = to_line(&response).expect("an answer can be written");
        let again: ControlResponse = serde_json::from_slice(one_line(&line)).expect("and read");
        assert_eq!(again, response);
    }
});
