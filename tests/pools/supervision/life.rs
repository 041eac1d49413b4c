//! Tests the life of a program: what it gets, when it is ready, how it is replaced, and its end.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;

#[test]
fn a_program_inherits_nothing_but_its_calls() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let daemon = Daemon::builder()
        .config(&config(&program, "", "", ""))
        .env("SECRET_X", "secret")
        .start();
    let mut client = daemon.client();
    let found = result(&mut client, "environment", &Value::Null);
    let lines = found[0].as_array().unwrap();
    let is_python = |line: &&Value| !line.as_str().unwrap().starts_with("LC_CTYPE=");
    let lines: Vec<&Value> = lines.iter().filter(is_python).collect();
    assert_eq!(lines.len(), 2, "{found}");
    let call = format!("PREFORKD_CALL={}.", daemon.pool());
    for (line, start) in lines.iter().zip(["PATH=/usr/local/sbin:", &call]) {
        assert!(line.as_str().unwrap().starts_with(start), "{found}");
    }
    // Python itself ignores SIGPIPE and SIGXFSZ.
    assert_eq!(
        found[1],
        json!(["SigBlk:\t0000000000000000", "SigIgn:\t0000000001001000"])
    );
    assert_eq!(found[2], json!([0, 1, 2, 3]));
    assert_eq!(found[3], "/");
}

#[test]
fn a_program_that_says_when_it_is_ready_is_waited_for() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let daemon = Daemon::builder()
        .config(&config(
            &program,
            "ready",
            "",
            "ready = \"message\"\nprocesses = 2",
        ))
        .start();
    let mut client = daemon.client();
    assert_eq!(result(&mut client, "echo", &json!(1)), 1);
    assert_eq!(result(&mut client, "asked", &Value::Null), 2);
    // A ready message is also accepted if it is not required.
    let daemon = Daemon::builder()
        .config(&config(&program, "ready", "", ""))
        .start();
    let mut client = daemon.client();
    for n in 0..3 {
        assert_eq!(result(&mut client, "echo", &json!(n)), n);
    }
}

/// The program counts as ready before it is. So it gets a call before it has sent its ready message.
#[test]
fn a_word_of_being_ready_that_comes_late_costs_no_call() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let daemon = Daemon::builder()
        .config(&config(&program, "late", "", ""))
        .start();
    let mut clients: Vec<Client> = (0..3).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.send(r#"{"in": "echo", "params": 1}"#);
    }
    for client in &mut clients {
        let answer = client.recv_json();
        assert_eq!(
            (&answer["out"], &answer["result"]),
            (&json!("echo"), &json!(1))
        );
    }
    assert_eq!(result(&mut clients[0], "asked", &Value::Null), 4);
}

#[test]
fn a_start_fails_with_the_reason_when_a_program_cant_start() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let start = |config: &str| {
        let began = Instant::now();
        let failure = Daemon::builder()
            .config(config)
            .try_start()
            .map(|_| ())
            .unwrap_err();
        println!("refused after {:?}", began.elapsed());
        assert_ne!(failure.code, Some(0));
        failure.log
    };
    let waits = "ready = \"message\"";
    let log = start(&config(&dir.join("missing.py"), "", "", waits));
    assert!(
        log.contains("the program of the pool p has exited with exit code 2 before it was ready"),
        "{log}"
    );
    // The log also has the program's own output.
    assert!(log.contains("missing.py"), "{log}");
    let mut results = log.lines().filter(|line| line.contains("not every worker"));
    let result = results.next().unwrap_or_else(|| panic!("{log}"));
    assert!(result.contains(" (p) ended by exit code 71"), "{result}");
    assert!(
        result.contains("; its program ") && result.contains("exit code 2 "),
        "{result}"
    );
    let silent = "ready = \"message\"\nboot-timeout = \"300ms\"";
    let log = start(&config(&program, "", "", silent));
    assert!(
        log.contains(
            "has not sent {\"out\": \"ready\"} on descriptor 3 within boot-timeout (300ms)"
        ),
        "{log}"
    );
}

