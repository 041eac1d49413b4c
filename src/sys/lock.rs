//! Takes the locks of threads, poisoned or not, and the lock of a whole file (flock(2)).
//!
//! The lock of a file belongs to the open file description. So all duplicated and inherited descriptors share
//! it. It ends when the last of them is closed, or with [`unlock_file`]. The guard of nix would end the lock for
//! all processes when it is dropped. Fails with the system's error.

use std::fs::{File, TryLockError};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Locks a mutex. If a thread has panicked under it, the value is used all the same: no code of ours
/// panics while the value is half changed. The same holds for [`read`] and [`write`].
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks for reading, beside other readers.
pub fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Locks for writing.
pub fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Locks an open file exclusively, without waiting. If this open file already has the lock, nothing
/// changes.
///
/// # Errors
/// `WouldBlock` if another open file description has the lock.
pub fn lock_file(file: &File) -> io::Result<()> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => io::ErrorKind::WouldBlock.into(),
        TryLockError::Error(error) => error,
    })
}

/// Ends the lock for all processes that share it.
pub fn unlock_file(file: &File) {
    let _ = file.unlock();
}
