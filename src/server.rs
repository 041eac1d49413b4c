//! The server: joins configuration, methods, log, master and workers.
//!
//! A program registers its methods (`methods`) and runs the server. `cli` has the commands and options.
//! Fails if the master could not start, or with the panic that ended it.

#![allow(unsafe_code)]

mod methods;
mod upgraded;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::acceptor;
use crate::config::{self, Builtin, LogFormat, MethodKind, Overrides, Settings};
use crate::error::{Error, Result};
use crate::handler::command::CommandHandler;
use crate::handler::handler_state::{HandlerState, Hooks};
use crate::handler::pool::{Pool, Pooled};
use crate::handler::registry::{Method, Registry};
use crate::handler::{Handler, builtin};
use crate::jobs;
use crate::logging::{self, LineFormat, LogOutput};
use crate::master;
use crate::master::upgrade::{StartMode, StartParams};
use crate::observe;
use crate::sys::daemon::{self, Detached, Launcher};
use crate::sys::descriptor;
use crate::sys::notify::{self, PassedListener};
use crate::sys::process;
use crate::sys::signal;
use crate::sys::title::TitleArea;
use crate::worker;
use crate::worker_init::{JobsInstance, WorkerInit};

/// How long threads that were joined before the fork may take to end.
const THREADS_END: Duration = Duration::from_secs(1);

/// A server with the methods that a program gives it.
///
/// ```no_run
/// fn main() -> std::process::ExitCode {
///     preforkd::Server::new().method("add", |(a, b): (f64, f64)| Ok(a + b)).run()
/// }
/// ```
#[derive(Default)]
pub struct Server {
    name: Option<String>,
    methods: BTreeMap<String, Arc<dyn Handler>>,
    /// The prefix of methods that are added now.
    prefix: String,
    hooks: Hooks,
    /// The first name that was registered twice. It is an error when the server runs.
    twice: Option<String>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let methods: Vec<&String> = self.methods.keys().collect();
        f.debug_struct("Server")
            .field("methods", &methods)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Makes a server that has only the built-in methods.
    pub fn new() -> Self {
        Server::default()
    }

    /// Sets the name in titles and messages. The default is the name of the executable. Pid file and
    /// control socket are named after it too, unless the configuration names them: `/run/NAME/NAME.pid`.
    /// The option `--name` has precedence.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Returns the name in titles and messages.
    pub fn name(&self) -> String {
        let executable = || {
            let first = std::env::args_os().next()?;
            Some(
                Path::new(&first)
                    .file_name()?
                    .to_string_lossy()
                    .into_owned(),
            )
        };
        self.name
            .clone()
            .or_else(executable)
            .unwrap_or_else(|| "preforkd".into())
    }

    /// Returns the names of the methods that the program has registered.
    pub fn functions(&self) -> BTreeSet<String> {
        self.methods.keys().cloned().collect()
    }

    /// Runs the master until it is stopped.
    ///
    /// # Errors
    /// Why it could not start, or what ended it.
    pub fn serve(mut self, file: Option<PathBuf>, mut overrides: Overrides) -> Result<()> {
        overrides.functions = self.functions();
        overrides.name = Some(config::server_name(&self.name()));
        // First, because from here on this code opens descriptors too.
        let opened_in_main = opened_in_main();
        match StartMode::take()? {
            None => {}
            Some(StartMode::Probe) => return self.probe(overrides),
            Some(StartMode::TakeOver(trial)) => {
                return self.take_over(trial, overrides, &opened_in_main);
            }
        }
        self.check_names()?;
        one_thread()?;
        overrides.make_absolute();
        let settings = config::load(file.as_deref(), &overrides)?;
        // A reload must find the same file from any directory of the daemon.
        let file = settings.file.clone().or(file);
        let program = self.name();
        // Before the title overwrites the arguments, and before the daemon leaves its directory.
        let origin = StartParams::of_this_process(file.clone(), &overrides);
        // SAFETY: one thread runs, as checked above.
        let title = unsafe { TitleArea::claim() };
        // Before the pid changes, because the service manager's variables contain it.
        // SAFETY: one thread runs, as checked above, and nothing owns a passed descriptor yet.
        let passed = unsafe { notify::take_listeners() }
            .map_err(|error| Error::system("take the service manager's listeners", error))?;
        // The program may have set SIGPIPE to its default, which would end the master when the log loses
        // its reader.
        signal::ignore(&[Signal::SIGPIPE]);
        configure_log(&settings)?;
        logging::log_panics();
        let mut launcher = None;
        if settings.daemon {
            match daemon::detach().map_err(|error| Error::system("detach", error))? {
                Detached::Launcher(word) => return launched(word),
                Detached::Daemon(waiting) => {
                    leave_descriptors(&waiting, &passed, &opened_in_main);
                    launcher = Some(waiting);
                }
            }
        }
        logging::init_master_log();
        raise_descriptor_limit();
        let hooks = Arc::new(std::mem::take(&mut self.hooks));
        let kept = match start_hooks(&hooks, &opened_in_main) {
            Ok(kept) => kept,
            Err(error) => return end(Ok(Err(error)), launcher),
        };
        let mut trial = None;
        let setup = master::Setup {
            program,
            title,
            settings,
            origin,
            trial: &mut trial,
            host: &RunningServer {
                server: &self,
                file: file.clone(),
                overrides,
                hooks,
                kept,
            },
            worker_main: child_main,
            observer_main: observe::run,
            passed,
            launcher: &mut launcher,
        };
        let mut lived = catch_unwind(AssertUnwindSafe(|| master::run(setup)));
        if let Ok(Err(Error::AlreadyRunning { is_configured, .. })) = &mut lived {
            *is_configured = config::is_set(file.as_deref(), "pid-file");
        }
        end(lived, launcher)
    }

