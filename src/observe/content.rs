//! Makes the content of each page from the metrics board, the master's facts and the model.
//!
//! The facts that only the master knows may be missing or old. The pages with such facts show
//! that.

use std::rc::Rc;
use std::time::{Duration, Instant};

use serde_json::json;

use super::answer::{JSON, PageAnswer};
use super::board_source::BoardSource;
use super::exposition::{CONTENT_TYPE, exposition};
use super::master_facts::{CURRENT_MS, Facts, MasterFacts, Readiness};
use super::model::{AllRates, Model, Reading};
use super::page;
use super::process_rates::{PoolProgramCounts, ProcessCount, ProcessCounts};
use super::routes::Route;
use super::totals::BoardMembers;
use crate::config::ObserveConfig;
use crate::link::metrics_board::layout::labels;
use crate::link::metrics_board::{BoardReader, PoolTotals};
use crate::logging::printable_json;
use crate::protocol::control::{Status, WorkerPhase};

/// The time, on both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// CLOCK_MONOTONIC, in milliseconds.
    pub ms: u64,
    /// The wall clock, as the time since 1970.
    pub unix: Duration,
}

/// Everything that pages are made of.
#[derive(Debug)]
pub struct Content {
    pub facts: MasterFacts,
    board: BoardSource,
    config: ObserveConfig,
    model: Model,
}

/// What `/status.json` and `top` show.
#[derive(Debug)]
pub struct Figures {
    /// The last answer of the master.
    pub facts: Rc<Facts>,
    /// The totals of the board; `None` without one that this version can read.
    pub members: Option<BoardMembers>,
    pub rates: AllRates,
    /// The age of the master's answer.
    pub master_age_ms: u64,
}

impl Figures {
    /// Returns one JSON object: the status as the master sent it, with members from the board and two of the observer.
    pub fn to_json(&self) -> Option<String> {
        let json = &self.facts.json;
        let whole = match &self.members {
            Some(members) => members.add_to(json),
            None => json.clone(),
        };
        let members = whole.strip_suffix('}')?;
        let (rates, age) = (json!(self.rates), self.master_age_ms);
        let json = format!("{members},\"rates\":{rates},\"master_age_ms\":{age}}}");
        // A terminal may show it.
        Some(printable_json(&json).into_owned())
    }
}

impl Content {
    /// Makes pages of these facts and figures.
    pub fn new(facts: MasterFacts, board: BoardSource, config: ObserveConfig) -> Self {
        Content {
            facts,
            board,
            config,
            model: Model::new(CURRENT_MS),
        }
    }

    /// Makes readings for a viewer that asks at this interval. An answer of the master is current for half of it.
    #[cfg(feature = "top")]
    pub fn set_interval(&mut self, interval: Duration) {
        let half_ms = interval.as_millis() as u64 / 2;
        self.facts.current_ms = half_ms;
        self.model.interval_ms = half_ms;
    }

    /// Notes a request, and says when it can be answered.
    pub fn prepare(&mut self, route: &Route, now: Now) -> Readiness {
        match route {
            Route::Page | Route::History(_) => {
                self.model.use_at(now.ms);
                Readiness::Now
            }
            Route::Metrics | Route::Health => self.facts.request(now.ms),
            Route::Status => {
                self.model.use_at(now.ms);
                self.facts.request(now.ms)
            }
        }
    }

    /// Returns when to call `record`, in milliseconds; `None` if nothing is recorded.
    pub fn next_reading_ms(&self, now_ms: u64) -> Option<u64> {
        self.model.next_reading_ms(now_ms)
    }

    /// Reads the counters if that is due.
    pub fn record(&mut self, now: Now) {
        self.model.expire(now.ms);
        let is_due = self.model.next_reading_ms(now.ms);
        if is_due.is_none_or(|at| at > now.ms) {
            return;
        }
        let queue = |status: &Status| {
            let listeners = status.listeners.iter();
            let queued = listeners.filter_map(|listener| listener.queue);
            queued.map(u64::from).sum()
        };
        let facts = self.facts.current(now.ms);
        let accept_queue = facts.map(|facts| queue(&facts.status));
        let processes = self.facts.last().map(|facts| process_counts(facts));
        self.refresh_board(now.ms);
        let board = self.board.board();
        let reading = Reading {
            methods: board.map(|it| it.methods(false)).unwrap_or_default(),
            accept_queue,
            cpu_ns: board.map(BoardReader::cpu_ns).unwrap_or_default(),
            pools: board.map(program_counts).unwrap_or_default(),
            processes,
        };
        self.model.add(reading, now.ms, now.unix.as_secs());
    }

    /// Answers a request, after the master has answered or has failed to.
    pub fn answer(&mut self, route: &Route, now: Now) -> PageAnswer {
        match route {
            Route::Page => page::answer(),
            Route::Metrics => self.metrics(now),
            Route::Status => self.status(now),
            Route::History(method) => self.history(method.as_deref()),
            Route::Health => self.health(),
        }
    }

