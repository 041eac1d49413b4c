//! Tests malformed and valid HTTP: our own lists, and gunicorn's if `tests/run` has fetched them.
//!
//! A malformed request gets a 4xx status and its connection is closed. A valid one is answered, and the
//! connection continues. No second request may be taken from a refused one: each is followed by a request
//! whose answer would contain a mark.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::wire::Wire;
use crate::support::{Daemon, source};

/// Sent behind every malformed request. `smuggled` in an answer shows that it was taken for a request.
const SECOND: &str = "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n\"smuggled\"";

/// Heads that no server may accept (RFC 9110, RFC 9112); `~` stands for CR LF.
const MALFORMED: [&str; 69] = [
    "POST /echo HTTP/1.1\nHost: x\nContent-Length: 1\n\n1",
    "POST /echo HTTP/1.1~Host: x\nContent-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: 1\n\n1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: 1~\n1",
    "POST /echo HTTP/1.1~Host: x\r~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~X: a\rb~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~X: a\r\r\nContent-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~X: a~ b~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~X: a~\tb~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~ Host: x~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~X : a~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length : 1~~1",
    "POST /echo HTTP/1.1~Host: x~: a~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~no colon~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~X(: a~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~X\0: a~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~X: a\0b~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~X: a\x07b~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~X: a\x7fb~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: 1~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: 1~Content-Length: 2~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: 1, 1~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: +1~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: -1~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: 0x1~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: 1_0~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: 1 0~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: 1.0~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length:~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: a~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: 1~Transfer-Encoding: chunked~~1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~Content-Length: 0~~1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: identity~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked, chunked~~1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~Transfer-Encoding: chunked~~1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked, identity~~1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: gzip~~1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: xchunked~~1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: \"chunked\"~~1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked;a=b~~1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding:~~1~1~0~~",
    "POST /echo HTTP/1.0~Host: x~Transfer-Encoding: chunked~~1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer_Encoding: chunked~~1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer_Encoding: chunked~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~Content_Length: 9~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~0x1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~+1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~-1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~1_0~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~1 ~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~ 1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~g~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~;a=b~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~1;a=\nb~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~1;a=\rb~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~1\n1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~1~1\n0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~1~12~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~2~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~1~1~0~Content-Length: 9~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~1~1~0~no colon~~",
    "POST /echo HTTP/1.1~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~Host: y~Content-Length: 1~~1",
    "POST  /echo HTTP/1.1~Host: x~Content-Length: 1~~1",
    "POST /ec ho HTTP/1.1~Host: x~Content-Length: 1~~1",
    "POST echo HTTP/1.1~Host: x~Content-Length: 1~~1",
    "POST * HTTP/1.1~Host: x~Content-Length: 1~~1",
    "POST /%zz HTTP/1.1~Host: x~Content-Length: 1~~1",
    "POST /echo HTTP/1.2~Host: x~Content-Length: 1~~1",
];

/// Heads that must be accepted and answered with 1.
const VALID: [&str; 14] = [
    "POST /echo HTTP/1.1~Host: x~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host:x~Content-Length:1~~1",
    "POST /echo HTTP/1.1~hOST: \t x \t ~cONTENT-lENGTH: \t 1 \t ~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Length: 0001~~1",
    "POST /echo HTTP/1.1~Host:~Content-Length: 1~~1",
    "~POST /echo HTTP/1.1~Host: x~Content-Length: 1~~1",
    "POST /echo?a=/b%00&c#d HTTP/1.1~Host: x~Content-Length: 1~~1",
    "POST http://x:1/echo HTTP/1.1~Host: x~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~X-!#$%&'*+.^_`|~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~Content-Type: text/plain~Accept:~Content-Length: 1~~1",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~1~1~0~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: \tCHUNKED~~001;a;b=\"c d\"~1~000~~",
    "POST /echo HTTP/1.1~Host: x~Transfer-Encoding: chunked~~1~1~0~X-Sum: 1~Y: z~~",
    "POST /echo HTTP/1.0~Connection: keep-alive~Content-Length: 1~~1",
];

