//! Decides when the writing thread uses the store: when it is maintained, and when it is left to another process.
//!
//! The store is maintained regularly, and when a waiting job expires, because only a pass of maintenance ends such a
//! job. Pure: the caller passes the time in milliseconds (CLOCK_MONOTONIC).

use std::ops::RangeInclusive;

use crate::jobs::policy::UnixMs;

/// The time between two passes of maintenance.
pub const MAINTENANCE_MS: u64 = 10_000;
/// The shortest time between two passes because of jobs that expire. Many such jobs must not take all the time of the
/// store.
const EXPIRY_MS: u64 = 1_000;
/// After a group, the store is left to other processes of the instance for as long as the group took, within these
/// limits. Otherwise a process with much work would always have the lock.
const SHARE_MS: RangeInclusive<u64> = 2..=10;

/// When the store is used.
#[derive(Debug, Default)]
pub struct WriterSchedule {
    /// The time of the next pass of maintenance. A store that was just opened is maintained at once.
    maintenance_ms: u64,
    /// The time of the last pass.
    maintained_ms: u64,
    /// Until then another process may use the store.
    share_until_ms: u64,
}

impl WriterSchedule {
    /// Returns when the store may be used next, if `is_idle` only for maintenance.
    pub fn next_ms(&self, is_idle: bool) -> u64 {
        let wanted_ms = if is_idle { self.maintenance_ms } else { 0 };
        wanted_ms.max(self.share_until_ms)
    }

    /// Returns whether this process may use the store now.
    pub fn may_write(&self, now_ms: u64) -> bool {
        now_ms >= self.share_until_ms
    }

    /// Leaves the store to another process, after a group that began and ended at these times.
    pub fn share(&mut self, begun_ms: u64, ended_ms: u64) {
        let took_ms = ended_ms.saturating_sub(begun_ms);
        self.share_until_ms = ended_ms + took_ms.clamp(*SHARE_MS.start(), *SHARE_MS.end());
    }

    /// Returns whether a pass of maintenance is due.
    pub fn is_maintenance_due(&self, now_ms: u64) -> bool {
        now_ms >= self.maintenance_ms
    }

    /// Records a pass that began at `now_ms`. `is_complete` says whether it has done all there was to do. If not, the
    /// next pass is due now.
    pub fn maintained(&mut self, now_ms: u64, is_complete: bool) {
        self.maintained_ms = now_ms;
        self.maintenance_ms = match is_complete {
            true => now_ms + MAINTENANCE_MS,
            false => now_ms,
        };
    }

    /// Makes a pass due when the next waiting job expires. `expiry` is that time by the clock of the store, `None` if
    /// no waiting job expires. `store_ms` is the present time by that clock.
    pub fn expires(&mut self, expiry: Option<UnixMs>, store_ms: UnixMs, now_ms: u64) {
        if let Some(expiry) = expiry {
            let at_ms = now_ms.saturating_add(expiry.saturating_sub(store_ms));
            let at_ms = at_ms.max(self.maintained_ms.saturating_add(EXPIRY_MS));
            self.maintenance_ms = self.maintenance_ms.min(at_ms);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_is_due_at_once_then_regularly_and_when_a_job_expires() {
        let mut plan = WriterSchedule::default();
        assert!(plan.is_maintenance_due(5));
        plan.maintained(5_000, false);
        assert!(plan.is_maintenance_due(5_000));
        plan.maintained(5_000, true);
        assert_eq!(plan.next_ms(true), 15_000);
        plan.expires(None, 70, 5_100);
        plan.expires(Some(100_000), 70, 5_100);
        assert_eq!(plan.next_ms(true), 15_000);
        plan.expires(Some(3_070), 70, 5_100);
        assert!(!plan.is_maintenance_due(8_099) && plan.is_maintenance_due(8_100));
        // A job that has expired already does not make passes follow each other without a pause.
        plan.expires(Some(10), 70, 5_100);
        assert_eq!(plan.next_ms(true), 6_000);
    }

    #[test]
    fn the_store_is_left_to_others_for_as_long_as_a_group_took() {
        let mut plan = WriterSchedule::default();
        assert_eq!((plan.may_write(0), plan.next_ms(false)), (true, 0));
        plan.share(1_000, 1_005);
        assert!(!plan.may_write(1_009) && plan.may_write(1_010));
        assert_eq!(plan.next_ms(false), 1_010);
        plan.share(2_000, 2_500);
        assert_eq!(plan.next_ms(false), 2_510);
        plan.share(3_000, 3_000);
        assert_eq!(plan.next_ms(false), 3_002);
    }
}
