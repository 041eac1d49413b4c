//! The server: where configuration, methods, log, master and workers are joined.
//!
//! A program registers its methods (`methods`) and runs; commands and options are `cli`'s. Fails with
//! what stopped the master from starting, or with the panic that ended it.

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

use crate::config::{self, Builtin, LogFormat, MethodKind, Overrides, Settings};
use crate::error::{Error, Result};
use crate::handler::command::CommandHandler;
use crate::handler::handler_state::{HandlerState, Hooks};
use crate::handler::pool::{Pool, Pooled};
use crate::handler::registry::{Method, Registry};
use crate::handler::{Handler, builtin};
use crate::logging::{self, LineFormat, LogOutput};
use crate::master;
use crate::master::upgrade::{StartMode, StartParams};
use crate::sys::daemon::{self, Detached, Launcher};
use crate::sys::descriptor;
use crate::sys::notify::{self, PassedListener};
use crate::sys::process;
use crate::sys::signal;
use crate::sys::title::TitleArea;
use crate::worker;

/// How long threads that were joined before the fork may take to end.
const THREADS_END: Duration = Duration::from_secs(1);

/// A server with the methods that a program gives it.
///
/// ```no_run
/// fn main() -> std::process::ExitCode {
///     preforkd::Server::new().method("add", |(a, b): (i64, i64)| Ok(a + b)).run()
/// }
/// ```
#[derive(Default)]
pub struct Server {
    name: Option<String>,
    methods: BTreeMap<String, Arc<dyn Handler>>,
    /// What is put before the name of each method that is added now.
    prefix: String,
    hooks: Hooks,
    /// The first name that was registered twice: told when the server is run.
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
    /// A server with no method but the built-in ones.
    pub fn new() -> Self {
        Server::default()
    }

    /// The name in titles and messages, in place of that of the executable. Pid file and control socket
    /// are named after it too, unless the configuration names them: `/run/NAME/NAME.pid`. The option
    /// `--name` has precedence.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The name in titles and messages.
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

    /// The names of the methods that the program has registered.
    pub fn functions(&self) -> BTreeSet<String> {
        self.methods.keys().cloned().collect()
    }

    /// Runs the master until it is told to leave.
    ///
    /// # Errors
    /// What kept it from starting, or ended it.
    pub fn serve(mut self, file: Option<PathBuf>, mut overrides: Overrides) -> Result<()> {
        overrides.functions = self.functions();
        overrides.name = Some(config::server_name(&self.name()));
        // First: from here on we open descriptors too.
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
        // A reload must find the same file from wherever the daemon then is.
        let file = settings.file.clone().or(file);
        let program = self.name();
        // Before the title is written over the arguments, and before the directory is left.
        let origin = StartParams::of_this_process(file.clone(), &overrides);
        // SAFETY: one thread runs, as checked above.
        let title = unsafe { TitleArea::claim() };
        // Before the pid changes, which the service manager has written into the variables.
        // SAFETY: one thread runs, as checked above, and nothing owns a passed descriptor yet.
        let passed = unsafe { notify::take_listeners() }
            .map_err(|error| Error::system("take the service manager's listeners", error))?;
        // The program may have set its default, which would end the master when the log loses its reader.
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
                file,
                overrides,
                hooks,
                kept,
            },
            worker_main: worker::run,
            passed,
            launcher: &mut launcher,
        };
        let lived = catch_unwind(AssertUnwindSafe(|| master::run(setup)));
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

/// A server that runs: what a reload needs to know of its start.
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

    fn registry(&self, settings: &Settings) -> Arc<Registry> {
        let pools = settings.used_pools();
        let limits = &settings.limits;
        let method = |(name, method): (&String, &config::MethodConfig)| {
            let handler: Arc<dyn Handler> = match &method.kind {
                MethodKind::Builtin(Builtin::Ping) => Arc::new(builtin::Ping),
                MethodKind::Builtin(Builtin::Echo) => Arc::new(builtin::Echo),
                MethodKind::Builtin(Builtin::Sleep) => Arc::new(builtin::Sleep),
                // `config` lets only names through that it was told of.
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
        let registry = Registry::new(methods).with_pools(pools);
        Arc::new(registry.with(Arc::clone(&self.hooks), self.kept.clone()))
    }
}

/// What the launching shell is told.
fn launched(word: Option<(u8, String)>) -> Result<()> {
    match word {
        Some((0, _)) => Ok(()),
        Some((code, message)) => Err(Error::Daemon { code, message }),
        None => Err(Error::Bug(
            "the daemon ended before it was ready, without a word".into(),
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
            "name a place that this user may write to in log.file",
        )
    })
}

/// The descriptors that the program has opened so far: those that its exec would have closed. Another
/// one may come from the shell, and nothing tells which does.
fn opened_in_main() -> BTreeSet<RawFd> {
    let mut open = descriptor::list_open();
    open.retain(|&fd| descriptor::is_closed_on_exec(fd));
    open
}

/// Lets the program make what the master keeps, and finds out which descriptors are the program's.
fn start_hooks(hooks: &Hooks, opened_in_main: &BTreeSet<RawFd>) -> Result<HandlerState> {
    let before = descriptor::list_open();
    let kept = hooks.start_master().map_err(Error::NotReady)?;
    // Before the next look: what a thread closes at its end is not the program's any more.
    one_thread()?;
    // The master itself opens nothing in between.
    let mut descriptors = descriptor::list_open();
    descriptors.retain(|fd| opened_in_main.contains(fd) || !before.contains(fd));
    // A C library may open one without O_CLOEXEC, which the program after an upgrade would inherit.
    descriptors
        .iter()
        .copied()
        .for_each(descriptor::close_on_exec);
    Ok(kept.with_descriptors(descriptors))
}

/// Closes what the launching shell had open besides the standard streams: a daemon that keeps a
/// pipe or a lock of a script's would hold that script up for as long as it lives. What the program has
/// opened stays open.
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
    // SAFETY: nothing but the kept descriptors is used from here on: the program has opened the
    // rest before, or the shell has passed it on, and no value of this process owns it.
    unsafe { descriptor::close_all_but(&keep) };
}

/// A fork copies this thread alone, and every lock that another one holds. Threads that were joined may
/// still be counted for a short time, so they are waited for.
fn one_thread() -> Result<()> {
    match process::wait_for_one_thread(THREADS_END) {
        0 | 1 => Ok(()),
        threads => Err(Error::Usage(format!(
            "{threads} threads run in the master, whose fork would copy but one of them; start \
             threads in on_worker_start, in place of main and on_master_start"
        ))),
    }
}

fn raise_descriptor_limit() {
    match process::raise_descriptor_limit() {
        Ok(limit) => log::debug!("{limit} descriptors may be open"),
        Err(error) => log::warn!("the limit of open descriptors stays as it is: {error}"),
    }
}

/// The master has left: tells the launching shell if it still waits.
fn end(lived: std::thread::Result<Result<()>>, launcher: Option<Launcher>) -> Result<()> {
    let outcome = lived.unwrap_or_else(|_| {
        // The hook has logged it. The workers see their links end, answer what runs, and leave.
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
