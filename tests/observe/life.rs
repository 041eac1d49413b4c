//! Tests the life of the observer: what it keeps, and what follows when it, a worker or the master stops.

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{CONFIG, address, builder, get, observer, observers, page, series, wait_replaced};
use crate::support::installed::{Installed, upgrade};
use crate::support::wire::Wire;
use crate::support::{Daemon, PATIENCE, alone, pass, process, wait_for};

#[track_caller]
fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

#[test]
fn without_an_address_there_is_no_observer() {
    let daemon = Daemon::start();
    assert_eq!(observer(&daemon), None);
    assert!(observers(daemon.pid()).is_empty());
    daemon.reload_with(CONFIG);
    wait_for("the observer", PATIENCE, || observer(&daemon).is_some());
    let address = address(&daemon);
    let serves = format!("the one before drains; the observer serves {address}\n");
    assert!(daemon.log().contains(&serves), "{}", daemon.log());
    assert_eq!(page(address, "/healthz").status, 200);
    daemon.reload();
    assert_eq!(daemon.log().matches(&serves).count(), 1);
    daemon.reload_with("[workers]\ncount = 2\n");
    wait_for("its end", PATIENCE, || observers(daemon.pid()).is_empty());
    Wire::try_open(address).map(drop).unwrap_err();
}

#[test]
fn it_keeps_its_socket_and_nothing_that_it_could_write() {
    let daemon = builder().start();
    let (_, pid) = observer(&daemon).unwrap();
    wait_for("its title", PATIENCE, || observers(daemon.pid()) == [pid]);
    assert_eq!(process::title(pid), "preforkd: observer");
    assert_eq!(process::threads(pid), 1);
    assert_eq!(process::session(pid), Some(pid));
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert!(!maps.contains(" rw-s "), "{maps}");
    // The master's control socket, pid file and links are closed.
    let kinds = process::kinds(pid);
    assert!(
        !kinds.iter().any(|kind| kind.ends_with("preforkd.pid")),
        "{kinds:?}"
    );
    let sockets = kinds
        .iter()
        .filter(|kind| kind.starts_with("socket"))
        .count();
    // Its listener, the socket to the master, and the three ends of its signal pipe.
    assert!(sockets <= 6, "{kinds:?}");
    // It is no worker.
    assert_eq!(daemon.workers().len(), 2);
    assert_eq!(daemon.status()["deaths"], json!([]));
}

#[test]
fn one_that_is_killed_is_replaced_and_no_call_notices() {
    let daemon = builder()
        .expect_log("the observer ended by SIGKILL")
        .start();
    let (address, first) = observer(&daemon).unwrap();
    let workers = daemon.ready_workers();
    let mut client = daemon.client();
    signal(first, Signal::SIGKILL);
    assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
    wait_replaced(&daemon, first);
    assert_eq!(page(address, "/healthz").status, 200);
    assert_eq!(daemon.ready_workers(), workers);
    assert_eq!(daemon.status()["deaths"], json!([]));
}