#[test]
fn a_reload_to_a_program_that_cant_start_changes_nothing() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let setting = setting("", "", &["before it was ready", "can't open file"]);
    let mut client = setting.daemon.client();
    let before = pid(&mut client);
    setting.daemon.configure(&config(
        &dir.join("missing.py"),
        "",
        "",
        "ready = \"message\"",
    ));
    let reload = setting.daemon.command(&["reload"]);
    assert!(!reload.status.success());
    let said = String::from_utf8_lossy(&reload.stderr).into_owned();
    assert!(
        said.contains("exit code 2 before it was ready") && said.contains("can't open file"),
        "{said}"
    );
    assert_eq!(pid(&mut client), before);
    // A good reload brings new programs and ends the old ones.
    setting
        .daemon
        .configure(&config(&program, "", "", "processes = 2"));
    let reload = setting.daemon.command(&["reload"]);
    assert!(reload.status.success(), "{reload:?}");
    wait_for("a new program's answers", PATIENCE, || {
        pid(&mut client) != before
    });
    wait_for("the end of the old program", PATIENCE, || {
        process::state(before).is_none()
    });
}

#[test]
fn a_worker_whose_programs_are_not_ready_lets_nobody_in() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let setting = setting("", "", &[]);
    let slow = config(&program, "slow", "", "ready = \"message\"");
    setting.daemon.configure(&slow);
    std::thread::scope(|scope| {
        let reload = scope.spawn(|| setting.daemon.command(&["reload"]));
        let is_starting = || {
            let status = setting.daemon.status();
            let mut pools = status["pools"].as_array().unwrap().iter();
            pools.any(|pool| pool["state"] == "starting")
        };
        wait_for("a pool that starts", PATIENCE, is_starting);
        let mut longest = Duration::ZERO;
        let mut calls = 0;
        while is_starting() {
            // A status request takes longer than a call.
            for _ in 0..5 {
                let began = Instant::now();
                let mut client = setting.daemon.client();
                assert_eq!(result(&mut client, "echo", &json!(calls)), calls);
                longest = longest.max(began.elapsed());
                calls += 1;
            }
        }
        assert!(reload.join().unwrap().status.success());
        println!("{calls} new clients during a start that takes its time");
        assert!(calls > 3, "{calls}");
        assert_within("the longest", longest, Duration::from_secs(1));
    });
}

#[test]
fn a_program_that_keeps_dying_is_throttled_and_its_calls_are_told() {
    let setting = setting(
        "",
        "respawn-burst = 1\nrespawn-max-delay = \"400ms\"",
        &["died soon after its start"],
    );
    let mut client = setting.daemon.client();
    let is_refused = |answer: &Value| {
        let error = &answer["result"];
        assert_eq!(error["name"], "crashed", "{answer}");
        let is_refused = error["started"] == false;
        if is_refused {
            // Reported at once, and safe to send again.
            assert!(answer.to_string().contains("exit code 1"), "{answer}");
        }
        is_refused
    };
    wait_for("a refusal", PATIENCE, || {
        is_refused(&call(&mut client, "leave", &json!(1)))
    });
    wait_for("a status that tells of it", PATIENCE, || {
        let refused = is_refused(&call(&mut client, "leave", &json!(1)));
        let pool = &setting.daemon.status()["pools"][0];
        assert_eq!(pool["programs"], 1, "{pool}");
        refused && pool["down"] == 1
    });
    wait_for("a recovery", PATIENCE, || {
        let answer = call(&mut client, "echo", &json!(1));
        answer["out"] == "echo" || !is_refused(&answer)
    });
}

#[test]
fn an_idle_program_is_ended_and_the_next_call_starts_another() {
    let setting = setting("", "idle-timeout = \"200ms\"\nprocesses = 2", &[]);
    let pool = setting.daemon.pool();
    let mut client = setting.daemon.client();
    let before = pid(&mut client);
    wait_for("no program", PATIENCE, || {
        process::children(pool).is_empty()
    });
    assert_ne!(pid(&mut client), before);
    assert!(process::children(pool).len() <= 1, "one call, one program");
}

