//! Tests clients that do not read and clients that write slowly: each uses a bounded amount, is cut off
//! in the end, and does not affect the others.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use serde_json::{Value, json};

use crate::support::load::{Load, Shape};
use crate::support::{
    Client, Daemon, PATIENCE, Sweep, alone, example, frame, pass, process, raise_descriptor_limit,
    wait_for,
};

const MIB: u64 = 1 << 20;

/// Sends the same call until the server briefly takes no more of them.
fn fill(client: &Client, call: &str) -> usize {
    let mut stream = client.stream();
    stream.set_nonblocking(true).unwrap();
    let bytes = frame(call.as_bytes());
    let (mut sent, mut at) = (0, 0);
    let mut refused = 0;
    while refused < 20 && sent < 100_000 {
        match stream.write(&bytes[at..]) {
            Ok(length) => {
                refused = 0;
                at += length;
                if at == bytes.len() {
                    (sent, at) = (sent + 1, 0);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                refused += 1;
                pass(Duration::from_millis(20));
            }
            Err(error) => panic!("{error}"),
        }
    }
    stream.set_nonblocking(false).unwrap();
    sent
}

/// Runs a client that never reads the 100 kB answers of a method. Returns how much the worker grows, and
/// checks whether the client is cut off. Another client continues meanwhile.
fn never_reading(daemon: &Daemon, call: &str) -> u64 {
    let sweep = Sweep::of(daemon);
    let pid = daemon.ready_workers()[0];
    // Memory that threads and allocator keep is not part of a connection.
    let mut warm = daemon.client();
    for _ in 0..20 {
        for _ in 0..20 {
            warm.send(call);
        }
        for _ in 0..20 {
            warm.recv().unwrap();
        }
    }
    drop(warm);
    let before = process::anonymous_bytes(pid).unwrap();
    let others = Load::start(daemon.address(), 2, Shape::Lasting);
    let client = daemon.client();
    // Use a small window, because bytes in the kernel are not part of it either.
    setsockopt(client.stream(), sockopt::RcvBuf, &8192).unwrap();
    let sent = fill(&client, call);
    let mut most = 0;
    wait_for(
        "the client that never reads to be cut off",
        PATIENCE,
        || {
            most = most.max(process::anonymous_bytes(pid).unwrap());
            daemon.log().contains("write-timeout")
        },
    );
    let growth = most.saturating_sub(before);
    println!(
        "{}: {sent} calls sent, never read: the worker grew by {} kB",
        &call[..call.len().min(40)],
        growth / 1000
    );
    others
        .stop()
        .assert_whole("beside a client that never reads");
    drop(client);
    sweep.assert_same(daemon);
    growth
}

#[test]
fn a_client_that_never_reads_inline_answers_costs_a_mebibyte_and_one_answer() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\n[limits]\nwrite-timeout = \"2s\"\n[methods.echo]\n\
             builtin = \"echo\"\n",
        )
        .start();
    let params = "x".repeat(100_000);
    let growth = never_reading(
        &daemon,
        &format!(r#"{{"in": "echo", "params": "{params}"}}"#),
    );
    assert!(growth < MIB + 100_000, "{growth} bytes");
}

#[test]
fn a_client_that_never_reads_threaded_answers_costs_a_mebibyte_and_one_answer() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\nthreads = 8\n[limits]\nwrite-timeout = \"2s\"\n")
        .program(example("minimal"))
        .start();
    let growth = never_reading(&daemon, r#"{"in": "letters", "params": 100000}"#);
    assert!(growth < MIB + 100_000, "{growth} bytes");
}

