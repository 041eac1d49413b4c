//! Defines the actions of the chaos, chosen at random.
//!
//! An action that ends a worker first records the worker's connections in the ledger. A temporary action
//! is undone when its time has come.

use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::faults::chaos::config;
use crate::faults::chaos_ledger::{End, Ledger};
use crate::support::{Cramp, Daemon, Dice, crash_target, frame, pass, process};

/// Configurations that are refused.
const BROKEN: [&str; 4] = [
    "[workers\ncount = 2\n",
    "[workers]\ncount = 2\nthread = 2\n",
    "[log]\nfile = \"no/such/directory/log\"\n",
    "[methods.m]\ncommand = [\"/no/such/program\"]\n",
];

/// The actions on a daemon.
pub struct Chaos<'a> {
    daemon: &'a Daemon,
    /// The address of the isolated listener.
    isolated: SocketAddr,
    pub dice: Dice,
    pub ledger: Ledger,
    cramp: Cramp,
    /// Limits to lift and logs to repair, and when.
    later: Vec<(Instant, Mend)>,
}

/// Performs one action, if it is possible now.
type Act<'a> = fn(&mut Chaos<'a>) -> bool;

#[derive(Debug, Clone, Copy)]
enum Mend {
    Descriptors(i32),
    Memory(i32),
    /// The time since which the log is full.
    Log(Instant),
}

impl<'a> Chaos<'a> {
    pub fn new(daemon: &'a Daemon, isolated: SocketAddr, dice: Dice) -> Self {
        Chaos {
            daemon,
            isolated,
            dice,
            ledger: Ledger::default(),
            cramp: Cramp::new(),
            later: Vec::new(),
        }
    }

