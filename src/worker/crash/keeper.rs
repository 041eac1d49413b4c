//! The keeper of a worker: a twin that shares its descriptors, and goes on with its connections when
//! it dies.
//!
//! It is made before the worker has a thread or a client, waits for the worker's end and does
//! nothing else until then: it touches no descriptor, reads no call, runs no handler. When the
//! worker leaves in order, it leaves too. When the worker has died, it answers with `crashed` what
//! the ledger has as unanswered, and passes each connection on through the adoption queue; so a
//! crash costs the calls that ran, and nobody their connection. It ends at once with the master.
//! What it can't do it leaves: the connection ends with it.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering::Acquire, Ordering::Relaxed};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::journal;
use super::journal::{CallRecord, SharedJournal};
use super::recovery::{ConnectionSnapshot, Receiving, Recovery, Sending, UnansweredCall};
use crate::handler::BEGUN_ELSEWHERE;
use crate::link::adoption_queue;
use crate::link::adoption_queue::{AdoptionQueue, is_full};
use crate::logging;
use crate::protocol::http::{HttpDate, ResponseContext};
use crate::sys::event::UnsentData;
use crate::sys::event::io_progress::{ConnectionRecord, CurrentIo, PendingAccept, RECEIVE_BUFFER};
use crate::sys::process::{Fork, exit_now, monotonic, unix_seconds};
use crate::sys::socket::{Bound, reset_when_closed};
use crate::sys::{clone_files, descriptor};
use crate::worker_init::WorkerInit;

/// Places beyond `limits.connections`: what is adopted or found in a queue may exceed it.
const SPARE_SEATS: usize = 256;
/// Between two tries when nothing tells that there is room again (ETOOMANYREFS, unix(7)).
const RETRY: Duration = Duration::from_millis(20);

/// What a worker that has a keeper writes into.
pub struct KeeperSetup {
    /// The ledger.
    pub book: SharedJournal,
    /// What the event layer receives into.
    pub buffer: &'static mut [u8],
}

/// Makes the keeper of this worker. To be called once it is nobody else any more, with all signals
/// blocked, which its keeper leaves so.
///
/// # Errors
/// When there is no memory, no descriptor or no process to be had.
pub fn make(boot: &WorkerInit<'_>) -> io::Result<KeeperSetup> {
    let connections = boot.settings.limits.connections + SPARE_SEATS;
    let (book, buffer) = SharedJournal::new(connections)?;
    let worker = clone_files::pidfd_self()?;
    let addresses = crate::worker::crash::unrecorded_sockets::addresses(&boot.listeners);
    let made = clone_files::clone_process(&boot.record.keeper);
    if matches!(made, Ok(Fork::Child)) {
        boot.show("keeper");
        run_keeper(boot, (&worker, &addresses), book, buffer);
    }
    made?;
    // Its number is what the keeper waits by, for as long as this process lives.
    std::mem::forget(worker);
    Ok(KeeperSetup { book, buffer })
}

fn run_keeper(
    boot: &WorkerInit<'_>,
    (worker, addresses): (&OwnedFd, &[Bound]),
    book: SharedJournal,
    buffer: &[u8],
) -> ! {
    if !matches!(clone_files::end_with_parent(boot.master), Ok(true)) {
        exit_now(0);
    }
    logging::forget_output();
    let mut ended = [PollFd::new(worker.as_fd(), PollFlags::POLLIN)];
    while poll(&mut ended, PollTimeout::NONE) != Ok(1) {}
    // With POLLHUP once it is reaped too.
    let has_ended = ended[0]
        .revents()
        .is_some_and(|found| found.contains(PollFlags::POLLIN));
    if !has_ended {
        // The worker has closed what it is held by, and lives: it is left alone.
        exit_now(1);
    }
    // From here on the descriptors are this process's alone.
    if book.head.leaves.load(Acquire) == 0 && book.head.stops.load(Acquire) == 0 {
        let end = monotonic().saturating_add(boot.settings.workers.drain_timeout);
        let coming = PendingAccept::of(book.witness.moment.accepting.load(Acquire));
        let strangers = match coming {
            PendingAccept::Nobody => Vec::new(),
            PendingAccept::Fresh | PendingAccept::Used => {
                crate::worker::crash::unrecorded_sockets::find(addresses, &known(book))
            }
        };
        recover_connections(boot, book, (buffer, &strangers, coming), end);
    }
    exit_now(0);
}

