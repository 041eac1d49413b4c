//! Calls a server: blocking clients with threads and without an async runtime.
//!
//! There are three:
//!
//! | type | what for |
//! | --- | --- |
//! | [`Client`] | one connection, one call at a time |
//! | [`Pipeline`] | one connection, any number of calls ahead; answers are matched by id |
//! | [`Pool`] | several connections in threads: `map` and the like, reconnecting, repeating what is safe |
//!
//! [`Client`] sends each call with one write and waits for its answer. It does not reconnect and repeats nothing. The
//! caller decides whether to repeat a call; the error says whether that is safe ([`ClientError::is_safe_to_repeat`]).
//! After an error that leaves an answer outstanding the connection is closed, because a late answer must not be taken
//! for that of the next call. The server then cancels the call. It does the same if the process exits during a call.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use preforkd::client::{Client, ClientError, Options, Pipeline, Pool};
//!
//! # fn main() -> Result<(), ClientError> {
//! let limit = Some(Duration::from_secs(5));
//! let mut client = Client::connect("127.0.0.1:8080", limit)?;
//! let sum: i64 = client.call("add", (2, 3))?;
//!
//! let pipeline = Pipeline::connect("unix:/run/preforkd/rpc.sock", limit)?;
//! let handles: Vec<_> = (0..100)
//!     .map(|number| pipeline.submit::<i64>("square", number))
//!     .collect::<Result<_, _>>()?;
//! for handle in handles {
//!     println!("{}", handle.wait()?);
//! }
//!
//! let pool = Pool::new("127.0.0.1:8080", Options::default())?;
//! pool.apply_async("square", 7, |result: Result<i64, _>| println!("{result:?}"))?;
//! for (place, square) in pool.imap_unordered::<_, i64, _>("square", 0..1000) {
//!     println!("{place}: {}", square?);
//! }
//! pool.join();
//!
//! // A durable job: stored before the answer, and run even if this program ends now.
//! let job = client.enqueue("square", 7)?;
//! let square: i64 = client.wait_job(&job)?;
//! # Ok(())
//! # }
//! ```

mod connection;
mod error;
mod handle;
mod imap;
mod job_info;
mod job_waits;
mod jobs;
#[cfg(test)]
mod jobs_tests;
mod jsonrpc;
mod pipeline;
mod pipelined_calls;
mod pool;
#[cfg(test)]
mod pool_tests;
mod pool_thread;
pub(crate) mod reorder;
mod reply;
pub(crate) mod retry;
mod stream;
#[cfg(test)]
mod tests;

pub use connection::{Client, connect_nonblocking};
pub(crate) use connection::{OutgoingCall, frame_of, patience, whole_millis};
pub use error::ClientError;
pub use handle::Handle;
pub use imap::{Imap, ImapUnordered};
pub use job_info::JobInfo;
pub(crate) use jobs::new_job_id;
pub use jobs::{EnqueueOptions, JobHandle};
pub use pipeline::Pipeline;
pub use pool::{Options, Pool};
pub use reply::Reply;
