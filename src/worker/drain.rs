//! How a worker leaves: pure, it is told the time and what is left, and says what to do.
//!
//! Draining, after a reload or a retirement: nothing new is accepted, the connections it has are
//! handed over as they come to rest. What runs briefly lets its connection rest before more is taken
//! from it, what takes longer holds nobody up; after half of the time none is read any more, so that
//! all come to rest.
//! Stopping: no further call begins, a connection is closed as soon as it rests. Both end with answers
//! for whoever still waits.

/// After a stop, how long a client may take to finish a frame that it has begun.
const PARTIAL_MS: u64 = 1000;
/// Between two looks for connections that have come to rest, or that take too long to.
const LOOK_MS: u64 = 25;
/// The master's last word comes when it takes the time to be over; the order may have come so much
/// later than it was given.
const LAST_WORD_MS: u64 = 1000;
/// What a worker has left to drain in when it was paused until its time was over; the master, paused
/// with it, waits a little longer (`GRACE_AFTER_PAUSE`).
const GRACE_AFTER_PAUSE_MS: u64 = 800;
/// At the end, how long the last answers may take to leave.
const FLUSH_MS: u64 = 150;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Mode {
    #[default]
    Serving,
    Draining,
    /// Draining, and nothing more is taken from any connection.
    Quiet,
    Stopping,
    /// The time is over and all was given up.
    Flushing,
    Leaving,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrainStep {
    /// Go on.
    Serve,
    /// Look again which connections are to come to rest before more is taken from them.
    ReadOn,
    /// Take nothing more from any connection.
    Quieten,
    /// Close the connections that rest; `partial`: also those in the middle of a frame.
    CloseResting {
        /// Whether an unfinished frame is no reason to wait any more.
        partial: bool,
    },
    /// Answer every call that is left with `stopping`.
    GiveUp,
    /// End the process.
    Leave,
}

/// Where a worker stands between serving and leaving.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drain {
    mode: Mode,
    started_ms: u64,
    quiet_ms: u64,
    until_ms: u64,
    next_look_ms: u64,
    /// No time is added any more: some was, or the master has said its last word.
    is_final: bool,
}

impl Drain {
    /// Whether new connections are accepted.
    pub fn is_serving(&self) -> bool {
        self.mode == Mode::Serving
    }

    /// Whether connections that rest go to the siblings.
    pub fn is_handing_off(&self) -> bool {
        matches!(self.mode, Mode::Draining | Mode::Quiet)
    }

    /// Serves what there is, from `now_ms` until `until_ms`.
    pub fn drain(&mut self, now_ms: u64, until_ms: u64) {
        if self.mode == Mode::Serving {
            self.mode = Mode::Draining;
            self.next_look_ms = u64::MAX;
            self.quiet_ms = now_ms + until_ms.saturating_sub(now_ms) / 2;
            self.until_ms = until_ms;
        }
    }

    /// A connection is read no further, so that it comes to rest, and is to be looked at again should it
    /// take too long to.
    pub fn look_again(&mut self, now_ms: u64) {
        self.next_look_ms = self.next_look_ms.min(now_ms + LOOK_MS);
    }

    /// Ends what there is by `until_ms`, or by what an earlier drain has said if that is sooner.
    pub fn stop(&mut self, until_ms: u64) {
        match self.mode {
            Mode::Serving => self.until_ms = until_ms,
            Mode::Draining | Mode::Quiet => self.until_ms = self.until_ms.min(until_ms),
            _ => return,
        }
        self.mode = Mode::Stopping;
        self.started_ms = 0;
        self.next_look_ms = 0;
    }

    /// The master's last word, when the time is over: whoever waits is told, and that is all. One
    /// that comes far earlier asks for what is under way already, and may have crossed the order.
    pub fn expire_now(&mut self, now_ms: u64) {
        // Whoever waits is told already, and what they are told is on its way.
        let told = self.mode == Mode::Flushing;
        if told || self.until_ms > now_ms + LAST_WORD_MS {
            return;
        }
        self.until_ms = self.until_ms.min(now_ms);
        self.is_final = true;
    }

    /// The worker was paused and goes on: what it could not hand over meanwhile it still may. Once, as a
    /// loop that is held up again and again would never leave.
    pub fn extend_after_pause(&mut self, now_ms: u64) {
        let until_ms = now_ms + GRACE_AFTER_PAUSE_MS;
        if self.is_handing_off() && !self.is_final && self.until_ms < until_ms {
            self.until_ms = until_ms;
            self.is_final = true;
        }
    }

    /// Leaves without another look at anything.
    pub fn leave_now(&mut self) {
        self.mode = Mode::Leaving;
    }

