//! Clients of a server, in the plain form over frames; blocking, with threads and no runtime.
//!
//! Three of them, each on what is above it:
//!
//! | type | what for |
//! | --- | --- |
//! | [`Client`] | one connection, one call at a time |
//! | [`Pipeline`] | one connection, any number of calls ahead; answers are matched by id |
//! | [`Pool`] | several connections in threads: `map` and its kin, reconnecting, repeating what is safe |
//!
//! [`Client`] sends each call with one write and waits for its answer. It does not reconnect and
//! repeats nothing: whether a call may be sent again is told by the error
//! ([`ClientError::is_safe_to_repeat`]), and decided by the caller. After any error but a refusal the
//! connection is closed, for an answer that comes late must not be taken for the next call's. The
//! server cancels the call then, as it does when this process ends in the middle of it.
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
//! # Ok(())
//! # }
//! ```

mod answer;
mod connection;
mod error;
mod handle;
mod imap;
mod jsonrpc;
mod pipeline;
mod pipelined_calls;
mod pool;
#[cfg(test)]
mod pool_tests;
mod pool_thread;
mod reply;
mod retry;
mod stream;
#[cfg(test)]
mod tests;

pub use connection::{Client, connect_nonblocking};
pub use error::ClientError;
pub use handle::Handle;
pub use imap::{Imap, ImapUnordered};
pub use pipeline::Pipeline;
pub use pool::{Options, Pool};
pub use reply::Reply;
