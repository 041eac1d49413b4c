//! Writes the calls of the load and recognizes answers.
//!
//! Calls are written once, before the load begins. An answer is read only as far as needed: where it ends,
//! and whether it is an error, whose code is then looked up. Other bytes end the connection, because what
//! follows them cannot be trusted.

use clap::ValueEnum;
use memchr::memchr;
use serde::Deserialize;

use super::http::{self, HttpResponse};
use crate::client::{ClientError, OutgoingCall, frame_of};
use crate::error::Result;
use crate::protocol::frame::{self, DecodedFrame};
use crate::protocol::{Code, answer};

/// The largest body of an answer, in bytes.
const BODY_MAX: usize = 0x08FF_FFFF;

/// How calls are written on the connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchDialect {
    /// Four bytes of length, then JSON
    Frame,
    /// One JSON value per line
    Line,
    /// HTTP/1.1, POST /METHOD with the params as body
    Http,
}

impl BenchDialect {
    /// Returns the name of the dialect on the command line.
    pub(super) const fn name(self) -> &'static str {
        match self {
            BenchDialect::Frame => "frame",
            BenchDialect::Line => "line",
            BenchDialect::Http => "http",
        }
    }
}

/// The calls of a load, ready to be sent.
#[derive(Debug)]
pub(super) struct CallEncoder {
    dialect: BenchDialect,
    written: Vec<Vec<u8>>,
}

/// The result of reading the bytes of a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ParsedAnswer {
    Result {
        used: usize,
    },
    /// An error with its name in the report.
    Error {
        used: usize,
        name: String,
    },
    /// An incomplete answer.
    Partial,
    /// Bytes that are no answer.
    Alien,
}

impl CallEncoder {
    /// Makes calls of `method` at `address` with each of `params`, which are JSON.
    pub(super) fn new(
        dialect: BenchDialect,
        address: &str,
        method: &str,
        params: &[String],
    ) -> Result<Self> {
        let framed = |params: &str| {
            frame_of(&OutgoingCall {
                method,
                params: serde_json::from_str(params).map_err(ClientError::Params)?,
                id: None,
                timeout_ms: None,
            })
        };
        let write = |params: &String| match dialect {
            BenchDialect::Frame => Ok(framed(params)?),
            BenchDialect::Line => {
                // JSON has line breaks only between tokens, where a blank means the same.
                let mut bytes = framed(&params.replace(['\n', '\r'], " "))?;
                bytes.drain(..frame::HEADER);
                bytes.push(b'\n');
                Ok(bytes)
            }
            BenchDialect::Http => Ok(http::request(address, method, params)),
        };
        Ok(CallEncoder {
            dialect,
            written: params.iter().map(write).collect::<Result<_>>()?,
        })
    }

    /// Returns the bytes of call number `number`. The params are used in turn.
    #[inline]
    pub(super) fn call(&self, number: u64) -> &[u8] {
        match self.written.as_slice() {
            [only] => only,
            written => &written[(number % written.len() as u64) as usize],
        }
    }

    /// Reads the first answer in `bytes`.
    #[inline]
    pub(super) fn read(&self, bytes: &[u8]) -> ParsedAnswer {
        match self.dialect {
            BenchDialect::Frame => match frame::decode(bytes, BODY_MAX) {
                DecodedFrame::Whole { body, used } => judge(body, used),
                DecodedFrame::Partial { .. } => ParsedAnswer::Partial,
                DecodedFrame::TooLarge { .. } => ParsedAnswer::Alien,
            },
            BenchDialect::Line => match memchr(b'\n', bytes) {
                Some(end) => judge(&bytes[..end], end + 1),
                None if bytes.len() > BODY_MAX => ParsedAnswer::Alien,
                None => ParsedAnswer::Partial,
            },
            BenchDialect::Http => match http::read(bytes, BODY_MAX) {
                HttpResponse::Whole {
                    status: 200, used, ..
                } => ParsedAnswer::Result { used },
                HttpResponse::Whole { status, body, used } => ParsedAnswer::Error {
                    used,
                    name: refusal_name(status, body),
                },
                HttpResponse::Partial => ParsedAnswer::Partial,
                HttpResponse::Alien => ParsedAnswer::Alien,
            },
        }
    }
}

/// The beginning of preforkd's answers. Answers that begin in another way are parsed as JSON.
const HEAD: &[u8] = br#"{"out":""#;
const ERROR: &[u8] = br#"error""#;

#[inline]
fn judge(body: &[u8], used: usize) -> ParsedAnswer {
    match body.strip_prefix(HEAD) {
        Some(rest) if !rest.starts_with(ERROR) && rest.first() != Some(&b'\\') => {
            ParsedAnswer::Result { used }
        }
        _ => judge_slowly(body, used),
    }
}

