//! Runs a session: a worker with one connection and no listener, which ends with that connection.
//!
//! Its acceptor forks it in advance, sends it the connection, and gives it orders. If the acceptor dies, the session
//! continues: it reads the orders of the master from its record in shared memory, and sends a link to the next
//! acceptor. If the master dies, a pipe ends whose only writer is the master.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::assembly::{build, finish, serve};
use super::event_loop::{EventLoop, MASTER};
use super::path_listeners::PathListeners;
use super::post_fork;
use super::session_state::SessionState;
use super::timers::millis;
use crate::handler::guard;
use crate::link::adoption_queue::LONGEST;
use crate::link::message::{Message, Order, PACKET, Report};
use crate::link::scoreboard::WorkerRecord;
use crate::logging;
use crate::protocol::body;
use crate::sys::event::Interest;
use crate::sys::process::monotonic_ms;
use crate::sys::{closer, memory, memory_file, socket};
use crate::worker_init::WorkerInit;

const LONGEST_PACKET: NonZeroUsize = NonZeroUsize::new(LONGEST).expect("it has a header");

/// A connection as it comes from the acceptor.
struct NewConnection {
    socket: OwnedFd,
    /// A packet of the adoption queue.
    packet: Vec<u8>,
    rest: Option<OwnedFd>,
}

/// Runs the session, from its fork to its end.
///
/// # Errors
/// What failed, and why.
pub fn live(mut boot: WorkerInit<'_>) -> Result<(), (&'static str, io::Error)> {
    let isolated = boot.isolated.clone();
    let isolated = isolated.ok_or(("start", io::Error::other("it has no listener")))?;
    let configured = boot.settings.listen.iter().skip(isolated.listen).take(1);
    let path_listeners = PathListeners::of(configured, &boot.listeners);
    boot.listeners.clear();
    // With the receiving end it could take the connections of other clients.
    boot.adoption.rx = Rc::clone(&boot.adoption.tx);
    let (signals, _) = post_fork::init_worker_process(&mut boot)?;
    let lifetime = boot
        .isolation()
        .map_or(Duration::ZERO, |it| it.max_lifetime);
    let (title, program) = (boot.title, boot.program.clone());
    let number = boot.slot.session().unwrap_or_default();
    let record =
        (isolated.range.0.get(number)).ok_or(("start", io::Error::other("it has no record")))?;
    let (mut event_loop, mut reactor) =
        build(boot, signals, None, path_listeners, Box::new(|| ()))?;
    event_loop.stuck_reported = true;
    // The acceptor of a new generation is ready when its first session is.
    event_loop
        .report(Report::Ready)
        .map_err(|error| ("tell that it is ready", error))?;
    event_loop.is_accepting = true;
    warm_up();
    let came = wait_for_connection(&mut event_loop, &isolated.master_pipe);
    let Some(new) = came.map_err(|error| ("wait for a connection", error))? else {
        finish(event_loop, reactor);
        return Ok(());
    };
    logging::stop_forwarding();
    if let Some(area) = title {
        area.set(&format!("{program}: connection {}", record.peer_name()));
    }
    event_loop.service.now_ms = monotonic_ms();
    reactor
        .watch(MASTER, &*isolated.master_pipe, Interest::Read)
        .map_err(|error| ("watch for the master's end", error))?;
    let ends_at_ms = match millis(lifetime) {
        0 => u64::MAX,
        lifetime => event_loop.service.now_ms.saturating_add(lifetime),
    };
    event_loop.session = Some(SessionState::new(record, isolated.heartbeat_ms, ends_at_ms));
    // If this process crashes, the client must not take that for an orderly end.
    socket::reset_when_closed(&new.socket, true);
    let now_ms = event_loop.service.now_ms;
    // Later, the session may have no acceptor that could request them.
    let is_pool = |record: &WorkerRecord| record.lane.load(Relaxed) > 0;
    (event_loop.service.forwarding).want_links(now_ms, is_pool);
    event_loop.adopted(&mut reactor, new.socket, &new.packet, new.rest);
    serve(event_loop, reactor)
}

/// Runs code of a call for the first time, which is slow. So a session has mapped the pages of that code before it has
/// a client. The children of an acceptor also inherit resolved symbols, and which instructions the CPU has.
pub fn warm_up() {
    drop(body::read(br#"{"in":"ping"}"#, 1, 1));
    drop(guard::run(("ping", None), || Ok(())));
}

/// Waits until the acceptor sends a connection. Returns `None` if the acceptor needs this session no more, or is gone.
///
/// # Errors
/// If receiving fails.
fn wait_for_connection(
    event_loop: &mut EventLoop,
    master_pipe: &OwnedFd,
) -> io::Result<Option<NewConnection>> {
    // Most packets are short.
    let buffer = memory::zeroed(LONGEST_PACKET)?;
    loop {
        let mut fds = [
            PollFd::new(event_loop.link.as_fd(), PollFlags::POLLIN),
            PollFd::new(master_pipe.as_fd(), PollFlags::POLLIN),
            PollFd::new(event_loop.signals.as_fd(), PollFlags::POLLIN),
        ];
        // poll(2) can only fail with EINTR or ENOMEM here. In both cases the loop tries again.
        let _ = poll(&mut fds, PollTimeout::NONE);
        let [has_packet, is_orphan, has_signal] = fds.map(|fd| fd.any().unwrap_or(false));
        if has_packet {
            match socket::receive_packet(&event_loop.link, buffer) {
                Ok((0, _)) => return Ok(None),
                Ok((length, descriptors)) => {
                    match on_packet(event_loop, &buffer[..length], descriptors) {
                        Packet::Connection(new) => return Ok(Some(new)),
                        Packet::Leave => return Ok(None),
                        Packet::Other => continue,
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        if is_orphan || has_signal && !event_loop.signals.take().is_empty() {
            return Ok(None);
        }
    }
}

enum Packet {
    Connection(NewConnection),
    Leave,
    Other,
}

fn on_packet(event_loop: &mut EventLoop, packet: &[u8], descriptors: Vec<OwnedFd>) -> Packet {
    let mut descriptors = descriptors.into_iter();
    if packet.len() == PACKET
        && let Some(message) = Message::<Order>::decode(packet)
    {
        match message.body {
            Order::Drain(_) | Order::Stop(_) => return Packet::Leave,
            Order::StopPending => event_loop.service.stop_pending = true,
            Order::ReopenAccessLog => event_loop.service.access.reopen(descriptors.next()),
            Order::ReopenLog => {
                if let Some(file) = descriptors.next() {
                    drop(logging::set_output(logging::LogOutput::received(file)));
                }
            }
            // Other orders are answers to requests, and the session has made none yet.
            _ => {}
        }
        return Packet::Other;
    }
    let (socket, rest) = (descriptors.next(), descriptors.next());
    let has_rest = rest.is_some();
    let keep = |fd: Option<OwnedFd>, is_right: fn(&OwnedFd) -> bool| {
        let fd = fd?;
        match is_right(&fd) {
            true => Some(fd),
            false => {
                closer::close(fd);
                None
            }
        }
    };
    let socket = keep(socket, socket::is_stream_socket);
    let rest = keep(rest, memory_file::is_one);
    descriptors.for_each(closer::close);
    match socket {
        Some(socket) if rest.is_some() == has_rest => Packet::Connection(NewConnection {
            socket,
            packet: packet.to_vec(),
            rest,
        }),
        // The packet has no valid connection, so the connection is lost and the session exits.
        _ => Packet::Leave,
    }
}
