//! Tests that lasting connections are again spread evenly over the workers after each change.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::{
    Callers, Client, Daemon, PATIENCE, alone, assert_within, pass, process, wait_for,
};

const CONFIG: &str = "
[workers]
count = 4
threads = 2
[methods.sleep]
builtin = \"sleep\"
";

/// The promised limits: the largest worker's connections relative to the mean, and the time.
const FULLEST: f64 = 1.25;
const WITHIN: Duration = Duration::from_secs(2);

/// Returns the connections of each serving worker, by slot.
fn shares(daemon: &Daemon) -> Vec<u64> {
    let mut workers = daemon.workers();
    workers.retain(|worker| worker.state == "ready");
    workers.sort_by_key(|worker| worker.slot);
    workers.iter().map(|worker| worker.connections).collect()
}

fn fullest(shares: &[u64]) -> f64 {
    let most = shares.iter().copied().max().unwrap_or(0) as f64;
    most * shares.len() as f64 / shares.iter().sum::<u64>().max(1) as f64
}

/// Waits until `total` connections are spread evenly over `workers` workers, and prints how long that
/// took.
#[track_caller]
fn assert_even(daemon: &Daemon, what: &str, workers: usize, total: u64) {
    let (begin, mut seen) = (Instant::now(), Vec::new());
    wait_for(&format!("evenness after {what}"), PATIENCE, || {
        let now = shares(daemon);
        if now != seen {
            println!("{what}: {now:?} after {:?}", begin.elapsed());
            seen = now;
        }
        seen.len() == workers && seen.iter().sum::<u64>() == total && fullest(&seen) <= FULLEST
    });
    let took = begin.elapsed();
    let what = format!("{what}, the fullest {:.2} of the mean", fullest(&seen));
    assert_within(&what, took, WITHIN);
}
fn ping(client: &mut Client, number: usize) {
    let answer = client.call(&json!({"in": "ping", "params": number}));
    assert_eq!(answer["result"], number);
}

#[test]
fn four_hundred_lasting_connections_are_spread_after_each_change_of_the_workers() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("ended by SIGKILL")
        .start();
    let mut clients: Vec<Client> = (0..400).map(|_| daemon.client()).collect();
    let check = |clients: &mut Vec<Client>| {
        let numbers = clients.iter_mut().enumerate();
        numbers.for_each(|(number, client)| ping(client, number));
    };
    check(&mut clients);
    daemon.reload();
    assert_even(&daemon, "a reload", 4, 400);
    check(&mut clients);
    assert!(daemon.command(&["scale", "2"]).status.success());
    assert_even(&daemon, "4 to 2", 2, 400);
    assert!(daemon.command(&["scale", "4"]).status.success());
    assert_even(&daemon, "2 to 4", 4, 400);
    check(&mut clients);
    let worker = Pid::from_raw(daemon.ready_workers()[1]);
    kill(worker, Signal::SIGTERM).unwrap();
    wait_for("it to be gone", PATIENCE, || {
        !process::runs(worker.as_raw())
    });
    assert_even(&daemon, "TERM to a worker", 4, 400);
    check(&mut clients);
    // The keeper of a dead worker hands them over, because no call is in flight.
    let worker = Pid::from_raw(daemon.ready_workers()[2]);
    kill(worker, Signal::SIGKILL).unwrap();
    wait_for("its successor", PATIENCE, || {
        let ready = daemon.ready_workers();
        ready.len() == 4 && !ready.contains(&worker.as_raw())
    });
    assert_even(&daemon, "KILL to a worker", 4, 400);
    check(&mut clients);
    assert!(!daemon.log().contains("could not hand over"));
}

#[test]
fn busy_connections_are_spread_too_and_lose_nothing() {
    let _alone = alone();
    let daemon = Daemon::builder().config(CONFIG).start();
    assert!(daemon.command(&["scale", "1"]).status.success());
    wait_for("one worker", PATIENCE, || daemon.workers().len() == 1);
    let load = Callers::lasting(daemon.address(), 40);
    wait_for("all of them", PATIENCE, || shares(&daemon) == [40]);
    assert!(daemon.command(&["scale", "4"]).status.success());
    assert_even(&daemon, "1 to 4 under load", 4, 40);
    for _ in 0..3 {
        daemon.reload();
        assert_even(&daemon, "a reload under load", 4, 40);
    }
    load.stop_without_loss("spread under load");
}

#[test]
fn what_is_even_is_left_alone_and_a_call_that_runs_is_not_moved() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .env("RUST_LOG", "debug")
        .start();
    let mut clients: Vec<Client> = (0..40).map(|_| daemon.client()).collect();
    // All connections of one worker have running calls: they stay, and are answered there.
    for client in &mut clients {
        client.send(&json!({"in": "sleep", "params": 0.02}).to_string());
    }
    daemon.reload();
    for client in &mut clients {
        assert_eq!(client.recv_json()["result"], 0.02);
    }
    assert_even(&daemon, "a reload", 4, 40);
    // Longer than the master checks after a change: no connection moves back and forth.
    pass(Duration::from_secs(6));
    let rounds = || daemon.log().matches("rebalancing connections").count();
    let so_far = rounds();
    println!("{so_far} rounds");
    // One round is enough if each worker gets the order in time.
    assert!(so_far <= 20, "{so_far} rounds");
    let evenness = shares(&daemon);
    // Some clients leave and some come, which is no reason to act.
    clients.truncate(20);
    pass(Duration::from_millis(600));
    assert_eq!(rounds(), so_far);
    println!("{evenness:?}");
}

/// Returns how many connections with one call 8 clients make in half a second.
fn short_connections(daemon: &Daemon) -> u64 {
    let (address, end) = (
        daemon.address(),
        Instant::now() + Duration::from_millis(500),
    );
    let client = move || {
        let mut count = 0;
        while Instant::now() < end {
            ping(&mut Client::connect(address), count);
            count += 1;
        }
        count as u64
    };
    let clients: Vec<_> = (0..8).map(|_| std::thread::spawn(client)).collect();
    clients
        .into_iter()
        .map(|client| client.join().unwrap())
        .sum()
}

/// A worker with many connections leaves accepting to the others. If all did that at once, connections would wait
/// for 3 ms while all are idle: a fifth of what one worker serves was left.
#[test]
fn a_second_worker_does_not_slow_short_connections_down() {
    let _alone = alone();
    let start = |count| {
        Daemon::builder()
            .config(&format!("[workers]\ncount = {count}\n"))
            .start()
    };
    let (one, two) = (start(1), start(2));
    let rounds = 5;
    let mut ratios: Vec<f64> = (0..rounds)
        .map(|_| short_connections(&two) as f64 / short_connections(&one) as f64)
        .collect();
    ratios.sort_by(f64::total_cmp);
    println!("two workers against one: {ratios:.2?}");
    assert!(ratios[rounds / 2] > 0.6, "{ratios:?}");
}
