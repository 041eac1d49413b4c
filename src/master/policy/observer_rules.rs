//! Decides when the observer is forked, replaced and ended.
//!
//! The observer is not a worker: it has no slot, its death leaves no death record, and neither a start nor a
//! reload waits for it. A new observer is forked before the old one exits, so no scrape is refused: both accept
//! from the same socket. If the fork fails, the old one serves until a later try succeeds. An observer is
//! killed if it does not exit within five seconds after the order, or if SIGSTOP stops it for that time.

use std::collections::{BTreeMap, BTreeSet};

use log::Level;
use nix::sys::signal::Signal;

use super::action::{Action, Incident, ObserverIncident};
use super::event::{Exit, Millis, PolicyLimits};
use crate::link::ids::Pid;
use crate::throttle::limiter::Limiter;
use crate::throttle::{Throttle, ThrottleLimits};

/// How long an observer may take to exit after the order, or may be stopped by SIGSTOP, before it gets SIGKILL.
const PATIENCE: Millis = 5_000;
/// The limit on log lines about observers: this number at once, then one per period.
const LINES: (u64, Millis) = (8, 6_000);

/// The observer that serves, or the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Current {
    /// There is no observer, because none is configured or the server stops.
    Unwanted,
    /// The next observer is forked at this time.
    Due(Millis),
    /// The fork was ordered and is not reported yet.
    Forking,
    Lives {
        pid: Pid,
        since: Millis,
        /// When it is killed; `Some` iff it is stopped.
        kill_at: Option<Millis>,
    },
}

#[derive(Debug)]
pub(crate) struct ObserverRules {
    current: Current,
    throttle: Throttle,
    limits: ThrottleLimits,
    /// The observers before the current one. They serve until the current one is forked.
    before: Vec<Pid>,
    /// Those of the program before an upgrade. An older version exits at once at SIGQUIT, and this one takes SIGTERM as
    /// an order when its link to the master has ended.
    inherited: BTreeSet<Pid>,
    /// The observers that were ordered to exit, and when each gets SIGKILL; `None` if it has already got SIGKILL.
    leaving: BTreeMap<Pid, Option<Millis>>,
    lines: Limiter,
}

impl ObserverRules {
    pub fn new() -> Self {
        ObserverRules {
            current: Current::Unwanted,
            throttle: Throttle::default(),
            limits: ThrottleLimits {
                burst: 0,
                max_delay: 0,
            },
            before: Vec::new(),
            inherited: BTreeSet::new(),
            leaving: BTreeMap::new(),
            lines: Limiter::new(LINES.0, LINES.1),
        }
    }

    /// Continues after an upgrade at `now`. The observers of the program before serve until the new one is
    /// forked.
    pub fn resume(&mut self, before: Vec<Pid>, limits: &PolicyLimits, now: Millis) {
        self.inherited = before.iter().copied().collect();
        self.before = before;
        self.limits = limits.throttle();
        if limits.has_observer {
            self.current = Current::Due(now);
        }
    }

    /// Replaces the observer, because a new generation serves.
    pub fn renew(&mut self, limits: &PolicyLimits, now: Millis) -> Vec<Action> {
        self.limits = limits.throttle();
        self.throttle = Throttle::default();
        if !limits.has_observer {
            return self.stop(now);
        }
        self.before.extend(self.pid());
        // A fork that is under way is done with the new configuration.
        match std::mem::replace(&mut self.current, Current::Forking) {
            Current::Forking => Vec::new(),
            _ => vec![Action::ForkObserver],
        }
    }

    /// Orders all observers to exit. No new one is forked.
    pub fn stop(&mut self, now: Millis) -> Vec<Action> {
        self.before.extend(self.pid());
        self.current = Current::Unwanted;
        self.order_exit(now)
    }

    /// Orders the observers before the current one to exit.
    fn order_exit(&mut self, now: Millis) -> Vec<Action> {
        let before = std::mem::take(&mut self.before);
        let order = |pid| {
            self.leaving.insert(pid, Some(now + PATIENCE));
            let signal = match self.inherited.remove(&pid) {
                true => Signal::SIGTERM,
                false => Signal::SIGQUIT,
            };
            Action::SignalObserver { pid, signal }
        };
        before.into_iter().map(order).collect()
    }

