//! Reads the deaths of a pool's programs from the memory that its pool process writes. `own_programs` does that for the
//! programs of sessions.
//!
//! A child is never trusted: its texts are shortened and cleaned, and a death in the future counts as one of now. It
//! can report false deaths, but only of its own pool, and not more than are kept.

use super::workers::WorkerHandle;
use crate::master::policy::death_log::Death;

/// Returns the name for the death record of a child: the pool's name for a pool process, the listener's address for an
/// acceptor; `None` for a worker.
pub fn process_name(process: &WorkerHandle) -> Option<String> {
    let known = &process.known;
    let of_acceptor = |number: usize| {
        known
            .isolated
            .get(number)
            .map(|(address, _)| address.clone())
    };
    let pool = process.pool.as_ref();
    let name = pool.map(|pool| pool.pool.name().to_owned());
    name.or_else(|| process.slot.acceptor().and_then(of_acceptor))
}

/// Returns the deaths of programs that `process` has reported since the last call, oldest first; none if it
/// is no pool process. `now` is the wall clock in seconds since 1970.
pub fn take(process: &WorkerHandle, now: u64) -> Vec<Death> {
    let of = (process.slot, process.generation);
    let pool = process.pool.iter().map(|pool| &*pool.pool);
    pool.flat_map(|pool| process.known.take_deaths(pool, of, now))
        .collect()
}
