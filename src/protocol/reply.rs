//! An answer in the form of its call and the dialect of its connection.
//!
//! [`AnswerFormat::compose`] appends it to a buffer, so that one write carries many. What goes into it
//! (a handler's result, to the letter) is appended by whoever knows it.

use super::body::Form;
use super::code::Code;
use super::http::{self, response};
use super::rpc_error::RpcError;
use super::{answer, frame, jsonrpc, line};

/// What an answer is wrapped in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// A length before it.
    Frame,
    /// A newline behind it.
    Line,
    /// A head before it.
    Http(http::ResponseOptions),
    /// A comma between it and the one before: it is a part of a batch's answer.
    Member,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerFormat {
    pub form: Form,
    /// The dialect's part.
    pub wrap: Framing,
}

/// What an answer says beside its result, where a dialect has a place for it.
#[derive(Debug, Clone, Copy)]
pub struct AnswerContext<'a> {
    /// It is the last one of its connection if that is `closing`, or the answer's own code is one
    /// that closes and is `ours`.
    pub last: bool,
    pub closing: bool,
    /// Its error is the server's own, whose code may close the connection.
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
    /// Appends one whole answer: named `name`, with the result that `fill` appends as JSON, or
    /// the error that it returns, which is returned again.
    #[inline]
    pub fn compose(
        self,
        out: &mut Vec<u8>,
        about: AnswerContext<'_>,
        (name, id): (&str, Option<&str>),
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
                match form {
                    Form::JsonRpc => jsonrpc::error(out, error, id),
                    Form::ParamsOnly => answer::bare_error(out, error),
                    Form::Plain | Form::Notification => answer::error(out, error, id),
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

    /// Appends the answer of a whole batch, of which `members` were composed one after the other.
    /// Where none of them has an answer, the batch has none either.
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

    /// Ends what `begin` began; 204 tells that there is nothing to be said.
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
