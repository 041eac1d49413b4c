//! Calls a server over one blocking connection: `Client`.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};

use super::error::ClientError;
use super::reply::{self, Reply};
use super::stream::Stream;
use crate::protocol::code::Code;
use crate::protocol::frame::{self, DecodedFrame};

/// The largest body of an answer in bytes: the fourth byte of its length is below 0x09. A larger length
/// means that the bytes are no frame, but text of another server.
const BODY_MAX: usize = 0x08FF_FFFF;

/// How many bytes of an answer of another kind of server an error shows.
const SHOWN: usize = 64;

/// The smallest number of bytes to read at once, and the largest number to allocate before they arrive. A declared
/// length alone allocates no more.
const READ_MIN: usize = 16 << 10;
const READ_MAX: usize = 1 << 20;

/// How much longer than the server the client waits: the server answers `timeout`, and that answer needs
/// time to arrive.
const GRACE: Duration = Duration::from_secs(5);

/// Returns how long the client waits for an answer that the server sends after `timeout`.
pub(crate) fn patience(timeout: Option<Duration>) -> Option<Duration> {
    timeout.map(|limit| limit.saturating_add(GRACE))
}

/// Converts a limit to milliseconds, rounded up, because a limit of 0 ms would be over at once.
pub(crate) fn whole_millis(limit: Duration) -> u64 {
    u64::try_from(limit.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// A connection to a server.
#[derive(Debug)]
pub struct Client {
    /// As it was given to `connect`.
    pub(super) address: String,
    /// `None` after an error that makes it unclear which answer comes next.
    pub(super) stream: Option<Stream>,
    /// Bytes that were received and not used.
    pub(super) inbox: Vec<u8>,
    /// The longest wait for an answer; `None` for no limit.
    pub(super) timeout: Option<Duration>,
}

/// Connects like [`Client::connect`], and returns a non-blocking socket for an event loop.
///
/// # Errors
/// [`ClientError::Address`], [`ClientError::NoServer`].
pub fn connect_nonblocking(
    address: &str,
    timeout: Option<Duration>,
) -> Result<OwnedFd, ClientError> {
    let stream = Stream::connect(address, timeout)?;
    stream
        .into_nonblocking()
        .map_err(|source| ClientError::NoServer {
            address: address.to_owned(),
            source,
        })
}

/// A call as it is written.
#[derive(Serialize)]
pub(crate) struct OutgoingCall<'a> {
    #[serde(rename = "in")]
    pub(crate) method: &'a str,
    pub(crate) params: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) timeout_ms: Option<u64>,
}

/// Encodes a call as a frame.
pub(crate) fn frame_of(call: &impl Serialize) -> Result<Vec<u8>, ClientError> {
    let mut bytes = Vec::new();
    let mark = frame::begin(&mut bytes);
    serde_json::to_writer(&mut bytes, call).map_err(ClientError::Params)?;
    let length = bytes.len() - mark - frame::HEADER;
    if length > BODY_MAX {
        return Err(ClientError::TooLarge(length));
    }
    frame::finish(&mut bytes, mark);
    Ok(bytes)
}

impl Client {
    /// Connects to `"127.0.0.1:8080"`, `"[::1]:8080"`, `"localhost:8080"` or
    /// `"unix:/run/preforkd/rpc.sock"`. `timeout` is the longest wait for a connection, for each address of
    /// a name, and later for each answer. `None` sets no limit.
    ///
    /// # Errors
    /// [`ClientError::Address`] if it is no address, [`ClientError::NoServer`] if no server answers.
    pub fn connect(address: &str, timeout: Option<Duration>) -> Result<Self, ClientError> {
        let stream = Stream::connect(address, timeout)?;
        // From the beginning, because a signal that ends this process calls no destructor.
        stream.set_abort_on_close(true);
        Ok(Client {
            address: address.to_owned(),
            stream: Some(stream),
            inbox: Vec::new(),
            timeout,
        })
    }

    /// Calls a method and reads its result as an `R`.
    ///
    /// # Errors
    /// Any [`ClientError`] except those of connecting.
    pub fn call<R: DeserializeOwned>(
        &mut self,
        method: &str,
        params: impl Serialize,
    ) -> Result<R, ClientError> {
        let params = to_raw_value(&params).map_err(ClientError::Params)?;
        let call = OutgoingCall {
            method,
            params: &params,
            id: None,
            timeout_ms: None,
        };
        let reply = self.exchange(&frame_of(&call)?, |body| reply::parse(body, None))?;
        reply.read()
    }

