//! Decodes the head of a request: which call it is, how long the body is, and whether it is valid.

use super::refusal::{RejectedRequest, RequestLimits};
use super::respond_async::{self, JobRequestHead};
use super::response::ResponseOptions;
use crate::protocol::call::is_reserved;
use crate::protocol::trace_context::{TraceContext, TraceFields};
use httparse::{EMPTY_HEADER, Error, Header, Status};

pub(super) const HEADERS_MAX: usize = 100;
/// The largest number of bytes of an `X-Request-Id`.
const REQUEST_ID_BYTES: usize = 128;
/// The path of health checks.
const HEALTH: &str = "/healthz";

/// The length of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// There is no body.
    None,
    /// This many bytes.
    Known(usize),
    Chunked,
}

#[derive(Debug, Clone)]
pub enum Ask {
    /// `POST /`: the body is a call or a batch.
    Call,
    /// `POST /METHOD`: the body is the params.
    Method(String),
    /// A health check.
    Health,
    /// A preflight request: a browser asks what a page of a listed origin may do. `has_jobs` is whether requests may
    /// become jobs.
    Preflight { has_jobs: bool },
    /// A request that is refused. The connection may continue.
    Refused(RejectedRequest),
}

#[derive(Debug, Clone)]
pub struct RequestHead {
    /// The bytes of the head, including the empty line.
    pub length: usize,
    pub ask: Ask,
    pub body: Length,
    /// How to respond.
    pub reply: ResponseOptions,
    /// The client waits for permission to send the body (`Expect: 100-continue`).
    pub expects: bool,
    /// No further request is accepted on the connection.
    pub close: bool,
    /// The valid trace context of its headers, if the rules ask for it.
    pub trace: Option<Box<TraceContext>>,
    /// The valid id that its client has given it, if the rules ask for it.
    pub request_id: Option<Box<str>>,
    /// `Some` if the request becomes a job.
    pub job: Option<JobRequestHead>,
}

/// The headers that are used here.
#[derive(Default)]
pub(super) struct Fields<'a> {
    pub hosts: usize,
    pub host: Option<&'a [u8]>,
    types: usize,
    length: Option<&'a [u8]>,
    lengths: usize,
    /// The transfer codings in their order.
    codings: Vec<&'a [u8]>,
    /// A framing header spelt with an underscore, which some servers accept.
    misspelt: bool,
    encoded: bool,
    pub close: bool,
    keep: bool,
    expect: Option<&'a [u8]>,
    origin: Option<&'a [u8]>,
    origins: usize,
}

