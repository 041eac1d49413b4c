//! Files, faults and versions of SQLite stores. What a store does with jobs is in `conformance_tests`.

#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use tempfile::TempDir;

use super::super::conformance_tests::{LIMITS, START, id, instance_info, job, retention};
use super::super::error::{OpenFault, StoreFault};
use super::super::request::*;
use super::wal::{self, WalState};
use super::*;
use crate::jobs::policy::states::{AttemptCause, EndReason, JobState};
use crate::jobs::record::JobDetails;

fn at(path: &Path) -> Result<SqliteEngine, OpenError> {
    open_as(path, Opening::First)
}

fn open_as(path: &Path, opening: Opening) -> Result<SqliteEngine, OpenError> {
    open(path, LIMITS, Box::new(|| START), (opening, [7; 32]))
}

/// Returns a directory and the path of a store in it.
fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().canonicalize().unwrap().join("jobs.db");
    (directory, path)
}

fn enqueue(engine: &mut SqliteEngine, number: u8) -> StoreReply {
    let request = StoreRequest::Enqueue(vec![job(number, "a")]);
    engine.execute(&[request]).unwrap().remove(0)
}

fn is_stored(reply: &StoreReply) -> bool {
    matches!(reply, StoreReply::Enqueued(EnqueueReply::Stored(_)))
}

/// Copies a store as it is on disk while it is open, as a power failure would leave it.
fn copy(path: &Path) -> (TempDir, PathBuf) {
    let (directory, copied) = place();
    fs::copy(path, &copied).unwrap();
    fs::copy(file::log_of(path), file::log_of(&copied)).unwrap();
    (directory, copied)
}

/// The power failed while the first page of a new database was written. No job was acknowledged.
#[test]
fn a_store_whose_creation_was_cut_off_is_created_again() {
    let mut journal = vec![0; 512];
    journal[..8].copy_from_slice(&[0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7]);
    // The size of a sector and of a page.
    journal[20..28].copy_from_slice(&[0, 0, 2, 0, 0, 0, 0x10, 0]);
    let mut whole = vec![0; 4_096];
    whole[..16].copy_from_slice(b"SQLite format 3\0");
    let mut torn = vec![0; 4_096];
    torn[512..].fill(7);
    for page in [whole, torn, vec![0xa5; 512], vec![0; 50]] {
        let (_directory, path) = place();
        fs::write(&path, &page).unwrap();
        fs::write(path.with_extension("db-journal"), &journal).unwrap();
        assert_eq!(inspect(&path, true).unwrap(), None, "{} bytes", page.len());
        let mut engine = at(&path).unwrap();
        assert!(is_stored(&enqueue(&mut engine, 1)));
        assert!(!path.with_extension("db-journal").exists());
    }
    // The journal of a database that had pages says nothing about the first one.
    let (_directory, path) = place();
    journal[19] = 1;
    fs::write(&path, [7; 4_096]).unwrap();
    fs::write(path.with_extension("db-journal"), &journal).unwrap();
    assert!(refusal(&path).contains("it is no SQLite database"));
}

#[test]
fn a_log_whose_header_was_never_synced_has_no_jobs_to_lose() {
    let (_directory, path) = place();
    Box::new(at(&path).unwrap()).close().unwrap();
    let log = file::log_of(&path);
    fs::write(&log, [0xa5; 32]).unwrap();
    assert!(inspect(&path, true).unwrap().is_some());
    assert!(is_stored(&enqueue(&mut at(&path).unwrap(), 1)));
    // SQLite writes no frame before the header is synced.
    fs::write(&log, [0xa5; 32 + 24 + 4_096]).unwrap();
    assert!(refusal(&path).contains("is damaged at frame 0"));
}

fn refusal(path: &Path) -> String {
    let error = at(path).err().expect("the store is refused");
    assert!(!error.remedy.is_empty());
    error.to_string()
}

#[test]
fn the_compiled_sqlite_keeps_commits_when_its_log_is_reset() {
    assert!(
        rusqlite::version_number() >= 3_051_003,
        "{}",
        rusqlite::version()
    );
}

#[test]
fn the_writing_connection_syncs_each_commit_and_checkpoints_by_itself() {
    let (_directory, path) = place();
    let engine = at(&path).unwrap();
    let pragma = |name: &str| -> i64 {
        let connection = &engine.connection;
        connection
            .pragma_query_value(None, name, |row| row.get(0))
            .unwrap()
    };
    let mode: String = engine
        .connection
        .pragma_query_value(None, "journal_mode", |row| row.get(0))
        .unwrap();
    assert_eq!(mode, "wal");
    assert_eq!(pragma("synchronous"), 2);
    assert_eq!(pragma("wal_autocheckpoint"), 0);
    assert_eq!(pragma("mmap_size"), 0);
    assert_eq!(pragma("application_id"), i64::from(schema::APPLICATION_ID));
    assert_eq!(pragma("user_version"), 1 << 16);
}

