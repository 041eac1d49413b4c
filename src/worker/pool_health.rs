//! Finds out whether a pool with `health = true` has had no ready program for its `boot-timeout`.
//!
//! Pool processes write in their scoreboard records when a program was ready last. While there is no pool process,
//! the last time that was read counts. So the records are read at each tick. Nothing here fails.

use std::sync::atomic::Ordering::Relaxed;

use super::peer::used;
use crate::config::Settings;
use crate::handler::registry::Registry;
use crate::link::ids::Generation;
use crate::link::scoreboard::WorkerRecord;

/// The pools that health checks are about.
#[derive(Debug, Default)]
pub struct WatchedPools {
    records: &'static [WorkerRecord],
    /// The generation of this worker as records show it.
    generation: u32,
    pools: Vec<WatchedPool>,
}

#[derive(Debug)]
struct WatchedPool {
    /// The number of its call queue.
    lane: usize,
    /// Whether its process is of an earlier generation.
    is_kept: bool,
    /// The longest time without a ready program, in milliseconds.
    limit_ms: u64,
    /// When a program was ready last, as far as is known.
    ready_ms: u64,
}

impl WatchedPools {
    /// Creates the list of the pools of a worker with `health = true`. `kept` has the call queues of the
    /// pools whose processes are of an earlier generation.
    pub fn new(
        (settings, registry): (&Settings, &Registry),
        (records, generation): (&'static [WorkerRecord], Generation),
        kept: &[usize],
        now_ms: u64,
    ) -> Self {
        let watched = |(number, pool): (usize, &str)| {
            let limit_ms = settings.pools.get(pool)?.health_limit_ms()?;
            Some(WatchedPool {
                lane: number + 1,
                is_kept: kept.contains(&(number + 1)),
                limit_ms,
                ready_ms: now_ms,
            })
        };
        let names = registry.pools().iter().map(|pool| pool.name());
        WatchedPools {
            records,
            generation: generation.0 + 1,
            pools: names.enumerate().filter_map(watched).collect(),
        }
    }

    /// Reads the records. Call it at each tick.
    pub fn update(&mut self) {
        for pool in &mut self.pools {
            let serves = |record: &WorkerRecord| {
                record.lane.load(Relaxed) as usize == pool.lane
                    && (pool.is_kept || record.generation.load(Relaxed) == self.generation)
            };
            let records = used(self.records).map(|(_, record)| record);
            let ready = records.filter(|record| serves(record));
            let last = ready.map(|record| record.pool_ready_ms.load(Relaxed)).max();
            pool.ready_ms = pool.ready_ms.max(last.unwrap_or_default());
        }
    }

    /// Returns whether a pool has been without a ready program for too long.
    pub fn is_down(&mut self, now_ms: u64) -> bool {
        self.update();
        let mut pools = self.pools.iter();
        pools.any(|pool| now_ms.saturating_sub(pool.ready_ms) > pool.limit_ms)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::link::scoreboard::Scoreboard;

    #[test]
    fn a_pool_is_down_when_no_program_was_ready_for_too_long() {
        let board = Scoreboard::new().unwrap();
        let mut watched = WatchedPools {
            records: board.records(),
            generation: 3,
            pools: vec![WatchedPool {
                lane: 2,
                is_kept: false,
                limit_ms: 100,
                ready_ms: 1_000,
            }],
        };
        assert!(!watched.is_down(1_100) && watched.is_down(1_101));
        let record = board.record(5);
        for (field, value) in [(&record.lane, 2), (&record.generation, 2)] {
            field.store(value, Relaxed);
        }
        record.pool_ready_ms.store(5_000, Relaxed);
        assert!(watched.is_down(5_001), "it serves another generation");
        record.generation.store(3, Relaxed);
        assert!(!watched.is_down(5_100));
        // Its process has ended.
        record.clear();
        assert!(!watched.is_down(5_100) && watched.is_down(5_101));
    }
}