/// Returns the `X-Request-Id`: the first one, if it has at most 128 printable ASCII characters.
fn request_id(headers: &[Header<'_>]) -> Option<Box<str>> {
    let mut headers = headers.iter();
    let found = headers.find(|header| header.name.eq_ignore_ascii_case("x-request-id"))?;
    let text = std::str::from_utf8(found.value.trim_ascii()).ok()?;
    let is_printable = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
    let is_valid = (1..=REQUEST_ID_BYTES).contains(&text.len()) && text.bytes().all(is_printable);
    is_valid.then(|| text.into())
}

/// Checks a head whose lines end correctly.
pub(super) fn read(
    bytes: &[u8],
    rules: &RequestLimits<'_>,
) -> Result<RequestHead, RejectedRequest> {
    let mut headers = [EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(Status::Complete(_)) => {}
        Err(Error::TooManyHeaders) => {
            let text = format!("more than {HEADERS_MAX} headers");
            return Err(RejectedRequest::new(431, text));
        }
        Err(Error::Version) => {
            return Err(malformed("the version is neither HTTP/1.0 nor HTTP/1.1"));
        }
        Err(error) => return Err(malformed(&error.to_string())),
        Ok(Status::Partial) => return Err(malformed("the head is incomplete")),
    }
    let (method, target) = (
        request.method.unwrap_or_default(),
        request.path.unwrap_or_default(),
    );
    let old = request.version == Some(0);
    let fields = fields(request.headers)?;
    let path = path(method, target)?;
    if fields.hosts > 1 || (fields.hosts == 0 && !old) {
        return Err(malformed("a request of HTTP/1.1 has one Host"));
    }
    let body = body(&fields, old)?;
    let mut head = RequestHead {
        length: bytes.len(),
        ask: Ask::Health,
        body,
        reply: ResponseOptions {
            old,
            bodiless: method == "HEAD",
            ..ResponseOptions::default()
        },
        expects: false,
        close: if old { !fields.keep } else { fields.close },
        trace: None,
        request_id: None,
        job: None,
    };
    if rules.traces {
        let mut trace = TraceFields::default();
        for Header { name, value } in request.headers.iter() {
            trace.add_header(name, value);
        }
        head.trace = trace.received().valid();
    }
    if rules.request_ids {
        head.request_id = request_id(request.headers);
    }
    match ask(method, path, &fields, rules, &mut head) {
        Ok(ask) => {
            // A method of the server itself cannot be a job, and a preference that cannot be followed is ignored.
            if rules.jobs && matches!(&ask, Ask::Method(name) if !is_reserved(name)) {
                head.job = respond_async::read_headers(request.headers)?;
                head.reply.is_async = head.job.is_some();
            }
            head.ask = ask;
        }
        // If no body follows, the beginning of the next request is known.
        Err(refusal) if matches!(body, Length::None | Length::Known(0)) => {
            head.ask = match refusal.status {
                403 | 405 => Ask::Refused(refusal),
                _ => return Err(refusal),
            };
        }
        Err(refusal) => return Err(refusal),
    }
    Ok(head)
}

pub(super) fn malformed(what: &str) -> RejectedRequest {
    RejectedRequest::new(400, format!("malformed HTTP: {what}"))
}

pub(super) fn fields<'a>(headers: &[Header<'a>]) -> Result<Fields<'a>, RejectedRequest> {
    let mut fields = Fields::default();
    for Header { name, value } in headers {
        let is = |known: &str| name.eq_ignore_ascii_case(known);
        if is("host") {
            fields.hosts += 1;
            fields.host = Some(value);
        } else if is("content-length") {
            fields.lengths += 1;
            fields.length = Some(value);
        } else if is("transfer-encoding") {
            fields.codings.extend(list(value));
        } else if is("connection") {
            for word in list(value) {
                fields.close |= word.eq_ignore_ascii_case(b"close");
                fields.keep |= word.eq_ignore_ascii_case(b"keep-alive");
            }
        } else if is("expect") {
            fields.expect = Some(value);
        } else if is("origin") {
            fields.origins += 1;
            fields.origin = Some(value);
        } else if is("content-encoding") {
            fields.encoded |= !value.eq_ignore_ascii_case(b"identity");
        } else if is("content-type") {
            fields.types += 1;
        } else if is("content_length") || is("transfer_encoding") {
            fields.misspelt = true;
        }
    }
    fields.keep &= !fields.close;
    if fields.types > 1 {
        return Err(malformed("two Content-Types"));
    }
    Ok(fields)
}

/// Splits a list and removes the white space around its items.
fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii)
}

/// Returns the path of a target, without query and fragment.
pub(super) fn path<'a>(method: &str, target: &'a str) -> Result<&'a str, RejectedRequest> {
    if !target.is_ascii() {
        return Err(malformed("a target that is not ASCII"));
    }
    let after = |scheme: &str| {
        let start = target.get(..scheme.len())?;
        start
            .eq_ignore_ascii_case(scheme)
            .then(|| &target[scheme.len()..])
    };
    let path = match after("http://").or_else(|| after("https://")) {
        // The authority ends at any of these characters (RFC 3986, section 3.2).
        Some(rest) if !rest.starts_with('/') => match rest.find(['/', '?', '#']) {
            Some(at) if rest[at..].starts_with('/') => &rest[at..],
            _ => "/",
        },
        None if target.starts_with('/') => target,
        None if target == "*" && method == "OPTIONS" => "/",
        None if method == "CONNECT" => "/",
        _ => return Err(malformed("a target that is neither a path nor a URL")),
    };
    Ok(path.split(['?', '#']).next().unwrap_or_default())
}