#[test]
fn all_files_of_a_store_are_for_its_user_alone() {
    let (directory, path) = place();
    fs::write(&path, "").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    let mut engine = at(&path).unwrap();
    enqueue(&mut engine, 1);
    let mut count = 0;
    for entry in fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{:?}", entry.file_name());
        count += 1;
    }
    assert_eq!(count, 3, "database, log and index of the log");
}

#[test]
fn a_store_is_the_same_after_it_was_opened_again() {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    assert_eq!(engine.secret(), [7; 32]);
    assert_eq!((engine.facts().waiting, engine.facts().schema), (0, (1, 0)));
    for number in 1..=6 {
        assert!(is_stored(&enqueue(&mut engine, number)));
    }
    Box::new(engine).close().unwrap();
    let log = fs::metadata(file::log_of(&path));
    assert!(
        log.is_err() || log.unwrap().len() == 0,
        "the log is in the database"
    );
    let mut engine = open(&path, LIMITS, Box::new(|| START), (Opening::Again, [8; 32])).unwrap();
    assert_eq!(engine.secret(), [7; 32], "ids of known keys stay the same");
    assert_eq!((engine.facts().waiting, engine.facts().running), (6, 0));
    let full = StoreReply::Enqueued(EnqueueReply::TooMany);
    assert_eq!(
        enqueue(&mut engine, 7),
        full,
        "live jobs are counted at the start"
    );
}

#[test]
fn acknowledged_jobs_are_on_disk_before_the_answer() {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    for number in 1..=5 {
        enqueue(&mut engine, number);
        let (_copy, copied) = copy(&path);
        let reopened = at(&copied).unwrap();
        assert_eq!(reopened.facts().waiting, u64::from(number));
    }
}

#[test]
fn files_that_are_no_stores_are_refused_with_reason_and_remedy() {
    let (directory, path) = place();
    fs::write(
        &path,
        "Dear diary, this is a text and no database.\n".repeat(9),
    )
    .unwrap();
    assert!(refusal(&path).contains("it is no SQLite database; name a file of its own"));
    fs::write(&path, "SQLite format 3\0").unwrap();
    assert!(refusal(&path).contains("it was cut off"));
    fs::remove_file(&path).unwrap();

    let other = Connection::open(&path).unwrap();
    other
        .execute_batch("CREATE TABLE song (title TEXT)")
        .unwrap();
    drop(other);
    let before = fs::read(&path).unwrap();
    assert!(refusal(&path).contains("it is a database of another program"));
    assert_eq!(fs::read(&path).unwrap(), before, "nothing was changed");

    let missing = directory.path().join("missing/jobs.db");
    assert!(refusal(&missing).contains("there is no directory"));
    assert!(!missing.parent().unwrap().exists());
    assert!(refusal(directory.path()).contains("it is a directory"));
    let socket = directory.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    assert!(refusal(&socket).contains("it is a socket"));
}

#[test]
fn a_newer_major_version_is_refused_and_a_newer_minor_version_is_used() {
    let (_directory, path) = place();
    let set_version = |version: u32| {
        let connection = Connection::open(&path).unwrap();
        connection
            .pragma_update(None, "user_version", version)
            .unwrap();
    };
    drop(at(&path).unwrap());
    set_version((1 << 16) | 9);
    let connection = Connection::open(&path).unwrap();
    let newer =
        "ALTER TABLE job ADD COLUMN later TEXT DEFAULT 'x'; CREATE TABLE schedule (name TEXT)";
    connection.execute_batch(newer).unwrap();
    drop(connection);
    let mut engine = at(&path).unwrap();
    assert_eq!(engine.facts().schema, (1, 9));
    assert!(is_stored(&enqueue(&mut engine, 1)));
    drop(engine);
    assert_eq!(at(&path).unwrap().facts().schema, (1, 9), "it stays");
    set_version(2 << 16);
    let said = refusal(&path);
    assert!(
        said.contains("it has the schema 2.0") && said.contains("1.x"),
        "{said}"
    );
}

