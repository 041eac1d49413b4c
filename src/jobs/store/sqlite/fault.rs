//! Decides what an error of SQLite means for the store.
//!
//! The most important case is a failed sync. The kernel may drop the data, and report success to the next
//! sync. So the error must end the process, and nothing of the group may be acknowledged.

use std::path::Path;

use rusqlite::{Error, ErrorCode, ffi};

use super::super::error::{OpenError, StoreError, StoreFault};

/// What to do about a damaged file.
pub const RESTORE: &str =
    "restore it from `preforkd job export`, or name another file in jobs.store";

/// Returns the fault behind an error.
pub fn fault_of(error: &Error) -> StoreFault {
    let Error::SqliteFailure(code, _) = error else {
        // A value that no version writes: wrong type, unknown number.
        return StoreFault::Corrupt;
    };
    match (code.code, code.extended_code) {
        (_, ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC) => StoreFault::SyncFailed,
        (_, ffi::SQLITE_IOERR_CORRUPTFS) => StoreFault::Corrupt,
        (ErrorCode::DiskFull, _) => StoreFault::Full,
        (ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase, _) => StoreFault::Corrupt,
        // A violated constraint would be a bug, or rows that something else has written.
        (ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch, _) => StoreFault::Corrupt,
        _ => StoreFault::Away,
    }
}

/// Returns the error for a step that failed before the commit.
pub fn store_error(attempt: &str, error: &Error) -> StoreError {
    StoreError::new(fault_of(error), format!("{attempt}: {}", text(error)))
}

/// Returns the error for a commit that failed. The group may be stored unless the disk was full: then its
/// last page was not written.
pub fn commit_error(error: &Error) -> StoreError {
    let error = store_error("commit", error);
    StoreError {
        is_maybe_stored: error.fault != StoreFault::Full,
        ..error
    }
}

/// Returns the error for a file whose content is damaged.
pub fn damaged(path: &Path, said: &str) -> OpenError {
    OpenError::new(path, format!("it is damaged ({said})"), RESTORE).damaged()
}

/// Returns why a file is refused after SQLite could not read it.
pub fn refused(error: &Error, path: &Path) -> OpenError {
    let said = text(error);
    match fault_of(error) {
        StoreFault::Corrupt => damaged(path, &said),
        StoreFault::Full => OpenError::new(
            path,
            format!("the disk is full ({said})"),
            "make room on its file system",
        ),
        StoreFault::SyncFailed => OpenError::new(
            path,
            format!("its disk does not store it ({said})"),
            "look for errors of the disk in the kernel's log",
        ),
        StoreFault::Away => {
            let refused = OpenError::new(
                path,
                format!("it cannot be opened ({said})"),
                "check that the server's user may read and write the file and its directory",
            );
            match error.sqlite_error_code() {
                Some(ErrorCode::DatabaseBusy) => refused.away(),
                _ => refused,
            }
        }
    }
}

/// Returns what SQLite said, with the extended code, which names the system call.
fn text(error: &Error) -> String {
    match error {
        Error::SqliteFailure(code, message) => {
            let said = message.clone().unwrap_or_else(|| code.to_string());
            format!("{said}; SQLite error {}", code.extended_code)
        }
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(extended: i32) -> Error {
        Error::SqliteFailure(ffi::Error::new(extended), None)
    }

    #[test]
    fn each_error_has_its_fault() {
        for (code, fault) in [
            (ffi::SQLITE_FULL, StoreFault::Full),
            (ffi::SQLITE_IOERR_FSYNC, StoreFault::SyncFailed),
            (ffi::SQLITE_IOERR_DIR_FSYNC, StoreFault::SyncFailed),
            (ffi::SQLITE_IOERR_READ, StoreFault::Away),
            (ffi::SQLITE_IOERR_WRITE, StoreFault::Away),
            (ffi::SQLITE_BUSY, StoreFault::Away),
            (ffi::SQLITE_CANTOPEN, StoreFault::Away),
            (ffi::SQLITE_CORRUPT, StoreFault::Corrupt),
            (ffi::SQLITE_NOTADB, StoreFault::Corrupt),
        ] {
            assert_eq!(fault_of(&failure(code)), fault, "{code}");
        }
        assert_eq!(fault_of(&Error::InvalidQuery), StoreFault::Corrupt);
    }

    #[test]
    fn only_a_commit_that_failed_on_a_full_disk_is_certainly_not_stored() {
        assert!(!commit_error(&failure(ffi::SQLITE_FULL)).is_maybe_stored);
        assert!(commit_error(&failure(ffi::SQLITE_IOERR_FSYNC)).is_maybe_stored);
        assert!(commit_error(&failure(ffi::SQLITE_IOERR_WRITE)).is_maybe_stored);
        assert!(!store_error("enqueue", &failure(ffi::SQLITE_IOERR_WRITE)).is_maybe_stored);
    }
}