/// The params of calls that wait for a thread use a few megabytes and a frame per client, and not as many
/// frames as limits.pipeline allows calls.
#[test]
fn large_params_that_wait_are_held_back_too() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\nthreads = 1\n[limits]\nframe = \"1MiB\"\n[methods.sleep]\n\
             builtin = \"sleep\"\n",
        )
        .start();
    let sweep = Sweep::of(&daemon);
    let pid = daemon.ready_workers()[0];
    let before = process::rss_bytes(pid).unwrap();
    let client = daemon.client();
    // Spaces behind the number are no part of its params.
    let filler = "x".repeat(500_000);
    let call = format!(r#"{{"in": "sleep", "params": [3, "{filler}"], "id": "{filler}"}}"#);
    // A slow call first, so that the others wait.
    let mut first = client.second();
    first.send(r#"{"in": "sleep", "params": 1}"#);
    let sent = fill(&client, &call);
    let growth = process::rss_bytes(pid).unwrap().saturating_sub(before);
    println!(
        "{sent} calls of 1 MB sent ahead: the worker grew by {} kB",
        growth / 1000
    );
    assert!(growth < 8 * MIB, "{growth} bytes");
    drop(first);
    client.reset();
    sweep.assert_same(&daemon);
}

/// Many clients send much and finish nothing: there is a limit for all together, they get an error, and
/// other clients are not affected.
#[test]
fn unfinished_calls_have_a_limit_of_all_together_and_what_is_beyond_is_told() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\n[limits]\nframe = \"4MiB\"\nunfinished = \"32MiB\"\n\
             read-timeout = \"10m\"\n",
        )
        .expect_log("limits.unfinished")
        .start();
    let sweep = Sweep::of(&daemon);
    let pid = daemon.ready_workers()[0];
    let before = process::rss_bytes(pid).unwrap();
    let load = Load::start(daemon.address(), 2, Shape::Lasting);
    let mut probe = daemon.client();
    let length = 4 << 20;
    let rest = [b' '; 10];
    let blanks = vec![b' '; length as usize - rest.len()];
    let partial = [&u32::to_le_bytes(length)[..], &blanks].concat();
    let mut clients = Vec::new();
    for _ in 0..60 {
        let mut client = daemon.client();
        client.send_raw(&partial);
        clients.push(client);
        // Each call is a turn of the loop, which reads a part of the input.
        for _ in 0..100 {
            probe.call(&json!({"in": "ping"}));
        }
        let rss = process::rss_bytes(pid).unwrap().saturating_sub(before);
        assert!(rss < 48 * MIB, "{rss} bytes");
    }
    // A call from a client with less makes one of the others pay.
    let is_told = |client: &Client| {
        client.stream().set_nonblocking(true).unwrap();
        let is_told = client.stream().peek(&mut [0]).is_ok();
        client.stream().set_nonblocking(false).unwrap();
        is_told
    };
    let (mut refused, mut holding): (Vec<_>, Vec<_>) = clients.into_iter().partition(is_told);
    for client in &mut refused {
        let error = client.recv_json();
        assert_eq!(error["result"]["name"], "overloaded", "{error}");
        assert_eq!(error["result"]["started"], false, "{error}");
    }
    let (kept, refused_ones) = (holding.len(), refused.len());
    println!("{kept} of 60 partial frames of 4 MiB kept, {refused_ones} refused");
    assert!((6..=8).contains(&kept), "{kept}");
    // A refused client continues behind the dropped input.
    for client in &mut refused {
        client.send_raw(&rest);
        assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
    }
    // The kept calls can be finished, and then there is room again.
    for client in &mut holding {
        client.send_raw(&rest);
        assert_eq!(client.recv_json()["result"]["name"], "parse-error");
    }
    let mut late = daemon.client();
    late.send_raw(&partial);
    late.send_raw(&rest);
    assert_eq!(late.recv_json()["result"]["name"], "parse-error");
    // The same test with lines: a refused client can continue after the end of the line.
    let lines: Vec<Client> = (0..12)
        .map(|_| {
            let mut client = daemon.client();
            client.send_raw(&blanks);
            (0..100).for_each(|_| drop(probe.call(&json!({"in": "ping"}))));
            client
        })
        .collect();
    let (lines, kept): (Vec<_>, Vec<_>) = lines.into_iter().partition(is_told);
    assert!((6..=8).contains(&kept.len()), "{}", kept.len());
    for client in &lines {
        let mut reader = BufReader::new(client.stream());
        let mut answer = String::new();
        reader.read_line(&mut answer).unwrap();
        assert!(answer.contains("overloaded"), "{answer}");
        (&mut client.stream())
            .write_all(b"the rest\n{\"in\": \"ping\"}\n")
            .unwrap();
        answer.clear();
        reader.read_line(&mut answer).unwrap();
        assert!(answer.contains("pong"), "{answer}");
    }
    load.stop().assert_whole("beside unfinished calls");
    drop((holding, refused, lines, kept, late, probe));
    sweep.assert_same(&daemon);
}

