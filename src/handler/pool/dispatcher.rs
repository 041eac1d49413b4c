//! Dispatches the calls of a pool to its programs: writes each call to the least busy program, and reads
//! answers and ends of programs.
//!
//! It belongs to the event loop. It starts and ends no program: it gets each ready program and its socket from the
//! supervisor, and gives both back when the program must end. A call belongs to no program before it is written to one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;

use super::entry::{EndCause, Entry, Recall};
use super::program_connection::{Line, ProgramConnection};
use super::wire::LEFT;
use crate::handler::call_state::HandlerCall;
use crate::handler::registry::Registry;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::monotonic_ms;
use crate::sys::waker::Waker;
use crate::throttle::Millis;

/// An order of the dispatcher to a supervisor.
#[derive(Debug)]
pub(super) enum SupervisorOrder {
    /// Take back the program, which has no call.
    Back(Box<ProgramConnection>),
    /// End the program and handle its calls.
    End(Box<ProgramConnection>, EndCause),
    /// Continue: the program was not given back, because it has calls.
    Kept,
    /// Start the sleeping program, because it is needed.
    Start,
    /// Start no more programs, because the process exits soon.
    Rest,
    /// Let the first program serve, which was held until now.
    Serve,
    /// End the program when it has no call, and start none after it.
    Leave,
    /// Use this registry, which has more methods.
    Registry(Arc<Registry>),
    /// End all programs, with this time before SIGTERM, and as much again before SIGKILL.
    Close(Millis),
}

/// A report of a supervisor to the dispatcher.
#[derive(Debug)]
pub(super) enum SupervisorEvent {
    /// Its program is ready.
    Ready(Box<ProgramConnection>),
    /// It needs its program back.
    Recall(Recall),
    /// Its program died too often, the last time for this reason, and is not started before this time.
    Down(String, Millis),
    /// It starts its program.
    Starts,
    /// The program had not read this call when it ended.
    Again(HandlerCall),
    /// Its program is gone, and no other one follows.
    Gone,
}

/// The state of a program, for dispatching.
#[derive(Debug)]
pub(super) enum Place {
    /// The program starts, also after it was asleep, or it ends. Its connection may be in `leaving`.
    Empty,
    /// It was ended because it was idle, and is started for the next call.
    Asleep,
    /// The program died too often, for this reason the last time, and is not started before this time.
    Down(String, Millis),
    /// The program serves.
    Taken(Box<ProgramConnection>),
    /// There is no supervisor for this number.
    Vacant,
}

/// The channel to a supervisor.
#[derive(Debug)]
pub(super) struct SupervisorHandle {
    pub orders: Sender<SupervisorOrder>,
    pub waker: Arc<Waker>,
}

impl SupervisorHandle {
    fn send(&self, order: SupervisorOrder) {
        // The receiver is gone if the supervisor has ended. Then it needs no order.
        let _ = self.orders.send(order);
        self.waker.wake();
    }
}

#[derive(Debug)]
pub(super) struct Dispatcher {
    pub line: Line,
    pub places: Vec<Place>,
    supervisors: Vec<SupervisorHandle>,
    /// Programs that go back to their supervisors, as soon as their sockets are not watched any more.
    leaving: Vec<(usize, SupervisorOrder)>,
    /// Programs whose sockets must be watched, or watched differently.
    changed: Vec<usize>,
    /// When to call `settle` again, to end a program whose calls are all abandoned.
    pub next_overdue: Option<Millis>,
}

impl Dispatcher {
    pub fn new(line: Line, supervisors: Vec<SupervisorHandle>) -> Self {
        Dispatcher {
            line,
            places: supervisors.iter().map(|_| Place::Empty).collect(),
            supervisors,
            leaving: Vec::new(),
            changed: Vec::new(),
            next_overdue: None,
        }
    }

    /// Returns the number of programs that serve. A sleeping one counts, because it is started for the next
    /// call.
    pub fn serving(&self) -> usize {
        let serves = |number: &usize| self.serves(*number);
        (0..self.places.len()).filter(serves).count()
    }

    /// Returns whether the program with this number serves.
    pub fn serves(&self, number: usize) -> bool {
        matches!(
            self.places.get(number),
            Some(Place::Taken(_) | Place::Asleep)
        )
    }

    /// Returns whether calls are refused, because no program will serve for a while.
    pub fn refuses(&self) -> bool {
        (self.places.iter()).all(|place| matches!(place, Place::Down(..) | Place::Vacant))
    }

    /// Returns whether no program serves and none will be started.
    pub fn is_vacant(&self) -> bool {
        (self.places.iter()).all(|place| matches!(place, Place::Vacant))
    }

    /// Adds a supervisor with this number.
    pub fn add(&mut self, number: usize, supervisor: SupervisorHandle) {
        match self.places.get_mut(number) {
            Some(place) => (*place, self.supervisors[number]) = (Place::Empty, supervisor),
            None => {
                self.places.push(Place::Empty);
                self.supervisors.push(supervisor);
            }
        }
    }

    /// Sends an order to the supervisor of a program.
    pub fn send(&self, number: usize, order: SupervisorOrder) {
        self.supervisors[number].send(order);
    }

