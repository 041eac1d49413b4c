//! Encodes an answer in the form of its call and the dialect of its connection.
//!
//! [`AnswerFormat::compose`] appends an answer to a buffer, so that one write can send many answers. The caller
//! appends the result of the handler byte for byte.

use super::body::Form;
use super::call_id::CallId;
use super::code::Code;
use super::http::{self, response};
use super::rpc_error::RpcError;
use super::{answer, frame, jsonrpc, line};

/// The framing of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// A length before the body.
    Frame,
    /// A line feed after the body.
    Line,
    /// An HTTP head before the body.
    Http(http::ResponseOptions),
    /// A comma between the parts of a batch's answer.
    Member,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerFormat {
    pub form: Form,
    /// The framing of the dialect.
    pub wrap: Framing,
}

/// Properties of an answer besides its result, for dialects that encode them.
#[derive(Debug, Clone, Copy)]
pub struct AnswerContext<'a> {
    /// Whether this may be the last answer of its connection. It is if the connection is `closing`, or if the error
    /// is `ours` and its code closes the connection.
    pub last: bool,
    pub closing: bool,
    /// Whether the error comes from the server itself. Only then its code may close the connection.
    pub ours: bool,
    pub http: http::ResponseContext<'a>,
}

impl AnswerContext<'_> {
    fn closes(&self, outcome: &Result<(), RpcError>) -> bool {
        let code = outcome
            .as_ref()
            .err()
            .and_then(RpcError::table_code)
            .is_some_and(Code::closes);
        self.last && (self.closing || self.ours && code)
    }
}

impl AnswerFormat {
    /// Appends one whole answer with `name`. `fill` appends the result as JSON, or returns an error. An error is
    /// appended instead of the result, and returned. `call` returns the call id that an error contains.
    #[inline]
    pub fn compose(
        self,
        out: &mut Vec<u8>,
        about: AnswerContext<'_>,
        (name, id): (&str, Option<&str>),
        call: impl FnOnce() -> Option<CallId>,
        fill: impl FnOnce(&mut Vec<u8>) -> Result<(), RpcError>,
    ) -> Result<(), RpcError> {
        let mark = self.wrap.begin(out);
        let start = out.len();
        match self.form {
            Form::Plain => answer::begin(out, name),
            Form::JsonRpc => jsonrpc::begin(out),
            Form::ParamsOnly | Form::Notification => {}
        }
        let outcome = fill(out);
        match (&outcome, self.form) {
            (_, Form::Notification) => out.truncate(start),
            (Ok(()), Form::Plain) => answer::end(out, id),
            (Ok(()), Form::JsonRpc) => jsonrpc::end(out, id),
            (Ok(()), Form::ParamsOnly) => {}
            (Err(error), form) => {
                out.truncate(start);
                let call = call();
                match form {
                    Form::JsonRpc => jsonrpc::error(out, error, id, call),
                    Form::ParamsOnly => answer::bare_error(out, error, call),
                    Form::Plain | Form::Notification => answer::error(out, error, id, call),
                }
            }
        }
        let status = match (&outcome, self.form) {
            (_, Form::Notification) => 204,
            (Err(error), Form::Plain | Form::ParamsOnly) => response::status_of(error.code),
            _ => 200,
        };
        self.wrap
            .finish(out, mark, status, about.closes(&outcome), about.http);
        outcome
    }

    /// Appends the answer of a whole batch; `members` are its composed parts. If no call of the batch is
    /// answered, the batch is not answered.
    pub fn batch(self, out: &mut Vec<u8>, about: AnswerContext<'_>, members: &[u8]) {
        let mark = self.wrap.begin(out);
        let mut status = 204;
        if !members.is_empty() {
            status = 200;
            out.push(b'[');
            out.extend_from_slice(members);
            out.push(b']');
        }
        self.wrap
            .finish(out, mark, status, about.closes(&Ok(())), about.http);
    }
}

impl Framing {
    #[inline]
    fn begin(self, out: &mut Vec<u8>) -> usize {
        match self {
            Framing::Frame => frame::begin(out),
            Framing::Line | Framing::Http(_) => out.len(),
            Framing::Member => {
                let mark = out.len();
                if mark > 0 {
                    out.push(b',');
                }
                mark
            }
        }
    }

    /// Appends the part after the result. Status 204 means that there is no body.
    #[inline]
    fn finish(
        self,
        out: &mut Vec<u8>,
        mark: usize,
        status: u16,
        close: bool,
        about: http::ResponseContext<'_>,
    ) {
        match self {
            Framing::Http(reply) => response::finish(out, mark, reply, status, close, about),
            _ if status == 204 => out.truncate(mark),
            Framing::Frame => {
                frame::finish(out, mark);
            }
            Framing::Line => line::finish(out, mark),
            Framing::Member => {}
        }
    }
}