/// Waits until the only worker has read this number of calls, and returns its resident memory.
#[track_caller]
fn rss_after_calls(daemon: &Daemon, calls: u64) -> u64 {
    wait_for("the calls to be read", PATIENCE, || {
        daemon.workers()[0].calls >= calls
    });
    process::rss_bytes(daemon.workers()[0].pid).unwrap()
}

/// The limit is 16 MiB. At the limit, the connections with the most untaken answers are not read, and the
/// others are served. At twice the limit, the connection with the most is closed.
#[test]
fn unread_answers_of_many_connections_are_bounded() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\ndrain-timeout = \"2m\"\n[limits]\nframe = \"8MiB\"\n\
             unfinished = \"16MiB\"\nwrite-timeout = \"10m\"\ntimeout = \"2m\"\n[methods.echo]\n\
             builtin = \"echo\"\n[methods.sleep]\nbuiltin = \"sleep\"\n",
        )
        .expect_log("limits.unfinished")
        .start();
    let sweep = Sweep::of(&daemon);
    let before = process::rss_bytes(daemon.ready_workers()[0]).unwrap();
    let mut healthy = daemon.client();
    // Its second answer waits for its first one: 100 kB, which is below the limit of one connection.
    let holding = daemon.client();
    let mut second = holding.second();
    second.send(r#"{"in": "sleep", "params": 100}"#);
    second.send(&json!({"in": "echo", "params": "x".repeat(100_000)}).to_string());
    let call = json!({"in": "echo", "params": "x".repeat(7_500_000)}).to_string();
    let mut calls = 2;
    let mut most = 0;
    let unread: Vec<Client> = (0..20)
        .map(|_| {
            let mut client = daemon.client();
            setsockopt(client.stream(), sockopt::RcvBuf, &8192).unwrap();
            client.send(&call);
            calls += 1;
            most = most.max(rss_after_calls(&daemon, calls));
            client
        })
        .collect();
    let growth = most.saturating_sub(before);
    let open = daemon.workers()[0].connections;
    println!(
        "20 answers of 7.5 MB, never read: the worker grew by {} kB, {open} connections are left",
        growth / 1000
    );
    assert!(growth < 56 * MIB, "{growth} bytes");
    assert!((5..=13).contains(&open), "{open}");
    // The worker is at the limit: no call is taken from the connections with the most answers, and one
    // with few is served.
    let ping = r#"{"in": "ping", "id": 1}"#;
    second.send(ping);
    assert_eq!(second.recv_json()["id"], 1);
    calls += 1;
    let mut unread: Vec<Client> = unread;
    for client in &mut unread {
        // Half of them were closed.
        let _ = client.try_send(ping);
    }
    for _ in 0..100 {
        assert_eq!(healthy.call(&json!({"in": "ping"}))["out"], "pong");
    }
    calls += 100;
    assert_eq!(rss_after_calls(&daemon, calls).min(1), 1);
    assert_eq!(daemon.workers()[0].calls, calls, "it was read");
    drop(unread);
    let answer = healthy.call(&serde_json::from_str(&call).unwrap());
    assert_eq!(answer["result"].as_str().map(str::len), Some(7_500_000));
    drop(second);
    holding.reset();
    drop(healthy);
    sweep.assert_same(&daemon);
}

/// Answers that wait for another member of their batch count as untaken.
#[test]
fn held_answers_of_batches_are_bounded_too() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\nthreads = 1\ndrain-timeout = \"2m\"\n[limits]\nframe = \"8MiB\"\n\
             unfinished = \"16MiB\"\ntimeout = \"2m\"\n[methods.echo]\nbuiltin = \"echo\"\n\
             [methods.slow]\ncommand = [\"sleep\", \"100\"]\n[methods.quick]\n\
             command = [\"true\"]\n",
        )
        .expect_log("limits.unfinished")
        .start();
    // The thread keeps a descriptor for commands.
    daemon.client().call(&json!({"in": "quick"}));
    let sweep = Sweep::of(&daemon);
    let before = process::rss_bytes(daemon.ready_workers()[0]).unwrap();
    let batch = json!([
        {"jsonrpc": "2.0", "method": "slow", "id": 0},
        {"jsonrpc": "2.0", "method": "echo", "params": ["x".repeat(4_000_000)], "id": 1},
    ])
    .to_string();
    let mut most = 0;
    let clients: Vec<Client> = (1..=16)
        .map(|number| {
            let mut client = daemon.client();
            client.send(&batch);
            most = most.max(rss_after_calls(&daemon, 2 * number + 1));
            client
        })
        .collect();
    let growth = most.saturating_sub(before);
    let open = daemon.workers()[0].connections;
    println!(
        "16 batches of 4 MB with a slow member: the worker grew by {} kB, {open} are left",
        growth / 1000
    );
    assert!(growth < 48 * MIB, "{growth} bytes");
    assert!((6..=8).contains(&open), "{open}");
    clients.into_iter().for_each(Client::reset);
    sweep.assert_same(&daemon);
}

