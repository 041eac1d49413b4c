//! Everything at once, for as long as one likes: workers killed and stopped, reloads good and
//! bad, upgrades, other counts, no descriptors, no room for the log, clients that dawdle and break
//! off, while nine kinds of clients call. `tests/chaos --minutes 30` is the command for it.
//!
//! The ledger: every call has a number of its own, and whoever ends a worker notes first whose
//! connections it holds. What is lost must have been on one of those; at the end everything is
//! back where it was.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::lifecycle::Weight;
use crate::nine::{SHAPES, plan};
use crate::support::load::{Fault, Load, Plan, Tally};
use crate::support::wire::DIALECTS;
use crate::support::{
    Client, Daemon, Dice, PATIENCE, Sweep, alone, from_environment, pass, process, victim, wait_for,
};

/// Short deadlines, so that what waits for one happens often.
fn config(count: usize, threads: usize) -> String {
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
"
    )
}

/// Configurations that are refused.
const BROKEN: [&str; 4] = [
    "[workers\ncount = 2\n",
    "[workers]\ncount = 2\nthread = 2\n",
    "[log]\nfile = \"no/such/directory/log\"\n",
    "[methods.m]\ncommand = [\"/no/such/program\"]\n",
];

/// A worker that leaves at once, but may accept one more client while it is told.
const QUIT: &str = "worker quit";

const COUNT: usize = 3;
const THREADS: usize = 4;

/// What is done to the daemon.
struct Chaos<'a> {
    daemon: &'a Daemon,
    dice: Dice,
    /// The ports of clients whose worker was ended, and when: a port is used again and again.
    forfeited: HashMap<u16, Vec<Instant>>,
    /// What was done, and when it was begun.
    done: Vec<(Instant, &'static str)>,
    /// Limits to be lifted and logs to be mended, when their time comes.
    later: Vec<(Instant, Mend)>,
}

/// Does one thing, if it can be done right now.
type Act<'a> = fn(&mut Chaos<'a>) -> bool;

#[derive(Debug, Clone, Copy)]
enum Mend {
    Descriptors(i32),
    Log,
}

impl<'a> Chaos<'a> {
    fn act(&mut self) {
        let kinds: [(&'static str, Act<'a>); 17] = [
            ("worker killed", Self::kill_worker),
            ("worker killed", Self::kill_worker),
            (QUIT, Self::quit_worker),
            ("worker retired", Self::retire_worker),
            ("worker stopped for a moment", Self::stop_worker),
            ("worker stopped for good", Self::abandon_worker),
            ("master stopped for a moment", Self::stop_master),
            ("good HUP", Self::good_hup),
            ("good reload", Self::good_reload),
            ("bad HUP", Self::bad_hup),
            ("bad reload", Self::bad_reload),
            ("USR2", Self::upgrade),
            ("scaled", Self::scale),
            ("no descriptors", Self::squeeze_descriptors),
            ("log full", Self::fill_log),
            ("storm of signals", Self::storm),
            ("clients broke off", Self::break_off),
        ];
        let (name, act) = kinds[self.dice.roll(kinds.len())];
        let begin = Instant::now();
        if act(self) {
            self.done.push((begin, name));
        }
    }

    fn mend(&mut self, all: bool) {
        let now = Instant::now();
        let later = std::mem::take(&mut self.later);
        for (at, mend) in later {
            if at > now && !all {
                self.later.push((at, mend));
                continue;
            }
            match mend {
                Mend::Descriptors(pid) => limit(pid, "4096:"),
                Mend::Log => {
                    let _ = std::fs::remove_file(self.daemon.dir().join("daemon.log"));
                    self.daemon.signal(Signal::SIGUSR1);
                }
            }
        }
    }

    fn soon(&mut self, at_most_ms: usize, mend: Mend) {
        let wait = Duration::from_millis(50 + self.dice.roll(at_most_ms) as u64);
        self.later.push((Instant::now() + wait, mend));
    }

    fn worker(&mut self) -> Option<i32> {
        let mut workers = process::workers(self.daemon.pid());
        workers.retain(|pid| process::runs(*pid) && process::title(*pid).contains("worker"));
        (!workers.is_empty()).then(|| self.dice.pick(&workers))
    }

