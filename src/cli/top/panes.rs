//! Converts figures into the rows of each pane of `top`. Pure.
//!
//! A cell shows its tone by a color and by a symbol in its text, because a terminal may have no colors.

use super::cells::{PaneCell, PaneRow, Tone, count, figure, oldest, per_s, pid, state, text, time};
use super::text::{UNKNOWN, joined, rate, sparkline};
use crate::cli::units;
use crate::observe::content::Figures;
use crate::observe::totals::{MethodFigures, SlowFigures};
use crate::protocol::control::{DeathStatus, PoolStatus, QueueStatus, Status, WorkerStatus};

/// The width of the chart of the calls of the last 60 s, in characters.
const SPARK_WIDTH: usize = 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pane {
    Workers,
    Methods,
    Pools,
    Events,
    Slow,
    Jobs,
}

/// A column of a pane.
#[derive(Debug)]
pub(super) struct PaneColumn {
    pub title: &'static str,
    /// Whether it is text, which is aligned to the left.
    pub is_text: bool,
    /// If there is not enough room, the column with the highest rank is left out first.
    pub rank: u8,
    /// Whether it gets the rest of the line.
    pub is_elastic: bool,
}

const fn number(title: &'static str, rank: u8) -> PaneColumn {
    PaneColumn {
        title,
        is_text: false,
        rank,
        is_elastic: false,
    }
}

const fn words(title: &'static str, rank: u8) -> PaneColumn {
    PaneColumn {
        title,
        is_text: true,
        rank,
        is_elastic: false,
    }
}

const fn elastic(title: &'static str, rank: u8) -> PaneColumn {
    PaneColumn {
        title,
        is_text: true,
        rank,
        is_elastic: true,
    }
}

const WORKERS: [PaneColumn; 13] = [
    number("Slot", 0),
    number("PID", 4),
    number("Gen", 6),
    words("State", 0),
    number("Conns", 3),
    number("Run", 2),
    number("Queue", 2),
    number("Calls/s", 1),
    number("Errors/s", 5),
    number("RSS", 7),
    number("CPU %", 3),
    number("Lost", 9),
    elastic("Oldest call", 8),
];
const METHODS: [PaneColumn; 11] = [
    words("Method", 0),
    words("Kind", 8),
    number("Calls/s", 0),
    elastic("Errors/s", 3),
    number("Shed/s", 4),
    number("p50", 2),
    number("p99", 1),
    number("Max", 7),
    number("Run", 5),
    number("Queue", 6),
    words("Last 60 s", 9),
];
const POOLS: [PaneColumn; 9] = [
    words("Pool", 0),
    number("PID", 5),
    words("State", 0),
    words("Programs", 2),
    number("Queue", 1),
    number("Calls/s", 1),
    number("Starts", 4),
    words("Exits", 6),
    elastic("Oldest call", 7),
];
const EVENTS: [PaneColumn; 3] = [number("Ago", 0), words("What", 0), elastic("Details", 0)];
const SLOW: [PaneColumn; 6] = [
    number("Ago", 2),
    words("Call", 3),
    words("Method", 0),
    number("Run", 0),
    words("State", 1),
    elastic("Evidence", 0),
];

const JOBS: [PaneColumn; 7] = [
    words("Method", 0),
    words("State", 3),
    number("Waiting", 2),
    number("Due", 0),
    number("Oldest due", 0),
    number("Running", 4),
    number("Dead", 1),
];

impl Pane {
    pub(super) const ALL: [Pane; 6] = [
        Pane::Workers,
        Pane::Methods,
        Pane::Pools,
        Pane::Events,
        Pane::Slow,
        Pane::Jobs,
    ];

    pub(super) fn title(self) -> &'static str {
        ["workers", "methods", "pools", "events", "slow", "jobs"][self as usize]
    }

    pub(super) fn columns(self) -> &'static [PaneColumn] {
        match self {
            Pane::Workers => &WORKERS,
            Pane::Methods => &METHODS,
            Pane::Pools => &POOLS,
            Pane::Events => &EVENTS,
            Pane::Slow => &SLOW,
            Pane::Jobs => &JOBS,
        }
    }

    /// Returns the column by which the pane is sorted at the start, and whether the highest value comes first.
    pub(super) fn first_sort(self) -> (usize, bool) {
        match self {
            Pane::Methods => (2, true),
            _ => (0, false),
        }
    }

    /// Returns the rows, unsorted. `now` is in seconds since 1970.
    pub(super) fn rows(self, figures: &Figures, now: u64) -> Vec<PaneRow> {
        let status = &figures.facts.status;
        match self {
            Pane::Workers => status
                .workers
                .iter()
                .map(|it| worker(it, figures))
                .collect(),
            Pane::Methods => methods(figures),
            Pane::Pools => status.pools.iter().map(|it| pool(it, figures)).collect(),
            Pane::Events => events(figures, now),
            Pane::Slow => slow(figures, now),
            Pane::Jobs => jobs(status),
        }
    }
}