#[test]
fn one_that_is_stopped_is_replaced_after_five_seconds() {
    let _alone = alone();
    let daemon = builder()
        .expect_log("it gets SIGKILL and is replaced")
        .expect_log("the observer ended by SIGKILL")
        .start();
    let (address, first) = observer(&daemon).unwrap();
    signal(first, Signal::SIGSTOP);
    let start = Instant::now();
    wait_replaced(&daemon, first);
    assert!(
        start.elapsed() >= Duration::from_secs(4),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(page(address, "/healthz").status, 200);
}

#[test]
fn a_stopped_master_is_told_and_the_rest_is_served() {
    let _alone = alone();
    let daemon = builder().start();
    let address = address(&daemon);
    assert_eq!(
        series(address, "preforkd_master_responding").as_deref(),
        Some("1")
    );
    signal(daemon.pid(), Signal::SIGSTOP);
    pass(Duration::from_millis(1_100));
    let start = Instant::now();
    assert_eq!(
        series(address, "preforkd_master_responding").as_deref(),
        Some("0")
    );
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(series(address, "preforkd_generation"), None);
    let age = page(address, "/status.json").json()["master_age_ms"].as_u64();
    assert!(age.unwrap() > 1_000, "{age:?}");
    signal(daemon.pid(), Signal::SIGCONT);
    wait_for("the master again", PATIENCE, || {
        series(address, "preforkd_master_responding").as_deref() == Some("1")
    });
}

#[test]
fn it_ends_with_the_master() {
    let mut daemon = builder().expect_log("the master").start();
    let (address, pid) = observer(&daemon).unwrap();
    signal(daemon.pid(), Signal::SIGKILL);
    daemon.wait_exit();
    wait_for("its end", PATIENCE, || !process::runs(pid));
    Wire::try_open(address).map(drop).unwrap_err();
    daemon.wait_group_gone();
}

/// Scrapes as fast as it can while `act` runs. Returns the number of answers. Each scrape must be answered.
fn scraping(daemon: &Daemon, act: impl FnOnce()) -> usize {
    let address = address(daemon);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let scraper = scope.spawn(|| {
            let mut answers = 0;
            while !is_over.load(Ordering::Relaxed) {
                assert_eq!(page(address, "/metrics").status, 200);
                answers += 1;
            }
            answers
        });
        act();
        is_over.store(true, Ordering::Relaxed);
        scraper.join().unwrap()
    })
}

#[test]
fn no_scrape_is_refused_during_reloads_and_upgrades() {
    let _alone = alone();
    let installed = Installed::new();
    let daemon = installed.daemon(CONFIG).start();
    let first = observer(&daemon).unwrap().1;
    let answers = scraping(&daemon, || {
        for _ in 0..5 {
            daemon.reload();
        }
        for _ in 0..3 {
            installed.renew();
            upgrade(&daemon);
        }
    });
    println!("{answers} answers");
    wait_replaced(&daemon, first);
    assert_eq!(daemon.status()["deaths"], json!([]));
}

#[test]
fn an_address_in_use_fails_the_start_and_refuses_a_reload() {
    let other = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let taken = format!(
        "[workers]\ncount = 1\n[observe]\naddress = \"{}\"\n",
        other.local_addr().unwrap()
    );
    let failure = Daemon::builder().config(&taken).try_start().err().unwrap();
    assert_eq!(failure.code, Some(71), "{failure:?}");
    assert!(failure.log.contains("observe.address"), "{failure:?}");
    let daemon = builder().expect_log("reload refused").start();
    let (address, pid) = observer(&daemon).unwrap();
    let refused = daemon.refused_reload(&taken);
    assert!(refused.contains("observe.address"), "{refused}");
    assert_eq!(observer(&daemon), Some((address, pid)));
    assert_eq!(page(address, "/healthz").status, 200);
}

#[test]
fn it_may_ask_the_master_for_the_status_only() {
    let daemon = builder().start();
    let address = address(&daemon);
    // The facts that it has are those of its own question, at most one per second.
    let mut wire = Wire::open(address);
    for _ in 0..20 {
        assert_eq!(wire.send(get("/status.json")).response().status, 200);
    }
    assert_eq!(daemon.workers().len(), 2);
}

/// A service manager may send SIGTERM to all processes.
#[test]
fn one_that_gets_term_alone_serves_on() {
    let _alone = alone();
    let daemon = builder().start();
    let (address, pid) = observer(&daemon).unwrap();
    assert_eq!(page(address, "/healthz").status, 200);
    let answers = scraping(&daemon, || {
        signal(pid, Signal::SIGTERM);
        pass(Duration::from_millis(500));
    });
    println!("{answers} answers");
    assert_eq!(page(address, "/healthz").status, 200);
    assert_eq!(observer(&daemon), Some((address, pid)));
    assert_eq!(daemon.status()["deaths"], json!([]));
}
