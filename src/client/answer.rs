//! Reads an answer in the plain form.
//!
//! The result, the id and an error's data stay raw JSON. What is no answer to the call is a protocol
//! error; an answer that is an error is the call's own.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::error::ClientError;
use super::reply::Reply;
use crate::protocol::rpc_error::RpcError;

#[derive(Deserialize)]
struct Answer {
    out: String,
    result: Box<RawValue>,
    #[serde(default)]
    id: Option<Box<RawValue>>,
}

/// An error's result; whatever a server leaves out has the cautious value.
#[derive(Deserialize)]
struct Refusal {
    code: i64,
    #[serde(default)]
    name: String,
    #[serde(default)]
    message: String,
    #[serde(default = "yes")]
    started: bool,
    #[serde(default)]
    data: Option<Box<RawValue>>,
}

fn yes() -> bool {
    true
}

/// Reads the answer to a call with that id.
pub(super) fn parse(body: &[u8], id: Option<&str>) -> Result<Reply, ClientError> {
    let (echoed, outcome) = read(body)?;
    let echoed = echoed.as_deref().map(RawValue::get);
    // Errors echo the id only when it could be read.
    if outcome.is_ok() && echoed != id {
        return Err(ClientError::Protocol(format!(
            "the call's id is {} and the answer's is {}",
            id.unwrap_or("none"),
            echoed.unwrap_or("none"),
        )));
    }
    outcome
}

/// What an answer says about its call.
type Outcome = Result<Reply, ClientError>;

/// Reads an answer to whatever call: its id, and what it says.
pub(super) fn read(body: &[u8]) -> Result<(Option<Box<RawValue>>, Outcome), ClientError> {
    let alien =
        |error| ClientError::Protocol(format!("the answer is not in the plain form: {error}"));
    let answer: Answer = serde_json::from_slice(body).map_err(alien)?;
    if answer.out == "error" {
        let refusal: Refusal = serde_json::from_str(answer.result.get()).map_err(alien)?;
        let refused = ClientError::Refused(RpcError {
            code: refusal.code,
            name: refusal.name.into(),
            message: refusal.message,
            started: refusal.started,
            data: refusal.data,
        });
        return Ok((answer.id, Err(refused)));
    }
    let reply = Reply {
        out: answer.out,
        result: answer.result,
        id: answer.id.clone(),
    };
    Ok((answer.id, Ok(reply)))
}
