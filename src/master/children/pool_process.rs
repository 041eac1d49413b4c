//! Holds what the master knows about a pool process: the generations that it serves, and its method numbers.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::generation_info::{GenerationContext, GenerationInfo, OldContexts};
use crate::config::{JobsConfig, PoolConfig, PoolReload, Settings};
use crate::handler::pool::Pool;
use crate::handler::pool::pool_table::{MethodNumbers, PoolTable, methods_of};
use crate::link::ids::{Generation, Slot};
use crate::link::message::Order;
use crate::link::scoreboard::WorkerRecord;
use crate::master::policy::event::{KeptPool, Millis};
use crate::sys::memory_file;
use crate::sys::process::monotonic_ms;

/// The longest reason that is read from a pool process, in bytes.
const MAX_REASON_LEN: u64 = 4096;

#[derive(Debug)]
pub struct PoolProcess {
    pub pool: Arc<Pool>,
    methods: MethodNumbers,
    /// The generations whose workers use it.
    serves: RangeInclusive<Generation>,
    /// The table that it was sent. `Some` while a reload waits for its answer.
    table: Option<OwnedFd>,
    /// The result of the reload that could not be sent yet.
    pub(super) unsent_result: Option<Order>,
}

impl PoolProcess {
    /// Describes the pool process for a slot; returns `None` for another kind of slot. It serves the
    /// generations from `oldest` on. Earlier contexts are in `old`.
    pub fn new(
        (slot, generation): (Slot, Generation),
        context: &GenerationContext,
        oldest: Generation,
        old: &OldContexts,
    ) -> Option<Self> {
        let number = slot.pool()?;
        let pool = Arc::clone(context.registry.pools().get(number)?);
        let mut methods = MethodNumbers::new(generation.0, &context.registry, number);
        for earlier in (oldest.0..generation.0).map(Generation) {
            if let Some(context) = old.of(earlier)
                && let Some(number) = context.known.pool_number(pool.name())
            {
                methods.add(earlier.0, &methods_of(&context.registry, number));
            }
        }
        Some(PoolProcess {
            pool,
            methods,
            serves: oldest..=generation,
            table: None,
            unsent_result: None,
        })
    }

    /// Returns whether workers of a generation use it.
    pub fn serves(&self, generation: Generation) -> bool {
        self.serves.contains(&generation)
    }

    pub fn methods(&self) -> MethodNumbers {
        self.methods.clone()
    }

    /// Returns what the master reports about the pool process. The names of methods are by the numbers of the pool
    /// process, and names of `before` keep their numbers. The rest comes from `context`.
    pub fn info(&self, before: &GenerationInfo, context: &GenerationContext) -> Rc<GenerationInfo> {
        Rc::new(GenerationInfo {
            methods: self.methods.names(&before.methods),
            ..(*context.known).clone()
        })
    }

    /// Adds the generation of a reload, and drops those that are not in `served`. Returns the table for the
    /// process, in a memory file.
    ///
    /// # Errors
    /// The reason why the table could not be made.
    pub fn update(
        &mut self,
        (slot, generation): (Slot, Generation),
        context: &GenerationContext,
        served: Vec<u32>,
    ) -> Result<&OwnedFd, String> {
        let number = slot.pool().unwrap_or_default();
        let config = context.settings.pools.get(self.pool.name());
        let table = PoolTable {
            lane: number + 1,
            methods: methods_of(&context.registry, number),
            served,
            config: config
                .filter(|it| it.reload == PoolReload::Rolling)
                .cloned(),
        };
        let bytes = serde_json::to_vec(&table).map_err(|error| error.to_string())?;
        let file = memory_file::create(&bytes).map_err(|error| error.to_string())?;
        self.methods.retain(&table.served);
        self.methods.add(generation.0, &table.methods);
        self.serves = *self.serves.start()..=generation;
        Ok(self.table.insert(file))
    }

    /// Closes the table that the process has taken. Otherwise children that are forked later would inherit it.
    pub fn discard_table(&mut self) {
        self.table = None;
    }

    /// Reads why the process has not taken the table.
    pub fn reason(&mut self) -> String {
        let read = |file| memory_file::read(file, MAX_REASON_LEN).ok();
        let reason = self.table.take().and_then(read).unwrap_or_default();
        match String::from_utf8_lossy(&reason).trim() {
            // If it could not write a reason, the table is still in the file. It may contain secrets.
            text if text.is_empty() || text.starts_with('{') => "it does not say why".to_owned(),
            reason => reason.to_owned(),
        }
    }
}

/// Returns the lanes of a generation that these pool processes of earlier generations serve.
pub fn kept_lanes<'a>(
    earlier: impl Iterator<Item = &'a PoolProcess>,
    generation: Generation,
    context: &GenerationContext,
) -> Vec<usize> {
    earlier
        .filter(|pool| pool.serves(generation))
        .filter_map(|pool| context.known.pool_number(pool.pool.name()))
        .map(|number| number + 1)
        .collect()
}

