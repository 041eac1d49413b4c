//! Limits the connections of each source to a listener (`per-source`), of all processes together.
//!
//! A worker counts its own connections and publishes the counts in shared memory. A connection that another
//! process has accepted is counted, and never refused. A listener is identified by the local address of its
//! connections. Without limits, which is the default, nothing is counted.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustc_hash::FxHashMap;

use super::path_listeners::is_listener_of;
use super::refused_connections::RefusedConnections;
use crate::link::source_table::{Source, SourceLimit, SourceTables};
use crate::sys::closer;
use crate::sys::socket::{self, Bound};
use crate::worker_init::SourceInit;

/// The limits of a worker, and its connections that count.
#[derive(Debug, Default)]
pub struct SourceLimits {
    /// `Some` only if a listener has a limit.
    limited: Option<Limited>,
}

#[derive(Debug)]
struct Limited {
    tables: &'static SourceTables,
    /// Its own place in them.
    own: usize,
    listeners: Vec<(Option<Bound>, SourceLimit)>,
    counts: FxHashMap<u64, u32>,
    refused: RefusedConnections,
    /// When to look for refused connections whose time is over; see `Timers::arm`.
    deadline: u64,
}

impl SourceLimits {
    /// Creates the limits of these listeners. `init` has them in the same order. `own` is the index of the process in
    /// the scoreboard.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn new(
        init: Option<SourceInit>,
        listeners: &[Rc<OwnedFd>],
        own: usize,
    ) -> io::Result<Self> {
        let Some(SourceInit { tables, limits }) = init else {
            return Ok(SourceLimits::default());
        };
        let bound = listeners.iter().map(socket::bound_address);
        let listeners: Vec<_> = bound.zip(limits).filter(|(_, it)| it.most > 0).collect();
        let limited = (!listeners.is_empty()).then(|| {
            Ok::<_, io::Error>(Limited {
                tables,
                own,
                listeners,
                counts: FxHashMap::default(),
                refused: RefusedConnections::new(closer::close)?,
                deadline: 0,
            })
        });
        Ok(SourceLimits {
            limited: limited.transpose()?,
        })
    }

    /// Counts a connection that another process has accepted. Returns its key for `release`, 0 if it does not
    /// count.
    pub fn add(&mut self, socket: &OwnedFd, source: Source) -> u64 {
        let Some(limited) = &mut self.limited else {
            return 0;
        };
        let key = limited.key_of(socket, source).map(|(key, _)| key);
        key.inspect(|key| limited.change(*key, 1)).unwrap_or(0)
    }

    /// Counts a new connection and returns its key, as `add` does. If its source has too many, it is not
    /// counted; then the reason is returned. `peer` is for the log.
    pub fn admit(
        &mut self,
        socket: &OwnedFd,
        (peer, source): (Option<SocketAddr>, Source),
        now_ms: u64,
    ) -> Result<u64, String> {
        let Some(limited) = &mut self.limited else {
            return Ok(0);
        };
        let Some((key, listener)) = limited.key_of(socket, source) else {
            return Ok(0);
        };
        // Publish the own count before reading those of others. Otherwise two workers that accept at the same time
        // could both find room for the last connection.
        limited.change(key, 1);
        let own = limited.counts.get(&key).map_or(0, |count| *count as usize);
        let limit = &limited.listeners[listener].1;
        if own + limited.tables.count_of_others(limited.own, key) <= limit.most {
            return Ok(key);
        }
        let text = limit.refuse(limited.tables, (peer, source), now_ms);
        limited.change(key, -1);
        Err(text)
    }

    /// Stops counting a connection that is closed.
    #[inline]
    pub fn release(&mut self, key: u64) {
        if key != 0
            && let Some(limited) = &mut self.limited
        {
            limited.change(key, -1);
        }
    }

    /// Returns the refused connections that wait, and the deadline of the first one.
    pub fn refused(&mut self) -> Option<(&mut RefusedConnections, &mut u64)> {
        let limited = self.limited.as_mut()?;
        Some((&mut limited.refused, &mut limited.deadline))
    }
}

impl Limited {
    /// Returns the key of a connection with a limit, and the index of its listener in `listeners`.
    fn key_of(&self, socket: &OwnedFd, source: Source) -> Option<(u64, usize)> {
        let bound = socket::bound_address(socket)?;
        let mut listeners = self.listeners.iter();
        let listener = listeners.position(|(it, _)| is_listener_of(it.as_ref(), &bound))?;
        let key = source.key_at(self.listeners[listener].1.listener)?;
        Some((key, listener))
    }

    fn change(&mut self, key: u64, by: i32) {
        let count = self.counts.entry(key).or_default();
        *count = count.saturating_add_signed(by);
        self.tables.publish(self.own, key, *count);
        if *count == 0 {
            self.counts.remove(&key);
        }
    }
}
