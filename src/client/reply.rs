//! The answer of a server, and its parser.
//!
//! The result, the id and an error's data stay raw JSON. Bytes that are no answer to the call are a
//! protocol error. An error answer is an error of the call.

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::error::ClientError;
use crate::protocol::answer;

/// The answer of a server, with its members byte for byte.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The name in the answer: that of the method, unless the handler sets another one.
    pub out: String,
    /// The result, as raw JSON.
    pub result: Box<RawValue>,
    /// The call's id, as raw JSON.
    pub id: Option<Box<RawValue>>,
}

impl Reply {
    /// Reads the result as an `R`.
    ///
    /// # Errors
    /// [`ClientError::Result`] if it is not an `R`.
    pub fn read<R: DeserializeOwned>(&self) -> Result<R, ClientError> {
        serde_json::from_str(self.result.get()).map_err(ClientError::Result)
    }
}

/// The result of a call.
pub(super) type Outcome = Result<Reply, ClientError>;

/// Reads the answer to a call with that id.
pub(super) fn parse(body: &[u8], id: Option<&str>) -> Outcome {
    let (echoed, outcome) = read(body)?;
    let echoed = echoed.as_deref().map(RawValue::get);
    // Errors have the id only if the server could read it.
    if outcome.is_ok() && echoed != id {
        return Err(ClientError::Protocol(format!(
            "the id of the call is {}, but the id of the answer is {}",
            id.unwrap_or("none"),
            echoed.unwrap_or("none"),
        )));
    }
    outcome
}

/// Reads the answer to any call. Returns its id and its content.
pub(super) fn read(body: &[u8]) -> Result<(Option<Box<RawValue>>, Outcome), ClientError> {
    // Raw values are read without recursion, so any nesting is possible.
    let answer =
        answer::read(body, usize::MAX).map_err(|error| ClientError::Protocol(error.to_string()))?;
    let id = answer.id.map(ToOwned::to_owned);
    let outcome = match answer.outcome {
        Ok(result) => Ok(Reply {
            out: answer.name.into_owned(),
            result: result.to_owned(),
            id: id.clone(),
        }),
        Err(error) => Err(ClientError::Refused(error)),
    };
    Ok((id, outcome))
}
