//! Records which handler thread runs which call, for the status and for stuck threads.
//!
//! Each thread has one entry and writes only that. A reader may see the previous call or the current one.

use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering::Relaxed};

use nix::unistd::gettid;

use super::timers::CallKey;

/// The last call of each handler thread.
#[derive(Debug)]
pub struct ThreadCalls(Box<[ThreadCall]>);

#[derive(Debug, Default)]
struct ThreadCall {
    thread: AtomicI32,
    index: AtomicUsize,
    serial: AtomicU64,
}

impl ThreadCalls {
    /// Creates entries for `count` threads that have not started yet.
    pub fn new(count: usize) -> Self {
        ThreadCalls((0..count).map(|_| ThreadCall::default()).collect())
    }

    /// Records the thread id of the calling thread, which has this number.
    pub fn register(&self, number: usize) {
        self.0[number].thread.store(gettid().as_raw(), Relaxed);
    }

    /// Records that a thread has taken a call.
    pub fn set(&self, number: usize, key: CallKey) {
        self.0[number].index.store(key.index, Relaxed);
        self.0[number].serial.store(key.serial, Relaxed);
    }

    /// Returns the last call of each thread that has had one. A key that was read during a change belongs
    /// to no call.
    pub fn keys(&self) -> impl Iterator<Item = CallKey> {
        let key = |call: &ThreadCall| CallKey {
            index: call.index.load(Relaxed),
            serial: call.serial.load(Relaxed),
        };
        self.0.iter().map(key).filter(|key| key.serial > 0)
    }

    /// Returns the id of the thread that took this call last; 0 if there is none.
    pub fn thread_of(&self, serial: u64) -> i32 {
        let call = self.0.iter().find(|it| it.serial.load(Relaxed) == serial);
        call.map_or(0, |call| call.thread.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_found_on_its_thread() {
        let calls = ThreadCalls::new(2);
        calls.register(1);
        let key = CallKey {
            index: 3,
            serial: 7,
        };
        calls.set(1, key);
        assert_eq!(calls.thread_of(7), gettid().as_raw());
        assert_eq!(calls.thread_of(8), 0);
        assert_eq!(calls.keys().collect::<Vec<_>>(), [key]);
    }
}
