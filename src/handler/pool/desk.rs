//! Where a pool's calls meet its programs: what the loop puts in is written to whichever program is
//! free, and what comes back is an answer, or the end of that program.
//!
//! The loop's alone. It starts and ends nothing: a program comes from its `keeper` with its wire, and
//! goes back there for its end. The loop keeps the queue short (`worker::calls` decides what goes
//! first); a call is never bound to a program before it is written to it, and wakes a program that
//! is ready and idle before one that sleeps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;

use super::life::millis;
use super::seat::{Entry, Line, Seat};
use super::wire::LEFT;
use crate::handler::job::{Done, Job};
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::monotonic;
use crate::sys::waker::Waker;
use crate::throttle::Millis;

/// Why a program goes back to its keeper.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// It was asked for, and has nothing to do.
    Recalled,
    /// It has died, or has closed its descriptor 3, which comes to the same.
    Died,
    /// What it has sent is no answer.
    Broken(String),
    /// The loop can't watch its wire.
    Unwatched(String),
    /// Nobody waits for what it does.
    GivenUp,
    /// The worker leaves.
    Leaving,
}

/// What a keeper hears from the desk.
#[derive(Debug)]
pub(super) enum Order {
    /// Its program is its own again.
    Back(Box<Seat>, Why),
    /// Its program was not given back: it has something to do.
    Kept,
    /// Its program sleeps, and is wanted.
    Start,
    /// No program serves any more; how long its own may take to leave, and once more so long after
    /// SIGTERM.
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
    Again(Job),
}

/// What a keeper's program is up to, as far as calls go.
#[derive(Debug)]
pub(super) enum Place {
    /// It starts or ends, or was woken.
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

/// See the module.
#[derive(Debug)]
pub(super) struct Desk {
    line: Line,
    places: Vec<Place>,
    ears: Vec<Ear>,
    /// Programs that go back, once nobody watches their wires any more.
    leaving: Vec<(usize, Box<Seat>, Why)>,
    /// Places whose wires are to be watched, or in another way than before.
    changed: Vec<usize>,
}

impl Desk {
    pub fn new(line: Line, ears: Vec<Ear>) -> Self {
        Desk {
            line,
            places: ears.iter().map(|_| Place::Empty).collect(),
            ears,
            leaving: Vec::new(),
            changed: Vec::new(),
        }
    }