    /// Records that [`Action::ForkObserver`] has succeeded.
    pub fn forked(&mut self, pid: Pid, now: Millis) -> Vec<Action> {
        self.throttle.forked(now);
        if self.current != Current::Forking {
            // No observer is wanted any more: the server stops, or a reload has removed it.
            self.before.push(pid);
            return self.order_exit(now);
        }
        self.current = Current::Lives {
            pid,
            since: now,
            kill_at: None,
        };
        self.order_exit(now)
    }

    /// Records that [`Action::ForkObserver`] has failed.
    pub fn fork_failed(&mut self, reason: String, now: Millis) -> Vec<Action> {
        if self.current != Current::Forking {
            return Vec::new();
        }
        let due = self.throttle.record_refused_fork(now);
        self.current = Current::Due(due);
        let retry_in = due - now;
        let incident = ObserverIncident::ForkRefused { reason, retry_in };
        self.line(incident, now).into_iter().collect()
    }

    /// Handles the end of an observer. Its replacement is forked when the throttle allows it.
    pub fn died(&mut self, pid: Pid, how: Exit, now: Millis) -> Vec<Action> {
        self.before.retain(|other| *other != pid);
        self.inherited.remove(&pid);
        if self.leaving.remove(&pid).is_some() {
            return Vec::new();
        }
        let Current::Lives {
            pid: own, since, ..
        } = self.current
        else {
            return Vec::new();
        };
        if own != pid {
            return Vec::new();
        }
        let uptime = now - since;
        let due = self.throttle.death(Some(uptime), &self.limits, now);
        let retry_in = due - now;
        let incident = ObserverIncident::Died {
            pid,
            how,
            uptime,
            retry_in,
        };
        let mut actions: Vec<Action> = self.line(incident, now).into_iter().collect();
        self.current = Current::Due(due);
        actions.extend(self.fork_if_due(now));
        actions
    }

    /// Records whether the current observer is stopped (SIGSTOP).
    pub fn note_stopped(&mut self, pid: Pid, is_stopped: bool, now: Millis) {
        if let Current::Lives {
            pid: own, kill_at, ..
        } = &mut self.current
            && *own == pid
        {
            *kill_at = is_stopped.then(|| kill_at.unwrap_or(now + PATIENCE));
        }
    }

    pub fn pass_time(&mut self, now: Millis) -> Vec<Action> {
        let mut actions: Vec<Action> = self.fork_if_due(now).into_iter().collect();
        for (&pid, kill_at) in &mut self.leaving {
            if kill_at.is_some_and(|at| at <= now) {
                *kill_at = None;
                let signal = Signal::SIGKILL;
                actions.push(Action::SignalObserver { pid, signal });
            }
        }
        if let Current::Lives { pid, kill_at, .. } = &mut self.current
            && kill_at.is_some_and(|at| at <= now)
        {
            let pid = *pid;
            // Its death is reported once it is reaped.
            *kill_at = Some(now + PATIENCE);
            let signal = Signal::SIGKILL;
            actions.push(Action::SignalObserver { pid, signal });
            actions.extend(self.line(ObserverIncident::Stopped(pid), now));
        }
        actions
    }

    fn fork_if_due(&mut self, now: Millis) -> Option<Action> {
        match self.current {
            Current::Due(at) if at <= now => {
                self.current = Current::Forking;
                Some(Action::ForkObserver)
            }
            _ => None,
        }
    }

    /// Returns when `pass_time` is due next.
    pub fn deadline(&self) -> Option<Millis> {
        let current = match self.current {
            Current::Due(at) => Some(at),
            Current::Lives { kill_at, .. } => kill_at,
            Current::Unwanted | Current::Forking => None,
        };
        let leaving = self.leaving.values().copied();
        leaving.flatten().chain(current).min()
    }

    /// Returns the observer that serves.
    pub fn pid(&self) -> Option<Pid> {
        match self.current {
            Current::Lives { pid, .. } => Some(pid),
            _ => None,
        }
    }

    /// Returns all observers that were not reaped yet.
    pub fn pids(&self) -> impl Iterator<Item = Pid> {
        let before = self.before.iter().chain(self.leaving.keys());
        before.copied().chain(self.pid())
    }

