//! Runs the keeper of a worker: a process that shares its descriptors and recovers its connections if it
//! dies.
//!
//! It is made before the worker has a thread or a client, and waits for the worker's end. Until then it uses no
//! descriptor except a pidfd of the worker, reads no call and runs no handler. If the worker exits normally or the
//! server stops, the keeper exits too. If the worker has died, the keeper hands over each connection whose state it
//! knows exactly, through the adoption queue. For each call that is unanswered according to the journal, it adds a
//! `crashed` answer. The worker that adopts the connection sends these answers first. The keeper resets the other
//! connections. So a crash costs calls, and only the connections whose state is in doubt. If the master dies, the
//! keeper ends at once. If the keeper cannot hand a connection over, the connection is closed.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering::Acquire, Ordering::Relaxed};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::call_record::{ANSWERED, CallRecord, CurrentCall};
use super::journal;
use super::journal::SharedJournal;
use super::recovery::{ConnectionSnapshot, Receiving, Recovery, Sending, UnansweredCall};
use crate::link::adoption_queue;
use crate::link::adoption_queue::{AdoptionQueue, is_full};
use crate::link::metrics_board::BlockWriter;
use crate::link::metrics_board::layout::{CloseReason, MoveReason, OTHER};
use crate::logging;
use crate::protocol::call_id::CallId;
use crate::protocol::code::Code;
use crate::protocol::http::{HttpDate, ResponseContext};
use crate::sys::event::UnsentData;
use crate::sys::event::io_progress::{ConnectionRecord, CurrentIo, PendingAccept, RECEIVE_BUFFER};
use crate::sys::process::{Fork, Pid, exit_now, monotonic, unix_seconds};
use crate::sys::shared_memory::{load_text, load_u128};
use crate::sys::socket::{Bound, peer, reset_when_closed};
use crate::sys::{clone_files, descriptor};
use crate::worker::access_log::crashed_calls::{self, CrashedCallLines};
use crate::worker_init::WorkerInit;

/// Records beyond `limits.connections`, because adopted or queued connections may exceed it.
const SPARE_RECORDS: usize = 256;
/// The time between two attempts after ETOOMANYREFS (unix(7)). Then poll(2) does not show when a send will succeed.
const RETRY: Duration = Duration::from_millis(20);

/// The memory into which a worker with a keeper writes.
pub struct KeeperSetup {
    /// The journal.
    pub journal: SharedJournal,
    /// The receive buffer of the event loop.
    pub buffer: &'static mut [u8],
}

/// Creates the keeper of this worker. Call it after the process has closed all descriptors of the master, with all
/// signals blocked. In the keeper the signals stay blocked.
///
/// # Errors
/// If there is no memory, no descriptor or no process left.
pub fn make(boot: &WorkerInit<'_>) -> io::Result<KeeperSetup> {
    let connections = boot.settings.limits.connections + SPARE_RECORDS;
    let (journal, buffer) = SharedJournal::new(connections, boot.settings.workers.threads)?;
    let worker = clone_files::pidfd_self()?;
    let addresses = crate::worker::crash::unrecorded_sockets::addresses(&boot.listeners);
    let pid = Pid::current();
    let made = clone_files::clone_process(&boot.record.keeper);
    if matches!(made, Ok(Fork::Child)) {
        boot.show("keeper");
        run_keeper(boot, (&worker, &addresses, pid), journal, buffer);
    }
    made?;
    // The keeper polls this descriptor by its number as long as the worker lives, so the worker must not close it.
    std::mem::forget(worker);
    Ok(KeeperSetup { journal, buffer })
}