#[test]
fn an_older_minor_version_gets_what_is_missing() {
    let (_directory, path) = place();
    drop(at(&path).unwrap());
    let steps = [
        schema::SchemaStep {
            minor: 0,
            sql: "never executed again",
        },
        schema::SchemaStep {
            minor: 1,
            sql: "ALTER TABLE queue ADD COLUMN one INTEGER DEFAULT 1",
        },
        schema::SchemaStep {
            minor: 2,
            sql: "CREATE TABLE two (name TEXT)",
        },
    ];
    let mut connection = connect(&path, OpenFlags::SQLITE_OPEN_READ_WRITE).unwrap();
    let found = schema::version(&connection, &path).unwrap();
    assert_eq!(found, Some((1, 0)));
    let migrated = schema::migrate(&mut connection, found, &steps, [9; 32]).unwrap();
    assert_eq!(migrated, (1, 2));
    connection.prepare("SELECT one FROM queue").unwrap();
    connection.prepare("SELECT name FROM two").unwrap();
    drop(connection);
    // The version before works on the same store.
    let mut engine = at(&path).unwrap();
    assert!(is_stored(&enqueue(&mut engine, 1)));
    assert_eq!(
        (engine.facts().schema, engine.secret()),
        ((1, 2), &[7_u8; 32][..])
    );
}

#[test]
fn a_step_that_fails_changes_nothing() {
    let (_directory, path) = place();
    drop(at(&path).unwrap());
    let steps = [schema::SchemaStep {
        minor: 1,
        sql: "CREATE TABLE half (name TEXT); CREATE TABLE job (name TEXT)",
    }];
    let mut connection = connect(&path, OpenFlags::SQLITE_OPEN_READ_WRITE).unwrap();
    schema::migrate(&mut connection, Some((1, 0)), &steps, [9; 32]).unwrap_err();
    assert!(connection.prepare("SELECT name FROM half").is_err());
    assert_eq!(schema::version(&connection, &path).unwrap(), Some((1, 0)));
}

/// A store that version 1.0 of the schema wrote. The file never changes.
#[test]
fn the_store_of_schema_1_0_can_be_used() {
    let (_directory, path) = place();
    let connection = Connection::open(&path).unwrap();
    connection
        .execute_batch(include_str!("store-1.0.sql"))
        .unwrap();
    let tables = |connection: &Connection| -> Vec<String> {
        let sql = "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name";
        let mut statement = connection.prepare(sql).unwrap();
        let rows = statement.query_map([], |row| row.get(0)).unwrap();
        rows.map(Result::unwrap).collect()
    };
    let old = tables(&connection);
    drop(connection);
    let mut engine = at(&path).unwrap();
    let now = tables(&engine.connection);
    assert!(
        old.iter().all(|sql| now.contains(sql)),
        "nothing was dropped or renamed"
    );
    assert_eq!((engine.facts().waiting, engine.facts().running), (1, 1));
    let mut reader = engine.reader().unwrap();
    let states = |reader: &mut Box<dyn StoreReader>| -> Vec<JobState> {
        let (jobs, _) = reader.export(0).unwrap();
        jobs.iter().map(|job| job.record.state).collect()
    };
    let expected = [
        JobState::Waiting,
        JobState::Running,
        JobState::Done,
        JobState::Dead,
        JobState::Cancelled,
    ];
    assert_eq!(states(&mut reader), expected);
    let running = reader.details(id(2)).unwrap().unwrap();
    assert_eq!((running.token, running.record.counters.attempt), (4, 2));
    assert_eq!(running.record.cause, Some(AttemptCause::Timeout));
    assert_eq!(running.process.map(|process| process.pid), Some(4711));
    let dead = reader.record(id(4)).unwrap().unwrap();
    assert_eq!(dead.reason, Some(EndReason::Attempts));
    let freed = engine
        .execute(&[StoreRequest::Join(instance_info(9))])
        .unwrap();
    assert!(matches!(&freed[0], StoreReply::Joined(freed) if freed.len() == 1));
    assert!(is_stored(&enqueue(&mut engine, 6)));
}

#[test]
fn the_schema_for_administrators_is_the_one_that_is_used() {
    let (_directory, path) = place();
    let connection = Connection::open(&path).unwrap();
    connection.execute_batch(&schema::sql()).unwrap();
    let insert = "INSERT INTO meta VALUES ('secret', x'01'), ('full', x'00')";
    connection.execute_batch(insert).unwrap();
    drop(connection);
    let mut engine = at(&path).unwrap();
    assert!(is_stored(&enqueue(&mut engine, 1)));
}

