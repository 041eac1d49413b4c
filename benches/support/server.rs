//! Starts a server, waits until it is ready, measures it with /proc, and ends it.
//!
//! It is ready when it sends READY=1, as to systemd; so nothing here waits for a fixed time. Its
//! directory and its processes are removed when it is dropped.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::DirBuilderExt;
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

/// The longest time until a server is ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long to wait for its message before checking whether it still runs.
const GLANCE: Duration = Duration::from_millis(100);

/// A running server and the processes below it.
pub struct Server {
    child: Child,
    directory: PathBuf,
    pub address: SocketAddr,
}

impl Server {
    /// Starts the bare server. It is this program again, which must pass the arguments `serve ADDRESS
    /// WORKERS` to [`super::bare::serve`].
    pub fn bare(workers: usize) -> Result<Self, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        let address = free_address()?;
        command.args(["serve", &address.to_string(), &workers.to_string()]);
        Self::start(command, address, new_directory()?)
    }

    /// Starts preforkd, built with this program. `more` is added to its configuration.
    pub fn preforkd(workers: usize, more: &str) -> Result<Self, Failure> {
        Self::preforkd_with(&format!("[workers]\ncount = {workers}\n{more}"))
    }

    /// Does the same. `tables` is its whole configuration except its address and its log.
    pub fn preforkd_with(tables: &str) -> Result<Self, Failure> {
        Self::program(env!("CARGO_BIN_EXE_preforkd").into(), tables)
    }

    /// Starts this program again, which must be a server if its first argument is `run`.
    pub fn of_this_program(tables: &str) -> Result<Self, Failure> {
        Self::program(std::env::current_exe()?, tables)
    }

    /// Starts any build of preforkd. It logs warnings, unless the tables say otherwise.
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

    /// Starts another server, which is ready when it accepts connections.
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
        // SAFETY: prctl(2) is async-signal-safe, and the closure does nothing else.
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
            // Usually an error means that this wait timed out. Then check why no message arrived.
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

    /// Returns a command of preforkd that asks this server.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_preforkd"));
        let socket = self.directory.join("control.sock");
        command.args(words).arg("--control-socket").arg(socket);
        command
    }

    /// Returns the status of preforkd.
    pub fn status(&self) -> Result<serde_json::Value, Failure> {
        let output = self.command(&["status", "--json"]).output()?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Returns the pid of the server's first process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The connections of each worker of preforkd.
    pub fn connections(&self) -> Result<Vec<u64>, Failure> {
        let status = self.status()?;
        let workers = status["workers"].as_array().ok_or("no workers")?.iter();
        let count = |worker: &serde_json::Value| worker["connections"].as_u64();
        workers
            .map(|worker| count(worker).ok_or_else(|| "no count".into()))
            .collect()
    }

    /// The server's processes, the first one first.
    pub fn processes(&self) -> io::Result<Vec<Stat>> {
        let mut all = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            if let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) {
                // A process that has just ended is skipped.
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

    /// Returns the CPU time of all its processes since their start, including ended children that were
    /// waited for. The resolution is a clock tick, usually 10 ms.
    pub fn cpu_time(&self) -> Result<Duration, Failure> {
        let ticks: u64 = self.processes()?.iter().map(|stat| stat.ticks).sum();
        ticks_to_time(ticks)
    }

    /// Returns its processes that run the server's own program, so without pool programs.
    pub fn own_processes(&self) -> io::Result<Vec<Stat>> {
        let program = |pid: u32| fs::read_link(format!("/proc/{pid}/exe")).ok();
        let own = program(self.child.id());
        let mut processes = self.processes()?;
        processes.retain(|stat| program(stat.pid) == own);
        Ok(processes)
    }

    /// Returns the CPU time of those processes in nanoseconds, including ended children that were waited
    /// for (in clock ticks).
    pub fn own_cpu_time(&self) -> Result<Duration, Failure> {
        let mut time = Duration::ZERO;
        let mut ticks = 0;
        for process in self.own_processes()? {
            time += cpu_time_of(process.pid)?;
            ticks += process.waited_ticks;
        }
        Ok(time + ticks_to_time(ticks)?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // No other code waits for it, so its pid cannot have been reused. It stops at once: its calls may run for minutes.
        let _ = kill(
            Pid::from_raw(self.child.id().cast_signed()),
            Signal::SIGQUIT,
        );
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The content of /proc/PID/stat (proc_pid_stat(5)).
#[derive(Debug, Clone)]
pub struct Stat {
    pub pid: u32,
    /// The pid of its parent.
    pub parent: u32,
    /// The sum of utime, stime, cutime and cstime, in clock ticks.
    pub ticks: u64,
    /// The sum of cutime and cstime: children that were waited for.
    pub waited_ticks: u64,
}

impl Stat {
    fn of(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in parentheses and may contain any characters, including parentheses.
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

/// Returns the CPU time of a process in nanoseconds, without its children.
pub fn cpu_time_of(pid: u32) -> Result<Duration, Failure> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))?;
    Ok(Duration::from(clock.now()?))
}

fn ticks_to_time(ticks: u64) -> Result<Duration, Failure> {
    let per_second = sysconf(SysconfVar::CLK_TCK)?.ok_or("no clock tick")?;
    Ok(Duration::from_secs(ticks) / u32::try_from(per_second)?)
}

/// Returns a port that was free just before.
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
    // As preforkd wants it, which may take the name for that of its default directory.
    fs::DirBuilder::new().mode(0o700).create(&path)?;
    Ok(path)
}
