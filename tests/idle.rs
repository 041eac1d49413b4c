//! What an idle connection costs: memory, CPU, and the time of those that are not idle.
//!
//! `cargo bench --bench idle` measures the same with ten thousand.

use std::time::Duration;

use serde_json::json;

use crate::support::load::{Load, Shape};
use crate::support::{Client, Daemon, Sweep, alone, pass, process, raise_descriptor_limit};

#[test]
fn two_thousand_idle_connections_cost_a_kibibyte_apiece_and_no_cpu() {
    const IDLE: usize = 2000;
    let _alone = alone();
    let limit = raise_descriptor_limit();
    assert!(limit > IDLE as u64 + 200, "only {limit} descriptors");
    let daemon = Daemon::builder().config("[workers]\ncount = 2\n").start();
    let sweep = Sweep::of(&daemon);
    let workers = daemon.ready_workers();
    let sum = |of: fn(i32) -> Option<u64>| -> u64 { workers.iter().filter_map(|&it| of(it)).sum() };
    let call = json!({"in": "ping", "params": "x".repeat(3000)});
    let empty = Daemon::builder().config("[workers]\ncount = 2\n").start();
    let probe = |daemon: &Daemon| {
        let load = Load::start(daemon.address(), 1, Shape::Lasting);
        pass(Duration::from_millis(200));
        let tally = load.stop();
        assert_eq!(tally.lost(), 0, "{:?}", tally.faults);
        (tally.quantile(0.5), tally.quantile(0.99))
    };
    // the buffers that a worker has once, however many its clients
    for _ in 0..50 {
        daemon.client().call(&call);
    }
    let before = sum(process::rss_bytes);
    let mut idle: Vec<Client> = (0..IDLE)
        .map(|_| {
            let mut client = daemon.client();
            assert_eq!(client.call(&call)["out"], "pong");
            client
        })
        .collect();
    let apiece = sum(process::rss_bytes).saturating_sub(before) / IDLE as u64;
    let ticks = sum(process::cpu_ticks);
    pass(Duration::from_secs(3));
    let ticks = sum(process::cpu_ticks) - ticks;
    // By turns, and the best of each: what else runs on the machine only adds.
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        without.push(probe(&empty));
        with.push(probe(&daemon));
    }
    let best = |runs: &[(Duration, Duration)]| {
        let median = runs.iter().map(|run| run.0).min().unwrap();
        (median, runs.iter().map(|run| run.1).min().unwrap())
    };
    let (without, with) = (best(&without), best(&with));
    println!(
        "{IDLE} idle connections: {apiece} bytes of RSS apiece, {ticks} ticks of CPU in 3 s, an \
         active client's p50 and p99 {without:?} without and {with:?} with them"
    );
    for client in &mut idle {
        assert_eq!(client.call(&call)["out"], "pong");
    }
    assert!(apiece <= 1024, "{apiece} bytes");
    assert!(ticks <= 3, "{ticks} ticks");
    let most = without.0 * 3 / 2 + Duration::from_micros(100);
    assert!(with.0 < most, "{with:?} against {without:?}");
    drop(idle);
    sweep.assert_same(&daemon);
}
