//! Formats `status` for people: the server, its workers, and the last deaths. Pure.
//!
//! `status --json` does not use this file.

use super::jobs_table;
use super::output::printable;
use super::table::{Align, Cell, Style, TextTable};
use super::units;
use crate::logging::pluralize;
use crate::protocol::control::{
    DeathStatus, IsolatedStatus, LastReload, ListenerStatus, MasterStatus, PoolStatus, Quarantined,
    Status, ThrottleStatus, WorkerPhase, WorkerStatus, version_of,
};

/// The largest number of deaths that are shown. `status --json` has all.
const DEATHS_SHOWN: usize = 10;
/// The largest number of characters of a death's reason that are shown. `status --json` has all.
const LONGEST_REASON: usize = 120;
/// An event loop is reported as silent after this time.
const SILENT_MS: u64 = 3000;

/// Formats the page. `name` is the name of the program. `now` is in seconds since 1970.
pub(super) fn render(name: &str, status: &Status, now: u64, colours: bool) -> String {
    let mut page = String::new();
    header(&mut page, name, status, colours);
    sources(&mut page, &status.master);
    last_reload(&mut page, &status.master, now, colours);
    if let Some(left) = status.master.stops_in_ms {
        let line = format!(
            "stops in {}: calls are served, health checks get 503",
            units::milliseconds(left)
        );
        page += &Style::Yellow.on(&line, colours);
        page.push('\n');
    }
    let lost = status.master.lost_log_lines;
    if lost > 0 {
        let line = format!(
            "could not write the log: {} lost",
            units::plural(lost, "line")
        );
        page += &Style::Red.on(&line, colours);
        page.push('\n');
    }
    let lost = status.master.lost_access_lines;
    if lost > 0 {
        let line = format!(
            "the access log has lost {} since the start",
            units::plural(lost, "line")
        );
        page += &Style::Yellow.on(&line, colours);
        page.push('\n');
    }
    for warning in &status.master.warnings {
        let line = format!("warning: {}", printable(warning));
        page += &Style::Yellow.on(&line, colours);
        page.push('\n');
    }
    page.push('\n');
    workers(&status.workers).render(&mut page, colours);
    page.push('\n');
    if !status.pools.is_empty() {
        pools(&status.pools).render(&mut page, colours);
        page.push('\n');
    }
    if !status.isolated.is_empty() {
        isolated(&status.isolated).render(&mut page, colours);
        page.push('\n');
    }
    if status.isolated.iter().any(|it| !it.list.is_empty()) {
        connections(&status.isolated).render(&mut page, colours);
        page.push('\n');
    }
    if let Some(jobs) = &status.jobs {
        jobs_table::render(&mut page, jobs, colours);
        page.push('\n');
    }
    listeners(&status.listeners).render(&mut page, colours);
    if !status.quarantine.is_empty() {
        page += "\nIn quarantine until the next reload:\n";
        quarantine(&status.quarantine, now).render(&mut page, colours);
    }
    if !status.deaths.is_empty() {
        let known = status.deaths.len();
        page += &match known {
            0..=DEATHS_SHOWN => "\nDeaths, the latest first:\n".to_owned(),
            _ => format!("\nDeaths, the latest {DEATHS_SHOWN} of {known} on record:\n"),
        };
        deaths(&status.deaths, now).render(&mut page, colours);
    }
    page
}

fn next_try(throttle: &ThrottleStatus) -> String {
    let wait = units::milliseconds(throttle.retry_in_ms);
    format!("next try in {wait}")
}