fn run_keeper(
    boot: &WorkerInit<'_>,
    (worker, addresses, pid): (&OwnedFd, &[Bound], Pid),
    journal: SharedJournal,
    buffer: &[u8],
) -> ! {
    if !matches!(clone_files::end_with_parent(boot.master), Ok(true)) {
        exit_now(0);
    }
    logging::forget_output();
    let mut ended = [PollFd::new(worker.as_fd(), PollFlags::POLLIN)];
    while poll(&mut ended, PollTimeout::NONE) != Ok(1) {}
    // POLLHUP is also set once it is reaped.
    let has_ended = ended[0]
        .revents()
        .is_some_and(|found| found.contains(PollFlags::POLLIN));
    if !has_ended {
        // The worker has closed the descriptor that the keeper waits for, but lives: leave it alone.
        exit_now(1);
    }
    // From here on only this process has the descriptors.
    if journal.head.leaves.load(Acquire) == 0 && journal.head.stops.load(Acquire) == 0 {
        let end = monotonic().saturating_add(boot.settings.workers.drain_timeout);
        let pending = PendingAccept::of(journal.progress.moment.accepting.load(Acquire));
        let unrecorded = match pending {
            PendingAccept::None => Vec::new(),
            PendingAccept::Fresh | PendingAccept::Used => {
                crate::worker::crash::unrecorded_sockets::find(addresses, &known(journal))
            }
        };
        recover_connections(boot, journal, (buffer, &unrecorded, pending), (end, pid));
    } else {
        // Even if the worker was killed during a stop, the access log lines that it has written must be counted.
        crashed_calls::recover_lines(boot, pid);
    }
    exit_now(0);
}

/// Recovers or closes each connection, by `end` at the latest. `pid` is that of the worker.
fn recover_connections(
    boot: &WorkerInit<'_>,
    journal: SharedJournal,
    (buffer, unrecorded, pending): (&[u8], &[RawFd], PendingAccept),
    (end, pid): (Duration, Pid),
) {
    // The worker has ended, so this is the only writer of its block.
    let writer = BlockWriter::new(boot.metrics.block, false);
    let left = connections(journal);
    let fds = known(journal);
    let adoption = &boot.adoption;
    let mut lines = CrashedCallLines::new(boot, pid);
    let queue = [adoption.tx.as_raw_fd(), adoption.rx.as_raw_fd()];
    let log = boot.access_file.iter().map(|file| file.as_raw_fd());
    let own: Vec<RawFd> = queue.into_iter().chain(log).collect();
    // Close the worker's listeners, its link, and descriptors for commands and programs.
    // SAFETY: the worker that owned these descriptors has ended, and the keeper uses none of them.
    unsafe { descriptor::close_all_but(&[&fds[..], unrecorded, &own].concat()) };
    let highest = journal.head.highest.load(Acquire);
    let event_loop_call = journal.running[0].key.load(Acquire);
    boot.crash_report
        .tell(ran(journal.running), event_loop_call);
    let ids = boot.settings.trace.then_some(pid.0);
    let mut calls = calls(journal.entries, highest, ids);
    let http = ResponseContext {
        origins: &boot.settings.http_origins,
        date: HttpDate(unix_seconds()),
    };
    let packet = buffer
        .get(RECEIVE_BUFFER..)
        .and_then(adoption_queue::packet_in);
    let mut to_pass = Vec::new();
    // SAFETY: the worker that owned them has ended, and each number is taken once.
    let take = |&fd: &RawFd| unsafe { clone_files::take_fd(fd) };
    for socket in unrecorded.iter().filter_map(take) {
        if pending == PendingAccept::Fresh {
            writer.add(&writer.block.accepted, 1);
        }
        match (pending, packet) {
            (PendingAccept::Used, None) => reset(boot, &socket),
            // Hand it over with its packet, because nothing was done with it.
            (PendingAccept::Used, Some(packet)) => {
                let forward = || adoption.resend(socket.as_fd(), packet);
                if send_until(adoption, end, forward) {
                    count(&boot.record.kept, 1);
                    count_moved(writer);
                } else {
                    count_reset(boot);
                }
            }
            _ => to_pass.push((
                socket,
                crate::worker::crash::recovery::decide(
                    &ConnectionSnapshot::default(),
                    None,
                    None,
                    http,
                ),
            )),
        }
    }
    for (index, fd) in left {
        // SAFETY: as above. The journal names each descriptor once.
        let Some(socket) = (unsafe { clone_files::take_fd(fd) }) else {
            continue;
        };
        let record = &journal.progress.records[index];
        let owed = UnsentData::of(record.owed.load(Relaxed));
        let came = packet.filter(|_| owed == UnsentData::InPacket);
        let came = came.and_then(|packet| adoption_queue::decode_packet(packet, None));
        let held = ConnectionSnapshot {
            note: record.note.load(Relaxed),
            owed: owed != UnsentData::Nothing && came.is_none(),
            unsent: came.map_or_else(Vec::new, |taken| taken.unsent.into_owned()),
            calls: calls
                .remove(&record.token.load(Relaxed))
                .unwrap_or_default(),
        };
        let moment = journal.progress.moment;
        let (receiving, sending) = (
            receiving(moment, index, &socket),
            sending(moment, index, &socket),
        );
        match crate::worker::crash::recovery::decide(&held, receiving, sending, http) {
            // The dead worker may have handed this connection over. Then the worker that has adopted it counts its end.
            Recovery::Close if held.note & journal::note::GIVEN != 0 => {}
            Recovery::Close => writer.add(&writer.block.closed[CloseReason::Crash as usize], 1),
            Recovery::Reset => reset(boot, &socket),
            decision @ Recovery::PassOn { .. } => to_pass.push((socket, decision)),
        }
    }
    for (socket, decision) in to_pass {
        if let Recovery::PassOn { crashed, .. } = &decision
            && give(adoption, &socket, &decision, buffer, end)
        {
            count(&boot.record.kept, 1);
            count(&boot.record.crashed, crashed.len());
            for call in crashed {
                let method = call.method;
                let place = method.map_or(OTHER, |method| boot.metrics.method(method));
                writer.count_error(place, Code::Crashed as usize, call.begun);
                writer.count_calls(place, 1);
                lines.add(call, place, peer(&socket));
            }
            lines.flush();
            count_moved(writer);
        } else {
            count_reset(boot);
        }
    }
}

