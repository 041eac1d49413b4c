//! Queues requests for a reload until it can begin. One reload answers all requests that came before it began.
//!
//! Pure. `C` identifies a client that waits for the result.

use std::mem;

#[derive(Debug)]
pub struct ReloadQueue<C> {
    /// Whether a reload was requested and has not begun.
    is_requested: bool,
    /// Whether it was logged that the reload waits for old generations.
    wait_logged: bool,
    /// The clients that wait for the next reload.
    queued: Vec<C>,
    /// The clients that wait for the reload under way.
    waiting: Vec<C>,
}

impl<C> ReloadQueue<C> {
    /// Creates a queue with the requests that the program before an upgrade has passed on.
    pub fn new(is_requested: bool, queued: Vec<C>) -> Self {
        ReloadQueue {
            is_requested,
            wait_logged: false,
            queued,
            waiting: Vec::new(),
        }
    }

    /// Requests a reload. `client` waits for its result.
    pub fn request(&mut self, client: Option<C>) {
        self.is_requested = true;
        self.queued.extend(client);
    }

    pub fn is_requested(&self) -> bool {
        self.is_requested
    }

    /// Returns the clients that wait for the next reload.
    pub fn queued(&self) -> &[C] {
        &self.queued
    }

    /// Returns whether to log that the next reload waits. Returns true once for each reload.
    pub fn should_log_wait(&mut self) -> bool {
        !mem::replace(&mut self.wait_logged, true)
    }

    /// Begins the reload.
    pub fn begin(&mut self) {
        self.is_requested = false;
        self.wait_logged = false;
        self.waiting = mem::take(&mut self.queued);
    }

    /// Ends the reload. Returns the clients that wait for its result.
    pub fn end(&mut self) -> Vec<C> {
        mem::take(&mut self.waiting)
    }

    /// Lets the clients of the reload under way wait for the next reload, which another program may carry out.
    pub fn requeue(&mut self) {
        self.queued.append(&mut self.waiting);
    }

    /// Cancels the reload that has not begun. Returns whether there was one, and the clients that wait for
    /// it.
    pub fn cancel(&mut self) -> (bool, Vec<C>) {
        let was_requested = mem::take(&mut self.is_requested);
        (was_requested, mem::take(&mut self.queued))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_of_a_burst_are_one_and_later_ones_wait_for_the_next() {
        let mut queue = ReloadQueue::new(false, vec![]);
        assert!(!queue.is_requested());
        queue.request(None);
        queue.request(Some('a'));
        queue.request(Some('b'));
        assert_eq!(
            [queue.should_log_wait(), queue.should_log_wait()],
            [true, false]
        );
        queue.begin();
        assert!(!queue.is_requested() && queue.should_log_wait());
        queue.request(Some('c'));
        assert_eq!(queue.end(), ['a', 'b']);
        assert_eq!(queue.queued(), ['c']);
        assert_eq!(queue.cancel(), (true, vec!['c']));
        assert_eq!(queue.cancel(), (false, vec![]));
    }

    #[test]
    fn clients_of_a_reload_wait_for_the_next_one_if_another_program_carries_it_out() {
        let mut queue = ReloadQueue::new(true, vec!['a']);
        queue.begin();
        queue.request(Some('b'));
        queue.requeue();
        assert_eq!(queue.queued(), ['b', 'a']);
        assert!(queue.end().is_empty());
    }
}
