//! Reads from /proc what a process does: its state and system call, CPU time and memory (proc(5)), and which
//! processes descend from it.
//!
//! As in `thread_state`, only files are read that do not take the memory lock of the process. What may not be
//! read is left out, and `refused` says so. A pid may soon belong to another process, so the caller compares the
//! start time before and afterwards.

use std::fmt;
use std::time::Duration;

use super::bounded;
use super::process::{self, Pid};
use super::process_tree;
use super::thread_state::{self, ThreadState, of_ticks};

/// The largest number of processes of a tree that are read.
const MOST: usize = 64;

/// What a process does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessFacts {
    pub pid: Pid,
    /// Its name, as its program has set it.
    pub name: String,
    pub parent: Pid,
    /// The start time in clock ticks since boot.
    pub started: u64,
    /// The state of its first thread, with the CPU time of all.
    pub state: ThreadState,
    pub threads: u64,
    pub rss_bytes: u64,
}

/// Reads the facts of a process; `None` if it is gone, or if its pid was reused meanwhile.
pub fn look(pid: Pid) -> Option<ProcessFacts> {
    let mut state = thread_state::look(pid, pid)?;
    // The function in which it sleeps says enough.
    state.stack.clear();
    let text = bounded::read_lines(format!("/proc/{pid}/stat")).ok()?;
    let (before, fields) = text.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    let started = number(19)?;
    state.cpu = of_ticks(number(11)? + number(12)?);
    let facts = ProcessFacts {
        pid,
        name: before.split_once('(')?.1.to_owned(),
        parent: Pid(fields.get(1)?.parse().ok()?),
        started,
        state,
        threads: number(17)?,
        rss_bytes: process::resident_bytes(pid),
    };
    (process_tree::start_ticks(pid) == Some(started)).then_some(facts)
}

/// Describes a thread of a process, and returns whether the kernel refused a fact; `None` if it is gone.
pub fn of_thread(pid: Pid, thread: Pid) -> Option<(String, bool)> {
    let mut state = thread_state::look(pid, thread)?;
    state.stack.clear();
    Some((format!("thread {} {state}", state.name), state.is_refused))
}

/// Returns the process `root` and its descendants, parents first. `adopter` is a process that has adopted some of the
/// descendants: its children in the session of `root` are included.
pub fn tree(root: Pid, adopter: Pid) -> Vec<Pid> {
    let mut pids = vec![root];
    let mut at = 0;
    while let Some(&pid) = pids.get(at) {
        let children = children_of(pid);
        pids.extend(children.into_iter().filter(|child| *child != root));
        at += 1;
        if pids.len() >= MOST {
            pids.truncate(MOST);
            return pids;
        }
    }
    let orphans = children_of(adopter).into_iter();
    let is_of_root = |pid: &Pid| process_tree::session(*pid) == Some(root);
    let orphans: Vec<Pid> = orphans
        .filter(|pid| !pids.contains(pid) && is_of_root(pid))
        .collect();
    pids.extend(orphans.into_iter().take(MOST));
    pids
}

/// Returns the children of all threads of a process. A kernel without CONFIG_PROC_CHILDREN has no
/// file `children`, so there are none.
fn children_of(pid: Pid) -> Vec<Pid> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let mut children = Vec::new();
    for thread in threads.flatten().take(MOST) {
        let path = thread.path().join("children");
        let text = bounded::read_pieces(path, b' ', bounded::PIDS).unwrap_or_default();
        let pids = text.split(u8::is_ascii_whitespace);
        let pids = pids.filter_map(|pid| std::str::from_utf8(pid).ok()?.parse().ok());
        children.extend(pids.map(Pid));
    }
    children
}

/// Returns whether a process that began at `started` had begun at the time `at` (CLOCK_MONOTONIC). Suspended
/// time counts only in the start time, so it is added.
pub fn had_begun(started: u64, at: Duration) -> bool {
    let suspended = process::since_boot().saturating_sub(process::monotonic());
    // The kernel rounds the start time down to a tick (10 ms or less). So a process that began after `at` but in the
    // same tick counts too.
    of_ticks(started) <= at + suspended
}

impl fmt::Display for ProcessFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-+:/@".contains(&byte);
        // Any program can name itself so that it looks like the rest of the line.
        match self.name.bytes().all(is_plain) {
            true => write!(f, "{}", self.name)?,
            false => write!(f, "{:?}", self.name)?,
        }
        write!(f, " {} {}", self.pid, self.state)?;
        if self.threads > 1 {
            write!(f, " of {} threads", self.threads)?;
        }
        write!(f, " rss {:.1} MB", self.rss_bytes as f64 / 1e6)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    fn shell(script: &str) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::piped());
        command.stdout(Stdio::piped()).spawn().unwrap()
    }

    #[test]
    fn a_process_is_named_with_its_descendants_and_what_they_do() {
        let before = process::monotonic();
        let mut child = shell("(read line; true); true");
        let pid = Pid(child.id() as i32);
        let find = || {
            let tree = tree(pid, Pid(-1));
            let facts: Vec<ProcessFacts> = tree.into_iter().filter_map(look).collect();
            let is_asleep = |it: &ProcessFacts| it.state.state == 'S' && it.state.call.is_some();
            (facts.len() == 2 && facts.iter().all(is_asleep)).then_some(facts)
        };
        let facts = loop {
            if let Some(facts) = find() {
                break facts;
            }
            let waited = process::monotonic().saturating_sub(before);
            assert!(
                waited < Duration::from_secs(20),
                "no two processes that sleep"
            );
            std::thread::yield_now();
        };
        assert_eq!((facts[0].pid, facts[1].parent), (pid, pid));
        let texts: Vec<String> = facts.iter().map(ToString::to_string).collect();
        assert!(texts[0].contains(" S asleep in wait4("), "{texts:?}");
        assert!(texts[1].contains(" S asleep in read("), "{texts:?}");
        assert!(facts.iter().all(|it| it.rss_bytes > 0 && it.threads == 1));
        let began = facts[0].started;
        assert!(had_begun(began, process::monotonic()));
        assert!(!had_begun(
            began,
            before.saturating_sub(Duration::from_secs(1))
        ));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(look(pid), None);
    }

    #[test]
    fn a_name_cannot_look_like_the_rest_of_a_line() {
        let mut facts = look(Pid::current()).unwrap();
        facts.name = "sh 1 R\n\u{1b}".into();
        let text = facts.to_string();
        assert!(text.starts_with(r#""sh 1 R\n\u{1b}" "#), "{text}");
    }
}
