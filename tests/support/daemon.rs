//! Runs a real preforkd for one test: starts it, sends requests and signals, and removes everything at
//! the end.
//!
//! It has its own directory and process group. The test binds a listener to port 0 and passes it as a
//! service manager would (LISTEN_FDS, sd_listen_fds(3)). So no port is guessed, and a client may connect
//! before the daemon runs. Dropping it stops it. Then the test fails on any error, panic or KILL line in
//! its log that was not announced with [`Builder::expect_log`].

mod end;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::Value;

use super::notify::Notifications;
use super::{Client, Dir, PATIENCE, binary, control, pass, pause, process, source, wait_for};

/// The variables of the test's environment that a daemon gets: enough to find programs, and the mark by
/// which `tests/run` finds its own processes.
const KEPT_ENVIRONMENT: [&str; 4] = ["PATH", "HOME", "PREFORKD_TEST_RUN", "RUST_BACKTRACE"];

/// Passes its stdin as descriptor 3. LISTEN_PID must be the pid of the daemon, which is unknown before
/// the fork. A shell keeps its pid across its exec. Core files are off, because some tests crash hundreds
/// of workers.
const HAND_OVER: &str =
    r#"ulimit -c 0; exec 3<&0 </dev/null; export LISTEN_PID=$$; eval "$1"; shift; exec "$@""#;

/// A daemon that is not started yet.
#[derive(Default)]
pub struct Builder {
    config: String,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    expected: Vec<String>,
    /// A shell command that runs just before the daemon.
    before: String,
    program: Option<PathBuf>,
    stderr: Option<OwnedFd>,
    /// A program that runs the daemon, before the daemon's command line.
    under: Vec<OsString>,
    /// The owner of its directory, if it is not the test's user.
    user: Option<u32>,
    /// Further files in its directory: names and contents.
    files: Vec<(String, String)>,
    /// More keys of the listener.
    listen: String,
}

impl Builder {
    /// Sets its configuration: top-level keys first, then tables. Pid file and control socket are added,
    /// and the test's listener if there is no `[[listen]]`.
    pub fn config(mut self, text: &str) -> Self {
        text.clone_into(&mut self.config);
        self
    }

    /// Sets more keys of the test's own listener.
    pub fn listen(mut self, keys: &str) -> Self {
        keys.clone_into(&mut self.listen);
        self
    }

    /// Adds an argument behind `run --config FILE`.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds a variable to its environment, which is otherwise nearly empty.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        let pair = (key.as_ref().to_owned(), value.as_ref().to_owned());
        self.environment.push(pair);
        self
    }

    /// Sets a shell command that runs before the shell becomes the daemon, such as `ulimit -n 64`.
    pub fn before(mut self, shell: &str) -> Self {
        shell.clone_into(&mut self.before);
        self
    }

    /// Sets another program than preforkd that is built on the library.
    pub fn program(mut self, path: PathBuf) -> Self {
        self.program = Some(path);
        self
    }

    /// Sets its standard error, instead of the file that `Daemon::log` reads.
    pub fn stderr(mut self, to: impl Into<OwnedFd>) -> Self {
        self.stderr = Some(to.into());
        self
    }

    /// Runs all of it as this user and group, without others, in a directory of that user. Needs root.
    pub fn user(mut self, id: u32) -> Self {
        let words = [
            "setpriv",
            "--reuid",
            "ID",
            "--regid",
            "ID",
            "--clear-groups",
        ];
        let word = |word: &str| OsString::from(word.replace("ID", &id.to_string()));
        self.under.extend(words.map(word));
        self.user = Some(id);
        self
    }

    /// Adds a file to its directory before the start.
    pub fn file(mut self, name: &str, text: &str) -> Self {
        self.files.push((name.to_owned(), text.to_owned()));
        self
    }

    /// Adds a pool program as `program.py`, and the Python helper that it imports.
    pub fn python_program(self, text: &str) -> Self {
        let helper = source().join("examples/python/preforkd.py");
        let helper = std::fs::read_to_string(helper).unwrap();
        self.file("program.py", text).file("preforkd.py", &helper)
    }

    /// Runs it under another program that keeps its pid, such as `strace -DD`.
    pub fn under(mut self, words: &[String]) -> Self {
        self.under.extend(words.iter().map(OsString::from));
        self
    }

    /// Announces a log line that would otherwise fail the test. The line must appear.
    pub fn expect_log(mut self, text: &str) -> Self {
        self.expected.push(text.to_owned());
        self
    }

    /// Starts it and waits until it reports that it is ready.
    #[track_caller]
    pub fn start(self) -> Daemon {
        self.try_start()
            .unwrap_or_else(|failure| panic!("it did not start: {failure:?}"))
    }

    /// Starts it, for tests of failed starts.
    pub fn try_start(self) -> Result<Daemon, StartFailure> {
        let dir = Dir::new();
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let notifications = Notifications::at(dir.join("notify"));
        if let Some(id) = self.user {
            for path in [&*dir, notifications.path()] {
                std::os::unix::fs::chown(path, Some(id), Some(id)).unwrap();
            }
        }
        let handed_over = !self.config.contains("[[listen]]");
        let mut daemon = Daemon {
            child: None,
            exited: None,
            standard_error: None,
            address,
            builder: self,
            notifications,
            dir,
        };
        daemon.configure(&daemon.builder.config);
        for (name, text) in &daemon.builder.files {
            daemon.dir.write(name, text);
        }
        daemon.spawn(handed_over.then(|| OwnedFd::from(listener)));
        daemon.wait_ready(0)
    }
}