    fn line(&mut self, incident: ObserverIncident, now: Millis) -> Option<Action> {
        let suppressed = self.lines.admit(now)?;
        Some(Action::Log {
            level: Level::Warn,
            incident: Incident::Observer(incident),
            suppressed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: PolicyLimits = PolicyLimits {
        has_observer: true,
        respawn_burst: 1,
        respawn_max_delay: 30_000,
        ..super::super::fleet_world::LIMITS
    };

    fn signalled(actions: &[Action], signal: Signal) -> Vec<Pid> {
        let is_sent = |action: &Action| match action {
            Action::SignalObserver { pid, signal: sent } if *sent == signal => Some(*pid),
            _ => None,
        };
        actions.iter().filter_map(is_sent).collect()
    }

    fn serving(pid: i32) -> ObserverRules {
        let mut rules = ObserverRules::new();
        assert_eq!(rules.renew(&LIMITS, 0), [Action::ForkObserver]);
        assert_eq!(rules.forked(Pid(pid), 0), []);
        rules
    }

    #[test]
    fn the_old_one_leaves_when_the_new_one_is_forked() {
        let mut rules = serving(10);
        assert_eq!(rules.renew(&LIMITS, 100), [Action::ForkObserver]);
        let actions = rules.fork_failed("EAGAIN".into(), 100);
        assert_eq!(signalled(&actions, Signal::SIGQUIT), []);
        let due = rules.deadline().unwrap_or_default();
        assert_eq!(rules.pass_time(due), [Action::ForkObserver]);
        let actions = rules.forked(Pid(11), due);
        assert_eq!(signalled(&actions, Signal::SIGQUIT), [Pid(10)]);
        assert_eq!(rules.deadline(), Some(due + PATIENCE));
        let actions = rules.pass_time(due + PATIENCE);
        assert_eq!(signalled(&actions, Signal::SIGKILL), [Pid(10)]);
        assert_eq!(rules.deadline(), None);
        assert_eq!(rules.died(Pid(10), Exit::Code(0), due + PATIENCE), []);
        assert_eq!(rules.pids().collect::<Vec<_>>(), [Pid(11)]);
    }

    #[test]
    fn one_that_dies_is_replaced_under_the_throttle() {
        let mut rules = serving(10);
        let actions = rules.died(Pid(10), Exit::Code(70), 5);
        assert!(actions.contains(&Action::ForkObserver));
        rules.forked(Pid(11), 5);
        let actions = rules.died(Pid(11), Exit::Code(70), 6);
        assert!(!actions.contains(&Action::ForkObserver));
        assert_eq!(rules.deadline(), Some(106));
        assert_eq!(rules.pass_time(106), [Action::ForkObserver]);
    }

    #[test]
    fn one_that_is_stopped_for_long_is_killed() {
        let mut rules = serving(10);
        rules.note_stopped(Pid(10), true, 1_000);
        rules.note_stopped(Pid(10), true, 3_000);
        assert_eq!(rules.deadline(), Some(1_000 + PATIENCE));
        rules.note_stopped(Pid(10), false, 4_000);
        assert_eq!(rules.deadline(), None);
        rules.note_stopped(Pid(10), true, 5_000);
        let actions = rules.pass_time(5_000 + PATIENCE);
        assert_eq!(signalled(&actions, Signal::SIGKILL), [Pid(10)]);
    }

    #[test]
    fn without_the_key_or_at_a_stop_it_leaves() {
        let mut rules = serving(10);
        let without = PolicyLimits {
            has_observer: false,
            ..LIMITS
        };
        let actions = rules.renew(&without, 7);
        assert_eq!(signalled(&actions, Signal::SIGQUIT), [Pid(10)]);
        assert_eq!(rules.stop(8), []);
        let mut rules = serving(10);
        rules.renew(&LIMITS, 7);
        let actions = rules.stop(8);
        assert_eq!(signalled(&actions, Signal::SIGQUIT), [Pid(10)]);
        // The fork that was under way is reported now.
        let actions = rules.forked(Pid(11), 9);
        assert_eq!(signalled(&actions, Signal::SIGQUIT), [Pid(11)]);
        assert_eq!(rules.pid(), None);
    }

    #[test]
    fn those_of_the_program_before_an_upgrade_serve_until_a_new_one_is_forked() {
        let mut rules = ObserverRules::new();
        rules.resume(vec![Pid(10)], &LIMITS, 50);
        assert_eq!(rules.pass_time(50), [Action::ForkObserver]);
        let actions = rules.forked(Pid(11), 51);
        assert_eq!(signalled(&actions, Signal::SIGTERM), [Pid(10)]);
    }
}
