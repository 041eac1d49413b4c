//! Opens what the configuration names: the lock of the store for a master, and the store for the jobs process.
//!
//! The master passes the lock and the UUID of the instance on to its children, and to the next program at an upgrade.
//! It never opens the store itself. Without the cargo feature of an engine, the check of the configuration has refused
//! its store already.

use std::path::PathBuf;

use super::store::error::OpenError;
use super::store::request::StoreLimits;
use super::store::{Engine, Opening};
use crate::config::{JobStore, JobsConfig};
use crate::error::{Error, Result};
use crate::protocol::job_id::JobId;
use crate::sys::account::Account;
use crate::sys::instance_lock::{InstanceLock, LockRefusal};
use crate::sys::process::unix_time_ms;
use crate::sys::random::random_bytes;
use crate::sys::shared_memory::SharedFlag;
use crate::worker_init::JobsInstance;

/// Marks this process as the master of a store. If processes of a killed master still use the store, the jobs process
/// waits for them. `account` is the user of the workers, who gets the lock file.
///
/// # Errors
/// If another server uses the store, or its lock file cannot be opened.
pub fn instance(config: &JobsConfig, account: Option<&Account>) -> Result<JobsInstance> {
    let path = lock_path(&config.store)?;
    let (lock, _) = InstanceLock::open(&path).map_err(|refusal| {
        let remedy = match &refusal {
            LockRefusal::Held(_) => "stop that server, or name another file in jobs.store",
            LockRefusal::System(_) => {
                "let the server's user own the directory and the lock file beside the store"
            }
        };
        OpenError::new(config.path(), refusal.to_string(), remedy)
    })?;
    if let Some(account) = account
        && let Err(error) = lock.give_to(account.uid, account.gid)
    {
        log::warn!(
            "the lock file {} stays with the present user, so only this user can start the server again: {error}",
            path.display()
        );
    }
    let random = random_bytes().map_err(|error| Error::system("make a UUID", error))?;
    Ok(JobsInstance {
        id: JobId::at(unix_time_ms(), random).0,
        lock,
        store: Some(config.store.clone()),
        was_opened: SharedFlag::new(false)
            .map_err(|error| Error::system("allocate shared memory", error))?,
    })
}

/// Returns the path of the lock file of a store. Two names of one file have the same lock.
///
/// # Errors
/// The directory of the store does not exist or cannot be read.
#[cfg(feature = "jobs-sqlite")]
fn lock_path(place: &JobStore) -> std::result::Result<PathBuf, OpenError> {
    let JobStore::Sqlite(path) = place;
    Ok(InstanceLock::path_for(
        &super::store::sqlite::file::resolve(path)?,
    ))
}

/// Opens a store. The caller holds the lock. `secret` are random bytes for a new store.
///
/// # Errors
/// Each says what is wrong with the store and what to change.
#[cfg(feature = "jobs-sqlite")]
pub fn store(
    place: &JobStore,
    limits: StoreLimits,
    opening: Opening,
    secret: [u8; 32],
) -> std::result::Result<Box<dyn Engine>, OpenError> {
    let JobStore::Sqlite(path) = place;
    let clock = Box::new(unix_time_ms);
    let engine = super::store::sqlite::open(path, limits, clock, (opening, secret))?;
    Ok(Box::new(engine))
}

#[cfg(not(feature = "jobs-sqlite"))]
fn lock_path(place: &JobStore) -> std::result::Result<PathBuf, OpenError> {
    Err(without_engine(place))
}

#[cfg(not(feature = "jobs-sqlite"))]
pub fn store(
    place: &JobStore,
    _: StoreLimits,
    _: Opening,
    _: [u8; 32],
) -> std::result::Result<Box<dyn Engine>, OpenError> {
    Err(without_engine(place))
}

#[cfg(not(feature = "jobs-sqlite"))]
fn without_engine(place: &JobStore) -> OpenError {
    let JobStore::Sqlite(path) = place;
    OpenError::new(
        path,
        "this program was built without SQLite",
        "build it with the cargo feature jobs-sqlite",
    )
}
