//! Tests programs that use the library: state, context, raw JSON, and their errors. The programs are
//! those of `examples/`, as real daemons.

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::lifecycle::start::{DETACHED, OWN_SOCKET, Running};
use crate::support::installed::{Installed, upgrade, wait_for_children, wait_kinds};
use crate::support::wire::{DIALECTS, Dialect, Wire};
use crate::support::{Builder, Client, Daemon, PATIENCE, Sweep, example, process, wait_for};

fn shop(config: &str) -> Daemon {
    let daemon = Daemon::builder()
        .config(config)
        .before("export LEDGER=$TMPDIR/ledger")
        .program(example("state"));
    daemon.start()
}

fn ledger(daemon: &Daemon) -> Vec<String> {
    let text = daemon.dir().read("ledger");
    text.lines().map(str::to_owned).collect()
}

fn mistake(name: &str) -> Builder {
    Daemon::builder()
        .config("[workers]\ncount = 1\n")
        .env("MISTAKE", name)
        .program(example("mistakes"))
}

#[test]
fn state_of_the_master_is_made_once_and_state_of_a_worker_in_each() {
    let daemon = shop("[workers]\ncount = 2\n");
    let mut clients: Vec<_> = (0..8).map(|_| daemon.client()).collect();
    let mut workers = std::collections::BTreeSet::new();
    for client in &mut clients {
        let about = client.call(&json!({"in": "about"}));
        assert_eq!(about["result"]["pids"][0], daemon.pid(), "{about}");
        workers.insert(about["result"]["pids"][1].as_i64().unwrap());
        let price = client.call(&json!({"in": "shop.price", "params": "tea"}));
        assert_eq!(price["result"], 3, "{price}");
        let total =
            client.call(&json!({"in": "shop.order", "params": {"item": "tea", "count": 2}}));
        assert_eq!(total["result"], 6, "{total}");
    }
    let pids: Vec<i64> = daemon.ready_workers().into_iter().map(i64::from).collect();
    assert!(workers.iter().all(|pid| pids.contains(pid)));
    let missing =
        clients[0].call(&json!({"in": "shop.order", "params": {"item": "gold", "count": 1}}));
    assert_eq!(
        missing["result"],
        json!({"code": 404, "name": "no-such-item", "message": "there is no gold here",
               "started": true, "data": ["coffee", "tea"]})
    );
    drop(clients);
    // The master keeps it for its whole life: a reload makes no new one.
    let reload = daemon.command(&["reload"]);
    assert!(reload.status.success(), "{reload:?}");
    // A worker that has not received its order to drain may be faster.
    wait_for("an answer of a new worker", PATIENCE, || {
        let about = daemon.client().call(&json!({"in": "about"}));
        assert_eq!(about["result"]["pids"][0], daemon.pid());
        !pids.contains(&about["result"]["pids"][1].as_i64().unwrap())
    });
}

#[test]
fn a_function_knows_its_call() {
    let daemon = shop("[workers]\ncount = 1\n[methods.about]\ntimeout = \"7s\"\n");
    let mut client = daemon.client();
    let own = client.stream().local_addr().unwrap().to_string();
    for method in ["about", "about_inline"] {
        let call = json!({"in": method, "id": "seven", "timeout_ms": 5000});
        let about = &client.call(&call)["result"];
        assert_eq!(about["method"], method);
        assert_eq!(about["id"], "\"seven\"");
        assert_eq!(about["peer"], *own);
        assert_eq!(about["worker"], 0);
        let remaining = about["remaining_ms"].as_u64().unwrap();
        assert!((1..=5000).contains(&remaining), "{about}");
        let about = &client.call(&json!({"in": method}))["result"];
        assert_eq!(about["id"], Value::Null);
    }
    // The shorter of the caller's and the method's limit.
    let call = json!({"in": "about", "timeout_ms": 100_000});
    let about = &client.call(&call)["result"];
    assert!(about["remaining_ms"].as_u64().unwrap() <= 7000, "{about}");
}

#[test]
fn over_a_unix_socket_there_is_no_peer_address() {
    let dir = crate::support::Dir::new();
    let path = dir.join("rpc.sock");
    let daemon = Daemon::builder()
        .config(&format!(
            "[workers]\ncount = 1\n[[listen]]\naddress = \"unix:{}\"\nmode = \"0600\"\n",
            path.display()
        ))
        .program(example("state"))
        .start();
    let mut client = Client::connect_unix(&path);
    let about = client.call(&json!({"in": "about"}));
    assert_eq!(about["result"]["peer"], Value::Null, "{about}");
    drop(daemon);
}

