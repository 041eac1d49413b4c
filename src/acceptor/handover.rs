//! Accepts and adopts connections, and gives them to sessions. If the system has no process for one, or no room
//! to send it, the connection is held and tried again.

use std::borrow::Cow;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;

use nix::errno::Errno;

use super::accepting::{Accepting, FIRST_SESSION, LISTENER, QUEUE, RETRY_MS};
use super::held::HeldConnection;
use super::session::HandOver;
use super::sessions;
use super::sources::is_connection;
use crate::link::adoption_queue::{FRESH, REJOIN};
use crate::link::metrics_board::layout::CloseReason;
use crate::sys::event;

/// The largest number of connections that are accepted in one turn of the loop.
const MAX_ACCEPTS: usize = 16;
/// The largest number of connections that a leaving acceptor still takes. Without this limit, clients could keep it
/// alive by connecting again and again.
const MAX_LAST_ACCEPTS: usize = 16_384;

/// Stops accepting, and ends the processes without a connection.
pub fn leave(accepting: &mut Accepting<'_>) {
    serve_held(accepting, true);
    accepting.sources.leave(&accepting.epoll);
    accepting.boot.listeners.clear();
    accepting.sessions.end_spares(&accepting.epoll);
}

/// Starts to adopt, and to accept as soon as there is room.
pub fn listen(accepting: &mut Accepting<'_>) {
    if !serve_held(accepting, false) {
        return;
    }
    let has_room = !accepting.is_full();
    accepting.note_limit(!has_room);
    if accepting.is_overfull() {
        return accepting.wait_for_room(true);
    }
    let numbers = (LISTENER, QUEUE);
    match accepting.sources.watch(&accepting.epoll, numbers, has_room) {
        Err(error) => accepting.pause(RETRY_MS, &error),
        Ok(()) if !has_room => accepting.wait_for_room(false),
        Ok(()) => {}
    }
}

/// Accepts waiting connections. `all` means that this is the last time.
pub fn accept(accepting: &mut Accepting<'_>, all: bool) {
    let most = if all { MAX_LAST_ACCEPTS } else { MAX_ACCEPTS };
    for _ in 0..most {
        if !all && !accepting.sources.is_listening() {
            return;
        }
        if accepting.is_full() {
            accepting.note_limit(true);
            let limit = accepting.isolation.processes;
            accepting.warn(&format!(
                "{limit} connections are open, as many as processes allows for the listener: further ones \
                 wait until one ends; raise processes"
            ));
            return accepting.wait_for_room(false);
        }
        let client = match accepting.sources.accept() {
            Ok(client) => client,
            Err(Errno::EAGAIN) => return,
            Err(error) if event::is_connection_gone(error) => continue,
            // Pause, because the error may last: while the listener is watched, each failed accept would wake the
            // loop again (100 % CPU).
            Err(error) => return accepting.pause(RETRY_MS, &error.into()),
        };
        let Some(new) = admit(accepting, client) else {
            continue;
        };
        match accepting.take_spare() {
            Ok(session) => {
                hand_over(accepting, session, new);
            }
            Err(error) => {
                accepting.held.add(new);
                return hold(accepting, &error);
            }
        }
    }
}

/// Adopts connections that sessions of other generations have handed over. `all` means that this is the last time.
/// Connections over the limit stay in the queue; with `all` they are closed.
pub fn adopt(accepting: &mut Accepting<'_>, all: bool) {
    let mut packet = std::mem::take(&mut accepting.packet);
    let most = if all { MAX_LAST_ACCEPTS } else { MAX_ACCEPTS };
    for _ in 0..most {
        if accepting.is_overfull() {
            if all && let Ok((length, client)) = accepting.sources.adopt(&mut packet) {
                if is_connection(&packet[..length], &client) {
                    accepting.count_closed(CloseReason::Limit);
                }
                sessions::close(client);
                continue;
            }
            accepting.wait_for_room(true);
            break;
        }
        let session = match accepting.take_spare() {
            Ok(session) => session,
            Err(error) => {
                accepting.pause(RETRY_MS, &error);
                break;
            }
        };
        match accepting.sources.adopt(&mut packet) {
            Ok((length, client)) if is_connection(&packet[..length], &client) => {
                // `per-source` was checked when the connection was first accepted.
                let from = accepting.source_of(&client[0]);
                let until_ms = held_until_ms(accepting);
                let moved = HeldConnection::new(
                    client,
                    Cow::Owned(packet[..length].to_vec()),
                    from,
                    until_ms,
                );
                if !hand_over(accepting, session, moved) {
                    break;
                }
            }
            Ok((length, link)) if packet[..length] == REJOIN => {
                accepting.sessions.keep_spare(session);
                accepting
                    .sessions
                    .rejoin(link, &accepting.epoll, FIRST_SESSION);
            }
            Ok((_, client)) => {
                accepting.sessions.keep_spare(session);
                sessions::close(client);
                accepting
                    .warn("a process has sent an invalid packet to the adoption queue: dropped");
            }
            Err(error) => {
                accepting.sessions.keep_spare(session);
                // A queue that stays watched would use 100 % CPU.
                match error.kind() {
                    io::ErrorKind::WouldBlock => {}
                    io::ErrorKind::BrokenPipe => accepting.leave_queue(),
                    _ => accepting.pause(RETRY_MS, &error),
                }
                break;
            }
        }
    }
    accepting.packet = packet;
}

