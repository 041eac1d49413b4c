//! Makes the figures of the header: the whole server at one look. Pure.

use super::cells::Tone;
use super::text::{escaped, micros, percent, rate};
use crate::cli::units;
use crate::observe::content::Figures;
use crate::protocol::control::{LastReload, WorkerStatus};

/// After this time without an answer, the figures of the master count as old. Milliseconds.
const SILENT_MS: u64 = 3_000;

/// A figure of the header. A tone other than plain has a symbol too.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HeaderItem {
    pub label: &'static str,
    pub value: String,
    pub tone: Tone,
}

fn item(label: &'static str, value: String, tone: Tone) -> HeaderItem {
    let value = match tone {
        Tone::Plain | Tone::Good => value,
        Tone::Warn => format!("▲ {value}"),
        Tone::Bad => format!("✖ {value}"),
    };
    HeaderItem { label, value, tone }
}

/// Returns the first line, which names the server.
pub(super) fn title(figures: &Figures) -> String {
    let master = &figures.facts.status.master;
    let age = figures.master_age_ms / 1_000;
    format!(
        "{} {}  master {}  generation {}  up {}",
        escaped(&master.name),
        escaped(&master.version),
        master.pid,
        master.generation,
        units::seconds(master.uptime_s + age),
    )
}

/// Returns the figures below the title. `now` is in seconds since 1970.
pub(super) fn items(figures: &Figures, now: u64) -> Vec<HeaderItem> {
    let status = &figures.facts.status;
    let (master, total) = (&status.master, &figures.rates.total);
    let mut items = Vec::new();
    if figures.master_age_ms > SILENT_MS {
        let age = units::milliseconds(figures.master_age_ms);
        items.push(item("no answer for", age, Tone::Bad));
    }
    if master.stopping || master.stops_in_ms.is_some() {
        let left = master.stops_in_ms.map(units::milliseconds);
        items.push(item(
            "stops in",
            left.unwrap_or_else(|| "0ms".into()),
            Tone::Bad,
        ));
    }
    let bad_if = |is_bad: bool, tone: Tone| if is_bad { tone } else { Tone::Plain };
    let ready = status.ready_workers();
    let workers = format!("{ready} of {} ready", master.target);
    items.push(item(
        "workers",
        workers,
        bad_if(ready < master.target, Tone::Bad),
    ));
    items.push(item("calls/s", rate(total.calls_per_s), Tone::Plain));
    let errors: f64 = total
        .errors
        .values()
        .filter_map(serde_json::Value::as_f64)
        .sum();
    let share = percent(errors, total.calls_per_s);
    items.push(item("errors", share, bad_if(errors > 0.0, Tone::Bad)));
    items.push(item("p50", micros(total.p50_us), Tone::Plain));
    items.push(item("p99", micros(total.p99_us), Tone::Plain));
    items.push(reload(master.last_reload.as_ref(), now));
    let queue: u64 = status
        .listeners
        .iter()
        .filter_map(|it| it.queue)
        .map(u64::from)
        .sum();
    let backlog: u64 = status
        .listeners
        .iter()
        .map(|it| u64::from(it.backlog))
        .sum();
    let accept = format!("{} of {}", units::count(queue), units::count(backlog));
    items.push(item(
        "accept queue",
        accept,
        bad_if(queue * 2 > backlog, Tone::Bad),
    ));
    let sum = |figure: fn(&WorkerStatus) -> u64| status.workers.iter().map(figure).sum::<u64>();
    let threads = sum(|it| it.threads);
    // `running` does not include the calls of lost threads.
    let busy = sum(|it| it.running + it.lost_threads);
    let text = format!("{} of {}", units::count(busy), units::count(threads));
    items.push(item(
        "busy threads",
        text,
        bad_if(threads > 0 && busy >= threads, Tone::Warn),
    ));
    let queued = sum(|it| it.queued);
    items.push(item(
        "queued",
        units::count(queued),
        bad_if(queued > 0, Tone::Warn),
    ));
    if let Some(jobs) = &status.jobs {
        let tone = bad_if(jobs.state != "up", Tone::Bad);
        items.push(item("job store", escaped(&jobs.state), tone));
        items.push(item("jobs due", units::count(jobs.due), Tone::Plain));
    }
    let quarantined = status.quarantine.len() as u64;
    let tone = bad_if(quarantined > 0, Tone::Bad);
    items.push(item("quarantine", units::count(quarantined), tone));
    let lost = master.lost_log_lines + master.lost_access_lines;
    items.push(item(
        "lost log lines",
        units::count(lost),
        bad_if(lost > 0, Tone::Warn),
    ));
    items
}

fn reload(last: Option<&LastReload>, now: u64) -> HeaderItem {
    let Some(last) = last else {
        return item("reload", "none".into(), Tone::Plain);
    };
    let ago = units::seconds(now.saturating_sub(last.at));
    match last.ok {
        true => item("reload", format!("ok {ago} ago"), Tone::Plain),
        false => item("reload", format!("refused {ago} ago"), Tone::Bad),
    }
}
