//! What a request's head says: which call, how long a body, and whether it is one at all.

use super::refusal::{RejectedRequest, RequestLimits};
use super::response::ResponseOptions;
use httparse::{EMPTY_HEADER, Error, Header, Status};

/// The most header lines.
const HEADERS_MAX: usize = 100;
/// Where a load balancer asks whether the server is well.
const HEALTH: &str = "/healthz";

/// How long a body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// There is none.
    None,
    /// So many bytes.
    Known(usize),
    Chunked,
}

#[derive(Debug, Clone)]
pub enum Ask {
    /// `POST /`: the body is a call, or a batch.
    Call,
    /// `POST /METHOD`: the body is its params.
    Method(String),
    /// Whether the server is well.
    Health,
    /// What a page of a listed origin may do (a browser asks before it calls).
    Preflight,
    /// Nothing that is served; the connection may go on.
    Refused(RejectedRequest),
}

#[derive(Debug, Clone)]
pub struct RequestHead {
    /// Its bytes, the empty line included.
    pub length: usize,
    pub ask: Ask,
    pub body: Length,
    /// How to respond.
    pub reply: ResponseOptions,
    /// The client waits to be asked for the body (`Expect: 100-continue`).
    pub expects: bool,
    /// No further request is to be taken from the connection.
    pub close: bool,
}

/// The headers that mean something here.
#[derive(Default)]
struct Fields<'a> {
    hosts: usize,
    types: usize,
    length: Option<&'a [u8]>,
    lengths: usize,
    /// The transfer codings in their order.
    codings: Vec<&'a [u8]>,
    /// A length in a spelling that some servers take for the right one, and this one for any header.
    misspelt: bool,
    encoded: bool,
    close: bool,
    keep: bool,
    expect: Option<&'a [u8]>,
    origin: Option<&'a [u8]>,
    origins: usize,
}

/// Judges a head whose lines are known to end as they should.
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
        Err(Error::Version) => return Err(malformed("this is no version of HTTP/1")),
        Err(error) => return Err(malformed(&error.to_string())),
        Ok(Status::Partial) => return Err(malformed("the head ends before it is whole")),
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
    };
    match ask(method, path, &fields, rules, &mut head) {
        Ok(ask) => head.ask = ask,
        // Where no body follows, the next request can be told.
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

fn malformed(what: &str) -> RejectedRequest {
    RejectedRequest::new(400, format!("malformed HTTP: {what}"))
}

fn fields<'a>(headers: &[Header<'a>]) -> Result<Fields<'a>, RejectedRequest> {
    let mut fields = Fields::default();
    for Header { name, value } in headers {
        let is = |known: &str| name.eq_ignore_ascii_case(known);
        if is("host") {
            fields.hosts += 1;
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

/// The words of a list, white space around them removed.
fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii)
}

/// The path of a target, without query and fragment.
fn path<'a>(method: &str, target: &'a str) -> Result<&'a str, RejectedRequest> {
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
        // The authority ends where any of these begins (RFC 3986, section 3.2).
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

/// How long the body is: told once and in one way, or it is nobody's request.
fn body(fields: &Fields<'_>, old: bool) -> Result<Length, RejectedRequest> {
    if let [.., last] = fields.codings[..] {
        let chunked = |coding: &&[u8]| coding.eq_ignore_ascii_case(b"chunked");
        let times = fields
            .codings
            .iter()
            .copied()
            .filter(|c| chunked(c))
            .count();
        if old || fields.lengths > 0 || !chunked(&last) || times != 1 {
            return Err(malformed(
                "Transfer-Encoding is chunked, in HTTP/1.1, without a Content-Length beside it",
            ));
        }
        // What is left of RFC 2616: a coding that does nothing.
        let known = |coding: &&[u8]| chunked(coding) || coding.eq_ignore_ascii_case(b"identity");
        if !fields.codings.iter().all(known) {
            return Err(RejectedRequest::new(
                501,
                "no transfer coding is known but chunked",
            ));
        }
        return Ok(Length::Chunked);
    }
    match (fields.lengths, fields.length) {
        (0, _) if fields.misspelt => Err(malformed("a length whose name has no hyphen")),
        (0, _) | (_, None) => Ok(Length::None),
        (1, Some(digits)) if !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) => {
            let text = std::str::from_utf8(digits).unwrap_or_default();
            // What is over all numbers is over all limits.
            Ok(Length::Known(text.parse().unwrap_or(usize::MAX)))
        }
        (1, _) => Err(malformed("Content-Length is digits alone")),
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
        "OPTIONS" if head.reply.origin.is_some() && no_body => return Ok(Ask::Preflight),
        _ => {
            let text = "calls are made with POST; GET and HEAD answer at /healthz alone";
            return Err(RejectedRequest::new(405, text));
        }
    }
    match fields.expect {
        Some(expect) if !expect.eq_ignore_ascii_case(b"100-continue") => {
            return Err(RejectedRequest::new(
                417,
                "nothing can be expected but 100-continue",
            ));
        }
        Some(_) => head.expects = !head.reply.old,
        None => {}
    }
    if fields.encoded {
        let text = "a body is JSON as it stands: no Content-Encoding is known";
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

/// A method's name out of a path, with its percent signs taken for what they stand for.
fn method_name(path: &str) -> Result<String, RejectedRequest> {
    let wrong = || malformed("a path whose percent signs are not UTF-8");
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
