//! Where a pool's calls meet its programs: the loop puts calls in, each is written to the least busy
//! program, and what comes back is an answer, or the end of that program.
//!
//! The loop's alone. It starts and ends nothing: a program comes from its `keeper` with its wire, and
//! goes back there for its end. A call is never bound to a program before it is written to it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;

use super::entry::Entry;
use super::seat::{Line, Seat};
use super::wire::LEFT;
use crate::handler::call_state::{Done, HandlerCall};
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::monotonic_ms;
use crate::sys::waker::Waker;
use crate::throttle::Millis;

/// Why a program that served is to be ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// It has died, or has closed its descriptor 3, which comes to the same.
    Died,
    /// What it has sent is no answer.
    Broken(String),
    /// Nobody waits for what it does.
    GivenUp,
    /// The worker leaves.
    Leaving,
}

/// What a keeper hears from the desk.
#[derive(Debug)]
pub(super) enum Order {
    /// Its program has nothing to do, and is its own again.
    Back(Box<Seat>),
    /// Its program is to be ended, with what it was at.
    End(Box<Seat>, Why),
    /// Its program was not given back: it has something to do.
    Kept,
    /// Its program sleeps, and is wanted.
    Start,
    /// The worker leaves: no further program is started.
    Rest,
    /// No program serves any more: its own has this time to leave before SIGTERM, and again after it.
    Close(Millis),
}

/// Why a keeper wants its program back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recall {
    /// To end it, for it had nothing to do; only if that is still so.
    Sleep,
    /// Another one is ready to take over.
    Successor,
    /// It has ended.
    Ended,
}

/// What the desk hears from a keeper.
#[derive(Debug)]
pub(super) enum Word {
    /// Its program is ready.
    Ready(Box<Seat>),
    /// It wants its program back.
    Recall(Recall),
    /// Its program died too often, the last one for this reason, and is not started before that
    /// time.
    Down(String, Millis),
    /// It starts its program.
    Starts,
    /// The program had not read that call when it ended.
    Again(HandlerCall),
}

/// What a keeper's program is up to, as far as calls go.
#[derive(Debug)]
pub(super) enum Place {
    /// It starts or ends, or was woken; its seat may be among those that go back.
    Empty,
    /// It was ended because nothing came, and is started for the next call.
    Asleep,
    /// It is not started for a while.
    Down(String, Millis),
    /// It serves.
    Taken(Box<Seat>),
}

/// The way to a keeper.
#[derive(Debug)]
pub(super) struct Ear {
    pub orders: Sender<Order>,
    pub waker: Arc<Waker>,
}

impl Ear {
    fn tell(&self, order: Order) {
        // Only a keeper that is done does not listen any more, and that one needs nothing.
        let _ = self.orders.send(order);
        self.waker.wake();
    }
}

#[derive(Debug)]
pub(super) struct Desk {
    line: Line,
    places: Vec<Place>,
    ears: Vec<Ear>,
    /// Programs that go back, once their wires are not watched any more.
    leaving: Vec<(usize, Order)>,
    /// Places whose wires are to be watched, or in another way than before.
    changed: Vec<usize>,
    /// When `settle` is to be called again, to end a program whose only calls are abandoned.
    pub next_overdue: Option<Millis>,
}

impl Desk {
    pub fn new(line: Line, ears: Vec<Ear>) -> Self {
        Desk {
            line,
            places: ears.iter().map(|_| Place::Empty).collect(),
            ears,
            leaving: Vec::new(),
            changed: Vec::new(),
            next_overdue: None,
        }
    }

    /// How many programs have a place here.
    pub fn count(&self) -> usize {
        self.places.len()
    }

    /// How many of them do not serve. One that sleeps does: it is started for the next call.
    pub fn down(&self) -> usize {
        let is_down = |place: &&Place| matches!(place, Place::Empty | Place::Down(..));
        self.places.iter().filter(is_down).count()
    }

    /// Whether calls are refused, because no program will serve for a while.
    pub fn refuses(&self) -> bool {
        let is_down = |place: &Place| matches!(place, Place::Down(..));
        self.places.iter().all(is_down)
    }

    /// How many calls its programs may have now, if each may have `concurrency`.
    pub fn capacity(&self, concurrency: usize) -> usize {
        // While all of them wait until they may start, calls are refused, which takes no program.
        if self.refuses() {
            return self.count() * concurrency;
        }
        let of = |place: &Place| match place {
            Place::Taken(seat) => seat.capacity(),
            Place::Asleep => concurrency,
            Place::Empty | Place::Down(..) => 0,
        };
        self.places.iter().map(of).sum()
    }