    /// Stops a worker whose end may follow, and gives up its clients.
    fn doom(&mut self) -> Option<i32> {
        let pid = self.worker()?;
        let ports = victim::stop(pid, self.daemon.address())?;
        let now = Instant::now();
        for port in ports {
            self.forfeited.entry(port).or_default().push(now);
        }
        Some(pid)
    }

    fn kill_worker(&mut self) -> bool {
        let doomed = self.doom();
        doomed.is_some_and(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok())
    }

    fn quit_worker(&mut self) -> bool {
        let Some(pid) = self.doom() else {
            return false;
        };
        // what it accepts between its waking and its end: `unexplained`
        let _ = kill(Pid::from_raw(pid), Signal::SIGQUIT);
        kill(Pid::from_raw(pid), Signal::SIGCONT).is_ok()
    }

    fn retire_worker(&mut self) -> bool {
        let worker = self.worker();
        worker.is_some_and(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM).is_ok())
    }

    fn stop_worker(&mut self) -> bool {
        let Some(pid) = self.worker() else {
            return false;
        };
        let stopped = kill(Pid::from_raw(pid), Signal::SIGSTOP).is_ok();
        // far less than heartbeat-timeout, for it is not to be ended
        pass(Duration::from_millis(self.dice.roll(700) as u64));
        let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
        stopped
    }

    /// The master has to find out, and end it.
    fn abandon_worker(&mut self) -> bool {
        self.doom().is_some()
    }

    fn stop_master(&mut self) -> bool {
        self.daemon.signal(Signal::SIGSTOP);
        let wait = Duration::from_millis(self.dice.roll(3000) as u64);
        pass(wait);
        self.daemon.signal(Signal::SIGCONT);
        true
    }

    fn configure_well(&mut self) {
        let (count, threads) = (2 + self.dice.roll(3), 2 + self.dice.roll(6));
        self.daemon.configure(&config(count, threads));
    }

    fn configure_badly(&mut self) {
        let text = self.dice.pick(&BROKEN);
        self.daemon.configure(text);
    }

    fn good_hup(&mut self) -> bool {
        self.configure_well();
        self.daemon.signal(Signal::SIGHUP);
        true
    }

    /// Its verdict depends on who else is at work: a new worker may be killed before it is ready.
    fn good_reload(&mut self) -> bool {
        self.configure_well();
        let done = self.daemon.command(&["reload"]);
        let code = done.status.code();
        assert!(matches!(code, Some(0 | 1)), "{done:?}");
        true
    }

    fn bad_hup(&mut self) -> bool {
        self.configure_badly();
        self.daemon.signal(Signal::SIGHUP);
        true
    }

    fn bad_reload(&mut self) -> bool {
        self.configure_badly();
        let done = self.daemon.command(&["reload"]);
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        true
    }

    fn upgrade(&mut self) -> bool {
        self.daemon.signal(Signal::SIGUSR2);
        true
    }

    fn scale(&mut self) -> bool {
        match self.dice.roll(3) {
            0 => self.daemon.signal(Signal::SIGTTIN),
            1 => self.daemon.signal(Signal::SIGTTOU),
            _ => {
                let count = (1 + self.dice.roll(5)).to_string();
                let _ = self.daemon.command(&["scale", &count]);
            }
        }
        true
    }

    /// The master or a worker can open nothing more for a while.
    fn squeeze_descriptors(&mut self) -> bool {
        let master = self.daemon.pid();
        let pid = match self.dice.roll(3) {
            0 => master,
            _ => self.worker().unwrap_or(master),
        };
        limit(pid, &format!("{}:", process::descriptors(pid)));
        self.soon(1000, Mend::Descriptors(pid));
        true
    }

    fn fill_log(&mut self) -> bool {
        if self.later.iter().any(|(_, it)| matches!(it, Mend::Log)) {
            return false;
        }
        let (log, aside) = ("daemon.log", format!("daemon.log.{}", self.done.len()));
        let dir = self.daemon.dir();
        let _ = std::fs::rename(dir.join(log), dir.join(aside));
        symlink("/dev/full", dir.join(log)).unwrap();
        self.daemon.signal(Signal::SIGUSR1);
        self.soon(2000, Mend::Log);
        true
    }

    fn storm(&mut self) -> bool {
        for _ in 0..50 {
            let signals = [Signal::SIGUSR1, Signal::SIGWINCH, Signal::SIGCHLD];
            let signal = self.dice.pick(&signals);
            self.daemon.signal(signal);
            if let Some(worker) = self.worker() {
                let _ = kill(Pid::from_raw(worker), signal);
            }
        }
        true
    }

    fn break_off(&mut self) -> bool {
        for _ in 0..20 {
            let mut client = self.daemon.client();
            let call = r#"{"in": "sleep", "params": 0.05}"#;
            let frame = crate::support::frame(call.as_bytes());
            let _ = client.try_send_raw(&frame[..1 + self.dice.roll(frame.len())]);
            client.reset();
        }
        true
    }

    /// The faults that neither an ended worker nor a want of descriptors explains, each with what
    /// had been done shortly before.
    fn unexplained(&self, faults: &[Fault]) -> Vec<String> {
        let explains = |fault: &Fault| {
            // told at once, or when what was stopped is ended at its deadline
            let in_time = |at: &Instant| {
                let since = fault.at.checked_duration_since(*at);
                since.is_some_and(|since| since < Duration::from_secs(18))
            };
            let times = self.forfeited.get(&fault.port);
            let forfeited = times.is_some_and(|times| times.iter().any(in_time));
            let quit = fault.closed && self.before(fault, 1000).any(|(_, what)| what == QUIT);
            forfeited || quit || is_refusal(fault)
        };
        let tell = |fault: &Fault| {
            let before = self.before(fault, 12_000).collect::<Vec<_>>();
            format!("{fault:?} after {before:?}")
        };
        faults.iter().filter(|it| !explains(it)).map(tell).collect()
    }

    /// What was done in so many milliseconds before a fault, and how many before.
    fn before(&self, fault: &Fault, ms: u128) -> impl Iterator<Item = (u128, &'static str)> {
        let at = fault.at;
        self.done.iter().filter_map(move |(begin, what)| {
            let since = at.checked_duration_since(*begin)?.as_millis();
            (since <= ms).then_some((since, *what))
        })
    }
}