    /// Sends an order to all supervisors.
    pub fn send_to_all(&self, order: impl Fn() -> SupervisorOrder) {
        self.supervisors.iter().for_each(|it| it.send(order()));
    }

    /// Returns the number of calls that its programs may have now, if each may have `concurrency`.
    pub fn capacity(&self, concurrency: usize) -> usize {
        // If no program may be started for a while, calls are accepted too: they are refused, which needs no program.
        if self.refuses() {
            return self.places.len() * concurrency;
        }
        let of = |place: &Place| match place {
            Place::Taken(connection) => connection.capacity(),
            Place::Asleep => concurrency,
            Place::Empty | Place::Down(..) | Place::Vacant => 0,
        };
        self.places.iter().map(of).sum()
    }

    /// Queues a call for the first program that can take it.
    pub fn put(&mut self, call: HandlerCall) {
        self.line.waiting.push_back(Entry::new(call, false));
        self.serve();
    }

    /// Begins waiting calls, or wakes a program for them.
    fn serve(&mut self) {
        let is_asleep = |place: &Place| matches!(place, Place::Asleep);
        while !self.line.waiting.is_empty() {
            if let Some(number) = self.least_busy() {
                if let Place::Taken(connection) = &mut self.places[number] {
                    connection.give_one(&mut self.line);
                }
                self.update_watch(number);
            } else if let Some(number) = self.places.iter().position(is_asleep) {
                if self.wake(number) {
                    return;
                }
            } else {
                return self.refuse();
            }
        }
    }

    /// Wakes a sleeping program. Returns whether it must be started, because it is already back at its supervisor.
    fn wake(&mut self, number: usize) -> bool {
        let still_here = |(at, order): &mut (usize, SupervisorOrder)| {
            *at == number && matches!(order, SupervisorOrder::Back(_))
        };
        let back = self.leaving.extract_if(.., still_here).next();
        if let Some((_, SupervisorOrder::Back(connection))) = back {
            self.places[number] = Place::Taken(connection);
            self.supervisors[number].send(SupervisorOrder::Kept);
            return false;
        }
        self.places[number] = Place::Empty;
        self.supervisors[number].send(SupervisorOrder::Start);
        true
    }

    /// Answers waiting calls if all programs are down.
    fn refuse(&mut self) {
        let down = |place| match place {
            &Place::Down(ref reason, due) => Some((due, reason)),
            _ => None,
        };
        let is_used = |place: &&Place| !matches!(place, Place::Vacant);
        let downs: Option<Vec<_>> = self.places.iter().filter(is_used).map(down).collect();
        let Some((due, reason)) = downs.and_then(|downs| downs.into_iter().min()) else {
            return;
        };
        // At least 1 ms. If the time is over, its supervisor is about to report that it starts.
        let wait = Duration::from_millis(due.saturating_sub(monotonic_ms()).max(1));
        for entry in self.line.waiting.drain(..) {
            let outcome = entry.call.state.begin().then(|| {
                let text = format!("{reason}; the next is started in {wait:?}");
                Err(RpcError::of(Code::Crashed, text, false))
            });
            self.line.done.push(entry.done(outcome, None));
        }
    }

    /// Returns the program with the fewest calls among those that can take one, and the first one if several are equal.
    fn least_busy(&self) -> Option<usize> {
        let places = self.places.iter().enumerate();
        let idle = places.filter_map(|(number, place)| match place {
            Place::Taken(connection) if connection.is_idle() => Some((connection.count(), number)),
            _ => None,
        });
        idle.min().map(|(_, number)| number)
    }

    /// Notes that a socket must be watched differently: for writing only while not all bytes were sent.
    fn update_watch(&mut self, number: usize) {
        if let Some(Place::Taken(connection)) = self.places.get(number)
            && connection.is_watched_for_writing == connection.wire.has_sent_all()
            && !self.changed.contains(&number)
        {
            self.changed.push(number);
        }
    }

    /// Handles a program whose socket can be read or written.
    pub fn attend(&mut self, number: usize, piece: &mut [u8]) {
        if let Some(Place::Taken(connection)) = self.places.get_mut(number) {
            connection.wire.flush();
            connection.wire.receive(piece);
            self.handle_received(number);
        }
    }

    /// Handles what a program has sent, and its end.
    fn handle_received(&mut self, number: usize) {
        let Some(Place::Taken(connection)) = self.places.get_mut(number) else {
            return;
        };
        // Everything that the program has sent before its end counts.
        let why = match connection.take_answers(&mut self.line) {
            Err(problem) => EndCause::Broken(problem),
            Ok(()) if connection.is_at_end() => EndCause::Died,
            // The next call, which was written before this answer, may have been abandoned meanwhile.
            Ok(()) if connection.is_abandoned_too_long(&self.line) => EndCause::GivenUp,
            Ok(()) => {
                if connection.take_recycle_due() {
                    self.supervisors[number].waker.wake();
                }
                if connection.is_recalled && connection.count() == 0 {
                    self.empty(number, SupervisorOrder::Back);
                }
                return self.update_watch(number);
            }
        };
        self.end(number, why);
    }

