//! Formats the durable jobs in `status` for people: the store, and a row for each method with jobs. Pure.

use super::output::printable;
use super::table::{Align, Cell, Style, TextTable};
use super::units;
use crate::protocol::control::{JobsStatus, QueueStatus};

/// Appends the store and its queues.
pub(super) fn render(page: &mut String, jobs: &JobsStatus, colours: bool) {
    let state = match &*jobs.state {
        "up" => Style::Green.on("up", colours),
        "away" => Style::Yellow.on("away: an enqueue is answered with unavailable", colours),
        "full" => Style::Red.on(
            "full: an enqueue is answered with unavailable; free space on its disk",
            colours,
        ),
        "broken" => Style::Red.on("broken: stop the server, then run job check", colours),
        other => printable(other).into_owned(),
    };
    *page += &format!("job store {}  {state}", printable(&jobs.store));
    if !jobs.durable && jobs.state == "up" {
        *page += "  ";
        *page += &Style::Yellow.on("not durable: a power failure loses jobs", colours);
    }
    page.push('\n');
    if !jobs.methods.is_empty() {
        table(&jobs.methods).render(page, colours);
    }
}

fn table(methods: &[QueueStatus]) -> TextTable {
    let mut table = TextTable::new(&[
        ("jobs of", Align::Left),
        ("waiting", Align::Right),
        ("due", Align::Right),
        ("running", Align::Right),
        ("dead", Align::Right),
        ("oldest due", Align::Right),
        ("", Align::Left),
    ]);
    for queue in methods {
        let dead = match queue.dead {
            0 => Cell::new("0"),
            dead => Cell::painted(units::count(dead), Style::Red),
        };
        let note = match (queue.paused, queue.served) {
            (_, false) => Cell::painted("no such method", Style::Yellow),
            (true, true) => Cell::painted("paused", Style::Yellow),
            (false, true) => Cell::new(""),
        };
        let oldest = queue.oldest_due_ms.map(units::milliseconds);
        table.row([
            Cell::new(&queue.method),
            Cell::new(units::count(queue.waiting)),
            Cell::new(units::count(queue.due)),
            Cell::new(units::count(queue.running)),
            dead,
            Cell::new(oldest.unwrap_or_else(|| "-".to_owned())),
            note,
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_and_each_queue_have_a_line() {
        let queue = |method: &str| QueueStatus {
            method: method.into(),
            waiting: 1_200,
            due: 3,
            running: 2,
            served: true,
            ..QueueStatus::default()
        };
        let mut jobs = JobsStatus {
            store: "/jobs.db".into(),
            state: "up".into(),
            durable: true,
            methods: vec![
                QueueStatus {
                    oldest_due_ms: Some(4_200),
                    ..queue("mail")
                },
                QueueStatus {
                    served: false,
                    dead: 7,
                    ..queue("old")
                },
                QueueStatus {
                    paused: true,
                    ..queue("x")
                },
            ],
            ..JobsStatus::default()
        };
        let mut page = String::new();
        render(&mut page, &jobs, false);
        assert_eq!(
            page,
            "job store /jobs.db  up\n\
             jobs of  waiting  due  running  dead  oldest due\n\
             mail       1,200    3        2     0        4.2s\n\
             old        1,200    3        2     7           -  no such method\n\
             x          1,200    3        2     0           -  paused\n"
        );
        (jobs.state, jobs.durable, jobs.methods) = ("up".into(), false, Vec::new());
        let mut page = String::new();
        render(&mut page, &jobs, false);
        assert!(
            page.ends_with("up  not durable: a power failure loses jobs\n"),
            "{page}"
        );
    }
}