fn start() -> Daemon {
    let config = "[workers]\ncount = 2\n[methods.echo]\nbuiltin = \"echo\"\n";
    Daemon::builder().config(config).start()
}

/// Returns a connection that has served a request, so that the next bytes are read as HTTP too.
fn speaking_http(daemon: &Daemon) -> Wire {
    let mut wire = Wire::to(daemon);
    wire.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(wire.response().status, 200);
    wire
}

/// Returns why a request was not refused as it should be.
fn not_refused(daemon: &Daemon, request: &[u8]) -> Option<String> {
    let mut wire = speaking_http(daemon);
    wire.send(request).send(SECOND).half_close();
    let answer = String::from_utf8_lossy(&wire.rest()).into_owned();
    let responses = answer.matches("HTTP/1.1 4").count();
    let refused = answer.starts_with("HTTP/1.1 4") && responses == 1;
    let smuggled = answer.contains("smuggled") || answer.contains("HTTP/1.1 200");
    (smuggled || !refused).then_some(answer)
}

#[test]
fn malformed_requests_are_refused_and_closed() {
    let daemon = start();
    let mut wrong = Vec::new();
    for case in MALFORMED {
        let request = case.replace('~', "\r\n");
        if let Some(answer) = not_refused(&daemon, request.as_bytes()) {
            wrong.push(format!("{case:?}: {answer}"));
        }
    }
    println!(
        "malformed HTTP: {} of {} refused",
        MALFORMED.len() - wrong.len(),
        MALFORMED.len()
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
    // No worker has died meanwhile.
    let dead = daemon.status()["deaths"].as_array().unwrap().len();
    assert_eq!(dead, 0);
}

#[test]
fn valid_requests_are_taken_and_the_connection_goes_on() {
    let daemon = start();
    let mut wire = Wire::to(&daemon);
    wire.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n").response();
    for case in VALID {
        // `|` ends a name here; a colon follows.
        let request = case.replace("|~", "|: a~").replace('~', "\r\n");
        let response = wire.send(&request).response();
        assert_eq!((response.status, &*response.body), (200, "1"), "{case:?}");
        assert!(!response.closes(), "{case:?}");
    }
    println!("valid HTTP: {} taken", VALID.len());
}

/// Cases in which gunicorn and preforkd differ, and why.
const OTHERWISE: &[(&str, &str)] = &[
    ("invalid/001.http", "unfinished: closed when no more comes"),
    (
        "invalid/rfc9112_chunked_missing_final_crlf_01.http",
        "likewise",
    ),
    (
        "invalid/rfc9112_leading_crlf_02.http",
        "any number of empty lines before a request is skipped: the connection stays quiescent",
    ),
    ("invalid/010.http", "the case sets a lower limit than ours"),
    ("invalid/011.http", "likewise"),
    ("invalid/012.http", "likewise"),
    ("invalid/013.http", "likewise"),
    (
        "valid/025.http",
        "gzip as a transfer coding is not known here: 501",
    ),
    ("valid/025_line.http", "likewise"),
    ("valid/rfc9112_smuggle_gzip_chunked_01.http", "likewise"),
    (
        "valid/029.http",
        "identity is no transfer coding any more (RFC 9112, appendix C.2)",
    ),
    ("valid/030.http", "likewise"),
    (
        "valid/rfc9112_smuggle_te_identity_chunked_01.http",
        "likewise",
    ),
    (
        "valid/028.http",
        "space before a colon, which the case allows by a setting",
    ),
    (
        "valid/compat_obs_fold.http",
        "folded lines, which the case allows by a setting",
    ),
    ("valid/compat_obs_fold_huge.http", "likewise"),
    (
        "valid/099.http",
        "its body is shorter than its Content-Length: unfinished",
    ),
    (
        "valid/040.http",
        "an underscore in Content-Length, which a proxy may take for the real one",
    ),
    ("valid/040_compat.http", "likewise"),
    ("valid/pp_01.http", "the PROXY protocol is not known here"),
    ("valid/pp_02.http", "likewise"),
    ("valid/pp_04.http", "likewise"),
    ("valid/pp_05.http", "likewise"),
];

/// gunicorn's cases write CR LF as `\r\n`; their line breaks are only for readability.
fn decode(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match (byte, after) {
            (b'\n', _) => {}
            (b'\\', [b'x', high, low, ..])
                if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
            {
                let digits = std::str::from_utf8(&after[1..3]).unwrap();
                bytes.push(u8::from_str_radix(digits, 16).unwrap());
                rest = &after[3..];
            }
            (b'\\', [escape @ (b'r' | b'n' | b't' | b'0'), ..]) => {
                bytes.push(match escape {
                    b'r' => b'\r',
                    b'n' => b'\n',
                    b't' => b'\t',
                    _ => 0,
                });
                rest = &after[1..];
            }
            _ => bytes.push(byte),
        }
    }
    bytes
}

