//! Decides how a worker drains and stops. Pure: it gets the time and the remaining work, and returns the
//! next step.
//!
//! - Draining, after a reload or a retirement: the worker accepts nothing new and hands its connections
//!   over when they become quiescent. If only short calls are in flight, it stops reading for a short
//!   time, so that the connection becomes quiescent. Longer calls do not delay later ones. After half of
//!   the time it reads from no connection, so that all become quiescent.
//! - Stopping: no further call begins, and a quiescent connection is closed at once.
//!
//! At the end of the time, in both cases, the remaining calls are answered with an error.

/// The time in milliseconds after a stop in which a client may finish a frame that it has begun.
const PARTIAL_MS: u64 = 1000;
/// The time between two checks for connections that are quiescent, or that take too long.
const LOOK_MS: u64 = 25;
/// At the deadline the master sends its order to drain again. That means the end. If an order comes more than this time
/// (in milliseconds) before the deadline, it is the first order, which was delayed.
const LATE_ORDER_MS: u64 = 1000;
/// The time that remains for a drain if the worker was paused until its time had passed. The master,
/// which was paused too, waits a little longer (`GRACE_AFTER_PAUSE` of its policy).
const GRACE_AFTER_PAUSE_MS: u64 = 800;
/// The time for sending the last answers at the end.
const FLUSH_MS: u64 = 150;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Mode {
    #[default]
    Serving,
    Draining,
    /// Draining, and nothing more is read from any connection.
    ReadsStopped,
    Stopping,
    /// The time has passed and all calls were given up.
    Flushing,
    Leaving,
}

/// The next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrainStep {
    /// Continue.
    Serve,
    /// Check again which connections must become quiescent before more is taken from them.
    ResumeReading,
    /// Take nothing more from any connection.
    StopReading,
    /// Close the quiescent connections.
    CloseQuiescent {
        /// Whether connections with an unfinished frame are closed too.
        partial: bool,
    },
    /// Answer every remaining call with `stopping`.
    GiveUp,
    /// Close all connections, but do not leave yet.
    CloseAll,
    Leave,
}

/// The state of a worker between serving and its exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drain {
    mode: Mode,
    started_ms: u64,
    stop_reading_ms: u64,
    until_ms: u64,
    next_look_ms: u64,
    /// The time is not extended any more: it was extended once, or the master ordered the end.
    is_final: bool,
    /// Until when it waits for attempts of jobs; 0: there are none.
    held_until_ms: u64,
    /// Whether the time for the last answers is over, so that only these attempts are awaited.
    has_flushed: bool,
}

impl Drain {
    /// Returns whether new connections are accepted.
    pub fn is_serving(&self) -> bool {
        self.mode == Mode::Serving
    }

    /// Returns whether quiescent connections go to the siblings.
    pub fn is_handing_off(&self) -> bool {
        matches!(self.mode, Mode::Draining | Mode::ReadsStopped)
    }

    /// Returns when the drain or stop is over.
    pub fn until_ms(&self) -> u64 {
        self.until_ms
    }

    /// Drains from `now_ms` until `until_ms`.
    pub fn drain(&mut self, now_ms: u64, until_ms: u64) {
        if self.mode == Mode::Serving {
            self.mode = Mode::Draining;
            self.next_look_ms = u64::MAX;
            self.stop_reading_ms = now_ms + until_ms.saturating_sub(now_ms) / 2;
            self.until_ms = until_ms;
        }
    }

    /// Schedules a check of a connection that is not read, because it may not become quiescent soon.
    pub fn look_again(&mut self, now_ms: u64) {
        self.next_look_ms = self.next_look_ms.min(now_ms + LOOK_MS);
    }

    /// Stops by `until_ms`, or by the end of an earlier drain if that is sooner.
    pub fn stop(&mut self, until_ms: u64) {
        match self.mode {
            Mode::Serving => self.until_ms = until_ms,
            Mode::Draining | Mode::ReadsStopped => self.until_ms = self.until_ms.min(until_ms),
            _ => return,
        }
        self.mode = Mode::Stopping;
        self.started_ms = 0;
        self.next_look_ms = 0;
    }

    /// Handles the master's order to end now: the remaining calls are answered with an error. If the order arrives much
    /// earlier than the end of the drain, it is ignored. It was sent to start the drain in progress.
    pub fn expire_now(&mut self, now_ms: u64) {
        // The remaining calls are already answered, and the answers are being sent.
        let is_flushing = self.mode == Mode::Flushing;
        if is_flushing || self.until_ms > now_ms + LATE_ORDER_MS {
            return;
        }
        self.until_ms = self.until_ms.min(now_ms);
        self.is_final = true;
    }

