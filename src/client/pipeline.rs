//! Sends any number of calls ahead on one connection: a thread reads, and callers write.
//!
//! Each call has an id, a number of this connection, so that a quick call does not wait for a slow one before it. If
//! a connection ends, its unanswered calls fail with [`ClientError::Gone`]: they may have run. The next call opens a
//! new connection. No call is repeated.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::connection::{Lost, OutgoingCall, frame_of, receive, whole_millis};
use super::error::ClientError;
use super::error::clone_error;
use super::handle::Handle;
use super::pipelined_calls::{Entry, PipelinedCalls};
use super::reply;
use super::stream::Stream;
use crate::sys::lock::lock;

/// A connection on which calls are sent without waiting for earlier answers.
///
/// [`Pipeline::submit`] waits while the server does not read, because the connection has as many unanswered
/// calls as the server allows (`limits.pipeline`).
#[derive(Debug)]
pub struct Pipeline {
    address: String,
    timeout: Option<Duration>,
    /// `None` until a lost connection is opened again. Locked while a call is written, because frames must
    /// not mix.
    connection: Mutex<Option<PipelineConnection>>,
}

#[derive(Debug)]
struct PipelineConnection {
    stream: Stream,
    unanswered: Arc<Mutex<PipelinedCalls>>,
    /// The thread that reads; `None` once it was joined.
    reader: Option<JoinHandle<()>>,
}

impl Pipeline {
    /// Connects like [`Client::connect`](super::Client::connect). `timeout` is also the longest wait for each answer
    /// from its submission on. The server gets the timeout with each call (`timeout_ms`), and runs no call for
    /// longer.
    ///
    /// # Errors
    /// [`ClientError::Address`], [`ClientError::NoServer`], [`ClientError::NoThread`].
    pub fn connect(address: &str, timeout: Option<Duration>) -> Result<Self, ClientError> {
        let connection = PipelineConnection::open(address, timeout)?;
        Ok(Pipeline {
            address: address.to_owned(),
            timeout,
            connection: Mutex::new(Some(connection)),
        })
    }

    /// Sends a call. The handle gets the result. Answers may come in any order.
    ///
    /// # Errors
    /// [`ClientError::Params`], [`ClientError::TooLarge`], [`ClientError::NotSent`], [`ClientError::TimedOut`]. If
    /// the connection was lost before, also the errors of [`Pipeline::connect`].
    pub fn submit<R>(
        &self,
        method: &str,
        params: impl Serialize,
    ) -> Result<Handle<R>, ClientError> {
        let params = to_raw_value(&params).map_err(ClientError::Params)?;
        self.send(method, &params)
    }

    /// Sends a call with params that are JSON already.
    ///
    /// # Errors
    /// As for [`Pipeline::submit`].
    pub fn submit_raw<R>(&self, method: &str, params_json: &str) -> Result<Handle<R>, ClientError> {
        self.send(
            method,
            serde_json::from_str(params_json).map_err(ClientError::Params)?,
        )
    }

    fn send<R>(&self, method: &str, params: &RawValue) -> Result<Handle<R>, ClientError> {
        let mut slot = lock(&self.connection);
        let connection = match slot.take().filter(PipelineConnection::is_alive) {
            Some(connection) => slot.insert(connection),
            None => slot.insert(PipelineConnection::open(&self.address, self.timeout)?),
        };
        let (sender, outcome) = bounded(1);
        let id = lock(&connection.unanswered).add(sender);
        let sent = write(connection, method, params, id, self.timeout);
        if let Err(error) = sent {
            lock(&connection.unanswered).calls.remove(&id);
            // A part of the frame may have been sent. Then the server would read the next frame as the rest of this
            // one.
            if matches!(error, ClientError::NotSent(_) | ClientError::TimedOut(_)) {
                slot.take();
            }
            return Err(error);
        }
        let entry = Entry {
            id,
            unanswered: Arc::clone(&connection.unanswered),
        };
        Ok(Handle::new(outcome, self.timeout).with_entry(entry))
    }
}

fn write(
    connection: &mut PipelineConnection,
    method: &str,
    params: &RawValue,
    id: u64,
    timeout: Option<Duration>,
) -> Result<(), ClientError> {
    let id = to_raw_value(&id).map_err(ClientError::Params)?;
    let bytes = frame_of(&OutgoingCall {
        method,
        params,
        id: Some(&id),
        timeout_ms: timeout.map(whole_millis),
    })?;
    let deadline = timeout.and_then(|limit| Instant::now().checked_add(limit));
    connection
        .stream
        .send(&bytes, deadline)
        .map_err(|error| match (error.kind(), timeout) {
            (io::ErrorKind::TimedOut, Some(limit)) => ClientError::TimedOut(limit),
            _ => ClientError::NotSent(error),
        })
}

