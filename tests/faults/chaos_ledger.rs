//! Compares lost calls and connections with the actions of the chaos test, and with the losses that the daemon
//! reports.
//!
//! A fault is explained by an action that ended a worker with the connection, or a program. For each worker, at most
//! the number of faults that the daemon reports is explained. The log says how many connections ended with the
//! worker, and how many calls were answered with `crashed`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::support::load::Fault;
use crate::support::matching;

/// The longest time until a call has its outcome. In the worst case, a stopped worker is killed at its drain
/// deadline, and then another worker adopts its connection.
const LONGEST: Duration = Duration::from_secs(18);
/// The time from a worker's end to the last message about it to a connected client.
const AFTERWARDS: Duration = Duration::from_secs(4);
/// The deadline of a call: limits.timeout, which is drain-timeout here.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a condition may last that a worker does not survive.
const SHORT: Duration = Duration::from_secs(1);
/// What the answer to a call says that has not begun.
const NOT_BEGUN: &str = "\"started\":false";
/// The most calls ahead on a connection.
const DEPTH: usize = 16;
/// The most calls that one worker runs for others: its number of threads.
const THREADS: usize = 8;
/// The most calls of a pool process: one in its program, and one in transit from each worker.
const POOL_CALLS: usize = 6;

/// How a worker was ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was stopped, recorded, and killed by the test or the master. So no other client can have connected.
    Killed,
    /// It was stopped, recorded, and ordered to exit at once. Clients may have connected before it got the order.
    Left,
    /// It was short of memory, and may have died of that with any clients.
    Cramped,
}

#[derive(Debug)]
struct Ended {
    pid: i32,
    end: End,
    at: Instant,
    /// When it was found to be gone.
    gone: Option<Instant>,
    /// The ports of its clients. A port may be used again by a later client.
    ports: HashSet<u16>,
}

impl Ended {
    /// Returns whether a connection may have been affected by this end.
    fn met(&self, fault: &Fault, told: &Told) -> bool {
        let is_in = self.ports.contains(&fault.port);
        let until = match self.end {
            // The master may notice the end late, because it was stopped itself or executed another program.
            End::Killed if is_in => self.gone.map_or(fault.at, |gone| {
                gone + if told.nobody_took_up(self.at, fault) {
                    LONGEST
                } else {
                    AFTERWARDS
                }
            }),
            End::Killed => return false,
            End::Left if !is_in => self.at + SHORT,
            End::Left | End::Cramped => self.at + LONGEST,
        };
        (self.at..=until).contains(&fault.at)
    }
}

/// The actions that were performed.
#[derive(Debug, Default)]
pub struct Ledger {
    ended: Vec<Ended>,
    /// When programs of the pool were killed.
    programs: Vec<Instant>,
    /// When pool processes were killed.
    pools: Vec<Instant>,
    /// The acceptors and sessions that ended. They have no keeper, so no one reports their losses.
    without_keeper: HashSet<i32>,
    /// When the daemon first had too few descriptors or too little memory. A worker that is forked
    /// meanwhile keeps the limit.
    short_since: Option<Instant>,
    /// The times in which the log could not be written.
    mute: Vec<(Instant, Instant)>,
    /// The deaths that `status` reported after such a time, by pid.
    deaths: BTreeMap<i64, Value>,
    /// The actions and when they began.
    done: Vec<(Instant, &'static str)>,
}

/// What the daemon's log reports about dead workers.
#[derive(Debug, Default)]
pub struct Told {
    /// By pid: connections that ended, and calls that were answered with `crashed`.
    left: Budget,
    /// Workers without a keeper.
    unkept: Vec<i32>,
    /// When a program could not be restarted because no descriptor was left, so its calls waited.
    starved: Vec<SystemTime>,
    /// When a worker had no descriptor left to adopt a connection. The answers of that connection come later.
    shut: Vec<SystemTime>,
    /// The times in which the log could not be written, so that such lines may be missing.
    mute: Vec<(Instant, Instant)>,
    pub kept: usize,
}

impl Told {
    /// Parses the log of a daemon with which the actions of the ledger were performed.
    pub fn of(log: &str, ledger: &Ledger) -> Self {
        let mut told = Told {
            mute: ledger.mute.clone(),
            ..Told::default()
        };
        for line in log.lines() {
            let number = |key: &str| -> Option<usize> {
                let words = line.split_whitespace();
                let mut values = words.filter_map(|word| word.strip_prefix(key));
                values.next()?.parse().ok()
            };
            let counts = (number("kept="), number("crashed="), number("reset="));
            if let (Some(pid), (Some(kept), Some(crashed), Some(reset))) = (number("pid="), counts)
            {
                let left = told.left.entry(pid as i32).or_default();
                left.0 += reset;
                left.1 += crashed;
                told.kept += kept;
            } else if line.contains("this worker has no keeper") {
                let own = line
                    .split_once('[')
                    .and_then(|(_, rest)| rest.split_once(' '));
                told.unkept
                    .extend(own.and_then(|(pid, _)| pid.parse::<i32>().ok()));
            } else if line.contains("Too many open files") {
                let at = line.split(' ').next().unwrap_or_default();
                let at = humantime::parse_rfc3339(at);
                if line.contains("its program could not be started") {
                    told.starved.extend(at);
                } else if line.contains("no connection can be accepted") {
                    told.shut.extend(at);
                }
            }
        }
        told
    }
}

impl Told {
    fn starved_before(&self, fault: &Fault) -> bool {
        let at = SystemTime::now() - fault.at.elapsed();
        let mut since = self.starved.iter().map(|it| at.duration_since(*it));
        since.any(|since| since.is_ok_and(|since| (TIMEOUT / 2..LONGEST).contains(&since)))
    }

