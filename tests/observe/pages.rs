//! Tests the content of the pages and their headers.

use std::time::Duration;

use serde_json::Value;

use super::{CONFIG, address, builder, get, page, series};
use crate::support::wire::Wire;
use crate::support::{Daemon, PATIENCE, pass, wait_for};

#[test]
fn each_page_has_its_type_and_none_is_stored() {
    let daemon = builder().start();
    let address = address(&daemon);
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
        ("/status.json", "application/json"),
        ("/history.json", "application/json"),
        ("/healthz", "text/plain; charset=utf-8"),
    ] {
        let answer = page(address, path);
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        for line in [
            format!("content-type: {kind}"),
            "cache-control: no-store".to_owned(),
            "x-content-type-options: nosniff".to_owned(),
            "cross-origin-resource-policy: same-origin".to_owned(),
        ] {
            assert!(answer.headers.contains(&line), "{path}: {line}: {answer:?}");
        }
        // A page of another origin must not read it.
        let is_cors = |line: &String| line.starts_with("access-control");
        assert!(!answer.headers.iter().any(is_cors), "{answer:?}");
        let request = get(path).replace("GET", "HEAD");
        let head = Wire::open(address).send(request).head();
        assert_eq!(head.status, 200, "{path}");
    }
}

#[test]
fn the_page_runs_only_the_script_that_it_came_with() {
    let daemon = builder().start();
    let answer = page(address(&daemon), "/");
    let policy = answer
        .headers
        .iter()
        .find(|line| line.starts_with("content-security-policy"));
    let policy = policy.unwrap();
    for part in [
        "default-src 'none'",
        "script-src 'sha256-",
        "style-src 'sha256-",
        "connect-src 'self'",
        "frame-ancestors 'none'",
    ] {
        assert!(policy.contains(part), "{policy}");
    }
    assert!(
        answer
            .headers
            .contains(&"referrer-policy: no-referrer".to_owned())
    );
    assert!(answer.body.len() <= 40_000, "{} bytes", answer.body.len());
    daemon.reload_with(&format!("{CONFIG}page = false\n"));
    wait_for("the page to be gone", PATIENCE, || {
        page(address(&daemon), "/").status == 404
    });
}

#[test]
fn the_status_is_that_of_the_command_with_rates_and_age() {
    let daemon = builder().start();
    let address = address(&daemon);
    let (served, mut expected) = (page(address, "/status.json").json(), daemon.status());
    assert!(
        served["master_age_ms"].as_u64().unwrap() < 1_000,
        "{served}"
    );
    assert!(
        served["rates"]["total"]["calls_per_s"].is_number(),
        "{served}"
    );
    assert_eq!(served["master"]["pid"], expected["master"]["pid"]);
    assert_eq!(served["listeners"], expected["listeners"].take());
    // The history has an entry only after a second reading, one second after the first request.
    let mut readings: Value = Value::Null;
    wait_for("a second in the history", PATIENCE, || {
        readings = page(address, "/history.json").json()["seconds"].take();
        readings.as_array().is_some_and(|all| !all.is_empty())
    });
    assert!(readings[0]["calls"].is_number(), "{readings}");
    assert_eq!(page(address, "/history.json?method=nope").status, 404);
}

#[test]
fn health_follows_a_scheduled_stop() {
    let mut daemon = builder().start();
    let address = address(&daemon);
    assert_eq!(page(address, "/healthz").status, 200);
    assert_eq!(series(address, "preforkd_stopping").as_deref(), Some("0"));
    let stop = daemon.asking(&["stop", "--after", "3s"]).spawn().unwrap();
    // The observer asks the master at most once per second, so the answer may be up to a second old.
    wait_for("503", PATIENCE, || page(address, "/healthz").status == 503);
    assert_eq!(
        daemon.client().call(&serde_json::json!({"in": "ping"}))["out"],
        "pong"
    );
    assert_eq!(series(address, "preforkd_stopping").as_deref(), Some("1"));
    assert!(daemon.wait_exit().success());
    assert!(stop.wait_with_output().unwrap().status.success());
}

#[test]
fn a_connection_takes_many_requests_and_an_idle_one_stays() {
    let daemon = builder().start();
    let mut wire = Wire::open(address(&daemon));
    for _ in 0..3 {
        let two = get("/healthz") + &get("/status.json");
        wire.send(two);
        assert_eq!(wire.response().status, 200);
        assert_eq!(wire.response().status, 200);
    }
    wire.send("\r\n");
    pass(Duration::from_millis(100));
    assert_eq!(wire.send(get("/healthz")).response().status, 200);
    let last = get("/healthz").replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
    assert!(wire.send(last).response().closes());
    wait_for("its end", PATIENCE, || wire.is_closed());
}

#[test]
fn a_unix_socket_has_its_mode_and_takes_every_host() {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    let config =
        "[workers]\ncount = 1\n[observe]\naddress = \"unix:observe.sock\"\nmode = \"0640\"\n";
    let daemon = Daemon::builder().config(config).start();
    let path = daemon.dir().join("observe.sock");
    let mode = path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
    let mut stream = UnixStream::connect(&path).unwrap();
    let request = "GET /healthz HTTP/1.1\r\nHost: any.example\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    daemon.reload_with("[workers]\ncount = 1\n");
    wait_for("the socket to be gone", PATIENCE, || !path.exists());
}