#[test]
fn symlinks_are_resolved_so_two_names_are_one_store() {
    let (directory, path) = place();
    drop(at(&path).unwrap());
    let link = directory.path().join("link.db");
    symlink(&path, &link).unwrap();
    assert_eq!(
        at(&link).unwrap().facts().location,
        path.display().to_string()
    );
    assert_eq!(file::resolve(&link).unwrap(), path);
    let inner = directory.path().join("inner");
    symlink(directory.path(), &inner).unwrap();
    assert_eq!(
        file::resolve(&inner.join("new.db")).unwrap(),
        path.with_file_name("new.db")
    );
    fs::remove_file(&path).unwrap();
    assert!(refusal(&link).contains("a symlink to a file that does not exist"));
    let circle = directory.path().join("circle");
    symlink(&circle, &circle).unwrap();
    assert!(refusal(&circle).contains("it cannot be opened"));
}

/// Root may read every file, so this needs another user.
#[test]
fn a_store_without_permission_is_refused() {
    if nix::unistd::geteuid().is_root() {
        return no_permission_as_another_user();
    }
    no_permission();
}

fn no_permission() {
    let (directory, path) = place();
    drop(at(&path).unwrap());
    fs::set_permissions(&path, Permissions::from_mode(0o000)).unwrap();
    assert!(refusal(&path).contains("it cannot be opened (Permission denied"));
    fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
    assert!(refusal(&path).contains("it cannot be opened (permission denied"));
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o500)).unwrap();
    assert!(refusal(&path).contains("cannot be written"));
    fs::set_permissions(directory.path(), Permissions::from_mode(0o700)).unwrap();
}

/// Runs this test binary again as a user without rights.
fn no_permission_as_another_user() {
    use std::os::unix::process::CommandExt;
    let program = std::env::current_exe().unwrap();
    let name = "a_store_without_permission_is_refused";
    let copied = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(copied.path(), Permissions::from_mode(0o755)).unwrap();
    let binary = copied.path().join("test");
    fs::copy(program, &binary).unwrap();
    let output = std::process::Command::new(&binary)
        .arg(name)
        .current_dir("/")
        .env("TMPDIR", "/tmp")
        .uid(65_534)
        .gid(65_534)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{output:?}"
    );
}

#[test]
fn a_file_that_was_cut_off_is_refused() {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    enqueue(&mut engine, 1);
    Box::new(engine).close().unwrap();
    let length = fs::metadata(&path).unwrap().len();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for cut in [1, 4096, length / 2] {
        file.set_len(length - cut).unwrap();
        let said = refusal(&path);
        assert!(
            said.contains("cut off") || said.contains("damaged"),
            "{cut}: {said}"
        );
        let error = inspect(&path, false).unwrap_err().to_string();
        assert!(
            error.contains("cut off") || error.contains("damaged"),
            "{cut}: {error}"
        );
    }
}

#[test]
fn a_damaged_page_is_found_and_never_written() {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    enqueue(&mut engine, 1);
    Box::new(engine).close().unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let pages = fs::metadata(&path).unwrap().len() / 4096;
    for page in 1..pages {
        file.write_all_at(&[0xAB; 4096], page * 4096).unwrap();
    }
    assert!(
        inspect(&path, true)
            .unwrap_err()
            .to_string()
            .contains("it is damaged")
    );
    assert!(refusal(&path).contains("it is damaged"));
}

#[test]
fn damage_that_appears_later_is_reported_as_such() {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    enqueue(&mut engine, 1);
    checkpoint(&engine.connection, "TRUNCATE").unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let pages = fs::metadata(&path).unwrap().len() / 4096;
    for page in 1..pages {
        file.write_all_at(&[0xAB; 4096], page * 4096).unwrap();
    }
    // The pages are in the cache of this connection. A reader reads them from the disk.
    let error = engine.reader().unwrap().counts(START).unwrap_err();
    assert_eq!(error.fault, StoreFault::Corrupt, "{error}");
}

/// Writes three groups, and returns a copy of the store with all of them in the log.
fn three_groups() -> (TempDir, PathBuf, u64) {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    let mut ends = Vec::new();
    for number in 1..=3 {
        enqueue(&mut engine, number);
        ends.push(fs::metadata(file::log_of(&path)).unwrap().len());
    }
    let (directory, copied) = copy(&path);
    (directory, copied, ends[1])
}

#[test]
fn a_group_that_was_being_written_is_dropped_and_earlier_ones_are_kept() {
    let (_directory, path, end_of_second) = three_groups();
    let log = OpenOptions::new()
        .write(true)
        .open(file::log_of(&path))
        .unwrap();
    let length = log.metadata().unwrap().len();
    // Torn at each sector of the last group.
    for torn in (end_of_second..length).step_by(512) {
        let (_copy, copied) = copy(&path);
        let log = OpenOptions::new()
            .write(true)
            .open(file::log_of(&copied))
            .unwrap();
        log.set_len(torn).unwrap();
        assert_eq!(at(&copied).unwrap().facts().waiting, 2, "{torn}");
        let (_copy, copied) = copy(&path);
        let log = OpenOptions::new()
            .write(true)
            .open(file::log_of(&copied))
            .unwrap();
        log.write_all_at(&[0x5A; 512], torn.min(length - 512))
            .unwrap();
        let mut engine = at(&copied).unwrap();
        assert_eq!(engine.facts().waiting, 2, "{torn}");
        assert!(is_stored(&enqueue(&mut engine, 9)));
    }
}