#[cold]
fn judge_slowly(body: &[u8], used: usize) -> ParsedAnswer {
    match answer::read(body, usize::MAX).map(|answer| answer.outcome) {
        Ok(Ok(_)) => ParsedAnswer::Result { used },
        Ok(Err(error)) => ParsedAnswer::Error {
            used,
            name: error_name(error.code),
        },
        Err(_) => ParsedAnswer::Alien,
    }
}

/// Returns the name of an HTTP error: that of preforkd's error, or the status.
#[cold]
fn refusal_name(status: u16, body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Coded {
        code: i64,
    }
    match serde_json::from_slice::<Coded>(body) {
        Ok(coded) => error_name(coded.code),
        Err(_) => format!("HTTP {status}"),
    }
}

/// Returns the name of an error code in the report.
fn error_name(code: i64) -> String {
    match Code::from_number(code) {
        Some(row) => row.name().to_owned(),
        None => format!("error {code}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn calls(dialect: BenchDialect, params: &[&str]) -> CallEncoder {
        let params: Vec<String> = params.iter().map(|text| (*text).to_owned()).collect();
        CallEncoder::new(dialect, "unix:/run/x", "pi\"ng", &params).unwrap()
    }

    #[test]
    fn params_come_in_turn_and_names_are_escaped() {
        let frames = calls(BenchDialect::Frame, &["1", "[2]"]);
        assert_eq!(&frames.call(0)[4..], br#"{"in":"pi\"ng","params":1}"#);
        assert_eq!(&frames.call(3)[4..], br#"{"in":"pi\"ng","params":[2]}"#);
        let lines = calls(BenchDialect::Line, &["[1,\r\n2]"]);
        assert_eq!(lines.call(7), b"{\"in\":\"pi\\\"ng\",\"params\":[1,  2]}\n");
        let http = calls(BenchDialect::Http, &["[2]"]);
        let request = b"POST /pi%22ng HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\n[2]";
        assert_eq!(http.call(0), request);
    }

    /// Returns the name of the error in an answer's body in the plain form.
    fn told(body: &str) -> String {
        let mut framed = Vec::new();
        let mark = frame::begin(&mut framed);
        framed.extend_from_slice(body.as_bytes());
        frame::finish(&mut framed, mark);
        let line = format!("{body}\n").into_bytes();
        let all =
            [(BenchDialect::Frame, framed), (BenchDialect::Line, line)].map(|(dialect, bytes)| {
                let calls = calls(dialect, &["1"]);
                assert_eq!(calls.read(&bytes[..bytes.len() - 1]), ParsedAnswer::Partial);
                match calls.read(&bytes) {
                    ParsedAnswer::Result { used } => {
                        assert_eq!(used, bytes.len());
                        "result".to_owned()
                    }
                    ParsedAnswer::Error { used, name } => {
                        assert_eq!(used, bytes.len());
                        name
                    }
                    other => format!("{other:?}"),
                }
            });
        let [frame, line] = all;
        assert_eq!(frame, line, "{body}");
        line
    }

    #[test]
    fn results_and_errors_are_told_apart_however_they_are_spelt() {
        for (body, is) in [
            (r#"{"out":"pong","result":1}"#, "result"),
            (r#"{"out":"errors","result":1}"#, "result"),
            (r#"{ "result": {"code": 1}, "out": "pong" }"#, "result"),
            (r#"{"out":"error","result":{"code":-32002}}"#, "overloaded"),
            (r#"{"result": {"code": 7}, "out": "\u0065rror"}"#, "error 7"),
            (r#"{"out":"\u0065rror","result":{"code":7}}"#, "error 7"),
            (r#"{"out":"error","result":1}"#, "Alien"),
            ("[]", "Alien"),
        ] {
            assert_eq!(told(body), is, "{body}");
        }
        let frames = calls(BenchDialect::Frame, &["1"]);
        assert_eq!(frames.read(b"HTTP/1.1 400"), ParsedAnswer::Alien);
    }

    #[test]
    fn a_response_is_judged_by_its_status_and_its_code() {
        let http = calls(BenchDialect::Http, &["1"]);
        let response = |status: &str, body: &str| {
            let length = body.len();
            format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()
        };
        for (bytes, is) in [
            (response("200 OK", r#"{"code":7}"#), None),
            (
                response("503 Service Unavailable", r#"{"code":-32002}"#),
                Some("overloaded"),
            ),
            (response("404 Not Found", "<html>"), Some("HTTP 404")),
            (response("500 X", r#"{"code":7}"#), Some("error 7")),
        ] {
            let used = bytes.len();
            let expected = match is {
                None => ParsedAnswer::Result { used },
                Some(name) => ParsedAnswer::Error {
                    used,
                    name: name.into(),
                },
            };
            assert_eq!(http.read(&bytes), expected);
        }
        assert_eq!(http.read(b"{\"out\":\"pong\"}"), ParsedAnswer::Alien);
    }
}
