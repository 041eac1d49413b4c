//! Holds what the master opens: listeners, the pid file and the control socket.

pub mod audit;
mod control_client;
pub mod control_socket;
pub mod listeners;
pub mod observed;
pub mod owned_path;
pub mod pid_file;

use std::rc::Rc;

use crate::sys::notify::Notifier;
use crate::sys::signal::SignalPipe;

/// What connects a master with the outside, except the listeners of its generations.
pub struct Endpoints {
    pub control: control_socket::ControlSocket,
    pub notifier: Notifier,
    pub signals: SignalPipe,
    pub pid_file: pid_file::PidFile,
    /// The sockets that the service manager has passed. They are kept until the stop.
    pub passed: Vec<Rc<listeners::Listener>>,
}
