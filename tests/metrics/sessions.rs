//! Checks the figures of isolated listeners and of the programs that belong to connections.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{Samples, assert_no_decrease, scrape, value, wait_value};
use crate::support::installed::{Installed, upgrade};
use crate::support::{Client, Daemon, PATIENCE, process, wait_for};

const WORKERS: &str = "[workers]\ncount = 1\n";

/// A program that answers with its pid, and exits on request.
const PROGRAM: &str = "import json, os, socket, struct, sys
calls = socket.socket(fileno=3)
while True:
    head = calls.recv(4)
    if not head:
        break
    call = json.loads(calls.recv(struct.unpack('<I', head)[0]).decode())
    if call.get('params') == 'exit':
        sys.exit(3)
    body = json.dumps({'out': call['in'], 'result': os.getpid()}).encode()
    calls.sendall(struct.pack('<I', len(body)) + body)
";
const POOL: &str = "[pools.state]\ncommand = [\"python3\", \"state.py\"]\nready = \"alive\"\ndirectory = \".\"\n\
                    scope = \"connection\"\n[methods.state]\npool = \"state\"\n";

/// Returns a figure of the only listener.
#[track_caller]
fn of_listener(samples: &Samples, daemon: &Daemon, name: &str, more: &str) -> f64 {
    let address = daemon.address();
    value(samples, &format!("{name}{{address=\"{address}\"{more}}}"))
}

/// Waits until a figure of the only listener has a value.
#[track_caller]
fn wait_listener(daemon: &Daemon, name: &str, wanted: f64) {
    let name = format!("{name}{{address=\"{}\"}}", daemon.address());
    wait_value(daemon, &name, wanted);
}

fn isolated(daemon: &Daemon) -> Value {
    daemon.status()["isolated"][0].clone()
}

#[track_caller]
fn ping(client: &mut Client) {
    assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
}

/// Calls the program of a connection. Returns its pid.
#[track_caller]
fn program(client: &mut Client) -> i32 {
    let answer = client.call(&json!({"in": "state"}));
    let pid = answer["result"].as_i64();
    pid.unwrap_or_else(|| panic!("{answer}")) as i32
}

#[track_caller]
fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

