//! Decodes a request for a page: GET or HEAD without a body, as the observer answers it.
//!
//! The rules for lines, targets and lengths are those of calls. Whether the path exists, and whether the
//! `Host` may be used, is decided by the observer. A refusal says whether the connection may continue: only
//! if it is known where the next request begins.

use httparse::{EMPTY_HEADER, Error, Status};

use super::head::{HEADERS_MAX, Length, body, fields, malformed, path};
use super::{ParseProgress, RejectedRequest, head_end};

/// A request for a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequest {
    /// The bytes of the request.
    pub used: usize,
    /// Only the head of the answer is wanted (HEAD).
    pub bodiless: bool,
    /// The path, without query.
    pub path: String,
    /// What is behind the question mark.
    pub query: String,
    /// The value of `Host`.
    pub host: String,
    /// No further request comes on the connection.
    pub close: bool,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRefusal {
    pub status: u16,
    pub text: String,
    /// The bytes of the request; `None`: the connection is to be closed.
    pub used: Option<usize>,
    pub bodiless: bool,
    /// No further request comes on the connection.
    pub close: bool,
}

impl From<RejectedRequest> for PageRefusal {
    fn from(refused: RejectedRequest) -> Self {
        PageRefusal {
            status: refused.status,
            text: refused.error.message,
            used: None,
            bodiless: false,
            close: true,
        }
    }
}

/// Decodes the request at the beginning of `bytes`. They begin with those that were passed the last time. `None`: more
/// bytes are needed. An empty line before a request is skipped by the caller with [`blank_lines`].
///
/// # Errors
/// The refusal to answer with.
pub fn decode_page(
    bytes: &[u8],
    progress: &mut ParseProgress,
) -> Result<Option<PageRequest>, PageRefusal> {
    let Some(end) = head_end(bytes, progress)? else {
        return Ok(None);
    };
    *progress = ParseProgress::default();
    let mut headers = [EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(&bytes[..end]) {
        Ok(Status::Complete(_)) => {}
        Err(Error::TooManyHeaders) => {
            let text = format!("more than {HEADERS_MAX} headers");
            return Err(RejectedRequest::new(431, text).into());
        }
        Err(Error::Version) => return Err(version()),
        Err(error) => return Err(malformed(&error.to_string()).into()),
        Ok(Status::Partial) => return Err(malformed("the head is incomplete").into()),
    }
    if request.version != Some(1) {
        return Err(version());
    }
    let method = request.method.unwrap_or_default();
    let target = request.path.unwrap_or_default();
    let fields = fields(request.headers)?;
    let path = path(method, target)?.to_owned();
    if fields.hosts != 1 {
        return Err(malformed("a request of HTTP/1.1 has one Host").into());
    }
    if !matches!(body(&fields, false)?, Length::None | Length::Known(0)) {
        return Err(malformed("a request for a page has no body").into());
    }
    let bodiless = method == "HEAD";
    if !matches!(method, "GET" | "HEAD") {
        return Err(PageRefusal {
            status: 405,
            text: "only GET and HEAD are answered here; calls go to a listener".into(),
            used: Some(end),
            bodiless,
            close: fields.close,
        });
    }
    let query = target.split_once('?').map_or("", |(_, query)| query);
    let host = authority(target).map_or(fields.host.unwrap_or_default(), str::as_bytes);
    Ok(Some(PageRequest {
        used: end,
        bodiless,
        path,
        query: query.split('#').next().unwrap_or_default().to_owned(),
        host: String::from_utf8_lossy(host).into_owned(),
        close: fields.close,
    }))
}

/// Returns the host and port of a target in absolute form, which count instead of `Host` (RFC 9112, section
/// 3.2.2).
fn authority(target: &str) -> Option<&str> {
    let (_, rest) = target
        .split_once("://")
        .filter(|_| !target.starts_with('/'))?;
    rest.split(['/', '?', '#']).next()
}

/// Returns the length in bytes of the empty lines before a request (RFC 9112, section 2.2).
pub fn blank_lines(bytes: &[u8]) -> usize {
    let lines = bytes.chunks_exact(2).take_while(|pair| *pair == b"\r\n");
    lines.count() * 2
}

fn version() -> PageRefusal {
    PageRefusal {
        status: 505,
        text: "only HTTP/1.1 is supported".into(),
        used: None,
        bodiless: false,
        close: true,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn decode(text: &str) -> Result<Option<PageRequest>, PageRefusal> {
        decode_page(text.as_bytes(), &mut ParseProgress::default())
    }

    fn status(text: &str) -> u16 {
        decode(text).unwrap_err().status
    }

    #[test]
    fn a_request_has_path_query_and_host() {
        let text = "GET /history.json?method=a%20b HTTP/1.1\r\nHost: localhost:9180\r\n\r\nGET";
        let found = decode(text).unwrap().unwrap();
        assert_eq!(found.used, text.len() - 3);
        let parts = (&*found.path, &*found.query, &*found.host);
        assert_eq!(parts, ("/history.json", "method=a%20b", "localhost:9180"));
        assert!(!found.bodiless && !found.close);
        assert_eq!(decode("GET / HTTP/1.1\r\nHost: a\r\n"), Ok(None));
        let absolute = decode("GET http://b:80/x?y HTTP/1.1\r\nHost: a\r\n\r\n");
        let absolute = absolute.unwrap().unwrap();
        assert_eq!((&*absolute.host, &*absolute.path), ("b:80", "/x"));
        let head = decode("HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        let head = head.unwrap().unwrap();
        assert!(head.bodiless && head.close);
    }

    #[test]
    fn what_is_not_answered_has_its_status() {
        for (text, expected) in [
            ("GET / HTTP/1.0\r\nHost: a\r\n\r\n", 505),
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
            ("GET / HTTP/1.1\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
            ("GET / HTTP/1.1\nHost: a\n\n", 400),
            ("GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET /\u{e9} HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
                400,
            ),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                400,
            ),
            ("POST / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        ] {
            assert_eq!(status(text), expected, "{text:?}");
        }
        let long = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", "a".repeat(17_000));
        assert_eq!(status(&long), 431);
        let post = decode("POST / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap_err();
        assert!(post.used.is_some(), "the next request is known");
    }

    #[test]
    fn empty_lines_before_a_request_are_skipped() {
        assert_eq!(blank_lines(b"\r\n\r\nGET"), 4);
        assert_eq!(blank_lines(b"\rGET"), 0);
    }
}