fn header(page: &mut String, name: &str, status: &Status, colours: bool) {
    let MasterStatus {
        pid,
        version,
        name: own,
        generation,
        uptime_s,
        target,
        ..
    } = &status.master;
    // Only workers of the serving generation, because a drained worker would hide a missing one.
    let ready = status.ready_workers();
    let paint = match ready {
        0 => Style::Red,
        _ if ready < *target => Style::Yellow,
        _ => Style::Green,
    };
    let workers = format!(
        "{ready} of {} ready",
        pluralize(*target, "worker", "workers")
    );
    // Masters of older versions do not report their name.
    let name = if own.is_empty() { name } else { own };
    let version = version_of(name, version);
    *page += &format!(
        "{}  pid {pid}  generation {generation}  up {}  {}\n",
        Style::Bold.on(&printable(&format!("{name} {version}")), colours),
        units::seconds(*uptime_s),
        paint.on(&workers, colours),
    );
}

/// Writes the configuration and the program of the server. Masters of older versions do not report them.
fn sources(page: &mut String, master: &MasterStatus) {
    if !master.binary.is_empty() {
        let config = master.config.as_deref().unwrap_or("none");
        let (config, binary) = (printable(config), printable(&master.binary));
        *page += &format!("configuration {config}  binary {binary}\n");
    }
}

fn last_reload(page: &mut String, master: &MasterStatus, now: u64, colours: bool) {
    *page += &match &master.last_reload {
        None => Style::Dim.on("last reload: none since the start", colours),
        Some(reload) => ended("reload", reload, now, colours),
    };
    page.push('\n');
    // Upgrades are rare, so nothing is shown if there was none.
    if let Some(upgrade) = &master.last_upgrade {
        *page += &ended("upgrade", upgrade, now, colours);
        page.push('\n');
    }
}

fn ended(what: &str, how: &LastReload, now: u64, colours: bool) -> String {
    let ago = units::seconds(now.saturating_sub(how.at));
    match &how.error {
        None if how.ok => format!("last {what}: fine, {ago} ago"),
        error => {
            let reason = error.as_deref().unwrap_or("no reason is known");
            let line = format!("last {what}: refused {ago} ago: {}", printable(reason));
            Style::Red.on(&line, colours)
        }
    }
}

fn workers(workers: &[WorkerStatus]) -> TextTable {
    use Align::{Left, Right};
    let mut table = TextTable::new(&[
        ("SLOT", Right),
        ("PID", Right),
        ("GEN", Right),
        ("STATE", Left),
        ("UP", Right),
        ("CONNS", Right),
        ("RUNNING", Right),
        ("QUEUED", Right),
        ("CALLS", Right),
        ("ERRORS", Right),
        ("MEMORY", Right),
        ("OLDEST CALL", Left),
    ]);
    for worker in workers {
        // A slot without a worker shows no zeros.
        let living = |text: String| Cell::new(if worker.pid.is_some() { &text } else { "-" });
        table.row([
            Cell::new(worker.slot.to_string()),
            Cell::new(worker.pid.map_or("-".into(), |pid| pid.to_string())),
            Cell::new(worker.generation.to_string()),
            Cell::painted(worker.state.name(), paint_of(worker.state)),
            living(units::seconds(worker.uptime_s)),
            living(units::count(worker.connections)),
            living(units::count(worker.running)),
            living(units::count(worker.queued)),
            living(units::count(worker.calls)),
            living(units::count(worker.errors)),
            living(units::bytes(worker.rss_bytes)),
            Cell::new(remark(worker)),
        ]);
    }
    table
}

