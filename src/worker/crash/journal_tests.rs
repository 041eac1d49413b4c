#![allow(clippy::unwrap_used)]

use super::*;
use crate::sys::event::Token;

fn connection(shared: SharedJournal) -> Connection {
    let connection = Connection::new(
        Token::for_test(1),
        None,
        crate::worker::shares::Source::Unknown,
        0,
    );
    shared.progress.records[1].fd.store(6, Relaxed);
    connection
}

const PLAIN: AnswerFormat = AnswerFormat {
    form: Form::Plain,
    wrap: Framing::Frame,
};

fn living(shared: SharedJournal) -> usize {
    let entries = shared.entries.iter();
    entries.filter(|entry| entry.of.load(Relaxed) != 0).count()
}

#[test]
fn a_call_is_in_the_journal_until_its_answer_is_sent() {
    let (shared, _) = SharedJournal::new(4, 2).unwrap();
    let mut journal = CallJournal::new(shared);
    let mut connection = connection(shared);
    shared.progress.moment.start.store(1000, Relaxed);
    journal.opens();
    journal.reaches(40);
    let place = connection.take(true);
    let mark = journal.take(&mut connection, PLAIN, place, (Some("\"an id\""), 1));
    let entry = &shared.entries[0];
    assert_eq!(entry.of.load(Relaxed), connection.token.number() + 1);
    assert_eq!(entry.end.load(Relaxed), 1040);
    assert_eq!(entry.id_length.load(Relaxed), 8);
    mark.begins();
    assert_eq!(entry.begun.load(Relaxed), 1);
    journal.closes(&mut connection, 40);
    assert_eq!(shared.progress.moment.taken.load(Relaxed), 1040);
    journal.answers(mark);
    assert_eq!((living(shared), entry.stage.load(Relaxed)), (1, ANSWERED));
    journal.sent();
    assert_eq!(living(shared), 0);
    // Kept bytes have no position in the received bytes.
    journal.reaches(7);
    let mark = journal.take(&mut connection, PLAIN, place, (None, 2));
    assert_eq!(entry.end.load(Relaxed), 0);
    assert_eq!(entry.id_length.load(Relaxed), 0);
    assert_eq!(entry.begun.load(Relaxed), 0, "its entry is used again");
    journal.forget(mark);
    assert_eq!(living(shared), 0);
}

#[test]
fn a_call_without_room_in_the_journal_marks_its_connection() {
    let (shared, _) = SharedJournal::new(4, 2).unwrap();
    let mut journal = CallJournal::new(shared);
    let mut connection = connection(shared);
    let place = connection.take(true);
    let note = || shared.progress.records[1].note.load(Relaxed);
    let long = format!("\"{}\"", "x".repeat(100));
    let mark = journal.take(&mut connection, PLAIN, place, (Some(&long), 3));
    assert_eq!((mark, note()), (CallRef::default(), note::UNKEPT));
    // This holds until all is answered.
    connection.answered(place, &mut Vec::new(), |_| {});
    journal.update_flags(&mut connection);
    assert_eq!(note(), 0);
    for _ in 0..ENTRIES {
        let place = connection.take(true);
        assert_ne!(
            journal.take(&mut connection, PLAIN, place, (None, 2)),
            CallRef::default()
        );
    }
    let place = connection.take(true);
    journal.take(&mut connection, PLAIN, place, (None, 2));
    assert_eq!(note(), note::UNKEPT);
}

#[test]
fn an_answer_format_is_restored_from_its_number() {
    let reply = |old, bodiless, origin| {
        Framing::Http(http::ResponseOptions {
            old,
            bodiless,
            origin,
            is_async: bodiless,
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
fn nothing_is_recorded_without_a_keeper() {
    let mut journal = CallJournal::default();
    let mut connection = Connection::new(
        Token::for_test(0),
        None,
        crate::worker::shares::Source::Unknown,
        0,
    );
    let place = connection.take(false);
    let mark = journal.take(&mut connection, PLAIN, place, (None, 2));
    assert_eq!(mark, CallRef::default());
    journal.answers(mark);
    journal.sent();
    assert!(!connection.has_unlogged_calls);
}

#[test]
fn connections_that_end_with_their_worker_are_counted_except_at_a_stop() {
    for (stops, expected) in [(false, 3), (true, 0)] {
        let (shared, _) = SharedJournal::new(4, 2).unwrap();
        let journal = CallJournal::new(shared);
        if stops {
            journal.stops();
        }
        let ended = AtomicU32::new(0);
        journal.record_exit(3, &ended);
        assert_eq!(ended.load(Relaxed), expected);
        assert_eq!(shared.head.leaves.load(Relaxed), 1);
    }
}
