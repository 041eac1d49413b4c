//! Makes one call to a running server (`call`).
//!
//! The result is printed with the same value: only unprintable characters in it are escaped. An error answer is
//! [`Error::Refused`].

use std::borrow::Cow;
use std::io::{self, Read};

use super::args::{CallArgs, ParamsSource};
use super::parse;
use crate::client::{Client, ClientError, patience, whole_millis};
use crate::config::Overrides;
use crate::error::{Error, Result};
use crate::protocol::rpc_error::RpcError;

/// Makes the call. Returns the result as JSON.
pub(super) fn call(call: &CallArgs, overrides: &Overrides) -> Result<String> {
    let params = &params_of(&call.params)?;
    let address = call.target.address(overrides)?;
    let timeout_ms = call.timeout.map(whole_millis);
    let mut client = Client::connect(&address, patience(call.timeout))?;
    let id = call.id.as_deref();
    let outcome = if call.jsonrpc {
        client.call_jsonrpc(&call.method, params, id, timeout_ms)
    } else {
        client.call_raw(&call.method, params, id, timeout_ms)
    };
    let reply = outcome.map_err(|error| match error {
        ClientError::Refused(error) => Error::Refused(refusal(&call.method, &error)),
        error => error.into(),
    })?;
    Ok(reply.result.get().to_owned())
}

/// Returns the params of a call as JSON.
pub(super) fn params_of(source: &ParamsSource) -> Result<Cow<'_, str>> {
    match source {
        ParamsSource::Here(text) => Ok(Cow::Borrowed(text)),
        ParamsSource::Stdin => read_params(io::stdin().lock()).map(Cow::Owned),
    }
}

/// Reads the params from standard input: one JSON value.
fn read_params(mut from: impl Read) -> Result<String> {
    let mut text = String::new();
    match from.read_to_string(&mut text) {
        Ok(_) => parse::json(&text, "stdin").map(|()| text),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(Error::Usage("stdin is not UTF-8, so it is not JSON".into()))
        }
        Err(error) => Err(Error::system("read the params from stdin", error)),
    }
}

/// Formats an error answer.
pub(super) fn refusal(what: &str, error: &RpcError) -> String {
    let mut text = format!("{what}: {error}");
    if !error.started {
        text += " (the call did not begin)";
    }
    if let Some(data) = &error.data {
        text += &format!("\ndata: {data}");
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::protocol::code::Code;

    #[test]
    fn params_on_stdin_are_one_json_value() {
        assert_eq!(read_params(&b" [1,\n2]\n"[..]).unwrap(), " [1,\n2]\n");
        for (input, told) in [
            (&b""[..], "stdin is not JSON: EOF"),
            (b"1 2", "trailing characters"),
            (b"\"\xff\"", "not UTF-8"),
        ] {
            let error = read_params(input).unwrap_err();
            assert_eq!(error.exit_code(), 64);
            assert!(error.to_string().contains(told), "{error}");
        }
    }

    #[test]
    fn an_error_answer_says_all_it_knows() {
        let error = RpcError::of(Code::Overloaded, "the queue is full", false);
        assert_eq!(
            refusal("add", &error),
            "add: overloaded (-32002): the queue is full (the call did not begin)"
        );
        let error = RpcError::new(7, "no such customer").with_data([1, 2]);
        assert_eq!(
            refusal("find", &error),
            "find: error (7): no such customer\ndata: [1,2]"
        );
    }
}