fn pools(pools: &[PoolStatus]) -> TextTable {
    use Align::{Left, Right};
    let mut table = TextTable::new(&[
        ("POOL", Left),
        ("PID", Right),
        ("GEN", Right),
        ("STATE", Left),
        ("UP", Right),
        ("PROGRAMS", Right),
        ("BUSY", Right),
        ("DOWN", Right),
        ("QUEUED", Right),
        ("CALLS", Right),
        ("OLDEST CALL", Left),
    ]);
    for pool in pools {
        let living = |text: String| Cell::new(if pool.pid.is_some() { &text } else { "-" });
        let call = pool.oldest_call.as_ref().map(|call| {
            let age = units::milliseconds(call.age_ms);
            format!("{}, {age}", call.method)
        });
        let throttle = pool.throttle.as_ref().map(next_try);
        table.row([
            Cell::new(&*printable(&pool.name)),
            Cell::new(pool.pid.map_or("-".into(), |pid| pid.to_string())),
            Cell::new(pool.generation.to_string()),
            Cell::painted(pool.state.name(), paint_of(pool.state)),
            living(units::seconds(pool.uptime_s)),
            Cell::new(units::count(pool.programs)),
            living(units::count(pool.busy)),
            living(units::count(pool.down)),
            Cell::new(units::count(pool.queued)),
            living(units::count(pool.calls)),
            Cell::new(call.or(throttle).unwrap_or_else(|| "-".into())),
        ]);
    }
    table
}

fn isolated(listeners: &[IsolatedStatus]) -> TextTable {
    use Align::{Left, Right};
    let mut table = TextTable::new(&[
        ("ISOLATED", Left),
        ("PID", Right),
        ("GEN", Right),
        ("STATE", Left),
        ("CONNECTIONS", Right),
        ("LIMIT", Right),
        ("FULL", Right),
        ("SPARE", Right),
        ("REFUSED", Right),
        ("CRASHED", Right),
        ("", Left),
    ]);
    for listener in listeners {
        let throttle = listener.throttle.as_ref().map(next_try);
        table.row([
            Cell::new(&*printable(&listener.address)),
            Cell::new(listener.pid.map_or("-".into(), |pid| pid.to_string())),
            Cell::new(listener.generation.to_string()),
            Cell::painted(listener.state.name(), paint_of(listener.state)),
            Cell::new(units::count(listener.running)),
            Cell::new(units::count(listener.limit)),
            Cell::new(units::count(listener.full)),
            Cell::new(units::count(listener.spare)),
            Cell::new(units::count(listener.refused_per_source)),
            Cell::new(units::count(listener.crashed)),
            Cell::new(throttle.unwrap_or_default()),
        ]);
    }
    table
}

fn connections(listeners: &[IsolatedStatus]) -> TextTable {
    use Align::{Left, Right};
    let mut table = TextTable::new(&[
        ("CONNECTION", Left),
        ("LISTENER", Left),
        ("PID", Right),
        ("GEN", Right),
        ("UP", Right),
        ("RUNNING", Right),
        ("CALLS", Right),
    ]);
    for listener in listeners {
        for connection in &listener.list {
            table.row([
                Cell::new(&*printable(&connection.peer)),
                Cell::new(&*printable(&listener.address)),
                Cell::new(connection.pid.to_string()),
                Cell::new(connection.generation.to_string()),
                Cell::new(units::seconds(connection.uptime_s)),
                Cell::new(units::count(connection.running)),
                Cell::new(units::count(connection.calls)),
            ]);
        }
    }
    table
}

/// Returns the text in the last column of a worker: its oldest call, a stuck event loop, lost threads,
/// programs that are down, forwarded calls, what its slot waits for.
fn remark(worker: &WorkerStatus) -> String {
    let call = worker.oldest_call.as_ref().map(|call| {
        let age = units::milliseconds(call.age_ms);
        format!("{}, {age}", call.method)
    });
    let silent = (worker.silent_ms > SILENT_MS).then(|| {
        let silent = units::milliseconds(worker.silent_ms);
        format!("event loop silent for {silent}")
    });
    let lost = (worker.lost_threads > 0).then(|| {
        let WorkerStatus {
            lost_threads,
            threads,
            ..
        } = worker;
        let threads = pluralize(*threads as usize, "thread", "threads");
        format!("{lost_threads} of {threads} lost")
    });
    let is_short = worker.state == WorkerPhase::Ready && worker.programs_down > 0;
    let down = is_short.then(|| {
        let programs = pluralize(worker.programs as usize, "program", "programs");
        format!("{} of {programs} down", worker.programs_down)
    });
    let sent = (worker.sent > 0).then(|| format!("{} run in other processes", worker.sent));
    let for_others = (worker.running_for_others > 0)
        .then(|| format!("runs {} of other workers", worker.running_for_others));
    let throttle = worker.throttle.as_ref().map(|throttle| {
        let failures = units::plural(throttle.failures.into(), "failure");
        format!("{failures}, {}", next_try(throttle))
    });
    let parts: Vec<_> = [call, silent, lost, down, sent, for_others, throttle]
        .into_iter()
        .flatten()
        .collect();
    if parts.is_empty() {
        "-".into()
    } else {
        parts.join("; ")
    }
}

