use std::time::Duration;

use proptest::prelude::*;

use super::super::attempt_frame::tests::any_attempt_frame;
use super::*;

/// Formats a frame for comparison, because `RpcError` has no equality.
fn shown(frame: &Frame<'_>) -> String {
    format!("{frame:?}")
}

fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), "[a-z\"\\\\é ]{0,40}"]
}

fn any_error() -> impl Strategy<Value = RpcError> {
    let code = prop_oneof![any::<i64>(), Just(Code::Timeout.number())];
    (code, any_text(), any::<bool>(), any::<bool>()).prop_map(|(code, message, started, data)| {
        RpcError {
            started,
            data: data.then(|| RawValue::from_string("[1, 2.50]".into()).unwrap()),
            ..RpcError::new(code, message)
        }
    })
}

fn any_trace() -> impl Strategy<Value = Option<TraceContext>> {
    let trace = (
        1..u128::MAX,
        1..u64::MAX,
        0..4_u8,
        "a=[0-9]{1,9}",
        any::<bool>(),
    );
    let trace = trace.prop_map(
        |(trace_id, parent_id, flags, state, has_state)| TraceContext {
            trace_id,
            parent_id,
            flags,
            state: has_state.then(|| state.into()),
        },
    );
    proptest::option::of(trace)
}

fn any_frame() -> impl Strategy<Value = Frame<'static>> {
    let call = (
        any::<(u64, u32, u64, u64)>(),
        proptest::option::of(any_text()),
        proptest::option::of(any::<(std::net::IpAddr, u16)>()),
        any_trace(),
        any_text(),
    )
        .prop_map(
            |((id, method, key, deadline_ms), client_id, peer, trace, params)| {
                Frame::Call(CallFrame {
                    id: CallId {
                        pid: method as i32,
                        number: id,
                    },
                    method,
                    key,
                    deadline_ms,
                    origin: CallOrigin {
                        client: method ^ 1,
                        accept_wait_ms: method,
                        read_ns: key,
                    },
                    client_id: client_id.map(Cow::Owned),
                    peer: peer.map(SocketAddr::from),
                    trace: trace.map(Cow::Owned),
                    params: Cow::Owned(params),
                })
            },
        );
    let answer = (
        (any::<(u64, u64)>(), any::<(i32, i32, u64, u64)>()),
        proptest::option::of(any_text()),
        prop_oneof![
            any_text().prop_map(|text| Ok(Cow::Owned(text.into_bytes()))),
            any_error().prop_map(|error| Err(Cow::Owned(error)))
        ],
    )
        .prop_map(|(((id, took_us), used), name, outcome)| {
            Frame::Answer(AnswerFrame {
                id,
                took_us,
                runner: CallRunner {
                    process: used.0,
                    program: used.1,
                    cpu: Duration::from_micros(used.2),
                    max_rss_bytes: used.3,
                },
                name: name.map(Cow::Owned),
                outcome,
            })
        });
    prop_oneof![
        call,
        answer,
        any::<u64>().prop_map(|id| Frame::Cancel { id }),
        any::<u64>().prop_map(|id| Frame::Returned { id }),
        Just(()).prop_map(|()| Frame::Leave),
        Just(()).prop_map(|()| Frame::LeaveNoted),
        Just(()).prop_map(|()| Frame::AnswerWaits),
        any::<(u16, u32, u32)>().prop_map(|(lane, count, short)| Frame::Offer {
            lane,
            count,
            short
        }),
        any_attempt_frame(any_trace()).prop_map(Frame::Attempt),
    ]
}

proptest! {
    #[test]
    fn frames_are_decoded_whole_and_in_order_from_every_split(
        frames in prop::collection::vec(any_frame(), 1..8),
        split in any::<prop::sample::Index>(),
    ) {
        let mut bytes = Vec::new();
        let mut ends = Vec::new();
        for frame in &frames {
            prop_assert!(frame.encode(&mut bytes));
            ends.push(bytes.len());
        }
        let part = &bytes[..split.index(bytes.len())];
        let (mut at, mut decoded) = (0, 0);
        while let DecodedCallFrame::Whole(_, used) = Frame::decode(&part[at..], 1000) {
            at += used;
            decoded += 1;
            prop_assert_eq!(at, ends[decoded - 1]);
        }
        prop_assert!(matches!(Frame::decode(&part[at..], 1000), DecodedCallFrame::Partial));
        let mut at = 0;
        for frame in &frames {
            let DecodedCallFrame::Whole(found, used) = Frame::decode(&bytes[at..], 1000) else {
                panic!("no frame at {at}");
            };
            prop_assert_eq!(shown(&found), shown(frame));
            at += used;
        }
    }

    #[test]
    fn no_bytes_are_read_beyond_their_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let DecodedCallFrame::Whole(_, used) = Frame::decode(&bytes, 1000) {
            prop_assert!(used <= bytes.len());
        }
    }

    #[test]
    fn a_damaged_frame_is_no_panic(
        frame in any_frame(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = Frame::decode(&bytes, 1000);
    }
}

#[test]
fn a_frame_of_more_than_the_limit_is_refused_by_its_length() {
    let mut bytes = (2_000_000_u32).to_le_bytes().to_vec();
    assert!(matches!(
        Frame::decode(&bytes, 1_000_000),
        DecodedCallFrame::Invalid
    ));
    bytes[..4].fill(0);
    assert!(matches!(
        Frame::decode(&bytes, 1_000_000),
        DecodedCallFrame::Invalid
    ));
}
