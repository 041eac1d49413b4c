//! Tests clients of the observer that are wrong, slow or many.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::{CONFIG, address, builder, get, page};
use crate::support::wire::{Response, Wire};
use crate::support::{PATIENCE, alone, pass, wait_for};

/// Sends bytes on a connection of their own.
#[track_caller]
fn ask(address: SocketAddr, bytes: &[u8]) -> Response {
    Wire::open(address).send(bytes).response()
}

#[test]
fn what_is_no_request_for_a_page_is_refused_and_the_next_one_served() {
    let daemon = builder().start();
    let address = address(&daemon);
    let long = format!(
        "GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n",
        "x".repeat(17 << 10)
    );
    let many = format!(
        "GET / HTTP/1.1\r\nHost: a\r\n{}\r\n",
        "X: 1\r\n".repeat(200)
    );
    let body = "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}";
    for (bytes, status) in [
        (
            &b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n"[..],
            505,
        ),
        (b"PRI * HTTP/2.0\r\n\r\n", 505),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\nHost: localhost\n\n", 400),
        (b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (
            b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
            404,
        ),
        (
            b"GET /%2e%2e/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
            404,
        ),
        (b"\x00\x00\x00\x00\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (long.as_bytes(), 431),
        (many.as_bytes(), 431),
        (body.as_bytes(), 400),
        (b"DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    ] {
        let answer = ask(address, bytes);
        assert_eq!(
            answer.status,
            status,
            "{:?}",
            String::from_utf8_lossy(bytes)
        );
        // Nothing after such a request is taken for another one.
        let may_stay = matches!(status, 404 | 405);
        assert_eq!(answer.closes(), !may_stay, "{answer:?}");
        if status == 405 {
            assert!(
                answer.headers.contains(&"allow: get, head".to_owned()),
                "{answer:?}"
            );
        }
        assert_eq!(page(address, "/healthz").status, 200);
    }
}

#[test]
fn all_refused_requests_of_one_piece_are_answered() {
    let daemon = builder().start();
    let request = "A / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut wire = Wire::open(address(&daemon));
    wire.send(request.repeat(500));
    for number in 0..500 {
        assert_eq!(wire.response().status, 405, "{number}");
    }
}

#[test]
fn a_foreign_host_gets_403_unless_it_is_listed() {
    let daemon = builder().start();
    let of = |host: &str| format!("GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let foreign = ask(address(&daemon), of("rebound.example:9180").as_bytes());
    assert_eq!(foreign.status, 403);
    assert!(foreign.body.contains("observe.hosts"), "{foreign:?}");
    for host in ["127.0.0.1:9180", "[::1]", "LOCALHOST"] {
        assert_eq!(
            ask(address(&daemon), of(host).as_bytes()).status,
            200,
            "{host}"
        );
    }
    daemon.reload_with(&format!("{CONFIG}hosts = [\"Node1.example\"]\n"));
    wait_for("the listed name", PATIENCE, || {
        ask(address(&daemon), of("node1.EXAMPLE:1").as_bytes()).status == 200
    });
    assert_eq!(
        ask(address(&daemon), of("rebound.example").as_bytes()).status,
        403
    );
}

#[test]
fn the_33rd_connection_takes_the_place_of_an_idle_one() {
    let daemon = builder().start();
    let address = address(&daemon);
    let mut idle: Vec<Wire> = (0..40).map(|_| Wire::open(address)).collect();
    assert_eq!(page(address, "/healthz").status, 200);
    wait_for("the oldest to be closed", PATIENCE, || idle[0].is_closed());
    assert_eq!(idle[39].send(get("/healthz")).response().status, 200);
    drop(idle);
    // Each has sent a part of a request, so none is idle.
    let begin = Instant::now();
    let busy: Vec<Wire> = (0..32)
        .map(|_| {
            let mut wire = Wire::open(address);
            wire.send("GET / HT");
            wire
        })
        .collect();
    pass(Duration::from_millis(200));
    let refused = page(address, "/healthz");
    let is_early = begin.elapsed() < Duration::from_secs(1);
    assert!(refused.status == 503 || !is_early, "{refused:?}");
    // One that has not finished its request for a second makes room, long before its time is over.
    wait_for("a place", PATIENCE, || {
        page(address, "/healthz").status == 200
    });
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
    drop(busy);
}

#[test]
fn a_request_is_answered_if_its_client_sends_nothing_more() {
    let daemon = builder().start();
    let address = address(&daemon);
    let two = format!("{}{}", get("/healthz"), get("/healthz"));
    for (sent, answers) in [
        (get("/healthz"), 1),
        (two, 2),
        (get("/healthz")[..9].to_owned(), 0),
    ] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(sent.as_bytes()).unwrap();
        // Both are there before the observer looks.
        stream.shutdown(Shutdown::Write).unwrap();
        let mut received = String::new();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_to_string(&mut received).unwrap();
        assert_eq!(
            received.matches("HTTP/1.1 200").count(),
            answers,
            "{received}"
        );
    }
}

#[test]
fn a_client_that_sends_a_byte_per_second_is_closed_after_five() {
    let _alone = alone();
    let daemon = builder().start();
    let mut wire = Wire::open(address(&daemon));
    let start = Instant::now();
    for byte in get("/healthz").bytes() {
        wire.send([byte]);
        if wire.is_closed() {
            break;
        }
        pass(Duration::from_secs(1));
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "it is still open"
        );
    }
    assert!(
        start.elapsed() >= Duration::from_secs(4),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(page(address(&daemon), "/healthz").status, 200);
}