    fn refresh_board(&mut self, now_ms: u64) {
        let current = self.facts.current(now_ms).map(Rc::as_ref);
        self.board.refresh(current, now_ms);
    }

    fn metrics(&mut self, now: Now) -> PageAnswer {
        let begun = Instant::now();
        let facts = self.facts.current(now.ms).cloned();
        let unix = now.unix.as_secs_f64();
        self.refresh_board(now.ms);
        let facts = facts.as_deref().map(|facts| &facts.status);
        let took = || begun.elapsed();
        let text = exposition(self.board.board(), facts, &self.config, unix, took);
        PageAnswer::of(CONTENT_TYPE, text)
    }

    fn status(&mut self, now: Now) -> PageAnswer {
        match self.figures(now).map(|figures| figures.to_json()) {
            Some(Some(body)) => PageAnswer::of(JSON, body),
            Some(None) => PageAnswer::text(503, "the master has not answered with a status"),
            None => PageAnswer::text(503, "the master has not answered yet"),
        }
    }

    /// Returns what the status page and `top` show; `None` before the first answer of the master.
    pub fn figures(&mut self, now: Now) -> Option<Figures> {
        let facts = self.facts.last().cloned()?;
        self.refresh_board(now.ms);
        Some(Figures {
            members: self.board.board().map(BoardMembers::of),
            rates: self.model.rates(),
            master_age_ms: now.ms.saturating_sub(facts.at_ms),
            facts,
        })
    }

    fn history(&self, method: Option<&str>) -> PageAnswer {
        match self.model.history(method) {
            Some(seconds) => {
                let body = json!({ "method": method, "seconds": seconds });
                PageAnswer::of(JSON, body.to_string())
            }
            None => PageAnswer::text(404, "no method of that name had a call in the last 300 s"),
        }
    }

    fn health(&self) -> PageAnswer {
        match self.facts.last().map(|facts| unhealthy(&facts.status)) {
            Some(None) => PageAnswer::of("text/plain; charset=utf-8", "ok\n"),
            Some(Some(reason)) => PageAnswer::text(503, reason),
            None => PageAnswer::text(503, "the master has not answered yet"),
        }
    }
}

/// The counts of each pool's programs.
fn program_counts(board: &BoardReader) -> Vec<PoolProgramCounts> {
    let of = |pool: PoolTotals| {
        let exits = labels::PROGRAM_EXITS.into_iter().zip(pool.exits);
        PoolProgramCounts {
            name: pool.name,
            starts: pool.starts,
            exits: exits.filter(|(_, count)| *count > 0).collect(),
        }
    };
    board.pool_programs().into_iter().map(of).collect()
}

/// The counts of all processes in an answer of the master.
fn process_counts(facts: &Facts) -> ProcessCounts {
    let count = |pid: Option<i32>, calls, errors| {
        let pid = pid?;
        Some(ProcessCount { pid, calls, errors })
    };
    let workers = facts.status.workers.iter();
    let workers = workers.filter_map(|it| count(it.pid, it.calls, it.errors));
    let pools = facts.status.pools.iter();
    let pools = pools.filter_map(|it| count(it.pid, it.calls, 0));
    ProcessCounts {
        at_ms: facts.at_ms,
        counts: workers.chain(pools).collect(),
    }
}

/// Why no traffic should be sent to the server.
fn unhealthy(status: &Status) -> Option<&'static str> {
    let master = &status.master;
    let mut workers = status.workers.iter();
    let is_ready = workers
        .any(|worker| worker.state == WorkerPhase::Ready && worker.generation == master.generation);
    if master.stopping || master.stops_in_ms.is_some() {
        Some("the server stops, or a stop is scheduled")
    } else if !is_ready {
        Some("no worker is ready")
    } else if status.pools.iter().any(|pool| pool.unhealthy) {
        Some("a pool with health = true has had no ready program for its boot-timeout")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::control::{PoolStatus, WorkerStatus};

    #[test]
    fn a_server_is_healthy_while_a_worker_is_ready_and_no_stop_is_scheduled() {
        let mut status = Status::default();
        status.master.generation = 2;
        status.workers = vec![WorkerStatus {
            generation: 1,
            state: WorkerPhase::Ready,
            ..WorkerStatus::default()
        }];
        assert_eq!(unhealthy(&status), Some("no worker is ready"));
        status.workers[0].generation = 2;
        assert_eq!(unhealthy(&status), None);
        status.pools = vec![PoolStatus::default()];
        assert_eq!(unhealthy(&status), None);
        status.pools[0].unhealthy = true;
        assert!(unhealthy(&status).is_some_and(|reason| reason.contains("a pool")));
        status.pools.clear();
        status.master.stops_in_ms = Some(5);
        assert!(unhealthy(&status).is_some());
    }
}
