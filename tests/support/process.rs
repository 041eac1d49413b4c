//! Reads the state of processes from /proc (proc(5)).
//!
//! A process that is gone has no children, no descriptors and no memory. What cannot be read is `None` or
//! empty and never a panic, because processes can exit at any time.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::{PATIENCE, wait_for};

/// Returns the state letter of /proc/PID/stat, such as `Z` for a zombie.
pub fn state(pid: i32) -> Option<char> {
    stat(pid).and_then(|fields| fields[0].chars().next())
}

/// Returns whether it exists and is no zombie.
pub fn runs(pid: i32) -> bool {
    state(pid).is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// Returns its parent.
pub fn parent(pid: i32) -> Option<i32> {
    stat(pid)?[1].parse().ok()
}

/// Returns its session.
pub fn session(pid: i32) -> Option<i32> {
    stat(pid)?[3].parse().ok()
}

/// Returns the number of its controlling terminal; 0 if it has none.
pub fn terminal(pid: i32) -> Option<i32> {
    stat(pid)?[4].parse().ok()
}

/// Returns the device and inode of its standard error. Returns `None` for a zombie, which has nothing
/// open.
pub fn standard_error(pid: i32) -> Option<(u64, u64)> {
    let found = fs::metadata(format!("/proc/{pid}/fd/2")).ok()?;
    Some((found.dev(), found.ino()))
}

/// Returns its CPU time so far, user and system, in clock ticks (100 per second).
pub fn cpu_ticks(pid: i32) -> Option<u64> {
    let fields = stat(pid)?;
    let ticks = |index: usize| fields[index].parse::<u64>().ok();
    Some(ticks(11)? + ticks(12)?)
}

/// Returns when it began, in clock ticks since boot.
pub fn start_ticks(pid: i32) -> Option<u64> {
    stat(pid)?[19].parse().ok()
}

/// Returns its resident memory in bytes, counted page by page. The value in /proc/PID/status may be wrong
/// by some hundred kilobytes (proc_pid_status(5)).
pub fn rss_bytes(pid: i32) -> Option<u64> {
    rollup_bytes(pid, "Rss:")
}

/// Returns the part of it that belongs to no file, so without pages of code that ran for the first time.
pub fn anonymous_bytes(pid: i32) -> Option<u64> {
    rollup_bytes(pid, "Anonymous:")
}

fn rollup_bytes(pid: i32, name: &str) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find(|line| line.starts_with(name))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Returns the size of its address space in KiB, as `ulimit -v` counts it.
pub fn virtual_kib(pid: i32) -> u64 {
    let size = field(pid, "VmSize").expect("a process that lives has a size");
    size.trim_end_matches("kB").trim().parse().unwrap()
}

/// Returns its number of open descriptors.
pub fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Returns its number of open descriptors when that is stable. A worker that searches its children and a
/// master that has just answered a request briefly have one more.
#[track_caller]
pub fn descriptors_at_rest(pid: i32) -> usize {
    let mut looks = Vec::new();
    wait_for("as many descriptors for a while", PATIENCE, || {
        looks.push(descriptors(pid));
        let last = looks.iter().rev().take(20);
        looks.len() >= 20 && last.clone().min() == last.max()
    });
    looks[looks.len() - 1]
}

/// Waits until it has this many descriptors open.
#[track_caller]
pub fn wait_for_descriptors(pid: i32, count: usize) {
    let what = format!("{count} descriptors of {pid}");
    wait_for(&what, PATIENCE, || descriptors(pid) == count);
}

/// Returns the inode of its executable, deleted or not.
pub fn executable(pid: i32) -> u64 {
    fs::metadata(format!("/proc/{pid}/exe")).unwrap().ino()
}

/// Returns the kind of each of its descriptors, without numbers; none if it has ended.
pub fn kinds(pid: i32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"));
    let entries = entries.into_iter().flatten();
    let mut kinds: Vec<String> = entries
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .map(|target| {
            let target = target.to_string_lossy().into_owned();
            target
                .trim_end_matches(|c: char| c.is_ascii_digit() || c == ']' || c == '[')
                .to_owned()
        })
        .collect();
    kinds.sort();
    kinds
}

/// Returns its threads. Each is in /proc like a process.
pub fn tasks(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let names = tasks
        .into_iter()
        .flatten()
        .filter_map(|task| task.ok()?.file_name().into_string().ok());
    names.filter_map(|name| name.parse().ok()).collect()
}

pub fn threads(pid: i32) -> usize {
    tasks(pid).len()
}

/// Returns its title: the argv area as `ps` shows it.
pub fn title(pid: i32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).replace('\0', " ");
    text.trim_end().to_owned()
}