#[test]
fn programs_are_recycled_and_the_fresh_one_is_ready_first() {
    for (keys, method, params) in [
        ("max-calls = 10", "pid", Value::Null),
        ("max-lifetime = \"300ms\"", "pid", Value::Null),
        ("max-memory = \"60MiB\"", "grow", json!(100_000_000)),
    ] {
        let setting = setting("", keys, &[]);
        let pool = setting.daemon.pool();
        let mut client = setting.daemon.client();
        let first = pid(&mut client);
        let mut calls = 0;
        wait_for(&format!("another program, by {keys}"), PATIENCE, || {
            let answer = call(&mut client, method, &params);
            assert_eq!(answer["out"], method, "{answer}");
            calls += 1;
            assert!(process::children(pool).len() <= 3);
            pid(&mut client) != first
        });
        let key = keys.split(' ').next().unwrap();
        setting.daemon.wait_log(&format!(
            "the program is replaced, because it has reached {key}"
        ));
        wait_for("the end of the first", PATIENCE, || {
            process::state(first).is_none()
        });
        println!("{keys}: replaced after {calls} calls, none lost");
    }
}

#[test]
fn a_slow_pool_and_busy_threads_keep_each_other_waiting_for_nothing() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let mut text = config(&program, "", "threads = 1", "");
    text += "[methods.sleep]\nbuiltin = \"sleep\"\n[methods.plain]\nbuiltin = \"echo\"\n\
             [limits]\nqueue = 5\n";
    let daemon = Daemon::builder().config(&text).start();
    let mut client = daemon.client();
    // The pool is full: one runs, five wait, and one more is written ahead.
    client.send_together((0..12).map(|id| json!({"in": "nap", "params": 0.5, "id": id})));
    let refused = client.recv_json();
    assert_eq!(refused["result"]["name"], "overloaded", "{refused}");
    assert_eq!(refused["result"]["started"], false, "{refused}");
    let mut other = daemon.client();
    for n in 0..50 {
        assert_eq!(
            other.call(&json!({"in": "plain", "params": n}))["result"],
            n
        );
    }
    assert!(
        daemon.status()["pools"][0]["busy"] == 1,
        "the pool is done already"
    );
    for _ in 1..12 {
        client.recv_json();
    }
    // The only thread is busy.
    other.send(r#"{"in": "sleep", "params": 4}"#);
    daemon.wait_running(1);
    for n in 0..50 {
        assert_eq!(result(&mut client, "echo", &json!(n)), n);
    }
    assert!(
        daemon.workers()[0].running > 0,
        "the thread is done already"
    );
}

#[test]
fn a_stop_and_a_reload_let_the_running_call_finish() {
    let mut setting = setting("", "", &[]);
    let mut client = setting.daemon.client();
    let before = pid(&mut client);
    client.send(r#"{"in": "nap", "params": 3}"#);
    setting.daemon.wait_busy(1);
    assert!(setting.daemon.command(&["reload"]).status.success());
    assert_eq!(client.recv_json()["result"], 3);
    wait_for("the end of the old program", PATIENCE, || {
        process::state(before).is_none()
    });
    let last = pid(&mut client);
    client.send(r#"{"in": "nap", "params": 2}"#);
    setting.daemon.wait_busy(1);
    setting.daemon.signal(Signal::SIGTERM);
    assert_eq!(client.recv_json()["result"], 2);
    assert!(setting.daemon.wait_exit().success());
    setting.daemon.wait_group_gone();
    assert!(process::state(last).is_none());
}

/// The requirement: each call answered, none wrong, `crashed` for those that ran, nothing left.
#[test]
fn ten_thousand_calls_to_programs_that_die_at_random() {
    const CALLS: usize = 10_000;
    const CLIENTS: usize = 8;
    let setting = setting(
        "",
        "processes = 4\nrespawn-max-delay = \"0s\"",
        &["while it ran maybe", "SIGKILL"],
    );
    let pool = setting.daemon.pool();
    let began = Instant::now();
    let threads: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let mut connection = setting.daemon.client();
            std::thread::spawn(move || {
                let (mut right, mut crashed) = (0, 0);
                for n in 0..CALLS / CLIENTS {
                    let params = json!([client, n, "x".repeat(n % 200)]);
                    let answer = call(&mut connection, "maybe", &params);
                    if answer["out"] == "maybe" {
                        assert_eq!(answer["result"], params);
                        right += 1;
                    } else {
                        assert_eq!(answer["result"]["name"], "crashed", "{answer}");
                        assert_eq!(answer["result"]["started"], true, "{answer}");
                        crashed += 1;
                    }
                }
                (right, crashed)
            })
        })
        .collect();
    let (mut right, mut crashed, mut zombies) = (0, 0, 0);
    for thread in threads {
        while !thread.is_finished() {
            zombies = zombies.max(process::zombies(pool).len());
            std::thread::yield_now();
        }
        let (its_right, its_crashed) = thread.join().unwrap();
        right += its_right;
        crashed += its_crashed;
    }
    let took = began.elapsed();
    let deaths = || setting.daemon.log().matches("while it ran maybe").count();
    wait_for("each death in the log", PATIENCE, || deaths() >= crashed);
    let deaths = deaths();
    wait_for("four programs, no zombie", PATIENCE, || {
        process::children(pool).len() == 4 && process::zombies(pool).is_empty()
    });
    println!(
        "{CALLS} calls in {took:?}: {right} right, 0 wrong, {crashed} crashed by {deaths} deaths; \
         zombies: at most {zombies} at a look, 0 at the end"
    );
    assert_eq!(right + crashed, CALLS);
    assert_eq!(crashed, deaths);
    assert!(crashed > 100, "{crashed}");
    assert!(zombies <= 4);
    let Setting {
        mut daemon,
        dir: _dir,
    } = setting;
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    daemon.wait_group_gone();
}

