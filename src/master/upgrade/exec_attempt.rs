//! Executes another program in the master's process, and goes back to the old one.
//!
//! The new program finds in its environment which descriptors hold the state and the old program
//! ([`StartMode`]). Until the upgrade has succeeded, it keeps everything as it was passed. On any error of
//! its own it executes the old program with the same state. If that fails, the error ends the master.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::env;
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use super::probe::{arguments, directory};
use super::start_params::{REASON, StartParams, VARIABLE};
use super::state::{LONGEST, UpgradeState};
use nix::sys::signal::Signal;

use crate::error::{Error, Result};
use crate::sys::memory_file;
use crate::sys::process::Pid;
use crate::sys::reexec;
use crate::sys::reexec::{Image, InheritedFds, c_string, exec_image};
use crate::sys::signal::{self, SignalPipe};

/// The longest reason that is passed back, in bytes, because the room in an environment is limited.
const LONGEST_REASON: usize = 4096;

/// How an upgrade has started this program.
#[derive(Debug)]
pub enum StartMode {
    /// As a probe: it checks whether it could take over the state on its standard input.
    Probe,
    /// As the next master: the new program, or the old one after a rollback.
    TakeOver(ExecAttempt),
}

/// An exec that may still be rolled back.
#[derive(Debug)]
pub struct ExecAttempt {
    /// The arguments of this program.
    arguments: Vec<OsString>,
    /// The working directory of the program before.
    directory: Option<PathBuf>,
    /// The memory file with the state.
    table: OwnedFd,
    /// The program before; `None` after a rollback, because then this is the old program.
    image: Option<OwnedFd>,
    /// All descriptors in the state. Empty until that was read.
    through: InheritedFds,
    /// Why the new program gave up; `Some` only after a rollback.
    reason: Option<String>,
    /// Signals that come before there is a master.
    signals: Option<SignalPipe>,
}

impl StartMode {
    /// Returns how an upgrade has started this program; `None` if none has. Call it once, before the
    /// program has a second thread.
    ///
    /// # Errors
    /// If the passed descriptors do not exist.
    pub fn take() -> Result<Option<Self>> {
        // SAFETY: `Server::serve` calls this first, before the program starts a thread; it refuses
        // to continue with more than one.
        let Some(value) = (unsafe { reexec::take_variable(VARIABLE) }) else {
            return Ok(None);
        };
        // SAFETY: likewise.
        let reason = unsafe { reexec::take_variable(REASON) };
        let value = value.to_string_lossy().into_owned();
        let mut words = value.split(' ');
        let word = words.next().unwrap_or_default();
        if word == "probe" {
            return Ok(Some(StartMode::Probe));
        }
        let numbers: Vec<i32> = words.filter_map(|word| word.parse().ok()).collect();
        let (table, image) = match (word, numbers[..].split_first()) {
            // The variable belongs to another process, which has passed on its environment.
            (_, Some((&pid, _))) if pid != Pid::current().0 => return Ok(None),
            ("exec", Some((_, &[table, image]))) => (table, Some(image)),
            ("back", Some((_, &[table]))) => (table, None),
            _ => return Ok(None),
        };
        let cant = |error| Error::system("take over the old program's descriptors", error);
        let both = BTreeSet::from_iter([table].into_iter().chain(image));
        // SAFETY: the program before passed these two for this one alone, and the variable that
        // names them is gone, so they are claimed once.
        let both = unsafe { InheritedFds::claim(&both, true) }.map_err(cant)?;
        let image = image.map(|image| both.take(image)).transpose();
        Ok(Some(StartMode::TakeOver(ExecAttempt {
            arguments: env::args_os().collect(),
            directory: None,
            table: both.take(table).map_err(cant)?,
            image: image.map_err(cant)?,
            through: InheritedFds::default(),
            reason: reason.map(|reason| reason.to_string_lossy().into_owned()),
            signals: None,
        })))
    }
}

/// Reads the state for a probe.
///
/// # Errors
/// If there is none, or it cannot be read.
pub fn table_on_stdin() -> Result<UpgradeState> {
    let bytes = reexec::read_whole(io::stdin().as_fd(), LONGEST)
        .map_err(|error| Error::system("read the server's state from standard input", error))?;
    UpgradeState::of_json(&bytes)
}

impl ExecAttempt {
    /// Reads the state and takes over its descriptors, which the next exec closes.
    ///
    /// # Errors
    /// If the state cannot be read, or a descriptor does not exist.
    pub fn read(&mut self) -> Result<UpgradeState> {
        let cant = |error| Error::system("take over the old program's state", error);
        let table = reexec::read_whole(self.table.as_fd(), LONGEST).map_err(cant)?;
        let state = UpgradeState::of_json(&table)?;
        self.directory = Some(directory(&state.origin).to_owned());
        let for_good = self.image.is_none();
        // SAFETY: the state lists what the program before passed on. It is read once, and nothing
        // here owns one of these numbers yet.
        self.through =
            unsafe { InheritedFds::claim(&state.descriptors(), for_good) }.map_err(cant)?;
        Ok(state)
    }