fn cases(kind: &str) -> Vec<(String, Vec<u8>)> {
    let directory = std::env::var_os("GUNICORN_REQUESTS").map_or_else(
        || source().join("target/gunicorn/tests/requests"),
        PathBuf::from,
    );
    let mut paths: Vec<PathBuf> = fs::read_dir(directory.join(kind))
        .expect("tests/run fetches them")
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "http"))
        .collect();
    paths.sort();
    let name = |path: &Path| format!("{kind}/{}", path.file_name().unwrap().to_string_lossy());
    paths
        .iter()
        .map(|path| (name(path), decode(&fs::read(path).unwrap())))
        .collect()
}

/// A request of HTTP/1.1 needs a Host (RFC 9112, section 3.2), and many valid requests of gunicorn have
/// none. They get one, so that the rest of them is tested.
fn with_host(request: &[u8]) -> Vec<u8> {
    let text: String = request.iter().map(|byte| *byte as char).collect();
    let mut whole = String::new();
    for part in text.split_inclusive(" HTTP/1.1\r\n") {
        whole.push_str(part);
        if part.ends_with(" HTTP/1.1\r\n") && !text.to_ascii_lowercase().contains("\nhost:") {
            whole.push_str("Host: x\r\n");
        }
    }
    whole.chars().map(|letter| letter as u8).collect()
}

#[test]
#[ignore = "needs gunicorn's sdist in target/gunicorn: tests/run fetches it and runs this"]
fn gunicorns_lists_of_requests_are_judged_as_there() {
    let daemon = start();
    let otherwise = |name: &str| OTHERWISE.iter().find(|(known, _)| *known == name);
    let mut wrong = Vec::new();
    let (mut refused, mut taken, mut excused) = (0, 0, 0);
    for (name, request) in cases("invalid") {
        match not_refused(&daemon, &request) {
            None => refused += 1,
            Some(_) if otherwise(&name).is_some() => excused += 1,
            Some(answer) => wrong.push(format!("{name}: {answer}")),
        }
    }
    for (name, request) in cases("valid") {
        let mut wire = speaking_http(&daemon);
        wire.send(with_host(&request)).half_close();
        let answer = String::from_utf8_lossy(&wire.rest()).into_owned();
        // An unknown method or invalid JSON is an error of a request that was understood. Other errors
        // say "malformed".
        let understood = answer.starts_with("HTTP/1.1 ")
            && !answer.contains("malformed HTTP")
            && !answer.contains("malformed chunks")
            && !answer.contains("HTTP/1.1 501");
        match (understood, otherwise(&name)) {
            (true, _) => taken += 1,
            (false, Some(_)) => excused += 1,
            (false, None) => wrong.push(format!("{name}: {answer}")),
        }
    }
    println!(
        "gunicorn's requests: {refused} invalid refused, {taken} valid taken, {excused} otherwise \
         for a reason, {} wrong",
        wrong.len()
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
}
