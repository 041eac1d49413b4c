//! Writes the text of each incident: log lines, reasons of deaths, and why a start or reload failed.
//!
//! The policy reports values. All sentences about them are in this file. Reasons cross an upgrade as these
//! texts, so the `status` of the next program shows the same. Nothing here can fail.

use std::fmt::{self, Display, Formatter};

use super::policy::action::{
    AfterDeath, AfterKeeper, ChildIncident, ChildName, Incident, NotReady, ObserverIncident,
};
use super::policy::death_log::{Death, DeathReason};
use super::policy::event::{Exit, StopMode};
use super::policy::fleet::Fleet;
use super::policy::slots::{KillReason, RecycleReason};
use crate::link::ids::Generation;
use crate::logging::{HumanDuration, pluralize};
use crate::protocol::control::DeathKind;
use crate::throttle::limiter::with_suppressed_count;

/// Returns the log line of an incident. `suppressed` is the number of similar lines before it.
pub(super) fn log_line(incident: &Incident, suppressed: u32) -> String {
    with_suppressed_count(incident.to_string(), suppressed)
}

/// Returns the result of a start, with the reason of a failure.
pub(super) fn start_result(result: Result<(), NotReady>) -> Result<(), String> {
    result.map_err(|reason| format!("not every worker became ready: {reason}"))
}

/// Returns the result of a reload: its generation, or the reason of the failure.
pub(super) fn reload_result(
    generation: Generation,
    result: Result<(), NotReady>,
) -> Result<Generation, String> {
    let text = |reason| format!("generation {generation} did not become ready: {reason}");
    result.map(|()| generation).map_err(text)
}

/// The state in one line, for the service manager. `left` are the workers of a server that stops.
pub(super) fn service_text(fleet: &Fleet, left: Option<usize>) -> String {
    match left {
        Some(_) if fleet.stops_at().is_some() => "about to stop, serving until then".to_owned(),
        Some(left) => {
            let left = pluralize(left, "worker is left", "workers are left");
            format!("stopping, {left}")
        }
        None => format!(
            "{} of {} ready, generation {}",
            fleet.ready_count(),
            pluralize(fleet.target_count(), "worker", "workers"),
            fleet.generation()
        ),
    }
}

