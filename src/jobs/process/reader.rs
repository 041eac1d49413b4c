//! Runs the reading side of the store in a thread of its own.
//!
//! The writing thread sends it a connection when it has opened the store. A read before that fails: the store is away.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender};

use super::store_event::{ReadReply, ReadRequest, StoreEvent};
use super::ticket::Ticket;
use crate::jobs::record::InstanceId;
use crate::jobs::store::StoreReader;
use crate::jobs::store::error::{StoreError, StoreFault};
use crate::sys::process::unix_time_ms;
use crate::sys::signal::with_signals_blocked;
use crate::sys::waker::Waker;

/// An order to the thread.
pub enum ReaderOrder {
    /// Use this connection from now on.
    Use(Box<dyn StoreReader>),
    Read(ReadRequest, Ticket),
}

/// Starts the thread. It ends when all senders of its orders are gone.
///
/// # Errors
/// If no thread can be started.
pub fn start(
    own: InstanceId,
    orders: Receiver<ReaderOrder>,
    events: Sender<StoreEvent>,
    waker: Arc<Waker>,
) -> std::io::Result<()> {
    let (ended, wake) = (events.clone(), Arc::clone(&waker));
    let body = move || {
        let mut reader = None;
        for order in orders {
            let (request, ticket) = match order {
                ReaderOrder::Use(opened) => {
                    reader = Some(opened);
                    continue;
                }
                ReaderOrder::Read(request, ticket) => (request, ticket),
            };
            let outcome = match &mut reader {
                Some(reader) => read(&mut **reader, own, &request),
                None => Err(StoreError::new(StoreFault::Away, "the store is not open")),
            };
            if events.send(StoreEvent::Read(ticket, outcome)).is_err() {
                return;
            }
            waker.wake();
        }
    };
    let body = move || {
        if catch_unwind(AssertUnwindSafe(body)).is_err() {
            // The panic hook has logged it. Without this thread, reads would get no answer.
            let reason = "its reading thread panicked".to_owned();
            let _ = ended.send(StoreEvent::Refused(reason));
            wake.wake();
        }
    };
    let builder = thread::Builder::new().name("jobs-read".into());
    with_signals_blocked(|| builder.spawn(body)).map(drop)
}

fn read(
    reader: &mut dyn StoreReader,
    own: InstanceId,
    request: &ReadRequest,
) -> Result<ReadReply, StoreError> {
    Ok(match request {
        ReadRequest::Record(id) => ReadReply::Record(reader.record(*id)?),
        ReadRequest::Details(id) => ReadReply::Details(reader.details(*id)?),
        ReadRequest::List(filter, most) => ReadReply::List(reader.list(filter, *most)?),
        ReadRequest::Counts => ReadReply::Counts(reader.counts(unix_time_ms())?),
        ReadRequest::Running => ReadReply::Running(reader.running(own)?),
        ReadRequest::Export(after) => {
            let (jobs, last) = reader.export(*after)?;
            ReadReply::Export(jobs, last)
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crossbeam_channel::unbounded;

    use super::*;
    use crate::jobs::policy::UnixMs;
    use crate::jobs::record::{JobDetails, JobRecord};
    use crate::jobs::store::request::{ListFilter, ListPage, RunningAttempt, StoreCounts};
    use crate::protocol::job_id::JobId;

    struct Panicking;

    impl StoreReader for Panicking {
        fn record(&mut self, _: JobId) -> Result<Option<JobRecord>, StoreError> {
            panic!("a fault of the engine")
        }
        fn details(&mut self, _: JobId) -> Result<Option<JobDetails>, StoreError> {
            Ok(None)
        }
        fn list(&mut self, _: &ListFilter, _: usize) -> Result<ListPage, StoreError> {
            Err(StoreError::new(StoreFault::Away, ""))
        }
        fn counts(&mut self, _: UnixMs) -> Result<StoreCounts, StoreError> {
            Ok(StoreCounts::default())
        }
        fn running(&mut self, _: InstanceId) -> Result<Vec<RunningAttempt>, StoreError> {
            Ok(Vec::new())
        }
        fn export(&mut self, _: u64) -> Result<(Vec<JobDetails>, u64), StoreError> {
            Ok((Vec::new(), 0))
        }
    }

    #[test]
    fn a_panic_of_the_thread_is_reported() {
        let ((orders, receiver), (sender, events)) = (unbounded(), unbounded());
        let waker = Arc::new(Waker::new().unwrap());
        start(JobId([1; 16]), receiver, sender, waker).unwrap();
        orders.send(ReaderOrder::Use(Box::new(Panicking))).unwrap();
        let read = |request| {
            orders
                .send(ReaderOrder::Read(request, Ticket::Counts))
                .unwrap()
        };
        read(ReadRequest::Counts);
        read(ReadRequest::Record(JobId([2; 16])));
        assert!(matches!(events.recv(), Ok(StoreEvent::Read(_, Ok(_)))));
        assert!(matches!(events.recv(), Ok(StoreEvent::Refused(_))));
    }
}