/// Resets a connection, because it is unknown what its client has sent and received.
fn reset(boot: &WorkerInit<'_>, socket: &OwnedFd) {
    count_reset(boot);
    reset_when_closed(socket, true);
}

fn count_reset(boot: &WorkerInit<'_>) {
    count(&boot.record.reset, 1);
    let block = boot.metrics.block;
    BlockWriter::new(block, false).add(&block.closed[CloseReason::Crash as usize], 1);
}

fn count_moved(writer: BlockWriter) {
    writer.add(&writer.block.moved[MoveReason::Crash as usize], 1);
}

/// Returns the used connection records, each with its descriptor.
fn connections(journal: SharedJournal) -> Vec<(usize, RawFd)> {
    let fd =
        |record: &ConnectionRecord| RawFd::try_from(record.fd.load(Acquire).checked_sub(1)?).ok();
    let records = journal.progress.records.iter().enumerate();
    records
        .filter_map(|(index, record)| Some((index, fd(record)?)))
        .collect()
}

/// Returns the descriptors of the recorded connections.
fn known(journal: SharedJournal) -> Vec<RawFd> {
    connections(journal).into_iter().map(|(_, fd)| fd).collect()
}

/// Returns the unanswered calls, by the token of their connection.
fn calls(
    entries: &[CallRecord],
    highest: u32,
    ids: Option<i32>,
) -> HashMap<u64, Vec<UnansweredCall>> {
    let mut calls: HashMap<u64, Vec<UnansweredCall>> = HashMap::new();
    for entry in entries.iter().take(highest as usize) {
        let of = entry.of.load(Acquire);
        if of > 0 {
            calls.entry(of).or_default().push(call(entry, ids));
        }
    }
    calls
}

/// Returns the calls that the threads were running when the worker died, by key and method. A thread may
/// still run a call that was given up, and calls of a batch have no key.
fn ran(running: &[CurrentCall]) -> Vec<(u64, u32)> {
    let calls = running
        .iter()
        .map(|call| (call.key.load(Acquire), call.method.load(Relaxed)));
    calls.filter(|(key, _)| *key != 0).collect()
}