/// Counts an accepted connection. Returns it, unless its source has too many.
fn admit(accepting: &mut Accepting<'_>, client: OwnedFd) -> Option<HeldConnection> {
    accepting.writer.add(&accepting.writer.block.accepted, 1);
    let from = accepting.source_of(&client);
    let client = vec![accepting.admit(client, from)?];
    let packet = Cow::Borrowed(&FRESH[..]);
    Some(HeldConnection::new(
        client,
        packet,
        from,
        held_until_ms(accepting),
    ))
}

/// Returns until when a connection that comes now may wait for a process.
fn held_until_ms(accepting: &Accepting<'_>) -> u64 {
    let timeout = accepting.boot.settings.limits.read_timeout.as_millis();
    accepting.now_ms + u64::try_from(timeout).unwrap_or(u64::MAX / 2)
}

/// Accepts connections that wait in the listener, and holds them, because no process can be forked for them now.
fn hold(accepting: &mut Accepting<'_>, error: &io::Error) {
    for _ in 0..MAX_ACCEPTS {
        if accepting.held.is_full() || accepting.is_full() {
            break;
        }
        let Ok(client) = accepting.sources.accept() else {
            break;
        };
        if let Some(new) = admit(accepting, client) {
            accepting.held.add(new);
        }
    }
    accepting.pause(RETRY_MS, error);
}

/// Gives waiting connections to new processes. Refuses connections that have waited for too long; if `is_last`,
/// refuses all that get no process. Returns whether no connection waits any more.
fn serve_held(accepting: &mut Accepting<'_>, is_last: bool) -> bool {
    while let Some(held) = accepting.held.take_expired(accepting.now_ms) {
        refuse_held(accepting, held);
    }
    while let Some(held) = accepting.held.take() {
        let is_given = match accepting.take_spare() {
            Ok(session) => hand_over(accepting, session, held),
            Err(error) => {
                accepting.held.put_back(held);
                if !is_last {
                    hold(accepting, &error);
                }
                false
            }
        };
        if !is_given && !is_last {
            return false;
        }
        if !is_given && let Some(held) = accepting.held.take() {
            refuse_held(accepting, held);
        }
    }
    true
}

/// Gives a connection to a session, or to another one if that has ended. Returns false if the connection
/// waits, as the first one of those that are held.
fn hand_over(accepting: &mut Accepting<'_>, mut session: usize, mut held: HeldConnection) -> bool {
    loop {
        let error = match accepting
            .sessions
            .hand_over(session, held, accepting.now_ms)
        {
            HandOver::Done => return true,
            HandOver::Lost(error) => {
                accepting.count_closed(CloseReason::Limit);
                accepting.warn(&format!(
                    "could not hand a connection to a process: {error}; the connection is closed"
                ));
                return true;
            }
            HandOver::Later(back, error) => {
                held = back;
                error
            }
            HandOver::Again(back) => {
                held = back;
                match accepting.take_spare() {
                    Ok(next) => {
                        session = next;
                        continue;
                    }
                    Err(error) => error,
                }
            }
        };
        accepting.held.put_back(held);
        accepting.pause(RETRY_MS, &error);
        return false;
    }
}

fn refuse_held(accepting: &mut Accepting<'_>, mut held: HeldConnection) {
    if let Some(first) = accepting.sessions.records.all.first() {
        first.unserved.fetch_add(1, Relaxed);
    }
    let text = "the server could start no process for this connection; try again later";
    if held.is_fresh()
        && let Some(client) = held.client.pop()
    {
        return accepting.refuse(client, text);
    }
    sessions::close(held.client);
    accepting.count_closed(CloseReason::Limit);
}