    /// Whether calls are done that nobody has taken.
    pub fn has_done(&self) -> bool {
        !self.line.done.is_empty()
    }

    /// Moves what is done there.
    pub fn take_done(&mut self, done: &mut Vec<Done>) {
        done.append(&mut self.line.done);
    }

    /// A call for whichever program is the first to be free.
    pub fn put(&mut self, job: HandlerCall) {
        self.line.waiting.push_back(Entry::new(job, false));
        self.serve();
    }

    /// Lets calls that wait begin, or sees to it that they can.
    fn serve(&mut self) {
        let asleep = |place: &Place| matches!(place, Place::Asleep);
        while !self.line.waiting.is_empty() {
            if let Some(number) = self.least_busy() {
                self.give_one(number);
            } else if let Some(number) = self.places.iter().position(asleep) {
                if self.wake(number) {
                    return;
                }
            } else {
                return self.refuse();
            }
        }
    }

    /// Wants a program back that sleeps; tells whether it has to be started. It does not where its
    /// keeper has not heard yet that it may sleep.
    fn wake(&mut self, number: usize) -> bool {
        let still_here =
            |(at, order): &mut (usize, Order)| *at == number && matches!(order, Order::Back(_));
        let back = self.leaving.extract_if(.., still_here).next();
        if let Some((_, Order::Back(seat))) = back {
            self.places[number] = Place::Taken(seat);
            self.ears[number].tell(Order::Kept);
            return false;
        }
        self.places[number] = Place::Empty;
        self.ears[number].tell(Order::Start);
        true
    }

    /// Answers for programs that are all down.
    fn refuse(&mut self) {
        let down = |place| match place {
            &Place::Down(ref reason, due) => Some((due, reason)),
            _ => None,
        };
        // None of them as soon as one is something else.
        let downs: Option<Vec<_>> = self.places.iter().map(down).collect();
        let Some((due, reason)) = downs.and_then(|downs| downs.into_iter().min()) else {
            return;
        };
        let left = due.saturating_sub(monotonic_ms());
        // Its keeper is about to say that it starts.
        let wait = Duration::from_millis(left.max(1));
        for entry in self.line.waiting.drain(..) {
            let outcome = entry.job.state.begin().then(|| {
                let text = format!("{reason}; the next is started in {wait:?}");
                Err(RpcError::of(Code::Crashed, text, false))
            });
            self.line.done.push(entry.done(outcome, None));
        }
    }

    /// The program with the fewest calls of those that take one; the first one of equals.
    fn least_busy(&self) -> Option<usize> {
        let places = self.places.iter().enumerate();
        let idle = places.filter_map(|(number, place)| match place {
            Place::Taken(seat) if seat.is_idle() => Some((seat.count(), number)),
            _ => None,
        });
        idle.min().map(|(_, number)| number)
    }

    fn give_one(&mut self, number: usize) {
        if let Some(Place::Taken(seat)) = self.places.get_mut(number) {
            seat.give_one(&mut self.line);
        }
        self.look_at_wire(number);
    }

    /// A wire that is full is watched until it is not.
    fn look_at_wire(&mut self, number: usize) {
        if let Some(Place::Taken(seat)) = self.places.get(number)
            && seat.is_watched_for_writing == seat.wire.has_sent_all()
            && !self.changed.contains(&number)
        {
            self.changed.push(number);
        }
    }

    /// A program's wire can be read or written.
    pub fn attend(&mut self, number: usize, piece: &mut [u8]) {
        if let Some(Place::Taken(seat)) = self.places.get_mut(number) {
            seat.wire.flush();
            seat.wire.receive(piece);
            self.judge(number);
        }
    }

    /// Says what follows from what a program has sent, and from its end.
    fn judge(&mut self, number: usize) {
        let Some(Place::Taken(seat)) = self.places.get_mut(number) else {
            return;
        };
        // All that it has sent before its end counts.
        let why = match seat.take_answers(&mut self.line) {
            Err(problem) => Why::Broken(problem),
            Ok(()) if seat.is_at_end() => Why::Died,
            // What was written ahead may have been given up meanwhile.
            Ok(()) if seat.works_in_vain(&self.line) => Why::GivenUp,
            Ok(()) => {
                if seat.has_had_enough() {
                    self.ears[number].waker.wake();
                }
                if seat.is_recalled && seat.count() == 0 {
                    self.give_back(number);
                }
                return self.look_at_wire(number);
            }
        };
        self.end(number, why);
    }

    /// Tells programs which of their calls were given up; `settle` is to follow.
    pub fn cancel_given_up(&mut self) {
        for number in 0..self.places.len() {
            if let Place::Taken(seat) = &mut self.places[number] {
                seat.cancel_given_up(&mut self.line);
                if seat.is_recalled && seat.count() == 0 {
                    self.give_back(number);
                } else {
                    self.look_at_wire(number);
                }
            }
        }
    }

