//! Tests the cost of an idle connection: memory, CPU, and the latency of active clients.
//!
//! `cargo bench --bench idle` measures the same with ten thousand.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::load::{Load, Shape};
use crate::support::{
    Client, Daemon, PATIENCE, Sweep, alone, pass, process, raise_descriptor_limit, wait_for,
};

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
    // The buffers that a worker has once, for any number of clients.
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
    // Alternate and take the best of each, because other load on the machine only adds time.
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

/// A full worker closes the newest connection without a call of the source that has the most of them, and none
/// that had a call. Where it can, it keeps room for one more, so one is closed as soon as it is full again.
#[test]
fn connections_without_a_call_make_room_when_full() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n[limits]\nconnections = 8\nread-timeout = \"2s\"\n")
        .start();
    let sweep = Sweep::of(&daemon);
    let ping = json!({"in": "ping"});
    let of_others =
        |number| Client::connect_from(Ipv4Addr::new(127, 0, 0, number), daemon.address());
    let open = |count| {
        wait_for("the connection to be accepted", PATIENCE, || {
            daemon.workers()[0].connections >= count
        });
    };
    let mut served = daemon.client();
    served.call(&ping);
    let began = Instant::now();
    let mut unused: Vec<Client> = (2..=7)
        .map(|count| {
            let mut client = daemon.client();
            // The beginning of a call is none.
            client.send_raw(if count % 2 == 1 { b"{" } else { b"" });
            open(count);
            client
        })
        .collect();
    // The time that each has for its first call.
    pass(Duration::from_millis(300));
    let mut late: Vec<Client> = Vec::new();
    while let Some(mut newest) = unused.pop() {
        let mut other = of_others(2 + unused.len() as u8);
        assert_eq!(other.call(&ping)["out"], "pong");
        late.push(other);
        newest.assert_closed();
        for older in &unused {
            older.stream().set_nonblocking(true).unwrap();
            let is_open = older.stream().peek(&mut [0]).is_err();
            older.stream().set_nonblocking(false).unwrap();
            assert!(is_open, "an older one was closed before it");
        }
    }
    // The last one was the only one of its source.
    assert!(began.elapsed() >= Duration::from_secs(2));
    late.push(of_others(19));
    assert_eq!(late[6].call(&ping)["out"], "pong");
    // Nothing is left but connections that had a call: the next one waits until one of them closes.
    let mut last = of_others(20);
    last.send(&ping.to_string());
    pass(Duration::from_secs(3));
    for client in late.iter_mut().chain([&mut served]) {
        assert_eq!(client.call(&ping)["out"], "pong");
    }
    last.stream().set_nonblocking(true).unwrap();
    assert!(last.stream().peek(&mut [0]).is_err(), "it was accepted");
    last.stream().set_nonblocking(false).unwrap();
    late.pop();
    assert_eq!(last.recv_json()["out"], "pong");
    drop((served, late, last));
    sweep.assert_same(&daemon);
}
