//! Limits the memory of a process for some time. It uses a cgroup of the memory controller if this user may create
//! one, otherwise a limit of the address space (RLIMIT_AS).
//!
//! In the cgroup only new memory counts. If there is no room, the kernel kills a process of the group
//! (cgroup-v1/memory.rst). Under RLIMIT_AS mmap(2) fails.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime};

use super::{PATIENCE, pause, process};

/// The mount points of the controller, with the files of its limit and its usage.
const PLACES: [(&str, &str, &str); 2] = [
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
    ),
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
];

/// The available method.
pub struct Cramp(Option<Group>);

struct Group {
    dir: PathBuf,
    /// The cgroup of this test's own processes.
    home: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl Cramp {
    /// Chooses the best available method.
    pub fn new() -> Self {
        // The name is unique in any pid namespace.
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
            // The group is dropped, and so removed, if the controller is not available here.
            group.dir.join(limit).exists().then_some(group)
        });
        Cramp(group)
    }

    /// Names the method for a report.
    pub fn name(&self) -> &'static str {
        match self.0 {
            Some(_) => "a memory cgroup",
            None => "RLIMIT_AS",
        }
    }

    /// Allows the process only `bytes` more memory from now on. Returns whether that worked.
    pub fn squeeze(&self, pid: i32, bytes: u64) -> bool {
        match &self.0 {
            Some(group) => group.take(pid, bytes).is_ok(),
            None => limit(pid, &(process::virtual_kib(pid) * 1024 + bytes).to_string()),
        }
    }

    /// Removes the limit from the process, and from those that it has started meanwhile.
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
        // A process that is exiting is a member until it is gone.
        while self.dir.exists() && fs::remove_dir(&self.dir).is_err() && Instant::now() < end {
            pause();
            self.empty();
        }
    }
}

/// Returns the cgroup of this process in the hierarchy that is mounted there.
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