impl Display for Incident {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Incident::Child(child, incident) => {
                let ChildName { pid, slot_id } = child;
                let (slot, generation) = (slot_id.slot, slot_id.generation);
                write!(
                    f,
                    "{child}{incident} slot={slot} pid={pid} generation={generation}"
                )
            }
            Incident::Died(death, follows) => {
                write!(f, "{}{follows} {}", sentence(death), death_fields(death))
            }
            Incident::ForkRefused {
                slot,
                is_successor,
                reason,
                retry_in,
            } => {
                let missing = if *is_successor { "successor" } else { "worker" };
                let wait = HumanDuration(*retry_in);
                write!(
                    f,
                    "slot {slot} has no {missing}: fork was refused ({reason}); next try in {wait}; if this \
                     continues, raise the limit on processes (ulimit -u, pids.max, TasksMax) slot={slot}"
                )
            }
            Incident::KeeperLost(pid, follows) => {
                let follows = match follows {
                    AfterKeeper::Nothing => "if the worker crashes, its connections are reset",
                    AfterKeeper::RetiresNow => "the worker is replaced",
                    AfterKeeper::RetiresWhenReady => "the worker is replaced once it is ready",
                };
                write!(f, "the keeper of worker {pid} has died: {follows}")
            }
            Incident::KeeperStuck { keeper, worker } => write!(
                f,
                "the keeper of worker {worker} (the worker has died) does not respond: it gets SIGKILL, and the \
                 connections that it has not handed over are closed pid={keeper}"
            ),
            Incident::Observer(incident) => incident.fmt(f),
            Incident::UnknownReaped(pid) => write!(f, "reaped {pid}, which was not a worker"),
            Incident::ReportIgnored(pid, report) => {
                write!(f, "ignored an unexpected report: {report} pid={pid}")
            }
            Incident::MasterPaused(late) => {
                let late = HumanDuration(*late);
                write!(
                    f,
                    "the master was paused for {late} or more: all deadlines start again"
                )
            }
            Incident::ScaleDeferred => {
                f.write_str("the number of workers changes when the start or the reload has ended")
            }
            Incident::ScaleRefused => {
                f.write_str("the number of workers does not change: the server stops")
            }
            Incident::Scaled(before, now) => {
                write!(f, "number of workers: {now} (was {before})")
            }
            Incident::ReloadIgnored => {
                f.write_str("ignored a reload that came before it was allowed")
            }
            Incident::StopScheduled(delay) => {
                let delay = HumanDuration(*delay);
                let until_then = "calls are served until then, /healthz answers 503";
                write!(f, "stop scheduled in {delay}: {until_then}")
            }
            Incident::StopsNow(workers) => {
                let leave = pluralize(*workers, "worker leaves now", "workers leave now");
                write!(f, "stopping: {leave}")
            }
            Incident::Stops(workers, limit) => {
                let drain = pluralize(*workers, "worker drains", "workers drain");
                write!(f, "stopping: {drain} within {}", HumanDuration(*limit))
            }
            Incident::SuppressedTroubles(lines) => {
                let more = pluralize(*lines as usize, "more line", "more lines");
                write!(
                    f,
                    "{more} about workers suppressed; `status` shows the last deaths"
                )
            }
            Incident::SuppressedForkRefusals(forks) => {
                let more = pluralize(*forks as usize, "more fork was", "more forks were");
                write!(f, "{more} refused")
            }
            Incident::SuppressedRecycles(workers) => {
                let more = pluralize(*workers as usize, "more worker was", "more workers were");
                write!(f, "{more} recycled; their lines were suppressed")
            }
        }
    }
}

impl Display for ObserverIncident {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            ObserverIncident::Died {
                pid,
                how,
                uptime,
                retry_in,
            } => {
                let uptime = HumanDuration(*uptime);
                write!(f, "the observer ended by {how} after {uptime}: ")?;
                match retry_in {
                    0 => f.write_str("replaced at once")?,
                    wait => write!(f, "next try in {}", HumanDuration(*wait))?,
                }
                write!(f, "; calls are not affected pid={pid}")
            }
            ObserverIncident::ForkRefused { reason, retry_in } => {
                let wait = HumanDuration(*retry_in);
                write!(
                    f,
                    "no observer: fork was refused ({reason}); next try in {wait}; if this continues, raise \
                     the limit on processes (ulimit -u, pids.max, TasksMax)"
                )
            }
            ObserverIncident::Stopped(pid) => write!(
                f,
                "the observer was stopped (SIGSTOP) for 5s: it gets SIGKILL and is replaced pid={pid}"
            ),
        }
    }
}

impl Display for ChildIncident {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ChildIncident::Started => " starts",
            ChildIncident::Ready(after) => {
                return write!(f, " is ready after {}", HumanDuration(*after));
            }
            ChildIncident::Retires => " retires: a new worker takes its slot",
            ChildIncident::Stuck(evidence) => return write!(f, ": {evidence}"),
            ChildIncident::Recycled(reason) => {
                return write!(f, " is recycled once its successor is ready: {reason}");
            }
            ChildIncident::Signalled(signal, reason) => {
                return write!(f, " gets {signal}: {reason}");
            }
            ChildIncident::SurvivedKill => {
                " survived SIGKILL, so the kernel holds it: another process takes its slot"
            }
            ChildIncident::SurvivedKillUnneeded => {
                " survived SIGKILL, so the kernel holds it: no replacement is needed"
            }
        })
    }
}

