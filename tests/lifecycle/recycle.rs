//! Tests recycled workers: each is replaced while clients call, and no client notices.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::support::load::{Load, Shape, Tally};
use crate::support::{Daemon, PATIENCE, alone, example, process, wait_for};

/// The observed workers of a daemon.
#[derive(Default)]
struct Seen {
    pids: BTreeSet<i32>,
    most_living: usize,
    least_ready: Option<usize>,
    looks: usize,
}

impl Seen {
    fn look(&mut self, daemon: &Daemon) {
        let workers = daemon.workers();
        let ready = workers.iter().filter(|worker| worker.state == "ready");
        let ready = ready.count();
        self.pids.extend(workers.iter().map(|worker| worker.pid));
        self.most_living = self.most_living.max(workers.len());
        self.least_ready = Some(self.least_ready.map_or(ready, |least| least.min(ready)));
        self.looks += 1;
    }

    fn line(&self) -> String {
        format!(
            "{} looks: {} workers in all, at most {} at one time, never fewer than {} ready",
            self.looks,
            self.pids.len(),
            self.most_living,
            self.least_ready.unwrap_or(0)
        )
    }
}

/// Starts clients of all kinds at once.
fn crowd(daemon: &Daemon) -> [Load; 3] {
    let address = daemon.address();
    [
        Load::start(address, 2, Shape::PerCall),
        Load::start(address, 3, Shape::Lasting),
        Load::start(address, 3, Shape::Pipelined(16)),
    ]
}

fn stop(crowd: [Load; 3]) -> Tally {
    let mut all = Tally::default();
    crowd.into_iter().for_each(|load| all.add(load.stop()));
    all
}

#[test]
fn a_hundred_thousand_calls_while_workers_recycle_every_thousand() {
    const CALLS: u64 = 100_000;
    let _turn = alone();
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\nmax-calls = 1000\n")
        .env("RUST_LOG", "info,preforkd::master=debug")
        .start();
    let mut all = Tally::default();
    let mut seen = Seen::default();
    let begin = Instant::now();
    let recycles = || daemon.log().matches(" starts slot=").count() as u64 - 2;
    while all.sent < CALLS || recycles() < CALLS / 1000 {
        let load = crowd(&daemon);
        let until = Instant::now() + Duration::from_secs(3);
        wait_for("three seconds", PATIENCE, || {
            seen.look(&daemon);
            Instant::now() > until
        });
        all.add(stop(load));
        assert_eq!(all.lost(), 0, "{}: {:#?}", all.line(), all.faults);
        assert!(begin.elapsed() < 10 * PATIENCE, "{}", all.line());
    }
    all.assert_whole("workers that recycle every 1,000 calls");
    let log = daemon.log();
    println!(
        "{} recycles in {:?}; {}",
        recycles(),
        begin.elapsed(),
        seen.line()
    );
    assert!(log.contains("max-calls reached ("));
    assert!(seen.most_living <= 3, "{}", seen.line());
    assert_eq!(seen.least_ready, Some(2), "{}", seen.line());
    // An orderly exit is no death.
    assert_eq!(daemon.status()["deaths"].as_array().unwrap().len(), 0);
}

#[test]
fn the_budget_holds_over_all_reasons_together() {
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 4\nmax-unavailable = 2\nmax-lifetime = \"1s\"\nmax-calls = 500\n\
             max-memory = \"1MiB\"\n",
        )
        .start();
    let load = crowd(&daemon);
    let mut seen = Seen::default();
    let until = Instant::now() + Duration::from_secs(6);
    wait_for("six seconds and twelve workers", 3 * PATIENCE, || {
        seen.look(&daemon);
        Instant::now() > until && seen.pids.len() >= 12
    });
    stop(load).assert_whole("three limits at once");
    println!("{}", seen.line());
    assert!(seen.most_living <= 6, "{}", seen.line());
    assert_eq!(seen.least_ready, Some(4), "{}", seen.line());
}

#[test]
fn every_worker_is_replaced_at_its_max_lifetime() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\nmax-lifetime = \"1s\"\n")
        .start();
    let load = Load::start(daemon.address(), 2, Shape::Lasting);
    let mut seen = Seen::default();
    wait_for("three lives of each slot", PATIENCE, || {
        seen.look(&daemon);
        seen.pids.len() >= 6
    });
    load.stop().assert_whole("workers that live for a second");
    println!("{}", seen.line());
    assert_eq!(seen.least_ready, Some(2), "{}", seen.line());
    assert!(seen.most_living <= 3, "{}", seen.line());
    assert!(
        daemon
            .log()
            .contains("is recycled once its successor is ready: max-lifetime reached (")
    );
}

#[test]
fn a_worker_that_leaks_is_recycled_and_its_client_stays() {
    const STEP: u64 = 4 << 20;
    const LIMIT: u64 = 64 << 20;
    let daemon = Daemon::builder()
        .program(example("misbehave"))
        .config("[workers]\ncount = 1\nmax-memory = \"64MiB\"\n")
        .start();
    let before = daemon.ready_workers();
    let mut client = daemon.client();
    let leak = format!(r#"{{"in":"leak","params":{STEP}}}"#);
    let answer = format!(r#"{{"out":"leak","result":{STEP}}}"#);
    let mut leaked = 0;
    while leaked <= LIMIT {
        assert_eq!(client.call_text(&leak), answer);
        leaked += STEP;
    }
    println!(
        "resident with {leaked} bytes leaked: {:?}",
        process::rss_bytes(before[0])
    );
    wait_for("a successor", PATIENCE, || {
        let now = daemon.ready_workers();
        now.len() == 1 && now != before
    });
    daemon.wait_log("bytes resident, limit 67108864)");
    wait_for("the end of the old one", PATIENCE, || {
        !process::runs(before[0])
    });
    // The same connection, and a fresh worker.
    assert_eq!(client.call_text(&leak), answer);
    assert!(process::rss_bytes(daemon.ready_workers()[0]).unwrap() < LIMIT);
    assert_eq!(daemon.status()["deaths"].as_array().unwrap().len(), 0);
}

#[test]
fn workers_recycle_while_they_become_more_and_fewer() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\nmax-calls = 500\nmax-unavailable = 2\n")
        .start();
    let load = crowd(&daemon);
    for _ in 0..5 {
        daemon.signal(Signal::SIGTTIN);
        wait_for("three are ready", PATIENCE, || {
            daemon.ready_workers().len() == 3
        });
        daemon.signal(Signal::SIGTTOU);
        wait_for("two are ready", PATIENCE, || {
            daemon.ready_workers().len() == 2
        });
    }
    let reload = daemon.command(&["reload"]);
    assert!(reload.status.success(), "{reload:?}");
    stop(load).assert_whole("scaled and reloaded while workers recycle");
    wait_for("two workers", PATIENCE, || {
        let workers = daemon.workers();
        workers.len() == 2 && workers.iter().all(|worker| worker.state == "ready")
    });
}