/// A failed start: it exited, or did not become ready in time (then `code` is `None`).
#[derive(Debug)]
pub struct StartFailure {
    pub code: Option<i32>,
    /// Everything that it wrote to stderr.
    pub log: String,
}

/// The members of a worker's status that tests use.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Worker {
    pub slot: u32,
    pub pid: i32,
    pub generation: u32,
    pub state: String,
    pub connections: u64,
    pub running: u64,
    pub queued: u64,
    pub calls: u64,
    pub errors: u64,
    pub rss_bytes: u64,
}

/// A running daemon.
pub struct Daemon {
    /// `None` only before the start.
    child: Option<Child>,
    /// `Some` after it was waited for.
    exited: Option<ExitStatus>,
    /// Its standard error, which no other process has.
    standard_error: Option<(u64, u64)>,
    address: SocketAddr,
    builder: Builder,
    notifications: Notifications,
    dir: Dir,
}

impl Daemon {
    /// Returns a daemon that is not started yet.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Starts a daemon with two workers and otherwise default settings.
    #[track_caller]
    pub fn start() -> Self {
        Self::builder().config("[workers]\ncount = 2\n").start()
    }

    /// Starts it again in the same directory after its end. Now it binds its address itself.
    #[track_caller]
    pub fn start_again(mut self) -> Self {
        assert!(self.try_wait().is_some(), "it still runs");
        self.exited = None;
        let before = self.times_ready();
        self.spawn(None);
        self.wait_ready(before)
            .unwrap_or_else(|failure| panic!("it did not start again: {failure:?}"))
    }

