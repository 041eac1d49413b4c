//! A pool's calls for a row of items, as an iterator over their results.
//!
//! Both take items only while the window has room, so that an endless row, or results that nobody
//! takes, hold no more than that.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::ClientError;
use super::pool::Pool;
use super::reply::Reply;

impl Pool {
    /// Calls a method for each of `items` and waits for all results, which come in the items' order.
    ///
    /// # Errors
    /// The first error in the items' order; those calls behind it that were handed out already are made all the
    /// same, a few for each connection.
    pub fn map<P: Serialize, R: DeserializeOwned>(
        &self,
        method: &str,
        items: impl IntoIterator<Item = P>,
    ) -> Result<Vec<R>, ClientError> {
        self.imap(method, items).collect()
    }

    /// Calls a method for each of `items`; the results come in the items' order, each as soon as those
    /// before it are there. Items are taken while there is room: at most four for each
    /// connection are ahead of the results.
    pub fn imap<P: Serialize, R: DeserializeOwned, I: IntoIterator<Item = P>>(
        &self,
        method: &str,
        items: I,
    ) -> Imap<'_, I::IntoIter, R> {
        Imap::new(self.imap_unordered(method, items))
    }

    /// Calls a method for each of `items`; the results come as they are done, each with the place of its
    /// item.
    pub fn imap_unordered<P: Serialize, R: DeserializeOwned, I: IntoIterator<Item = P>>(
        &self,
        method: &str,
        items: I,
    ) -> ImapUnordered<'_, I::IntoIter, R> {
        ImapUnordered::new(self, method.into(), items.into_iter(), self.lanes.len() * 4)
    }
}

type Numbered = (usize, Result<Reply, ClientError>);

/// Results as they are done; see [`Pool::imap_unordered`].
#[derive(Debug)]
pub struct ImapUnordered<'p, I, R> {
    pool: &'p Pool,
    method: Arc<str>,
    items: I,
    /// The place of the next item.
    next: usize,
    /// Calls whose result was not taken yet; at most `window`.
    under_way: usize,
    window: usize,
    exhausted: bool,
    sender: Sender<Numbered>,
    done: Receiver<Numbered>,
    result: PhantomData<fn() -> R>,
}

impl<'p, I, R> ImapUnordered<'p, I, R> {
    pub(super) fn new(pool: &'p Pool, method: Arc<str>, items: I, window: usize) -> Self {
        // Unbounded in type only: the window bounds it, and a lane must never wait for the taker.
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
    /// Makes calls until the window, less `held`, is full.
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
                        // The iterator was dropped: nobody wants it.
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
        // Never disconnected: this iterator has a sender of its own, and every job sends.
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
    /// Results that wait for one before them.
    early: BTreeMap<usize, Result<Reply, ClientError>>,
    next: usize,
}

impl<'p, I, R> Imap<'p, I, R> {
    pub(super) fn new(unordered: ImapUnordered<'p, I, R>) -> Self {
        Imap {
            unordered,
            early: BTreeMap::new(),
            next: 0,
        }
    }
}

impl<I: Iterator<Item: Serialize>, R: DeserializeOwned> Iterator for Imap<'_, I, R> {
    type Item = Result<R, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(outcome) = self.early.remove(&self.next) {
                self.next += 1;
                return Some(outcome.and_then(|reply| reply.read()));
            }
            let (place, outcome) = self.unordered.next_outcome(self.early.len())?;
            self.early.insert(place, outcome);
        }
    }
}