/// Returns the pool processes that may stay at a reload.
pub fn kept_pools(old: &GenerationContext, new: &GenerationContext) -> Vec<KeptPool> {
    if !is_same_process(&old.settings, &new.settings) {
        return Vec::new();
    }
    let pools = new.registry.pools().iter().enumerate();
    let kept = pools.filter_map(|(to, pool)| {
        let from = old.known.pool_number(pool.name())?;
        let of = |context: &GenerationContext| context.settings.pools.get(pool.name()).cloned();
        let config: PoolConfig = of(new)?;
        let stays = match config.reload {
            PoolReload::Replace => false,
            PoolReload::Rolling => true,
            PoolReload::Keep => of(old).is_some_and(|old| old == config),
        };
        stays.then_some(KeptPool {
            from: Slot::of_pool(from),
            to: Slot::of_pool(to),
        })
    });
    kept.collect()
}

/// Returns whether the values that a pool process has from its fork, and not from its table, are unchanged.
fn is_same_process(old: &Settings, new: &Settings) -> bool {
    let times = |settings: &Settings| {
        let workers = &settings.workers;
        let timeouts = (workers.boot_timeout, settings.longest_drain());
        (timeouts, workers.heartbeat_timeout)
    };
    let limits = |settings: &Settings| (settings.limits.frame, settings.limits.depth);
    // A pool process that was forked without the table of sessions cannot be linked with sessions.
    let has_table = old.isolated().next().is_some() || new.isolated().next().is_none();
    let has_same_drains = attempt_drains(old.jobs.as_ref()) == attempt_drains(new.jobs.as_ref());
    has_table
        && has_same_drains
        && old.log == new.log
        && times(old) == times(new)
        && limits(old) == limits(new)
}

/// Returns how long attempts may drain: by default, and for each configured method. `None` without jobs: then a process
/// has neither the lock of the instance nor a lane for jobs.
fn attempt_drains(jobs: Option<&JobsConfig>) -> Option<(Duration, Vec<(&str, Duration)>)> {
    let jobs = jobs?;
    let methods = jobs.methods.iter();
    let drains = methods.map(|(name, rules)| (name.as_str(), rules.drain_timeout));
    Some((jobs.defaults.drain_timeout, drains.collect()))
}

/// Keeps the time when a program of each pool was last ready, also after the end of the pool process. The next pool
/// process begins with that time. So if the process of a pool dies repeatedly, the pool counts as down, although each
/// process has just started.
#[derive(Debug, Default)]
pub struct PoolHealth {
    /// The times of ended processes by pool, in milliseconds (CLOCK_MONOTONIC).
    ready_ms: HashMap<String, Millis>,
}

impl PoolHealth {
    /// Writes the last time into the record of a pool process that is about to be forked.
    pub fn begin(&mut self, process: &PoolProcess, record: &WorkerRecord) {
        // It stays here, because the fork may fail.
        let last = self.ready_ms.get(process.pool.name()).copied();
        record
            .pool_ready_ms
            .store(last.unwrap_or_else(monotonic_ms), Relaxed);
    }

    /// Reads the time from the record of a process that has ended. `pool` is `None` if it was no pool process.
    pub fn end(&mut self, pool: Option<&PoolProcess>, record: &WorkerRecord) {
        if let Some(process) = pool {
            // The process writes it, so it may be anything.
            let ready = record.pool_ready_ms.load(Relaxed).min(monotonic_ms());
            let last = self.ready_ms.entry(process.pool.name().to_owned());
            let last = last.or_default();
            *last = ready.max(*last);
        }
    }

    /// Returns when a program of a pool was ready last in a process that has ended; `None` if that is not known.
    pub fn last(&self, pool: &str) -> Option<Millis> {
        self.ready_ms.get(pool).copied()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::jobs::rules::tests::config;

    #[test]
    fn a_pool_process_that_was_forked_without_jobs_or_with_another_drain_timeout_cannot_stay() {
        let jobs = config();
        let mut other = jobs.clone();
        other.defaults.max_attempts += 1;
        assert_eq!(attempt_drains(Some(&jobs)), attempt_drains(Some(&other)));
        assert_ne!(attempt_drains(None), attempt_drains(Some(&jobs)));
        other.defaults.drain_timeout *= 2;
        assert_ne!(attempt_drains(Some(&jobs)), attempt_drains(Some(&other)));
        let mut other = jobs.clone();
        other.methods.get_mut("mail").unwrap().drain_timeout *= 2;
        assert_ne!(attempt_drains(Some(&jobs)), attempt_drains(Some(&other)));
    }
}
