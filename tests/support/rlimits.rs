//! Little memory for a process, for a while: a cgroup of the memory controller of its own where this
//! user may make one, else a limit of its address space (RLIMIT_AS).
//!
//! In the group only what is asked for from now on counts; what finds no room there has the kernel
//! end somebody in it (cgroup-v1/memory.rst). Under the limit it is mmap(2) that fails.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime};

use super::{PATIENCE, pause, process};

/// Where the controller may be mounted, the file of its limit, and that of what is used.
const PLACES: [(&str, &str, &str); 2] = [
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
    ),
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
];

/// The means for it.
pub struct Cramp(Option<Group>);

struct Group {
    dir: PathBuf,
    /// Where this test's own processes are.
    home: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl Cramp {
    /// The best that can be had.
    pub fn new() -> Self {
        // of its own in whichever pid namespace this is
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let name = format!("preforkd-test-{}", since.map_or(0, |it| it.as_nanos()));
        let group = PLACES.iter().find_map(|(root, limit, usage)| {
            let root = Path::new(root);
            let dir = root.join(&name);
            fs::create_dir(&dir).ok()?;
            let group = Group {
                home: home(root),
                dir,
                limit,
                usage,
            };
            // dropped, and so removed, where the controller is not to be had here
            group.dir.join(limit).exists().then_some(group)
        });
        Cramp(group)
    }

    /// What it is, for a report.
    pub fn name(&self) -> &'static str {
        match self.0 {
            Some(_) => "a memory cgroup",
            None => "RLIMIT_AS",
        }
    }

    /// From now on this process finds room for so many bytes more. Tells whether that was done.
    pub fn squeeze(&self, pid: i32, bytes: u64) -> bool {
        match &self.0 {
            Some(group) => group.take(pid, bytes).is_ok(),
            None => limit(pid, &(process::virtual_kib(pid) * 1024 + bytes).to_string()),
        }
    }

    /// It has all the room again, as has whatever it started meanwhile.
    pub fn release(&self, pid: i32) {
        match &self.0 {
            Some(group) => group.empty(),
            None => drop(limit(pid, "unlimited")),
        }
    }
}

impl Group {
    fn take(&self, pid: i32, bytes: u64) -> io::Result<()> {
        let used = fs::read_to_string(self.dir.join(self.usage))?;
        let used: u64 = used.trim().parse().map_err(io::Error::other)?;
        fs::write(self.dir.join(self.limit), (used + bytes).to_string())?;
        fs::write(self.dir.join("cgroup.procs"), pid.to_string())
    }

    fn empty(&self) {
        let _ = fs::write(self.dir.join(self.limit), (1_u64 << 40).to_string());
        let members = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        for pid in members.lines() {
            let _ = fs::write(self.home.join("cgroup.procs"), pid);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let end = Instant::now() + PATIENCE;
        self.empty();
        // whoever is on its way out is a member until it is gone
        while self.dir.exists() && fs::remove_dir(&self.dir).is_err() && Instant::now() < end {
            pause();
            self.empty();
        }
    }
}

/// The group of this process in the hierarchy that is mounted there.
fn home(root: &Path) -> PathBuf {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = own.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let here = match root.file_name().is_some_and(|name| name == "memory") {
            true => controllers.split(',').any(|name| name == "memory"),
            false => controllers.is_empty(),
        };
        here.then(|| root.join(path.trim_start_matches('/')))
    });
    path.filter(|path| path.exists())
        .unwrap_or_else(|| root.to_owned())
}

fn limit(pid: i32, bytes: &str) -> bool {
    let mut prlimit = Command::new("prlimit");
    prlimit.args(["--pid", &pid.to_string(), &format!("--as={bytes}:")]);
    prlimit.output().is_ok_and(|done| done.status.success())
}
