//! Whether the programs of a worker's pools have all been ready once: before, it serves nobody.

use std::sync::{Arc, Mutex, PoisonError};

use crate::sys::waker::Waker;

/// How far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Some are not ready yet.
    Starting,
    /// All have been.
    Ready,
    /// One never will be, for this reason.
    Failed(String),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Boot {
    /// How many are not ready yet, and why one never will be.
    state: Mutex<(usize, Option<String>)>,
    /// Woken when one is, or will not be.
    waker: Arc<Waker>,
}

impl Boot {
    pub fn new(programs: usize, waker: Arc<Waker>) -> Self {
        Boot {
            state: Mutex::new((programs, None)),
            waker,
        }
    }

    pub fn one_is_ready(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 -= 1;
        self.waker.wake();
    }

    /// The first reason is the one that is told.
    pub fn fail(&self, reason: String) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.1.get_or_insert(reason);
        self.waker.wake();
    }

    pub fn stage(&self) -> Stage {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &*state {
            (_, Some(reason)) => Stage::Failed(reason.clone()),
            (0, None) => Stage::Ready,
            _ => Stage::Starting,
        }
    }
}