    /// Gives a worker that was paused time to hand over its connections. This is done only once, because a loop that is
    /// delayed again and again would never exit.
    pub fn extend_after_pause(&mut self, now_ms: u64) {
        let until_ms = now_ms + GRACE_AFTER_PAUSE_MS;
        if self.is_handing_off() && !self.is_final && self.until_ms < until_ms {
            self.until_ms = until_ms;
            self.is_final = true;
        }
    }

    /// Sets the time before which the worker does not exit; 0 means as soon as all calls are answered. Call it before
    /// each step.
    pub fn hold_until(&mut self, held_until_ms: u64) {
        self.held_until_ms = held_until_ms;
    }

    /// Exits without checking anything else.
    pub fn leave_now(&mut self) {
        self.mode = Mode::Leaving;
    }

    /// Returns how long the stop hooks may take; `None` if the worker must exit at once.
    pub fn stop_hook_budget_ms(&self, now_ms: u64) -> Option<u64> {
        let left = self.until_ms.saturating_sub(now_ms).max(FLUSH_MS);
        (!self.is_at_once()).then_some(left)
    }

    /// Returns whether it exits without doing anything that takes time.
    pub fn is_at_once(&self) -> bool {
        self.mode == Mode::Leaving
    }

    /// Returns when `step` must be called at the latest.
    pub fn next(&self) -> Option<u64> {
        match self.mode {
            Mode::Serving => None,
            Mode::Draining => Some(
                self.until_ms
                    .min(self.stop_reading_ms)
                    .min(self.next_look_ms),
            ),
            Mode::ReadsStopped => Some(self.until_ms),
            Mode::Flushing if self.has_flushed => Some(self.held_until_ms),
            Mode::Flushing => Some(self.until_ms),
            Mode::Stopping => Some(self.until_ms.min(self.next_look_ms)),
            Mode::Leaving => Some(0),
        }
    }