#[test]
fn a_log_that_would_lose_synced_groups_is_refused() {
    let (_directory, path, end_of_second) = three_groups();
    // A bit of the header, of the first group, and of the salt of a frame in it.
    for damaged in [17, 32 + 24 + 9, 32 + 8] {
        let (_copy, copied) = copy(&path);
        let log = OpenOptions::new()
            .read(true)
            .write(true)
            .open(file::log_of(&copied))
            .unwrap();
        let mut byte = [0];
        log.read_exact_at(&mut byte, damaged).unwrap();
        log.write_all_at(&[byte[0] ^ 1], damaged).unwrap();
        let said = refusal(&copied);
        assert!(
            said.contains("write-ahead log") && said.contains("is damaged at frame"),
            "{said}"
        );
        assert!(said.contains("move the log away"), "{said}");
        assert!(inspect(&copied, false).is_err());
    }
    assert!(end_of_second > 32);
}

/// A sector that was never written may have any content, also the header of a frame behind the last group.
#[test]
fn a_torn_group_with_a_header_of_arbitrary_bytes_is_no_lost_group() {
    let (_directory, path, end_of_second) = three_groups();
    let log = OpenOptions::new()
        .write(true)
        .open(file::log_of(&path))
        .unwrap();
    let frame = 24 + 4_096;
    assert!(log.metadata().unwrap().len() >= end_of_second + 3 * frame);
    // The data of the first frame, and the page numbers of the second one.
    log.write_all_at(&[0xA5; 512], end_of_second + 24).unwrap();
    log.write_all_at(&[0xA5; 8], end_of_second + frame).unwrap();
    assert_eq!(at(&path).unwrap().facts().waiting, 2);
}

#[test]
fn a_store_whose_creation_was_cut_off_after_the_header_of_the_log_is_created_again() {
    let (_directory, path) = place();
    drop(at(&path).unwrap());
    let log = file::log_of(&path);
    fs::write(&path, "").unwrap();
    fs::write(&log, [0x37; wal::HEADER]).unwrap();
    assert_eq!(at(&path).unwrap().facts().waiting, 0);
    fs::write(&path, "").unwrap();
    fs::write(&log, [0x37; wal::HEADER + 1]).unwrap();
    assert!(refusal(&path).contains("its write-ahead log"));
}

#[test]
fn a_log_that_was_begun_again_is_whole() {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    for number in 1..=3 {
        enqueue(&mut engine, number);
    }
    checkpoint(&engine.connection, "RESTART").unwrap();
    // The next group overwrites the beginning of the log. Old frames stay behind it.
    enqueue(&mut engine, 4);
    let (_copy, copied) = copy(&path);
    assert_eq!(at(&copied).unwrap().facts().waiting, 4);
    for content in [&b""[..], &[0; 31], &[0; 5_000]] {
        let mut log = content;
        assert_eq!(wal::scan(&mut log).unwrap(), WalState::Whole);
    }
    let mut text = &b"this is no log, but a text of more than 32 bytes"[..];
    assert_eq!(
        wal::scan(&mut text).unwrap(),
        WalState::Damaged { frame: 0 }
    );
}

/// A log is read while another process writes it: what looks damaged must look so twice, in the same log.
#[test]
fn a_log_that_is_being_written_is_not_called_damaged() {
    let damage = |reads: &[(u8, Option<u64>)]| {
        let mut reads = reads.iter();
        let read = || {
            let (log, frame) = reads.next().copied().unwrap_or((0, None));
            let state = frame.map_or(WalState::Whole, |frame| WalState::Damaged { frame });
            Ok(([log; wal::HEADER], state))
        };
        file::first_damage(read).unwrap()
    };
    assert_eq!(damage(&[(1, None)]), None);
    assert_eq!(damage(&[(1, Some(5)), (1, None)]), None);
    assert_eq!(damage(&[(1, Some(5)), (2, Some(5)), (2, Some(7))]), None);
    assert_eq!(damage(&[(1, Some(5)), (1, Some(5))]), Some(5));
    assert_eq!(damage(&[(1, Some(5)), (2, Some(5)), (2, Some(5))]), Some(5));
}

