//! Runs the master's loop: signals, reports of children, deaths, the control socket, timers.
//!
//! It waits only in poll(2), and ends only by [`super::policy::action::Action::Exit`]. The caller logs a panic
//! in the loop; the workers see that their links are closed, and exit.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::children::joining;
use super::children::slow_calls;
use super::children::workers::WorkerHandle;
use super::core::{Master, now};
use super::endpoints::control_socket::ClientId;
use super::incident_text::service_text;
use super::policy::event::{Event, Millis};
use super::policy::rebalancer::Share;
use super::reaping::reap;
use super::reports::{queue_last_requests, queue_reports};
use super::requests::reload_driver::reload_if_asked;
use super::requests::reopening::{next_look, restore_removed_logs};
use super::requests::upgrade_driver::{advance_upgrade, exec};
use super::requests::{handle_event, on_signals, request, settle};
use super::session_orders::{kill_overdue_children, note_crashed_sessions, overdue_at};
use crate::error::{Error, Result};
use crate::link::message::{Order, RebalanceOrder};
use crate::link::metrics_board;
use crate::logging;
use crate::sys::process::{self, Pid};
use crate::sys::signal;

/// The time until the next try to send to the service manager or a pool process, if it had no room.
const SEND_RETRY: Millis = 50;

/// The time until the next SIGKILL to the remaining children of the program before an upgrade.
const KILL_RETRY: Millis = 100;

/// What poll(2) waits for.
enum Source {
    Signals,
    Child(Pid),
    /// The output of the probe of an upgrade.
    Probe,
    /// The output of a reader of marks. It is read when children are reaped.
    Marks,
    /// A command that wants to connect.
    Control,
    Client(ClientId),
}

/// Runs until the master has to exit.
pub fn serve(master: &mut Master<'_>) {
    settle(master);
    signal::unblock_all();
    // After an upgrade, its reload begins or fails before anything else is handled.
    begin_due_changes(master);
    while kill_overdue_children(master) || master.exit_code.is_none() {
        let ready = wait(master);
        on_signals(master);
        for source in &ready {
            match source {
                Source::Child(pid) => {
                    queue_reports(master, *pid);
                    settle(master);
                }
                Source::Probe => master.upgrade.listen(),
                _ => {}
            }
        }
        reap(master);
        for source in ready {
            match source {
                Source::Control => {
                    master.endpoints.control.accept(now());
                }
                Source::Client(client) => {
                    if let Some(asked) = master.endpoints.control.serve(client, now()) {
                        request(master, client, asked);
                    }
                }
                _ => {}
            }
        }
        master.endpoints.control.expire(now());
        pass_time(master);
        rebalance(master);
        begin_due_changes(master);
        let left = master.workers.iter().count();
        let text = service_text(&master.fleet, master.stopping.then_some(left));
        master.endpoints.notifier.show_status(text);
    }
}

/// Begins a reload, and does the next step of an upgrade.
fn begin_due_changes(master: &mut Master<'_>) {
    reload_if_asked(master);
    settle(master);
    if let Some(due) = advance_upgrade(master) {
        queue_last_requests(master);
        settle(master);
        exec(master, due);
    }
    // A second time, because a failed upgrade may have held up a reload.
    reload_if_asked(master);
    settle(master);
}

/// Waits until something is ready or due. Returns what is ready.
fn wait(master: &Master<'_>) -> Vec<Source> {
    let (endpoints, readable) = (&master.endpoints, PollFlags::POLLIN);
    let mut sources = vec![(Source::Signals, endpoints.signals.as_fd(), readable)];
    let links = master.workers.links();
    sources.extend(links.map(|(pid, fd)| (Source::Child(pid), fd, readable)));
    let single = [
        (Source::Probe, master.upgrade.output()),
        (Source::Marks, master.orphans.output()),
        (Source::Control, endpoints.control.listener(now())),
    ];
    sources.extend((single.into_iter()).filter_map(|(source, fd)| Some((source, fd?, readable))));
    let clients = endpoints.control.clients();
    sources.extend(clients.map(|(client, fd, wanted)| (Source::Client(client), fd, wanted)));
    let mut fds: Vec<PollFd<'_>> = (sources.iter())
        .map(|(_, fd, wanted)| PollFd::new(*fd, *wanted))
        .collect();
    match poll(&mut fds, timeout(master)) {
        Ok(_) | Err(Errno::EINTR) => {}
        // Most likely memory is short. Signals and timers are handled all the same.
        Err(error) => log::error!("poll failed: {error}; the master continues"),
    }
    let ready = sources.into_iter().zip(&fds);
    let ready = ready.filter(|(_, fd)| fd.any().unwrap_or(false));
    ready.map(|((source, ..), _)| source).collect()
}

