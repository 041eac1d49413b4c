//! The client with a simulated server.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use std::io;

use super::*;
use crate::protocol::frame;

const PATIENCE: Option<Duration> = Some(Duration::from_secs(10));

/// Reads the body of one frame; `None` at the end of the stream.
pub(super) fn read_frame(stream: &mut impl Read) -> Option<String> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let mut body = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut body).unwrap();
    Some(String::from_utf8(body).unwrap())
}

pub(super) fn framed(body: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mark = frame::begin(&mut bytes);
    bytes.extend_from_slice(body.as_bytes());
    frame::finish(&mut bytes, mark);
    bytes
}

/// Starts a server for one connection, which `serve` handles.
fn server<T: Send + 'static>(
    serve: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> (String, JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let thread = thread::spawn(move || serve(listener.accept().unwrap().0));
    (address, thread)
}

/// Starts a server that sends these bytes for each call in turn. Returns the calls.
fn scripted(answers: Vec<Vec<u8>>) -> (String, JoinHandle<Vec<String>>) {
    server(move |mut stream| {
        let mut calls = Vec::new();
        for answer in answers {
            calls.extend(read_frame(&mut stream));
            stream.write_all(&answer).unwrap();
        }
        calls
    })
}

#[test]
fn a_call_takes_params_and_gives_a_result_of_any_type() {
    let (address, server) = scripted(vec![
        framed(r#"{"out":"add","result":3}"#),
        framed(r#"{"out":"pong","result":null}"#),
    ]);
    let mut client = Client::connect(&address, PATIENCE).unwrap();
    assert_eq!(client.call::<i64>("add", (1, 2)).unwrap(), 3);
    client.call::<()>("ping", ()).unwrap();
    assert_eq!(
        server.join().unwrap(),
        [
            r#"{"in":"add","params":[1,2]}"#,
            r#"{"in":"ping","params":null}"#
        ]
    );
}

#[test]
fn raw_params_ids_and_results_go_through_to_the_letter() {
    let number = "1234567890123456789012345678901234567890";
    let (address, server) = scripted(vec![framed(&format!(
        r#"{{"out":"pong","result":{{"a": {number}}},"id":-0.0}}"#
    ))]);
    let mut client = Client::connect(&address, PATIENCE).unwrap();
    let reply = client
        .call_raw("ping", &format!("[ {number} ]"), Some("-0.0"), Some(500))
        .unwrap();
    assert_eq!(reply.out, "pong");
    assert_eq!(reply.result.get(), format!(r#"{{"a": {number}}}"#));
    assert_eq!(reply.id.unwrap().get(), "-0.0");
    assert_eq!(
        server.join().unwrap(),
        [format!(
            r#"{{"in":"ping","params":[ {number} ],"id":-0.0,"timeout_ms":500}}"#
        )]
    );
}

#[test]
fn a_call_leaves_in_one_write() {
    let (address, server) = server(|mut stream| {
        let mut buffer = [0; 1024];
        let count = stream.read(&mut buffer).unwrap();
        stream
            .write_all(&framed(r#"{"out":"pong","result":1}"#))
            .unwrap();
        buffer[..count].to_vec()
    });
    let mut client = Client::connect(&address, PATIENCE).unwrap();
    client.call::<i64>("ping", 1).unwrap();
    assert_eq!(
        server.join().unwrap(),
        framed(r#"{"in":"ping","params":1}"#)
    );
}

#[test]
fn a_refusal_keeps_the_connection_and_says_whether_the_call_began() {
    let (address, _server) = scripted(vec![
        framed(
            r#"{"out":"error","result":{"code":-32601,"name":"method-not-found","message":"no such method","started":false,"data":[1]}}"#,
        ),
        framed(r#"{"out":"error","result":{"code":7}}"#),
        framed(r#"{"out":"pong","result":2}"#),
    ]);
    let mut client = Client::connect(&address, PATIENCE).unwrap();
    let error = client.call::<i64>("nope", ()).unwrap_err();
    assert!(error.is_safe_to_repeat());
    let ClientError::Refused(error) = error else {
        panic!("{error:?}");
    };
    assert_eq!(
        (error.code, &*error.name, error.started),
        (-32601, "method-not-found", false)
    );
    assert_eq!(error.data.unwrap().get(), "[1]");

    let error = client.call::<i64>("odd", ()).unwrap_err();
    assert!(
        !error.is_safe_to_repeat(),
        "what is not said is not promised"
    );
    assert_eq!(client.call::<i64>("ping", 2).unwrap(), 2);
}

#[test]
fn an_answer_may_come_a_byte_at_a_time_and_be_large() {
    let text = "x".repeat(3 << 20);
    let bytes = framed(&format!(r#"{{"out":"pong","result":"{text}"}}"#));
    let (address, _server) = server(move |mut stream| {
        read_frame(&mut stream).unwrap();
        stream.set_nodelay(true).unwrap();
        let (head, rest) = bytes.split_at(40);
        for byte in head {
            stream.write_all(&[*byte]).unwrap();
        }
        stream.write_all(rest).unwrap();
    });
    let mut client = Client::connect(&address, PATIENCE).unwrap();
    assert!(client.call::<String>("ping", ()).unwrap() == text);
    assert!(client.inbox.is_empty());
}

#[test]
fn a_server_that_leaves_in_the_middle_is_gone_and_the_connection_closed() {
    for answer in [
        Vec::new(),
        framed(r#"{"out":"pong","result":1}"#)[..9].to_vec(),
    ] {
        let (address, _server) = scripted(vec![answer]);
        let mut client = Client::connect(&address, PATIENCE).unwrap();
        let error = client.call::<i64>("ping", 1).unwrap_err();
        assert!(matches!(error, ClientError::Gone(_)), "{error:?}");
        assert!(!error.is_safe_to_repeat());
        let error = client.call::<i64>("ping", 1).unwrap_err();
        assert!(matches!(error, ClientError::Closed), "{error:?}");
    }
}

#[test]
fn an_answer_that_came_before_the_server_closed_is_taken_though_the_sending_failed() {
    let refusal = r#"{"out":"error","result":{"code":-32004,"name":"too-large","message":"","started":false}}"#;
    let (address, _server) = server(move |mut stream| {
        stream.read_exact(&mut [0; 4]).unwrap();
        stream.write_all(&framed(refusal)).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        io::copy(&mut stream, &mut io::sink()).unwrap();
    });
    let mut client = Client::connect(&address, PATIENCE).unwrap();
    let error = client.call::<()>("ping", "x".repeat(1 << 20)).unwrap_err();
    assert!(
        matches!(&error, ClientError::Refused(e) if e.code == -32004),
        "{error:?}"
    );
}

#[test]
fn an_answer_that_does_not_come_in_time_is_never_taken_for_the_next() {
    let (address, server) = server(|mut stream| {
        let calls = [read_frame(&mut stream), read_frame(&mut stream)];
        drop(stream);
        calls
    });
    let mut client = Client::connect(&address, Some(Duration::from_millis(50))).unwrap();
    let error = client.call::<()>("sleep", 9).unwrap_err();
    assert!(matches!(error, ClientError::TimedOut(_)), "{error:?}");
    let error = client.call::<()>("ping", ()).unwrap_err();
    assert!(matches!(error, ClientError::Closed), "{error:?}");
    let [first, second] = server.join().unwrap();
    assert!(first.is_some() && second.is_none());
}

#[test]
fn what_is_no_answer_to_the_call_is_a_protocol_error() {
    for (answer, told) in [
        (b"HTTP/1.1 400 Bad Request\r\n".to_vec(), "HTTP/1.1 400"),
        (framed("[]"), "not an answer: not an object"),
        (framed(r#"{"out":"pong"}"#), "missing field `result`"),
        (
            framed(r#"{"out":"error","result":"no"}"#),
            "not an answer: the result",
        ),
        (framed(r#"{"out":"pong","result":1,"id":8}"#), "call is 7"),
    ] {
        let (address, _server) = scripted(vec![answer]);
        let mut client = Client::connect(&address, PATIENCE).unwrap();
        let error = client.call_raw("ping", "1", Some("7"), None).unwrap_err();
        assert!(matches!(error, ClientError::Protocol(_)), "{error:?}");
        assert!(error.to_string().contains(told), "{error}");
        let error = client.call::<i64>("ping", 1).unwrap_err();
        assert!(matches!(error, ClientError::Closed), "{error:?}");
    }
}

#[test]
fn params_that_are_no_json_are_never_sent() {
    let (address, server) = scripted(vec![framed(r#"{"out":"pong","result":1}"#)]);
    let mut client = Client::connect(&address, PATIENCE).unwrap();
    let error = client.call_raw("ping", "{", None, None).unwrap_err();
    assert!(matches!(error, ClientError::Params(_)), "{error:?}");
    client.call::<i64>("ping", 1).unwrap();
    assert_eq!(server.join().unwrap().len(), 1);
}

#[test]
fn a_unix_socket_serves_too() {
    let path = std::env::temp_dir().join(format!("preforkd-client-{}.sock", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let call = read_frame(&mut stream).unwrap();
        stream
            .write_all(&framed(r#"{"out":"pong","result":"hello"}"#))
            .unwrap();
        call
    });
    let mut client = Client::connect(&format!("unix:{}", path.display()), PATIENCE).unwrap();
    assert_eq!(client.call::<String>("ping", "hello").unwrap(), "hello");
    server.join().unwrap();
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn an_address_where_nobody_is_and_one_that_is_none_are_told_apart() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap().to_string();
    drop(free);
    for address in [address.as_str(), "unix:/nonexistent/rpc.sock"] {
        let error = Client::connect(address, PATIENCE).unwrap_err();
        assert!(matches!(error, ClientError::NoServer { .. }), "{error:?}");
    }
    for address in [
        "",
        "localhost",
        ":8080",
        "127.0.0.1:0",
        "127.0.0.1:http",
        "127.0.0.1:65536",
    ] {
        let error = Client::connect(address, PATIENCE).unwrap_err();
        assert!(
            matches!(error, ClientError::Address(_)),
            "{address}: {error:?}"
        );
    }
}
