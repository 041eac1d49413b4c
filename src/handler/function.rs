//! Rust closures as handlers: params and results go through serde, or stay JSON.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::{Context, Handler, Placement};
use crate::protocol::code::Code;
use crate::protocol::json;
use crate::protocol::rpc_error::{RpcError, excerpt};

/// Characters of a long refusal's end that are repeated.
const EXCERPT_END: usize = 150;

/// A closure, and where it runs.
pub struct Function<F> {
    function: F,
    placement: Placement,
}

/// Makes a handler of a closure from typed params to a typed result.
pub fn typed<P, R>(
    placement: Placement,
    function: impl Fn(&Context<'_>, P) -> Result<R, RpcError> + Send + Sync + 'static,
) -> impl Handler + 'static
where
    P: DeserializeOwned,
    R: Serialize,
{
    let function = move |params: &str, context: &Context<'_>, result: &mut Vec<u8>| {
        let params = serde_json::from_str(params).map_err(|error| refused(&error))?;
        let answer = function(context, params)?;
        let start = result.len();
        serde_json::to_writer(&mut *result, &answer).map_err(|error| {
            RpcError::of(
                Code::Internal,
                format!("the result is no JSON: {error}"),
                true,
            )
        })?;
        // A raw value may be written over several lines; nothing else is.
        json::flatten_to_one_line(&mut result[start..]);
        Ok(())
    };
    Function {
        function,
        placement,
    }
}

/// Makes a handler of a closure from params as they were written to a result that is JSON.
pub fn raw(
    function: impl Fn(&Context<'_>, &str) -> Result<Box<RawValue>, RpcError> + Send + Sync + 'static,
) -> impl Handler + 'static {
    let placement = Placement::Thread;
    let function = move |params: &str, context: &Context<'_>, result: &mut Vec<u8>| {
        let start = result.len();
        result.extend_from_slice(function(context, params)?.get().as_bytes());
        json::flatten_to_one_line(&mut result[start..]);
        Ok(())
    };
    Function {
        function,
        placement,
    }
}

/// serde repeats the value that it did not expect, however long, and says where it stood at the
/// end; what was expected comes in between.
fn refused(error: &serde_json::Error) -> RpcError {
    const WHOLE: usize = 300;
    let text = error.to_string();
    if text.len() <= WHOLE {
        return RpcError::invalid_params(text);
    }
    let end: String = text.chars().rev().take(EXCERPT_END).collect();
    let end: String = end.chars().rev().collect();
    RpcError::invalid_params(format!("{} {end}", excerpt(&text)))
}

impl<F> Handler for Function<F>
where
    F: Fn(&str, &Context<'_>, &mut Vec<u8>) -> Result<(), RpcError> + Send + Sync,
{
    fn call(
        &self,
        params: &str,
        context: &Context<'_>,
        result: &mut Vec<u8>,
    ) -> Result<(), RpcError> {
        (self.function)(params, context, result)
    }

    fn placement(&self) -> Placement {
        self.placement
    }
}
