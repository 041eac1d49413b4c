//! Checks what sessions promise under many crashes, reloads, upgrades and dead acceptors. The short form is part
//! of each run. `PREFORKD_SESSIONS=256` checks the full numbers.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{acceptor, builder, isolated, ping, session_of, status};
use crate::support::{
    Client, Daemon, PATIENCE, alone, from_environment, percentile, process, raise_descriptor_limit,
    wait_for,
};

/// Live sessions; at least this many are the full form.
const FULL: u64 = 200;

fn sessions(short: u64) -> u64 {
    from_environment("PREFORKD_SESSIONS", short)
}

/// Returns the number for the short or for the full form.
fn times(short: usize, full: usize) -> usize {
    match sessions(0) >= FULL {
        true => full,
        false => short,
    }
}

fn open(daemon: &Daemon, count: u64) -> Vec<Client> {
    let mut clients: Vec<_> = (0..count).map(|_| daemon.client()).collect();
    clients.iter_mut().for_each(ping);
    clients
}

fn end(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

#[test]
fn crashes_touch_no_other_session_and_leave_nothing() {
    let _alone = alone();
    raise_descriptor_limit();
    let builder = builder("", "processes = 300\nspare = 2\n");
    let daemon = builder.expect_log("SIGKILL").start();
    let acceptor = acceptor(&daemon);
    let mut living = open(&daemon, sessions(20));
    let crashes = times(60, 1000);
    let measured = [acceptor, daemon.pid()];
    let mut before = Vec::new();
    let ways = [Signal::SIGSEGV, Signal::SIGABRT, Signal::SIGKILL];
    for number in 0..crashes {
        let mut client = daemon.client();
        ping(&mut client);
        end(session_of(&client), ways[number % ways.len()]);
        client.assert_closed();
        if number == crashes / 10 {
            wait_for("two spares", PATIENCE, || status(&daemon)["spare"] == 2);
            before = measured
                .map(|pid| (process::descriptors_at_rest(pid), process::rss_bytes(pid)))
                .to_vec();
        }
    }
    wait_for("the record of each crash", PATIENCE, || {
        status(&daemon)["crashed"] == crashes
    });
    wait_for("two spares", PATIENCE, || status(&daemon)["spare"] == 2);
    living.iter_mut().for_each(ping);
    for (pid, (descriptors, rss)) in measured.into_iter().zip(before) {
        process::wait_for_no_zombies(pid);
        process::wait_for_descriptors(pid, descriptors);
        let grown = process::rss_bytes(pid)
            .unwrap()
            .saturating_sub(rss.unwrap());
        println!("{} has {grown} bytes more", process::title(pid));
        assert!(grown <= 256 << 10, "{grown} bytes");
    }
}

#[test]
fn reloads_and_upgrades_lose_no_call_and_close_no_connection() {
    let _alone = alone();
    raise_descriptor_limit();
    let daemon = isolated("processes = 600\n");
    let mut clients = open(&daemon, sessions(24));
    let is_over = AtomicBool::new(false);
    let calls = thread::scope(|scope| {
        let callers: Vec<_> = clients
            .chunks_mut(8)
            .map(|some| {
                scope.spawn(|| {
                    let mut calls = 0;
                    while !is_over.load(Relaxed) {
                        // A lost call or a closed connection panics.
                        some.iter_mut().for_each(ping);
                        calls += some.len();
                    }
                    calls
                })
            })
            .collect();
        for number in 0..times(4, 25) {
            let change = if number % 5 == 3 { "upgrade" } else { "reload" };
            let done = daemon.command(&[change]);
            assert!(done.status.success(), "{done:?}");
        }
        is_over.store(true, Relaxed);
        callers
            .into_iter()
            .map(|it| it.join().unwrap())
            .sum::<usize>()
    });
    println!("{calls} calls");
    let count = clients.len();
    clients.iter_mut().for_each(ping);
    wait_for("all in the status", PATIENCE, || {
        status(&daemon)["running"] == count
    });
}

#[test]
fn another_acceptor_accepts_soon_and_no_session_notices() {
    let _alone = alone();
    let daemon = builder("respawn-max-delay = \"0s\"\n", "")
        .expect_log("SIGKILL")
        .start();
    let mut living = open(&daemon, sessions(10).min(200));
    let mut waits = Vec::new();
    let mut killed = 0;
    for _ in 0..times(6, 50) {
        wait_for("the next acceptor", PATIENCE, || {
            let children = process::children(daemon.pid());
            let mut titles = children.iter().map(|&pid| (pid, process::title(pid)));
            let is_next = |(pid, title): &(i32, String)| {
                *pid != killed && title.starts_with("preforkd: acceptor ")
            };
            titles.find(is_next).is_some_and(|(pid, _)| {
                killed = pid;
                true
            })
        });
        ping(&mut daemon.client());
        let begin = Instant::now();
        end(killed, Signal::SIGKILL);
        ping(&mut daemon.client());
        waits.push(begin.elapsed());
        living.iter_mut().for_each(ping);
    }
    waits.sort_unstable();
    let median = percentile(&waits, 50);
    println!("accepts again after {median:?}, at most {:?}", waits.last());
    if sessions(0) >= FULL {
        assert!(median <= Duration::from_millis(50), "{median:?}");
    }
    drop(living);
    wait_for("the end of all sessions", PATIENCE, || {
        // worker, keeper and acceptor
        process::children(daemon.pid()).len() == 3
    });
}

#[test]
fn an_idle_session_has_little_memory_of_its_own() {
    let daemon = isolated("");
    let mut client = daemon.client();
    ping(&mut client);
    let path = format!("/proc/{}/smaps_rollup", session_of(&client));
    let rollup = fs::read_to_string(path).unwrap();
    let lines = rollup.lines().filter(|line| line.starts_with("Private_"));
    let kib = lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    let kib: u64 = kib.sum();
    println!("{kib} KiB");
    assert!(kib <= 1500, "{kib} KiB");
}
