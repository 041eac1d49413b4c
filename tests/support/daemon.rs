//! A real preforkd of one test: started, asked, signalled, and gone without a trace at the end.
//!
//! Its own directory, its own process group, and a listener that the test has bound to port 0 and
//! hands over as a service manager would (LISTEN_FDS, sd_listen_fds(3)): no port is guessed, and
//! a client may connect before the daemon runs. Dropping it stops it, and fails the test on any
//! line of its log that is an error, a panic or a KILL and was not announced with
//! [`Builder::expect_log`].

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
use super::{Client, Dir, PATIENCE, binary, control, pass, pause, process, wait_for};

/// What a daemon keeps of the test's environment: enough to find programs, and the mark by which
/// `tests/run` knows its own processes.
const KEPT_ENVIRONMENT: [&str; 4] = ["PATH", "HOME", "PREFORKD_TEST_RUN", "RUST_BACKTRACE"];

/// Hands its stdin over as descriptor 3. The shell is there because LISTEN_PID has to be the pid
/// of the daemon, which nobody knows before the fork and a shell keeps across its exec.
/// No core either: a test that crashes workers by the hundred leaves no file.
const HAND_OVER: &str =
    r#"ulimit -c 0; exec 3<&0 </dev/null; export LISTEN_PID=$$; eval "$1"; shift; exec "$@""#;

/// A daemon to be.
#[derive(Default)]
pub struct Builder {
    config: String,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    expected: Vec<String>,
    /// A word of the shell, run just before the daemon is.
    before: String,
    program: Option<PathBuf>,
    stderr: Option<OwnedFd>,
    /// What it is run by, in front of its own command line.
    under: Vec<OsString>,
    /// Whom its directory belongs to, if not the test's user.
    user: Option<u32>,
    /// What else is in its directory: names and texts.
    files: Vec<(String, String)>,
}

impl Builder {
    /// Its configuration: top-level keys first, then tables. Pid file, control socket and, where
    /// it has no `[[listen]]`, the test's own listener are added.
    pub fn config(mut self, text: &str) -> Self {
        text.clone_into(&mut self.config);
        self
    }

    /// One more argument behind `run --config FILE`.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// One more variable of its environment, which is otherwise nearly empty.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        let pair = (key.as_ref().to_owned(), value.as_ref().to_owned());
        self.environment.push(pair);
        self
    }

    /// What the shell does to itself before it becomes the daemon, such as `ulimit -n 64`.
    pub fn before(mut self, shell: &str) -> Self {
        shell.clone_into(&mut self.before);
        self
    }

    /// Another program than preforkd, which was built on the library.
    pub fn program(mut self, path: PathBuf) -> Self {
        self.program = Some(path);
        self
    }

    /// Its standard error, in place of the file that `Daemon::log` reads.
    pub fn stderr(mut self, to: impl Into<OwnedFd>) -> Self {
        self.stderr = Some(to.into());
        self
    }

    /// Runs all of it as this user and group, with no others, in a directory of theirs. For root.
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

    /// One more file in its directory, which is there before it starts.
    pub fn file(mut self, name: &str, text: &str) -> Self {
        self.files.push((name.to_owned(), text.to_owned()));
        self
    }

    /// Runs it by another program, which keeps its pid: `strace -DD`.
    pub fn under(mut self, words: &[String]) -> Self {
        self.under.extend(words.iter().map(OsString::from));
        self
    }

    /// Announces a line of the log that would fail the test otherwise. It must come.
    pub fn expect_log(mut self, text: &str) -> Self {
        self.expected.push(text.to_owned());
        self
    }

    /// Starts it and waits until it says that it is ready.
    #[track_caller]
    pub fn start(self) -> Daemon {
        self.try_start()
            .unwrap_or_else(|failure| panic!("it did not start: {failure:?}"))
    }

    /// Starts it, for tests of starts that fail.
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

/// How a start failed: it ended, or said nothing in time (`code` is `None` then).
#[derive(Debug)]
pub struct StartFailure {
    /// The exit code.
    pub code: Option<i32>,
    /// All that it wrote to stderr.
    pub log: String,
}

/// What the status says about a worker, as far as tests ask.
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
    /// `None` only before it was started.
    child: Option<Child>,
    /// `Some` once it was waited for.
    exited: Option<ExitStatus>,
    /// What it has as its standard error, and nobody else has.
    standard_error: Option<(u64, u64)>,
    address: SocketAddr,
    /// What it was started from.
    builder: Builder,
    notifications: Notifications,
    dir: Dir,
}

impl Daemon {
    /// A daemon to be.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// One with two workers and nothing else said.
    #[track_caller]
    pub fn start() -> Self {
        Self::builder().config("[workers]\ncount = 2\n").start()
    }

    /// Starts it once more in the same directory, after its end. It binds its address itself now.
    #[track_caller]
    pub fn start_again(mut self) -> Self {
        assert!(self.try_wait().is_some(), "it still runs");
        self.exited = None;
        let before = self.times_ready();
        self.spawn(None);
        self.wait_ready(before)
            .unwrap_or_else(|failure| panic!("it did not start again: {failure:?}"))
    }