fn worker(worker: &WorkerStatus, figures: &Figures) -> PaneRow {
    let mut rates = figures.rates.processes.iter();
    let rates = rates.find(|rates| Some(rates.pid) == worker.pid);
    let slots = &figures.rates.slots;
    let cpu = slots
        .iter()
        .find(|slot| slot.slot == usize::from(worker.slot));
    let cpu = cpu.map_or(0.0, |slot| slot.cpu_percent);
    vec![
        figure(worker.slot.into(), worker.slot.to_string()),
        pid(worker.pid),
        count(worker.generation.into()),
        state(worker.state),
        count(worker.connections),
        count(worker.running),
        count(worker.queued).zero_is_good(Tone::Warn),
        per_s(rates.map_or(0.0, |rates| rates.calls_per_s)),
        per_s(rates.map_or(0.0, |rates| rates.errors_per_s)).zero_is_good(Tone::Bad),
        figure(worker.rss_bytes as f64, units::bytes(worker.rss_bytes)),
        figure(cpu, rate(cpu)),
        count(worker.lost_threads).zero_is_good(Tone::Bad),
        oldest(worker.oldest_call.as_ref()),
    ]
}

fn methods(figures: &Figures) -> Vec<PaneRow> {
    let Some(members) = &figures.members else {
        let mut row: PaneRow = METHODS.iter().map(|_| text(UNKNOWN)).collect();
        row[0] = text("no figures: the running server has another version of the metrics board");
        return vec![row];
    };
    members
        .methods
        .iter()
        .map(|it| method(it, figures))
        .collect()
}

fn method(method: &MethodFigures, figures: &Figures) -> PaneRow {
    let mut rates = figures.rates.methods.iter();
    let rates = rates.find(|it| it.name.as_ref() == Some(&method.name));
    let of = |figure: fn(&crate::observe::model::Rates) -> Option<u64>| rates.and_then(figure);
    let errors = rates.into_iter().flat_map(|rates| &rates.errors);
    let errors: Vec<(&str, f64)> = errors
        .map(|(code, per_s)| (code.as_str(), per_s.as_f64().unwrap_or_default()))
        .collect();
    let sum = errors.iter().map(|(_, per_s)| per_s).sum();
    let errors: Vec<String> = errors
        .iter()
        .map(|(code, per_s)| format!("{code} {}", rate(*per_s)))
        .collect();
    let errors = joined(&errors, "0");
    let recent = rates.map_or(&[][..], |rates| &rates.recent_calls);
    vec![
        text(&method.name),
        text(method.kind.unwrap_or(UNKNOWN)),
        per_s(rates.map_or(0.0, |rates| rates.calls_per_s)),
        figure(sum, errors).zero_is_good(Tone::Bad),
        per_s(rates.map_or(0.0, |rates| rates.shed_per_s)).zero_is_good(Tone::Warn),
        time(of(|rates| rates.p50_us)),
        time(of(|rates| rates.p99_us)),
        time(of(|rates| rates.max_us)),
        count(method.running),
        count(method.queued).zero_is_good(Tone::Warn),
        figure(
            recent.iter().sum::<u64>() as f64,
            sparkline(recent, SPARK_WIDTH),
        ),
    ]
}

fn pool(pool: &PoolStatus, figures: &Figures) -> PaneRow {
    let mut states: Vec<(String, usize)> = Vec::new();
    for program in &pool.list {
        let name = format!("{:?}", program.state).to_lowercase();
        match states.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => states.push((name, 1)),
        }
    }
    let states: Vec<String> = states
        .iter()
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    let states = joined(&states, &units::count(pool.programs));
    let programs = figure(pool.programs as f64, states);
    let mut rates = figures.rates.processes.iter();
    let rates = rates.find(|rates| Some(rates.pid) == pool.pid);
    let counts = figures
        .rates
        .pools
        .iter()
        .find(|counts| counts.name == pool.name);
    let exits = counts.into_iter().flat_map(|counts| &counts.exits);
    let exits: Vec<String> = exits
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    vec![
        text(&pool.name),
        pid(pool.pid),
        state(pool.state),
        if pool.down > 0 {
            programs.toned(Tone::Warn)
        } else {
            programs
        },
        count(pool.queued).zero_is_good(Tone::Warn),
        per_s(rates.map_or(0.0, |rates| rates.calls_per_s)),
        count(pool.starts),
        text(&joined(&exits, UNKNOWN)),
        oldest(pool.oldest_call.as_ref()),
    ]
}

