//! Opens the listeners of a configuration and the socket of its observer, both or none.
//!
//! The observer's socket follows the rules of listeners: it is kept as long as its address is wanted. The
//! service manager's sockets are for listeners only.

use std::io;
use std::rc::Rc;

use super::listeners::{self, Listener, SocketOptions};
use crate::config::{ListenConfig, ObserveConfig, Settings};
use crate::error::{Error, Result};

/// The listeners, and the listener of the observer (none or one).
pub type Opened = (Vec<Rc<Listener>>, Vec<Rc<Listener>>);

/// Opens the listeners of `settings` and the listener of its observer. Keeps those of `current` that are still wanted.
/// `passed` are the listeners of the service manager.
///
/// # Errors
/// If an address cannot be bound. Nothing has changed then.
pub fn open_all(
    settings: &Settings,
    current: (&[Rc<Listener>], &[Rc<Listener>]),
    passed: &[Rc<Listener>],
) -> Result<Opened> {
    let options = SocketOptions::of(settings);
    let opened = listeners::open(&settings.listen, current.0, passed, &options)?;
    let wanted = wanted(&settings.observe);
    match listeners::open(wanted.as_slice(), current.1, &[], &options) {
        Ok(observe) => Ok((opened, observe)),
        Err(error) => {
            let is_fresh = |one: &&Rc<Listener>| !current.0.iter().any(|old| Rc::ptr_eq(old, one));
            let fresh = opened.iter().filter(is_fresh);
            fresh.for_each(|listener| listener.remove_path());
            Err(named(error))
        }
    }
}

/// Sets the mode and the options that `settings` want for the listener of the observer. A failure is logged.
pub fn tune(settings: &Settings, observe: &[Rc<Listener>]) {
    let wanted = wanted(&settings.observe);
    listeners::tune_all(wanted.as_slice(), observe, &SocketOptions::of(settings));
}

fn wanted(observe: &ObserveConfig) -> Option<ListenConfig> {
    let address = observe.address.clone()?;
    Some(ListenConfig {
        mode: observe.mode,
        ..ListenConfig::at(address)
    })
}

/// Adds the key to change to the remedy of an error.
fn named(error: Error) -> Error {
    match error {
        Error::System {
            attempt,
            source,
            remedy,
        } => Error::System {
            attempt: format!("{attempt} for the observer"),
            remedy: match source.kind() {
                io::ErrorKind::AddrInUse => {
                    "another process has that address (`ss -ltnxp` says which): stop that one, or change \
                     observe.address"
                        .to_owned()
                }
                _ if remedy.is_empty() => "change observe.address".to_owned(),
                _ => format!("{remedy}, or change observe.address"),
            },
            source,
        },
        other => other,
    }
}
