//! Tests figures while processes are stopped, killed and replaced, and addresses and accounts that the observer
//! may not use.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Pid, Uid};
use serde_json::json;

use super::{CONFIG, address, builder, observer, page, series};
use crate::support::descriptors::{borrow, sockets_of};
use crate::support::{Daemon, Dir, PATIENCE, SetOnDrop, alone, process, wait_for};

/// A user with no other process.
const USER: u32 = 54_331;

#[track_caller]
fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

#[track_caller]
fn number(text: Option<String>) -> f64 {
    text.expect("the series is there").parse().unwrap()
}

#[test]
fn while_all_workers_are_stopped_the_scrape_answers_and_shows_it() {
    let _alone = alone();
    let config = CONFIG.replace("count = 2\n", "count = 2\nheartbeat-timeout = \"60s\"\n");
    let daemon = Daemon::builder().config(&config).start();
    let address = address(&daemon);
    daemon.client().call(&json!({"in": "ping"}));
    // A worker counts a call after it has sent the answer.
    let counted = || series(address, "preforkd_calls_total{method=\"ping\"}");
    wait_for("the count of the call", PATIENCE, || {
        counted().as_deref() == Some("1")
    });
    let heartbeat = |slot: u32| {
        let name = format!("preforkd_worker_heartbeat_timestamp_seconds{{slot=\"{slot}\"}}");
        number(series(address, &name))
    };
    let workers = daemon.ready_workers();
    workers.iter().for_each(|&pid| signal(pid, Signal::SIGSTOP));
    wait_for("stopped workers", PATIENCE, || {
        let mut states = workers.iter().map(|&pid| process::state(pid));
        states.all(|state| state == Some('T'))
    });
    let before = [heartbeat(0), heartbeat(1)];
    let now = || {
        let since = std::time::UNIX_EPOCH.elapsed();
        since.unwrap().as_secs_f64()
    };
    wait_for("old heartbeats", PATIENCE, || {
        now() - heartbeat(0) > 3.0 && now() - heartbeat(1) > 3.0
    });
    // A heartbeat is the time of a turn, and there was none. The master's answer may be a second old.
    for (slot, before) in [0, 1].into_iter().zip(before) {
        let moved = (heartbeat(slot) - before).abs();
        assert!(moved < 1.5, "slot {slot}: {moved}");
    }
    assert_eq!(
        series(address, "preforkd_master_responding").as_deref(),
        Some("1")
    );
    assert_eq!(counted().as_deref(), Some("1"));
    let top = daemon.command(&["top", "--once", "--interval", "100ms"]);
    assert!(top.status.success(), "{top:?}");
    assert_eq!(page(address, "/status.json").status, 200);
    workers.iter().for_each(|&pid| signal(pid, Signal::SIGCONT));
    wait_for("new heartbeats", PATIENCE, || {
        now() - heartbeat(0) < 2.0 && now() - heartbeat(1) < 2.0
    });
    assert_eq!(daemon.client().call(&json!({"in": "ping"}))["out"], "pong");
}

#[test]
fn cpu_time_never_falls_while_a_slot_has_two_workers_and_one_is_reaped() {
    let _alone = alone();
    let config = "[workers]\ncount = 1\nrespawn-burst = 1000\nrespawn-max-delay = \"100ms\"\n\
                  [observe]\naddress = \"127.0.0.1:0\"\n";
    let daemon = Daemon::builder()
        .config(config)
        .expect_log("SIGKILL")
        .start();
    let address = address(&daemon);
    let name = "preforkd_worker_cpu_seconds_total{slot=\"0\"}";
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let over = SetOnDrop(&is_over);
        let reader = scope.spawn(|| {
            let (mut last, mut readings) = (0.0, 0);
            while !is_over.load(Relaxed) {
                let seen = number(series(address, name));
                assert!(seen >= last, "{last}, then {seen}");
                (last, readings) = (seen, readings + 1);
            }
            (last, readings)
        });
        let busy = scope.spawn(|| {
            let mut client = daemon.client();
            while !is_over.load(Relaxed) {
                let sent = client.try_send(r#"{"in":"ping"}"#);
                if sent.and_then(|()| client.recv()).is_err() {
                    client = daemon.client();
                }
            }
        });
        let mut most = 0;
        for round in 0..12 {
            let before = daemon.ready_workers();
            match round % 3 {
                0 => signal(before[0], Signal::SIGKILL),
                _ => daemon.reload(),
            }
            wait_for("the next worker alone", PATIENCE, || {
                let all = process::workers(daemon.pid());
                most = most.max(all.len());
                let ready = daemon.ready_workers();
                ready.len() == 1 && ready != before && all.len() == 1
            });
        }
        drop(over);
        busy.join().unwrap();
        let (last, readings) = reader.join().expect("the counter never falls");
        println!("{readings} readings, {last} s, at most {most} workers in the slot");
        assert!(readings >= 24 && last > 0.0 && most >= 2);
    });
}

