//! Answers the built-in methods ping, echo and sleep.

use std::time::Duration;

use super::{Context, Handler, Placement};
use crate::protocol::rpc_error::RpcError;

/// Returns the params; the `out` of the answer is "pong".
#[derive(Debug, Clone, Copy)]
pub struct Ping;

impl Handler for Ping {
    fn call(&self, params: &str, _: &Context<'_>, result: &mut Vec<u8>) -> Result<(), RpcError> {
        result.extend_from_slice(params.as_bytes());
        Ok(())
    }

    fn placement(&self) -> Placement {
        Placement::Inline
    }

    fn answer_name(&self) -> Option<&str> {
        Some("pong")
    }
}

/// Returns the params.
#[derive(Debug, Clone, Copy)]
pub struct Echo;

impl Handler for Echo {
    fn call(&self, params: &str, _: &Context<'_>, result: &mut Vec<u8>) -> Result<(), RpcError> {
        result.extend_from_slice(params.as_bytes());
        Ok(())
    }

    fn placement(&self) -> Placement {
        Placement::Inline
    }
}

/// Blocks a handler thread for as many seconds as its params say, and returns them.
#[derive(Debug, Clone, Copy)]
pub struct Sleep;

impl Handler for Sleep {
    fn call(
        &self,
        params: &str,
        context: &Context<'_>,
        result: &mut Vec<u8>,
    ) -> Result<(), RpcError> {
        let length = serde_json::from_str::<f64>(params)
            .ok()
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .ok_or_else(|| {
                RpcError::invalid_params("sleep takes a number of seconds, such as 0.5")
            })?;
        context.pause(length);
        result.extend_from_slice(params.as_bytes());
        Ok(())
    }
}
