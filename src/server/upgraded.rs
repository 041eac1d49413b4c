//! A server that is started by an upgrade: as the probe of one, or to go on as the master that another
//! program was.
//!
//! The program's `main` has run as at any start, and its `on_master_start` runs here as there. What
//! fails in a probe is told to the master that asks; what fails in a take-over, a panic too, goes back
//! to the program before.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use nix::sys::signal::Signal;

use super::{RunningServer, Server, end, form, one_thread, open_log, start_hooks};
use crate::config::{self, Overrides};
use crate::error::{Error, Result};
use crate::logging::{self, LogOutput};
use crate::master;
use crate::master::upgrade::{self, ExecAttempt, PANICKED, PROBE_PASSED, StartParams};
use crate::sys::signal;
use crate::sys::title::TitleArea;
use crate::worker;

impl Server {
    /// Tries what a take-over would do, beside the master that asks, and says whether it could.
    pub(super) fn probe(self, mut overrides: Overrides) -> Result<()> {
        self.check_names()?;
        one_thread()?;
        let state = upgrade::table_on_stdin()?;
        restore(&mut overrides, &state.origin);
        let settings = config::load(state.origin.file.as_deref(), &overrides)?;
        open_log(&settings)?;
        upgrade::check_state(state)?;
        logging::log_panics();
        logging::configure(settings.log.level, form(&settings));
        logging::set_output(open_log_of_probe()?);
        start_hooks(&self.hooks, &BTreeSet::new())?;
        let mut stdout = io::stdout();
        writeln!(stdout, "{PROBE_PASSED}")
            .and_then(|()| stdout.flush())
            .map_err(|error| Error::system("say that this program could take over", error))
    }

    /// Is the master that the program before was. On any error it becomes that one once more.
    pub(super) fn take_over(
        self,
        trial: ExecAttempt,
        overrides: Overrides,
        opened_in_main: &BTreeSet<RawFd>,
    ) -> Result<()> {
        // The program may have set its default, which would end the master when the log loses its reader.
        signal::ignore(&[Signal::SIGPIPE]);
        logging::log_panics();
        let mut trial = Some(trial);
        let lived = catch_unwind(AssertUnwindSafe(|| {
            self.taken_over(&mut trial, overrides, opened_in_main)
        }));
        let reason = match &lived {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(PANICKED.to_owned()),
        };
        match (trial.filter(ExecAttempt::can_go_back), reason) {
            (_, None) => {}
            (Some(trial), Some(reason)) => {
                let error = trial.exec_old(&reason);
                log::error!("upgrade: {reason}; and there is no way back: {error}");
            }
            // The old program once more, or one that had taken over for good.
            (None, Some(reason)) => {
                log::error!("the master ends, and its workers with it: {reason}")
            }
        }
        end(lived, None)
    }

    fn taken_over(
        mut self,
        trial: &mut Option<ExecAttempt>,
        mut overrides: Overrides,
        opened_in_main: &BTreeSet<RawFd>,
    ) -> Result<()> {
        let gone = || Error::Bug("a take-over without its trial".into());
        let program = self.name();
        let state = trial.as_mut().ok_or_else(gone)?.read()?;
        let origin = state.origin.clone();
        restore(&mut overrides, &origin);
        // What the old workers run on; where it means nothing to this version, what the new ones will.
        let file = origin.file.clone();
        let (settings, strange) =
            match config::from_effective(state.settings.clone(), file.clone(), &overrides) {
                Ok(settings) => (settings, None),
                Err(error) => (config::load(file.as_deref(), &overrides)?, Some(error)),
            };
        let log = match (state.log, trial.as_ref()) {
            (Some(number), Some(trial)) => trial.through().take(number).map(LogOutput::received),
            _ => LogOutput::standard_error(),
        };
        let log = log.map_err(|error| Error::system("go on with the log", error))?;
        logging::configure(settings.log.level, form(&settings));
        logging::set_output(log);
        logging::init_master_log();
        if let Some(error) = strange {
            log::warn!(
                "the configuration of the workers that serve can't be read by this version, so one \
                 that dies is replaced on the new one: {error}"
            );
        }
        // SAFETY: one thread runs, as checked above.
        let title = unsafe { TitleArea::claim() };
        let hooks = Arc::new(std::mem::take(&mut self.hooks));
        trial.as_mut().ok_or_else(gone)?.listen()?;
        let kept = start_hooks(&hooks, opened_in_main)?;
        if settings.daemon {
            let _ = std::env::set_current_dir("/");
        }
        let setup = master::Setup {
            program,
            title,
            settings,
            origin,
            trial,
            host: &RunningServer {
                server: &self,
                file,
                overrides,
                hooks,
                kept,
            },
            worker_main: worker::run,
            passed: Vec::new(),
            launcher: &mut None,
        };
        upgrade::take_over(setup, state)
    }
}

/// What a probe logs is part of its reason, if it has one.
fn open_log_of_probe() -> Result<LogOutput> {
    logging::open(None).map_err(|error| Error::system("log to standard error", error))
}

/// Puts in what the command line said at the first start, as it was understood there and then.
fn restore(overrides: &mut Overrides, origin: &StartParams) {
    // An upgrade keeps the paths, whatever the new program is called.
    overrides.name.clone_from(&origin.name);
    overrides.daemon = origin.daemon;
    overrides.listen.clone_from(&origin.listen);
}