fn timeout(master: &Master<'_>) -> PollTimeout {
    if master.reap_again {
        return PollTimeout::ZERO;
    }
    let notifier = &master.endpoints.notifier;
    let has_unsent =
        notifier.has_unsent_states() || master.workers.unsent_results().next().is_some();
    let next = [
        master.fleet.next_deadline(),
        master.endpoints.control.next_deadline(now()),
        notifier.watchdog_due(),
        master.rebalancer.next(),
        master.upgrade.deadline(),
        master.orphans.deadline(),
        master.workers.sessions.adopted.next_ms(),
        overdue_at(master).map(|at| at.max(now() + KILL_RETRY)),
        has_unsent.then(|| now() + SEND_RETRY),
        next_look(master),
    ]
    .into_iter()
    .flatten()
    .min();
    match next {
        // One more millisecond, because poll(2) rounds down and would return too early.
        Some(at) => {
            let wait = at.saturating_sub(now()).saturating_add(1).min(3_600_000);
            PollTimeout::try_from(Duration::from_millis(wait)).unwrap_or(PollTimeout::MAX)
        }
        None => PollTimeout::NONE,
    }
}

fn pass_time(master: &mut Master<'_>) {
    let now = now();
    if master.fleet.next_deadline().is_some_and(|at| at <= now) {
        note_crashed_sessions(master);
        let beat = |(pid, worker): (Pid, &WorkerHandle)| {
            let at = worker.heartbeat()?;
            Some(Event::Heartbeat { pid, at })
        };
        let mut events: Vec<Event> = master.workers.iter().filter_map(beat).collect();
        events.extend(master.fleet.to_sample(now).into_iter().map(|pid| {
            let rss_bytes = process::resident_bytes(pid);
            Event::Memory { pid, rss_bytes }
        }));
        events.extend(master.workers.keepers.progress());
        for event in events {
            handle_event(master, event);
        }
        let actions = master.fleet.tick(now);
        master.actions.extend(actions);
        settle(master);
    }
    restore_removed_logs(master, now);
    let fleet = &master.fleet;
    (master.endpoints.notifier).keep_alive(now, || fleet.is_healthy());
    master.endpoints.notifier.retry();
    joining::send_unsent(&mut master.workers);
    let lost = &master.workers.metrics.header().lost_lines;
    metrics_board::count(lost, logging::take_uncounted_lines());
    let lost = master.workers.sessions.take_lost_lines();
    let crashed = master.workers.sessions.take_crashed();
    let header = master.workers.metrics.header();
    metrics_board::count(&header.lost_access_lines, lost);
    for (pid, is_open) in crashed {
        metrics_board::count(&header.lost_connections, u64::from(is_open));
        slow_calls::log_crashed(&master.workers.metrics.close_slow(pid));
    }
}

/// If a check of the numbers of connections is due, sends the orders that make them even. If a worker does not obey,
/// the next check orders again.
fn rebalance(master: &mut Master<'_>) {
    let now = now();
    let (fleet, workers) = (&master.fleet, &master.workers);
    master.rebalancer.note(fleet.pids(), now);
    let held = |pid| {
        let record = workers.get(pid)?.record;
        Some((pid, record.connections.load(Relaxed) as usize))
    };
    let counts = || fleet.settled().filter_map(held).collect();
    let orders = master.rebalancer.plan(counts, now);
    if !orders.is_empty() {
        log::debug!("rebalancing connections: {orders:?}");
    }
    for Share { pid, give, take } in orders {
        let most = |count| u32::try_from(count).unwrap_or(u32::MAX);
        let shares = RebalanceOrder {
            give: most(give),
            take: most(take),
            after_change: master.rebalancer.is_after_change(now),
        };
        workers.order(pid, Order::Rebalance(shares), None);
    }
}

/// Removes what the master has made, and returns its result.
pub fn finish(mut master: Master<'_>) -> Result<()> {
    master.workers.keepers.end();
    let context = &master.contexts.serving;
    for listener in context.listeners.iter().chain(&context.observe) {
        listener.remove_path();
    }
    master.endpoints.control.remove();
    master.endpoints.pid_file.remove();
    // This comes last, because the caller may start again at once.
    if let (Some(error), Some(launcher)) = (&master.failure, master.setup.launcher.take()) {
        launcher.failed(error.exit_code(), &error.to_string());
    }
    log::info!("master exits");
    match (master.exit_code, master.failure) {
        // A start that was stopped by order has not failed.
        (None | Some(0), _) => Ok(()),
        (Some(_), Some(error)) => Err(error),
        (Some(code), None) => Err(Error::Bug(format!("the master left with code {code}"))),
    }
}