    pub fn count(&self) -> usize {
        self.places.len()
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
    pub fn put(&mut self, job: Job) {
        self.line.waiting.push_back(Entry::new(job, false));
        self.serve();
    }

    /// Lets a call that waits begin, or sees to it that one can.
    fn serve(&mut self) {
        while !self.line.waiting.is_empty() {
            let idle = |place: &Place| matches!(place, Place::Taken(seat) if seat.is_idle());
            let Some(number) = self.places.iter().position(idle) else {
                break;
            };
            self.give_out(number);
        }
        if self.line.waiting.is_empty() {
            return;
        }
        let asleep = |place: &Place| matches!(place, Place::Asleep);
        if let Some(number) = self.places.iter().position(asleep) {
            self.places[number] = Place::Empty;
            self.ears[number].tell(Order::Start);
        }
        self.refuse();
    }

    /// Answers for programs that are all down.
    fn refuse(&mut self) {
        let down = |place: &Place| match place {
            Place::Down(reason, due) => Some((*due, reason.clone())),
            _ => None,
        };
        let downs: Option<Vec<_>> = self.places.iter().map(down).collect();
        let Some((due, reason)) = downs.and_then(|downs| downs.into_iter().min()) else {
            return;
        };
        let wait = Duration::from_millis(due.saturating_sub(millis(monotonic())));
        for entry in self.line.waiting.drain(..) {
            let outcome = entry.job.state.begin().then(|| {
                let text = format!("{reason}; the next is started in {wait:?}");
                Err(RpcError::of(Code::Crashed, text, false))
            });
            self.line.done.push(entry.done(outcome, None));
        }
    }

    fn give_out(&mut self, number: usize) {
        if let Some(Place::Taken(seat)) = self.places.get_mut(number) {
            seat.give_out(&mut self.line);
            if !seat.wire.has_sent_all() {
                self.changed.push(number);
            }
        }
    }

    /// A program's wire can be read or written.
    pub fn attend(&mut self, number: usize, piece: &mut [u8]) {
        let Some(Place::Taken(seat)) = self.places.get_mut(number) else {
            return;
        };
        if !seat.wire.has_sent_all() {
            seat.wire.flush();
            if seat.wire.has_sent_all() {
                self.changed.push(number);
            }
        }
        seat.wire.receive(piece);
        self.judge(number, piece);
    }

    /// Says what follows from what a program has sent.
    fn judge(&mut self, number: usize, piece: &mut [u8]) {
        let Some(Place::Taken(seat)) = self.places.get_mut(number) else {
            return;
        };
        let why = loop {
            if let Err(problem) = seat.take_answers(&mut self.line) {
                break Some(Why::Broken(problem));
            }
            if !seat.wire.is_closed {
                break None;
            }
            // All that it has sent by then counts.
            if !seat.wire.receive(piece) {
                break Some(Why::Died);
            }
        };
        if let Some(why) = why {
            return self.give_back(number, why);
        }
        if seat.has_had_enough() {
            self.ears[number].waker.wake();
        }
        if !seat.wire.has_sent_all() {
            self.changed.push(number);
        }
        if seat.is_recalled && seat.running.is_none() {
            self.give_back(number, Why::Recalled);
        }
    }

    /// Ends the programs whose calls were given up.
    pub fn end_what_runs_in_vain(&mut self) {
        for number in 0..self.places.len() {
            if matches!(&self.places[number], Place::Taken(seat) if seat.runs_in_vain()) {
                self.give_back(number, Why::GivenUp);
            }
        }
    }

    fn give_back(&mut self, number: usize, why: Why) {
        let place = std::mem::replace(&mut self.places[number], Place::Empty);
        match place {
            Place::Taken(seat) => self.leaving.push((number, seat, why)),
            other => self.places[number] = other,
        }
        // A call that found this one to be there may need another.
        self.serve();
    }

    /// Hears what a keeper has to say.
    pub fn hear(&mut self, number: usize, word: Word, piece: &mut [u8]) {
        match word {
            Word::Ready(seat) => {
                self.places[number] = Place::Taken(seat);
                self.changed.push(number);
                self.give_out(number);
                // It may have said something already.
                self.judge(number, piece);
            }
            Word::Recall(recall) => self.recall(number, recall, piece),
            Word::Starts => self.places[number] = Place::Empty,
            Word::Down(reason, due) => {
                self.places[number] = Place::Down(reason, due);
                self.serve();
            }
            Word::Again(job) => {
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
            Recall::Sleep if seat.is_idle() && self.line.waiting.is_empty() => {
                self.give_back(number, Why::Recalled);
                self.places[number] = Place::Asleep;
            }
            Recall::Sleep => self.ears[number].tell(Order::Kept),
            Recall::Successor => {
                seat.is_recalled = true;
                if seat.running.is_none() {
                    self.give_back(number, Why::Recalled);
                }
            }
            Recall::Ended => {
                // It says nothing more, whoever else may still hold its end.
                for _ in 0..LEFT {
                    if !seat.wire.receive(piece) {
                        break;
                    }
                }
                seat.wire.is_closed = true;
                self.judge(number, piece);
            }
        }
    }

    /// The wires that are to be watched otherwise: `watch` is told of each place whether there is a
    /// wire to be watched, and whether for writing, too. It may fail, which ends the program. Then
    /// those that go back do.
    pub fn settle(
        &mut self,
        mut watch: impl FnMut(usize, Option<(BorrowedFd<'_>, bool)>) -> io::Result<()>,
    ) {
        while let Some(number) = self.changed.pop() {
            if let Place::Taken(seat) = &self.places[number]
                && let Err(error) =
                    watch(number, Some((seat.wire.as_fd(), !seat.wire.has_sent_all())))
            {
                self.give_back(number, Why::Unwatched(error.to_string()));
            }
        }
        for (number, seat, why) in self.leaving.drain(..) {
            // First: nobody else is to hold the wire when its keeper lets go of it.
            let _ = watch(number, None);
            self.ears[number].tell(Order::Back(seat, why));
        }
    }

    /// No program serves from now on: all go back; `settle` and `close` are to follow.
    pub fn send_home(&mut self) {
        for number in 0..self.places.len() {
            let runs =
                |place: &Place| matches!(place, Place::Taken(seat) if seat.running.is_some());
            let why = if runs(&self.places[number]) {
                Why::Leaving
            } else {
                Why::Recalled
            };
            self.give_back(number, why);
        }
    }

    /// Each keeper is to end its program, `grace` before and after SIGTERM.
    pub fn close(&self, grace: Millis) {
        for ear in &self.ears {
            ear.tell(Order::Close(grace));
        }
    }
}