#[test]
fn sessions_their_limit_and_how_often_it_was_reached_are_exported() {
    let daemon = Daemon::builder()
        .config(WORKERS)
        .listen("isolation = \"connection\"\nprocesses = 2\n")
        .start();
    let seen = scrape(&daemon);
    let figure = |seen: &Samples, name: &str| of_listener(seen, &daemon, name, "");
    assert_eq!(figure(&seen, "listener_sessions"), 0.0);
    assert_eq!(figure(&seen, "listener_sessions_limit"), 2.0);
    assert_eq!(figure(&seen, "listener_full_total"), 0.0);
    let mut clients = [daemon.client(), daemon.client()];
    clients.iter_mut().for_each(ping);
    let mut waiting = daemon.client();
    waiting.send(r#"{"in": "ping"}"#);
    wait_listener(&daemon, "listener_full_total", 1.0);
    let seen = scrape(&daemon);
    assert_eq!(figure(&seen, "listener_sessions"), 2.0);
    let status = isolated(&daemon);
    assert_eq!(
        (&status["running"], &status["limit"], &status["full"]),
        (&json!(2), &json!(2), &json!(1)),
        "{status}"
    );
    // It is full all the time: the one that waits takes the place.
    let [first, second] = clients;
    drop(first);
    assert_eq!(waiting.recv_json()["out"], "pong");
    drop((second, waiting));
    wait_listener(&daemon, "listener_sessions", 0.0);
    let mut clients = [daemon.client(), daemon.client()];
    clients.iter_mut().for_each(ping);
    drop(daemon.client());
    wait_for("full once more", PATIENCE, || {
        figure(&scrape(&daemon), "listener_full_total") >= 2.0
    });
    assert_eq!(
        figure(&scrape(&daemon), "listener_full_total"),
        isolated(&daemon)["full"].as_f64().unwrap()
    );
}

#[test]
fn refused_connections_count_for_shared_and_isolated_listeners() {
    for keys in ["", "isolation = \"connection\"\n"] {
        let daemon = Daemon::builder()
            .config(WORKERS)
            .listen(&format!("{keys}per-source = 1\n"))
            .start();
        let refused = |daemon: &Daemon| {
            let seen = scrape(daemon);
            let name = "listener_refused_connections_total";
            of_listener(&seen, daemon, name, ",reason=\"per_source\"")
        };
        assert_eq!(refused(&daemon), 0.0);
        let mut client = daemon.client();
        ping(&mut client);
        for _ in 0..2 {
            let mut other = daemon.client();
            other.send(r#"{"in": "ping"}"#);
            assert_eq!(other.recv_json()["result"]["name"], "overloaded");
        }
        assert_eq!(refused(&daemon), 2.0);
        assert_eq!(daemon.status()["listeners"][0]["refused_per_source"], 2);
    }
}

/// Returns the ends of the programs of the pool by reason, those without one left out.
fn exits(samples: &Samples) -> Vec<(String, f64)> {
    let start = "preforkd_pool_program_exits_total{pool=\"state\",reason=\"";
    let counts = samples.iter().filter(|(_, count)| **count > 0.0);
    let reason = |(name, count): (&String, &f64)| {
        let reason = name.strip_prefix(start)?.strip_suffix("\"}")?;
        Some((reason.to_owned(), *count))
    };
    counts.filter_map(reason).collect()
}

#[test]
fn starts_and_ends_of_the_programs_of_connections_count() {
    let daemon = Daemon::builder()
        .config(&format!("{WORKERS}{POOL}"))
        .listen("isolation = \"connection\"\n")
        .file("state.py", PROGRAM)
        .expect_log("SIGKILL")
        .start();
    let starts = "pool_program_starts_total{pool=\"state\"}";
    assert_eq!(value(&scrape(&daemon), starts), 0.0);
    let mut clients: Vec<Client> = (0..5).map(|_| daemon.client()).collect();
    let programs: Vec<i32> = clients.iter_mut().map(program).collect();
    let seen = scrape(&daemon);
    assert_eq!((value(&seen, starts), exits(&seen)), (5.0, Vec::new()));
    assert_eq!(daemon.status()["pools"][0]["starts"], 5);

    let expect = |counts: &[(&str, f64)]| {
        let wanted: Vec<(String, f64)> = counts
            .iter()
            .map(|(reason, count)| ((*reason).to_owned(), *count))
            .collect();
        wait_for(&format!("{wanted:?}"), PATIENCE, || {
            exits(&scrape(&daemon)) == wanted
        });
    };
    // By itself, by a signal, with its connection, and with the process of its connection.
    clients[0].send(r#"{"in": "state", "params": "exit"}"#);
    expect(&[("exit", 1.0)]);
    signal(programs[1], Signal::SIGKILL);
    expect(&[("exit", 1.0), ("signal", 1.0)]);
    let session = process::parent(programs[3]).unwrap();
    drop(clients.remove(2));
    expect(&[("exit", 1.0), ("ordered", 1.0), ("signal", 1.0)]);
    signal(session, Signal::SIGKILL);
    expect(&[("exit", 1.0), ("ordered", 1.0), ("signal", 2.0)]);
    wait_listener(&daemon, "listener_session_crashes_total", 1.0);

    // The started ones without those that have ended are those that live.
    let seen = scrape(&daemon);
    assert_eq!(
        value(&seen, "pool_programs{pool=\"state\",state=\"idle\"}"),
        1.0
    );
    let pool = daemon.status()["pools"][0].clone();
    assert_eq!(
        (&pool["starts"], &pool["programs"]),
        (&json!(5), &json!(1)),
        "{pool}"
    );
    assert_eq!(pool["list"][0]["pid"], programs[4]);
}

#[test]
fn a_session_that_is_killed_after_its_acceptor_has_closed_its_connection() {
    kill_with_acceptor(|_, end| end());
}

#[test]
fn so_has_one_that_the_master_reaps_together_with_its_acceptor() {
    kill_with_acceptor(|daemon, end| {
        signal(daemon.pid(), Signal::SIGSTOP);
        end();
        signal(daemon.pid(), Signal::SIGCONT);
    });
}

/// Kills an acceptor and then its session with a call. `around` gets what does that.
fn kill_with_acceptor(around: impl Fn(&Daemon, &dyn Fn())) {
    let config = format!(
        "{WORKERS}respawn-burst = 1000\n[slow-log]\nthreshold = \"50ms\"\n[methods.nap]\nbuiltin = \"sleep\"\n"
    );
    let daemon = Daemon::builder()
        .config(&config)
        .listen("isolation = \"connection\"\n")
        .expect_log("SIGKILL")
        .expect_log("slow call")
        .start();
    let mut client = daemon.client();
    client.send(r#"{"in":"nap","params":60}"#);
    daemon.wait_log("slow call");
    let session = process::descendants(daemon.pid())
        .into_iter()
        .find(|pid| process::title(*pid).contains(": connection "))
        .unwrap();
    let acceptor = process::parent(session).unwrap();
    around(&daemon, &|| {
        signal(acceptor, Signal::SIGKILL);
        wait_for("its end", PATIENCE, || !process::runs(acceptor));
        signal(session, Signal::SIGKILL);
        wait_for("its end", PATIENCE, || !process::runs(session));
    });
    wait_value(&daemon, "connections_closed_total{reason=\"crash\"}", 1.0);
    daemon.wait_log("nap: crashed after");
    let slow = daemon.command(&["slow"]);
    let slow = String::from_utf8(slow.stdout).unwrap();
    assert!(
        slow.contains("crashed") && !slow.contains("runs for"),
        "{slow}"
    );
}

#[test]
fn no_figure_of_a_listener_falls_through_reloads_upgrades_and_dead_acceptors() {
    let installed = Installed::new();
    let daemon = installed
        .daemon(&format!("{WORKERS}respawn-burst = 1000\n{POOL}"))
        .listen("isolation = \"connection\"\nprocesses = 2\nper-source = 2\n")
        .file("state.py", PROGRAM)
        .expect_log("SIGKILL")
        .start();
    let mut clients = [daemon.client(), daemon.client()];
    for client in &mut clients {
        program(client);
    }
    wait_listener(&daemon, "listener_full_total", 1.0);
    drop(clients);
    wait_listener(&daemon, "listener_sessions", 0.0);
    let mut last = scrape(&daemon);
    let mut look = |what: &str| {
        let seen = scrape(&daemon);
        println!("after {what}");
        assert_no_decrease(&last, &seen);
        last = seen;
    };
    daemon.reload();
    look("a reload");
    installed.renew();
    upgrade(&daemon);
    look("an upgrade");
    for _ in 0..3 {
        let mut acceptor = 0;
        wait_for("an acceptor", PATIENCE, || {
            let children = process::children(daemon.pid());
            let is_one = |pid: &i32| process::title(*pid).starts_with("preforkd: acceptor ");
            acceptor = children.into_iter().find(is_one).unwrap_or_default();
            acceptor > 0
        });
        signal(acceptor, Signal::SIGKILL);
        wait_for("its end", PATIENCE, || !process::runs(acceptor));
        look("the death of an acceptor");
    }
    wait_for("another acceptor", PATIENCE, || {
        isolated(&daemon)["state"] == "ready"
    });
    look("its successor");
    let seen = scrape(&daemon);
    assert!(of_listener(&seen, &daemon, "listener_full_total", "") >= 1.0);
    assert_eq!(
        value(&seen, "pool_program_starts_total{pool=\"state\"}"),
        2.0
    );
}
