//! Holds what the acceptors of all generations share: the table of sessions, an adoption queue for each listener, and
//! a pipe. When the pipe ends, sessions know that the master is gone. All of it is passed on at an upgrade.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::link::adoption_queue::AdoptionQueue;
use crate::link::ids::Generation;
use crate::link::scoreboard::{WorkerRecord, set_serving};
use crate::link::session_memory::SessionTable;
use crate::link::session_table::{RANGES, SESSIONS, SessionRecord, claimed};

/// What acceptors share.
#[derive(Debug)]
pub struct SessionRanges {
    table: SessionTable,
    /// Both ends of the pipe whose only writer is the master.
    master_pipe: (Rc<OwnedFd>, OwnedFd),
    /// The address and the adoption queue of each listener. The index is the number of its range.
    ranges: Vec<(String, AdoptionQueue)>,
}

/// The records of one listener's sessions.
#[derive(Debug, Clone, Copy)]
pub struct SessionRange<'a> {
    pub address: &'a str,
    pub records: &'static [SessionRecord],
    /// The number of the first record in the table.
    pub first: usize,
}

/// The state for an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionsState {
    table: RawFd,
    reader: RawFd,
    writer: RawFd,
    /// For each range: the address, and the sending and receiving end of the adoption queue.
    ranges: Vec<(String, RawFd, RawFd)>,
}

impl SessionsState {
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let queues = self.ranges.iter().flat_map(|(_, tx, rx)| [*tx, *rx]);
        [self.table, self.reader, self.writer]
            .into_iter()
            .chain(queues)
    }
}

impl SessionRanges {
    /// Creates the table and the pipe, without a range.
    ///
    /// # Errors
    /// If there is no memory or no descriptor.
    pub fn new() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        Ok(SessionRanges {
            table: SessionTable::new()?,
            master_pipe: (Rc::new(reader.into()), writer.into()),
            ranges: Vec::new(),
        })
    }

    /// Returns all records.
    pub fn records(&self) -> &'static [SessionRecord] {
        self.table.records()
    }

    /// Returns the reading end of the pipe that ends with the master.
    pub fn master_pipe(&self) -> Rc<OwnedFd> {
        Rc::clone(&self.master_pipe.0)
    }

    /// Returns each range with its records that were ever used.
    pub fn used(&self) -> impl Iterator<Item = SessionRange<'_>> {
        let ranges = self.ranges.iter().enumerate();
        ranges.map(|(number, (address, _))| SessionRange {
            address,
            records: claimed(self.table.range(number)),
            first: number * SESSIONS,
        })
    }

    /// Writes into the scoreboard which listeners are isolated in the serving generation.
    pub fn set_serving(
        &self,
        scoreboard: &[WorkerRecord],
        generation: Generation,
        is_isolated: impl Fn(&str) -> bool,
    ) {
        for (number, (address, _)) in self.ranges.iter().enumerate() {
            let serving = is_isolated(address).then_some(generation);
            set_serving(scoreboard, number, serving);
        }
    }

    /// Returns the range of the listener with this address, and its adoption queue. If all ranges are used,
    /// takes over one that no wanted listener and no session uses.
    ///
    /// # Errors
    /// If there is no free range or no descriptor.
    pub fn range<'a>(
        &mut self,
        address: &'a str,
        is_wanted: impl Fn(&str) -> bool,
    ) -> io::Result<(SessionRange<'a>, AdoptionQueue)> {
        let known = self.ranges.iter().position(|(it, _)| it == address);
        let number = match known {
            Some(number) => number,
            None => {
                let range = (address.to_owned(), AdoptionQueue::new()?);
                if self.ranges.len() < RANGES {
                    self.ranges.push(range);
                    self.ranges.len() - 1
                } else {
                    let is_free = |number: &usize| {
                        let mut records = claimed(self.table.range(*number)).iter();
                        !is_wanted(&self.ranges[*number].0) && !records.any(SessionRecord::is_used)
                    };
                    let number = (0..RANGES).find(is_free);
                    let number = number.ok_or(io::ErrorKind::ResourceBusy)?;
                    // What was counted there belongs to another listener.
                    let first = &self.table.range(number)[0];
                    first.crashes.store(0, Relaxed);
                    first.full.store(0, Relaxed);
                    first.unserved.store(0, Relaxed);
                    self.ranges[number] = range;
                    number
                }
            }
        };
        let range = SessionRange {
            address,
            records: self.table.range(number),
            first: number * SESSIONS,
        };
        Ok((range, self.ranges[number].1.clone()))
    }

    /// Returns the state for an upgrade.
    pub fn export(&self) -> SessionsState {
        let ranges = self.ranges.iter();
        let ranges = ranges
            .map(|(address, queue)| (address.clone(), queue.tx.as_raw_fd(), queue.rx.as_raw_fd()));
        SessionsState {
            table: self.table.file().as_raw_fd(),
            reader: self.master_pipe.0.as_raw_fd(),
            writer: self.master_pipe.1.as_raw_fd(),
            ranges: ranges.collect(),
        }
    }

    /// Restores the state after an upgrade.
    ///
    /// # Errors
    /// The errors of `take`; a table of another format.
    pub fn import(
        state: SessionsState,
        mut take: impl FnMut(RawFd) -> Result<OwnedFd>,
    ) -> Result<Self> {
        let table = SessionTable::of(take(state.table)?)
            .map_err(|error| Error::system("map the table of sessions", error))?;
        let mut ranges = Vec::new();
        for (address, tx, rx) in state.ranges.into_iter().take(RANGES) {
            let (tx, rx) = (Rc::new(take(tx)?), Rc::new(take(rx)?));
            ranges.push((address, AdoptionQueue { tx, rx }));
        }
        Ok(SessionRanges {
            table,
            master_pipe: (Rc::new(take(state.reader)?), take(state.writer)?),
            ranges,
        })
    }
}