/// Does with each connection what there is to be done.
fn recover_connections(
    boot: &WorkerInit<'_>,
    book: SharedJournal,
    (buffer, strangers, coming): (&[u8], &[RawFd], PendingAccept),
    end: Duration,
) {
    let left = connections(book);
    let fds = known(book);
    let adoption = &boot.adoption;
    let queue = [adoption.tx.as_raw_fd(), adoption.rx.as_raw_fd()];
    // The worker's listeners and its link, and what was on its way to handlers' programs.
    // SAFETY: the worker that owned these descriptors has ended, and the keeper uses none of them.
    unsafe { descriptor::close_all_but(&[&fds[..], strangers, &queue].concat()) };
    let highest = book.head.highest.load(Acquire);
    boot.crash_report.tell(ran(book.entries, highest));
    let mut calls = calls(book.entries, highest);
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
    for socket in strangers.iter().filter_map(take) {
        match (coming, packet) {
            (PendingAccept::Used, None) => reset(boot, &socket),
            // As it came: nobody has done anything with it.
            (PendingAccept::Used, Some(packet)) => {
                let forward = || adoption.resend(socket.as_fd(), packet);
                let kept = send_until(adoption, end, forward);
                count(
                    if kept {
                        &boot.record.kept
                    } else {
                        &boot.record.reset
                    },
                    1,
                );
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
        // SAFETY: likewise. The journal names each descriptor once.
        let Some(socket) = (unsafe { clone_files::take_fd(fd) }) else {
            continue;
        };
        let seat = &book.witness.seats[index];
        let owed = UnsentData::of(seat.owed.load(Relaxed));
        let came = packet.filter(|_| owed == UnsentData::InPacket);
        let came = came.and_then(|packet| adoption_queue::decode_packet(packet, None));
        let held = ConnectionSnapshot {
            note: seat.note.load(Relaxed),
            owed: owed != UnsentData::Nothing && came.is_none(),
            unsent: came.map_or_else(Vec::new, |taken| taken.unsent.into_owned()),
            calls: calls.remove(&seat.token.load(Relaxed)).unwrap_or_default(),
        };
        let moment = book.witness.moment;
        let (receiving, sending) = (
            receiving(moment, index, &socket),
            sending(moment, index, &socket),
        );
        match crate::worker::crash::recovery::decide(&held, receiving, sending, http) {
            Recovery::Close => {}
            Recovery::Reset => reset(boot, &socket),
            fate @ Recovery::PassOn { .. } => to_pass.push((socket, fate)),
        }
    }
    for (socket, fate) in to_pass {
        if let Recovery::PassOn { crashed, .. } = &fate
            && give(adoption, &socket, &fate, buffer, end)
        {
            count(&boot.record.kept, 1);
            count(&boot.record.crashed, *crashed);
        } else {
            count(&boot.record.reset, 1);
        }
    }
}

/// Its client is told that nobody knows any more what it has sent and got.
fn reset(boot: &WorkerInit<'_>, socket: &OwnedFd) {
    count(&boot.record.reset, 1);
    reset_when_closed(socket, true);
}

/// Places that are taken, with the number of the descriptor of each.
fn connections(book: SharedJournal) -> Vec<(usize, RawFd)> {
    let fd = |seat: &ConnectionRecord| RawFd::try_from(seat.fd.load(Acquire).checked_sub(1)?).ok();
    let seats = book.witness.seats.iter().enumerate();
    seats
        .filter_map(|(index, seat)| Some((index, fd(seat)?)))
        .collect()
}

/// The numbers alone.
fn known(book: SharedJournal) -> Vec<RawFd> {
    connections(book).into_iter().map(|(_, fd)| fd).collect()
}

/// The calls without an answer, by what their entries say whose they are.
fn calls(entries: &[CallRecord], highest: u32) -> HashMap<u64, Vec<UnansweredCall>> {
    let mut calls: HashMap<u64, Vec<UnansweredCall>> = HashMap::new();
    for entry in entries.iter().take(highest as usize) {
        let of = entry.of.load(Acquire);
        if of > 0 {
            calls.entry(of).or_default().push(call(entry));
        }
    }
    calls
}

/// What ran when the worker died, by key and method.
fn ran(entries: &[CallRecord], highest: u32) -> impl Iterator<Item = (u64, u32)> {
    let ran = |entry: &&CallRecord| {
        entry.of.load(Acquire) != 0
            // What ran in another process is not what this one died of.
            && ![0, BEGUN_ELSEWHERE].contains(&entry.begun.load(Relaxed))
            && entry.stage.load(Relaxed) != journal::ANSWERED
    };
    let entries = entries.iter().take(highest as usize).filter(ran);
    entries
        .map(|entry| (entry.key.load(Relaxed), entry.method.load(Relaxed)))
        .filter(|(key, _)| *key != 0)
}

fn call(entry: &CallRecord) -> UnansweredCall {
    let id = entry.id_length.load(Relaxed).checked_sub(1).map(|length| {
        let mut bytes: Vec<u8> = entry
            .id
            .iter()
            .flat_map(|word| word.load(Relaxed).to_ne_bytes())
            .collect();
        bytes.truncate(length as usize);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    UnansweredCall {
        shape: journal::shape(entry.shape.load(Relaxed)),
        order: entry.order.load(Relaxed).checked_sub(1),
        id,
        begun: entry.begun.load(Relaxed) != 0,
        answered: entry.stage.load(Relaxed) == journal::ANSWERED,
        end: entry.end.load(Relaxed),
    }
}

/// What was being received when the worker died. Where it died before it knew how much that was,
/// the kernel does.
fn receiving(moment: &CurrentIo, index: usize, socket: &OwnedFd) -> Option<Receiving> {
    (moment.receiving.load(Acquire) == index as u32 + 1).then(|| {
        let start = moment.start.load(Relaxed);
        let told = moment.received.load(Relaxed).checked_sub(1).map(u64::from);
        let counted = || clone_files::stream_offsets(socket)?.0.checked_sub(start);
        Receiving {
            start,
            taken: moment.taken.load(Relaxed),
            length: told.or_else(counted),
        }
    })
}

/// Likewise of what was being sent.
fn sending(moment: &CurrentIo, index: usize, socket: &OwnedFd) -> Option<Sending> {
    (moment.sending.load(Acquire) == index as u32 + 1).then(|| {
        let before = moment.before.load(Relaxed);
        let told = moment.sent.load(Relaxed).checked_sub(1).map(u64::from);
        let counted = || clone_files::stream_offsets(socket)?.1.checked_sub(before);
        Sending {
            length: moment.length.load(Relaxed),
            sent: told.or_else(counted),
        }
    })
}

/// Gives a connection away, by `end` at the latest; tells whether somebody will have it.
fn give(
    adoption: &AdoptionQueue,
    socket: &OwnedFd,
    fate: &Recovery,
    buffer: &[u8],
    end: Duration,
) -> bool {
    let Recovery::PassOn {
        state,
        unsent,
        unread,
        ..
    } = fate
    else {
        return false;
    };
    let Some(unread) = buffer.get(unread.clone()) else {
        return false;
    };
    let give = || adoption.send(socket.as_fd(), *state, unsent, unread);
    send_until(adoption, end, give)
}

/// Sends something through the queue as soon as there is room, by `end` at the latest; tells whether
/// it was.
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
            // The queue itself is writable: waiting for it would spin.
            poll(&mut [], timeout(left.min(RETRY)))
        };
    }
}

fn count(number: &AtomicU32, more: usize) {
    number.fetch_add(more as u32, Relaxed);
}
