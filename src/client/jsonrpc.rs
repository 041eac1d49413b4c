//! Makes a call in the JSON-RPC 2.0 form over frames (jsonrpc.org/specification).
//!
//! An error of preforkd has further members in `data`: the name, `started` and the detail. The error of another
//! server is passed on as it is, with `started` true, because the call may have begun.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::connection::{Client, frame_of};
use super::error::ClientError;
use super::job_info::present;
use super::reply::Reply;
use crate::protocol::rpc_error::RpcError;

/// The default id of a call. A call without an id would be a notification, which gets no answer.
const ID: &str = "1";

#[derive(Serialize)]
struct Request<'a> {
    jsonrpc: &'static str,
    method: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    params: Option<&'a RawValue>,
    id: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_ms: Option<u64>,
}

/// A response. It has either `result` or `error`.
#[derive(Deserialize)]
struct Response {
    jsonrpc: String,
    /// A null result counts as a result.
    #[serde(default, deserialize_with = "present")]
    result: Option<Box<RawValue>>,
    #[serde(default)]
    error: Option<Refusal>,
    #[serde(default)]
    id: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct Refusal {
    code: i64,
    message: String,
    #[serde(default)]
    data: Option<Box<RawValue>>,
}

/// The `data` of preforkd's errors.
#[derive(Deserialize)]
struct Details {
    name: String,
    started: bool,
    #[serde(default)]
    detail: Option<String>,
    #[serde(default)]
    data: Option<Box<RawValue>>,
}

impl Client {
    /// Makes a call like [`Client::call_raw`], in the JSON-RPC 2.0 form. Params that are `null` are left out. The
    /// default id is 1.
    ///
    /// # Errors
    /// As for [`Client::call_raw`].
    pub fn call_jsonrpc(
        &mut self,
        method: &str,
        params_json: &str,
        id: Option<&str>,
        timeout_ms: Option<u64>,
    ) -> Result<Reply, ClientError> {
        let raw = |text| serde_json::from_str::<&RawValue>(text).map_err(ClientError::Params);
        let id = raw(id.unwrap_or(ID))?;
        let params = raw(params_json)?;
        let request = frame_of(&Request {
            jsonrpc: "2.0",
            method,
            params: (params.get() != "null").then_some(params),
            id,
            timeout_ms,
        })?;
        self.exchange(&request, |body| parse(body, method, id.get()))
    }
}

fn parse(body: &[u8], method: &str, id: &str) -> Result<Reply, ClientError> {
    let alien = |what: String| {
        ClientError::Protocol(format!(
            "the answer is not in the JSON-RPC 2.0 form: {what}"
        ))
    };
    // A derived struct would accept an array for an object.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(alien("it is not an object".into()));
    }
    let response: Response =
        serde_json::from_slice(body).map_err(|error| alien(error.to_string()))?;
    if response.jsonrpc != "2.0" {
        return Err(alien(format!("its version is {:?}", response.jsonrpc)));
    }
    let echoed = response.id.as_deref().map_or("null", RawValue::get);
    match (response.result, response.error) {
        (Some(result), None) if echoed == id => Ok(Reply {
            out: method.to_owned(),
            result,
            id: response.id,
        }),
        // An error has the id of the call, or null if the server could not read the id.
        (None, Some(error)) if echoed == id || echoed == "null" => {
            Err(ClientError::Refused(error.into()))
        }
        (Some(_), None) | (None, Some(_)) => Err(alien(format!(
            "the id of the call is {id}, but the id of the answer is {echoed}"
        ))),
        (None, None) => Err(alien("it has neither a result nor an error".into())),
        (Some(_), Some(_)) => Err(alien("it has both a result and an error".into())),
    }
}

impl From<Refusal> for RpcError {
    fn from(refusal: Refusal) -> Self {
        let error = RpcError::new(refusal.code, refusal.message);
        let details = refusal
            .data
            .as_deref()
            .filter(|data| data.get().starts_with('{'));
        let details = details.and_then(|data| serde_json::from_str::<Details>(data.get()).ok());
        match details {
            Some(details) => RpcError {
                name: details.name.into(),
                message: details.detail.unwrap_or(error.message),
                started: details.started,
                data: details.data,
                ..error
            },
            None => RpcError {
                started: true,
                data: refusal.data,
                ..error
            },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(body: &str) -> Result<String, ClientError> {
        parse(body.as_bytes(), "add", "7").map(|reply| reply.result.get().to_owned())
    }

    #[test]
    fn a_result_is_taken_to_the_letter_and_null_is_one() {
        let long = "1234567890123456789012345678901234567890";
        let body = format!(r#"{{"jsonrpc": "2.0", "result": [{long}], "id": 7}}"#);
        assert_eq!(read(&body).unwrap(), format!("[{long}]"));
        let null = r#"{"jsonrpc": "2.0", "result": null, "id": 7}"#;
        assert_eq!(read(null).unwrap(), "null");
    }

    #[test]
    fn an_error_says_what_its_data_says() {
        let refused = |error: &str, id: &str| {
            let body = format!(r#"{{"jsonrpc":"2.0","error":{error},"id":{id}}}"#);
            match read(&body).unwrap_err() {
                ClientError::Refused(error) => error,
                other => panic!("{other:?}"),
            }
        };
        let ours = refused(
            r#"{"code":-32601,"message":"Method not found","data":{"name":"method-not-found","started":false,"detail":"no add"}}"#,
            "7",
        );
        let told = (&*ours.name, &*ours.message, ours.started);
        assert_eq!(told, ("method-not-found", "no add", false));
        let handlers = refused(
            r#"{"code":5,"message":"no","data":{"name":"error","started":true,"data":[1]}}"#,
            "null",
        );
        assert_eq!(handlers.data.unwrap().get(), "[1]");
        let others = refused(r#"{"code":5,"message":"no","data":{"why":1}}"#, "7");
        assert!(others.started, "what is not said is not promised");
        assert_eq!(others.data.unwrap().get(), r#"{"why":1}"#);
    }

    #[test]
    fn what_is_no_answer_to_the_call_is_a_protocol_error() {
        for (body, told) in [
            (r#"["2.0", 1, null, 7]"#, "not an object"),
            (r#"{"out":"pong","result":1}"#, "jsonrpc"),
            (r#"{"jsonrpc":"1.0","result":1,"id":7}"#, "version"),
            (r#"{"jsonrpc":"2.0","result":1,"id":8}"#, "call is 7"),
            (r#"{"jsonrpc":"2.0","result":1}"#, "answer is null"),
            (r#"{"jsonrpc":"2.0","id":7}"#, "neither"),
            (
                r#"{"jsonrpc":"2.0","result":1,"error":{"code":1,"message":""},"id":7}"#,
                "both",
            ),
        ] {
            let error = read(body).unwrap_err();
            assert!(matches!(error, ClientError::Protocol(_)), "{error:?}");
            assert!(error.to_string().contains(told), "{body}: {error}");
        }
    }
}