    /// How long the program's own words at the end may take; `None` where all is to end at once.
    pub fn stop_hook_budget_ms(&self, now_ms: u64) -> Option<u64> {
        let left = self.until_ms.saturating_sub(now_ms).max(FLUSH_MS);
        (!self.is_at_once()).then_some(left)
    }

    /// Whether it leaves without doing anything more that takes time.
    pub fn is_at_once(&self) -> bool {
        self.mode == Mode::Leaving
    }

    /// When `step` wants to be asked at the latest.
    pub fn next(&self) -> Option<u64> {
        match self.mode {
            Mode::Serving => None,
            Mode::Draining => Some(self.until_ms.min(self.quiet_ms).min(self.next_look_ms)),
            Mode::Quiet | Mode::Flushing => Some(self.until_ms),
            Mode::Stopping => Some(self.until_ms.min(self.next_look_ms)),
            Mode::Leaving => Some(0),
        }
    }

    /// What to do at `now_ms`, with so many connections and whether no call is left. To be asked
    /// after every turn of the loop; `more` tells that not all that had arrived was looked at.
    pub fn step(
        &mut self,
        now_ms: u64,
        connections: usize,
        no_calls: bool,
        more: bool,
    ) -> DrainStep {
        let empty = connections == 0 && no_calls;
        match self.mode {
            Mode::Serving => DrainStep::Serve,
            Mode::Leaving => DrainStep::Leave,
            Mode::Flushing if empty || now_ms >= self.until_ms => DrainStep::Leave,
            Mode::Flushing => DrainStep::Serve,
            _ if empty => DrainStep::Leave,
            _ if now_ms >= self.until_ms => {
                self.mode = Mode::Flushing;
                self.until_ms = now_ms + FLUSH_MS;
                DrainStep::GiveUp
            }
            Mode::Draining if now_ms >= self.quiet_ms => {
                self.mode = Mode::Quiet;
                DrainStep::Quieten
            }
            Mode::Draining if now_ms >= self.next_look_ms => {
                self.next_look_ms = u64::MAX;
                DrainStep::ReadOn
            }
            Mode::Draining | Mode::Quiet => DrainStep::Serve,
            Mode::Stopping if self.started_ms == 0 => {
                // One more look first, so that calls which have arrived by now are answered.
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
                DrainStep::CloseResting {
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
    fn draining_serves_until_the_last_connection_ends_or_time_is_over() {
        let mut drain = Drain::default();
        assert_eq!(drain.step(0, 5, false, false), DrainStep::Serve);
        drain.drain(0, 1000);
        assert!(!drain.is_serving());
        assert_eq!(drain.next(), Some(500));
        drain.look_again(100);
        drain.look_again(110);
        assert_eq!(drain.next(), Some(100 + LOOK_MS));
        assert_eq!(drain.step(99 + LOOK_MS, 1, true, false), DrainStep::Serve);
        assert_eq!(drain.step(100 + LOOK_MS, 1, true, false), DrainStep::ReadOn);
        assert_eq!(drain.step(499, 1, true, false), DrainStep::Serve);
        assert_eq!(drain.step(500, 1, true, false), DrainStep::Quieten);
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
    fn stopping_looks_once_more_before_it_closes_what_rests() {
        let mut drain = Drain::default();
        drain.stop(5000);
        assert_eq!(drain.step(10, 2, false, false), DrainStep::Serve);
        assert_eq!(drain.next(), Some(10));
        // more than one turn can take has arrived: nobody is closed unheard
        assert_eq!(drain.step(10, 2, false, true), DrainStep::Serve);
        assert_eq!(
            drain.step(10, 2, false, false),
            DrainStep::CloseResting { partial: false }
        );
        assert_eq!(
            drain.step(1010, 1, false, false),
            DrainStep::CloseResting { partial: true }
        );
        assert_eq!(drain.step(5000, 1, false, false), DrainStep::GiveUp);
        assert_eq!(drain.stop_hook_budget_ms(5001), Some(FLUSH_MS));
        assert_eq!(drain.step(5001, 0, true, false), DrainStep::Leave);
    }

    #[test]
    fn a_last_word_ends_a_drain_only_when_its_time_is_about_over() {
        let mut drain = Drain::default();
        drain.drain(0, 8000);
        drain.expire_now(10);
        assert_eq!(drain.step(10, 1, false, false), DrainStep::Serve);
        drain.expire_now(7500);
        assert_eq!(drain.step(7500, 1, false, false), DrainStep::GiveUp);
    }

    #[test]
    fn who_was_paused_beyond_the_drain_has_a_moment_to_hand_over_unless_the_master_hurries() {
        let mut drain = Drain::default();
        drain.drain(0, 1000);
        let mut hurried = drain;
        drain.extend_after_pause(5000);
        assert_eq!(drain.step(5000, 1, false, false), DrainStep::Quieten);
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
    fn a_stop_never_prolongs_a_drain_and_leaving_is_final() {
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