impl Display for NotReady {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            NotReady::ForkRefused(slot, reason) => {
                write!(f, "slot {slot} could not be forked: {reason}")
            }
            NotReady::Died(death, None) => f.write_str(&sentence(death)),
            NotReady::Died(death, Some((pid, reason))) => {
                write!(f, "{}; its program {pid} {reason}", sentence(death))
            }
            NotReady::Killed(child, reason) => write!(f, "{child}: {reason}"),
            NotReady::SurvivedKill(child) => write!(f, "{child} survived SIGKILL"),
            NotReady::Stopped(StopMode::AtOnce) => KillReason::StopNow.fmt(f),
            NotReady::Stopped(_) => f.write_str("the server stops"),
            NotReady::UpgradeFailed(reason) | NotReady::PoolRefused(reason) => f.write_str(reason),
            NotReady::PoolSilent => f.write_str(
                "a pool process has not taken its new table within twice workers.boot-timeout: programs of \
                 an earlier reload may still have calls; try again when these calls have ended",
            ),
        }
    }
}

impl Display for ChildName {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let slot = self.slot_id.slot;
        write!(f, "{} {} (slot {slot})", slot.role(), self.pid)
    }
}

/// Describes a death, without what follows from it.
fn sentence(death: &Death) -> String {
    let method = death.method.as_ref();
    let method = method.map_or(String::new(), |method| format!(", last method {method}"));
    let (role, after) = (death.slot.role(), HumanDuration(death.uptime));
    let place = match (death.kind, &death.name) {
        (DeathKind::Connection, Some(client)) => format!("of {client}"),
        (DeathKind::Pool | DeathKind::Acceptor, Some(name)) => format!("({name})"),
        _ => format!("(slot {})", death.slot),
    };
    format!(
        "{role} {} {place} ended by {} after {after}: {}{method}",
        death.pid, death.how, death.reason
    )
}

/// Returns the key=value pairs at the end of a line about a death.
fn death_fields(death: &Death) -> String {
    let how = match (death.how, death.how.signal_name()) {
        (Exit::Signal { core_dumped, .. }, Some(name)) => {
            format!("signal={name} core={core_dumped}")
        }
        (Exit::Code(code), _) | (Exit::Signal { number: code, .. }, None) => format!("exit={code}"),
    };
    let method = death.method.as_ref();
    let method = method.map_or(String::new(), |method| format!(" method={method}"));
    let call = death
        .call
        .map_or(String::new(), |call| format!(" call={call}"));
    let job = death.job.as_ref();
    let job = job.map_or(String::new(), |job| format!(" job={job}"));
    format!(
        "slot={} pid={} generation={} {how} uptime_ms={}{method}{call}{job}",
        death.slot, death.pid, death.generation, death.uptime
    )
}

impl Display for AfterDeath {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (wait, deaths) = match *self {
            AfterDeath::Nothing => return Ok(()),
            AfterDeath::ConnectionLost => {
                return f.write_str("; no other connection is affected");
            }
            AfterDeath::Replacement(0, _) => return f.write_str("; replaced at once"),
            AfterDeath::Replacement(wait, deaths) => (wait, deaths),
            AfterDeath::NextSuccessor(wait, deaths) => {
                f.write_str("; the worker that it was to replace continues")?;
                if wait == 0 {
                    return f.write_str("; another one is started");
                }
                (wait, deaths)
            }
        };
        let deaths = pluralize(deaths as usize, "young death", "young deaths");
        write!(f, "; next try in {}: {deaths}", HumanDuration(wait))
    }
}

impl Display for DeathReason {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeathReason::Killed(reason, None) => return reason.fmt(f),
            DeathReason::Killed(reason, Some(evidence)) => {
                return write!(f, "{reason}; {evidence}");
            }
            DeathReason::Drained => "as ordered",
            DeathReason::DrainFailed => "failed while it drained",
            DeathReason::DrainKilled => "killed from outside while it drained",
            DeathReason::DrainCrashed => "crashed while it drained",
            DeathReason::NotReady => "died before it was ready",
            DeathReason::LeftByQuit => "exited without an order: SIGQUIT, or a handler called exit",
            DeathReason::Left => "exited without an order",
            DeathReason::KilledFromOutside => {
                "killed from outside: by a user, or by the kernel because memory was short"
            }
            DeathReason::Crashed => "crashed",
            DeathReason::Text(text) => text,
        })
    }
}

