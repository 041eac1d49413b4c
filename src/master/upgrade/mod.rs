//! Upgrades the running program in place (SIGUSR2, `upgrade`): another program in the same process.
//!
//! 1. The program at the server's path is run as a *probe*, with the real configuration and all that the
//!    master knows. A program that is missing, broken, hangs or cannot read the state is found here, and
//!    nothing has changed.
//! 2. The master executes that program (execve(2)). Its pid and its children stay. Descriptors are passed
//!    on: listeners, links, scoreboard, adoption queue, the lock of the pid file, the control socket and its
//!    clients. A state in JSON says what they are.
//! 3. The new program takes over and reloads. Its workers start beside the old ones, which then drain. The
//!    result of that reload is the result of the upgrade.
//! 4. If anything fails before that, the new program executes the old one, whose file was kept open. The
//!    old workers have served throughout. The clients get the reason.
//!
//! | file | concern |
//! | --- | --- |
//! | `start_params` | how the server was started |
//! | `probe` | the probe and its result |
//! | `stage` | how far an upgrade is |
//! | `state` | the state that is passed on |
//! | `exec_attempt` | the exec, and the way back |
//! | [`super::requests::upgrade_driver`] | carries out the steps |
//! | [`super::resume`] | makes a master of the state; handles a panic of the new program |

pub mod exec_attempt;
pub mod probe;
pub mod stage;
pub mod start_params;
pub mod state;

#[cfg(test)]
mod tests;

pub use exec_attempt::{ExecAttempt, StartMode, table_on_stdin};
pub use start_params::{PROBE_PASSED, StartParams};
