#![allow(clippy::unwrap_used)]

use super::*;
use crate::sys::event::Token;

fn connection(book: SharedJournal) -> Connection {
    let connection = Connection::new(
        Token::for_test(1),
        None,
        crate::worker::shares::Source::Unknown,
        0,
    );
    book.witness.seats[1].fd.store(6, Relaxed);
    connection
}

const PLAIN: AnswerFormat = AnswerFormat {
    form: Form::Plain,
    wrap: Framing::Frame,
};

fn living(book: SharedJournal) -> usize {
    let entries = book.entries.iter();
    entries.filter(|entry| entry.of.load(Relaxed) != 0).count()
}

#[test]
fn a_call_is_in_the_ledger_from_its_taking_until_its_answer_has_left() {
    let (book, _) = SharedJournal::new(4).unwrap();
    let mut ledger = CallJournal::new(book);
    let mut connection = connection(book);
    book.witness.moment.start.store(1000, Relaxed);
    ledger.opens();
    ledger.reaches(40);
    let place = connection.take(true);
    let mark = ledger.take(&mut connection, PLAIN, place, Some("\"an id\""));
    let entry = &book.entries[0];
    assert_eq!(entry.of.load(Relaxed), connection.token.number() + 1);
    assert_eq!(entry.end.load(Relaxed), 1040);
    assert_eq!(entry.id_length.load(Relaxed), 8);
    mark.begins();
    assert_eq!(entry.begun.load(Relaxed), 1);
    ledger.closes(&mut connection, 40);
    assert_eq!(book.witness.moment.taken.load(Relaxed), 1040);
    ledger.answers(mark);
    assert_eq!((living(book), entry.stage.load(Relaxed)), (1, ANSWERED));
    ledger.sent();
    assert_eq!(living(book), 0);
    // what is taken from a tail has no place in what the reactor has received
    ledger.reaches(7);
    let mark = ledger.take(&mut connection, PLAIN, place, None);
    assert_eq!(entry.end.load(Relaxed), 0);
    assert_eq!(entry.id_length.load(Relaxed), 0);
    assert_eq!(entry.begun.load(Relaxed), 0, "its entry is used again");
    ledger.forget(mark);
    assert_eq!(living(book), 0);
}

#[test]
fn what_finds_no_room_makes_its_connection_one_that_is_not_kept() {
    let (book, _) = SharedJournal::new(4).unwrap();
    let mut ledger = CallJournal::new(book);
    let mut connection = connection(book);
    let place = connection.take(true);
    let note = || book.witness.seats[1].note.load(Relaxed);
    let long = format!("\"{}\"", "x".repeat(100));
    let mark = ledger.take(&mut connection, PLAIN, place, Some(&long));
    assert_eq!((mark, note()), (CallRef::default(), note::UNKEPT));
    // until all is answered
    connection.answered(place, &mut Vec::new(), |_| {});
    ledger.update_flags(&mut connection);
    assert_eq!(note(), 0);
    for _ in 0..ENTRIES {
        let place = connection.take(true);
        assert_ne!(
            ledger.take(&mut connection, PLAIN, place, None),
            CallRef::default()
        );
    }
    let place = connection.take(true);
    ledger.take(&mut connection, PLAIN, place, None);
    assert_eq!(note(), note::UNKEPT);
}

#[test]
fn a_shape_survives_its_number() {
    let reply = |old, bodiless, origin| {
        Framing::Http(http::ResponseOptions {
            old,
            bodiless,
            origin,
        })
    };
    let wraps = [
        Framing::Frame,
        Framing::Line,
        Framing::Member,
        reply(false, false, None),
        reply(true, false, Some(0)),
        reply(false, true, Some(u16::MAX)),
    ];
    for wrap in wraps {
        for form in [
            Form::Plain,
            Form::JsonRpc,
            Form::Notification,
            Form::ParamsOnly,
        ] {
            let one = AnswerFormat { form, wrap };
            assert_eq!(shape(number(one)), one);
        }
    }
}

#[test]
fn without_a_keeper_nothing_is_written() {
    let mut ledger = CallJournal::default();
    let mut connection = Connection::new(
        Token::for_test(0),
        None,
        crate::worker::shares::Source::Unknown,
        0,
    );
    let place = connection.take(false);
    let mark = ledger.take(&mut connection, PLAIN, place, None);
    assert_eq!(mark, CallRef::default());
    ledger.answers(mark);
    ledger.sent();
    assert!(!connection.has_unlogged_calls);
}

#[test]
fn connections_that_end_with_their_worker_are_counted_but_for_a_stop_of_the_server() {
    for (stops, expected) in [(false, 3), (true, 0)] {
        let (book, _) = SharedJournal::new(4).unwrap();
        let ledger = CallJournal::new(book);
        if stops {
            ledger.stops();
        }
        let ended = AtomicU32::new(0);
        ledger.record_exit(3, &ended);
        assert_eq!(ended.load(Relaxed), expected);
        assert_eq!(book.head.leaves.load(Relaxed), 1);
    }
}
