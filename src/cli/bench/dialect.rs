//! How the load writes calls and tells answers apart.
//!
//! Calls are written once, before the load begins. Of an answer no more is read than has to be: where
//! it ends, and whether it is an error, whose code is then looked up. What is no answer is an error of
//! its own, for behind it nothing on that connection can be trusted.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Dialect;
use crate::error::{Error, Result};
use crate::protocol::Code;
use crate::protocol::frame::{self, Decoded};

/// The largest body that an answer may declare, in bytes.
const BODY_MAX: usize = 0x08FF_FFFF;

/// The calls of a load, ready to be sent.
#[derive(Debug)]
pub(super) struct Calls {
    dialect: Dialect,
    written: Vec<Vec<u8>>,
}

/// What stands at the head of the bytes of a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A result.
    Result { used: usize },
    /// An error with this code.
    Error { used: usize, code: i64 },
    /// Not whole yet; so many bytes make it so, or show how many more it needs.
    Partial { need: usize },
    /// Something else.
    Alien,
}

impl Calls {
    /// Calls of `method` with each of `params`, which are JSON.
    pub(super) fn new(dialect: Dialect, method: &str, params: &[String]) -> Result<Self> {
        let method = serde_json::Value::from(method);
        let write = |params: &String| match dialect {
            Dialect::Frame => {
                let mut bytes = Vec::new();
                let mark = frame::begin(&mut bytes);
                bytes.extend_from_slice(
                    format!(r#"{{"in":{method},"params":{params}}}"#).as_bytes(),
                );
                if frame::finish(&mut bytes, mark) && bytes.len() <= BODY_MAX {
                    Ok(bytes)
                } else {
                    Err(Error::Usage(
                        "the params are longer than a frame can be".into(),
                    ))
                }
            }
        };
        Ok(Calls {
            dialect,
            written: params.iter().map(write).collect::<Result<_>>()?,
        })
    }

    /// The bytes of call number `number`; the params come in turn.
    #[inline]
    pub(super) fn call(&self, number: u64) -> &[u8] {
        match self.written.as_slice() {
            [only] => only,
            written => &written[(number % written.len() as u64) as usize],
        }
    }

    /// Reads the answer at the head of `bytes`.
    #[inline]
    pub(super) fn read(&self, bytes: &[u8]) -> Answer {
        match self.dialect {
            Dialect::Frame => match frame::decode(bytes, BODY_MAX) {
                Decoded::Whole { body, used } => judge(body, used),
                Decoded::Partial { need } => Answer::Partial { need },
                Decoded::TooLarge { .. } => Answer::Alien,
            },
        }
    }
}

/// How preforkd begins an answer, and how it goes on when that is an error. Whatever is spelt otherwise
/// is read as JSON.
const HEAD: &[u8] = br#"{"out":""#;
const ERROR: &[u8] = br#"error""#;

#[inline]
fn judge(body: &[u8], used: usize) -> Answer {
    match body.strip_prefix(HEAD) {
        Some(rest) if !rest.starts_with(ERROR) && rest.first() != Some(&b'\\') => {
            Answer::Result { used }
        }
        _ => judge_slowly(body, used),
    }
}

#[cold]
fn judge_slowly(body: &[u8], used: usize) -> Answer {
    #[derive(Deserialize)]
    struct Head<'a> {
        #[serde(borrow)]
        out: std::borrow::Cow<'a, str>,
        #[serde(rename = "result")]
        _result: IgnoredAny,
    }
    #[derive(Deserialize)]
    struct Refusal {
        result: Coded,
    }
    #[derive(Deserialize)]
    struct Coded {
        code: i64,
    }
    match serde_json::from_slice::<Head<'_>>(body) {
        Ok(head) if head.out == "error" => match serde_json::from_slice::<Refusal>(body) {
            Ok(refusal) => Answer::Error {
                used,
                code: refusal.result.code,
            },
            Err(_) => Answer::Alien,
        },
        Ok(_) => Answer::Result { used },
        Err(_) => Answer::Alien,
    }
}

/// What the report calls an error with this code.
pub(super) fn error_name(code: i64) -> String {
    match Code::from_number(code) {
        Some(row) => row.name().to_owned(),
        None => format!("error {code}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn calls(params: &[&str]) -> Calls {
        let params: Vec<String> = params.iter().map(|text| (*text).to_owned()).collect();
        Calls::new(Dialect::Frame, "pi\"ng", &params).unwrap()
    }

    #[test]
    fn params_come_in_turn_and_names_are_escaped() {
        let calls = calls(&["1", "[2]"]);
        assert_eq!(&calls.call(0)[4..], br#"{"in":"pi\"ng","params":1}"#);
        assert_eq!(&calls.call(3)[4..], br#"{"in":"pi\"ng","params":[2]}"#);
    }

    #[test]
    fn results_and_errors_are_told_apart_however_they_are_spelt() {
        let read = |body: &str| {
            let mut bytes = Vec::new();
            let mark = frame::begin(&mut bytes);
            bytes.extend_from_slice(body.as_bytes());
            frame::finish(&mut bytes, mark);
            assert_eq!(calls(&["1"]).read(&bytes[..3]), Answer::Partial { need: 4 });
            match calls(&["1"]).read(&bytes) {
                Answer::Result { used } => {
                    assert_eq!(used, bytes.len());
                    "result".to_owned()
                }
                Answer::Error { used, code } => {
                    assert_eq!(used, bytes.len());
                    error_name(code)
                }
                other => format!("{other:?}"),
            }
        };
        for (body, told) in [
            (r#"{"out":"pong","result":1}"#, "result"),
            (r#"{"out":"errors","result":1}"#, "result"),
            (r#"{ "result": {"code": 1}, "out": "pong" }"#, "result"),
            (r#"{"out":"error","result":{"code":-32002}}"#, "overloaded"),
            (r#"{"result": {"code": 7}, "out": "\u0065rror"}"#, "error 7"),
            (r#"{"out":"\u0065rror","result":{"code":7}}"#, "error 7"),
            (r#"{"out":"error","result":1}"#, "Alien"),
            ("[]", "Alien"),
        ] {
            assert_eq!(read(body), told, "{body}");
        }
        assert_eq!(calls(&["1"]).read(b"HTTP/1.1 400"), Answer::Alien);
    }
}