/// A command that could not be started for want of descriptors: not begun, and said so.
fn is_refusal(fault: &Fault) -> bool {
    let text = &fault.what;
    !fault.closed
        && ["overloaded", "Too many open files", "\"started\":false"]
            .iter()
            .all(|it| text.contains(it))
}

/// Sets the soft limit of descriptors of a process that may be gone.
fn limit(pid: i32, nofile: &str) {
    let _ = Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &format!("--nofile={nofile}")])
        .output();
}

/// Clients that send a call byte by byte and want their answer all the same.
struct Dawdlers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Tally>>,
}

impl Dawdlers {
    fn start(daemon: &Daemon, count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..count).map(|number| {
            let (stop, address) = (Arc::clone(&stop), daemon.address());
            thread::spawn(move || {
                let mut tally = Tally::default();
                while !stop.load(Ordering::Relaxed) {
                    tally.sent += 1;
                    let mut client = Client::connect(address);
                    let port = client.stream().local_addr().map_or(0, |it| it.port());
                    match dawdle(&mut client, number) {
                        Ok(()) => tally.answered += 1,
                        Err(what) => tally.ended(port, 1, what),
                    }
                }
                tally
            })
        });
        let threads = threads.collect();
        Dawdlers { stop, threads }
    }

    fn stop(self) -> Vec<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        let tallies = self.threads.into_iter().map(|it| it.join().unwrap());
        tallies.collect()
    }
}

fn dawdle(client: &mut Client, number: usize) -> Result<(), String> {
    let text = format!("slow {number}");
    let call = json!({"in": "echo", "params": text}).to_string();
    for byte in crate::support::frame(call.as_bytes()) {
        client
            .try_send_raw(&[byte])
            .map_err(|error| format!("a slow call was not sent: {error}"))?;
        pass(Duration::from_millis(20 + number as u64));
    }
    let answer = client.recv();
    let answer = answer.map_err(|error| format!("a slow call was not answered: {error}"))?;
    let expected = json!({"out": "echo", "result": text});
    match serde_json::from_slice::<serde_json::Value>(&answer) {
        Ok(value) if value == expected => Ok(()),
        _ => Err(String::from_utf8_lossy(&answer).into_owned()),
    }
}

