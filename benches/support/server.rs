//! A server under measurement: started, awaited, measured by what /proc says, ended.
//!
//! It is ready when it says READY=1, as to systemd; so nothing here waits by the clock. Its directory
//! and its processes are gone when it is dropped.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::time::clock_getcpuclockid;
use nix::unistd::{Pid, SysconfVar, sysconf};

use super::Failure;

/// How long a server may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long its word is waited for before it is looked whether it still lives.
const GLANCE: Duration = Duration::from_millis(100);

/// A running server and the processes below it.
pub struct Server {
    child: Child,
    directory: PathBuf,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Server {
    /// The bare server. It is this program once more, which has to pass the words `serve ADDRESS
    /// WORKERS` on to [`super::bare::serve`].
    pub fn bare(workers: usize) -> Result<Self, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        let address = free_address()?;
        command.args(["serve", &address.to_string(), &workers.to_string()]);
        Self::start(command, address, new_directory()?)
    }

    /// preforkd, built with this program. `more` is added to its configuration.
    pub fn preforkd(workers: usize, more: &str) -> Result<Self, Failure> {
        Self::preforkd_with(&format!("[workers]\ncount = {workers}\n{more}"))
    }

    /// Likewise; `tables` are all of its configuration but for where it listens and what it logs.
    pub fn preforkd_with(tables: &str) -> Result<Self, Failure> {
        Self::program(env!("CARGO_BIN_EXE_preforkd").into(), tables)
    }

    /// This program once more, which has to be a server when its first word is `run`.
    pub fn of_this_program(tables: &str) -> Result<Self, Failure> {
        Self::program(std::env::current_exe()?, tables)
    }

    /// Any build of preforkd. It logs warnings, if the tables do not say otherwise.
    pub fn program(program: PathBuf, tables: &str) -> Result<Self, Failure> {
        let directory = new_directory()?;
        let address = free_address()?;
        let config = directory.join("preforkd.toml");
        let log = match tables.contains("[log]") {
            true => "",
            false => "[log]\nlevel = \"warn\"\n",
        };
        let text = format!(
            "pid-file = \"pid\"\ncontrol-socket = \"control.sock\"\n\
             [[listen]]\naddress = \"{address}\"\n{log}{tables}"
        );
        fs::write(&config, text)?;
        let mut command = Command::new(program);
        command.arg("run").arg("--config").arg(config);
        Self::start(command, address, directory)
    }

    /// Somebody else's, which is ready when it can be connected to.
    pub fn other(command: impl FnOnce(SocketAddr) -> Command) -> Result<Self, Failure> {
        let address = free_address()?;
        Self::start(command(address), address, new_directory()?)
    }

    fn start(
        mut command: Command,
        address: SocketAddr,
        directory: PathBuf,
    ) -> Result<Self, Failure> {
        let path = directory.join("notify.sock");
        let notified = UnixDatagram::bind(&path)?;
        notified.set_read_timeout(Some(GLANCE))?;
        command.env("NOTIFY_SOCKET", &path);
        // SAFETY: prctl(2) is async-signal-safe and the closure does nothing else.
        unsafe {
            command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGTERM)?));
        }
        let mut server = Server {
            child: command.spawn()?,
            directory,
            address,
        };
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0; 4096];
        loop {
            // An error is this wait's end, in the common case; then it is looked why nothing comes.
            let count = notified.recv(&mut buffer).unwrap_or(0);
            let mut lines = buffer[..count].split(|byte| *byte == b'\n');
            let says_so = lines.any(|line| line == b"READY=1");
            if says_so || (count == 0 && TcpStream::connect(address).is_ok()) {
                return Ok(server);
            }
            let program = command.get_program();
            if let Some(status) = server.child.try_wait()? {
                return Err(format!("{program:?} ended before it was ready: {status}").into());
            }
            if Instant::now() > deadline {
                return Err(format!("{program:?} is not ready after {PATIENCE:?}").into());
            }
        }
    }

    /// The server's processes, the first one first.
    pub fn processes(&self) -> io::Result<Vec<Stat>> {
        let mut all = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            if let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) {
                // One that has just ended is of no interest.
                all.extend(Stat::of(pid));
            }
        }
        let mut ours: Vec<Stat> = Vec::new();
        let mut parents = vec![self.child.id()];
        ours.extend(all.iter().find(|stat| stat.pid == parents[0]).cloned());
        while let Some(parent) = parents.pop() {
            for stat in all.iter().filter(|stat| stat.parent == parent) {
                parents.push(stat.pid);
                ours.push(stat.clone());
            }
        }
        Ok(ours)
    }

    /// The CPU time of all its processes since they were started, and of those that ended and were
    /// waited for; to the clock tick, 10 ms mostly.
    pub fn cpu_time(&self) -> Result<Duration, Failure> {
        let ticks: u64 = self.processes()?.iter().map(|stat| stat.ticks).sum();
        ticks_to_time(ticks)
    }

    /// Its processes that run the server's own program, so without the programs of a pool.
    pub fn own_processes(&self) -> io::Result<Vec<Stat>> {
        let program = |pid: u32| fs::read_link(format!("/proc/{pid}/exe")).ok();
        let own = program(self.child.id());
        let mut processes = self.processes()?;
        processes.retain(|stat| program(stat.pid) == own);
        Ok(processes)
    }

    /// The CPU time of those processes to the nanosecond, and of their children that ended and were
    /// waited for, to the clock tick.
    pub fn own_cpu_time(&self) -> Result<Duration, Failure> {
        let mut time = Duration::ZERO;
        let mut ticks = 0;
        for process in self.own_processes()? {
            let clock = clock_getcpuclockid(Pid::from_raw(process.pid.cast_signed()))?;
            time += Duration::from(clock.now()?);
            ticks += process.waited_ticks;
        }
        Ok(time + ticks_to_time(ticks)?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It is not waited for anywhere else, so the pid is still its own.
        let _ = kill(
            Pid::from_raw(self.child.id().cast_signed()),
            Signal::SIGTERM,
        );
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// What /proc/PID/stat says of a process (proc_pid_stat(5)).
#[derive(Debug, Clone)]
pub struct Stat {
    /// Its process id.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// utime, stime, cutime and cstime together, in clock ticks.
    pub ticks: u64,
    /// cutime and cstime alone: of children that were waited for.
    pub waited_ticks: u64,
}

impl Stat {
    fn of(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name stands in parentheses, and may hold anything, those too.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        let waited_ticks = number(16)? + number(17)?;
        Some(Stat {
            pid,
            parent: u32::try_from(number(4)?).ok()?,
            ticks: number(14)? + number(15)? + waited_ticks,
            waited_ticks,
        })
    }
}

fn ticks_to_time(ticks: u64) -> Result<Duration, Failure> {
    let per_second = sysconf(SysconfVar::CLK_TCK)?.ok_or("no clock tick")?;
    Ok(Duration::from_secs(ticks) / u32::try_from(per_second)?)
}

/// A port that was free a moment ago.
fn free_address() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

fn new_directory() -> io::Result<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "preforkd-bench-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let path = std::env::temp_dir().join(name);
    fs::create_dir(&path)?;
    Ok(path)
}