#[test]
fn the_observer_of_root_drops_to_the_user_of_the_workers() {
    if !Uid::effective().is_root() {
        return println!("not run: it needs root");
    }
    let daemon = Daemon::builder()
        .config(&format!("user = \"nobody\"\n{CONFIG}"))
        .start();
    let (address, pid) = observer(&daemon).unwrap();
    let ids = |pid| process::field(pid, "Uid").unwrap();
    let of_worker = ids(daemon.ready_workers()[0]);
    assert_ne!(ids(daemon.pid()), of_worker);
    assert_eq!(ids(pid), of_worker);
    assert_eq!(
        process::field(pid, "CapEff")
            .unwrap()
            .trim_start_matches('0'),
        ""
    );
    for path in ["/metrics", "/status.json", "/healthz"] {
        assert_eq!(page(address, path).status, 200, "{path}");
    }
    daemon.reload();
    let (_, next) = observer(&daemon).unwrap();
    // A reload does not wait for the observer, which drops its rights before it answers anything.
    wait_for("the user of the workers", PATIENCE, || {
        ids(next) == of_worker
    });
}

#[test]
fn an_address_that_is_not_permitted_fails_the_start_and_refuses_a_reload() {
    if !Uid::effective().is_root() {
        return println!("not run: it needs root");
    }
    let closed = Dir::new();
    fs::set_permissions(&*closed, fs::Permissions::from_mode(0o700)).unwrap();
    let refused = format!(
        "[workers]\ncount = 1\n[observe]\naddress = \"unix:{}\"\n",
        closed.join("observe.sock").display()
    );
    let failure = Daemon::builder().config(&refused).user(USER).try_start();
    let failure = failure.err().unwrap();
    assert_eq!(failure.code, Some(77), "{failure:?}");
    for part in ["observe.address", "Permission denied"] {
        assert!(failure.log.contains(part), "{part}: {failure:?}");
    }
    let daemon = builder().user(USER).expect_log("reload refused").start();
    let (address, pid) = observer(&daemon).unwrap();
    let told = daemon.refused_reload(&refused);
    assert!(told.contains("observe.address"), "{told}");
    assert_eq!(observer(&daemon), Some((address, pid)));
    assert_eq!(page(address, "/healthz").status, 200);
}

/// An observer shares its listener with the next ones, so it can make them wait in accept4(2).
#[test]
fn a_listener_that_was_made_to_wait_does_not_stop_the_observer() {
    let daemon = builder().start();
    let (address, pid) = observer(&daemon).unwrap();
    // From its first answer on, it has no descriptor of the master.
    assert_eq!(page(address, "/healthz").status, 200);
    let listener = sockets_of(pid).into_iter().find_map(|(_, fd)| {
        let socket = borrow(pid, fd).ok()?;
        (getsockopt(&socket, sockopt::AcceptConn) == Ok(true)).then_some(socket)
    });
    let Some(listener) = listener else {
        return println!("not run: this process may not trace others");
    };
    for _ in 0..3 {
        let flags = OFlag::from_bits_retain(fcntl(&listener, FcntlArg::F_GETFL).unwrap());
        let blocking = flags - OFlag::O_NONBLOCK;
        fcntl(&listener, FcntlArg::F_SETFL(blocking)).unwrap();
        assert_eq!(page(address, "/healthz").status, 200);
    }
    assert_eq!(observer(&daemon), Some((address, pid)));
}