fn paint_of(state: WorkerPhase) -> Style {
    match state {
        WorkerPhase::Ready => Style::Green,
        WorkerPhase::Starting => Style::Yellow,
        WorkerPhase::Draining => Style::Cyan,
        WorkerPhase::Throttled | WorkerPhase::Dead => Style::Red,
    }
}

fn listeners(listeners: &[ListenerStatus]) -> TextTable {
    let mut table = TextTable::new(&[
        ("LISTENER", Align::Left),
        ("QUEUE", Align::Right),
        ("BACKLOG", Align::Right),
    ]);
    for listener in listeners {
        let full = listener
            .queue
            .is_some_and(|queue| queue >= listener.backlog);
        let queue = listener.queue.map_or("-".into(), |queue| queue.to_string());
        table.row([
            Cell::new(&listener.address),
            Cell::painted(queue, if full { Style::Red } else { Style::Plain }),
            Cell::new(listener.backlog.to_string()),
        ]);
    }
    table
}

/// Shortens a reason. All that is known of a stuck worker would fill the page.
fn shortened(reason: &str) -> String {
    match reason.char_indices().nth(LONGEST_REASON) {
        Some((end, _)) => format!("{}... (whole with --json)", &reason[..end]),
        None => reason.to_owned(),
    }
}

fn quarantine(calls: &[Quarantined], now: u64) -> TextTable {
    let mut table = TextTable::new(&[
        ("SINCE", Align::Right),
        ("METHOD", Align::Left),
        ("KEY", Align::Left),
        ("REFUSED", Align::Right),
    ]);
    for call in calls {
        table.row([
            Cell::new(units::seconds(now.saturating_sub(call.at))),
            Cell::new(&call.method),
            Cell::new(&call.key),
            Cell::new(units::count(call.refused)),
        ]);
    }
    table
}

fn deaths(deaths: &[DeathStatus], now: u64) -> TextTable {
    let mut table = TextTable::new(&[
        ("AGO", Align::Right),
        ("KIND", Align::Left),
        ("NAME", Align::Left),
        ("SLOT", Align::Right),
        ("PID", Align::Right),
        ("LIVED", Align::Right),
        ("END", Align::Left),
        ("METHOD", Align::Left),
        ("MEMORY", Align::Right),
        ("REASON", Align::Left),
    ]);
    for death in deaths.iter().rev().take(DEATHS_SHOWN) {
        let end = death.end();
        let clean = death.signal.is_none() && death.exit == Some(0);
        table.row([
            Cell::new(units::seconds(now.saturating_sub(death.at))),
            Cell::new(death.kind.name()),
            Cell::new(death.name.as_deref().unwrap_or("-")),
            Cell::new(
                death
                    .slot
                    .map_or_else(|| "-".into(), |slot| slot.to_string()),
            ),
            Cell::new(death.pid.to_string()),
            Cell::new(units::seconds(death.uptime_s)),
            Cell::painted(end, if clean { Style::Plain } else { Style::Red }),
            Cell::new(death.method.as_deref().unwrap_or("-")),
            Cell::new(units::bytes(death.rss_bytes)),
            Cell::new(shortened(&death.reason)),
        ]);
    }
    table
}