impl Display for KillReason {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KillReason::BootTimeout(limit) => {
                return write!(
                    f,
                    "not ready within boot-timeout ({})",
                    HumanDuration(*limit)
                );
            }
            KillReason::EventLoopStuck {
                silent,
                is_draining,
            } => {
                let when = if *is_draining {
                    " while it drained"
                } else {
                    ""
                };
                return write!(f, "event loop stuck for {}{when}", HumanDuration(*silent));
            }
            KillReason::NotNeeded => "not needed any more before it was ready",
            KillReason::DrainDeadline => "not done by its drain deadline",
            KillReason::StopNow => "the server stops now",
            KillReason::Text(text) => text,
        })
    }
}

impl Display for RecycleReason {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RecycleReason::MaxCalls(calls) => {
                let calls = pluralize(*calls as usize, "call", "calls");
                return write!(f, "max-calls reached ({calls})");
            }
            RecycleReason::MaxMemory { rss_bytes, limit } => {
                return write!(
                    f,
                    "max-memory exceeded ({rss_bytes} bytes resident, limit {limit})"
                );
            }
            RecycleReason::MaxLifetime(age) => {
                return write!(f, "max-lifetime reached ({})", HumanDuration(*age));
            }
            RecycleReason::ThreadsStuck => "all its handler threads are stuck",
            RecycleReason::RetireRequested => "it was asked to retire",
            RecycleReason::Text(text) => text,
        })
    }
}

/// Makes a reason cross an upgrade as text.
macro_rules! crosses_as_text {
    ($($reason:ident)*) => {$(
        impl From<$reason> for String {
            fn from(reason: $reason) -> String {
                reason.to_string()
            }
        }

        impl From<String> for $reason {
            fn from(text: String) -> $reason {
                $reason::Text(text)
            }
        }
    )*};
}

crosses_as_text!(DeathReason KillReason RecycleReason);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::ids::{Pid, Slot};
    use crate::master::policy::death_log::clean;
    use crate::master::policy::fleet_world::SEGV;

    #[test]
    fn a_death_is_told_in_words_and_in_pairs_on_one_line() {
        let death = Death {
            kind: DeathKind::Worker,
            name: None,
            slot: Slot(2),
            pid: Pid(77),
            generation: Generation(1),
            how: SEGV,
            uptime: 3250,
            method: Some(clean("add\n[fake] line")),
            call: "77.12".parse().ok(),
            job: Some("ID".to_owned()),
            rss_bytes: 1 << 20,
            reason: DeathReason::Crashed,
            at: 1_700_000_000,
        };
        assert_eq!(
            Incident::Died(Box::new(death), AfterDeath::Replacement(0, 1)).to_string(),
            "worker 77 (slot 2) ended by SIGSEGV (core dumped) after 3.2 s: crashed, last method \
             add?[fake]?line; replaced at once slot=2 pid=77 generation=1 signal=SIGSEGV core=true \
             uptime_ms=3250 method=add?[fake]?line call=77.12 job=ID"
        );
    }

    #[test]
    fn reasons_cross_an_upgrade_as_text() {
        let reason = DeathReason::Killed(KillReason::BootTimeout(30_000), None);
        let text = serde_json::to_string(&reason).unwrap_or_default();
        assert_eq!(text, "\"not ready within boot-timeout (30 s)\"");
        let read: Option<DeathReason> = serde_json::from_str(&text).ok();
        assert_eq!(read.map(|read| read.to_string()), Some(reason.to_string()));
    }
}
