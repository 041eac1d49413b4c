//! A packet of the adoption queue: what another worker sent, of this version or not.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::adoption_queue;
use preforkd::internals::memory_file;

fuzz_target!(|input: &[u8]| {
    let Some((by_file, packet)) = input.split_first() else {
        return;
    };
    match by_file & 1 {
        0 => {
            if let Some(taken) = adoption_queue::decode_packet(packet, None) {
                assert!(packet.ends_with(&taken.unread) && taken.unread.len() < packet.len());
            }
        }
        _ => {
            let (header, rest) = packet.split_at(packet.len().min(16));
            let file = memory_file::create(rest).expect("a file of memory");
            if let Some(taken) = adoption_queue::decode_packet(header, Some(file)) {
                assert_eq!([&*taken.unsent, &*taken.unread].concat(), rest);
            }
        }
    }
});