/// Returns its comm, at most 15 bytes.
pub fn comm(pid: i32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    text.trim_end().to_owned()
}

/// Returns a line of /proc/PID/status without its key: `field(pid, "CapBnd")`.
pub fn field(pid: i32, key: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| {
        let value = line.strip_prefix(key)?.strip_prefix(':')?;
        Some(value.trim().to_owned())
    })
}

/// Returns its children, including zombies.
pub fn children(pid: i32) -> Vec<i32> {
    all().filter(|&child| parent(child) == Some(pid)).collect()
}

/// Returns the workers of a master, including zombies, once they have their title.
pub fn workers(master: i32) -> Vec<i32> {
    let mut children = children(master);
    children.retain(|&child| comm(child).ends_with("worker"));
    children
}

/// Returns its pool processes.
pub fn pools(master: i32) -> Vec<i32> {
    let mut children = children(master);
    children.retain(|&child| title(child).contains("preforkd: pool "));
    children
}

/// Returns their keepers, once they have their title.
pub fn keepers(master: i32) -> Vec<i32> {
    let mut children = children(master);
    children.retain(|&child| comm(child).ends_with("keeper"));
    children
}

/// Returns the keepers once there are `count`: a worker becomes ready without waiting for its keeper's
/// title.
#[track_caller]
pub fn wait_for_keepers(master: i32, count: usize) -> Vec<i32> {
    let mut found = Vec::new();
    wait_for("keepers", PATIENCE, || {
        found = keepers(master);
        found.len() == count
    });
    found
}

/// Returns its children that are not reaped.
pub fn zombies(pid: i32) -> Vec<i32> {
    let mut children = children(pid);
    children.retain(|&child| state(child) == Some('Z'));
    children
}

/// Waits until it has reaped all its ended children.
#[track_caller]
pub fn wait_for_no_zombies(pid: i32) {
    wait_for("every zombie reaped", PATIENCE, || zombies(pid).is_empty());
}

/// Returns all its descendants, including zombies and those that a subreaper has adopted.
pub fn descendants(pid: i32) -> Vec<i32> {
    let mut found = children(pid);
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(children(parent));
        next += 1;
    }
    found
}

/// Returns all processes with this standard error except the calling one: those of a server with a unique
/// standard error. Its workers and keepers have their own sessions, so they have no common process group.
/// Commands that they start have another standard error.
pub fn with_standard_error(wanted: (u64, u64)) -> Vec<i32> {
    let me = std::process::id().cast_signed();
    let has_it = |pid: &i32| *pid != me && standard_error(*pid) == Some(wanted);
    all().filter(has_it).collect()
}

fn all() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted");
    entries
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Returns the fields of /proc/PID/stat from the state on. The name before it may contain spaces and
/// parentheses, so the fields begin behind the last parenthesis.
fn stat(pid: i32) -> Option<Vec<String>> {
    let bytes = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let (_, fields) = text.rsplit_once(')')?;
    let fields: Vec<String> = fields.split_whitespace().map(str::to_owned).collect();
    (fields.len() > 20).then_some(fields)
}

#[test]
fn this_process_is_as_proc_says() {
    let me = std::process::id().cast_signed();
    assert!(runs(me));
    assert!(rss_bytes(me).unwrap() > 100_000);
    assert!(descriptors(me) >= 3);
    assert!(threads(me) >= 1);
    assert!(cpu_ticks(me).is_some());
    assert!(children(parent(me).unwrap()).contains(&me));
    assert!(field(me, "Threads").is_some());
    assert!(!runs(i32::MAX));
}
