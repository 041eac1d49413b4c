//! Encodes and decodes HTTP/1.1, as much of it as calls need (RFC 9110, RFC 9112).
//!
//! [`decode`] takes requests from the bytes of a connection. [`response::finish`] makes responses of answers.
//! httparse knows the grammar. Input that two parsers could understand differently is refused besides: a bare
//! line feed, two lengths, malformed chunks. If a refusal leaves in doubt where the next request begins, it closes
//! the connection. So no second request is ever parsed from a refused one.
//!
//! The connection keeps the bytes of a request until it is complete. [`ParseProgress`] records how far
//! they were parsed, and the content of the head. It can be dropped at any time; then the bytes are
//! parsed again.

pub mod chunked;
pub mod date;
pub mod get;
pub mod head;
mod refusal;
pub mod respond_async;
pub mod response;

use chunked::Walked;
use head::{Length, RequestHead};
use memchr::{memchr, memchr_iter};
use std::borrow::Cow;

pub use date::HttpDate;
pub use refusal::{HEAD_MAX, RejectedRequest, RequestLimits};
pub use response::{ResponseContext, ResponseOptions};

/// Sent to a client that waits for permission to send its body.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The result of decoding the beginning of received bytes.
#[derive(Debug)]
pub enum DecodedRequest<'a> {
    Whole {
        head: RequestHead,
        /// The body: borrowed, unless it was chunked.
        body: Cow<'a, [u8]>,
        used: usize,
    },
    /// An empty line before a request; it is skipped (RFC 9112, section 2.2). It belongs to no request,
    /// so the connection is quiescent after it.
    Blank { used: usize },
    /// An incomplete request, or nothing.
    Partial {
        /// The client waits for [`CONTINUE`] before it sends the body.
        waits: bool,
    },
    /// Answer it and close the connection, because the end of this request is unknown.
    Refused(RejectedRequest),
}

/// How far an incomplete request was parsed.
#[derive(Debug, Default)]
pub struct ParseProgress {
    /// No line feed ends the head before this byte.
    scanned: usize,
    /// The beginning of the line at `scanned`.
    line: usize,
    head: Option<RequestHead>,
    /// Where the first incomplete chunk begins, counted from the first byte of the body, and the content
    /// length of the chunks before it.
    chunk: (usize, usize),
    /// [`CONTINUE`] was sent, or the client sent the body without it.
    continued: bool,
}

impl ParseProgress {
    /// Returns whether the client waits for [`CONTINUE`] before it sends the body. `sent` is the number
    /// of bytes of its request that it has sent.
    pub fn waits(&self, sent: usize) -> bool {
        let is_asked = |head: &RequestHead| head.expects && sent == head.length;
        !self.continued && self.head.as_ref().is_some_and(is_asked)
    }

    /// Returns whether no line of a request was parsed.
    pub fn is_unused(&self) -> bool {
        self.line == 0
    }

    /// Records that [`CONTINUE`] was sent.
    pub fn continued(&mut self) {
        self.continued = true;
    }
}

/// Decodes the request at the beginning of `bytes`. They begin with those that were passed the last time.
pub fn decode<'a>(
    bytes: &'a [u8],
    progress: &mut ParseProgress,
    rules: &RequestLimits<'_>,
) -> DecodedRequest<'a> {
    match whole(bytes, progress, rules) {
        Ok(Some((head, body, used))) => DecodedRequest::Whole { head, body, used },
        Ok(None) if progress.head.is_none() && progress.line > 0 && bytes.starts_with(b"\r\n") => {
            *progress = ParseProgress::default();
            DecodedRequest::Blank { used: 2 }
        }
        Ok(None) => DecodedRequest::Partial {
            waits: progress.waits(bytes.len()),
        },
        Err(refusal) => DecodedRequest::Refused(refusal),
    }
}

type Request<'a> = (RequestHead, Cow<'a, [u8]>, usize);

fn whole<'a>(
    bytes: &'a [u8],
    progress: &mut ParseProgress,
    rules: &RequestLimits<'_>,
) -> Result<Option<Request<'a>>, RejectedRequest> {
    let head = match progress.head.take() {
        Some(head) => head,
        None => match head_end(bytes, progress)? {
            Some(end) => head::read(&bytes[..end], rules)?,
            None => return Ok(None),
        },
    };
    let rest = &bytes[head.length..];
    let (body, used) = match head.body {
        Length::None => (Cow::Borrowed(&rest[..0]), 0),
        Length::Known(length) => match rest.get(..length) {
            Some(body) => (Cow::Borrowed(body), length),
            None => {
                progress.head = Some(head);
                return Ok(None);
            }
        },
        Length::Chunked => {
            let (at, total) = &mut progress.chunk;
            match chunked::walk(rest, at, total, rules.body, |_| {})? {
                Walked::Whole { used } => (Cow::Owned(gathered(rest, *total, rules.body)?), used),
                Walked::Partial => {
                    progress.head = Some(head);
                    return Ok(None);
                }
            }
        }
    };
    let used = head.length + used;
    *progress = ParseProgress::default();
    Ok(Some((head, body, used)))
}

/// Joins complete chunks to a body.
fn gathered(rest: &[u8], total: usize, limit: usize) -> Result<Vec<u8>, RejectedRequest> {
    let mut body = Vec::new();
    if body.try_reserve_exact(total).is_err() {
        return Err(RejectedRequest::new(
            413,
            "there is not enough memory for this body now",
        ));
    }
    let (mut at, mut again) = (0, 0);
    chunked::walk(rest, &mut at, &mut again, limit, |part| {
        body.extend_from_slice(part);
    })?;
    Ok(body)
}

/// Returns where the head ends, once its last line has arrived. Every line must end with CR LF, and CR
/// must not occur elsewhere, because lenient parsing of these allows request smuggling.
fn head_end(bytes: &[u8], progress: &mut ParseProgress) -> Result<Option<usize>, RejectedRequest> {
    let seen = &bytes[..bytes.len().min(HEAD_MAX)];
    while let Some(found) = memchr(b'\n', seen.get(progress.scanned..).unwrap_or_default()) {
        let newline = progress.scanned + found;
        let line = &seen[progress.line..newline];
        let Some((b'\r', line)) = line.split_last() else {
            return Err(RejectedRequest::new(
                400,
                format!("a line that ends without a carriage return, at byte {newline}"),
            ));
        };
        if let Some(at) = memchr_iter(b'\r', line).next() {
            let at = progress.line + at;
            let text = format!("a carriage return within a line, at byte {at}");
            return Err(RejectedRequest::new(400, text));
        }
        let first = progress.line == 0;
        (progress.scanned, progress.line) = (newline + 1, newline + 1);
        match line.is_empty() {
            false => {}
            true if first => return Ok(None),
            true => return Ok(Some(newline + 1)),
        }
    }
    progress.scanned = progress.scanned.max(seen.len());
    if bytes.len() >= HEAD_MAX {
        let text = format!("a head of more than {HEAD_MAX} bytes");
        return Err(RejectedRequest::new(431, text));
    }
    Ok(None)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