#[test]
fn a_store_that_is_moved_or_deleted_is_broken() {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    engine.maintain(&retention()).unwrap();
    let moved = path.with_extension("moved");
    fs::rename(&path, &moved).unwrap();
    let fault = |engine: &mut SqliteEngine| {
        let maintained = engine.maintain(&retention());
        maintained.err().map(|error| error.fault)
    };
    assert_eq!(fault(&mut engine), Some(StoreFault::Corrupt));
    let stored = engine.execute(&[StoreRequest::Enqueue(vec![job(1, "a")])]);
    assert_eq!(stored.unwrap_err().fault, StoreFault::Corrupt);
    fs::copy(&moved, &path).unwrap();
    assert_eq!(
        fault(&mut engine),
        Some(StoreFault::Corrupt),
        "another file"
    );
    fs::rename(&moved, &path).unwrap();
    assert_eq!(fault(&mut engine), None);
}

#[test]
fn a_full_disk_stores_nothing_and_is_only_reported() {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    enqueue(&mut engine, 1);
    let pages: i64 = engine
        .connection
        .pragma_query_value(None, "page_count", |row| row.get(0))
        .unwrap();
    let limit = |engine: &SqliteEngine, pages: i64| {
        let _: i64 = engine
            .connection
            .pragma_update_and_check(None, "max_page_count", pages, |row| row.get(0))
            .unwrap();
    };
    limit(&engine, pages);
    let mut big = job(2, "a");
    big.params = format!("\"{}\"", "x".repeat(100_000)).into();
    let requests = [
        StoreRequest::Enqueue(vec![job(3, "a")]),
        StoreRequest::Enqueue(vec![big]),
    ];
    let error = engine.execute(&requests).unwrap_err();
    assert_eq!(
        (error.fault, error.is_maybe_stored),
        (StoreFault::Full, false),
        "{error}"
    );
    let mut reader = engine.reader().unwrap();
    assert_eq!(reader.export(0).unwrap().0.len(), 1);
    // Maintenance finds out whether there is room again, and not only that reads succeed.
    assert!(engine.had_no_room);
    limit(&engine, 1_000_000);
    engine.maintain(&retention()).unwrap();
    assert!(!engine.had_no_room);
    let replies = engine.execute(&requests).unwrap();
    assert!(replies.iter().all(is_stored), "it is tried again");
    assert_eq!(reader.export(0).unwrap().0.len(), 3);
    for number in 4..=6 {
        assert!(is_stored(&enqueue(&mut engine, number)));
    }
    let full = StoreReply::Enqueued(EnqueueReply::TooMany);
    assert_eq!(
        enqueue(&mut engine, 7),
        full,
        "failed groups are not counted"
    );
}

#[test]
fn a_store_over_its_size_takes_no_new_jobs_until_some_are_removed() {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    let mut big = job(1, "a");
    big.params = format!("\"{}\"", "x".repeat(2 << 20)).into();
    engine.execute(&[StoreRequest::Enqueue(vec![big])]).unwrap();
    engine.set_limits(StoreLimits {
        max_size: 1 << 20,
        ..LIMITS
    });
    let pass = engine.maintain(&retention()).unwrap();
    assert!(pass.is_full && pass.size > 2 << 20);
    let full = StoreReply::Enqueued(EnqueueReply::StoreFull);
    assert_eq!(enqueue(&mut engine, 2), full);
    // It is still full after a new start.
    drop(engine);
    let mut engine = at(&path).unwrap();
    engine.set_limits(StoreLimits {
        max_size: 1 << 20,
        ..LIMITS
    });
    assert_eq!(enqueue(&mut engine, 2), full);
    let purge = StoreRequest::Purge(JobSelection::Ids(vec![id(1)]));
    engine
        .execute(&[StoreRequest::Cancel(id(1)), purge])
        .unwrap();
    let pass = engine.maintain(&retention()).unwrap();
    assert!(
        !pass.is_full && pass.size < 1 << 20,
        "free pages do not count"
    );
    assert!(is_stored(&enqueue(&mut engine, 2)));
}

#[test]
fn the_log_is_written_into_the_store_from_time_to_time() {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    let mut reader = engine.reader().unwrap();
    let mut longest = 0;
    for round in 0..40 {
        let mut big = job(1, "a");
        big.params = format!("\"{}\"", "x".repeat(1 << 20)).into();
        let purge = StoreRequest::Purge(JobSelection::Ids(vec![id(1)]));
        let requests = [
            StoreRequest::Enqueue(vec![big]),
            StoreRequest::Cancel(id(1)),
            purge,
        ];
        engine.execute(&requests).unwrap();
        engine.after_commit().unwrap();
        assert_eq!(reader.record(id(1)).unwrap(), None, "{round}");
        longest = longest.max(fs::metadata(file::log_of(&path)).unwrap().len());
    }
    assert!(longest < 24 << 20, "{longest} bytes");
}