impl PipelineConnection {
    fn open(address: &str, timeout: Option<Duration>) -> Result<Self, ClientError> {
        let no_server = |source| ClientError::NoServer {
            address: address.to_owned(),
            source,
        };
        let stream = Stream::connect(address, timeout)?;
        let reading = stream.try_clone().map_err(no_server)?;
        let unanswered = Arc::new(Mutex::new(PipelinedCalls::default()));
        let reader = thread::Builder::new()
            .name("answers".into())
            .spawn({
                let unanswered = Arc::clone(&unanswered);
                move || read_all(reading, &unanswered)
            })
            .map_err(ClientError::NoThread)?;
        Ok(PipelineConnection {
            stream,
            unanswered,
            reader: Some(reader),
        })
    }

    fn is_alive(&self) -> bool {
        !lock(&self.unanswered).ended
    }
}

impl Drop for PipelineConnection {
    /// Closes the connection. Unanswered calls fail.
    fn drop(&mut self) {
        self.stream.end();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// Passes answers to their calls until the connection ends. Then all unanswered calls fail.
fn read_all(mut stream: Stream, unanswered: &Mutex<PipelinedCalls>) {
    let mut inbox = Vec::new();
    let lost = loop {
        match receive(&mut stream, &mut inbox, None) {
            Ok(body) => {
                if let Err(text) = hand_out(&body, &mut lock(unanswered)) {
                    break Lost::Alien(text);
                }
            }
            Err(lost) => break lost,
        }
    };
    // Writers get an error from the system, instead of waiting for a reader that is gone.
    stream.end();
    let mut unanswered = lock(unanswered);
    unanswered.ended = true;
    for (_, sender) in unanswered.calls.drain() {
        // The receiver is gone if the handle was dropped.
        let _ = sender.send(Err(match &lost {
            Lost::Io(error) => ClientError::Gone(clone_error(error)),
            Lost::Alien(text) => ClientError::Protocol(text.clone()),
        }));
    }
}

/// Passes an answer to its call. Returns an error if there is no such call.
fn hand_out(body: &[u8], unanswered: &mut PipelinedCalls) -> Result<(), String> {
    let (id, outcome) = reply::read(body).map_err(|error| error.to_string())?;
    let number = id.as_ref().and_then(|id| id.get().parse().ok());
    match number {
        Some(number) if (1..=unanswered.given).contains(&number) => {
            if let Some(sender) = unanswered.calls.remove(&number) {
                let _ = sender.send(outcome);
            }
            Ok(())
        }
        // An error without an id is about the whole connection: too-large, stopping.
        _ => Err(match outcome {
            Err(error) => error.to_string(),
            Ok(_) => format!(
                "an answer came with the id {}, which no call has",
                id.as_ref().map_or("none", |id| id.get())
            ),
        }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;
    use std::net::TcpListener;

    use super::super::tests::{framed, read_frame};
    use super::*;

    fn unanswered(pipeline: &Pipeline) -> usize {
        let connection = lock(&pipeline.connection);
        lock(&connection.as_ref().unwrap().unanswered).calls.len()
    }

    #[test]
    fn a_call_carries_its_timeout_and_is_forgotten_when_that_is_over() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let limit = Duration::from_millis(200);
        let pipeline = Pipeline::connect(&address, Some(limit)).unwrap();
        let mut stream = listener.accept().unwrap().0;
        let late: Handle<i64> = pipeline.submit("sleep", 30).unwrap();
        assert_eq!(
            read_frame(&mut stream).unwrap(),
            r#"{"in":"sleep","params":30,"id":1,"timeout_ms":200}"#
        );
        assert_eq!(unanswered(&pipeline), 1);
        let error = late.wait().unwrap_err();
        assert!(matches!(error, ClientError::TimedOut(_)), "{error:?}");
        assert_eq!(unanswered(&pipeline), 0);
        // A late answer harms nothing.
        stream
            .write_all(&framed(r#"{"out":"sleep","result":30,"id":1}"#))
            .unwrap();
        let late: Handle<i64> = pipeline.submit("sleep", 30).unwrap();
        let ended = late.wait_for(Duration::from_secs(60)).unwrap();
        assert!(matches!(ended, Err(ClientError::TimedOut(_))), "{ended:?}");
        assert_eq!(unanswered(&pipeline), 0);
        let dropped: Handle<i64> = pipeline.submit("ping", 2).unwrap();
        drop(dropped);
        assert_eq!(unanswered(&pipeline), 0);
    }

    #[test]
    fn limits_are_told_in_whole_milliseconds_rounded_up() {
        assert_eq!(whole_millis(Duration::from_micros(1)), 1);
        assert_eq!(whole_millis(Duration::from_millis(1000)), 1000);
        assert_eq!(whole_millis(Duration::MAX), u64::MAX);
    }
}
