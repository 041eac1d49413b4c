//! Runs everything at once, for any time, while twelve kinds of clients call. Workers, programs, acceptors and
//! sessions are killed, workers are stopped. There are good and bad reloads, upgrades and other counts, too few
//! descriptors, too little memory, a full log, slow and disconnecting clients. `tests/chaos --minutes 30`
//! is the command.
//!
//! `chaos_acts` has the actions, `chaos_ledger` decides what may be lost by them. At the end everything
//! is as before.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::faults::chaos_acts::Chaos;
use crate::faults::chaos_ledger::Told;
use crate::lifecycle::reload_matrix::{SHAPES, plan};
use crate::lifecycle::worker_deaths::Weight;
use crate::support::load::{Load, Plan, Tally};
use crate::support::wire::DIALECTS;
use crate::support::{
    Daemon, Dawdlers, Dice, PATIENCE, Sweep, alone, from_environment, pass, process, wait_for,
};

/// Short deadlines, so that they expire often.
pub fn config(count: usize, threads: usize) -> String {
    format!(
        "[log]
file = \"daemon.log\"
[workers]
count = {count}
threads = {threads}
heartbeat-timeout = \"4s\"
drain-timeout = \"10s\"
boot-timeout = \"10s\"
respawn-max-delay = \"1s\"
[methods.echo]
builtin = \"echo\"
[methods.sleep]
builtin = \"sleep\"
[methods.cat]
command = [\"cat\"]
output = \"json\"
[methods.mirror]
pool = \"mirror\"
[pools.mirror]
processes = 1
command = [\"python3\", \"-IS\", \"mirror.py\"]
directory = \".\"
ready = \"message\"
respawn-max-delay = \"0s\"
"
    )
}

/// The isolated listener, behind the test's own.
const ISOLATED: &str =
    "[[listen]]\naddress = \"127.0.0.2:0\"\nisolation = \"connection\"\nspare = 2\n";
/// Its acceptor and the processes that wait for connections.
const ACCEPTORS: usize = 3;

/// A pool program that returns its params after some time, in which it can be killed.
const MIRROR: &str = r#"
import json, socket, struct, time

calls = socket.socket(fileno=3)

def take(length):
    data = b""
    while len(data) < length:
        piece = calls.recv(length - len(data))
        if not piece:
            raise SystemExit
        data += piece
    return data

def say(answer):
    body = json.dumps(answer).encode()
    calls.sendall(struct.pack("<I", len(body)) + body)

say({"out": "ready"})
while True:
    length, = struct.unpack("<I", take(4))
    call = json.loads(take(length).decode())
    time.sleep(0.003)
    say({"out": call["in"], "result": call["params"]})
"#;

pub const COUNT: usize = 3;
const THREADS: usize = 4;

/// The methods, called in turn.
const METHODS: [&str; 9] = [
    "ping", "echo", "mirror", "ping", "sleep", "ping", "echo", "mirror", "cat",
];

/// Waits until the daemon has the same processes as at its start: the same number of workers (none of an older
/// generation), a keeper for each, the pool process, the acceptor, and no other process.
fn settle(daemon: &Daemon) {
    wait_for("a reload that is accepted", PATIENCE * 2, || {
        daemon.configure(&config(COUNT, THREADS));
        daemon.command(&["reload"]).status.success()
    });
    wait_for("only ready workers", PATIENCE, || {
        let workers = daemon.workers();
        workers.len() == COUNT && workers.iter().all(|it| it.state == "ready")
    });
    // The pool has one process with one program.
    wait_for(
        "only workers, keepers, the pool and acceptors",
        PATIENCE,
        || process::descendants(daemon.pid()).len() == 2 * COUNT + 2 + ACCEPTORS,
    );
}

/// Returns the whole log, before and after the log was full.
fn logs(daemon: &Daemon) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(&**daemon.dir()).unwrap() {
        let entry = entry.unwrap();
        let is_log = entry
            .file_name()
            .to_string_lossy()
            .starts_with("daemon.log");
        if is_log && entry.file_type().unwrap().is_file() {
            text += &String::from_utf8_lossy(&std::fs::read(entry.path()).unwrap());
        }
    }
    text
}

/// Keeps what is needed to investigate faults, until the next run.
fn keep(log: &str, deaths: &str, unexplained: &[String]) {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let faults = unexplained.join("\n");
    for (name, text) in [("log", log), ("deaths", deaths), ("faults", &faults)] {
        std::fs::write(dir.join(format!("chaos-{name}")), text).unwrap();
    }
    println!("the daemon's log and what is unexplained are kept in {dir:?}");
}

/// The methods that sessions are asked for. A session without an acceptor gets no link to a new pool process.
const SESSION_METHODS: [&str; 5] = ["ping", "echo", "sleep", "ping", "cat"];

fn isolated(daemon: &Daemon) -> SocketAddr {
    let address = daemon.status()["listeners"][1]["address"].clone();
    address.as_str().unwrap().parse().unwrap()
}

fn isolated_loads(address: SocketAddr) -> impl Iterator<Item = (String, Load)> {
    DIALECTS.into_iter().map(move |dialect| {
        let (name, plan) = (SHAPES[1].0, plan(address, dialect, &SHAPES[1]));
        let load = Load::of(Plan {
            clients: 2,
            pause: Duration::from_millis(2),
            methods: &SESSION_METHODS,
            ..plan
        });
        (format!("isolated, {dialect:?}, {name}"), load)
    })
}

fn loads(daemon: &Daemon) -> Vec<(String, Load)> {
    let kinds = DIALECTS
        .into_iter()
        .flat_map(|dialect| SHAPES.iter().map(move |shape| (dialect, shape)));
    let loads = kinds.map(|(dialect, shape)| {
        let load = Load::of(Plan {
            clients: 2,
            pause: Duration::from_millis(2),
            methods: &METHODS,
            ..plan(daemon.address(), dialect, shape)
        });
        (format!("{dialect:?}, {}", shape.0), load)
    });
    loads.collect()
}

#[test]
#[ignore = "takes a minute, or PREFORKD_CHAOS_MINUTES; tests/run runs it"]
fn everything_at_once_costs_only_what_was_on_the_workers_that_were_killed() {
    let _alone = alone();
    let time = Duration::from_secs(60 * from_environment("PREFORKD_CHAOS_MINUTES", 1));
    let dice = Dice::of_the_day("PREFORKD_CHAOS_SEED");
    let mut daemon = Daemon::builder()
        .file("mirror.py", MIRROR)
        .config(&config(COUNT, THREADS))
        .listen(ISOLATED)
        .start();
    settle(&daemon);
    let sweep = Sweep::of(&daemon);
    let before = Weight::of(daemon.pid());
    let isolated = isolated(&daemon);
    let mut loads = loads(&daemon);
    loads.extend(isolated_loads(isolated));
    let dawdlers = Dawdlers::start(daemon.address(), 10);
    let mut chaos = Chaos::new(&daemon, isolated, dice);
    println!("memory is taken by {}", chaos.means());
    let end = Instant::now() + time;
    while Instant::now() < end {
        chaos.act();
        pass(Duration::from_millis(100 + chaos.dice.roll(700) as u64));
        chaos.mend(false);
        assert!(process::runs(daemon.pid()), "the master is gone");
    }
    chaos.mend(true);
    let stopped = loads.into_iter().map(|(name, load)| (name, load.stop()));
    let mut tallies: Vec<(String, Tally)> = stopped.collect();
    let slow = dawdlers.stop().into_iter();
    tallies.extend(slow.map(|it| ("a slow one".to_owned(), it)));
    settle(&daemon);
    // No log line is outstanding.
    let log = logs(&daemon);
    let told = Told::of(&log, &chaos.ledger);
    let mut faults = Vec::new();
    for (name, tally) in &tallies {
        println!("{name}: {}", tally.line());
        faults.extend(tally.faults.iter().map(|fault| (name.as_str(), fault)));
    }
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    for what in chaos.ledger.done() {
        *counts.entry(what).or_default() += 1;
    }
    println!("{counts:?}");
    println!("{}", chaos.ledger.account(&faults, &told));
    for line in log.lines() {
        assert!(!line.contains("panic"), "{line}");
    }
    let unexplained = chaos.ledger.unexplained(&faults, &told);
    if !unexplained.is_empty() {
        keep(&log, &chaos.ledger.deaths(), &unexplained);
    }
    // Print the first one of each kind, and their number.
    let mut kinds = BTreeMap::new();
    for text in &unexplained {
        let what = text.split_once("what: ").map_or("", |(_, what)| what);
        let what: String = what.chars().take(160).collect();
        kinds.entry(what).or_insert((0, text)).0 += 1;
    }
    let shown: Vec<_> = kinds.values().take(20).collect();
    assert!(unexplained.is_empty(), "{}: {shown:#?}", unexplained.len());
    let after = Weight::of(daemon.pid());
    println!("the master before {before:?}, after {after:?}");
    assert_eq!(after.descriptors, before.descriptors);
    assert!(after.rss_bytes < before.rss_bytes + (4 << 20));
    sweep.assert_as_many(&daemon);
    let all_pids = process::descendants(daemon.pid());
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    daemon.wait_group_gone();
    let left: Vec<i32> = all_pids
        .into_iter()
        .filter(|it| process::runs(*it))
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}