fn call(entry: &CallRecord, ids: Option<i32>) -> UnansweredCall {
    // If the key is 0, the method is that of an earlier call that used this record.
    let is_named = entry.key.load(Relaxed) != 0;
    let length = entry.id_length.load(Relaxed).checked_sub(1);
    UnansweredCall {
        shape: journal::shape(entry.shape.load(Relaxed)),
        order: entry.order.load(Relaxed).checked_sub(1),
        id: length.map(|length| load_text(&entry.id, length)),
        begun: entry.begun.load(Relaxed) != 0,
        method: is_named.then(|| entry.method.load(Relaxed) as usize),
        answered: entry.stage.load(Relaxed) == ANSWERED,
        end: entry.end.load(Relaxed),
        call: ids.and_then(|pid| CallId::recorded(pid, entry.number.load(Relaxed))),
        number: entry.number.load(Relaxed),
        read_ns: entry.read_ns.load(Relaxed),
        received_bytes: entry.received_bytes.load(Relaxed) as usize,
        trace_id: load_u128(&entry.trace_id),
    }
}

/// Returns the receive that was in progress at the death of the worker. If the worker had not recorded
/// the length, the kernel's counters give it.
fn receiving(moment: &CurrentIo, index: usize, socket: &OwnedFd) -> Option<Receiving> {
    (moment.receiving.load(Acquire) == index as u32 + 1).then(|| {
        let start = moment.start.load(Relaxed);
        let noted = moment.received.load(Relaxed).checked_sub(1).map(u64::from);
        let counted = || clone_files::stream_offsets(socket)?.0.checked_sub(start);
        Receiving {
            start,
            taken: moment.taken.load(Relaxed),
            length: noted.or_else(counted),
        }
    })
}

/// Returns the send that was in progress, in the same way.
fn sending(moment: &CurrentIo, index: usize, socket: &OwnedFd) -> Option<Sending> {
    (moment.sending.load(Acquire) == index as u32 + 1).then(|| {
        let before = moment.before.load(Relaxed);
        let noted = moment.sent.load(Relaxed).checked_sub(1).map(u64::from);
        let counted = || clone_files::stream_offsets(socket)?.1.checked_sub(before);
        Sending {
            length: moment.length.load(Relaxed),
            sent: noted.or_else(counted),
        }
    })
}

/// Hands a connection over, by `end` at the latest. Returns whether that succeeded.
fn give(
    adoption: &AdoptionQueue,
    socket: &OwnedFd,
    decision: &Recovery,
    buffer: &[u8],
    end: Duration,
) -> bool {
    let Recovery::PassOn {
        state,
        unsent,
        unread,
        ..
    } = decision
    else {
        return false;
    };
    let Some(unread) = buffer.get(unread.clone()) else {
        return false;
    };
    let give = || adoption.send(socket.as_fd(), *state, unsent, unread);
    send_until(adoption, end, give)
}

/// Sends through the queue as soon as there is room, by `end` at the latest. Returns whether that
/// succeeded.
fn send_until(adoption: &AdoptionQueue, end: Duration, send: impl Fn() -> io::Result<()>) -> bool {
    loop {
        let error = match send() {
            Ok(()) => return true,
            Err(error) => error,
        };
        let left = end.saturating_sub(monotonic());
        if !is_full(&error) || left.is_zero() {
            return false;
        }
        let queue = PollFd::new(adoption.tx.as_fd(), PollFlags::POLLOUT);
        let timeout = |wait: Duration| PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        let _ = if error.kind() == io::ErrorKind::WouldBlock {
            poll(&mut [queue], timeout(left))
        } else {
            // The queue itself is writable, so waiting for it would spin.
            poll(&mut [], timeout(left.min(RETRY)))
        };
    }
}

fn count(number: &AtomicU32, more: usize) {
    number.fetch_add(more as u32, Relaxed);
}
