//! Links two processes with each other, and gives a pool process that stays at a reload what it needs for
//! the next generation.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::workers::{Children, GenerationContext, WorkerHandle};
use crate::link::call_link;
use crate::link::ids::{Generation, Pid, Slot};
use crate::link::message::{JOBS_LANE, Message, Order, PoolLink, SessionLink};
use crate::master::policy::event::{Event, Millis};
use crate::sys::process::monotonic;

/// Links a ready worker with its pool processes and its jobs process, a ready pool process with its workers and jobs
/// processes, or a ready jobs process with both.
pub fn join_pools(children: &mut Children, pid: Pid) {
    if let Some(ready) = children.living.get_mut(&pid) {
        ready.is_ready = true;
    }
    let Some(ready) = children.living.get(&pid) else {
        return;
    };
    let kind = |handle: &WorkerHandle| (handle.pool.is_some(), handle.slot.is_jobs());
    let others: Vec<Pid> = (children.living.iter())
        .filter(|(_, other)| other.is_ready && kind(other) != kind(ready))
        .filter(|(_, other)| belong_together(ready, other))
        .map(|(other, _)| *other)
        .collect();
    for other in others {
        join(children, pid, other);
    }
}

/// Passes the connection of a command to the ready jobs process of the latest generation. Returns false if there
/// is none, or its link is full.
pub fn pass_command(children: &Children, connection: BorrowedFd<'_>) -> bool {
    let Some((pid, handle)) = latest_jobs_process(children) else {
        return false;
    };
    let message = Message {
        pid,
        generation: handle.generation,
        body: Order::JobCommand,
    };
    // A process that has died has no link, or one that fails, until it is reaped.
    let link = handle.link.as_ref();
    link.is_some_and(|link| link.send(message, Some(connection)).is_ok())
}

/// Returns the ready jobs process of the latest generation.
pub fn latest_jobs_process(children: &Children) -> Option<(Pid, &WorkerHandle)> {
    let all = children.iter();
    let ready = all.filter(|(_, handle)| handle.slot.is_jobs() && handle.is_ready);
    ready.max_by_key(|(_, handle)| handle.generation)
}

/// Links a process with the owner of this scoreboard record. Does nothing if the two must not have a link, such as
/// workers of different generations.
pub fn join_as_asked(children: &mut Children, pid: Pid, record_index: usize) {
    let Some(asking) = children.living.get(&pid) else {
        return;
    };
    let mut others = children.living.iter().filter(|(other, worker)| {
        worker.record_index == record_index && **other != pid && belong_together(asking, worker)
    });
    if let Some((&other, _)) = others.next() {
        join(children, pid, other);
    }
}

/// Returns whether one of two processes may run calls of the other. An acceptor has no calls. It asks for links for
/// its sessions.
fn belong_together(one: &WorkerHandle, other: &WorkerHandle) -> bool {
    if [one, other].iter().any(|it| it.slot.acceptor().is_some()) {
        return false;
    }
    match (&one.pool, &other.pool) {
        (Some(pool), None) => pool.serves(other.generation),
        (None, Some(pool)) => pool.serves(one.generation),
        (Some(_), Some(_)) => false,
        (None, None) => one.generation == other.generation,
    }
}

fn join(children: &mut Children, pid: Pid, other: Pid) {
    let (Some(one), Some(two)) = (children.living.get(&pid), children.living.get(&other)) else {
        return;
    };
    let jobs = [one, two].into_iter().find(|it| it.slot.is_jobs());
    let pool = match (&one.pool, &two.pool) {
        (Some(pool), _) => Some((pool, two)),
        (None, Some(pool)) => Some((pool, one)),
        (None, None) => None,
    };
    let (lane, generation) = match (jobs, pool) {
        (Some(jobs), _) => (Some(JOBS_LANE), jobs.generation),
        (None, None) => (None, one.generation),
        (None, Some((pool, worker))) => {
            let Some(number) = worker.known.pool_number(pool.pool.name()) else {
                return;
            };
            (Some(number as u16 + 1), worker.generation)
        }
    };
    let order = |record: usize| match lane {
        None => Order::Link(record as u32),
        Some(lane) => Order::LinkPool(PoolLink {
            record: record as u16,
            lane,
            generation,
        }),
    };
    let (to_one, to_two) = (order(two.record_index), order(one.record_index));
    let (is_pool, now) = (lane.is_some(), monotonic().as_millis() as Millis);
    if !children.links.begin(pid, other, is_pool, now) {
        return;
    }
    match call_link::pair() {
        Ok((one_end, other_end)) => {
            children.order(pid, to_one, Some(one_end.as_fd()));
            children.order(other, to_two, Some(other_end.as_fd()));
        }
        Err(error) => log::warn!("could not link {pid} and {other}: {error}"),
    }
}