/// Waits until it is again as it was: the same count of workers, none of an older generation.
fn settle(daemon: &Daemon) {
    wait_for("a reload that is accepted", PATIENCE * 2, || {
        daemon.configure(&config(COUNT, THREADS));
        daemon.command(&["reload"]).status.success()
    });
    wait_for("only ready workers", PATIENCE, || {
        let workers = daemon.workers();
        workers.len() == COUNT && workers.iter().all(|it| it.state == "ready")
    });
}

#[test]
#[ignore = "takes a minute, or PREFORKD_CHAOS_MINUTES; tests/run runs it"]
fn everything_at_once_costs_only_what_was_on_the_workers_that_were_killed() {
    let _alone = alone();
    let time = Duration::from_secs(60 * from_environment("PREFORKD_CHAOS_MINUTES", 1));
    let dice = Dice::of_the_day("PREFORKD_CHAOS_SEED");
    let mut daemon = Daemon::builder().config(&config(COUNT, THREADS)).start();
    settle(&daemon);
    let sweep = Sweep::of(&daemon);
    let before = Weight::of(daemon.pid());
    let loads: Vec<Load> = DIALECTS
        .into_iter()
        .flat_map(|dialect| SHAPES.iter().map(move |shape| (dialect, shape)))
        .map(|(dialect, shape)| {
            Load::of(Plan {
                clients: 2,
                pause: Duration::from_millis(2),
                methods: &["ping", "echo", "ping", "sleep", "ping", "echo", "cat"],
                ..plan(daemon.address(), dialect, shape)
            })
        })
        .collect();
    let dawdlers = Dawdlers::start(&daemon, 10);
    let mut chaos = Chaos {
        daemon: &daemon,
        dice,
        forfeited: HashMap::new(),
        done: Vec::new(),
        later: Vec::new(),
    };
    let end = Instant::now() + time;
    while Instant::now() < end {
        chaos.act();
        pass(Duration::from_millis(100 + chaos.dice.roll(700) as u64));
        chaos.mend(false);
        assert!(process::runs(daemon.pid()), "the master is gone");
    }
    chaos.mend(true);
    let mut tallies: Vec<(String, Tally)> = Vec::new();
    for (number, load) in loads.into_iter().enumerate() {
        let name = format!("{:?}, {}", DIALECTS[number / 3], SHAPES[number % 3].0);
        tallies.push((name, load.stop()));
    }
    let slow = dawdlers.stop();
    tallies.extend(slow.into_iter().map(|it| ("a slow one".to_owned(), it)));
    let mut unexplained = Vec::new();
    for (name, tally) in &tallies {
        let refused = tally.faults.iter().filter(|it| is_refusal(it)).count();
        println!(
            "{name}: {}; {refused} of the lost were refused",
            tally.line()
        );
        let found = chaos.unexplained(&tally.faults);
        unexplained.extend(found.into_iter().map(|it| format!("{name}: {it}")));
    }
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    for (_, what) in &chaos.done {
        *counts.entry(what).or_default() += 1;
    }
    let ports = chaos.forfeited.len();
    println!("{counts:?}; {ports} connections were on ended workers");
    for line in daemon.dir().read("daemon.log").lines() {
        assert!(!line.contains("panic"), "{line}");
    }
    let shown = &unexplained[..unexplained.len().min(20)];
    assert!(unexplained.is_empty(), "{}: {shown:#?}", unexplained.len());
    settle(&daemon);
    let after = Weight::of(daemon.pid());
    println!("the master before {before:?}, after {after:?}");
    assert_eq!(after.descriptors, before.descriptors);
    assert!(after.rss_bytes < before.rss_bytes + (4 << 20));
    assert!(process::zombies(daemon.pid()).is_empty());
    sweep.assert_as_many(&daemon);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    daemon.wait_group_gone();
}