    fn check_names(&self) -> Result<()> {
        match &self.twice {
            None => Ok(()),
            Some(name) => Err(Error::Usage(format!(
                "the method {name:?} is registered twice in this program: rename one of them"
            ))),
        }
    }
}

/// A running server: what a reload needs to know of its start.
struct RunningServer<'a> {
    server: &'a Server,
    file: Option<PathBuf>,
    overrides: Overrides,
    hooks: Arc<Hooks>,
    kept: HandlerState,
}

impl master::Embedder for RunningServer<'_> {
    fn load(&self) -> Result<Settings> {
        config::load(self.file.as_deref(), &self.overrides)
    }

    fn configure_log(&self, settings: &Settings) -> Result<Option<LogOutput>> {
        configure_log(settings)
    }

    fn restore_log(&self, settings: &Settings, output: LogOutput) {
        logging::configure(settings.log.level, form(settings));
        logging::set_output(output);
    }

    fn open_jobs(&self, settings: &Settings) -> Result<Option<JobsInstance>> {
        let Some(config) = &settings.jobs else {
            return Ok(None);
        };
        jobs::open::instance(config, settings.account.as_ref()).map(Some)
    }

    fn registry(&self, settings: &Settings) -> Arc<Registry> {
        let pools = settings.used_pools();
        let limits = &settings.limits;
        let method = |(name, method): (&String, &config::MethodConfig)| {
            let handler: Arc<dyn Handler> = match &method.kind {
                MethodKind::Builtin(Builtin::Ping) => Arc::new(builtin::Ping),
                MethodKind::Builtin(Builtin::Echo) => Arc::new(builtin::Echo),
                MethodKind::Builtin(Builtin::Sleep) => Arc::new(builtin::Sleep),
                // `config` accepts only registered names.
                MethodKind::Command(command) => {
                    Arc::new(CommandHandler::new(command, (limits.depth, limits.frame)))
                }
                MethodKind::Pool(name) => Arc::new(Pooled {
                    number: pools.iter().position(|pool| *pool == name)?,
                }),
                MethodKind::Function => Arc::clone(self.server.methods.get(name)?),
            };
            Some(Method {
                name: name.clone(),
                handler,
                timeout: method.timeout,
                concurrency: method.concurrency,
                rate: method.rate,
                kills_abandoned: method.kills_abandoned,
            })
        };
        let methods = settings.methods.iter().filter_map(method).collect();
        let pool = |name: &&String| {
            Some(Arc::new(Pool::new(
                name,
                settings.pools.get(*name)?,
                settings,
            )))
        };
        let pools = pools.iter().filter_map(pool).collect();
        let registry = Registry::new(methods).with_pools(pools, settings.pool_processes());
        let registry = match settings.jobs {
            Some(_) => registry.with_jobs(limits.timeout),
            None => registry,
        };
        Arc::new(registry.with(Arc::clone(&self.hooks), self.kept.clone()))
    }
}

/// Runs a child of the master.
fn child_main(boot: WorkerInit<'_>) -> ! {
    match boot.slot.acceptor() {
        Some(_) => acceptor::run(boot),
        None if boot.slot.is_jobs() => jobs::process::run(boot),
        None => worker::run(boot),
    }
}

