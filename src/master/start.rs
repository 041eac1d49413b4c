//! Starts a master: takes the lock, opens the listeners, writes the pid, catches signals. The order
//! matters.
//!
//! If the start fails, its sockets and its pid file are removed. Log files, directories and a job store stay. The error
//! is returned for the shell or the service manager that waits.

use std::rc::Rc;

use nix::sys::signal::Signal;

use super::children::orphans::Orphans;
use super::children::slow_calls;
use super::children::workers::{Children, GenerationContext, GenerationInfo};
use super::core::{Master, now};
use super::endpoints::control_socket::ControlSocket;
use super::endpoints::listeners::{self, Listener};
use super::endpoints::pid_file::PidFile;
use super::endpoints::{Endpoints, observed};
use super::main_loop::{finish, serve};
use super::policy::fleet::Fleet;
use super::setup::{Setup, limits, open_access_file, show_title};
use crate::error::{Error, Result};
use crate::sys::notify::Notifier;
use crate::sys::process;
use crate::sys::signal::{self, SignalPipe};

/// The signals that a master handles.
pub const MASTER_SIGNALS: [Signal; 9] = [
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

/// Runs a master until it exits.
///
/// # Errors
/// Why the start failed, for example: the lock is held, an address is in use, workers did not become ready.
pub fn run(setup: Setup<'_>) -> Result<()> {
    // Before they are caught, a signal would end the master in the middle of its start.
    signal::block_all();
    signal::install_fault_handlers();
    // The program's on_master_start may have set SIGPIPE to its default, which would end the master when
    // the log loses its reader.
    signal::ignore(&[Signal::SIGXFSZ, Signal::SIGPIPE]);
    let mut pid_file = Some(PidFile::lock(&setup.settings.pid_file)?);
    let mut opened = Vec::new();
    let started = start(setup, &mut pid_file, &mut opened);
    if started.is_err() {
        // Removes what the failed start has made.
        opened.iter().for_each(|listener| listener.remove_path());
        pid_file.into_iter().for_each(PidFile::remove);
    }
    // These references would keep listeners open that the master closes later.
    drop(opened);
    let mut master = started?;
    for warning in &master.contexts.serving.settings.warnings {
        log::warn!("{warning}");
    }
    serve(&mut master);
    finish(master)
}

/// Opens all that a master needs. Takes the locked pid file when nothing can fail any more.
fn start<'a>(
    mut setup: Setup<'a>,
    pid_file: &mut Option<PidFile>,
    opened: &mut Vec<Rc<Listener>>,
) -> Result<Master<'a>> {
    let system = |what: &'static str| move |error| Error::system(what, error);
    let passed = listeners::adopt_passed(std::mem::take(&mut setup.passed))?;
    let settings = Rc::new(setup.settings.clone());
    let (listeners, observe) = observed::open_all(&settings, (&[], &[]), &passed)?;
    opened.extend(listeners.iter().chain(&observe).cloned());
    let access_file = open_access_file(&settings)?;
    let jobs = setup.host.open_jobs(&settings)?;
    listeners::tune(&settings, &listeners);
    if let Some(pid_file) = pid_file {
        pid_file.write()?;
    }
    let signals = SignalPipe::new(&MASTER_SIGNALS).map_err(system("catch signals"))?;
    let mut workers = Children::new().map_err(system("create the scoreboard"))?;
    slow_calls::publish(&mut workers.metrics, &settings);
    process::become_subreaper().map_err(system("become a subreaper"))?;
    // The last step that can fail, so its path is not removed after a failure.
    let control = ControlSocket::bind(&settings.control_socket)?;
    show_title(&setup);
    let fleet = Fleet::new(limits(&settings), now());
    let registry = setup.host.registry(&settings);
    let context = GenerationContext {
        known: GenerationInfo::of(&settings, &registry, &listeners),
        registry,
        settings,
        listeners,
        observe,
        access_file,
    };
    let lock = || Error::Bug("the lock of the pid file is gone".into());
    let endpoints = Endpoints {
        control,
        notifier: Notifier::from_environment(),
        signals,
        pid_file: pid_file.take().ok_or_else(lock)?,
        passed,
    };
    let children = (workers, Orphans::new());
    Ok(Master::new(
        setup,
        fleet,
        children,
        (context, jobs),
        endpoints,
    ))
}
