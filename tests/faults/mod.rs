//! Tests crashes, hostile processes and failing system calls: what is lost, and what is not.

pub mod chaos;
pub mod chaos_acts;
pub mod chaos_ledger;
mod crash_survival;
mod environments;
mod half_open_peers;
mod hostile_descriptors;
mod injections;
mod leftovers;
mod load_under_faults;
mod other_users;
mod quarantine;
mod stuck;
mod terminal;
mod untrusted_workers;