    /// Returns whether a worker could not adopt connections between an end and a fault. It logs that once
    /// in ten seconds.
    fn nobody_took_up(&self, end: Instant, fault: &Fault) -> bool {
        let from = SystemTime::now() - end.elapsed() - Duration::from_secs(10);
        let to = SystemTime::now() - fault.at.elapsed();
        let is_mute = |&(since, until): &(Instant, Instant)| {
            since <= fault.at && end <= until + Duration::from_secs(10)
        };
        self.shut.iter().any(|at| (from..=to).contains(at)) || self.mute.iter().any(is_mute)
    }
}

/// The kind of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The connection was lost.
    Closed,
    /// Answered with `crashed` by a keeper.
    Crashed,
    /// Answered with `crashed`, because a program of a pool died.
    ProgramCrashed,
    /// Answered with `crashed`, because the process to which the worker had sent the call died.
    RunnerCrashed,
    /// Answered as not begun, because the pool of an older generation has no process any more.
    Orphaned,
    /// A command could not be started because of descriptors or memory; the answer says that it had not
    /// begun.
    Refused,
    /// Its deadline passed before it could begin, and the answer says so.
    Late,
    Other,
}

impl Kind {
    fn of(fault: &Fault) -> Self {
        let says = |texts: &[&str]| texts.iter().all(|text| fault.what.contains(text));
        match () {
            () if fault.closed => Kind::Closed,
            () if says(&["\"crashed\"", "the pool "]) => Kind::ProgramCrashed,
            () if says(&["\"crashed\"", "the worker that "]) => Kind::Crashed,
            () if says(&[
                "\"crashed\"",
                "no other one serves this generation",
                NOT_BEGUN,
            ]) =>
            {
                Kind::Orphaned
            }
            // A pool process of the program before an upgrade has no successor.
            () if says(&["\"crashed\"", "the process that ran it"])
                || says(&["\"crashed\"", "the process of its pool has ended"]) =>
            {
                Kind::RunnerCrashed
            }
            () if says(&["overloaded", "Too many open files", NOT_BEGUN])
                || says(&["overloaded", "Cannot allocate memory", NOT_BEGUN]) =>
            {
                Kind::Refused
            }
            // It had passed before the call was queued, or it passed while the call waited.
            () if says(&["\"timeout\"", "its deadline has passed", NOT_BEGUN])
                || says(&["\"timeout\"", "its deadline passed", NOT_BEGUN]) =>
            {
                Kind::Late
            }
            () => Kind::Other,
        }
    }
}

/// How many lost connections and crashed calls can be explained, by worker.
type Budget = HashMap<i32, (usize, usize)>;

