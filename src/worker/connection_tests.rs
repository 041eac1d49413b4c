#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

fn connection() -> Connection {
    Connection::new(Token::for_test(1), None, Source::Unknown, 0)
}

/// Answers as the worker does: writes the answer if it is next, otherwise keeps it.
fn answer(connection: &mut Connection, place: AnswerPosition, byte: u8, out: &mut Vec<u8>) {
    if connection.is_next(place) {
        out.push(byte);
        connection.answered(place, out, |_| {});
    } else {
        connection.queue_answer(place, vec![byte], CallRef::default());
    }
}

#[test]
fn answers_without_an_id_keep_their_order_and_those_with_one_overtake() {
    let mut connection = connection();
    let first = connection.take(false);
    let with_id = connection.take(true);
    let second = connection.take(false);
    let mut out = Vec::new();
    answer(&mut connection, second, b'2', &mut out);
    answer(&mut connection, with_id, b'i', &mut out);
    assert_eq!(out, b"i");
    answer(&mut connection, first, b'1', &mut out);
    assert_eq!(out, b"i12");
    assert!(connection.is_quiescent());
}

#[test]
fn held_answers_count_towards_the_high_water_mark() {
    let mut connection = connection();
    let _first = connection.take(false);
    let second = connection.take(false);
    assert!(connection.takes_calls(1024, 0));
    connection.queue_answer(second, vec![0; HIGH_WATER], CallRef::default());
    assert!(!connection.takes_calls(1024, 0));
}

#[test]
fn no_more_calls_than_the_pipeline_are_taken() {
    let mut connection = connection();
    connection.take(true);
    assert!(connection.takes_calls(2, HIGH_WATER - 1));
    assert!(!connection.takes_calls(2, HIGH_WATER));
    connection.take(true);
    assert!(!connection.takes_calls(2, 0));
}

proptest! {
    #[test]
    fn answers_are_sent_in_the_order_of_the_calls(
        order in Just((0..40_u8).collect::<Vec<_>>()).prop_shuffle()
    ) {
        let mut connection = connection();
        let places: Vec<AnswerPosition> = (0..40).map(|_| connection.take(false)).collect();
        let mut out = Vec::new();
        for number in order {
            answer(&mut connection, places[usize::from(number)], number, &mut out);
        }
        prop_assert_eq!(out, (0..40_u8).collect::<Vec<_>>());
        prop_assert!(connection.is_quiescent());
        prop_assert_eq!(connection.queued_bytes, 0);
    }
}
