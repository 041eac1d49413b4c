//! Runs the master, which starts the workers and keeps them alive.
//!
//! Decisions about deaths, reloads, drains and stops are in `policy`, mainly in `policy::fleet::Fleet`. It
//! takes events and the time and returns actions. It makes no system call and reads no clock, so it is
//! tested without a process.
//!
//! | file or directory | concern |
//! | --- | --- |
//! | `policy` | decides: takes events and the time, returns actions and incidents |
//! | `incident_text` | the text of incidents, for the log and for `status` |
//! | `children` | living children, keepers, and what dead workers leave behind |
//! | `endpoints` | listeners, pid file, control socket |
//! | `core` | the state of a master; carries out the actions of the policy |
//! | `reports`, `session_orders` | what children report; sessions of acceptors |
//! | `requests` | signals, commands, reloads, upgrades |
//! | `reaping`, `leftovers` | children that have ended |
//! | `main_loop` | waits, and calls the others |
//! | `start`, [`resume`] | make a master |
//! | [`upgrade`] | another program in the same process |

mod children;
mod core;
mod endpoints;
mod incident_text;
mod leftovers;
mod main_loop;
mod policy;
mod reaping;
mod reports;
mod requests;
pub mod resume;
mod session_orders;
mod setup;
mod start;
pub mod upgrade;

#[cfg(feature = "internals")]
pub use endpoints::pid_file::pid_in;
pub use setup::{Embedder, Setup};
pub use start::{MASTER_SIGNALS, run};