fn slow(figures: &Figures, now: u64) -> Vec<PaneRow> {
    let Some(members) = figures
        .members
        .as_ref()
        .filter(|it| it.slow_log || !it.slow.is_empty())
    else {
        let blank = SLOW[1..].iter().map(|_| text(""));
        return vec![blank.chain([text("slow log off")]).collect()];
    };
    let row = |call: &SlowFigures| {
        let (ago, state) = (now.saturating_sub(call.at), call.outcome.as_deref());
        let run = figure(call.age_ms as f64, units::milliseconds(call.age_ms));
        let tone = if call.done { Tone::Plain } else { Tone::Bad };
        let (ago, state) = (
            figure(ago as f64, units::seconds(ago)),
            text(state.unwrap_or("runs")),
        );
        let id = text(&call.call.to_string());
        vec![
            ago,
            id,
            text(&call.method),
            run,
            state.toned(tone),
            text(&call.evidence),
        ]
    };
    members.slow.iter().map(row).collect()
}

fn jobs(status: &Status) -> Vec<PaneRow> {
    let Some(jobs) = &status.jobs else {
        let blank = JOBS[1..].iter().map(|_| text(""));
        return vec![[text("no durable jobs")].into_iter().chain(blank).collect()];
    };
    let row = |queue: &QueueStatus| {
        let state = match (queue.served, queue.paused) {
            (false, _) => text("no such method").toned(Tone::Bad),
            (true, true) => text("paused").toned(Tone::Warn),
            (true, false) => text("runs"),
        };
        let oldest = queue.oldest_due_ms;
        vec![
            text(&queue.method),
            state,
            count(queue.waiting),
            count(queue.due),
            figure(
                oldest.map_or(-1.0, |age| age as f64),
                oldest.map_or_else(|| UNKNOWN.to_owned(), units::milliseconds),
            ),
            count(queue.running),
            count(queue.dead).zero_is_good(Tone::Bad),
        ]
    };
    jobs.methods.iter().map(row).collect()
}

fn events(figures: &Figures, now: u64) -> Vec<PaneRow> {
    let status = &figures.facts.status;
    let row = |at: u64, what: PaneCell, details: &str| {
        let ago = now.saturating_sub(at);
        vec![figure(ago as f64, units::seconds(ago)), what, text(details)]
    };
    let result = |kind: &str, ok: bool| match ok {
        true => text(kind).toned(Tone::Good),
        false => text(&format!("{kind} refused")).toned(Tone::Bad),
    };
    let deaths = status.deaths.iter();
    let deaths = deaths.map(|it| row(it.at, text("death").toned(Tone::Bad), &death(it)));
    let reloads = status.reloads.iter().map(|it| {
        let took = units::milliseconds(it.took_ms);
        let error = it.error.as_deref().map(|error| format!(": {error}"));
        let details = format!(
            "generation {} serves, took {took}{}",
            it.generation,
            error.unwrap_or_default()
        );
        row(it.at, result("reload", it.ok), &details)
    });
    let upgrades = status.master.last_upgrade.iter();
    let upgrades = upgrades.map(|it| {
        row(
            it.at,
            result("upgrade", it.ok),
            it.error.as_deref().unwrap_or(UNKNOWN),
        )
    });
    deaths.chain(reloads).chain(upgrades).collect()
}

fn death(death: &DeathStatus) -> String {
    let slot = death.slot.map(|slot| format!(" slot {slot}"));
    let name = death.name.as_ref().map(|name| format!(" {name}"));
    let end = death.end();
    let method = death
        .method
        .as_ref()
        .map(|method| format!(", last method {method}"));
    format!(
        "{}{}{} pid {}: {end} after {}, {}{}",
        death.kind.name(),
        slot.unwrap_or_default(),
        name.unwrap_or_default(),
        death.pid,
        units::seconds(death.uptime_s),
        death.reason,
        method.unwrap_or_default(),
    )
}