/// Links a session of an acceptor with a pool process or the jobs process.
pub fn join_session(children: &Children, acceptor: Pid, link: SessionLink) {
    let Some(asking) = children.living.get(&acceptor) else {
        return;
    };
    let place = link.session as usize;
    let record = children.sessions.records().get(place);
    let is_its = record.is_some_and(|it| it.acceptor() == acceptor && it.is_used());
    // A session of a dead acceptor asks through the next acceptor, to which it has sent a new link.
    if !is_its && !children.sessions.adopted.has(place, asking.generation) {
        return;
    }
    let mut living = children.living.values();
    let found = living.find_map(|handle| {
        let is_asked = handle.record_index == usize::from(link.record);
        if is_asked && handle.slot.is_jobs() && handle.generation == asking.generation {
            return Some((handle.pid, JOBS_LANE));
        }
        let pool = handle.pool.as_ref()?;
        let is_wanted = is_asked && pool.serves(asking.generation);
        let lane = asking
            .known
            .pool_number(pool.pool.name())
            .filter(|_| is_wanted)?;
        Some((handle.pid, lane as u16 + 1))
    });
    let Some((pool, lane)) = found else {
        return;
    };
    let order = Order::SessionLink(SessionLink { lane, ..link });
    match call_link::pair() {
        Ok((one_end, other_end)) => {
            children.order(pool, order, Some(one_end.as_fd()));
            children.order(acceptor, order, Some(other_end.as_fd()));
        }
        Err(error) => log::warn!(
            "could not link a session of acceptor {acceptor} with process {pool}: {error}"
        ),
    }
}

/// Sends a pool process that stays at a reload what it needs for the next generation.
///
/// # Errors
/// The reason why that is not possible.
pub fn update_pool(
    children: &mut Children,
    pid: Pid,
    at: (Slot, Generation),
    context: &GenerationContext,
) -> Result<(), String> {
    let workers = children.living.values().filter(|it| it.pool.is_none());
    let mut served: Vec<u32> = workers.map(|worker| worker.generation.0).collect();
    served.extend(children.sessions.adopted.generations().map(|it| it.0));
    let Some(handle) = children.living.get_mut(&pid) else {
        return Ok(()); // The pool process has died, and its death fails the reload.
    };
    // Its own generation serves, even if all its workers are just being replaced.
    served.push(handle.generation.0);
    served.sort_unstable();
    served.dedup();
    let Some(pool) = &mut handle.pool else {
        return Ok(());
    };
    let file = pool.update(at, context, served)?.try_clone();
    let file = file.map_err(|error| error.to_string())?;
    try_send_result(children, pid).map_err(|error| error.to_string())?;
    let sent = children.send(pid, Order::UpdatePool(at.1), Some(file.as_fd()));
    sent.map_err(|error| error.to_string())
}

/// Moves a pool process to the new generation after a successful reload.
pub fn move_pool(
    children: &mut Children,
    pid: Pid,
    (slot, generation): (Slot, Generation),
    context: &GenerationContext,
) {
    let Some(handle) = children.living.get_mut(&pid) else {
        return;
    };
    if let Some(pool) = &handle.pool {
        handle.known = pool.info(&handle.known, context);
        let name = pool.pool.name();
        log::info!("pool {name}: its process {pid} stays pid={pid} generation={generation}");
    }
    (handle.slot, handle.generation) = (slot, generation);
    send_update_result(children, pid, generation, true);
}

/// Sends the result of the reload to a pool process that stays.
pub fn send_update_result(
    children: &mut Children,
    pid: Pid,
    generation: Generation,
    has_succeeded: bool,
) {
    if let Some(handle) = children.living.get_mut(&pid)
        && let Some(pool) = &mut handle.pool
    {
        pool.unsent_result = Some(Order::EndUpdate(generation, has_succeeded));
    }
    if let Err(error) = try_send_result(children, pid) {
        log::warn!(
            "could not send the result of the reload to pool process {pid}: {error}; it is sent again pid={pid}"
        );
    }
}

/// Sends the results that could not be sent before.
pub fn send_unsent(children: &mut Children) {
    let unsent: Vec<Pid> = children.unsent_results().collect();
    for pid in unsent {
        // The first failure was logged.
        let _ = try_send_result(children, pid);
    }
}

fn try_send_result(children: &mut Children, pid: Pid) -> io::Result<()> {
    let pool = |handle: &WorkerHandle| handle.pool.as_ref()?.unsent_result;
    let Some(order) = children.living.get(&pid).and_then(pool) else {
        return Ok(());
    };
    children.send(pid, order, None)?;
    if let Some(handle) = children.living.get_mut(&pid)
        && let Some(pool) = &mut handle.pool
    {
        pool.unsent_result = None;
    }
    Ok(())
}

/// Handles the report of a pool process about the table that it got for a generation.
pub fn answer_to_update(
    children: &mut Children,
    pid: Pid,
    generation: Generation,
    is_ready: bool,
) -> Event {
    let handle = children.living.get_mut(&pid);
    let pool = handle.and_then(|handle| handle.pool.as_mut());
    let outcome = match pool {
        Some(pool) if !is_ready => Err(pool.reason()),
        Some(pool) => {
            pool.discard_table();
            Ok(())
        }
        None => Ok(()),
    };
    Event::PoolUpdated {
        pid,
        generation,
        outcome,
    }
}