/// Returns the length of the body. It must be given exactly once and in one way.
pub(super) fn body(fields: &Fields<'_>, old: bool) -> Result<Length, RejectedRequest> {
    if fields.misspelt {
        // A proxy in front may read it as the real header, and then the two would disagree about the next request.
        return Err(malformed(
            "an underscore in Content-Length or Transfer-Encoding",
        ));
    }
    if let [.., last] = fields.codings[..] {
        let chunked = |coding: &&[u8]| coding.eq_ignore_ascii_case(b"chunked");
        let times = fields.codings.iter().filter(|it| chunked(it)).count();
        if old || fields.lengths > 0 || !chunked(&last) || times != 1 {
            return Err(malformed(
                "Transfer-Encoding must be chunked, in HTTP/1.1, without a Content-Length beside it",
            ));
        }
        // RFC 9112, section 6.1: a coding that is not understood. `identity` is not a transfer coding since RFC 7230,
        // and a proxy in front of the server may treat it differently.
        if fields.codings.len() > 1 {
            return Err(RejectedRequest::new(
                501,
                "the only supported transfer coding is chunked",
            ));
        }
        return Ok(Length::Chunked);
    }
    match (fields.lengths, fields.length) {
        (0, _) | (_, None) => Ok(Length::None),
        (1, Some(digits)) if !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) => {
            let text = std::str::from_utf8(digits).unwrap_or_default();
            // A number that does not fit is over every limit.
            Ok(Length::Known(text.parse().unwrap_or(usize::MAX)))
        }
        (1, _) => Err(malformed("Content-Length must consist of digits")),
        _ => Err(malformed("two Content-Lengths")),
    }
}

fn ask(
    method: &str,
    path: &str,
    fields: &Fields<'_>,
    rules: &RequestLimits<'_>,
    head: &mut RequestHead,
) -> Result<Ask, RejectedRequest> {
    if let Some(origin) = fields.origin {
        let listed = rules.origins.iter().position(|o| o.as_bytes() == origin);
        let Some(listed) = listed.filter(|_| fields.origins == 1) else {
            return Err(RejectedRequest::new(
                403,
                "a web page may not call this server: http-origins does not list its origin",
            ));
        };
        head.reply.origin = u16::try_from(listed).ok();
    }
    let no_body = head.body == Length::None || head.body == Length::Known(0);
    match method {
        "POST" => {}
        "GET" | "HEAD" if path == HEALTH && no_body => return Ok(Ask::Health),
        "OPTIONS" if head.reply.origin.is_some() && no_body => {
            let has_jobs = rules.jobs;
            return Ok(Ask::Preflight { has_jobs });
        }
        _ => {
            let text = "calls need POST; GET and HEAD are answered at /healthz only";
            return Err(RejectedRequest::new(405, text));
        }
    }
    match fields.expect {
        Some(expect) if !expect.eq_ignore_ascii_case(b"100-continue") => {
            return Err(RejectedRequest::new(
                417,
                "the only supported expectation is 100-continue",
            ));
        }
        Some(_) => head.expects = !head.reply.old,
        None => {}
    }
    if fields.encoded {
        let text = "Content-Encoding is not supported; send plain JSON";
        return Err(RejectedRequest::new(415, text));
    }
    if let Length::Known(length) = head.body
        && length > rules.body
    {
        let limit = rules.body;
        let text = format!("a body of {length} bytes; limits.frame allows {limit}");
        return Err(RejectedRequest::new(413, text));
    }
    match path {
        "/" | "" => Ok(Ask::Call),
        _ => method_name(&path[1..]).map(Ask::Method),
    }
}

/// Returns the method name of a path, with its percent signs decoded.
fn method_name(path: &str) -> Result<String, RejectedRequest> {
    let wrong = || malformed("a path whose percent-encoding is not hexadecimal, or not UTF-8");
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || (rest.next()? as char).to_digit(16);
        match (digit(), digit()) {
            (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8),
            _ => return Err(wrong()),
        }
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}