    /// Returns the next step at `now_ms`. `no_calls` says that no call is left, and `more` that not all events were
    /// handled. Call it after every turn of the loop.
    pub fn step(
        &mut self,
        now_ms: u64,
        connections: usize,
        no_calls: bool,
        more: bool,
    ) -> DrainStep {
        let is_held = now_ms < self.held_until_ms;
        let empty = connections == 0 && no_calls && !is_held;
        match self.mode {
            Mode::Serving => DrainStep::Serve,
            Mode::Leaving => DrainStep::Leave,
            Mode::Flushing if is_held => {
                self.has_flushed = now_ms >= self.until_ms;
                match self.has_flushed && connections > 0 {
                    true => DrainStep::CloseAll,
                    false => DrainStep::Serve,
                }
            }
            Mode::Flushing if empty || now_ms >= self.until_ms => DrainStep::Leave,
            Mode::Flushing => DrainStep::Serve,
            _ if empty => DrainStep::Leave,
            _ if now_ms >= self.until_ms => {
                self.mode = Mode::Flushing;
                self.until_ms = now_ms + FLUSH_MS;
                DrainStep::GiveUp
            }
            Mode::Draining if now_ms >= self.stop_reading_ms => {
                self.mode = Mode::ReadsStopped;
                DrainStep::StopReading
            }
            Mode::Draining if now_ms >= self.next_look_ms => {
                self.next_look_ms = u64::MAX;
                DrainStep::ResumeReading
            }
            Mode::Draining | Mode::ReadsStopped => DrainStep::Serve,
            Mode::Stopping if self.started_ms == 0 => {
                // Check once more first, so that calls which have already arrived are answered.
                self.started_ms = now_ms.max(1);
                self.next_look_ms = now_ms;
                DrainStep::Serve
            }
            Mode::Stopping if more => {
                self.next_look_ms = now_ms;
                DrainStep::Serve
            }
            Mode::Stopping if now_ms < self.next_look_ms => DrainStep::Serve,
            Mode::Stopping => {
                self.next_look_ms = now_ms + LOOK_MS;
                DrainStep::CloseQuiescent {
                    partial: now_ms >= self.started_ms + PARTIAL_MS,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_of_jobs_hold_the_exit_but_not_the_connections() {
        let mut drain = Drain::default();
        drain.drain(0, 1000);
        drain.hold_until(5000);
        assert_eq!(drain.step(400, 0, true, false), DrainStep::Serve);
        assert_eq!(drain.step(1000, 2, true, false), DrainStep::GiveUp);
        let flushed = 1000 + FLUSH_MS;
        assert_eq!(drain.step(flushed - 1, 2, true, false), DrainStep::Serve);
        assert_eq!(drain.next(), Some(flushed));
        assert_eq!(drain.step(flushed, 2, true, false), DrainStep::CloseAll);
        assert_eq!(drain.step(flushed, 0, true, false), DrainStep::Serve);
        assert_eq!(drain.next(), Some(5000));
        // The last attempt is settled.
        drain.hold_until(0);
        assert_eq!(drain.step(2000, 0, true, false), DrainStep::Leave);
    }

    #[test]
    fn draining_serves_until_the_last_connection_ends_or_the_time_has_passed() {
        let mut drain = Drain::default();
        assert_eq!(drain.step(0, 5, false, false), DrainStep::Serve);
        drain.drain(0, 1000);
        assert!(!drain.is_serving());
        assert_eq!(drain.next(), Some(500));
        drain.look_again(100);
        drain.look_again(110);
        assert_eq!(drain.next(), Some(100 + LOOK_MS));
        assert_eq!(drain.step(99 + LOOK_MS, 1, true, false), DrainStep::Serve);
        assert_eq!(
            drain.step(100 + LOOK_MS, 1, true, false),
            DrainStep::ResumeReading
        );
        assert_eq!(drain.step(499, 1, true, false), DrainStep::Serve);
        assert_eq!(drain.step(500, 1, true, false), DrainStep::StopReading);
        assert_eq!(drain.step(999, 1, true, false), DrainStep::Serve);
        assert_eq!(drain.step(999, 0, true, false), DrainStep::Leave);
        assert_eq!(drain.stop_hook_budget_ms(400), Some(600));
        assert_eq!(drain.step(1000, 1, true, false), DrainStep::GiveUp);
        assert_eq!(drain.step(1001, 1, true, false), DrainStep::Serve);
        drain.expire_now(1001);
        assert_eq!(drain.step(1001, 1, true, false), DrainStep::Serve);
        assert_eq!(
            drain.step(1000 + FLUSH_MS, 1, true, false),
            DrainStep::Leave
        );
    }

    #[test]
    fn stopping_checks_once_more_before_it_closes_quiescent_connections() {
        let mut drain = Drain::default();
        drain.stop(5000);
        assert_eq!(drain.step(10, 2, false, false), DrainStep::Serve);
        assert_eq!(drain.next(), Some(10));
        // More has arrived than one turn can handle, so no connection is closed yet.
        assert_eq!(drain.step(10, 2, false, true), DrainStep::Serve);
        assert_eq!(
            drain.step(10, 2, false, false),
            DrainStep::CloseQuiescent { partial: false }
        );
        assert_eq!(
            drain.step(1010, 1, false, false),
            DrainStep::CloseQuiescent { partial: true }
        );
        assert_eq!(drain.step(5000, 1, false, false), DrainStep::GiveUp);
        assert_eq!(drain.stop_hook_budget_ms(5001), Some(FLUSH_MS));
        assert_eq!(drain.step(5001, 0, true, false), DrainStep::Leave);
    }

    #[test]
    fn an_order_to_end_now_ends_a_drain_only_near_its_end() {
        let mut drain = Drain::default();
        drain.drain(0, 8000);
        drain.expire_now(10);
        assert_eq!(drain.step(10, 1, false, false), DrainStep::Serve);
        drain.expire_now(7500);
        assert_eq!(drain.step(7500, 1, false, false), DrainStep::GiveUp);
    }

    #[test]
    fn a_worker_paused_beyond_its_drain_gets_time_to_hand_over_unless_ordered_to_end() {
        let mut drain = Drain::default();
        drain.drain(0, 1000);
        let mut hurried = drain;
        drain.extend_after_pause(5000);
        assert_eq!(drain.step(5000, 1, false, false), DrainStep::StopReading);
        assert_eq!(drain.step(5001, 1, false, false), DrainStep::Serve);
        let end = 5000 + GRACE_AFTER_PAUSE_MS;
        assert_eq!(drain.step(end, 1, false, false), DrainStep::GiveUp);
        drain.extend_after_pause(end);
        assert_eq!(
            drain.step(end + FLUSH_MS, 1, false, false),
            DrainStep::Leave
        );
        hurried.expire_now(5000);
        hurried.extend_after_pause(5000);
        assert_eq!(hurried.step(5000, 1, false, false), DrainStep::GiveUp);
    }

    #[test]
    fn a_stop_never_prolongs_a_drain_and_an_exit_is_final() {
        let mut drain = Drain::default();
        drain.drain(0, 1000);
        drain.stop(9000);
        assert_eq!(drain.step(1000, 1, false, false), DrainStep::GiveUp);
        assert_eq!(drain.stop_hook_budget_ms(1000), Some(FLUSH_MS));
        drain.leave_now();
        assert_eq!(drain.stop_hook_budget_ms(500), None);
        assert_eq!(drain.step(1000, 1, false, false), DrainStep::Leave);
        drain.stop(1);
        assert_eq!(drain.step(1000, 1, false, false), DrainStep::Leave);
    }
}