impl Ledger {
    pub fn did(&mut self, begin: Instant, what: &'static str) {
        self.done.push((begin, what));
    }

    pub fn done(&self) -> impl Iterator<Item = &'static str> {
        self.done.iter().map(|(_, what)| *what)
    }

    /// Records the end of a worker and the connections of these clients.
    pub fn ends(&mut self, pid: i32, end: End, ports: impl IntoIterator<Item = u16>) {
        self.ended.push(Ended {
            pid,
            end,
            at: Instant::now(),
            gone: None,
            ports: ports.into_iter().collect(),
        });
    }

    /// Records the end of an acceptor or a session with the connections of these clients. It costs only these.
    pub fn ends_without_keeper(&mut self, pid: i32, ports: impl IntoIterator<Item = u16>) {
        self.without_keeper.insert(pid);
        self.ends(pid, End::Killed, ports);
    }

    /// Returns whether this worker was recorded as killed.
    pub fn is_doomed(&self, pid: i32) -> bool {
        let doomed = |it: &Ended| it.pid == pid && it.end == End::Killed;
        self.ended.iter().any(doomed)
    }

    /// Records which workers are gone.
    pub fn look(&mut self, runs: impl Fn(i32) -> bool) {
        let there = self.ended.iter_mut().filter(|it| it.gone.is_none());
        for ended in there.filter(|it| !runs(it.pid)) {
            ended.gone = Some(Instant::now());
        }
    }

    pub fn program_killed(&mut self) {
        self.programs.push(Instant::now());
    }

    pub fn pool_killed(&mut self) {
        self.pools.push(Instant::now());
    }

    pub fn is_short(&mut self) {
        self.short_since.get_or_insert_with(Instant::now);
    }

    /// Records that the log could not be written until now, and the status at this time.
    pub fn was_mute(&mut self, since: Instant, status: &Value) {
        self.mute.push((since, Instant::now()));
        for death in status["deaths"].as_array().into_iter().flatten() {
            let pid = death["pid"].as_i64().unwrap_or_default();
            self.deaths.insert(pid, death.clone());
        }
    }

    /// Returns the deaths that the log may not report.
    pub fn deaths(&self) -> String {
        let deaths = self.deaths.values();
        deaths.map(|death| format!("{death}\n")).collect()
    }

    /// Returns one line: the actions, the daemon's reports, and what clients saw.
    pub fn account(&self, faults: &[(&str, &Fault)], told: &Told) -> String {
        let of = |kind| {
            faults
                .iter()
                .filter(|(_, fault)| Kind::of(fault) == kind)
                .count()
        };
        let sum = |left: &Budget| {
            let add = |sum: (usize, usize), one: &(usize, usize)| (sum.0 + one.0, sum.1 + one.1);
            left.values().fold((0, 0), add)
        };
        let (resets, crashed) = sum(&told.left);
        let most = sum(&self.budget(told));
        format!(
            "{} ends of workers with {} recorded connections; reported: {} kept, {resets} ended, {crashed} calls \
             crashed (with unreported ones at most {} ended and {} crashed); seen: {} ended, {} calls \
             crashed, {} of {} killed programs, {} sent to processes that ended ({} of them pool \
             processes); {} refused, {} late",
            self.ended.len(),
            self.ended.iter().map(|it| it.ports.len()).sum::<usize>(),
            told.kept,
            most.0,
            most.1,
            of(Kind::Closed),
            of(Kind::Crashed),
            of(Kind::ProgramCrashed),
            self.programs.len(),
            of(Kind::RunnerCrashed),
            self.pools.len(),
            of(Kind::Refused),
            of(Kind::Late),
        )
    }

    fn budget(&self, told: &Told) -> Budget {
        let mut left = told.left.clone();
        for ended in &self.ended {
            let latest = ended.gone.unwrap_or(ended.at) + LONGEST;
            let overlaps = |&(from, to): &(Instant, Instant)| from <= latest && ended.at <= to;
            let held = ended.ports.len();
            // If the daemon could not log the number, use the number of recorded connections.
            if told.unkept.contains(&ended.pid) || self.without_keeper.contains(&ended.pid) {
                left.insert(ended.pid, (held, 0));
            } else if self.mute.iter().any(overlaps) && self.may_have_ended(ended) {
                left.entry(ended.pid).or_insert((held, held * DEPTH));
            }
        }
        left
    }

    /// Returns false only for a worker that was short of memory and has no death record.
    fn may_have_ended(&self, ended: &Ended) -> bool {
        ended.end != End::Cramped || self.deaths.contains_key(&i64::from(ended.pid))
    }

    /// Returns the faults without an explanation, each with the actions before it.
    pub fn unexplained(&self, faults: &[(&str, &Fault)], told: &Told) -> Vec<String> {
        let budget = self.budget(told);
        let mut faults = faults.to_vec();
        faults.sort_by_key(|(_, fault)| fault.at);
        let excused = self.excused(&faults, &budget, told);
        let unexplained = faults.iter().zip(excused).filter(|(_, excused)| !excused);
        unexplained
            .map(|((whose, fault), _)| {
                let at = SystemTime::now() - fault.at.elapsed();
                let at = humantime::format_rfc3339_millis(at);
                let before: Vec<_> = self.before(fault, LONGEST).collect();
                let ends: Vec<_> = self.ends_before(fault, &budget).collect();
                format!("{at} {whose}: {fault:?} after {before:?}, ends {ends:?}")
            })
            .collect()
    }

    /// Returns for each fault whether something explains it. Each worker and program explains at most the faults that
    /// it can have caused.
    fn excused(&self, faults: &[(&str, &Fault)], budget: &Budget, told: &Told) -> Vec<bool> {
        let plain = faults.iter().map(|it| self.is_plain(it.1, told));
        let mut excused: Vec<bool> = plain.collect();
        let mut excuse = |kind: Kind, choices: &dyn Fn(&Fault) -> Vec<i32>, most| {
            let is_of = |index: &usize| Kind::of(faults[*index].1) == kind;
            let which: Vec<usize> = (0..faults.len()).filter(is_of).collect();
            let claims: Vec<Vec<i32>> = which.iter().map(|it| choices(faults[*it].1)).collect();
            for (index, met) in which.into_iter().zip(matching::met(&claims, &most)) {
                excused[index] = met;
            }
        };
        let workers = |fault: &Fault| self.met_by(fault, told);
        let of = |which: fn(&(usize, usize)) -> usize| {
            let left = budget.iter();
            left.map(|(pid, left)| (*pid, which(left))).collect()
        };
        excuse(Kind::Closed, &workers, of(|left| left.0));
        excuse(Kind::Crashed, &workers, of(|left| left.1));
        let programs = |fault: &Fault| {
            let killed = self.programs_killed_before(fault);
            killed.map(|number| number as i32).collect()
        };
        let one_each = (0..self.programs.len()).map(|number| (number as i32, 1));
        excuse(Kind::ProgramCrashed, &programs, one_each.collect());
        let runners = |fault: &Fault| self.runners_ended_before(fault);
        let pools = (0..self.pools.len()).map(|number| (-1 - number as i32, POOL_CALLS));
        let runs = self.ended.iter().map(|ended| (ended.pid, THREADS));
        excuse(Kind::RunnerCrashed, &runners, pools.chain(runs).collect());
        excused
    }

    /// Returns the workers whose end may have affected the connection of a fault, latest first. Workers that had this
    /// client come before workers that may have had it, because the latter can explain few faults.
    fn met_by(&self, fault: &Fault, told: &Told) -> Vec<i32> {
        let ended = self.ended.iter().rev();
        let met = ended.filter(|ended| ended.met(fault, told));
        let (seen, unseen): (Vec<_>, Vec<_>) =
            met.partition(|ended| ended.ports.contains(&fault.port));
        let all = seen.into_iter().chain(unseen);
        all.map(|ended| ended.pid).collect()
    }

    /// Returns the processes that may have run a call which another worker had sent: pool processes by
    /// their negative number, and workers.
    fn runners_ended_before(&self, fault: &Fault) -> Vec<i32> {
        let is_before = |at: Instant, most| (at..=at + most).contains(&fault.at);
        let pools = self.pools.iter().enumerate();
        let pools = pools.filter(|(_, at)| is_before(**at, AFTERWARDS));
        let workers = self.ended.iter().filter(|ended| {
            let gone = ended.gone.unwrap_or(fault.at);
            (ended.at..=gone + AFTERWARDS).contains(&fault.at)
        });
        let pools = pools.map(|(number, _)| -1 - number as i32);
        pools.chain(workers.map(|ended| ended.pid)).collect()
    }

    fn programs_killed_before(&self, fault: &Fault) -> impl Iterator<Item = usize> {
        let killed = |at: &Instant| (*at..*at + LONGEST).contains(&fault.at);
        let numbered = self.programs.iter().enumerate();
        numbered
            .filter(move |(_, at)| killed(at))
            .map(|(number, _)| number)
    }

    /// Returns whether a fault is explained without a limit on the number of such faults.
    fn is_plain(&self, fault: &Fault, told: &Told) -> bool {
        match Kind::of(fault) {
            // Calls that wait in workers of an older generation are refused when its pool process is killed.
            Kind::Orphaned => {
                let mut pools = self.pools.iter();
                let mut acts = self.before(fault, LONGEST);
                pools.any(|at| (*at..=*at + LONGEST).contains(&fault.at))
                    && acts.any(|(_, what)| what.starts_with("good") || what == "USR2")
            }
            Kind::Refused => self.short_since.is_some_and(|since| since <= fault.at),
            // Its worker was stopped, and the master noticed it late, because the master was stopped too or executed
            // another program.
            Kind::Late => {
                let is_late = |ended: &Ended| {
                    // It was stopped shortly before it was recorded.
                    let is_over = ended.at + TIMEOUT <= fault.at + SHORT;
                    ended.end == End::Killed && is_over && ended.met(fault, told)
                };
                self.ended.iter().any(is_late) || told.starved_before(fault)
            }
            _ => false,
        }
    }

    /// Describes the workers that ended before a fault: pid, how, how many milliseconds before, how many
    /// connections, whether this connection was among them, and what it can explain.
    fn ends_before(
        &self,
        fault: &Fault,
        budget: &Budget,
    ) -> impl Iterator<Item = (i32, End, u128, usize, bool, Option<(usize, usize)>)> {
        self.ended.iter().filter_map(|ended| {
            let since = fault.at.checked_duration_since(ended.at)?;
            let is_in = ended.ports.contains(&fault.port);
            let left = budget.get(&ended.pid).copied();
            let (pid, end, held) = (ended.pid, ended.end, ended.ports.len());
            (is_in || since <= LONGEST).then_some((pid, end, since.as_millis(), held, is_in, left))
        })
    }

    /// Returns the actions within `most` before a fault, and how many milliseconds before.
    fn before(&self, fault: &Fault, most: Duration) -> impl Iterator<Item = (u128, &'static str)> {
        let at = fault.at;
        self.done.iter().filter_map(move |(begin, what)| {
            let since = at.checked_duration_since(*begin)?;
            (since <= most).then_some((since.as_millis(), *what))
        })
    }
}