    /// Tells programs which of their calls were abandoned. Call `settle` afterwards.
    pub fn cancel_given_up(&mut self) {
        for number in 0..self.places.len() {
            if let Place::Taken(connection) = &mut self.places[number] {
                connection.cancel_given_up(&mut self.line);
                if connection.is_recalled && connection.count() == 0 {
                    self.empty(number, SupervisorOrder::Back);
                } else {
                    self.update_watch(number);
                }
            }
        }
    }

    /// Ends programs whose calls are all abandoned and whose time is over.
    fn end_abandoned(&mut self) {
        self.next_overdue = None;
        for number in 0..self.places.len() {
            if let Place::Taken(connection) = &self.places[number] {
                match connection.abandoned_until(&self.line) {
                    Some(at) if at <= monotonic_ms() => self.end(number, EndCause::GivenUp),
                    at => self.next_overdue = self.next_overdue.into_iter().chain(at).min(),
                }
            }
        }
    }

    fn end(&mut self, number: usize, why: EndCause) {
        self.empty(number, |connection| SupervisorOrder::End(connection, why));
        // Calls that waited for this program need another one.
        self.serve();
    }

    fn empty(
        &mut self,
        number: usize,
        order: impl FnOnce(Box<ProgramConnection>) -> SupervisorOrder,
    ) {
        match std::mem::replace(&mut self.places[number], Place::Empty) {
            Place::Taken(connection) => self.leaving.push((number, order(connection))),
            other => self.places[number] = other,
        }
    }

    /// Handles a report of a supervisor.
    pub fn receive(&mut self, number: usize, event: SupervisorEvent, piece: &mut [u8]) {
        match event {
            SupervisorEvent::Ready(connection) => {
                self.places[number] = Place::Taken(connection);
                self.changed.push(number);
                // The program may have sent something since its start. Handle that before it gets a call.
                self.handle_received(number);
                self.serve();
            }
            SupervisorEvent::Recall(recall) => self.recall(number, recall, piece),
            SupervisorEvent::Starts => self.places[number] = Place::Empty,
            SupervisorEvent::Down(reason, due) => {
                self.places[number] = Place::Down(reason, due);
                self.serve();
            }
            SupervisorEvent::Again(call) => {
                call.state.show_waiting();
                self.line.waiting.push_front(Entry::new(call, true));
                self.serve();
            }
            SupervisorEvent::Gone => {
                self.places[number] = Place::Vacant;
                self.serve();
            }
        }
    }

    fn recall(&mut self, number: usize, recall: Recall, piece: &mut [u8]) {
        // A program that is on its way back needs nothing.
        let Some(Place::Taken(connection)) = self.places.get_mut(number) else {
            return;
        };
        match recall {
            Recall::Sleep
                if connection.is_idle()
                    && connection.count() == 0
                    && self.line.waiting.is_empty() =>
            {
                self.empty(number, SupervisorOrder::Back);
                self.places[number] = Place::Asleep;
            }
            Recall::Sleep => self.supervisors[number].send(SupervisorOrder::Kept),
            Recall::Successor => {
                connection.is_recalled = true;
                if connection.count() == 0 {
                    self.empty(number, SupervisorOrder::Back);
                }
            }
            Recall::Ended => {
                // It sends nothing more, even if another process still holds its end of the socket.
                connection.has_ended = true;
                for _ in 0..LEFT {
                    if !connection.wire.receive(piece) {
                        break;
                    }
                }
                self.handle_received(number);
            }
        }
    }

    /// Calls `watch` for each socket that must be watched differently: not at all, for reading, or for
    /// both. If `watch` fails, it is called again the next time. Then sends back the programs that go back.
    pub fn settle(
        &mut self,
        mut watch: impl FnMut(usize, Option<(BorrowedFd<'_>, bool)>) -> io::Result<()>,
    ) {
        self.end_abandoned();
        for (number, place) in self.places.iter().enumerate() {
            if let Place::Taken(connection) = place {
                self.line.show(number, connection);
            }
        }
        let places = &mut self.places;
        self.changed.retain(|&number| {
            let Place::Taken(connection) = &mut places[number] else {
                return false;
            };
            let writing = !connection.wire.has_sent_all();
            connection.is_watched_for_writing = writing;
            watch(number, Some((connection.wire.as_fd(), writing))).is_err()
        });
        for (number, order) in self.leaving.drain(..) {
            // First, because the supervisor closes the socket, which must not be watched then.
            let _ = watch(number, None);
            self.supervisors[number].send(order);
        }
    }

    /// Takes all programs out of service and sends them back. Call `settle` afterwards.
    pub fn release_all(&mut self) {
        // The waiting calls were answered, or will never be.
        self.line.waiting.clear();
        self.send_to_all(|| SupervisorOrder::Rest);
        let runs =
            |place: &Place| matches!(place, Place::Taken(connection) if connection.count() > 0);
        for number in 0..self.places.len() {
            if runs(&self.places[number]) {
                self.end(number, EndCause::Leaving);
            } else {
                self.empty(number, SupervisorOrder::Back);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "dispatcher_tests.rs"]
mod tests;