    /// Returns how memory is limited.
    pub fn means(&self) -> &'static str {
        self.cramp.name()
    }

    pub fn act(&mut self) {
        let kinds: [(&'static str, Act<'a>); 22] = [
            ("worker killed", Self::kill_worker),
            ("worker killed", Self::kill_worker),
            ("worker quit", Self::quit_worker),
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
            ("program killed", Self::kill_program),
            ("pool process killed", Self::kill_pool),
            ("acceptor killed", Self::kill_acceptor),
            ("session killed", Self::kill_session),
            ("no descriptors", Self::squeeze_descriptors),
            ("no memory", Self::squeeze_memory),
            ("log full", Self::fill_log),
            ("storm of signals", Self::storm),
            ("clients broke off", Self::break_off),
        ];
        let (name, act) = kinds[self.dice.roll(kinds.len())];
        let begin = Instant::now();
        if act(self) {
            self.ledger.did(begin, name);
        }
    }

    pub fn mend(&mut self, all: bool) {
        self.ledger.look(process::runs);
        let now = Instant::now();
        let later = std::mem::take(&mut self.later);
        for (at, mend) in later {
            if at > now && !all {
                self.later.push((at, mend));
                continue;
            }
            match mend {
                Mend::Descriptors(pid) => limit(pid, "4096:"),
                Mend::Memory(pid) => self.cramp.release(pid),
                Mend::Log(since) => {
                    let _ = std::fs::remove_file(self.daemon.dir().join("daemon.log"));
                    self.daemon.signal(Signal::SIGUSR1);
                    // By then it is open again.
                    let status = self.daemon.command(&["status", "--json"]);
                    let status = serde_json::from_slice(&status.stdout).unwrap_or_default();
                    self.ledger.was_mute(since, &status);
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

    /// Returns whether something of this kind must still be undone.
    fn is_due(&self, kind: fn(&Mend) -> bool) -> bool {
        self.later.iter().any(|(_, mend)| kind(mend))
    }

    /// Stops a worker that may be ended next, and records its clients.
    fn doom(&mut self, end: End) -> Option<i32> {
        let pid = self.worker()?;
        let ports = crash_target::stop(pid, self.daemon.address())?;
        self.ledger.ends(pid, end, ports);
        Some(pid)
    }

    fn kill_worker(&mut self) -> bool {
        let doomed = self.doom(End::Killed);
        doomed.is_some_and(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok())
    }

    /// Not while the log is full, because only the log shows which clients it had.
    fn quit_worker(&mut self) -> bool {
        if self.is_due(|it| matches!(it, Mend::Log(_))) {
            return false;
        }
        let Some(pid) = self.doom(End::Left) else {
            return false;
        };
        let _ = kill(Pid::from_raw(pid), Signal::SIGQUIT);
        kill(Pid::from_raw(pid), Signal::SIGCONT).is_ok()
    }

    fn kill_program(&mut self) -> bool {
        let mut programs: Vec<i32> = process::pools(self.daemon.pid())
            .into_iter()
            .flat_map(process::children)
            .collect();
        programs.retain(|pid| process::title(*pid).contains("mirror.py"));
        if programs.is_empty() {
            return false;
        }
        let program = Pid::from_raw(self.dice.pick(&programs));
        let ways = [Signal::SIGKILL, Signal::SIGSEGV, Signal::SIGTERM];
        // Record it first, because its call may be answered before `kill` returns.
        self.ledger.program_killed();
        kill(program, self.dice.pick(&ways)).is_ok()
    }

    fn kill_pool(&mut self) -> bool {
        let pools = process::pools(self.daemon.pid());
        if pools.is_empty() {
            return false;
        }
        let pool = self.dice.pick(&pools);
        self.ledger.pool_killed();
        kill(Pid::from_raw(pool), Signal::SIGKILL).is_ok()
    }

    /// Connections that it has accepted and not given to a process yet end with it.
    fn kill_acceptor(&mut self) -> bool {
        let is_one = |title: &str| title.starts_with("preforkd: acceptor ");
        self.kill_isolated(is_one, &[Signal::SIGKILL])
    }

    fn kill_session(&mut self) -> bool {
        let is_one = |title: &str| title.starts_with("preforkd: connection ");
        self.kill_isolated(is_one, &[Signal::SIGKILL, Signal::SIGSEGV, Signal::SIGABRT])
    }

    fn kill_isolated(&mut self, is_one: fn(&str) -> bool, ways: &[Signal]) -> bool {
        let mut found = process::descendants(self.daemon.pid());
        found.retain(|pid| is_one(&process::title(*pid)));
        if found.is_empty() {
            return false;
        }
        let pid = self.dice.pick(&found);
        let Some(ports) = crash_target::stop(pid, self.isolated) else {
            return false;
        };
        self.ledger.ends_without_keeper(pid, ports);
        kill(Pid::from_raw(pid), self.dice.pick(ways)).is_ok()
            && kill(Pid::from_raw(pid), Signal::SIGCONT).is_ok()
    }

    fn retire_worker(&mut self) -> bool {
        let worker = self.worker();
        worker.is_some_and(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM).is_ok())
    }

    /// Not a worker that is stopped for good: if it continued after its drain, it could only refuse
    /// calls.
    fn stop_worker(&mut self) -> bool {
        let worker = self.worker().filter(|pid| !self.ledger.is_doomed(*pid));
        let Some(pid) = worker else {
            return false;
        };
        let stopped = kill(Pid::from_raw(pid), Signal::SIGSTOP).is_ok();
        // Much less than heartbeat-timeout, because it must not be killed.
        pass(Duration::from_millis(self.dice.roll(700) as u64));
        let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
        stopped
    }

    /// The master must detect it and kill it.
    fn abandon_worker(&mut self) -> bool {
        self.doom(End::Killed).is_some()
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

    /// Its result depends on other actions: a new worker may be killed before it is ready.
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

    /// For a while the master or a worker can open no more descriptors.
    fn squeeze_descriptors(&mut self) -> bool {
        let master = self.daemon.pid();
        // A worker without a descriptor for a keeper logs that.
        let told = !self.is_due(|it| matches!(it, Mend::Log(_)));
        let pid = match self.dice.roll(3) {
            0 if told => master,
            _ => self.worker().unwrap_or(master),
        };
        self.ledger.is_short();
        limit(pid, &format!("{}:", process::descriptors(pid)));
        self.soon(1000, Mend::Descriptors(pid));
        true
    }

    /// For a while a worker can get little more memory, and may die of that. Not while the log is full.
    fn squeeze_memory(&mut self) -> bool {
        if self.is_due(|it| matches!(it, Mend::Memory(_) | Mend::Log(_))) {
            return false;
        }
        let Some(pid) = self.worker() else {
            return false;
        };
        let room = (64 << self.dice.roll(5)) * 1024;
        self.ledger.is_short();
        let ports = crash_target::clients(pid, self.daemon.address());
        self.ledger.ends(pid, End::Cramped, ports);
        let squeezed = self.cramp.squeeze(pid, room);
        self.soon(1000, Mend::Memory(pid));
        squeezed
    }

    fn fill_log(&mut self) -> bool {
        if self.is_due(|it| matches!(it, Mend::Memory(_) | Mend::Log(_))) {
            return false;
        }
        let number = self.ledger.done().count();
        let (log, aside) = ("daemon.log", format!("daemon.log.{number}"));
        let dir = self.daemon.dir();
        let _ = std::fs::rename(dir.join(log), dir.join(aside));
        symlink("/dev/full", dir.join(log)).unwrap();
        self.daemon.signal(Signal::SIGUSR1);
        self.soon(2000, Mend::Log(Instant::now()));
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
            let frame = frame(call.as_bytes());
            let _ = client.try_send_raw(&frame[..1 + self.dice.roll(frame.len())]);
            client.reset();
        }
        true
    }
}

/// Sets the soft limit of descriptors of a process that may be gone.
fn limit(pid: i32, nofile: &str) {
    let _ = Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &format!("--nofile={nofile}")])
        .output();
}
