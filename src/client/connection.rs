//! Calls a server over one blocking connection: `Client`.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};

use super::answer;
use super::error::ClientError;
use super::reply::Reply;
use super::stream::Stream;
use crate::protocol::code::Code;
use crate::protocol::frame::{self, DecodedFrame};

/// The largest body that can be told from the other dialects, in bytes: a length's fourth byte is
/// below 0x09. What declares more is no frame, but some other server's text.
const BODY_MAX: usize = 0x08FF_FFFF;

/// The least that is asked of the system at once, and the most that is made room for ahead of the
/// bytes themselves: a declared length alone allocates no more than this.
const READ_MIN: usize = 16 << 10;
const READ_MAX: usize = 1 << 20;

/// A connection to a server.
#[derive(Debug)]
pub struct Client {
    /// `None` once an error left it unclear which answer comes next.
    pub(super) stream: Option<Stream>,
    /// What was received and not yet taken.
    pub(super) inbox: Vec<u8>,
    /// How long an answer may take; `None` for as long as the server lives.
    pub(super) timeout: Option<Duration>,
}

/// Connects as [`Client::connect`] does, for who has an event loop of its own: a non-blocking socket.
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
pub(super) struct OutgoingCall<'a> {
    #[serde(rename = "in")]
    pub(super) method: &'a str,
    pub(super) params: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) timeout_ms: Option<u64>,
}

/// The frame that a call is sent in.
pub(super) fn frame_of(call: &impl Serialize) -> Result<Vec<u8>, ClientError> {
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
    /// `"unix:/run/preforkd/rpc.sock"`. `timeout` is how long connecting may take for each address
    /// that a name stands for, and later how long each answer may take; `None` sets no limit of
    /// this side's own.
    ///
    /// # Errors
    /// [`ClientError::Address`] for what is no address, [`ClientError::NoServer`] if nobody is
    /// there.
    pub fn connect(address: &str, timeout: Option<Duration>) -> Result<Self, ClientError> {
        let stream = Stream::connect(address, timeout)?;
        // From the beginning, as no signal that ends this process waits for a destructor.
        stream.set_abort_on_close(true);
        Ok(Client {
            stream: Some(stream),
            inbox: Vec::new(),
            timeout,
        })
    }

    /// Calls a method and reads its result as an `R`.
    ///
    /// # Errors
    /// Each of [`ClientError`]'s but those of connecting.
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
        let reply = self.exchange(&frame_of(&call)?, |body| answer::parse(body, None))?;
        reply.read()
    }

    /// Calls a method with params, and an id, that are JSON already; they go through to the letter.
    /// `timeout_ms` is how many milliseconds the server is told that the caller waits.
    ///
    /// # Errors
    /// [`ClientError::Params`] for params or an id that are no JSON, and what [`Client::call`] has.
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
            answer::parse(body, call.id.map(RawValue::get))
        })
    }

    /// Whether the next call can be sent: no earlier error closed the connection.
    pub fn is_open(&self) -> bool {
        self.stream.is_some()
    }

    /// Sends one call and takes its answer, which `parse` reads.
    pub(super) fn exchange(
        &mut self,
        bytes: &[u8],
        parse: impl FnOnce(&[u8]) -> Result<Reply, ClientError>,
    ) -> Result<Reply, ClientError> {
        // Put back only when it is certain that the next bytes belong to the next call.
        let mut stream = self.stream.take().ok_or(ClientError::Closed)?;
        // A server that left between two calls is noticed before the next one is entrusted to it.
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
                // A server that refuses a call before it has read it whole answers, then closes.
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
            // The server closes after these, and whatever is sent meanwhile is not read.
            Err(ClientError::Refused(error)) => error.table_code().is_some_and(Code::closes),
            Err(_) => true,
        };
        if closed {
            self.stream = None;
        }
        outcome
    }

    /// The error of a connection that failed while a call was on its way.
    fn gone(&self, error: io::Error) -> ClientError {
        match (error.kind(), self.timeout) {
            (io::ErrorKind::TimedOut, Some(limit)) => ClientError::TimedOut(limit),
            _ => ClientError::Gone(error),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Kept, so it is at rest: there is no call to be given up.
        if let Some(stream) = &self.stream {
            stream.set_abort_on_close(false);
        }
    }
}

/// Why there is no answer.
pub(super) enum Lost {
    Io(io::Error),
    /// What came is no frame.
    Alien(String),
}

/// Reads until one frame is whole, and takes its body out of the inbox.
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
                    "the answer begins with \"{}\", which is no frame: some other server is there",
                    inbox.escape_ascii()
                )));
            }
        };
        let room = (need - inbox.len()).clamp(READ_MIN, READ_MAX);
        stream.receive(inbox, room, deadline).map_err(Lost::Io)?;
    }
}
