//! Tests HTTP/1.1 according to the documents and the RFCs: statuses, framing, keep-alive, order, origins.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::wire::{Response, Wire, post};
use crate::support::{Daemon, PATIENCE, pass, process, wait_for};

const CONFIG: &str = "
http-origins = [\"https://app.example\"]
[workers]
count = 1
threads = 2
[limits]
frame = \"64KiB\"
queue = 1
[methods.sleep]
builtin = \"sleep\"
timeout = \"5s\"
[methods.echo]
builtin = \"echo\"
[methods.rare]
builtin = \"echo\"
rate = 1
";

fn start() -> Daemon {
    Daemon::builder().config(CONFIG).start()
}

/// Sends one request on a separate connection.
#[track_caller]
fn ask(daemon: &Daemon, request: &str) -> Response {
    Wire::to(daemon).send(request).response()
}

#[test]
fn a_post_to_the_root_takes_a_call_and_one_to_a_method_its_params() {
    let daemon = start();
    let mut wire = Wire::to(&daemon);
    let plain = wire
        .send(post("/", r#"{"in":"ping","params":"é","id":7}"#))
        .response();
    assert_eq!(plain.status, 200);
    assert_eq!(plain.body, r#"{"out":"pong","result":"é","id":7}"#);
    assert!(
        plain
            .headers
            .contains(&"content-type: application/json".to_owned())
    );
    for (target, body, result) in [
        ("/ping", "[1, 2.0]", "[1, 2.0]"),
        ("/ping", "", "null"),
        ("/ping?a=b", " 7 ", "7"),
        ("http://x/ping", "{}", "{}"),
        ("http://x/ping?y=/nope", "{}", "{}"),
        ("/p%69ng", "1e400", "1e400"),
    ] {
        let bare = wire.send(post(target, body)).response();
        assert_eq!((bare.status, &*bare.body), (200, result), "{target}");
    }
    // An authority without a path means the root, whatever the query is.
    for target in ["http://x?y=/ping", "http://x#/ping", "http://x"] {
        let answer = wire.send(post(target, "7")).response();
        assert_eq!(answer.status, 400, "{target}: {}", answer.body);
    }
    assert!(!wire.is_closed());
}

#[test]
fn each_code_of_the_plain_form_has_its_status() {
    let daemon = start();
    let mut wire = Wire::to(&daemon);
    for (target, body, status, code) in [
        ("/", "{", 400, -32700),
        ("/", "", 400, -32700),
        ("/", "7", 400, -32600),
        ("/ping", "{", 400, -32700),
        ("/sleep", "\"long\"", 400, -32602),
        ("/", r#"{"in":"nope"}"#, 404, -32601),
        ("/nope", "1", 404, -32601),
        (
            "/",
            r#"{"in":"sleep","params":9,"timeout_ms":50}"#,
            504,
            -32001,
        ),
    ] {
        let response = wire.send(post(target, body)).response();
        assert_eq!(response.status, status, "{target} {body}: {response:?}");
        let error = match target {
            "/" => response.json()["result"].take(),
            _ => response.json(),
        };
        assert_eq!(error["code"], code, "{target} {body}: {error}");
        assert!(!response.closes());
    }
    // Send them in one write, so that no new second begins between them.
    wire.send(post("/rare", "1").repeat(3));
    let busy = (0..3).map(|_| wire.response());
    let busy = busy.last().unwrap();
    assert_eq!(busy.status, 503, "{busy:?}");
    assert!(busy.headers.contains(&"retry-after: 1".to_owned()));
    // In JSON-RPC everything is in the body.
    for (body, status) in [
        (r#"{"jsonrpc":"2.0","method":"nope","id":1}"#, 200),
        (r#"{"jsonrpc":"2.0","method":1}"#, 200),
        (r#"{"jsonrpc""#, 200),
        (r#"{"jsonrpc":"2.0","method":"nope"}"#, 204),
        (r#"[{"jsonrpc":"2.0","method":"nope"}]"#, 204),
    ] {
        assert_eq!(
            wire.send(post("/", body)).response().status,
            status,
            "{body}"
        );
    }
}

#[test]
fn get_and_head_run_nothing_and_healthz_tells_how_it_is() {
    let daemon = start();
    let mut wire = Wire::to(&daemon);
    let refused = wire
        .send("GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        .response();
    assert_eq!(refused.status, 405);
    assert!(
        refused.headers.contains(&"allow: post".to_owned()),
        "{refused:?}"
    );
    wire.send("HEAD / HTTP/1.1\r\nHost: x\r\n\r\nHEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!((wire.head().status, wire.head().status), (405, 200));
    let health = wire
        .send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        .response();
    assert_eq!(
        (health.status, health.json()),
        (200, json!({"status": "ok"}))
    );
    let calls: u64 = daemon.workers().iter().map(|worker| worker.calls).sum();
    assert_eq!(calls, 0);
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let daemon = start();
    let mut wire = Wire::to(&daemon);
    let mut all = String::new();
    for number in 0..40 {
        if number % 20 == 0 {
            all += &post("/sleep", "0.2");
        }
        // An id does not let an answer overtake here, because only the order identifies responses.
        all += &post(
            "/",
            &json!({"in": "echo", "params": number, "id": number}).to_string(),
        );
    }
    wire.send(all);
    for number in 0..40 {
        if number % 20 == 0 {
            assert_eq!(wire.response().body, "0.2");
        }
        assert_eq!(wire.response().json()["id"], number);
    }
}

#[test]
fn a_request_is_the_same_in_one_piece_byte_by_byte_and_in_chunks() {
    let daemon = start();
    let body = r#"{"in":"echo","params":"0123456789"}"#;
    let expected = r#"{"out":"echo","result":"0123456789"}"#;
    let whole = post("/", body);
    let chunked = format!(
        "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n\
         1;a=\"b\"\r\n{}\r\n000f\r\n{}\r\nF\r\n{}\r\n04\r\n{}\r\n0\r\nX-Sum: 1\r\n\r\n",
        &body[..1],
        &body[1..16],
        &body[16..31],
        &body[31..],
    );
    for request in [&whole, &chunked] {
        let mut wire = Wire::to(&daemon);
        assert_eq!(wire.send(request).response().body, expected);
        for byte in request.bytes() {
            wire.send([byte]);
        }
        assert_eq!(wire.response().body, expected);
        for split in 0..=request.len() {
            let second = &request[split..];
            wire.send(&request[..split])
                .send(format!("{second}{request}"));
            assert_eq!(wire.response().body, expected, "{split}");
            assert_eq!(wire.response().body, expected, "{split}");
        }
    }
}

#[test]
fn expect_is_answered_with_continue_once_all_before_it_is() {
    let daemon = start();
    let mut wire = Wire::to(&daemon);
    wire.send(post("/sleep", "0.2"));
    let head =
        "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n";
    wire.send(head);
    assert_eq!(wire.response().body, "0.2");
    assert_eq!(wire.head().status, 100);
    assert_eq!(wire.send("\"a\"").response().body, "\"a\"");
    // The request is refused before the body is sent.
    for (head, status) in [
        (head.replace("Length: 3", "Length: 70000"), 413),
        (head.replace("100-continue", "a miracle"), 417),
        (head.replace("POST", "PUT"), 405),
    ] {
        let response = ask(&daemon, &head);
        assert_eq!(response.status, status, "{response:?}");
        assert!(response.closes());
    }
    // If such a client does not wait, it is not asked to continue.
    let response = ask(&daemon, &format!("{head}\"b\""));
    assert_eq!((response.status, &*response.body), (200, "\"b\""));
}

#[test]
fn a_post_without_a_length_has_an_empty_body() {
    let daemon = start();
    let mut wire = Wire::to(&daemon);
    for head in [
        "POST /echo HTTP/1.1",
        "POST /echo HTTP/1.0\r\nConnection: keep-alive",
    ] {
        let response = wire.send(format!("{head}\r\nHost: x\r\n\r\n")).response();
        assert_eq!((response.status, &*response.body), (200, "null"), "{head}");
        assert!(!response.closes());
    }
    // It is no call, but the connection stays open.
    let response = wire.send("POST / HTTP/1.1\r\nHost: x\r\n\r\n").response();
    assert_eq!(response.status, 400);
    assert_eq!(wire.send(post("/ping", "1")).response().body, "1");
}

/// It lasts longer than read-timeout and a death of the worker, because these lines belong to no request.
#[test]
fn empty_lines_after_a_body_leave_the_connection_at_rest() {
    let config = "[workers]\ncount = 1\n[limits]\nread-timeout = \"1s\"\n";
    let builder = Daemon::builder().config(config);
    let daemon = builder.expect_log("ended by SIGKILL").start();
    let (mut one, mut three) = (Wire::to(&daemon), Wire::to(&daemon));
    for (wire, lines) in [(&mut one, "\r\n"), (&mut three, "\r\n\r\n\r\n")] {
        wire.send(post("/ping", "1") + lines);
        assert_eq!(wire.response().body, "1");
    }
    pass(Duration::from_millis(1500));
    for wire in [&mut one, &mut three] {
        wire.send(post("/ping", "2") + "\r\n");
        assert_eq!(wire.response().body, "2");
    }
    let worker = daemon.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    daemon.wait_log("ended by SIGKILL");
    for wire in [&mut one, &mut three] {
        assert_eq!(wire.send(post("/ping", "3")).response().body, "3");
    }
}

#[test]
fn every_response_has_a_date() {
    let daemon = start();
    for request in [
        post("/ping", "1"),
        post("/nope", "1"),
        "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
    ] {
        let response = ask(&daemon, &request);
        let date = response
            .headers
            .iter()
            .find(|line| line.starts_with("date: "));
        let date = date.unwrap_or_else(|| panic!("{response:?}"));
        assert_eq!(date.len(), "date: ".len() + 29, "{date}");
        assert!(date.ends_with(" gmt"), "{date}");
    }
}

/// A request can be refused because of the method, the body, or the state of the server.
#[test]
fn an_error_of_a_request_has_one_shape() {
    let daemon = start();
    let long = format!(
        "POST /ping HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        1 << 20
    );
    for (request, name) in [
        (post("/nope", "1"), "method-not-found"),
        (post("/ping", "{"), "parse-error"),
        (long, "too-large"),
        (
            "GET /ping HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
            "invalid-request",
        ),
    ] {
        let response = ask(&daemon, &request);
        let error: Value = serde_json::from_str(&response.body).unwrap();
        assert_eq!(error["name"], name, "{response:?}");
        assert!(error["code"].is_number() && error["message"].is_string());
    }
}

#[test]
fn what_is_too_large_is_refused_and_closed() {
    let daemon = start();
    let long = "x".repeat(17 << 10);
    let many: String = (0..101).map(|n| format!("X-{n}: 1\r\n")).collect();
    for (request, status) in [
        (
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 65537\r\n\r\n".to_owned(),
            413,
        ),
        (
            format!(
                "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
                "9".repeat(40)
            ),
            413,
        ),
        (
            "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n10001\r\n".to_owned(),
            413,
        ),
        (format!("POST /{long} HTTP/1.1\r\nHost: x\r\n\r\n"), 431),
        (format!("POST / HTTP/1.1\r\nHost: x\r\nX: {long}\r\n"), 431),
        (format!("POST / HTTP/1.1\r\nHost: x\r\n{many}\r\n"), 431),
        (
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Encoding: gzip\r\n\r\n{}"
                .to_owned(),
            415,
        ),
    ] {
        let mut wire = Wire::to(&daemon);
        // The bytes behind it are never taken for a request.
        wire.send(&request).send(post("/ping", "1"));
        let response = wire.response();
        assert_eq!(
            response.status,
            status,
            "{}",
            &request[..60.min(request.len())]
        );
        assert!(response.closes(), "{response:?}");
        assert_eq!(wire.rest(), b"");
    }
    let fits = format!("\"{}\"", "x".repeat((64 << 10) - 2));
    assert_eq!(ask(&daemon, &post("/echo", &fits)).body, fits);
}

#[test]
fn connections_last_as_their_version_and_headers_say() {
    let daemon = start();
    let with = |version: &str, connection: &str| {
        post("/ping", "1")
            .replace("HTTP/1.1", version)
            .replace("Host: x", &format!("Host: x\r\nConnection: {connection}"))
    };
    for (request, closes) in [
        (with("HTTP/1.1", "keep-alive"), false),
        (with("HTTP/1.1", "close"), true),
        (with("HTTP/1.1", "x, Close"), true),
        (with("HTTP/1.0", "x"), true),
        (with("HTTP/1.0", "Keep-Alive"), false),
        (with("HTTP/1.0", "keep-alive, close"), true),
    ] {
        let mut wire = Wire::to(&daemon);
        let response = wire.send(format!("{request}{request}")).response();
        assert_eq!(
            (response.status, response.closes()),
            (200, closes),
            "{request}"
        );
        if closes {
            assert_eq!(wire.rest(), b"", "{request}");
        } else {
            assert_eq!(wire.response().status, 200, "{request}");
        }
    }
}

#[test]
fn a_web_page_may_not_call_unless_its_origin_is_listed() {
    let daemon = start();
    let with =
        |origin: &str| post("/ping", "1").replace("Host: x", &format!("Host: x\r\n{origin}"));
    for origin in [
        "Origin: http://evil.example",
        "Origin: null",
        "Origin:",
        "Origin: https://app.example.evil.example",
        "Origin: https://app.example\r\nOrigin: https://app.example",
        "origin: https://app.example, https://app.example",
    ] {
        let response = ask(&daemon, &with(origin));
        assert_eq!(response.status, 403, "{origin}: {response:?}");
    }
    let calls: u64 = daemon.workers().iter().map(|worker| worker.calls).sum();
    assert_eq!(calls, 0, "none of them ran");
    let listed = ask(&daemon, &with("Origin: https://app.example"));
    assert_eq!((listed.status, &*listed.body), (200, "1"));
    let allowed = "access-control-allow-origin: https://app.example".to_owned();
    assert!(listed.headers.contains(&allowed), "{listed:?}");
    let preflight = "OPTIONS /ping HTTP/1.1\r\nHost: x\r\nOrigin: https://app.example\r\n\
                     Access-Control-Request-Method: POST\r\n\r\n";
    let asked = ask(&daemon, preflight);
    assert_eq!(asked.status, 204);
    assert!(
        asked
            .headers
            .contains(&"access-control-allow-methods: post".to_owned())
    );
    assert_eq!(ask(&daemon, &preflight.replace("app", "evil")).status, 403);
}

#[test]
fn a_stop_answers_what_runs_and_says_that_the_connection_ends() {
    let mut daemon = start();
    let mut wire = Wire::to(&daemon);
    wire.send(post("/sleep", "2"));
    daemon.wait_running(1);
    daemon.signal(Signal::SIGTERM);
    let response = wire.response();
    assert_eq!((response.status, &*response.body), (200, "2"));
    assert!(response.closes(), "{response:?}");
    assert_eq!(wire.rest(), b"");
    assert!(daemon.wait_exit().success());
}

#[test]
fn a_call_during_a_stop_is_refused_as_unavailable() {
    let mut daemon = start();
    let mut wire = Wire::to(&daemon);
    wire.send(post("/sleep", "3"));
    let mut late = Wire::to(&daemon);
    assert_eq!(late.send(post("/ping", "1")).response().status, 200);
    // The stop arrives in the middle of a request: the request may be finished and gets an answer.
    late.send(&post("/ping", "1")[..40]);
    daemon.wait_running(1);
    daemon.signal(Signal::SIGTERM);
    // The master updates this before it sends the order. A worker that has the order accepts no
    // connection.
    wait_for("the worker to stop", PATIENCE, || {
        daemon.try_client().is_err()
    });
    late.send(&post("/ping", "1")[40..]);
    let refused = late.response();
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.closes() && refused.headers.contains(&"retry-after: 1".to_owned()));
    let error: Value = refused.json();
    assert_eq!(
        (&error["code"], &error["started"]),
        (&json!(-32005), &json!(false))
    );
    assert_eq!(wire.response().status, 200);
    assert!(daemon.wait_exit().success());
}

/// So the method that runs is always the one that a proxy sees in the path.
#[test]
fn a_listener_for_methods_in_the_path_takes_no_call_in_a_body() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let config = |methods: &str| {
        format!(
            "[workers]\ncount = 1\n[[listen]]\naddress = \"127.0.0.1:{port}\"\n{methods}\n[[listen]]\n\
             address = \"unix:u.sock\"\n"
        )
    };
    let daemon = Daemon::builder()
        .config(&config("http-methods = \"path\""))
        .start();
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let mut wire = Wire::open(address);
    let call = r#"{"in":"ping","params":1}"#;
    for body in [
        call,
        r#"[{"jsonrpc":"2.0","method":"ping","id":1}]"#,
        "no JSON",
    ] {
        let refused = wire.send(post("/", body)).response();
        assert_eq!(refused.status, 403, "{}", refused.body);
        assert!(refused.body.contains("http-methods"), "{}", refused.body);
    }
    let taken = wire.send(post("/ping", "1")).response();
    assert_eq!((taken.status, &*taken.body), (200, "1"));
    // The other listener is not affected.
    let mut client = crate::support::Client::connect_unix(&daemon.dir().join("u.sock"));
    client.send_raw(post("/", call).as_bytes());
    let mut answer = Vec::new();
    while !answer.ends_with(b"}") {
        let mut piece = [0; 1024];
        let length = std::io::Read::read(&mut client.stream(), &mut piece).unwrap();
        assert_ne!(length, 0);
        answer.extend_from_slice(&piece[..length]);
    }
    assert!(answer.starts_with(b"HTTP/1.1 200"));
    // A reload also changes it for open connections.
    daemon.configure(&config("http-methods = \"any\""));
    assert!(daemon.command(&["reload"]).status.success());
    wait_for("an answer of the new workers", PATIENCE, || {
        wire.send(post("/", call)).response().status == 200
    });
}

/// A proxy may know the connection from before.
#[test]
fn an_open_connection_needs_a_path_although_its_listener_is_gone_or_isolated() {
    let any = "[workers]\ncount = 1\n[[listen]]\naddress = \"127.0.0.1:0\"\n";
    let path = "[[listen]]\naddress = \"127.0.0.2:0\"\nhttp-methods = \"path\"\n";
    for after in ["", &format!("{path}isolation = \"connection\"\n")] {
        let daemon = Daemon::builder()
            .config(&format!("{any}{path}"))
            .expect_log("SIGKILL")
            .start();
        let address = daemon.status()["listeners"][1]["address"].clone();
        let mut wire = Wire::open(address.as_str().unwrap().parse().unwrap());
        let mut assert_needed = |when: &str| {
            let refused = wire.send(post("/", r#"{"in":"ping"}"#)).response();
            assert_eq!(refused.status, 403, "{when}: {}", refused.body);
            let taken = wire.send(post("/ping", "1")).response();
            assert_eq!(taken.status, 200, "{when}: {}", taken.body);
        };
        assert_needed("before");
        let worker = daemon.ready_workers()[0];
        daemon.configure(&format!("{any}{after}"));
        assert!(daemon.command(&["reload"]).status.success());
        wait_for("the end of the old worker", PATIENCE, || {
            !process::runs(worker)
        });
        assert_needed("after a reload");
        let worker = daemon.ready_workers()[0];
        kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
        wait_for("another worker", PATIENCE, || {
            let ready = daemon.ready_workers();
            !ready.is_empty() && !ready.contains(&worker)
        });
        assert_needed("after a crash");
    }
}
