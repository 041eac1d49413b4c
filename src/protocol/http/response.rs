//! Encodes responses: an answer with a head before it.

use super::super::code::Code;
use super::date::HttpDate;
use std::io::Write;

/// How to respond to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ResponseOptions {
    /// The request has HTTP/1.0, where a connection ends unless both sides want to keep it.
    pub old: bool,
    /// The request asks only for the head (HEAD).
    pub bodiless: bool,
    /// The index of the listed origin that it came from.
    pub origin: Option<u16>,
    /// The request becomes a job: a result is answered with 202.
    pub is_async: bool,
}

/// What all responses of a server have in common.
#[derive(Debug, Clone, Copy)]
pub struct ResponseContext<'a> {
    /// The origins whose web pages may call.
    pub origins: &'a [String],
    /// The time of the response.
    pub date: HttpDate,
}

/// Returns the status of an error in the plain form.
pub fn status_of(code: i64) -> u16 {
    match Code::from_number(code) {
        Some(Code::ParseError | Code::InvalidRequest | Code::InvalidParams) => 400,
        Some(Code::MethodNotFound | Code::NoSuchJob) => 404,
        Some(Code::Conflict) => 409,
        Some(Code::TooLarge) => 413,
        Some(Code::Overloaded | Code::Stopping | Code::Unavailable) => 503,
        Some(Code::Timeout) => 504,
        Some(Code::Cancelled) => 499,
        _ => 500,
    }
}

/// Turns the body that was appended to `out` from `mark` on into a response. `close` says that nothing
/// follows on this connection.
pub fn finish(
    out: &mut Vec<u8>,
    mark: usize,
    reply: ResponseOptions,
    status: u16,
    close: bool,
    about: ResponseContext<'_>,
) {
    let body = out.len() - mark;
    let is_accepted = reply.is_async && status == 200;
    let status = if is_accepted { 202 } else { status };
    if reply.bodiless || status == 204 {
        out.truncate(mark);
    }
    let end = out.len();
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(status_line(status).as_bytes());
    out.extend_from_slice(b"\r\nDate: ");
    about.date.append_to(out);
    out.extend_from_slice(b"\r\n");
    if status != 204 {
        out.extend_from_slice(b"Content-Type: application/json\r\nContent-Length: ");
        out.extend_from_slice(itoa::Buffer::new().format(body).as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    match status {
        405 => out.extend_from_slice(b"Allow: POST\r\n"),
        503 => out.extend_from_slice(b"Retry-After: 1\r\n"),
        _ => {}
    }
    if is_accepted {
        out.extend_from_slice(b"Preference-Applied: respond-async\r\n");
    }
    let listed = |number: u16| about.origins.get(usize::from(number));
    if let Some(origin) = reply.origin.and_then(listed) {
        let _ = write!(
            out,
            "Access-Control-Allow-Origin: {origin}\r\nVary: Origin\r\n"
        );
    }
    if close {
        out.extend_from_slice(b"Connection: close\r\n");
    } else if reply.old {
        out.extend_from_slice(b"Connection: keep-alive\r\n");
    }
    out.extend_from_slice(b"\r\n");
    // The length of the body is only known now, but belongs before it.
    let head = out.len() - end;
    out[mark..].rotate_right(head);
}

/// Appends the response to a preflight request: what a page of a listed origin may do. `has_jobs` is whether requests
/// may become jobs.
pub fn preflight(
    out: &mut Vec<u8>,
    reply: ResponseOptions,
    (close, has_jobs): (bool, bool),
    about: ResponseContext<'_>,
) {
    let mark = out.len();
    finish(out, mark, reply, 204, close, about);
    out.truncate(out.len() - 2);
    let of_jobs = if has_jobs {
        ", prefer, idempotency-key"
    } else {
        ""
    };
    let _ = write!(
        out,
        "Access-Control-Allow-Methods: POST\r\nAccess-Control-Allow-Headers: content-type{of_jobs}\r\n\
         Access-Control-Max-Age: 600\r\n\r\n"
    );
}

/// The status and its reason phrase.
fn status_line(status: u16) -> &'static str {
    match status {
        200 => "200 OK",
        202 => "202 Accepted",
        204 => "204 No Content",
        400 => "400 Bad Request",
        403 => "403 Forbidden",
        404 => "404 Not Found",
        405 => "405 Method Not Allowed",
        409 => "409 Conflict",
        413 => "413 Content Too Large",
        415 => "415 Unsupported Media Type",
        417 => "417 Expectation Failed",
        431 => "431 Request Header Fields Too Large",
        499 => "499 Client Closed Request",
        501 => "501 Not Implemented",
        503 => "503 Service Unavailable",
        504 => "504 Gateway Timeout",
        _ => "500 Internal Server Error",
    }
}