/// A handed-over connection is the same for its functions.
#[test]
fn the_peer_is_known_after_a_handoff() {
    let daemon = shop("[workers]\ncount = 1\n");
    let mut client = daemon.client();
    let own = client.stream().local_addr().unwrap().to_string();
    assert_eq!(client.call(&json!({"in": "about"}))["result"]["peer"], *own);
    assert!(daemon.command(&["reload"]).status.success());
    assert_eq!(client.call(&json!({"in": "about"}))["result"]["peer"], *own);
}

#[test]
fn a_caller_who_leaves_or_cancels_ends_what_pauses_for_him() {
    let daemon = shop("[workers]\ncount = 1\n");
    let sweep = Sweep::of(&daemon);
    let mut client = daemon.client();
    client.send(r#"{"in": "wait", "params": 60, "id": 1}"#);
    daemon.wait_running(1);
    let answer = client.call(&json!({"in": "rpc.cancel", "params": {"id": 1}, "id": 2}));
    assert_eq!(answer["result"]["name"], "cancelled", "{answer}");
    assert_eq!(client.recv_json()["result"], true);
    wait_for("its line", PATIENCE, || ledger(&daemon).len() == 1);
    client.send(r#"{"in": "wait", "params": 60}"#);
    daemon.wait_running(1);
    client.reset();
    wait_for("its line", PATIENCE, || ledger(&daemon).len() == 2);
    assert_eq!(ledger(&daemon), ["not waited for", "not waited for"]);
    sweep.assert_same(&daemon);
}

#[test]
fn a_lock_that_a_panic_has_poisoned_is_taken_by_the_next_call() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n")
        .program(example("state"))
        .expect_log("torn on purpose")
        .start();
    let mut client = daemon.client();
    for _ in 0..3 {
        let answer = client.call(&json!({"in": "tear"}));
        assert_eq!(answer["result"]["code"], -32603, "{answer}");
        let order = json!({"in": "shop.order", "params": {"item": "coffee", "count": 1}});
        assert_eq!(client.call(&order)["result"], 4);
    }
}

#[test]
fn each_worker_says_its_last_words_after_its_last_call() {
    let mut daemon = shop("[workers]\ncount = 2\n");
    let mut client = daemon.client();
    client.send(r#"{"in": "wait", "params": 3}"#);
    daemon.wait_running(1);
    // A reload while a call runs: these belong to the old generation.
    assert!(daemon.command(&["reload"]).status.success());
    wait_for("the old workers' words", PATIENCE, || {
        ledger(&daemon).len() == 3
    });
    assert_eq!(client.recv_json()["out"], "wait");
    let lines = ledger(&daemon);
    let at = |text: &str| lines.iter().position(|line| line.contains(text)).unwrap();
    assert!(
        lines[0].contains("closes after 0") && at("waited for") == 1,
        "{lines:?}"
    );
    drop(client);
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    let mut last = ledger(&daemon).split_off(3);
    last.sort();
    assert_eq!(last, ["worker 0 closes after 0", "worker 1 closes after 0"]);
}

#[test]
fn a_worker_that_cannot_start_fails_a_start_with_the_reason_and_takes_a_reload_back() {
    let refused = Daemon::builder()
        .config("[workers]\ncount = 1\n")
        .env("LEDGER", "/nowhere/ledger")
        .program(example("state"))
        .try_start();
    let Err(failure) = refused else {
        panic!("it started without its ledger")
    };
    assert_eq!(failure.code, Some(71), "{failure:?}");
    let reason = "on_worker_start failed: No such file or directory";
    assert!(failure.log.contains(reason), "{failure:?}");

    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n")
        .before("mkdir $TMPDIR/books; export LEDGER=$TMPDIR/books/ledger")
        .program(example("state"))
        .expect_log(reason)
        .expect_log("reload")
        .start();
    let before = daemon.ready_workers();
    std::fs::rename(daemon.dir().join("books"), daemon.dir().join("away")).unwrap();
    let reload = daemon.command(&["reload"]);
    assert_eq!(reload.status.code(), Some(1), "{reload:?}");
    assert_eq!(daemon.ready_workers(), before);
    std::fs::rename(daemon.dir().join("away"), daemon.dir().join("books")).unwrap();
    assert!(daemon.command(&["reload"]).status.success());
    assert_ne!(daemon.ready_workers(), before);
}

#[test]
fn mistakes_of_a_program_end_its_start_with_a_reason() {
    for (name, code, reason) in [
        ("twice", 64, "the method \"panic\" is registered twice"),
        (
            "other",
            64,
            "this program registers a method \"_OTHER\": metrics count the calls of all other methods",
        ),
        ("thread", 64, "2 threads run in the master"),
        (
            "master",
            71,
            "on_master_start failed: the table can't be read",
        ),
        ("worker", 71, "no database in sight"),
    ] {
        let Err(failure) = mistake(name).try_start() else {
            panic!("{name} was let through")
        };
        assert_eq!(failure.code, Some(code), "{failure:?}");
        assert!(failure.log.contains(reason), "{failure:?}");
    }
}

#[test]
fn last_words_that_never_end_hold_up_nobody() {
    let mut daemon = mistake("stop")
        .config("[workers]\ncount = 2\ndrain-timeout = \"1s\"\n")
        .start();
    let pids = daemon.ready_workers();
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait_exit().success());
    let took = begin.elapsed();
    assert!((1000..8000).contains(&took.as_millis()), "{took:?}");
    assert!(pids.iter().all(|&pid| !process::runs(pid)));
    assert!(
        daemon.log().contains("on_worker_stop did not finish"),
        "{}",
        daemon.log()
    );
}

#[test]
fn stopping_at_once_says_no_last_words() {
    let mut daemon = mistake("stop").start();
    let begin = Instant::now();
    daemon.signal(Signal::SIGINT);
    daemon.wait_exit();
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn whatever_a_function_throws_is_answered_and_a_storm_of_it_is_a_few_lines() {
    let daemon = mistake("").expect_log("panic").start();
    let sweep = Sweep::of(&daemon);
    let mut client = daemon.client();
    let calls = [
        json!({"in": "throw", "params": 7}),
        json!({"in": "throw_grudge"}),
        json!({"in": "grudge"}),
        json!({"in": "no_state"}),
    ];
    for call in calls.iter().cycle().take(200) {
        let answer = client.call(call);
        assert_eq!(answer["result"]["code"], -32603, "{call}: {answer}");
    }
    for number in 0..300 {
        let answer = client.call(&json!({"in": "panic", "params": format!("storm {number}")}));
        assert_eq!(answer["result"]["name"], "internal", "{answer}");
    }
    let lines = daemon
        .log()
        .lines()
        .filter(|line| line.contains("panic"))
        .count();
    println!("500 panics, {lines} lines");
    assert!((1..=60).contains(&lines), "{lines}");
    drop(client);
    sweep.assert_same(&daemon);
}

#[test]
fn raw_json_comes_and_goes_to_the_letter_and_on_one_line() {
    let daemon = mistake("").start();
    let digits = "1234567890123456789012345678901234567890.10e-5";
    for dialect in DIALECTS {
        let mut wire = Wire::to(&daemon);
        let body = format!(r#"{{"in": "lines", "params": {digits}}}"#);
        for _ in 0..2 {
            let answer = wire.ask(dialect, &body).answer(dialect).unwrap();
            let wanted = format!("[   {digits},    {digits} ]");
            assert!(answer.contains(&wanted), "{dialect:?}: {answer}");
        }
    }
    assert_eq!(DIALECTS[1], Dialect::Line);
}

#[test]
fn the_primes_of_a_range_are_summed_by_all_workers() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\nthreads = 2\n")
        .program(example("parallel_sum"))
        .start();
    let to = 200_000_usize;
    let mut client = Command::new(example("parallel_sum_client"));
    client.arg(daemon.address().to_string()).arg(to.to_string());
    let output = client.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let mut prime = vec![true; to];
    let mut sum = 0;
    for number in 2..to {
        if prime[number] {
            sum += number;
            (number * number..to)
                .step_by(number)
                .for_each(|it| prime[it] = false);
        }
    }
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        format!("{sum}\n")
    );
    let calls: Vec<u64> = daemon.workers().iter().map(|it| it.calls).collect();
    println!("{sum} in 64 pieces, by worker: {calls:?}");
    assert_eq!(calls.iter().sum::<u64>(), 64);
}

/// Installs `examples/before_fork` separately, so that it can be upgraded.
fn before_fork() -> Installed {
    let installed = Installed::new();
    installed.put(&example("before_fork"));
    installed
}

/// Makes a worker append `line` to each file that the program has opened before the fork.
#[track_caller]
fn record(installed: &Installed, client: &mut Client, line: &str) {
    for name in ["main", "hook", "library"] {
        let answer = client.call(&json!({"in": "record", "params": [name, line]}));
        assert_eq!(answer["result"], Value::Null, "{name}, {line}: {answer}");
        let text = installed.dir.read(name);
        let last = text.lines().next_back();
        assert_eq!(last, Some(line), "{name}: {text:?}");
    }
}

/// Returns whether one of these processes has a file open that the shell had open before it became the
/// server.
fn has_shells_file(pids: &[i32]) -> bool {
    let has = |pid: &i32| {
        process::kinds(*pid)
            .iter()
            .any(|it| it.ends_with("/shells"))
    };
    pids.iter().any(has)
}

#[test]
fn a_file_opened_before_the_fork_is_usable_in_a_handler() {
    let installed = before_fork();
    let daemon = installed
        .daemon("[workers]\ncount = 2\n")
        .env("RECORDS", &*installed.dir)
        .before("exec 8>$TMPDIR/shells")
        .start();
    record(&installed, &mut daemon.client(), "start");
    assert!(!has_shells_file(&daemon.ready_workers()));
    assert!(daemon.command(&["reload"]).status.success());
    record(&installed, &mut daemon.client(), "reload");
    wait_for_children(&daemon, 2);
    let kinds = process::kinds(daemon.pid());
    installed.put(&example("before_fork"));
    upgrade(&daemon);
    record(&installed, &mut daemon.client(), "upgrade");
    assert!(!has_shells_file(&daemon.ready_workers()));
    wait_for_children(&daemon, 2);
    // The next program opens its files itself: none of the previous program's files remains open.
    wait_kinds(daemon.pid(), &kinds);
}

#[test]
fn a_file_opened_before_the_fork_is_usable_in_a_handler_of_a_daemon() {
    let installed = before_fork();
    let config = installed
        .dir
        .write("p.toml", format!("{DETACHED}{OWN_SOCKET}"));
    let mut start = Command::new("/bin/sh");
    start
        .args(["-c", "exec 8>shells; exec ./preforkd run --config p.toml"])
        .current_dir(&*installed.dir)
        .env("TMPDIR", &*installed.dir)
        .env("RECORDS", &*installed.dir);
    let started = start.output().unwrap();
    assert!(started.status.success(), "{started:?}");
    let daemon = Running(&installed.dir);
    let client = || Client::connect_unix(&installed.dir.join("rpc.sock"));
    record(&installed, &mut client(), "start");
    let family = || [&[daemon.pid()][..], &process::workers(daemon.pid())].concat();
    assert!(!has_shells_file(&family()));
    installed.put(&example("before_fork"));
    let upgraded = Command::new(installed.path())
        .args(["upgrade", "--config"])
        .arg(&config)
        .env("RECORDS", &*installed.dir)
        .output()
        .unwrap();
    assert!(upgraded.status.success(), "{upgraded:?}");
    record(&installed, &mut client(), "upgrade");
    assert!(!has_shells_file(&family()));
}

/// The kernel counts joined threads until it has removed them, which takes some microseconds, or 300 ms
/// with the file `slow`. Many starts in 30 s at most, then a slow one.
#[test]
fn threads_joined_in_on_master_start_do_not_fail_the_start() {
    let installed = before_fork();
    let start = || {
        let daemon = installed
            .daemon("[workers]\ncount = 1\nthreads = 1\n")
            .env("RECORDS", &*installed.dir)
            .env("THREADS", "8")
            .start();
        let sum = daemon.client().call(&json!({"in": "sum"}));
        assert_eq!(sum["result"], 36, "{sum}");
    };
    let end = Instant::now() + Duration::from_secs(30);
    let starts = (0..200).take_while(|_| Instant::now() < end);
    let starts = starts.map(|_| start()).count();
    println!("{starts} starts");
    installed.dir.write("slow", "");
    start();
}

#[test]
fn threads_joined_in_on_master_start_do_not_fail_an_upgrade() {
    let installed = before_fork();
    let daemon = installed
        .daemon("[workers]\ncount = 1\n")
        .env("RECORDS", &*installed.dir)
        .env("THREADS", "2")
        .start();
    installed.dir.write("slow", "");
    installed.put(&example("before_fork"));
    upgrade(&daemon);
    let sum = daemon.client().call(&json!({"in": "sum"}));
    assert_eq!(sum["result"], 3, "{sum}");
}
