//! What the master opens for others: listeners, the pid file and the control socket.

pub mod control_socket;
pub mod listeners;
pub mod owned_path;
pub mod pid_file;