/// At the limit a call whose answer would wait is refused, so that no connection is closed.
#[test]
fn a_batch_gets_no_further_answers_that_wait_at_the_limit() {
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\nthreads = 1\n[limits]\nframe = \"8MiB\"\nunfinished = \"16MiB\"\n\
             [methods.echo]\nbuiltin = \"echo\"\n[methods.slow]\ncommand = [\"sleep\", \"100\"]\n",
        )
        .start();
    let echo =
        |id| json!({"jsonrpc": "2.0", "method": "echo", "params": ["x".repeat(15_000)], "id": id});
    let slow = json!({"jsonrpc": "2.0", "method": "slow", "id": 0});
    let batch = Value::from_iter(std::iter::once(slow).chain((1..400).map(echo))).to_string();
    let mut clients: Vec<Client> = (0..5).map(|_| daemon.client()).collect();
    for (client, calls) in clients.iter_mut().zip((400..).step_by(400)) {
        client.send(&batch);
        // Send one batch after the other. Otherwise their bytes would count as unfinished calls at the same time, and
        // reach that limit together.
        wait_for("the calls of a batch", PATIENCE, || {
            daemon.workers()[0].calls >= calls
        });
    }
    // 30 MB were requested, and 16 MiB may wait. A batch with less than half of the largest one gets some
    // more, so in the worst case two of the five have half of their calls refused.
    wait_for("calls that are refused", PATIENCE, || {
        let worker = &daemon.workers()[0];
        worker.errors > 300
    });
    assert_eq!(daemon.workers()[0].connections, 5, "none is closed");
    let mut healthy = daemon.client();
    assert_eq!(healthy.call(&json!({"in": "ping"}))["out"], "pong");
    clients.into_iter().for_each(Client::reset);
}

/// The default limit is a part of the machine's memory. The answers of batches do not fill all of it.
#[test]
fn batches_are_refused_members_from_64_mib_of_answers_on_whatever_the_limit() {
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\n[limits]\nunfinished = \"4GiB\"\n\
             [methods.echo]\nbuiltin = \"echo\"\n[methods.slow]\ncommand = [\"sleep\", \"100\"]\n",
        )
        .start();
    let echo =
        |id| json!({"jsonrpc": "2.0", "method": "echo", "params": ["x".repeat(15_000)], "id": id});
    let slow = json!({"jsonrpc": "2.0", "method": "slow", "id": 0});
    let batch = Value::from_iter(std::iter::once(slow).chain((1..700).map(echo))).to_string();
    let worker = daemon.ready_workers()[0];
    let before = process::rss_bytes(worker).unwrap();
    let mut clients: Vec<Client> = (0..24).map(|_| daemon.client()).collect();
    for (client, calls) in clients.iter_mut().zip((700..).step_by(700)) {
        client.send(&batch);
        wait_for("the calls of a batch", PATIENCE, || {
            daemon.workers()[0].calls >= calls
        });
    }
    // 252 MB were requested. Each batch gets half of the largest one, even at the limit.
    let refused = daemon.workers()[0].errors;
    let growth = process::rss_bytes(worker).unwrap().saturating_sub(before);
    println!(
        "24 batches of 10 MB with a slow member: {refused} of {} members refused, the worker grew by {} kB",
        24 * 699,
        growth / 1000
    );
    assert!(refused > 4000, "{refused}");
    assert_eq!(daemon.workers()[0].connections, 24, "none is closed");
    clients.into_iter().for_each(Client::reset);
}