/// Otherwise clients that leave could have all programs killed again and again.
#[test]
fn kills_for_abandoned_calls_are_throttled() {
    let keys = "when-abandoned = \"kill\"\nrespawn-burst = 1\nrespawn-max-delay = \"400ms\"";
    let setting = setting("", keys, &[]);
    let mut client = setting.daemon.client();
    let mut refused = Value::Null;
    wait_for("a refusal", PATIENCE, || {
        let answer = client.call(&json!({"in": "nap", "params": 60, "timeout_ms": 100}));
        refused = answer["result"].clone();
        let name = refused["name"].as_str();
        assert!(matches!(name, Some("timeout" | "crashed")), "{answer}");
        name == Some("crashed")
    });
    assert_eq!(refused["started"], false, "{refused}");
    let reason = refused["message"].as_str().unwrap();
    assert!(
        reason.contains("was killed for an abandoned call"),
        "{refused}"
    );
    wait_for("a recovery", PATIENCE, || {
        result(&mut client, "echo", &json!(1)) == 1
    });
}

#[test]
fn a_method_has_a_rule_of_its_own_for_its_abandoned_calls() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    for (pool, method, is_killed) in [("finish", "kill", true), ("kill", "finish", false)] {
        let text = config(&program, "", "", &format!("when-abandoned = \"{pool}\""));
        let own = format!("[methods.nap]\nwhen-abandoned = \"{method}\"\n");
        let text = text.replace("[methods.nap]\n", &own);
        let daemon = Daemon::builder().config(&text).start();
        let mut client = daemon.client();
        let before = pid(&mut client);
        let answer = client.call(&json!({"in": "nap", "params": 2, "timeout_ms": 100}));
        assert_eq!(answer["result"]["name"], "timeout", "{answer}");
        assert_eq!(
            pid(&mut client) != before,
            is_killed,
            "{method} in a pool with {pool}"
        );
    }
}

/// A service manager may send SIGTERM to all processes, and workers need a pool process until another one serves.
#[test]
fn a_pool_process_that_gets_term_serves_until_its_successor_does() {
    let setting = setting("", "", &[]);
    let daemon = &setting.daemon;
    let before = daemon.pool();
    let mut client = daemon.client();
    client.send(r#"{"in": "nap", "params": 1.5}"#);
    daemon.wait_busy(1);
    kill(Pid::from_raw(before), Signal::SIGTERM).unwrap();
    wait_for("its successor", PATIENCE, || daemon.pool() != before);
    assert_eq!(result(&mut daemon.client(), "echo", &json!(1)), 1);
    assert_eq!(client.recv_json()["result"], 1.5);
    wait_for("its end", PATIENCE, || !process::runs(before));
    assert_eq!(daemon.status()["deaths"], json!([]));
}

#[test]
fn programs_that_are_replaced_often_do_not_fill_the_log() {
    let setting = setting("", "max-calls = 1", &[]);
    let mut client = setting.daemon.client();
    wait_for("many programs", PATIENCE, || {
        assert_eq!(result(&mut client, "echo", &json!(1)), 1);
        setting.daemon.status()["pools"][0]["starts"].as_u64() > Some(10)
    });
    let lines = setting
        .daemon
        .log()
        .matches("has reached max-calls")
        .count();
    assert!((1..=5).contains(&lines), "{lines} lines");
}
