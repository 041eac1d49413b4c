//! Checks that counters equal what clients have seen, through deaths, reloads and upgrades.
//!
//! The environment sets how many: PREFORKD_KILLS, PREFORKD_RELOADS and PREFORKD_UPGRADES.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{assert_no_decrease, samples, scrape, sum, value};
use crate::support::installed::{Installed, upgrade};
use crate::support::{Client, Daemon, PATIENCE, from_environment, pass, wait_for};

const CONFIG: &str = "[workers]\ncount = 2\nthreads = 2\nrespawn-burst = 1000\nrespawn-max-delay = \"100ms\"\n\
                      [methods.sleep]\nbuiltin = \"sleep\"\n";

/// What clients have seen.
#[derive(Default)]
struct Ledger {
    ping: AtomicU64,
    sleep: AtomicU64,
    crashed: AtomicU64,
    /// Calls without an answer.
    lost: AtomicU64,
}

impl Ledger {
    fn note(&self, is_ping: bool, answer: Option<Value>) {
        match answer {
            None => &self.lost,
            Some(answer) if answer["out"] == "error" => {
                assert_eq!(answer["result"]["name"], "crashed", "{answer}");
                &self.crashed
            }
            Some(_) if is_ping => &self.ping,
            Some(_) => &self.sleep,
        }
        .fetch_add(1, Relaxed);
    }
}

/// Calls two methods in turn until it is stopped.
fn call(address: std::net::SocketAddr, ledger: &Ledger, stop: &AtomicBool) {
    let mut client = Client::connect(address);
    let mut is_ping = false;
    while !stop.load(Relaxed) {
        is_ping = !is_ping;
        let call = match is_ping {
            true => json!({"in": "ping", "params": 1}),
            false => json!({"in": "sleep", "params": 0.001}),
        };
        let answer = client
            .try_send(&call.to_string())
            .and_then(|()| client.recv());
        let answer = answer
            .ok()
            .and_then(|body| serde_json::from_slice(&body).ok());
        if answer.is_none() {
            client = Client::connect(address);
        }
        ledger.note(is_ping, answer);
    }
}

/// Runs `act` under load and compares the counters with the clients' ledger. Each KILL may cost one batch.
#[track_caller]
fn compare(daemon: &Daemon, kills: u64, act: impl FnOnce()) {
    let (ledger, stop) = (
        Arc::new(Ledger::default()),
        Arc::new(AtomicBool::new(false)),
    );
    let address = daemon.address();
    let before = scrape(daemon);
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (ledger, stop) = (Arc::clone(&ledger), Arc::clone(&stop));
            thread::spawn(move || call(address, &ledger, &stop))
        })
        .collect();
    let mut scraper = daemon.asking(&["metrics"]);
    let reader = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            let (mut last, mut scrapes) = (None, 0_u64);
            while !stop.load(Relaxed) {
                let done = scraper.output().unwrap();
                // The master answers no command while it becomes another program.
                if done.status.success() {
                    let seen = samples(&String::from_utf8(done.stdout).unwrap());
                    if let Some(last) = &last {
                        assert_no_decrease(last, &seen);
                    }
                    last = Some(seen);
                    scrapes += 1;
                }
                pass(Duration::from_millis(100));
            }
            scrapes
        })
    };
    act();
    stop.store(true, Relaxed);
    clients
        .into_iter()
        .for_each(|client| client.join().unwrap());
    let scrapes = reader.join().expect("no counter falls");
    wait_for("all calls counted", PATIENCE, || {
        sum(&scrape(daemon), "calls_queued") == 0.0
    });
    let after = scrape(daemon);
    assert_no_decrease(&before, &after);
    let more = |name: &str| value(&after, name) - value(&before, name);
    let count = |counter: &AtomicU64| counter.load(Relaxed) as f64;
    let (lost, crashed) = (count(&ledger.lost), count(&ledger.crashed));
    println!(
        "{} and {} calls, {crashed} crashed, {lost} lost, {scrapes} scrapes",
        count(&ledger.ping),
        count(&ledger.sleep)
    );
    let batches = kills as f64 * 8.0;
    for (name, seen) in [("ping", &ledger.ping), ("sleep", &ledger.sleep)] {
        let method =
            |metric: &str, rest: &str| more(&format!("{metric}{{method=\"{name}\"{rest}}}"));
        let crashed = method("call_errors_total", ",code=\"crashed\",started=\"true\"")
            + method("call_errors_total", ",code=\"crashed\",started=\"false\"");
        let missing = method("calls_total", "") - crashed - count(seen);
        assert!(missing.abs() <= batches + lost, "{name}: {missing} calls");
        // Calls that a keeper has answered have no time.
        let timed = method("call_duration_seconds_count", "");
        let calls = method("calls_total", "");
        assert!(
            (calls - crashed..=calls).contains(&timed),
            "{name}: {timed} of {calls}"
        );
    }
    wait_for("closed connections", PATIENCE, || {
        let seen = scrape(daemon);
        let open =
            value(&seen, "connections_accepted_total") - sum(&seen, "connections_closed_total");
        open == sum(&seen, "worker_connections")
    });
}

#[test]
fn counters_equal_the_ledger_of_clients_through_kills() {
    let kills = from_environment("PREFORKD_KILLS", 10);
    let daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("ended by SIGKILL")
        .start();
    compare(&daemon, kills, || {
        for _ in 0..kills {
            let workers = daemon.ready_workers();
            let Some(worker) = workers.first() else {
                continue;
            };
            kill(Pid::from_raw(*worker), Signal::SIGKILL).unwrap();
            wait_for("another worker", PATIENCE, || {
                let ready = daemon.ready_workers();
                ready.len() == 2 && !ready.contains(worker)
            });
        }
    });
    let seen = scrape(&daemon);
    assert_eq!(
        value(&seen, "worker_exits_total{reason=\"signal\"}"),
        kills as f64
    );
}

#[test]
fn counters_equal_the_ledger_of_clients_through_reloads() {
    let reloads = from_environment("PREFORKD_RELOADS", 4);
    let daemon = Daemon::builder().config(CONFIG).start();
    compare(&daemon, 0, || (0..reloads).for_each(|_| daemon.reload()));
    let seen = scrape(&daemon);
    assert_eq!(value(&seen, "reloads_total{result=\"ok\"}"), reloads as f64);
    assert!(value(&seen, "connections_moved_total{reason=\"drain\"}") > 0.0);
}

#[test]
fn counters_equal_the_ledger_of_clients_through_upgrades_and_rollbacks() {
    let upgrades = from_environment("PREFORKD_UPGRADES", 2);
    let installed = Installed::new();
    let daemon = installed
        .daemon(CONFIG)
        .expect_log("upgrade refused")
        .expect_log("reload refused")
        .start();
    let started = value(&scrape(&daemon), "start_time_seconds");
    compare(&daemon, 0, || {
        for _ in 0..upgrades {
            installed.renew();
            upgrade(&daemon);
        }
        // It passes the probe, which binds nothing, and fails after the exec.
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let (own, taken) = (daemon.address(), held.local_addr().unwrap());
        let listeners =
            [own, taken].map(|address| format!("[[listen]]\naddress = \"{address}\"\n"));
        daemon.configure(&format!("{CONFIG}{}", listeners.concat()));
        installed.renew();
        assert_eq!(daemon.command(&["upgrade"]).status.code(), Some(1));
        daemon.configure(CONFIG);
    });
    let seen = scrape(&daemon);
    assert_eq!(
        value(&seen, "upgrades_total{result=\"ok\"}"),
        upgrades as f64
    );
    assert_eq!(value(&seen, "start_time_seconds"), started);
}
