//! HTTP/1.1, as much of it as calls need (RFC 9110, RFC 9112).
//!
//! [`decode`] takes requests out of a connection's bytes, [`response::finish`] makes responses of
//! answers. httparse knows the grammar; what two readers could take for two requests is refused
//! here before it is asked: a bare newline, two lengths, chunks that are not quite. A refusal
//! that leaves in doubt where the next request begins closes the connection: no second request is
//! ever parsed out of a refused one.
//!
//! The bytes of a request stay with the connection until it is whole: [`ParseProgress`] remembers how
//! far they were looked at, and what the head said. It can be dropped at any time, and the bytes
//! be looked at again.

pub mod chunked;
pub mod date;
pub mod head;
mod refusal;
pub mod response;

use chunked::Walked;
use head::{Length, RequestHead};
use memchr::{memchr, memchr_iter};
use std::borrow::Cow;

pub use date::HttpDate;
pub use refusal::{HEAD_MAX, RejectedRequest, RequestLimits};
pub use response::{ResponseContext, ResponseOptions};

/// What is sent to a client that waits to be asked for its body.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// What stands at the head of some received bytes.
#[derive(Debug)]
pub enum DecodedRequest<'a> {
    Whole {
        head: RequestHead,
        /// Its body: borrowed, unless it came in chunks.
        body: Cow<'a, [u8]>,
        /// How many bytes it took.
        used: usize,
    },
    /// An empty line where a request may begin: it is passed over (RFC 9112, section 2.2). It belongs to
    /// no request, so a connection is at rest after it.
    Blank {
        /// How many bytes it took.
        used: usize,
    },
    /// The beginning of one, or nothing.
    Partial {
        /// The client waits for [`CONTINUE`] before it sends the body.
        waits: bool,
    },
    /// To be answered and closed: what follows can't be told from the rest of this request.
    Refused(RejectedRequest),
}

/// How far an unfinished request was looked at.
#[derive(Debug, Default)]
pub struct ParseProgress {
    /// No newline ends the head before this byte.
    scanned: usize,
    /// Where the line at `scanned` began.
    line: usize,
    head: Option<RequestHead>,
    /// Where the first chunk that is not whole begins, counted from the body's first byte, and
    /// how much those before it held.
    chunk: (usize, usize),
    /// The client was asked to go on, or went on by itself.
    continued: bool,
}

impl ParseProgress {
    /// Whether the client, which has sent so many bytes of its request, waits for [`CONTINUE`] before it sends
    /// the body.
    pub fn waits(&self, sent: usize) -> bool {
        let is_asked = |head: &RequestHead| head.expects && sent == head.length;
        !self.continued && self.head.as_ref().is_some_and(is_asked)
    }

    /// Remembers that [`CONTINUE`] was sent.
    pub fn continued(&mut self) {
        self.continued = true;
    }
}

/// Reads the request at the head of `bytes`, which are those of the last time and more.
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

/// The body out of chunks that are known to be whole.
fn gathered(rest: &[u8], total: usize, limit: usize) -> Result<Vec<u8>, RejectedRequest> {
    let mut body = Vec::new();
    if body.try_reserve_exact(total).is_err() {
        return Err(RejectedRequest::new(
            413,
            "there is no memory for this body now",
        ));
    }
    let (mut at, mut again) = (0, 0);
    chunked::walk(rest, &mut at, &mut again, limit, |part| {
        body.extend_from_slice(part);
    })?;
    Ok(body)
}

/// Where the head ends, once its last line is there. Every line ends with CR LF, and no CR
/// stands elsewhere: what other servers are lenient about is what requests are smuggled with.
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
