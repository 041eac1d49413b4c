//! Runs a server that an upgrade has started: as a probe, or as the master that takes over.
//!
//! The program's `main` and its `on_master_start` run as at any start. An error of a probe is reported to
//! the master that has started it. After an error or panic of a take-over, the previous
//! program is executed again.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use nix::sys::signal::Signal;

use super::{RunningServer, Server, child_main, end, form, one_thread, open_log, start_hooks};
use crate::config::{self, Overrides};
use crate::error::{Error, Result};
use crate::logging::{self, LogOutput};
use crate::master;
use crate::master::resume::{PANICKED, check_state, take_over};
use crate::master::upgrade::{self, ExecAttempt, PROBE_PASSED, StartParams};
use crate::observe;
use crate::sys::signal;
use crate::sys::title::TitleArea;

impl Server {
    /// Tries what a take-over would do, and reports whether it could.
    pub(super) fn probe(self, mut overrides: Overrides) -> Result<()> {
        self.check_names()?;
        one_thread()?;
        let state = upgrade::table_on_stdin()?;
        restore(&mut overrides, &state.origin);
        let settings = config::load(state.origin.file.as_deref(), &overrides)?;
        open_log(&settings)?;
        check_state(state)?;
        logging::log_panics();
        logging::configure(settings.log.level, form(&settings));
        logging::set_output(open_log_of_probe()?);
        start_hooks(&self.hooks, &BTreeSet::new())?;
        let mut stdout = io::stdout();
        writeln!(stdout, "{PROBE_PASSED}")
            .and_then(|()| stdout.flush())
            .map_err(|error| Error::system("say that this program could take over", error))
    }

    /// Continues as the master of the previous program. After any error, that program is executed again.
    pub(super) fn take_over(
        self,
        trial: ExecAttempt,
        overrides: Overrides,
        opened_in_main: &BTreeSet<RawFd>,
    ) -> Result<()> {
        // The program may have set SIGPIPE to its default, which would end the master when the log loses
        // its reader.
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
                log::error!("upgrade: {reason}; rollback failed: {error}");
            }
            // This is the old program again, or one whose upgrade had succeeded.
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
        let gone = || Error::Bug("a take-over without its exec attempt".into());
        let program = self.name();
        let state = trial.as_mut().ok_or_else(gone)?.read()?;
        let origin = state.origin.clone();
        restore(&mut overrides, &origin);
        // The configuration of the old workers. If this version cannot read it, that of the new ones.
        let file = origin.file.clone();
        let (settings, strange) =
            match config::from_effective(state.served(), file.clone(), &overrides) {
                Ok(settings) => (settings, None),
                Err(error) => (config::load(file.as_deref(), &overrides)?, Some(error)),
            };
        let log = match (state.log, trial.as_ref()) {
            (Some(number), Some(trial)) => trial.through().take(number).map(LogOutput::received),
            _ => LogOutput::standard_error(),
        };
        let log = log.map_err(|error| Error::system("continue the log", error))?;
        logging::configure(settings.log.level, form(&settings));
        logging::set_output(log);
        logging::init_master_log();
        if let Some(error) = strange {
            log::warn!(
                "this version cannot read the configuration of the old workers, so a worker that dies \
                 is replaced with the new configuration: {error}"
            );
        }
        one_thread()?;
        // SAFETY: one thread runs, as checked above.
        let title = unsafe { TitleArea::claim() };
        let hooks = Arc::new(std::mem::take(&mut self.hooks));
        trial
            .as_mut()
            .ok_or_else(gone)?
            .listen(&master::MASTER_SIGNALS)?;
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
            worker_main: child_main,
            observer_main: observe::run,
            passed: Vec::new(),
            launcher: &mut None,
        };
        take_over(setup, state)
    }
}

/// Opens the log of a probe, which is part of the reason if it fails.
fn open_log_of_probe() -> Result<LogOutput> {
    logging::open(None).map_err(|error| Error::system("log to standard error", error))
}

/// Sets the options of the first start's command line.
fn restore(overrides: &mut Overrides, origin: &StartParams) {
    // An upgrade keeps the paths, whatever the name of the new program is.
    overrides.name.clone_from(&origin.name);
    overrides.daemon = origin.daemon;
    overrides.listen.clone_from(&origin.listen);
}
