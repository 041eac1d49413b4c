//! Tracks whether all programs of a pool have been ready once, because a pool process serves from then on. Also limits
//! the programs beyond `processes` to one.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::sys::lock::lock;
use crate::sys::waker::Waker;

/// The largest number of lines of programs that a failure quotes.
const MAX_LINES: usize = 20;

/// The progress of the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Some programs are not ready yet.
    Starting,
    /// All programs have been ready.
    Ready,
    /// A program cannot become ready, for this reason.
    Failed(String),
}

#[derive(Debug)]
pub(super) struct Boot {
    /// The number of programs that are not ready yet, and why one cannot become ready.
    state: Mutex<(usize, Option<String>)>,
    /// The last lines that the programs have written to standard error. `None` if a failure does not quote them,
    /// because the master gets the lines of the log anyway.
    said: Option<Mutex<VecDeque<String>>>,
    /// Woken when a program becomes ready or fails.
    waker: Arc<Waker>,
}

impl Boot {
    pub fn new(programs: usize, quotes: bool, waker: Arc<Waker>) -> Self {
        Boot {
            state: Mutex::new((programs, None)),
            said: quotes.then(Mutex::default),
            waker,
        }
    }

    pub fn record_ready(&self) {
        lock(&self.state).0 -= 1;
        self.waker.wake();
    }

    /// Keeps a line of a program.
    pub fn keep_line(&self, line: &str) {
        if let Some(said) = &self.said {
            let mut said = lock(said);
            if said.len() == MAX_LINES {
                said.pop_front();
            }
            said.push_back(line.to_owned());
        }
    }

    /// Records that a program cannot become ready. Only the first reason is kept, with the last lines of the programs.
    pub fn fail(&self, mut reason: String) {
        for line in self
            .said
            .iter()
            .flat_map(|said| std::mem::take(&mut *lock(said)))
        {
            reason += &format!("\n  it wrote: {line}");
        }
        let mut state = lock(&self.state);
        state.1.get_or_insert(reason);
        self.waker.wake();
    }

    pub fn stage(&self) -> Stage {
        let state = lock(&self.state);
        match &*state {
            (_, Some(reason)) => Stage::Failed(reason.clone()),
            (0, None) => Stage::Ready,
            _ => Stage::Starting,
        }
    }
}

/// The room for one program more than `processes`, which only one supervisor at a time may use.
#[derive(Debug, Default)]
pub(super) struct SpareRoom {
    /// Whether the room is taken, and the wakers of the supervisors that wait for it.
    state: Mutex<(bool, Vec<Arc<Waker>>)>,
}

impl SpareRoom {
    /// Takes the room. Returns false if it is taken already: then `waker` is woken once it is free.
    pub fn take(&self, waker: &Arc<Waker>) -> bool {
        let mut state = lock(&self.state);
        let is_free = !std::mem::replace(&mut state.0, true);
        if !is_free && !state.1.iter().any(|other| Arc::ptr_eq(other, waker)) {
            state.1.push(Arc::clone(waker));
        }
        is_free
    }

    /// Frees the room.
    pub fn release(&self) {
        let mut state = lock(&self.state);
        state.0 = false;
        for waker in state.1.drain(..) {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_quotes_the_last_lines() -> std::io::Result<()> {
        let boot = Boot::new(1, true, Arc::new(Waker::new()?));
        (0..30).for_each(|number| boot.keep_line(&format!("line {number}")));
        boot.fail("it has failed".into());
        boot.fail("again".into());
        let Stage::Failed(reason) = boot.stage() else {
            panic!("{boot:?}");
        };
        let lines: Vec<&str> = reason.lines().collect();
        assert_eq!(lines.len(), 1 + MAX_LINES);
        assert_eq!(lines[..2], ["it has failed", "  it wrote: line 10"]);
        Ok(())
    }
}
