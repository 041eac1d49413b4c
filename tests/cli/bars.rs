//! Tests limits that need time or the whole machine; `tests/run` runs them one after another.

use std::time::{Duration, Instant};

use crate::lifecycle::throttle::{clients_of_slot_1, kill_slot_0};
use crate::lifecycle::worker_deaths::{
    Weight, assert_nothing_left, massacre, replacement_times, tell, unthrottled,
};
use crate::support::{
    Client, Daemon, PATIENCE, percentile, process, raise_descriptor_limit, wait_for,
};

#[test]
#[ignore = "a bar: wants the machine alone"]
fn a_dead_worker_is_replaced_within_50_ms_at_the_99th_percentile() {
    let daemon = unthrottled(2);
    let times = replacement_times(&daemon, 2, 1000);
    tell("from death to a ready successor", &times);
    assert!(percentile(&times, 99) <= Duration::from_millis(50));
}

#[test]
#[ignore = "a bar: takes a minute"]
fn ten_thousand_deaths_leave_nothing_behind() {
    let daemon = unthrottled(4);
    massacre(&daemon, 4, 25);
    let before = Weight::of(daemon.pid());
    let most_zombies = massacre(&daemon, 4, 2475);
    assert_nothing_left(&daemon, before, 10_000, most_zombies);
}

#[test]
#[ignore = "a bar: takes over a minute"]
fn a_kill_loop_costs_twelve_forks_a_minute_and_no_call_of_the_other_slot() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\nthreads = 2\n")
        .expect_log("ended by SIGKILL")
        .start();
    let mut clients = clients_of_slot_1(&daemon, 2);
    let lines = daemon.log().lines().count();
    let mut answered = 0;
    let mut burst_over = None;
    let ticks = process::cpu_ticks(daemon.pid()).unwrap();
    let begin = Instant::now();
    let deaths = kill_slot_0(&daemon, |deaths| {
        if deaths == 6 {
            burst_over.get_or_insert_with(Instant::now);
        }
        for client in &mut clients {
            client.call_text(r#"{"in":"ping"}"#);
            answered += 1;
        }
        begin.elapsed() > Duration::from_secs(62)
    });
    let took = begin.elapsed();
    let ticks = process::cpu_ticks(daemon.pid()).unwrap() - ticks;
    let lines = daemon.log().lines().count() - lines;
    // The first worker and the burst of five come in addition to the twelve.
    println!(
        "{deaths} deaths in {took:?}, {answered} calls of the other slot answered, 0 lost; the \
         master used {ticks} ticks of CPU (100 a second) and logged {lines} lines"
    );
    assert!(burst_over.is_some());
    assert!(deaths <= 6 + 12 + 1, "{deaths}");
    assert!(ticks <= 62, "{ticks}");
    assert!(lines <= 40, "{lines}");
    let recovery = Instant::now();
    wait_for("both slots ready again", PATIENCE * 2, || {
        let status = daemon.status();
        let workers = status["workers"].as_array().unwrap();
        workers.iter().all(|worker| worker["state"] == "ready")
    });
    println!("back by itself after {:?}", recovery.elapsed());
}

#[test]
#[ignore = "a bar: wants the machine alone"]
fn a_reload_with_five_thousand_idle_connections_takes_under_a_second() {
    const IDLE: usize = 5000;
    let limit = raise_descriptor_limit();
    assert!(limit > IDLE as u64 + 500, "only {limit} descriptors");
    let daemon = Daemon::builder().config("[workers]\ncount = 2\n").start();
    let mut clients: Vec<Client> = (0..IDLE).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.call_text(r#"{"in":"ping"}"#);
    }
    let begin = Instant::now();
    let done = daemon.command(&["reload"]);
    let verdict = begin.elapsed();
    assert!(done.status.success(), "{done:?}");
    wait_for("the old workers gone", PATIENCE, || {
        process::workers(daemon.pid()).len() == 2
    });
    let all = begin.elapsed();
    for (number, client) in clients.iter_mut().enumerate() {
        let answer = client.call_text(&format!(r#"{{"in":"ping","params":{number}}}"#));
        assert_eq!(answer, format!(r#"{{"out":"pong","result":{number}}}"#));
    }
    let held: Vec<u64> = daemon.workers().iter().map(|it| it.connections).collect();
    println!(
        "{IDLE} idle connections: the verdict after {verdict:?}, the old workers gone after \
         {all:?}, 0 closed; now {held:?}"
    );
    assert_eq!(held.iter().sum::<u64>(), IDLE as u64);
    assert!(all < Duration::from_secs(1), "{all:?}");
}