    /// Forks and execs, with or without a listener.
    fn spawn(&mut self, listener: Option<OwnedFd>) {
        let log = self.builder.stderr.take().unwrap_or_else(|| {
            let mut log = File::options();
            let log = log.create(true).append(true);
            log.open(self.dir.join("log")).unwrap().into()
        });
        let seen = File::from(log.try_clone().unwrap()).metadata().unwrap();
        self.standard_error = Some((seen.dev(), seen.ino()));
        let program = self.builder.program.clone().unwrap_or_else(binary);
        let mut command = Command::new("/bin/sh");
        command.args(["-c", HAND_OVER, "sh", &self.builder.before]);
        command.args(&self.builder.under).arg(program);
        command
            .arg("run")
            .arg("--config")
            .arg(self.dir.join("preforkd.toml"));
        command.args(&self.builder.arguments).env_clear();
        for key in KEPT_ENVIRONMENT {
            command.envs(std::env::var_os(key).map(|value| (key, value)));
        }
        let environment = self.builder.environment.iter();
        command
            .env("TMPDIR", &*self.dir)
            .env("NOTIFY_SOCKET", self.notifications.path())
            .envs(environment.map(|(key, value)| (key, value)))
            .stdout(File::create(self.dir.join("stdout")).unwrap())
            .stderr(log)
            .process_group(0);
        match listener {
            Some(listener) => {
                command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "rpc");
                command.stdin(listener);
            }
            None => {
                command.stdin(Stdio::null());
            }
        }
        self.child = Some(command.spawn().unwrap());
    }

    fn times_ready(&self) -> usize {
        let lines = self.notifications();
        lines.iter().filter(|line| *line == "READY=1").count()
    }

    /// Waits until it has reported ready more than `before` times.
    fn wait_ready(mut self, before: usize) -> Result<Self, StartFailure> {
        let end = Instant::now() + PATIENCE;
        while self.times_ready() <= before {
            if let Some(status) = self.try_wait() {
                return Err(self.give_up(status.code()));
            }
            if Instant::now() > end {
                return Err(self.give_up(None));
            }
            pause();
        }
        Ok(self)
    }

    fn give_up(mut self, code: Option<i32>) -> StartFailure {
        let log = self.log();
        self.end_group();
        // The test checks this log itself.
        self.child = None;
        StartFailure { code, log }
    }

    /// Returns the address on which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Returns the pid of the master.
    pub fn pid(&self) -> i32 {
        self.child
            .as_ref()
            .expect("it was started")
            .id()
            .cast_signed()
    }

    /// Returns its log so far.
    pub fn log(&self) -> String {
        self.dir.read("log")
    }

    /// Returns its messages to the service manager, with the time of each line.
    pub fn notify(&self) -> &Notifications {
        &self.notifications
    }

    /// Returns its messages to the service manager so far, line by line.
    pub fn notifications(&self) -> Vec<String> {
        self.notifications.lines()
    }

    /// Waits until its log contains `text`.
    #[track_caller]
    pub fn wait_log(&self, text: &str) {
        wait_for(&format!("{text:?} in the log"), PATIENCE, || {
            self.log().contains(text)
        });
    }

    /// Opens a connection.
    #[track_caller]
    pub fn client(&self) -> Client {
        Client::connect(self.address)
    }

    /// Does the same if it may no longer run.
    pub fn try_client(&self) -> std::io::Result<Client> {
        std::net::TcpStream::connect_timeout(&self.address, PATIENCE).map(Client::over)
    }

    /// Runs a command of preforkd against it: `command(&["status", "--json"])`.
    pub fn command(&self, arguments: &[&str]) -> Output {
        self.asking(arguments).output().unwrap()
    }

    /// Returns a command of preforkd against it, to be run. Commands to the master get its control
    /// socket; `call` gets its address.
    pub fn asking(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(arguments);
        if matches!(arguments.first(), Some(&("call" | "map" | "bench"))) {
            command.arg("--address").arg(self.address.to_string());
        } else {
            command
                .arg("--control-socket")
                .arg(self.dir.join("control.sock"));
        }
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        command
    }

    /// Returns its status as documented JSON, after the master has closed that connection.
    #[track_caller]
    pub fn status(&self) -> Value {
        control::status(&self.dir.join("control.sock"))
    }

    /// Returns its workers, including draining ones, without empty slots.
    #[track_caller]
    pub fn workers(&self) -> Vec<Worker> {
        let mut status = self.status();
        let workers = status["workers"].as_array_mut().unwrap().drain(..);
        let living = workers.filter(|worker| !worker["pid"].is_null());
        living
            .map(|worker| serde_json::from_value(worker).unwrap())
            .collect()
    }

    /// Returns the pids of the ready workers, by slot.
    #[track_caller]
    pub fn ready_workers(&self) -> Vec<i32> {
        let mut workers = self.workers();
        workers.retain(|worker| worker.state == "ready");
        workers.sort_by_key(|worker| worker.slot);
        workers.iter().map(|worker| worker.pid).collect()
    }

    /// Returns the ready process of the first pool.
    pub fn pool(&self) -> i32 {
        let status = self.status();
        let mut pools = status["pools"].as_array().unwrap().iter();
        let ready = pools.find(|pool| pool["state"] == "ready");
        let pid = ready.and_then(|pool| pool["pid"].as_i64());
        i32::try_from(pid.unwrap_or_else(|| panic!("{status}"))).unwrap()
    }

    /// Waits until `count` calls run in pool programs.
    #[track_caller]
    pub fn wait_busy(&self, count: u64) {
        wait_for("calls to run in programs", PATIENCE, || {
            let status = self.status();
            let pools = status["pools"].as_array().unwrap().iter();
            pools.filter_map(|pool| pool["busy"].as_u64()).sum::<u64>() == count
        });
        pass(Duration::from_millis(20));
    }

    /// Waits until `count` calls run in one worker and have begun. Returns that worker.
    ///
    /// The status counts a call when it is given to a free thread. Only the call itself knows that it has
    /// begun there, shortly after. So this waits a little longer.
    #[track_caller]
    pub fn wait_running(&self, count: u64) -> i32 {
        let mut found = None;
        wait_for("calls to run", PATIENCE, || {
            let workers = self.workers();
            found = workers
                .iter()
                .find(|it| it.running == count)
                .map(|it| it.pid);
            found.is_some()
        });
        pass(Duration::from_millis(100));
        found.unwrap()
    }

    /// Writes another configuration for the next reload.
    pub fn configure(&self, config: &str) {
        let listen = if config.contains("[[listen]]") {
            String::new()
        } else {
            let keys = &self.builder.listen;
            format!("\n[[listen]]\naddress = \"{}\"\n{keys}", self.address)
        };
        let text = format!(
            "pid-file = \"preforkd.pid\"\ncontrol-socket = \"control.sock\"\n{config}{listen}"
        );
        self.dir.write("preforkd.toml", text);
    }

    /// Reloads and expects success.
    #[track_caller]
    pub fn reload(&self) {
        let reload = self.command(&["reload"]);
        assert!(reload.status.success(), "{reload:?}");
    }

    /// Reloads with this configuration and expects success.
    #[track_caller]
    pub fn reload_with(&self, config: &str) {
        self.configure(config);
        self.reload();
    }

    /// Reloads with this configuration, expects a refusal, and returns what is printed about it.
    #[track_caller]
    pub fn refused_reload(&self, config: &str) -> String {
        self.configure(config);
        let reload = self.command(&["reload"]);
        let text = String::from_utf8_lossy(&reload.stderr).into_owned();
        assert_eq!(reload.status.code(), Some(1), "{text}");
        text
    }

    /// Makes its new workers fail: there is room for the counters of a worker (1.7 MB) and 1 MiB more, but none
    /// for the stack of a thread (2 MiB).
    pub fn cramp(&self) {
        self.limit_address_space(&format!(
            "{}",
            (process::virtual_kib(self.pid()) + 1696 + 1024) * 1024
        ));
    }

    /// Undoes `cramp`.
    pub fn uncramp(&self) {
        self.limit_address_space("unlimited");
    }

    fn limit_address_space(&self, soft: &str) {
        let mut limit = Command::new("prlimit");
        limit.args([
            "--pid",
            &self.pid().to_string(),
            &format!("--as={soft}:unlimited"),
        ]);
        assert!(limit.status().unwrap().success());
    }

    /// Sends the master a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Returns its exit status, if it has ended.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.exited.is_none() {
            self.exited = self.child.as_mut()?.try_wait().unwrap();
        }
        self.exited
    }

    /// Waits until it has ended by itself.
    #[track_caller]
    pub fn wait_exit(&mut self) -> ExitStatus {
        wait_for("the master's end", PATIENCE, || self.try_wait().is_some());
        self.exited.expect("it was just waited for")
    }

    /// Returns its processes: the master, workers and keepers, whatever their parent is.
    pub fn processes(&self) -> Vec<i32> {
        let standard_error = self.standard_error;
        standard_error.map_or_else(Vec::new, process::with_standard_error)
    }

    /// Waits until none of its processes is left, including workers.
    #[track_caller]
    pub fn wait_group_gone(&self) {
        wait_for("the end of all its processes", PATIENCE, || {
            self.processes().is_empty()
        });
    }
}
