//! Encodes the answers of the observer. Pure.
//!
//! The headers of each answer forbid caches to store it, browsers to guess its type, and web pages of another
//! origin to read it.

use std::borrow::Cow;
use std::io::Write;

use crate::protocol::http::HttpDate;

pub const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// What a request is answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageAnswer {
    pub status: u16,
    pub content_type: &'static str,
    /// Further header lines, each with its end.
    pub headers: Cow<'static, str>,
    pub body: Vec<u8>,
}

impl PageAnswer {
    pub fn of(content_type: &'static str, body: impl Into<Vec<u8>>) -> Self {
        PageAnswer {
            status: 200,
            content_type,
            headers: Cow::Borrowed(""),
            body: body.into(),
        }
    }

    /// Creates a plain-text answer. The statuses 405 and 503 get the header that belongs to them.
    pub fn text(status: u16, text: &str) -> Self {
        let headers = match status {
            405 => "Allow: GET, HEAD\r\n",
            503 => "Retry-After: 1\r\n",
            _ => "",
        };
        PageAnswer {
            status,
            content_type: TEXT,
            headers: Cow::Borrowed(headers),
            body: format!("{text}\n").into_bytes(),
        }
    }

    /// Returns the bytes of the answer. `bodiless` leaves the body out (HEAD); `close` says that nothing
    /// follows on the connection.
    pub fn encode(&self, bodiless: bool, close: bool, date: HttpDate) -> Vec<u8> {
        let mut out = Vec::with_capacity(512 + self.body.len());
        let (status, reason, date) = (self.status, reason(self.status), date.text());
        let (kind, length, headers) = (self.content_type, self.body.len(), &self.headers);
        let connection = if close { "Connection: close\r\n" } else { "" };
        // Writing to memory cannot fail.
        let _ = write!(
            out,
            "HTTP/1.1 {status} {reason}\r\nDate: {date}\r\nContent-Type: {kind}\r\n\
             Content-Length: {length}\r\nCache-Control: no-store\r\n\
             X-Content-Type-Options: nosniff\r\nCross-Origin-Resource-Policy: same-origin\r\n\
             {headers}{connection}\r\n"
        );
        if !bodiless {
            out.extend_from_slice(&self.body);
        }
        out
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_answer_has_its_headers_and_a_head_no_body() {
        let answer = PageAnswer::text(405, "no");
        let text = String::from_utf8(answer.encode(false, true, HttpDate(0))).unwrap();
        assert!(
            text.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"),
            "{text}"
        );
        for line in [
            "Allow: GET, HEAD",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            "Content-Length: 3",
            "Connection: close",
        ] {
            assert!(
                text.contains(&format!("\r\n{line}\r\n")),
                "{line} in {text}"
            );
        }
        assert!(text.ends_with("\r\n\r\nno\n"));
        let head = answer.encode(true, false, HttpDate(0));
        assert!(head.ends_with(b"\r\n\r\n"));
    }
}