/// Converts the result of the daemon's start for the launching process.
fn launched(word: Option<(u8, String)>) -> Result<()> {
    match word {
        Some((0, _)) => Ok(()),
        Some((code, message)) => Err(Error::Daemon { code, message }),
        None => Err(Error::Bug(
            "the daemon exited before it was ready, without a reason".into(),
        )),
    }
}

fn form(settings: &Settings) -> LineFormat {
    match settings.log.format {
        LogFormat::Json => LineFormat::Json,
        LogFormat::Text if settings.log.file.is_none() && logging::is_journal() => {
            LineFormat::Journal
        }
        LogFormat::Text => LineFormat::Text,
    }
}

fn configure_log(settings: &Settings) -> Result<Option<LogOutput>> {
    let output = open_log(settings)?;
    logging::configure(settings.log.level, form(settings));
    Ok(logging::set_output(output))
}

fn open_log(settings: &Settings) -> Result<LogOutput> {
    let file = settings.log.file.as_deref();
    logging::open(file).map_err(|error| {
        let place = file.map_or("standard error".into(), |file| file.display().to_string());
        Error::system_with(
            format!("open the log {place}"),
            error,
            "set log.file to a path that this user may write",
        )
    })
}

/// Returns the open descriptors with CLOEXEC, which the program has opened. A descriptor without it may
/// come from the shell, and there is no way to tell.
fn opened_in_main() -> BTreeSet<RawFd> {
    let mut open = descriptor::list_open();
    open.retain(|&fd| descriptor::is_closed_on_exec(fd));
    open
}

/// Calls the start hooks, and records which descriptors belong to the program.
fn start_hooks(hooks: &Hooks, opened_in_main: &BTreeSet<RawFd>) -> Result<HandlerState> {
    let before = descriptor::list_open();
    let kept = hooks.start_master().map_err(Error::NotReady)?;
    // Before the descriptors are listed, because those of a thread are closed at its end.
    one_thread()?;
    // The master itself opens nothing in between.
    let mut descriptors = descriptor::list_open();
    descriptors.retain(|fd| opened_in_main.contains(fd) || !before.contains(fd));
    // A C library may open a file without O_CLOEXEC, which the program of an upgrade would inherit.
    descriptors
        .iter()
        .copied()
        .for_each(descriptor::close_on_exec);
    Ok(kept.with_descriptors(descriptors))
}

/// Closes the descriptors of the launching shell, except the standard streams. If a daemon kept a pipe or a lock of a
/// script, the script would wait for it forever. The program's descriptors stay open.
fn leave_descriptors(
    launcher: &Launcher,
    passed: &[PassedListener],
    opened_in_main: &BTreeSet<RawFd>,
) {
    let mut keep: Vec<RawFd> = passed
        .iter()
        .map(|listener| listener.fd.as_raw_fd())
        .collect();
    keep.extend(opened_in_main);
    keep.push(launcher.raw_descriptor());
    keep.extend(logging::output_descriptor());
    // SAFETY: only the kept descriptors are used from here on. The program has opened the others before, or
    // the shell has passed them on, and no value of this process owns them.
    unsafe { descriptor::close_all_but(&keep) };
}

/// Waits until the process has one thread: a fork copies only this thread, but all locks of others. Joined
/// threads may count for a short time.
fn one_thread() -> Result<()> {
    match process::wait_for_one_thread(THREADS_END) {
        0 | 1 => Ok(()),
        threads => Err(Error::Usage(format!(
            "{threads} threads run in the master, but a fork copies only one of them; start \
             threads in on_worker_start instead of main and on_master_start"
        ))),
    }
}

fn raise_descriptor_limit() {
    match process::raise_descriptor_limit() {
        Ok(limit) => log::debug!("{limit} descriptors may be open"),
        Err(error) => log::warn!(
            "could not raise the limit of open files: {error}; the soft limit stays as it was at the start, and workers \
             may accept fewer connections"
        ),
    }
}

/// Reports the end of the master to the launching process, if that still waits.
fn end(lived: std::thread::Result<Result<()>>, launcher: Option<Launcher>) -> Result<()> {
    let outcome = lived.unwrap_or_else(|_| {
        // The hook has logged it. The workers see that their links are closed, answer running calls and
        // exit.
        Err(Error::Bug("the master panicked; the log says where".into()))
    });
    if let (Err(error), Some(launcher)) = (&outcome, launcher) {
        launcher.failed(error.exit_code(), &error.to_string());
    }
    if let Err(error @ Error::Bug(_)) = &outcome {
        log::error!("{error}");
        process::exit_now(i32::from(error.exit_code()));
    }
    outcome
}
