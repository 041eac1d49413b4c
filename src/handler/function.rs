//! Runs Rust closures as handlers: params and results go through serde, or stay JSON.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::{Context, Handler, Placement};
use crate::protocol::code::Code;
use crate::protocol::json;
use crate::protocol::rpc_error::{RpcError, excerpt};

/// How many characters of the end of a long serde error the answer contains.
const EXCERPT_END: usize = 150;

/// A closure and its placement.
pub struct Function<F> {
    function: F,
    placement: Placement,
}

/// Makes a handler from a closure with typed params and a typed result.
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
                format!("the result is not JSON: {error}"),
                true,
            )
        })?;
        // A raw value may contain line feeds; nothing else does.
        json::flatten_to_one_line(&mut result[start..]);
        Ok(())
    };
    Function {
        function,
        placement,
    }
}

/// Makes a handler from a closure that takes the params as written and returns JSON.
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

/// Cuts a long error of serde. It contains the unexpected value in full; what was expected follows, and
/// the position is at the end.
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
