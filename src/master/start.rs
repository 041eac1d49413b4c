//! How a master begins: the lock, the listeners, the pid, the handlers, in an order that matters.
//!
//! What a start that fails has made is taken back; what stopped it is returned, for the shell or
//! the service manager that waits.

use std::rc::Rc;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::children::generation_info::OldContexts;
use super::children::keepers::keepers_lost;
use super::children::orphans::Orphans;
use super::children::startup_log::StartupLog;
use super::children::workers::{Children, GenerationContext, GenerationInfo};
use super::endpoints::control_socket::ControlSocket;
use super::endpoints::listeners::{self, Listener, SocketOptions};
use super::endpoints::pid_file::PidFile;
use super::main_loop::{Master, now};
use super::policy::crash_counts::CrashCounts;
use super::policy::event::{Millis, PolicyLimits};
use super::policy::fleet::Fleet;
use super::policy::rebalancer::Rebalancer;
use super::setup::Setup;
use super::upgrade::Upgrade;
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::sys::memory;
use crate::sys::notify::Notifier;
use crate::sys::process;
use crate::sys::signal::{self, SignalPipe};
use crate::sys::title;

/// The signals that a master listens to.
pub(super) const MASTER_SIGNALS: [Signal; 9] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGCHLD,
];

/// Is the master, until it has to leave.
///
/// # Errors
/// What stopped it from starting: a lock that is held, an address in use, workers that did not
/// become ready.
pub fn run(setup: Setup<'_>) -> Result<()> {
    // Until the handlers are there, a signal must wait: its default would end us half-started.
    signal::block_all();
    signal::install_fault_handlers();
    // SIGPIPE: the program's on_master_start may have set its default, which would end the master when
    // the log loses its reader.
    signal::ignore(&[Signal::SIGXFSZ, Signal::SIGPIPE]);
    let mut pid_file = Some(PidFile::lock(&setup.settings.pid_file)?);
    let mut opened = Vec::new();
    let started = start(setup, &mut pid_file, &mut opened);
    if started.is_err() {
        // What a failed start has made is taken back.
        opened.iter().for_each(|listener| listener.remove_path());
        pid_file.into_iter().for_each(PidFile::remove);
    }
    // Held for a failure's sake alone: a listener that the master gives up must be closed.
    drop(opened);
    let mut master = started?;
    for warning in &master.serving_context.settings.warnings {
        log::warn!("{warning}");
    }
    master.serve();
    master.finish()
}

/// Opens all that a master needs, under the lock of the pid file, which it takes over at the end.
fn start<'a>(
    mut setup: Setup<'a>,
    pid_file: &mut Option<PidFile>,
    opened: &mut Vec<Rc<Listener>>,
) -> Result<Master<'a>> {
    let system = |what: &'static str| move |error| Error::system(what, error);
    let passed = listeners::adopt_passed(std::mem::take(&mut setup.passed))?;
    let settings = Rc::new(setup.settings.clone());
    let options = SocketOptions::of(&settings);
    let listeners = listeners::open(&settings.listen, &[], &passed, &options)?;
    opened.clone_from(&listeners);
    listeners::tune(&settings, &listeners);
    if let Some(pid_file) = pid_file {
        pid_file.write()?;
    }
    let signals = SignalPipe::new(&MASTER_SIGNALS).map_err(system("catch signals"))?;
    let workers = Children::new().map_err(system("make the scoreboard"))?;
    process::become_subreaper().map_err(system("become a subreaper"))?;
    // The last that can fail: its path needs no taking back.
    let control = ControlSocket::bind(&settings.control_socket)?;
    show_title(&setup);
    let now = now();
    let (fleet, actions) = Fleet::new(limits(&settings), now);
    let registry = setup.host.registry(&settings);
    let ground = Rc::new(GenerationContext {
        known: GenerationInfo::of(&settings, &registry),
        registry,
        settings,
        listeners,
    });
    let lock = || Error::Bug("the lock of the pid file is gone".into());
    Ok(Master {
        setup,
        fleet,
        workers,
        control,
        notifier: Notifier::from_environment(),
        signals,
        pid_file: pid_file.take().ok_or_else(lock)?,
        orphans: Orphans::new(),
        strikes: CrashCounts::new(memory::oom_kill_count()),
        keepers_lost: keepers_lost(),
        serving_context: ground,
        old_contexts: OldContexts::default(),
        next_context: None,
        first_words: StartupLog::default(),
        spread: Rebalancer::default(),
        passed,
        reload_asked: false,
        reload_waits: false,
        next_verdict_for: Vec::new(),
        verdict_for: Vec::new(),
        last_reload: None,
        previous_log: None,
        stopping: false,
        started: now,
        next_watchdog: now,
        shown_status: String::new(),
        failure: None,
        actions: actions.into(),
        exit_code: None,
        reap_again: false,
        upgrade: Upgrade::default(),
    })
}

/// What the policy needs to know of a configuration.
pub(super) fn limits(settings: &Settings) -> PolicyLimits {
    let workers = &settings.workers;
    let millis = |duration: Duration| duration.as_millis() as Millis;
    PolicyLimits {
        pools: settings.used_pools().len(),
        count: workers.count,
        boot_timeout: millis(workers.boot_timeout),
        drain_timeout: millis(workers.drain_timeout),
        heartbeat_timeout: millis(workers.heartbeat_timeout),
        respawn_burst: workers.respawn_burst,
        respawn_max_delay: millis(workers.respawn_max_delay),
        max_memory: workers.max_memory,
        max_lifetime: millis(workers.max_lifetime),
        max_unavailable: workers.max_unavailable,
    }
}

/// From here on `ps` says who this is.
pub(super) fn show_title(setup: &Setup<'_>) {
    if let Some(area) = setup.title {
        area.set(&master_title(&setup.program, &setup.settings));
    }
    title::set_comm(&setup.program, "master");
}

fn master_title(program: &str, settings: &Settings) -> String {
    match &settings.file {
        Some(file) => format!("{program}: master {}", file.display()),
        None => format!("{program}: master"),
    }
}