    /// Calls a method with params and an id that are JSON already. They are passed on byte for byte. The
    /// server gets `timeout_ms` as the time that the caller waits.
    ///
    /// # Errors
    /// [`ClientError::Params`] for params or an id that are no JSON, and those of [`Client::call`].
    pub fn call_raw(
        &mut self,
        method: &str,
        params_json: &str,
        id: Option<&str>,
        timeout_ms: Option<u64>,
    ) -> Result<Reply, ClientError> {
        let raw = |text| serde_json::from_str::<&RawValue>(text).map_err(ClientError::Params);
        let call = OutgoingCall {
            method,
            params: raw(params_json)?,
            id: id.map(raw).transpose()?,
            timeout_ms,
        };
        self.exchange(&frame_of(&call)?, |body| {
            reply::parse(body, call.id.map(RawValue::get))
        })
    }

    /// Returns whether the next call can be sent: no earlier error has closed the connection.
    pub fn is_open(&self) -> bool {
        self.stream.is_some()
    }

    /// Sends one call and receives its answer, which `parse` reads.
    pub(super) fn exchange(
        &mut self,
        bytes: &[u8],
        parse: impl FnOnce(&[u8]) -> Result<Reply, ClientError>,
    ) -> Result<Reply, ClientError> {
        // Put back only if it is certain that the next bytes belong to the next call.
        let mut stream = self.stream.take().ok_or(ClientError::Closed)?;
        // Notices a server that has closed the connection before the next call is sent.
        if self.inbox.is_empty() && stream.has_ended() {
            let left = io::Error::new(io::ErrorKind::UnexpectedEof, "the server has closed it");
            return Err(ClientError::NotSent(left));
        }
        let deadline = self
            .timeout
            .and_then(|limit| Instant::now().checked_add(limit));
        let sent = stream.send(bytes, deadline);
        let body = match (receive(&mut stream, &mut self.inbox, deadline), sent) {
            (Ok(body), sent) => {
                // A server that refuses a call before it has read all of it answers and closes.
                if sent.is_ok() {
                    self.stream = Some(stream);
                }
                body
            }
            (Err(_), Err(error)) if error.kind() != io::ErrorKind::TimedOut => {
                return Err(ClientError::NotSent(error));
            }
            (Err(_), Err(error)) => return Err(self.gone(error)),
            (Err(Lost::Io(error)), Ok(())) => return Err(self.gone(error)),
            (Err(Lost::Alien(text)), Ok(())) => return Err(ClientError::Protocol(text)),
        };
        let outcome = parse(&body);
        let closed = match &outcome {
            Ok(_) => false,
            // The server closes after these errors, and does not read what is sent.
            Err(ClientError::Refused(error)) => error.table_code().is_some_and(Code::closes),
            Err(_) => true,
        };
        if closed {
            self.stream = None;
        }
        outcome
    }

    /// Sets another limit for answers.
    pub(super) fn with_timeout(mut self, timeout: Option<Duration>) -> Self {
        self.timeout = timeout;
        self
    }

    /// Returns a second handle of the connection.
    pub(super) fn second(&self) -> Option<Stream> {
        self.stream.as_ref()?.try_clone().ok()
    }

    /// Returns the error of a connection that failed during a call.
    fn gone(&self, error: io::Error) -> ClientError {
        match (error.kind(), self.timeout) {
            (io::ErrorKind::TimedOut, Some(limit)) => ClientError::TimedOut(limit),
            _ => ClientError::Gone(error),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // No call is under way, so closing it cancels nothing.
        if let Some(stream) = &self.stream {
            stream.set_abort_on_close(false);
        }
    }
}

/// Why there is no answer.
pub(super) enum Lost {
    Io(io::Error),
    /// The received bytes are no frame.
    Alien(String),
}

/// Reads until one frame is complete, and takes its body out of the inbox.
pub(super) fn receive(
    stream: &mut Stream,
    inbox: &mut Vec<u8>,
    deadline: Option<Instant>,
) -> Result<Vec<u8>, Lost> {
    loop {
        let need = match frame::decode(inbox, BODY_MAX) {
            DecodedFrame::Whole { body, used } => {
                let body = body.to_vec();
                inbox.drain(..used);
                return Ok(body);
            }
            DecodedFrame::Partial { need } => need,
            DecodedFrame::TooLarge { .. } => {
                return Err(Lost::Alien(format!(
                    "the answer begins with \"{}\", which is not a frame: another kind of server listens there",
                    inbox[..inbox.len().min(SHOWN)].escape_ascii()
                )));
            }
        };
        let room = (need - inbox.len()).clamp(READ_MIN, READ_MAX);
        stream.receive(inbox, room, deadline).map_err(Lost::Io)?;
    }
}
