#![allow(clippy::unwrap_used)]

use super::head::Ask;
use super::*;
use proptest::prelude::*;

const RULES: RequestLimits<'static> = RequestLimits {
    body: 40,
    origins: &[],
    traces: true,
    request_ids: true,
    jobs: true,
};

const ABOUT: ResponseContext<'static> = ResponseContext {
    origins: &[],
    date: HttpDate(0),
};

type Session = (Vec<(String, Vec<u8>)>, Option<u16>, usize);

/// Decodes bytes that arrive in two pieces: the kind and body of each request, and the status of the
/// refusal that ended it.
fn read(bytes: &[u8], split: usize) -> Session {
    let (mut found, mut at, mut progress) = (Vec::new(), 0, ParseProgress::default());
    for end in [split, bytes.len()] {
        loop {
            match decode(&bytes[at..end], &mut progress, &RULES) {
                DecodedRequest::Whole { head, body, used } => {
                    assert!(used > 0 && at + used <= end);
                    let ask = match head.ask {
                        Ask::Refused(refusal) => refusal.status.to_string(),
                        ask => format!("{ask:?}"),
                    };
                    found.push((ask, body.into_owned()));
                    at += used;
                }
                DecodedRequest::Blank { used } => at += used,
                DecodedRequest::Partial { .. } => break,
                DecodedRequest::Refused(refusal) => return (found, Some(refusal.status), at),
            }
        }
    }
    (found, None, at)
}

const SESSION: &str = "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}\
                       \r\nPOST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n\
                       1;a\r\n[\r\n2\r\n7]\r\n0\r\nX: y\r\n\r\n\
                       GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n\
                       GET / HTTP/1.1\r\nHost: x\r\n\r\n";

#[test]
fn only_the_transfer_coding_chunked_is_accepted() {
    let status = |codings: &str| {
        let head = "POST / HTTP/1.1\r\nHost: x\r\n";
        let body = "\r\n2\r\n{}\r\n0\r\n\r\n";
        read(format!("{head}{codings}{body}").as_bytes(), 0).1
    };
    for codings in ["chunked", "Chunked", " chunked\t"] {
        assert_eq!(status(&format!("Transfer-Encoding:{codings}\r\n")), None);
    }
    for codings in ["identity, chunked", "gzip, chunked", ", chunked"] {
        let found = status(&format!("Transfer-Encoding: {codings}\r\n"));
        assert_eq!(found, Some(501), "{codings}");
    }
    let two = "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n";
    assert_eq!(status(two), Some(501));
    // Where the body ends is in doubt.
    for codings in ["identity", "chunked, identity", "chunked, chunked", ""] {
        let found = status(&format!("Transfer-Encoding: {codings}\r\n"));
        assert_eq!(found, Some(400), "{codings}");
    }
}

#[test]
fn requests_are_the_same_in_every_split() {
    let whole = read(SESSION.as_bytes(), 0);
    let asks: Vec<&str> = whole.0.iter().map(|(ask, _)| &**ask).collect();
    assert_eq!(asks, ["Method(\"a\")", "Call", "Health", "405"]);
    assert_eq!((&*whole.0[0].1, &*whole.0[1].1), (&b"{}"[..], &b"[7]"[..]));
    for split in 0..SESSION.len() {
        assert_eq!(read(SESSION.as_bytes(), split), whole, "{split}");
    }
}

#[test]
fn bodies_are_limited_before_they_arrive() {
    let head = "POST / HTTP/1.1\r\nHost: x\r\n";
    for (rest, status) in [
        ("Content-Length: 40\r\n\r\n", None),
        ("Content-Length: 41\r\n\r\n", Some(413)),
        ("Content-Length: 99999999999999999999999\r\n\r\n", Some(413)),
        ("Transfer-Encoding: chunked\r\n\r\n28\r\n", None),
        ("Transfer-Encoding: chunked\r\n\r\n29\r\n", Some(413)),
        (
            "Transfer-Encoding: chunked\r\n\r\n20\r\n01234567890123456789012345678901\r\n9\r\n",
            Some(413),
        ),
        (
            "Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
            Some(413),
        ),
    ] {
        let bytes = format!("{head}{rest}");
        assert_eq!(read(bytes.as_bytes(), 0).1, status, "{rest}");
    }
}

#[test]
fn a_response_has_its_length_and_whether_it_is_the_last() {
    let mut out = b"before".to_vec();
    out.extend_from_slice(b"{}");
    response::finish(&mut out, 6, ResponseOptions::default(), 503, true, ABOUT);
    assert_eq!(
        String::from_utf8(out).unwrap(),
        "beforeHTTP/1.1 503 Service Unavailable\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\
         Content-Type: application/json\r\nContent-Length: 2\r\nRetry-After: 1\r\nConnection: close\r\n\r\n{}"
    );
    let mut out = b"{}".to_vec();
    let bodiless = ResponseOptions {
        bodiless: true,
        old: true,
        ..ResponseOptions::default()
    };
    response::finish(&mut out, 0, bodiless, 200, false, ABOUT);
    let text = String::from_utf8(out).unwrap();
    assert!(
        text.ends_with("Content-Length: 2\r\nConnection: keep-alive\r\n\r\n"),
        "{text}"
    );
}

#[test]
fn only_a_result_of_a_job_is_accepted() {
    let options = ResponseOptions {
        is_async: true,
        ..ResponseOptions::default()
    };
    for (status, line, is_applied) in [
        (200, "HTTP/1.1 202 Accepted\r\n", true),
        (404, "HTTP/1.1 404 Not Found\r\n", false),
    ] {
        let mut out = b"{}".to_vec();
        response::finish(&mut out, 0, options, status, false, ABOUT);
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with(line), "{text}");
        let applied = text.contains("\r\nPreference-Applied: respond-async\r\n");
        assert_eq!(applied, is_applied, "{text}");
    }
}

#[test]
fn a_request_becomes_a_job_only_where_there_are_jobs_and_for_a_method_of_the_user() {
    let job = |path: &str, rules: &RequestLimits<'_>| {
        let text = format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nPrefer: respond-async\r\nIdempotency-Key: k\r\n\r\n"
        );
        match decode(text.as_bytes(), &mut ParseProgress::default(), rules) {
            DecodedRequest::Whole { head, .. } => {
                assert_eq!(head.reply.is_async, head.job.is_some());
                head.job.map(|job| job.key)
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(job("/mail", &RULES), Some(Some("k".into())));
    for path in ["/", "/rpc.job.get", "/%72pc.discover"] {
        assert_eq!(job(path, &RULES), None, "{path}");
    }
    let without = RequestLimits {
        jobs: false,
        ..RULES
    };
    assert_eq!(job("/mail", &without), None);
}

proptest! {
    #[test]
    fn any_bytes_are_at_most_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), split: prop::sample::Index) {
        let split = split.index(bytes.len() + 1);
        prop_assert_eq!(read(&bytes, split), read(&bytes, 0));
    }

    /// A damaged session gives the same result in every split.
    #[test]
    fn a_damaged_session_gives_the_same_result_in_every_split(
        at: prop::sample::Index, with in "[\r\n :;,0-9a-fx\t]{0,3}", cut in 0..4usize, split: prop::sample::Index,
    ) {
        let mut bytes = SESSION.as_bytes().to_vec();
        let at = at.index(bytes.len());
        let end = (at + cut).min(bytes.len());
        bytes.splice(at..end, with.bytes());
        let split = split.index(bytes.len() + 1);
        prop_assert_eq!(read(&bytes, split), read(&bytes, 0));
    }
}