    /// Ends programs that have kept abandoned calls for too long and have no others.
    fn end_overdue(&mut self) {
        self.next_overdue = None;
        for number in 0..self.places.len() {
            if let Place::Taken(seat) = &self.places[number] {
                match seat.works_in_vain_until(&self.line) {
                    Some(at) if at <= monotonic_ms() => self.end(number, Why::GivenUp),
                    at => self.next_overdue = self.next_overdue.into_iter().chain(at).min(),
                }
            }
        }
    }

    fn end(&mut self, number: usize, why: Why) {
        self.empty(number, |seat| Order::End(seat, why));
        // A call that found this one to be there may need another.
        self.serve();
    }

    fn give_back(&mut self, number: usize) {
        self.empty(number, Order::Back);
    }

    fn empty(&mut self, number: usize, order: impl FnOnce(Box<Seat>) -> Order) {
        match std::mem::replace(&mut self.places[number], Place::Empty) {
            Place::Taken(seat) => self.leaving.push((number, order(seat))),
            other => self.places[number] = other,
        }
    }

    /// Hears what a keeper has to say.
    pub fn hear(&mut self, number: usize, word: Word, piece: &mut [u8]) {
        match word {
            Word::Ready(seat) => {
                self.places[number] = Place::Taken(seat);
                self.changed.push(number);
                // What it may have said already comes first.
                self.judge(number);
                self.serve();
            }
            Word::Recall(recall) => self.recall(number, recall, piece),
            Word::Starts => self.places[number] = Place::Empty,
            Word::Down(reason, due) => {
                self.places[number] = Place::Down(reason, due);
                self.serve();
            }
            Word::Again(job) => {
                job.state.show_waiting();
                self.line.waiting.push_front(Entry::new(job, true));
                self.serve();
            }
        }
    }

    fn recall(&mut self, number: usize, recall: Recall, piece: &mut [u8]) {
        // One that is on its way back needs no more.
        let Some(Place::Taken(seat)) = self.places.get_mut(number) else {
            return;
        };
        match recall {
            Recall::Sleep
                if seat.is_idle() && seat.count() == 0 && self.line.waiting.is_empty() =>
            {
                self.give_back(number);
                self.places[number] = Place::Asleep;
            }
            Recall::Sleep => self.ears[number].tell(Order::Kept),
            Recall::Successor => {
                seat.is_recalled = true;
                if seat.count() == 0 {
                    self.give_back(number);
                }
            }
            Recall::Ended => {
                // It says nothing more, whoever else may still hold its end.
                seat.has_ended = true;
                for _ in 0..LEFT {
                    if !seat.wire.receive(piece) {
                        break;
                    }
                }
                self.judge(number);
            }
        }
    }

    /// Tells `watch` which wires are to be watched differently: not at all, for reading, or for both. If it
    /// fails it is asked again next time. Then programs that go back do.
    pub fn settle(
        &mut self,
        mut watch: impl FnMut(usize, Option<(BorrowedFd<'_>, bool)>) -> io::Result<()>,
    ) {
        self.end_overdue();
        for (number, place) in self.places.iter().enumerate() {
            if let Place::Taken(seat) = place {
                self.line.show(number, seat);
            }
        }
        let places = &mut self.places;
        self.changed.retain(|&number| {
            let Place::Taken(seat) = &mut places[number] else {
                return false;
            };
            let writing = !seat.wire.has_sent_all();
            seat.is_watched_for_writing = writing;
            watch(number, Some((seat.wire.as_fd(), writing))).is_err()
        });
        for (number, order) in self.leaving.drain(..) {
            // First: nobody else is to hold the wire when its keeper lets go of it.
            let _ = watch(number, None);
            self.ears[number].tell(order);
        }
    }

    /// No program serves from now on: all go back; `settle` and `close` are to follow.
    pub fn send_home(&mut self) {
        // Whoever waits here was answered, or is answered by nobody any more.
        self.line.waiting.clear();
        self.ears.iter().for_each(|ear| ear.tell(Order::Rest));
        let runs = |place: &Place| matches!(place, Place::Taken(seat) if seat.count() > 0);
        for number in 0..self.places.len() {
            if runs(&self.places[number]) {
                self.end(number, Why::Leaving);
            } else {
                self.give_back(number);
            }
        }
    }

    /// Each keeper is to end its program, `grace` before and after SIGTERM.
    pub fn close(&self, grace: Millis) {
        for ear in &self.ears {
            ear.tell(Order::Close(grace));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "desk_tests.rs"]
mod tests;