#[test]
fn an_open_store_can_be_inspected() {
    let (_directory, path) = place();
    assert_eq!(inspect(&path, true).unwrap(), None);
    assert!(!path.exists(), "nothing is created");
    let mut engine = at(&path).unwrap();
    enqueue(&mut engine, 1);
    let facts = inspect(&path, true).unwrap().unwrap();
    assert_eq!((facts.waiting, facts.running, facts.schema), (1, 0, (1, 0)));
    assert!(is_stored(&enqueue(&mut engine, 2)));
}

#[test]
fn a_volatile_file_system_is_not_durable() {
    let shared_memory = Path::new("/dev/shm");
    if !shared_memory.is_dir() {
        return;
    }
    let directory = tempfile::tempdir_in(shared_memory).unwrap();
    let engine = at(&directory.path().join("jobs.db")).unwrap();
    assert!(!engine.facts().is_durable);
}

#[test]
fn many_ended_and_delayed_jobs_are_not_read_by_a_claim() {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    let queries = [
        "SELECT priority FROM queue WHERE method = ?1 AND running = 0 AND priority < ?2 \
         ORDER BY priority DESC LIMIT 1",
        "SELECT seq FROM queue WHERE method = ?1 AND running = 0 AND priority = ?2 AND due_at <= ?3 \
         AND (expires_at IS NULL OR expires_at > ?3) ORDER BY due_at, seq LIMIT 1",
        "SELECT id FROM queue WHERE expires_at IS NOT NULL AND running = 0 AND expires_at <= ?1 \
         ORDER BY expires_at LIMIT ?2",
        "SELECT id FROM queue INDEXED BY queue_owner WHERE running = 1 AND owner <> ?1 ORDER BY seq",
        "SELECT finished_at, seq, method FROM job WHERE state > 0 AND state = ?1 \
         AND (finished_at, seq) > (?2, ?3) AND finished_at < ?4 ORDER BY finished_at, seq LIMIT ?5",
        "SELECT method, count(*) FROM job WHERE state > 0 AND state = ?1 GROUP BY method",
    ];
    enqueue(&mut engine, 1);
    for sql in queries {
        let mut statement = engine
            .connection
            .prepare(&format!("EXPLAIN QUERY PLAN {sql}"))
            .unwrap();
        let count = statement.parameter_count();
        let rows = statement
            .query_map(rusqlite::params_from_iter(vec![1; count]), |row| {
                row.get::<_, String>(3)
            })
            .unwrap();
        let plan: Vec<String> = rows.map(Result::unwrap).collect();
        let plan = plan.join("; ");
        assert!(
            plan.contains("USING INDEX") || plan.contains("COVERING INDEX"),
            "{sql}\n{plan}"
        );
        // All running jobs, the few lost attempts and the dead per method may be read and sorted.
        assert!(
            sql.contains("owner") || !plan.contains("SCAN"),
            "{sql}\n{plan}"
        );
        let is_sorted = sql.contains("owner") || sql.contains("GROUP BY");
        assert!(is_sorted || !plan.contains("TEMP B-TREE"), "{sql}\n{plan}");
    }
}

