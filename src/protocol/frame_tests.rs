//! Tests frames in every split, and lengths of every size.
use super::*;
use proptest::prelude::*;

const LIMIT: usize = 1 << 16;

#[test]
fn a_length_over_the_limit_is_refused_after_four_bytes() {
    let limit = 16;
    for length in [17, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF_u32] {
        let bytes = length.to_le_bytes();
        assert_eq!(decode(&bytes, limit), DecodedFrame::TooLarge { length });
    }
    assert_eq!(
        decode(&16_u32.to_le_bytes(), limit),
        DecodedFrame::Partial { need: 20 }
    );
}

#[test]
fn an_empty_body_is_a_frame() {
    assert_eq!(
        decode(&[0; 4], 16),
        DecodedFrame::Whole { body: &[], used: 4 }
    );
    assert_eq!(decode(&[], 16), DecodedFrame::Partial { need: 4 });
    assert_eq!(decode(&[0; 3], 16), DecodedFrame::Partial { need: 4 });
}

#[test]
fn a_frame_is_appended_to_existing_bytes() {
    let mut out = b"before".to_vec();
    let mark = begin(&mut out);
    out.extend_from_slice(b"{}");
    assert!(finish(&mut out, mark));
    assert_eq!(out, b"before\x02\0\0\0{}");
}

/// Feeds a decoder like a connection: some bytes at a time, keeping an unfinished tail.
fn bodies(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
    let (mut kept, mut bodies) = (Vec::new(), Vec::new());
    for chunk in chunks {
        kept.extend_from_slice(chunk);
        let mut at = 0;
        while let DecodedFrame::Whole { body, used } = decode(&kept[at..], LIMIT) {
            bodies.push(body.to_vec());
            at += used;
        }
        kept.drain(..at);
    }
    assert!(kept.is_empty(), "{} bytes left over", kept.len());
    bodies
}

proptest! {
    #[test]
    fn any_split_of_the_bytes_gives_the_same_frames(
        sent in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 0..6),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let mut bytes = Vec::new();
        for body in &sent {
            let mark = begin(&mut bytes);
            bytes.extend_from_slice(body);
            finish(&mut bytes, mark);
        }
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let chunks: Vec<_> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
        prop_assert_eq!(&bodies(&chunks), &sent);
        let single: Vec<_> = bytes.chunks(1).collect();
        prop_assert_eq!(&bodies(&single), &sent);
    }

    #[test]
    fn a_partial_frame_needs_exactly_the_missing_bytes(bytes in prop::collection::vec(0..4_u8, 0..40)) {
        if let DecodedFrame::Partial { need } = decode(&bytes, LIMIT) {
            prop_assert!(need > bytes.len());
            let mut longer = bytes.clone();
            longer.resize(need, 0);
            if need > HEADER {
                let whole = matches!(decode(&longer, LIMIT), DecodedFrame::Whole { used, .. } if used == need);
                prop_assert!(whole);
            }
        }
    }
}

#[test]
fn text_in_place_of_a_length_is_named() {
    let length = u32::from_le_bytes(*b"logg");
    let said = too_large(length, 64);
    assert!(said.starts_with("a frame of 1734831980 bytes; limits.frame allows 64; "));
    assert!(said.contains("\"logg\""), "{said}");
    assert_eq!(
        too_large(65, 64),
        "a frame of 65 bytes; limits.frame allows 64"
    );
}
