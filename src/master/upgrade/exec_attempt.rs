//! Between two programs in one process: how the next one is begun, and how it goes back.
//!
//! The program that is begun finds in its environment which descriptors hold the table and the
//! program before it ([`StartMode`]). As long as its upgrade is on trial it keeps everything just as it
//! came, and on any error of its own becomes the program before once more, with the same table.
//! What can't even go back is an error like any other, and ends the master.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::env;
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use super::super::start::MASTER_SIGNALS;
use super::probe::{arguments, directory};
use super::start_params::StartParams;
use super::state::{LONGEST, UpgradeState};
use super::{REASON, VARIABLE};
use crate::error::{Error, Result};
use crate::sys::memory_file;
use crate::sys::process::Pid;
use crate::sys::reexec;
use crate::sys::reexec::{Image, InheritedFds, c_string, exec_image};
use crate::sys::signal::{self, SignalPipe};

/// The longest reason that goes back with it, in bytes: an environment has not much room.
const LONGEST_REASON: usize = 4096;

/// What a program finds when it is started by an upgrade.
#[derive(Debug)]
pub enum StartMode {
    /// It is asked whether it could take over; the table is on its standard input.
    Probe,
    TakeOver(ExecAttempt),
}

/// A take-over that may still be taken back.
#[derive(Debug)]
pub struct ExecAttempt {
    /// How this program was called.
    arguments: Vec<OsString>,
    /// Where the program before worked.
    directory: Option<PathBuf>,
    /// The table's file.
    table: OwnedFd,
    /// The program before, unless this is where it went back to.
    image: Option<OwnedFd>,
    /// All that the table names, once it was read.
    through: InheritedFds,
    /// Why the program after this one gave up, if this is where it went back to.
    reason: Option<String>,
    /// What is heard before there is a master to hear it.
    signals: Option<SignalPipe>,
}

impl StartMode {
    /// What this program was started for, if by an upgrade. To be asked once, early, while it has
    /// one thread.
    ///
    /// # Errors
    /// When what it was promised is not there.
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
            // Another process's variable, that somebody passed on: nothing of ours.
            (_, Some((&pid, _))) if pid != Pid::current().0 => return Ok(None),
            ("exec", Some((_, &[table, image]))) => (table, Some(image)),
            ("back", Some((_, &[table]))) => (table, None),
            _ => return Ok(None),
        };
        let cant = |error| Error::system("take over what the program before left", error);
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

/// The table that a probe is asked about.
///
/// # Errors
/// When there is none, or none that can be read.
pub fn table_on_stdin() -> Result<UpgradeState> {
    let bytes = reexec::read_whole(io::stdin().as_fd(), LONGEST)
        .map_err(|error| Error::system("read the server's table from standard input", error))?;
    UpgradeState::of_json(&bytes)
}

impl ExecAttempt {
    /// Reads the table and takes over what it names, closed to the next exec.
    ///
    /// # Errors
    /// When it can't be read, or what it names is not there.
    pub fn read(&mut self) -> Result<UpgradeState> {
        let cant = |error| Error::system("take over what the program before left", error);
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

    /// Lets signals through, and notes them for the master to be: what the program starts from here on
    /// would else have those blocked that were blocked across the exec.
    ///
    /// # Errors
    /// When they can't be caught.
    pub fn listen(&mut self) -> Result<()> {
        let signals = SignalPipe::new(&MASTER_SIGNALS);
        self.signals = Some(signals.map_err(|error| Error::system("catch signals", error))?);
        signal::unblock_all();
        Ok(())
    }

    /// What has noted them so far.
    pub fn take_signals(&mut self) -> Option<SignalPipe> {
        self.signals.take()
    }

    /// What the table names.
    pub fn through(&self) -> &InheritedFds {
        &self.through
    }

    /// Why the program after this one gave up, if this is where it went back to.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Whether there is a program to go back to.
    pub fn can_go_back(&self) -> bool {
        self.image.is_some()
    }

    /// Becomes the program before, with everything as it came. Returns only when that failed.
    pub fn exec_old(&self, reason: &str) -> io::Error {
        let Some(image) = &self.image else {
            return io::Error::other("this is the program that the upgrade went back to");
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

    /// Becomes the program before, with the table as it is now. Returns only when that failed.
    pub fn exec_old_with_state(
        &self,
        state: &UpgradeState,
        signals: &SignalPipe,
        reason: &str,
    ) -> io::Error {
        let Some(image) = &self.image else {
            return io::Error::other("there is no program to go back to");
        };
        exec_with_state(Image::Open(image.as_fd()), state, signals, |table| {
            (back(table, reason), None)
        })
    }
}

/// Becomes the program that stands at the server's path now. Returns only when that failed, and
/// then nothing has changed.
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

/// The exec itself; `environment` is told the table's number, and adds a descriptor that crosses.
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
    // What comes from here on stays pending, and so does what has come and was not looked at: the
    // next program hears it (execve(2) keeps mask and pending signals).
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

/// Goes where the program was started, and says where it was before.
fn enter(origin: &StartParams) -> Option<PathBuf> {
    let here = env::current_dir().ok();
    let _ = env::set_current_dir(directory(origin));
    here
}