#[test]
fn an_imported_line_needs_all_its_members() {
    let line = r#"{"job":"01010101-0101-0101-0101-010101010101","method":"a","state":"done","ended":true,"attempt":1,"max_attempts":3,"crashes":0,"interruptions":0,"priority":0,"created_at_ms":1,"due_at_ms":1,"finished_at_ms":2,"cause":"result","result":[1],"params":[2],"timeout_ms":1000,"token":1}"#;
    let job = JobDetails::read(line).unwrap();
    let mut written = Vec::new();
    job.write(&mut written);
    assert_eq!(String::from_utf8(written).unwrap(), line);
    for (from, to, named) in [
        (r#""method":"a","#, "", "`method`"),
        (r#""method":"a""#, r#""method":"""#, "`method`"),
        (r#""state":"done""#, r#""state":"fine""#, "`state`"),
        (r#""finished_at_ms":2,"#, "", "`finished_at_ms`"),
        (r#""result":[1],"#, "", "`result`"),
        (r#""token":1"#, r#""token":-1"#, "`token`"),
        (r#""params":[2],"#, "", "`params`"),
        (r#""priority":0"#, r#""priority":10"#, "`priority`"),
        (r#""cause":"result""#, r#""cause":"luck""#, "`cause`"),
        (r#""token":1"#, r#""token":1,"more":2"#, "`more`"),
    ] {
        assert!(line.contains(from), "{from}");
        let error = JobDetails::read(&line.replace(from, to)).unwrap_err();
        assert!(error.contains(named), "{named}: {error}");
    }
}

#[test]
fn two_processes_of_an_instance_count_the_same_jobs() {
    let (_directory, path) = place();
    let limits = StoreLimits {
        max_jobs: 3,
        ..LIMITS
    };
    let clock = || -> WallClock { Box::new(|| START) };
    let mut one = open(&path, limits, clock(), (Opening::First, [7; 32])).unwrap();
    assert!(is_stored(&enqueue(&mut one, 1)));
    let mut two = open(&path, limits, clock(), (Opening::Beside, [8; 32])).unwrap();
    assert_eq!(two.secret(), one.secret());
    assert_eq!(two.facts().waiting, 1);
    assert!(is_stored(&enqueue(&mut two, 2)));
    assert!(is_stored(&enqueue(&mut one, 3)));
    let full = StoreReply::Enqueued(EnqueueReply::TooMany);
    assert_eq!(enqueue(&mut two, 4), full);
    assert_eq!(enqueue(&mut one, 4), full);
    two.execute(&[StoreRequest::Cancel(id(1))]).unwrap();
    assert!(is_stored(&enqueue(&mut one, 4)));
    assert_eq!(enqueue(&mut two, 5), full);
    // The size is measured by one, and counts for both.
    one.set_limits(StoreLimits {
        max_size: 1,
        ..LIMITS
    });
    assert!(one.maintain(&retention()).unwrap().is_full);
    two.execute(&[StoreRequest::Cancel(id(2))]).unwrap();
    let large = StoreReply::Enqueued(EnqueueReply::StoreFull);
    assert_eq!(enqueue(&mut two, 5), large);
    Box::new(one).close().unwrap();
    let mut reader = two.reader().unwrap();
    assert_eq!(
        reader.record(id(4)).unwrap().unwrap().state,
        JobState::Waiting
    );
    Box::new(two).close().unwrap();
}

#[test]
fn a_store_that_is_gone_is_created_only_by_a_server_that_starts() {
    let (_directory, path) = place();
    Box::new(at(&path).unwrap()).close().unwrap();
    for opening in [Opening::Again, Opening::Beside] {
        fs::write(&path, "").unwrap();
        let refused = open_as(&path, opening).err().unwrap();
        assert_eq!(refused.fault, OpenFault::Damaged, "{refused}");
        assert!(refused.to_string().contains("moved, deleted or emptied"));
        fs::remove_file(&path).unwrap();
        let refused = open_as(&path, opening).err().unwrap();
        assert_eq!(refused.fault, OpenFault::Damaged, "{refused}");
        assert!(!path.exists());
    }
    assert!(at(&path).is_ok());
}

#[test]
fn a_log_without_its_database_is_kept() {
    let (_directory, path) = place();
    let mut engine = at(&path).unwrap();
    assert!(is_stored(&enqueue(&mut engine, 1)));
    // As after a kill: nothing closes the store.
    let log = file::log_of(&path);
    let content = fs::read(&log).unwrap();
    assert!(!content.is_empty());
    drop(engine);
    fs::write(&log, &content).unwrap();
    fs::remove_file(&path).unwrap();
    for _ in 0..2 {
        let refused = at(&path).err().unwrap();
        assert_eq!(refused.fault, OpenFault::Damaged, "{refused}");
        assert!(refused.to_string().contains("its write-ahead log"));
        assert!(inspect(&path, false).is_err());
        assert_eq!(fs::read(&log).unwrap(), content);
        fs::write(&path, "").unwrap();
    }
    fs::remove_file(&log).unwrap();
    assert!(at(&path).is_ok());
}

#[test]
fn a_store_in_use_is_opened_only_beside_a_process_of_the_instance() {
    let (_directory, path) = place();
    let mut one = at(&path).unwrap();
    assert!(is_stored(&enqueue(&mut one, 1)));
    // A reader in the middle of a query keeps the log from being emptied.
    let other = Connection::open(&path).unwrap();
    other.execute_batch("BEGIN").unwrap();
    let count = |_: ()| other.query_row("SELECT count(*) FROM job", [], |row| row.get::<_, i64>(0));
    assert_eq!(count(()).unwrap(), 1);
    assert!(is_stored(&enqueue(&mut one, 2)));
    let refused = at(&path).err().unwrap();
    assert_eq!(refused.fault, OpenFault::Away, "{refused}");
    let mut two = open_as(&path, Opening::Beside).unwrap();
    assert!(is_stored(&enqueue(&mut two, 3)));
    assert_eq!(count(()).unwrap(), 1);
}
