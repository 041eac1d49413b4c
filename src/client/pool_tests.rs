//! The pool and the pipeline with simulated servers.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::io::Write;
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crossbeam_channel::unbounded;
use serde_json::Value;

use super::tests::{framed, read_frame};
use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// What a server does with a call.
pub(super) enum Then {
    Answer(String),
    AnswerAndClose(String),
    Close,
}

/// Starts a server that asks a function what to do with each call, numbered from 0 on. Also returns the
/// calls.
pub(super) fn server(
    judge: impl Fn(usize, &Value) -> Then + Send + Sync + 'static,
) -> (String, Arc<Mutex<Vec<Value>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let calls = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&calls);
    let judge = Arc::new(judge);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let (seen, judge) = (Arc::clone(&seen), Arc::clone(&judge));
            thread::spawn(move || {
                while let Some(body) = read_frame(&mut stream) {
                    let call: Value = serde_json::from_str(&body).unwrap();
                    let number = {
                        let mut seen = seen.lock().unwrap();
                        seen.push(call.clone());
                        seen.len() - 1
                    };
                    match judge(number, &call) {
                        Then::Answer(body) => stream.write_all(&framed(&body)).unwrap(),
                        Then::AnswerAndClose(body) => {
                            return stream.write_all(&framed(&body)).unwrap();
                        }
                        Then::Close => return,
                    }
                }
            });
        }
    });
    (address, calls)
}

