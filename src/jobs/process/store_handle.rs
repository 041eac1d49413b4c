//! Gives the event loop access to the threads of the store.
//!
//! Nothing here waits. Replies come as [`StoreEvent`]s, and the waker of the event loop is woken for them.

use std::io;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::health::StoreState;
use super::reader::{self, ReaderOrder};
use super::store_event::{
    OpenedStore, ReadRequest, RequestHold, StoreEvent, SubmittedRequest, WriterOrder,
};
use super::store_mark::StoreMark;
use super::ticket::Ticket;
use super::writer::{self, WriterInit};
use crate::config::JobsConfig;
use crate::jobs::store::error::StoreFault;
use crate::jobs::store::request::{InstanceInfo, StoreRequest};
use crate::sys::waker::Waker;
use crate::worker_init::JobsInstance;

/// The threads of the store, and what is known about it.
pub struct StoreHandle {
    writer: Sender<WriterOrder>,
    reader: Sender<ReaderOrder>,
    events: Receiver<StoreEvent>,
    /// Requests and reads without a reply.
    open: usize,
    pub state: StoreState,
    /// `Some` once the store was open.
    pub opened: Option<OpenedStore>,
}

impl StoreHandle {
    /// Starts both threads. `mark` is that of this process, `is_shared` returns whether there is another jobs process
    /// of the instance, and `is_awaited` says whether a start or reload waits for it.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(
        config: &JobsConfig,
        info: InstanceInfo,
        (instance, is_awaited): (Arc<JobsInstance>, bool),
        (mark, is_shared): (StoreMark, Box<dyn Fn() -> bool + Send>),
        waker: &Arc<Waker>,
    ) -> io::Result<Self> {
        let (writer, orders) = unbounded();
        let (reader, reads) = unbounded();
        let (sender, events) = unbounded();
        reader::start(info.id, reads, sender.clone(), Arc::clone(waker))?;
        writer::start(WriterInit {
            config: config.clone(),
            info,
            instance,
            is_awaited,
            mark,
            is_shared,
            orders,
            events: sender,
            reader: reader.clone(),
            waker: Arc::clone(waker),
        })?;
        Ok(StoreHandle {
            writer,
            reader,
            events,
            open: 0,
            state: StoreState::default(),
            opened: None,
        })
    }

    /// Submits a request to the writing thread. Its reply comes with the ticket, after the commit.
    pub fn submit(&mut self, request: StoreRequest, ticket: Ticket) {
        self.send(request, ticket, None);
    }

    /// Submits a request that may be withdrawn while it is not executed. A request that was withdrawn has no reply:
    /// then call [`Self::note_withdrawn`].
    pub fn submit_held(&mut self, request: StoreRequest, ticket: Ticket) -> Arc<RequestHold> {
        let hold = Arc::new(RequestHold::default());
        self.send(request, ticket, Some(Arc::clone(&hold)));
        hold
    }

    fn send(&mut self, request: StoreRequest, ticket: Ticket, hold: Option<Arc<RequestHold>>) {
        self.open += 1;
        // The thread ends only if the process exits.
        let _ = self.writer.send(WriterOrder::Execute(SubmittedRequest {
            request,
            ticket,
            hold,
        }));
    }

    /// Submits a read to the reading thread.
    pub fn read(&mut self, request: ReadRequest, ticket: Ticket) {
        self.open += 1;
        let _ = self.reader.send(ReaderOrder::Read(request, ticket));
    }

    /// Records that a request was withdrawn, so that it gets no reply.
    pub fn note_withdrawn(&mut self) {
        self.open = self.open.saturating_sub(1);
    }

    /// Closes the store behind all submitted requests. [`StoreEvent::Closed`] follows.
    pub fn close(&self) {
        let _ = self.writer.send(WriterOrder::Close);
    }

    /// Returns the next report of a thread.
    pub fn next_event(&mut self) -> Option<StoreEvent> {
        let event = self.events.try_recv().ok()?;
        if let StoreEvent::Read(_, Err(error)) = &event
            && error.fault == StoreFault::Corrupt
        {
            let _ = self.writer.send(WriterOrder::Damaged(error.clone()));
        }
        match &event {
            StoreEvent::Replied(..)
            | StoreEvent::Claimed(..)
            | StoreEvent::Failed(..)
            | StoreEvent::Read(..) => {
                self.open = self.open.saturating_sub(1);
            }
            _ => {}
        }
        Some(event)
    }

    /// Returns whether each request and read has its reply.
    pub fn is_settled(&self) -> bool {
        self.open == 0
    }
}