    /// Unblocks signals and keeps them for the master. Otherwise the programs that this one starts would
    /// inherit the mask from the exec.
    ///
    /// # Errors
    /// If the signals cannot be caught.
    pub fn listen(&mut self, handled: &[Signal]) -> Result<()> {
        let signals = SignalPipe::new(handled);
        self.signals = Some(signals.map_err(|error| Error::system("catch signals", error))?);
        signal::unblock_all();
        Ok(())
    }

    /// Takes the pipe with the signals so far.
    pub fn take_signals(&mut self) -> Option<SignalPipe> {
        self.signals.take()
    }

    /// Returns the descriptors in the state.
    pub fn through(&self) -> &InheritedFds {
        &self.through
    }

    /// Returns why the new program gave up; `None` unless this is the old program after a rollback.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Returns whether there is a program to go back to.
    pub fn can_go_back(&self) -> bool {
        self.image.is_some()
    }

    /// Executes the old program, with everything as it was passed. Returns only if that failed.
    pub fn exec_old(&self, reason: &str) -> io::Error {
        let Some(image) = &self.image else {
            return io::Error::other("this is the old program already");
        };
        signal::block_all();
        if let Some(signals) = &self.signals {
            signals.requeue_pending();
        }
        if let Some(directory) = &self.directory {
            let _ = env::set_current_dir(directory);
        }
        let arguments: io::Result<Vec<CString>> = self.arguments.iter().map(c_string).collect();
        let arguments = match arguments {
            Ok(arguments) => arguments,
            Err(error) => return error,
        };
        let mut numbers = self.through.numbers();
        let table = self.table.as_raw_fd();
        numbers.push(table);
        let environment = back(table, reason);
        exec_image(
            Image::Open(image.as_fd()),
            &arguments,
            &environment,
            &numbers,
        )
    }

    /// Executes the old program with the current state. Returns only if that failed.
    pub fn exec_old_with_state(
        &self,
        state: &UpgradeState,
        signals: &SignalPipe,
        reason: &str,
    ) -> io::Error {
        let Some(image) = &self.image else {
            return io::Error::other("there is no old program");
        };
        exec_with_state(Image::Open(image.as_fd()), state, signals, |table| {
            (back(table, reason), None)
        })
    }
}

/// Executes the program that is now at the server's path. Returns only if that failed. Then nothing has
/// changed.
pub fn exec_new(state: &UpgradeState, signals: &SignalPipe) -> io::Error {
    let own = match reexec::own_image() {
        Ok(own) => own,
        Err(error) => return error,
    };
    exec_with_state(Image::At(&state.origin.path), state, signals, |table| {
        let value = format!("exec {} {table} {}", Pid::current(), own.as_raw_fd());
        let value = OsString::from(value);
        let environment = reexec::environment(&[REASON], &[(VARIABLE, &value)]);
        (environment, Some(own.as_raw_fd()))
    })
}

fn back(table: RawFd, reason: &str) -> Vec<CString> {
    let mut end = reason.len().min(LONGEST_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let reason = reason[..end].replace('\0', " ");
    let value = format!("back {} {table}", Pid::current());
    reexec::environment(
        &[],
        &[
            (VARIABLE, OsStr::new(&value)),
            (REASON, OsStr::new(&reason)),
        ],
    )
}

/// Executes a program. `environment` gets the number of the state's descriptor. It returns the environment,
/// and one more descriptor to pass.
fn exec_with_state(
    image: Image<'_>,
    state: &UpgradeState,
    signals: &SignalPipe,
    environment: impl FnOnce(RawFd) -> (Vec<CString>, Option<RawFd>),
) -> io::Error {
    let table = match state.to_json() {
        Ok(bytes) => memory_file::create(&bytes),
        Err(error) => Err(io::Error::other(error.to_string())),
    };
    let (table, arguments) = match (table, arguments(&state.origin)) {
        (Ok(table), Ok(arguments)) => (table, arguments),
        (Err(error), _) | (_, Err(error)) => return error,
    };
    let (environment, more) = environment(table.as_raw_fd());
    let mut through: Vec<RawFd> = state.descriptors().into_iter().collect();
    through.push(table.as_raw_fd());
    through.extend(more);
    // Signals from here on stay pending, and so do those that were not handled: execve(2) keeps the mask
    // and pending signals, so the next program gets them.
    signal::block_all();
    signals.requeue_pending();
    let here = enter(&state.origin);
    let error = exec_image(image, &arguments, &environment, &through);
    if let Some(here) = here {
        let _ = env::set_current_dir(here);
    }
    signal::unblock_all();
    error
}

/// Changes to the directory of the start. Returns the directory before.
fn enter(origin: &StartParams) -> Option<PathBuf> {
    let here = env::current_dir().ok();
    let _ = env::set_current_dir(directory(origin));
    here
}