fn pong(call: &Value) -> Then {
    Then::Answer(format!(r#"{{"out":"pong","result":{}}}"#, call["params"]))
}

pub(super) fn refusal(code: i64, started: bool) -> String {
    format!(
        r#"{{"out":"error","result":{{"code":{code},"name":"","message":"","started":{started}}}}}"#
    )
}

pub(super) fn pool(address: &str, connections: usize) -> Pool {
    let options = Options {
        connections,
        timeout: Some(PATIENCE),
        patience: PATIENCE,
    };
    Pool::new(address, options).unwrap()
}

#[test]
fn what_did_not_begin_is_repeated_until_it_goes_well() {
    let (address, calls) = server(|number, call| match number {
        0 => Then::Answer(refusal(-32002, false)),
        1 => Then::AnswerAndClose(refusal(-32005, false)),
        2 => Then::Answer(refusal(-32003, false)),
        _ => pong(call),
    });
    let pool = pool(&address, 1);
    assert_eq!(pool.apply::<i64>("ping", 7).unwrap(), 7);
    assert_eq!(calls.lock().unwrap().len(), 4);
    assert_eq!(pool.repeated(), 3);
}

#[test]
fn what_may_have_begun_is_never_repeated() {
    let (address, calls) = server(|number, _| match number {
        0 => Then::Answer(refusal(-32003, true)),
        1 => Then::AnswerAndClose(refusal(-32005, true)),
        _ => Then::Close,
    });
    let pool = pool(&address, 1);
    for number in 0..3 {
        let error = pool.apply::<i64>("ping", number).unwrap_err();
        assert!(!error.is_safe_to_repeat(), "{error:?}");
    }
    assert_eq!(calls.lock().unwrap().len(), 3);
    assert_eq!(pool.repeated(), 0);
}

#[test]
fn a_connection_that_was_closed_while_idle_is_made_again_before_the_call() {
    let (address, calls) = server(|number, call| match (number, pong(call)) {
        (0, Then::Answer(body)) => Then::AnswerAndClose(body),
        (_, then) => then,
    });
    let mut client = Client::connect(&address, Some(PATIENCE)).unwrap();
    client.call::<i64>("ping", 1).unwrap();
    // The end of the connection is on its way now. Its arrival cannot be seen otherwise.
    while !client.stream.as_ref().unwrap().has_ended() {
        thread::yield_now();
    }
    let error = client.call::<i64>("ping", 2).unwrap_err();
    assert!(matches!(error, ClientError::NotSent(_)), "{error:?}");
    assert!(error.is_safe_to_repeat());
    assert_eq!(calls.lock().unwrap().len(), 1);
}

#[test]
fn map_keeps_the_order_and_imap_unordered_the_places() {
    let (address, calls) = server(|_, call| pong(call));
    let pool = pool(&address, 4);
    let results: Vec<i64> = pool.map("ping", 0..500).unwrap();
    assert!(results.into_iter().eq(0..500));
    let mut places = BTreeSet::new();
    for (place, result) in pool.imap_unordered::<_, i64, _>("ping", (0..500).map(|n| n * 2)) {
        assert_eq!(usize::try_from(result.unwrap()).unwrap(), place * 2);
        places.insert(place);
    }
    assert!(places.into_iter().eq(0..500));
    assert_eq!(calls.lock().unwrap().len(), 1_000);
    pool.join();
}

#[test]
fn map_takes_no_more_items_than_its_window_holds() {
    let (address, _) = server(|_, call| pong(call));
    let pool = pool(&address, 2);
    let taken = AtomicUsize::new(0);
    let items = (0..).inspect(|_| {
        taken.fetch_add(1, Ordering::SeqCst);
    });
    let mut results = pool.imap::<_, i64, _>("ping", items);
    for expected in 0..10 {
        assert_eq!(results.next().unwrap().unwrap(), expected);
    }
    assert!(taken.load(Ordering::SeqCst) <= 10 + 8);
}

#[test]
fn callbacks_get_the_results_and_may_panic() {
    let (address, _) = server(|_, call| pong(call));
    let pool = pool(&address, 2);
    let (sender, results) = unbounded();
    for number in 0..20_i64 {
        let sender = sender.clone();
        pool.apply_async("ping", number, move |result: Result<i64, _>| {
            sender.send(result.unwrap()).unwrap();
            assert!(number % 2 == 0, "an odd number: on purpose");
        })
        .unwrap();
    }
    pool.join();
    let mut results: Vec<i64> = results.try_iter().collect();
    results.sort_unstable();
    assert!(results.into_iter().eq(0..20));
}

#[test]
fn a_closed_pool_finishes_and_a_terminated_one_does_not() {
    let (address, calls) = server(|_, call| pong(call));
    let closed = pool(&address, 1);
    let handles: Vec<Handle<i64>> = (0..50).map(|n| closed.submit("ping", n).unwrap()).collect();
    closed.close();
    assert!(matches!(
        closed.submit::<i64>("ping", 0),
        Err(ClientError::Ended)
    ));
    closed.join();
    for (number, handle) in (0..).zip(handles) {
        assert!(handle.is_ready());
        assert_eq!(handle.wait().unwrap(), number);
    }
    assert_eq!(calls.lock().unwrap().len(), 50);

    // This server never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let terminated = pool(&silent.local_addr().unwrap().to_string(), 1);
    let running: Handle<i64> = terminated.submit("ping", 1).unwrap();
    let waiting: Handle<i64> = terminated.submit("ping", 2).unwrap();
    let mut stream = silent.accept().unwrap().0;
    read_frame(&mut stream).unwrap();
    terminated.terminate();
    assert!(matches!(running.wait(), Err(ClientError::Gone(_))));
    assert!(matches!(waiting.wait(), Err(ClientError::Ended)));
    assert!(read_frame(&mut stream).is_none());
}

#[test]
fn a_server_that_comes_back_within_the_patience_is_found_again() {
    let (address, _) = server(|_, call| match pong(call) {
        Then::Answer(body) => Then::AnswerAndClose(body),
        then => then,
    });
    let pool = pool(&address, 3);
    // Every answer ends its connection, so each call needs a new one.
    let mut lost = 0;
    for outcome in pool.imap::<_, i64, _>("ping", 0..100) {
        match outcome {
            Ok(_) => {}
            // Sent just before the end arrived: it may have run, so it is not repeated.
            Err(error) => {
                assert!(!error.is_safe_to_repeat(), "{error:?}");
                lost += 1;
            }
        }
    }
    assert!(lost < 100);
}

#[test]
fn a_pipeline_matches_answers_by_id_in_whatever_order_they_come() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let calls: Vec<Value> = (0..3)
            .map(|_| serde_json::from_str(&read_frame(&mut stream).unwrap()).unwrap())
            .collect();
        for call in calls.iter().rev() {
            let (id, params) = (&call["id"], &call["params"]);
            let body = format!(r#"{{"out":"pong","result":{params},"id":{id}}}"#);
            stream.write_all(&framed(&body)).unwrap();
        }
        // The following calls are read, and then the connection ends instead of an answer.
        read_frame(&mut stream).unwrap();
        drop(stream);
        let mut stream = listener.accept().unwrap().0;
        let call: Value = serde_json::from_str(&read_frame(&mut stream).unwrap()).unwrap();
        let body = format!(r#"{{"out":"pong","result":"again","id":{}}}"#, call["id"]);
        stream.write_all(&framed(&body)).unwrap();
    });
    let pipeline = Pipeline::connect(&address, Some(PATIENCE)).unwrap();
    let handles: Vec<Handle<String>> = ["a", "b", "c"]
        .map(|params| pipeline.submit("ping", params).unwrap())
        .into();
    let results = handles.into_iter().map(|handle| handle.wait().unwrap());
    assert_eq!(results.collect::<Vec<_>>(), ["a", "b", "c"]);

    let error = pipeline
        .submit::<String>("ping", 4)
        .unwrap()
        .wait()
        .unwrap_err();
    assert!(matches!(error, ClientError::Gone(_)), "{error:?}");
    let again = pipeline.submit::<String>("ping", 5).unwrap().wait();
    assert_eq!(again.unwrap(), "again");
    server.join().unwrap();
}

#[test]
fn a_pipeline_gives_up_on_one_answer_and_keeps_the_others() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let pipeline = Pipeline::connect(&address, Some(Duration::from_secs(1))).unwrap();
    let mut stream = listener.accept().unwrap().0;
    let late: Handle<i64> = pipeline.submit("sleep", 1).unwrap();
    let error = late.wait().unwrap_err();
    assert!(matches!(error, ClientError::TimedOut(_)), "{error:?}");
    // The late answer comes first, and must not be taken for that of the second call.
    let second: Handle<i64> = pipeline.submit("ping", 2).unwrap();
    for (id, result) in [(1, 1), (2, 2)] {
        read_frame(&mut stream).unwrap();
        let body = format!(r#"{{"out":"pong","result":{result},"id":{id}}}"#);
        stream.write_all(&framed(&body)).unwrap();
    }
    assert_eq!(second.wait().unwrap(), 2);
}