#[cfg(test)]
fn fault(port: u16, closed: bool, what: &str) -> Fault {
    Fault {
        port,
        at: Instant::now(),
        lost: 1,
        closed,
        what: what.to_owned(),
    }
}

#[test]
fn no_more_is_excused_than_was_done_and_told() {
    let crashed = r#"{"name":"crashed","message":"the worker that ran this call has died"}"#;
    let log = "2026 INFO [7 master] worker 9 has left … pid=9 kept=4 crashed=1 reset=1";
    let mut ledger = Ledger::default();
    ledger.ends(9, End::Killed, [100, 101, 102]);
    let faults = [
        fault(100, true, "reset"),
        fault(101, true, "reset"),
        fault(102, false, crashed),
        fault(102, false, crashed),
        fault(200, true, "reset"),
        fault(100, false, r#"{"name":"timeout"}"#),
    ];
    let named: Vec<_> = faults.iter().map(|it| ("a client", it)).collect();
    let judge = |told: &str, which: &[usize]| {
        let some: Vec<_> = which.iter().map(|&index| named[index]).collect();
        ledger.unexplained(&some, &Told::of(told, &ledger)).len()
    };
    assert_eq!(judge(log, &[0, 2]), 0);
    assert_eq!(judge("", &[0, 2]), 2, "nothing was told");
    assert_eq!(judge(log, &[0, 1]), 1, "one was told");
    assert_eq!(judge(log, &[2, 3]), 1, "likewise");
    assert_eq!(judge(log, &[4]), 1, "on no worker that died");
    assert_eq!(judge(log, &[5]), 1, "an answer of another kind");
    let keeperless = "2026 WARN  [9 worker 1] this worker has no keeper: …";
    assert_eq!(judge(keeperless, &[0, 1]), 0);
    assert_eq!(judge(keeperless, &[0, 1, 2]), 1);
}

#[test]
fn who_came_to_a_leaving_worker_is_excused_as_often_as_it_says() {
    let mut ledger = Ledger::default();
    ledger.ends(9, End::Left, [100]);
    let faults = [fault(200, true, "ended"), fault(201, true, "ended")];
    let named: Vec<_> = faults.iter().map(|it| ("a client", it)).collect();
    let told = Told::of(
        "INFO [7 master] … pid=9 kept=0 crashed=0 reset=1",
        &Ledger::default(),
    );
    assert_eq!(ledger.unexplained(&named, &told).len(), 1);
}

#[test]
fn a_session_that_was_killed_costs_its_connection() {
    let mut ledger = Ledger::default();
    ledger.ends_without_keeper(9, [100]);
    let faults = [fault(100, true, "reset"), fault(101, true, "reset")];
    let named: Vec<_> = faults.iter().map(|it| ("a client", it)).collect();
    assert_eq!(ledger.unexplained(&named, &Told::default()).len(), 1);
}

#[test]
fn a_program_that_was_killed_costs_one_call() {
    let text = r#"{"name":"crashed","message":"the program of the pool mirror that ran it …"}"#;
    let mut ledger = Ledger::default();
    ledger.program_killed();
    let faults = [fault(1, false, text), fault(2, false, text)];
    let named: Vec<_> = faults.iter().map(|it| ("a client", it)).collect();
    assert_eq!(ledger.unexplained(&named, &Told::default()).len(), 1);
}

#[test]
fn what_a_keeper_says_waits_for_a_worker_that_can_take_the_connection_up() {
    let text = r#"{"name":"crashed","message":"the worker that ran this call has died"}"#;
    let ago = Duration::from_secs;
    let mut ledger = Ledger::default();
    ledger.ends(9, End::Killed, [100]);
    ledger.look(|_| false);
    ledger.ended[0].at -= ago(20);
    ledger.ended[0].gone = Some(Instant::now() - ago(19));
    let late = Fault {
        at: Instant::now() - ago(10),
        ..fault(100, false, text)
    };
    let judge = |shut: &str, seconds| {
        let at = humantime::format_rfc3339_millis(SystemTime::now() - ago(seconds));
        let log = format!(
            "INFO [7 master] … pid=9 kept=1 crashed=1 reset=0\n{at} WARN [8 worker] {shut}"
        );
        let told = Told::of(&log, &ledger);
        ledger.unexplained(&[("a client", &late)], &told).len()
    };
    let full = "no connection can be accepted: Too many open files";
    assert_eq!(judge("nothing of the kind", 15), 1);
    assert_eq!(judge(full, 15), 0);
    assert_eq!(judge(full, 5), 1, "only afterwards");
    assert_eq!(judge(full, 40), 1, "long before");
}

#[test]
fn what_a_process_ran_for_others_is_excused_if_it_was_killed() {
    let text = r#"{"name":"crashed","message":"the process that ran it has ended"}"#;
    let mut ledger = Ledger::default();
    let faults: Vec<Fault> = (0..20).map(|port| fault(port, false, text)).collect();
    let named: Vec<_> = faults.iter().map(|it| ("a client", it)).collect();
    assert_eq!(ledger.unexplained(&named, &Told::default()).len(), 20);
    let at = Instant::now() - SHORT;
    ledger.pools.push(at);
    ledger.ends(9, End::Killed, []);
    ledger.ended[0].at = at;
    let rest = 20 - POOL_CALLS - THREADS;
    assert_eq!(ledger.unexplained(&named, &Told::default()).len(), rest);
}
