//! Holds what a server answered.

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::error::ClientError;

/// What a server answered, with its members to the letter.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The answer's name: the method's, unless the handler names it.
    pub out: String,
    /// The result, as raw JSON.
    pub result: Box<RawValue>,
    /// The call's id, as raw JSON.
    pub id: Option<Box<RawValue>>,
}

impl Reply {
    /// The result as an `R`.
    ///
    /// # Errors
    /// [`ClientError::Result`] when it is none.
    pub fn read<R: DeserializeOwned>(&self) -> Result<R, ClientError> {
        serde_json::from_str(self.result.get()).map_err(ClientError::Result)
    }
}