    /// Forks and execs, with a listener or without.
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

    /// Waits until it has said that it is ready more than `before` times.
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
        // its log is the test's business now, and no alarm
        self.child = None;
        StartFailure { code, log }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its directory.
    pub fn dir(&self) -> &Dir {
        &self.dir
    }

    /// The master.
    pub fn pid(&self) -> i32 {
        self.child
            .as_ref()
            .expect("it was started")
            .id()
            .cast_signed()
    }

    /// What it has written to its log so far.
    pub fn log(&self) -> String {
        self.dir.read("log")
    }

    /// What it tells its service manager, with the time of each line.
    pub fn notify(&self) -> &Notifications {
        &self.notifications
    }

    /// What it has told its service manager so far, line by line.
    pub fn notifications(&self) -> Vec<String> {
        self.notifications.lines()
    }

    /// Waits until its log holds `text`.
    #[track_caller]
    pub fn wait_log(&self, text: &str) {
        wait_for(&format!("{text:?} in the log"), PATIENCE, || {
            self.log().contains(text)
        });
    }

    /// A new connection.
    #[track_caller]
    pub fn client(&self) -> Client {
        Client::connect(self.address)
    }

    /// The same, where it may not be there any more.
    pub fn try_client(&self) -> std::io::Result<Client> {
        std::net::TcpStream::connect_timeout(&self.address, PATIENCE).map(Client::over)
    }

    /// Runs a command of preforkd against it: `command(&["status", "--json"])`.
    pub fn command(&self, arguments: &[&str]) -> Output {
        self.asking(arguments).output().unwrap()
    }

    /// A command of preforkd against it, to be run. Those that ask the master find its control socket,
    /// `call` its address.
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

    /// Its status, as the documented JSON; the master has closed what it was asked on.
    #[track_caller]
    pub fn status(&self) -> Value {
        control::status(&self.dir.join("control.sock"))
    }

    /// Its workers, draining ones included, slots without one left out.
    #[track_caller]
    pub fn workers(&self) -> Vec<Worker> {
        let mut status = self.status();
        let workers = status["workers"].as_array_mut().unwrap().drain(..);
        let living = workers.filter(|worker| !worker["pid"].is_null());
        living
            .map(|worker| serde_json::from_value(worker).unwrap())
            .collect()
    }

    /// The pids of the workers that are ready, by slot.
    #[track_caller]
    pub fn ready_workers(&self) -> Vec<i32> {
        let mut workers = self.workers();
        workers.retain(|worker| worker.state == "ready");
        workers.sort_by_key(|worker| worker.slot);
        workers.iter().map(|worker| worker.pid).collect()
    }

    /// The process of the first pool that serves.
    pub fn pool(&self) -> i32 {
        let status = self.status();
        let mut pools = status["pools"].as_array().unwrap().iter();
        let ready = pools.find(|pool| pool["state"] == "ready");
        let pid = ready.and_then(|pool| pool["pid"].as_i64());
        i32::try_from(pid.unwrap_or_else(|| panic!("{status}"))).unwrap()
    }

    /// Waits until so many calls run in programs of pools.
    #[track_caller]
    pub fn wait_busy(&self, count: u64) {
        wait_for("calls to run in programs", PATIENCE, || {
            let status = self.status();
            let pools = status["pools"].as_array().unwrap().iter();
            pools.filter_map(|pool| pool["busy"].as_u64()).sum::<u64>() == count
        });
        pass(Duration::from_millis(20));
    }

    /// Waits until so many calls run in one worker, and have begun; which worker that is.
    ///
    /// The status counts a call from when it is given to a thread that is free. That it has begun in there
    /// too, a moment later, is told by nothing but the call, so this lets a moment pass.
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

    /// Writes another configuration, for the next reload.
    pub fn configure(&self, config: &str) {
        let listen = if config.contains("[[listen]]") {
            String::new()
        } else {
            format!("\n[[listen]]\naddress = \"{}\"\n", self.address)
        };
        let text = format!(
            "pid-file = \"preforkd.pid\"\ncontrol-socket = \"control.sock\"\n{config}{listen}"
        );
        self.dir.write("preforkd.toml", text);
    }

    /// From now on its new workers find no room for a thread's stack, and can't start.
    pub fn cramp(&self) {
        self.limit_address_space(&format!(
            "{}",
            (process::virtual_kib(self.pid()) + 1024) * 1024
        ));
    }

    /// Takes `cramp` back.
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

    /// Its exit status, if it has ended.
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

    /// Its processes: the master, workers and keepers, whoever their parent is by now.
    pub fn processes(&self) -> Vec<i32> {
        let standard_error = self.standard_error;
        standard_error.map_or_else(Vec::new, process::with_standard_error)
    }

    /// Waits until no process of it is left, workers included.
    #[track_caller]
    pub fn wait_group_gone(&self) {
        wait_for("the end of all its processes", PATIENCE, || {
            self.processes().is_empty()
        });
    }
}
