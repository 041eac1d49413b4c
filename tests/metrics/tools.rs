//! Checks the exported metrics and the shipped files with third-party tools: promtool, a second parser, and the
//! generator of the Grafana dashboard.
//!
//! `tests/run` unpacks Debian's package `prometheus` and makes a virtual environment. Without them a test says that
//! it was not run.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::text;
use crate::support::{Daemon, Dir, source};

/// A server with a pool and run times.
const CONFIG: &str = "[workers]\ncount = 2\n[observe]\nhistograms = [\"duration\", \"queue\", \"run\"]\n\
    [methods.sleep]\nbuiltin = \"sleep\"\n[methods.fails]\ncommand = [\"/bin/false\"]\n\
    [pools.cat]\ncommand = [\"/bin/sleep\", \"1000\"]\nprocesses = 1\nready = \"alive\"\n[methods.cat]\npool = \"cat\"\n";

pub(super) fn tool(variable: &str, unpacked: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let path = named.unwrap_or_else(|| source().join(unpacked));
    if !path.is_file() {
        println!("not run: there is no {unpacked}; tests/run fetches it");
        return None;
    }
    Some(path)
}

fn promtool() -> Option<PathBuf> {
    tool("PROMTOOL_BINARY", "target/beside/usr/bin/promtool")
}

/// A Python with prometheus_client and grafana-foundation-sdk.
fn python() -> Option<PathBuf> {
    tool("METRICS_PYTHON", "target/metrics-python/bin/python")
}

#[track_caller]
fn run(command: &mut Command, input: &str) -> Output {
    let pipe = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = pipe.stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    child.wait_with_output().unwrap()
}

#[track_caller]
fn assert_quiet(done: &Output) {
    let clean = done.status.success() && done.stderr.is_empty();
    let text = [&done.stdout[..], &done.stderr].concat();
    assert!(clean, "{}", String::from_utf8_lossy(&text));
}

fn busy_daemon() -> Daemon {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    for method in ["ping", "fails", "nothing", "sleep"] {
        client.call(&json!({"in": method, "params": 0}));
    }
    daemon
}

#[test]
fn promtool_has_no_remarks_about_the_metrics() {
    let Some(promtool) = promtool() else { return };
    let text = text(&busy_daemon());
    assert!(
        text.contains("preforkd_call_run_seconds_count{method=\"sleep\"} 1"),
        "{text}"
    );
    assert_quiet(&run(
        Command::new(promtool).args(["check", "metrics"]),
        &text,
    ));
}

/// The parser of Prometheus' own client library for Python reads the same samples.
#[test]
fn a_second_parser_reads_the_same_samples() {
    const SCRIPT: &str = "import json, sys\nfrom prometheus_client.parser import text_string_to_metric_families as parse\n\
        print(json.dumps([[s.name, sorted(s.labels.items()), s.value] for f in parse(sys.stdin.read()) for s in f.samples]))";
    let Some(python) = python() else { return };
    let text = text(&busy_daemon());
    let done = run(Command::new(python).args(["-c", SCRIPT]), &text);
    assert_quiet(&done);
    let samples: Vec<Value> = serde_json::from_slice(&done.stdout).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    assert_eq!(samples.len(), lines.count());
    let labels = json!([["method", "ping"]]);
    let is_ping = |it: &&Value| it[0] == "preforkd_calls_total" && it[1] == labels;
    let ping = samples.iter().find(is_ping).map(|it| it[2].as_f64());
    assert_eq!(ping, Some(Some(1.0)));
}

#[test]
fn each_alert_fires_and_stays_quiet() {
    let Some(promtool) = promtool() else { return };
    let dir = Dir::new();
    let rules = source().join("config/prometheus/alerts.yml");
    assert_quiet(&run(
        Command::new(&promtool).args(["check", "rules"]).arg(&rules),
        "",
    ));
    fs::copy(&rules, dir.join("alerts.yml")).unwrap();
    let cases = dir.join("alerts.test.yml");
    fs::copy(source().join("tests/metrics/alerts.test.yml"), &cases).unwrap();
    let done = run(
        Command::new(&promtool).args(["test", "rules"]).arg(cases),
        "",
    );
    assert_quiet(&done);
}

#[test]
fn each_alert_has_a_firing_and_a_quiet_case() {
    let rules = fs::read_to_string(source().join("config/prometheus/alerts.yml")).unwrap();
    let cases = fs::read_to_string(source().join("tests/metrics/alerts.test.yml")).unwrap();
    let alerts = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "));
    for alert in alerts {
        for case in ["fires", "is quiet"] {
            assert!(
                cases.contains(&format!("name: {alert} {case}")),
                "{alert} {case}"
            );
        }
    }
}

fn dashboard() -> Value {
    let text = fs::read(source().join("config/grafana/preforkd.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// The place of a panel in the grid: left, top, width and height.
fn place(panel: &Value) -> [u64; 4] {
    ["x", "y", "w", "h"].map(|name| panel["gridPos"][name].as_u64().unwrap_or_default())
}

#[test]
fn the_panels_of_the_dashboard_have_ids_and_places_of_their_own() {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<u64> = panels
        .iter()
        .map(|panel| panel["id"].as_u64().unwrap())
        .collect();
    assert_eq!(ids.len(), panels.len());
    for (index, one) in panels.iter().enumerate() {
        let [x, y, width, height] = place(one);
        assert!(
            width > 0 && height > 0 && x + width <= 24,
            "{}",
            one["title"]
        );
        for other in &panels[..index] {
            let [left, top, wide, high] = place(other);
            let beside = x + width <= left || left + wide <= x;
            assert!(
                beside || y + height <= top || top + high <= y,
                "{} covers {}",
                one["title"],
                other["title"]
            );
        }
    }
}

/// Every expression of the dashboard, with values for Grafana's variables.
pub(super) fn expressions() -> Vec<String> {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let annotations = dashboard["annotations"]["list"].as_array().unwrap();
    let all = targets
        .chain(annotations)
        .filter_map(|it| it["expr"].as_str());
    all.map(|text| {
        let text = text.replace("$__rate_interval", "1m");
        ["$job", "$instance", "$method"]
            .iter()
            .fold(text, |text, name| text.replace(name, ".*"))
    })
    .collect()
}

#[test]
fn each_expression_of_the_dashboard_is_valid_and_uses_documented_metrics() {
    let page = fs::read_to_string(source().join("docs/metrics.md")).unwrap();
    let expressions = expressions();
    assert!(expressions.len() > 30);
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    let words = expressions
        .iter()
        .flat_map(|text| text.split(|c| !is_name(c)));
    for word in words.filter(|word| word.starts_with("preforkd_")) {
        let name = word.strip_suffix("_bucket").unwrap_or(word);
        assert!(page.contains(&format!("| `{name}` |")), "{word}");
    }
    let Some(promtool) = promtool() else { return };
    let rule = |(number, text): (usize, &String)| json!({"record": format!("expression:{number}"), "expr": text});
    let rules: Vec<Value> = expressions.iter().enumerate().map(rule).collect();
    // JSON is YAML.
    let file = json!({"groups": [{"name": "dashboard", "rules": rules}]}).to_string();
    let dir = Dir::new();
    let file = dir.write("rules.yml", file);
    assert_quiet(&run(
        Command::new(promtool).args(["check", "rules"]).arg(file),
        "",
    ));
}

#[test]
fn the_dashboard_is_what_its_generator_writes() {
    let Some(python) = python() else { return };
    let generator: &Path = &source().join("config/grafana/generate.py");
    assert_quiet(&run(Command::new(python).arg(generator).arg("--check"), ""));
}
