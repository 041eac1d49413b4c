#![allow(clippy::unwrap_used)]

use super::*;
use crate::protocol::Dialect;
use crate::protocol::body::Form;
use crate::protocol::http::HttpDate;
use crate::protocol::reply::Framing;

fn call(order: Option<u64>, id: Option<&str>, begun: bool) -> UnansweredCall {
    UnansweredCall {
        shape: AnswerFormat {
            form: Form::Plain,
            wrap: Framing::Line,
        },
        order,
        id: id.map(str::to_owned),
        begun,
        method: None,
        answered: false,
        end: 0,
        call: None,
        number: 1,
        read_ns: 0,
        received_bytes: 0,
        trace_id: 0,
    }
}

fn held(calls: Vec<UnansweredCall>) -> ConnectionSnapshot {
    ConnectionSnapshot {
        note: u32::from(adoption_queue::dialect_code(Some(Dialect::Line))),
        owed: false,
        unsent: Vec::new(),
        calls,
    }
}

/// Returns the answers to send first, and the unread bytes.
fn passed(fate: Recovery) -> (String, Range<usize>) {
    match fate {
        Recovery::PassOn { unsent, unread, .. } => (String::from_utf8(unsent).unwrap(), unread),
        other => panic!("{other:?}"),
    }
}

const HTTP: ResponseContext<'static> = ResponseContext {
    origins: &[],
    date: HttpDate(0),
};

fn judge_one(
    held: &ConnectionSnapshot,
    receiving: Option<Receiving>,
    sending: Option<Sending>,
) -> Recovery {
    decide(held, receiving, sending, HTTP)
}

#[test]
fn a_quiescent_connection_is_handed_over_unchanged() {
    let fate = judge_one(&held(Vec::new()), None, None);
    assert_eq!(
        fate,
        Recovery::PassOn {
            state: HandoffState {
                dialect: Some(Dialect::Line),
                idle_ms: 0,
                closing: false,
                needs_path: false,
            },
            unsent: Vec::new(),
            unread: 0..0,
            crashed: Vec::new(),
        }
    );
}

#[test]
fn a_connection_with_bytes_in_the_worker_only_is_reset() {
    for flag in [note::TAIL, note::UNKEPT] {
        let mut held = held(Vec::new());
        held.note |= flag;
        assert_eq!(judge_one(&held, None, None), Recovery::Reset);
    }
    let mut owing = held(Vec::new());
    owing.owed = true;
    assert_eq!(judge_one(&owing, None, None), Recovery::Reset);
}

#[test]
fn an_ended_or_handed_over_connection_is_only_closed() {
    for flag in [note::SHUT, note::GIVEN] {
        let mut held = held(Vec::new());
        held.note |= flag | note::TAIL;
        assert_eq!(judge_one(&held, None, None), Recovery::Close);
    }
}

#[test]
fn answers_are_in_order_and_say_whether_the_call_had_begun() {
    let calls = vec![
        call(Some(8), None, false),
        call(None, Some("\"x\""), true),
        call(Some(7), None, true),
    ];
    let (answers, _) = passed(judge_one(&held(calls), None, None));
    let lines: Vec<&str> = answers.lines().collect();
    assert_eq!(lines.len(), 3, "{answers}");
    assert!(lines[0].contains("\"started\":true") && lines[0].contains("\"id\":\"x\""));
    assert!(lines[1].contains("\"started\":true") && !lines[1].contains("\"id\""));
    assert!(lines[2].contains("\"started\":false"));
}

#[test]
fn an_answer_is_sent_once_wherever_the_worker_died() {
    let mut call = call(Some(0), None, true);
    call.answered = true;
    let sending = |sent| Some(Sending { length: 90, sent });
    let one = held(vec![call]);
    // The answer is among the bytes to be sent, and none of these was sent.
    let (answers, _) = passed(judge_one(&one, None, None));
    assert!(answers.contains("crashed"));
    let (answers, _) = passed(judge_one(&one, None, sending(Some(0))));
    assert!(answers.contains("crashed"));
    // The kernel has it.
    let (answers, _) = passed(judge_one(&one, None, sending(Some(90))));
    assert_eq!(answers, "");
    // The kernel has a part of it, or that is unknown.
    assert_eq!(judge_one(&one, None, sending(Some(5))), Recovery::Reset);
    assert_eq!(judge_one(&one, None, sending(None)), Recovery::Reset);
}

#[test]
fn adopted_answers_are_sent_once_wherever_the_worker_died() {
    let mut one = held(Vec::new());
    one.unsent = b"crashed\n".to_vec();
    let sending = |sent| Some(Sending { length: 8, sent });
    for not_sent in [None, sending(Some(0))] {
        let (answers, _) = passed(judge_one(&one, None, not_sent));
        assert_eq!(answers, "crashed\n");
    }
    let (answers, _) = passed(judge_one(&one, None, sending(Some(8))));
    assert_eq!(answers, "");
    assert_eq!(judge_one(&one, None, sending(Some(3))), Recovery::Reset);
    assert_eq!(judge_one(&one, None, sending(None)), Recovery::Reset);
}

#[test]
fn untaken_bytes_are_handed_over_and_those_of_a_taken_call_are_not() {
    let receiving = |taken, length| {
        Some(Receiving {
            start: 1000,
            taken,
            length,
        })
    };
    let none = held(Vec::new());
    let (_, unread) = passed(judge_one(&none, receiving(1000, Some(70)), None));
    assert_eq!(unread, 0..70);
    // Nothing was received.
    let (_, unread) = passed(judge_one(&none, receiving(1000, Some(0)), None));
    assert_eq!(unread, 0..0);
    // The journal entry of a call is written before the bytes of the call count as taken.
    let mut first = call(Some(3), None, false);
    first.end = 1030;
    let (answers, unread) = passed(judge_one(
        &held(vec![first]),
        receiving(1000, Some(70)),
        None,
    ));
    assert_eq!((unread, answers.lines().count()), (30..70, 1));
    // An older call from an earlier receive.
    let mut older = call(Some(3), None, false);
    older.end = 400;
    let (_, unread) = passed(judge_one(
        &held(vec![older]),
        receiving(1070, Some(70)),
        None,
    ));
    assert_eq!(unread, 70..70);
    // The number of received bytes is unknown, or lower than the number of taken bytes.
    assert_eq!(
        judge_one(&none, receiving(1000, None), None),
        Recovery::Reset
    );
    assert_eq!(
        judge_one(&none, receiving(1050, Some(40)), None),
        Recovery::Reset
    );
}

#[test]
fn a_closing_connection_says_so_in_its_last_answer() {
    let mut one = held(vec![call(Some(0), None, true), call(Some(1), None, true)]);
    one.note |= note::CLOSING;
    for call in &mut one.calls {
        call.shape.wrap = Framing::Http(Default::default());
    }
    let fate = judge_one(&one, None, None);
    assert!(matches!(fate, Recovery::PassOn { state, .. } if state.closing));
    let (answers, _) = passed(fate);
    assert_eq!(answers.matches("Connection: close").count(), 1, "{answers}");
    assert!(answers.rfind("HTTP/1.1 500") < answers.find("Connection: close"));
}
