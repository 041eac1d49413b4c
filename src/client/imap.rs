//! Makes the calls of a pool for a sequence of items, as an iterator over their results.
//!
//! Items are taken only while the window has room. So an endless sequence, or results that are not taken,
//! need little memory.

use std::marker::PhantomData;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::ClientError;
use super::pool::Pool;
use super::reorder::ReorderBuffer;
use super::reply::Reply;

impl Pool {
    /// Calls a method for each of `items` and waits for all results. They are in the order of the items.
    ///
    /// # Errors
    /// The first error in the order of the items. Some calls behind it, a few for each connection, are made
    /// all the same.
    pub fn map<P: Serialize, R: DeserializeOwned>(
        &self,
        method: &str,
        items: impl IntoIterator<Item = P>,
    ) -> Result<Vec<R>, ClientError> {
        self.imap(method, items).collect()
    }

    /// Calls a method for each of `items`. The results come in the order of the items, each as soon as all
    /// before it are there. At most four items for each connection are ahead of the results.
    pub fn imap<P: Serialize, R: DeserializeOwned, I: IntoIterator<Item = P>>(
        &self,
        method: &str,
        items: I,
    ) -> Imap<'_, I::IntoIter, R> {
        Imap::new(self.imap_unordered(method, items))
    }

    /// Calls a method for each of `items`. The results come as soon as they are there, each with the index
    /// of its item.
    pub fn imap_unordered<P: Serialize, R: DeserializeOwned, I: IntoIterator<Item = P>>(
        &self,
        method: &str,
        items: I,
    ) -> ImapUnordered<'_, I::IntoIter, R> {
        ImapUnordered::new(self, method.into(), items.into_iter(), self.lanes.len() * 4)
    }
}

type Numbered = (usize, Result<Reply, ClientError>);

/// Results as soon as they are there; see [`Pool::imap_unordered`].
#[derive(Debug)]
pub struct ImapUnordered<'p, I, R> {
    pool: &'p Pool,
    method: Arc<str>,
    items: I,
    /// The index of the next item.
    next: usize,
    /// The number of calls whose result was not taken; at most `window`.
    under_way: usize,
    window: usize,
    exhausted: bool,
    sender: Sender<Numbered>,
    done: Receiver<Numbered>,
    result: PhantomData<fn() -> R>,
}

impl<'p, I, R> ImapUnordered<'p, I, R> {
    pub(super) fn new(pool: &'p Pool, method: Arc<str>, items: I, window: usize) -> Self {
        // The channel has no limit, because the window limits it and a thread of the pool must never wait
        // here.
        let (sender, done) = unbounded();
        ImapUnordered {
            pool,
            method,
            items,
            next: 0,
            under_way: 0,
            window,
            exhausted: false,
            sender,
            done,
            result: PhantomData,
        }
    }
}

impl<I: Iterator<Item: Serialize>, R> ImapUnordered<'_, I, R> {
    /// Begins calls until those under way and the `held` results, which wait for their turn, are `window` together.
    fn fill(&mut self, held: usize) {
        while !self.exhausted && self.under_way + held < self.window {
            let Some(item) = self.items.next() else {
                self.exhausted = true;
                return;
            };
            let place = self.next;
            self.next += 1;
            self.under_way += 1;
            let sender = self.sender.clone();
            let started = serde_json::to_string(&item)
                .map_err(ClientError::Params)
                .and_then(|params| {
                    let method = Arc::clone(&self.method);
                    self.pool.start(method, params.into(), move |outcome| {
                        // The receiver is gone if the iterator was dropped.
                        let _ = sender.send((place, outcome));
                    })
                });
            if let Err(error) = started {
                let _ = self.sender.send((place, Err(error)));
            }
        }
    }

    fn next_outcome(&mut self, held: usize) -> Option<Numbered> {
        self.fill(held);
        if self.under_way == 0 {
            return None;
        }
        // Never disconnected, because this iterator has a sender and every call sends.
        let numbered = self.done.recv().ok()?;
        self.under_way -= 1;
        Some(numbered)
    }
}

impl<I: Iterator<Item: Serialize>, R: DeserializeOwned> Iterator for ImapUnordered<'_, I, R> {
    type Item = (usize, Result<R, ClientError>);

    fn next(&mut self) -> Option<Self::Item> {
        let (place, outcome) = self.next_outcome(0)?;
        Some((place, outcome.and_then(|reply| reply.read())))
    }
}

/// Results in the order of the items; see [`Pool::imap`].
#[derive(Debug)]
pub struct Imap<'p, I, R> {
    unordered: ImapUnordered<'p, I, R>,
    order: ReorderBuffer<Result<Reply, ClientError>>,
}

impl<'p, I, R> Imap<'p, I, R> {
    pub(super) fn new(unordered: ImapUnordered<'p, I, R>) -> Self {
        Imap {
            unordered,
            order: ReorderBuffer::default(),
        }
    }
}

impl<I: Iterator<Item: Serialize>, R: DeserializeOwned> Iterator for Imap<'_, I, R> {
    type Item = Result<R, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(outcome) = self.order.next() {
                return Some(outcome.and_then(|reply| reply.read()));
            }
            let (place, outcome) = self.unordered.next_outcome(self.order.held())?;
            self.order.put(place, outcome);
        }
    }
}
