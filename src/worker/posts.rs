//! Which thread runs which call: for the day when one does not come back.
//!
//! One post a thread, written by it alone; a reader may see the call before or after.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};

use nix::unistd::gettid;

/// Where the handler threads stand.
#[derive(Debug)]
pub struct Posts(Box<[Post]>);

#[derive(Debug, Default)]
struct Post {
    thread: AtomicI32,
    serial: AtomicU64,
}

impl Posts {
    /// Posts for `count` threads, nobody there yet.
    pub fn new(count: usize) -> Self {
        Posts((0..count).map(|_| Post::default()).collect())
    }

    /// The calling thread is this one.
    pub fn arrive(&self, number: usize) {
        self.0[number].thread.store(gettid().as_raw(), Relaxed);
    }

    /// It takes on the call with this serial number.
    pub fn take_on(&self, number: usize, serial: u64) {
        self.0[number].serial.store(serial, Relaxed);
    }

    /// The thread that took on a call last; 0 if none did.
    pub fn thread_of(&self, serial: u64) -> i32 {
        let post = self
            .0
            .iter()
            .find(|post| post.serial.load(Relaxed) == serial);
        post.map_or(0, |post| post.thread.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_found_on_its_thread() {
        let posts = Posts::new(2);
        posts.arrive(1);
        posts.take_on(1, 7);
        assert_eq!(posts.thread_of(7), gettid().as_raw());
        assert_eq!(posts.thread_of(8), 0);
    }
}