/// A client that was held back gets every answer when it reads.
#[test]
fn a_late_reader_gets_every_answer() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n")
        .program(example("minimal"))
        .start();
    let mut client = daemon.client();
    setsockopt(client.stream(), sockopt::RcvBuf, &100_000).unwrap();
    let calls = 300;
    for id in 0..calls {
        client.send(&json!({"in": "letters", "params": 50_000, "id": id}).to_string());
    }
    // Then the worker is held back by its answers, and the threads have nothing to do.
    wait_for("a worker that is held back", PATIENCE, || {
        daemon.workers()[0].running == 0
    });
    let mut seen = vec![0; calls];
    for _ in 0..calls {
        let answer = client.recv_json();
        assert_eq!(answer["result"].as_str().map(str::len), Some(50_000));
        seen[answer["id"].as_u64().unwrap() as usize] += 1;
    }
    assert!(seen.iter().all(|&times| times == 1));
    println!("{calls} answers of 50 kB, each once, to a client that read late");
}

/// Half of them stop within the length, half within the body; now and then each sends one byte.
#[test]
fn two_thousand_slow_senders_cost_the_others_nothing_and_are_cut() {
    const SLOW: usize = 2000;
    let _alone = alone();
    let limit = raise_descriptor_limit();
    assert!(limit > SLOW as u64 + 200, "only {limit} descriptors");
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\n[limits]\nread-timeout = \"2s\"\n")
        .start();
    let sweep = Sweep::of(&daemon);
    let probe = || {
        let pause = Duration::from_millis(5);
        Load::paced(daemon.address(), 2, Shape::Lasting, pause)
    };
    let calm = probe();
    pass(Duration::from_secs(1));
    let calm = calm.stop();
    let body = frame(br#"{"in": "ping", "params": "so slow that it is never whole"}"#);
    let mut slow: Vec<TcpStream> = (0..SLOW)
        .map(|number| {
            let mut stream = TcpStream::connect(daemon.address()).unwrap();
            let begun = if number % 2 == 0 { 1 } else { 10 };
            stream.write_all(&body[..begun]).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream
        })
        .collect();
    let attacked = probe();
    for at in 1..4 {
        pass(Duration::from_millis(300));
        for (number, stream) in slow.iter_mut().enumerate() {
            let begun = if number % 2 == 0 { 0 } else { 9 };
            // It was already cut off if it was among the first.
            let _ = stream.write_all(&body[begun + at..][..1]);
        }
    }
    let mut cut = 0;
    for stream in &mut slow {
        let mut byte = [0];
        match std::io::Read::read(stream, &mut byte) {
            Ok(1..) => panic!("an answer to half a call"),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            _ => cut += 1,
        }
    }
    let attacked = attacked.stop();
    println!("calm: {}", calm.line());
    attacked.assert_whole(&format!("beside {SLOW} slow senders"));
    println!("{cut} of {SLOW} slow senders cut at limits.read-timeout");
    assert_eq!(cut, SLOW);
    drop(slow);
    sweep.assert_same(&daemon);
}

#[test]
fn idle_connections_are_closed_in_order_and_busy_ones_are_not() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\n[limits]\nidle-timeout = \"2s\"\n[methods.sleep]\n\
             builtin = \"sleep\"\n",
        )
        .start();
    let sweep = Sweep::of(&daemon);
    let (mut silent, mut once) = (daemon.client(), daemon.client());
    let (mut waits, mut busy) = (daemon.client(), daemon.client());
    once.call(&json!({"in": "ping"}));
    waits.send(r#"{"in": "sleep", "params": 5}"#);
    let mut calls = 0;
    wait_for("the idle ones to be closed", PATIENCE, || {
        busy.call(&json!({"in": "ping"}));
        calls += 1;
        daemon.workers()[0].connections == 2
    });
    silent.assert_closed();
    once.assert_closed();
    assert_eq!(
        waits.recv_json()["out"],
        "sleep",
        "it was no idle connection"
    );
    waits.assert_closed();
    println!("{calls} calls on a connection that was kept, 3 idle ones closed");
    busy.assert_closed();
    sweep.assert_same(&daemon);
}

#[test]
fn the_time_that_a_call_takes_is_no_idle_time() {
    let _alone = alone();
    let config = "[limits]\nidle-timeout = \"1s\"\n[methods.sleep]\nbuiltin = \"sleep\"\n";
    let daemon = Daemon::builder().config(config).start();
    let mut client = daemon.client();
    let call = json!({"in": "sleep", "params": 1.9});
    let sent = Instant::now();
    assert_eq!(client.call(&call)["out"], "sleep");
    client.assert_closed();
    let lived = sent.elapsed();
    println!("closed {lived:.2?} after a call of 1.9 s was sent");
    assert!(lived > Duration::from_millis(2400), "{lived:?}");
}
