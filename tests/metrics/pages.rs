//! Compares docs/metrics.md and the alert rules with what a server exports.

use std::collections::BTreeMap;
use std::fs;

use super::text;
use crate::support::{Daemon, source};

/// Metrics that a server without pools, jobs and isolated listeners and with the default configuration does not export.
const NOT_ALWAYS: [&str; 19] = [
    "preforkd_call_run_seconds",
    "preforkd_jobs",
    "preforkd_jobs_attempts_total",
    "preforkd_jobs_commit_seconds",
    "preforkd_jobs_ended_total",
    "preforkd_jobs_enqueued_total",
    "preforkd_jobs_oldest_due_seconds",
    "preforkd_jobs_run_seconds",
    "preforkd_jobs_stale_total",
    "preforkd_jobs_store_up",
    "preforkd_jobs_wait_seconds",
    "preforkd_listener_full_total",
    "preforkd_listener_session_crashes_total",
    "preforkd_listener_sessions",
    "preforkd_listener_sessions_limit",
    "preforkd_pool_calls_queued",
    "preforkd_pool_program_exits_total",
    "preforkd_pool_program_starts_total",
    "preforkd_pool_programs",
];

/// The type and labels of each metric in the table of the page.
fn documented() -> BTreeMap<String, (String, Vec<String>)> {
    let page = fs::read_to_string(source().join("docs/metrics.md")).unwrap();
    let rows = page.lines().filter(|line| line.starts_with("| `preforkd_"));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let labels = cells[3].split(", ").filter(|label| !label.is_empty());
        let labels = labels.map(|label| label.trim_matches('`').to_owned());
        assert!(!cells[4].is_empty(), "no meaning: {row}");
        let name = cells[1].trim_matches('`').to_owned();
        (name, (cells[2].to_owned(), labels.collect()))
    })
    .collect()
}

#[test]
fn the_page_has_every_metric_with_its_type_and_labels() {
    let daemon = Daemon::start();
    let text = text(&daemon);
    let documented = documented();
    let mut exported = BTreeMap::new();
    for line in text.lines() {
        if let Some(line) = line.strip_prefix("# TYPE ") {
            let (name, kind) = line.split_once(' ').unwrap();
            exported.insert(name.to_owned(), kind.to_owned());
        }
    }
    for (name, kind) in &exported {
        let (there, labels) = documented.get(name).expect(name);
        assert_eq!(there, kind, "{name}");
        let is_one = |line: &&str| {
            let rest = line.strip_prefix(name.as_str());
            rest.is_some_and(|rest| rest.starts_with(['{', ' ', '_']))
        };
        let sample = text.lines().find(is_one).unwrap();
        for label in labels {
            assert!(sample.contains(&format!("{label}=\"")), "{name}: {sample}");
        }
    }
    let missing: Vec<&str> = documented
        .keys()
        .map(String::as_str)
        .filter(|name| !exported.contains_key(*name))
        .collect();
    assert_eq!(missing, NOT_ALWAYS);
}

#[test]
fn each_alert_has_a_section_and_uses_known_metrics() {
    let rules = fs::read_to_string(source().join("config/prometheus/alerts.yml")).unwrap();
    let page = fs::read_to_string(source().join("docs/metrics.md")).unwrap();
    let documented = documented();
    let alerts = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "));
    let mut count = 0;
    for alert in alerts {
        count += 1;
        assert!(
            page.contains(&format!("\n### {alert}\n")),
            "no section for {alert}"
        );
        let anchor = format!("docs/metrics.md#{}", alert.to_lowercase());
        assert!(rules.contains(&anchor), "{alert} does not name {anchor}");
    }
    assert_eq!(count, 15);
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    for word in rules
        .split(|c| !is_name(c))
        .filter(|word| word.starts_with("preforkd_"))
    {
        let name = word.strip_suffix("_bucket").unwrap_or(word);
        assert!(documented.contains_key(name), "{name}");
    }
}
