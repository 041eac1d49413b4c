//! Tests preforkd as a service of a real systemd: booted in a sandbox of namespaces
//! (`support/systemd-sandbox`), installed there by `systemd/install`, and controlled with systemctl.
//!
//! Nothing of it touches the machine that runs the tests. Each test is ignored unless requested, because
//! the sandbox needs root and a mounted cgroup2. `tests/run` requests them where that is available, and
//! reports where it is not.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::support::{Dir, PATIENCE, binary, has_landlock, markdown, source, wait_for};

/// A booted systemd that ends with its test.
struct Sandbox {
    directory: PathBuf,
}

impl Sandbox {
    fn up() -> Self {
        // It has its own directory under /tmp, because unix sockets need short paths.
        let output = tool()
            .args(["up", "--bind-ro"])
            .arg(source())
            .output()
            .unwrap();
        assert!(output.status.success(), "no sandbox: {}", text(&output));
        let directory = String::from_utf8(output.stdout).unwrap();
        let sandbox = Sandbox {
            directory: PathBuf::from(directory.trim_end()),
        };
        // Its path may not be visible inside, but the share is.
        std::fs::copy(binary(), sandbox.binary()).unwrap();
        sandbox
    }

    /// Returns the binary under test, at the same path inside and outside.
    fn binary(&self) -> PathBuf {
        self.directory.join("share/preforkd")
    }

    /// Installs preforkd. If not empty, `config` replaces the shipped configuration, and `drop_in` amends
    /// the unit.
    fn with_preforkd(config: &str, drop_in: &str) -> Self {
        let sandbox = Self::up();
        sandbox.run("systemd/install");
        if !config.is_empty() {
            sandbox.configure(config);
        }
        if !drop_in.is_empty() {
            sandbox.run(&format!(
                "mkdir -p /etc/systemd/system/preforkd.service.d
                 printf '[Service]\\n%s\\n' '{drop_in}' >/etc/systemd/system/preforkd.service.d/test.conf
                 systemctl daemon-reload"
            ));
        }
        sandbox
    }

    fn configure(&self, config: &str) {
        self.run(&format!(
            "printf '%s\\n' '{config}' >/etc/preforkd/preforkd.toml"
        ));
    }

    fn command(&self, script: &str) -> Command {
        let mut command = tool();
        command
            .arg("-d")
            .arg(&self.directory)
            .args(["exec", "--", "bash", "-euo", "pipefail", "-c"]);
        command
            .arg(script)
            .current_dir(source())
            .env("PREFORKD_BINARY", self.binary());
        command
    }

    /// Runs a script inside, in the top directory of the source tree.
    fn try_run(&self, script: &str) -> Output {
        self.command(script).output().unwrap()
    }

    /// Does the same, asserts that it succeeds, and returns its output.
    #[track_caller]
    fn run(&self, script: &str) -> String {
        let output = self.try_run(script);
        assert!(output.status.success(), "{script}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Returns a property of the unit, as `systemctl show` prints it.
    #[track_caller]
    fn property(&self, name: &str) -> String {
        let value = self.run(&format!(
            "systemctl show --value -p {name} preforkd.service"
        ));
        value.trim_end().to_owned()
    }

    #[track_caller]
    fn status(&self) -> Value {
        serde_json::from_str(&self.run("preforkd status --json")).unwrap()
    }

    /// Returns the pids of the workers when all are ready and earlier ones have exited.
    #[track_caller]
    fn ready_workers(&self) -> Vec<i64> {
        let mut workers = Vec::new();
        wait_for("all workers to be ready", PATIENCE, || {
            workers = self.status()["workers"].as_array().unwrap().clone();
            workers.iter().all(|worker| worker["state"] == "ready")
        });
        assert!(!workers.is_empty());
        workers
            .iter()
            .map(|worker| worker["pid"].as_i64().unwrap())
            .collect()
    }

    #[track_caller]
    fn assert_serves(&self) {
        assert_eq!(
            self.run("preforkd call ping '\"hello\"'").trim_end(),
            "\"hello\""
        );
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let journal = self.try_run("journalctl --no-pager -n 100 -u 'preforkd*'");
            eprintln!("the journal:\n{}", text(&journal));
        }
        let down = tool()
            .arg("-d")
            .arg(&self.directory)
            .args(["down", "--force"])
            .output();
        if !down.is_ok_and(|output| output.status.success()) {
            eprintln!(
                "could not remove the sandbox in {}",
                self.directory.display()
            );
        }
    }
}

fn tool() -> Command {
    let mut command = Command::new(source().join("tests/support/systemd-sandbox"));
    command.env_remove("SANDBOX_DIR").stdin(Stdio::null());
    command
}

fn text(output: &Output) -> String {
    let both = [output.stdout.as_slice(), &output.stderr].concat();
    String::from_utf8_lossy(&both).into_owned()
}

const SLEEP: &str = "[methods.sleep]\nbuiltin = \"sleep\"";

#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_start_returns_when_every_worker_is_ready() {
    let sandbox = Sandbox::with_preforkd("", "");
    sandbox.run("systemctl start preforkd");
    // No waiting is needed because of Type=notify.
    let status = sandbox.status();
    let mut workers = status["workers"].as_array().unwrap().iter();
    assert!(
        workers.len() > 0 && workers.all(|it| it["state"] == "ready"),
        "{status}"
    );
    sandbox.assert_serves();
    assert_eq!(sandbox.property("ActiveState"), "active");
    assert!(
        !sandbox.property("StatusText").is_empty(),
        "STATUS= says how it is"
    );
    let owners = sandbox.run("ps -e -o user=,args= | grep '[p]reforkd: '");
    let users = owners
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    assert!(
        users.clone().count() >= 2,
        "a master and its workers: {owners}"
    );
    assert!(
        users.clone().all(|user| user == "preforkd"),
        "none of them is root: {owners}"
    );
    assert_eq!(sandbox.property("NRestarts"), "0");
}

#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_exposure_is_within_its_bar() {
    let sandbox = Sandbox::with_preforkd("", "");
    let table = sandbox.run("systemd-analyze security --no-pager --threshold=12 preforkd.service");
    println!("{}", table.lines().last().unwrap_or_default());
}

/// No process is root there, so only the guard protects a worker's memory.
#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_programs_are_guarded_in_the_unit() {
    let method = |name: &str, guard: bool| {
        format!(
            "[methods.{name}]\nguard = {guard}\ncommand = [\"sh\", \"-c\", \
             \"(exec 4</proc/$PPID/mem) 2>/dev/null && echo opened || echo refused\"]\n"
        )
    };
    let config = method("with", true) + &method("without", false);
    let sandbox = Sandbox::with_preforkd(&config, "");
    sandbox.run("systemctl start preforkd");
    let call = |name: &str| sandbox.run(&format!("preforkd call {name}"));
    let warnings = sandbox.status()["master"]["warnings"].to_string();
    if !has_landlock() {
        println!("not run: this kernel has no Landlock");
        return;
    }
    assert!(!warnings.contains("without a guard"), "{warnings}");
    assert_eq!(call("with"), "\"refused\\n\"\n");
    assert_eq!(call("without"), "\"opened\\n\"\n");
}

#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_reload_tells_its_verdict() {
    let sandbox = Sandbox::with_preforkd("[workers]\ncount = 2", "");
    sandbox.run("systemctl start preforkd");
    let before = sandbox.ready_workers();

    sandbox.configure("[workers]\ncuont = 2");
    let refused = sandbox.try_run("systemctl reload preforkd");
    assert!(
        !refused.status.success(),
        "a bad configuration fails the reload"
    );
    assert_eq!(
        sandbox.ready_workers(),
        before,
        "and leaves the workers alone"
    );
    assert_eq!(sandbox.property("ActiveState"), "active");
    sandbox.assert_serves();

    sandbox.configure("[workers]\ncount = 3");
    sandbox.run("systemctl reload preforkd");
    let status = sandbox.status();
    assert_eq!(status["master"]["last_reload"]["ok"], true, "{status}");
    let ready = status["workers"].as_array().unwrap().iter();
    assert_eq!(
        ready.filter(|worker| worker["state"] == "ready").count(),
        3,
        "{status}"
    );
    sandbox.assert_serves();
}

#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_an_upgrade_leaves_the_main_pid_and_the_state_alone() {
    let sandbox = Sandbox::with_preforkd("[workers]\ncount = 2", "");
    sandbox.run("systemctl start preforkd");
    let pid = sandbox.property("MainPID");
    let before = sandbox.ready_workers();
    let install = |what: &str| {
        sandbox.run(&format!(
            "cp {what} /usr/bin/new && chmod 755 /usr/bin/new && mv /usr/bin/new /usr/bin/preforkd"
        ));
    };
    let good = sandbox.binary().display().to_string();
    let assert_undisturbed = || {
        assert_eq!(sandbox.property("MainPID"), pid);
        assert_eq!(sandbox.property("ActiveState"), "active");
        assert_eq!(sandbox.property("SubState"), "running");
        assert_eq!(sandbox.property("NRestarts"), "0");
        let text = sandbox.property("StatusText");
        assert!(text.starts_with("2 of 2 workers ready"), "{text}");
        sandbox.assert_serves();
    };
    for _ in 0..3 {
        install(&good);
        sandbox.run("preforkd upgrade");
        let inodes = sandbox.run(&format!("stat -Lc %i /proc/{pid}/exe /usr/bin/preforkd"));
        let inodes: Vec<&str> = inodes.lines().collect();
        assert_eq!(inodes[0], inodes[1], "the new binary runs");
        assert_undisturbed();
    }
    let after = sandbox.ready_workers();
    assert!(after.iter().all(|worker| !before.contains(worker)));

    install("/bin/false");
    let refused = sandbox.try_run(&format!("{good} upgrade"));
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    install(&good); // it also runs check and call
    assert_undisturbed();
    assert_eq!(sandbox.ready_workers(), after);
    sandbox.run("systemctl reload preforkd");
    assert_undisturbed();
    sandbox.run("systemctl stop preforkd");
    assert_eq!(sandbox.property("Result"), "success");
}

#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_a_broken_configuration_does_not_start() {
    let sandbox = Sandbox::with_preforkd("color = 1", "");
    let refused = sandbox.try_run("systemctl start preforkd");
    assert!(!refused.status.success());
    let journal = sandbox.run("journalctl --no-pager -o cat -u preforkd");
    assert!(
        journal.contains("/etc/preforkd/preforkd.toml:1:1"),
        "{journal}"
    );
    // It was started only once, so the repaired unit starts without `reset-failed`.
    assert_eq!(sandbox.property("ExecMainStatus"), "78");
    assert_eq!(sandbox.property("NRestarts"), "0");
    sandbox.configure("");
    sandbox.run("systemctl start preforkd");
    sandbox.assert_serves();
}

#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_replaces_a_master_that_stands_still() {
    let sandbox = Sandbox::with_preforkd("", "WatchdogSec=4s");
    sandbox.run("systemctl start preforkd");
    let before = sandbox.property("MainPID");
    sandbox.run(&format!("kill -STOP {before}"));
    wait_for("another main pid", PATIENCE, || {
        let now = sandbox.property("MainPID");
        now != "0" && now != before && sandbox.property("ActiveState") == "active"
    });
    sandbox.ready_workers();
    sandbox.assert_serves();
}

#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_restarts_a_killed_master() {
    let sandbox = Sandbox::with_preforkd("", "");
    sandbox.run("systemctl start preforkd");
    let before = sandbox.property("MainPID");
    sandbox.run("systemctl kill --kill-whom=main -s KILL preforkd");
    wait_for("another main pid", PATIENCE, || {
        let now = sandbox.property("MainPID");
        now != "0" && now != before && sandbox.property("ActiveState") == "active"
    });
    assert_eq!(sandbox.property("NRestarts"), "1");
    sandbox.assert_serves();
}

#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_stop_answers_the_running_call() {
    let sandbox = Sandbox::with_preforkd(SLEEP, "");
    sandbox.run("systemctl start preforkd");
    let mut call = sandbox.command("preforkd call sleep 5");
    let call = call
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("the call to run", PATIENCE, || {
        let status = sandbox.status();
        let workers = status["workers"].as_array().unwrap();
        workers.iter().any(|worker| worker["running"] == 1)
    });
    sandbox.run("systemctl stop preforkd");
    let answered = call.wait_with_output().unwrap();
    assert!(answered.status.success(), "{}", text(&answered));
    assert_eq!(sandbox.property("Result"), "success");
    assert_eq!(sandbox.property("ExecMainStatus"), "0");
    let left = sandbox.try_run("ps -u preforkd -o pid=,args=");
    assert!(left.stdout.is_empty(), "{}", text(&left));
}

#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_a_connection_made_before_the_service_runs_is_answered() {
    let sandbox = Sandbox::with_preforkd("", "");
    sandbox.run("systemctl start preforkd.socket");
    assert_eq!(sandbox.property("ActiveState"), "inactive");
    sandbox.assert_serves();
    assert_eq!(sandbox.property("ActiveState"), "active");
    // systemd holds the socket, so a restart refuses no client either.
    sandbox.run("systemctl stop preforkd.service && preforkd call ping 1");
}

#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_the_journal_has_priorities() {
    let sandbox = Sandbox::with_preforkd("", "");
    sandbox.run("systemctl start preforkd");
    sandbox.configure("color = 1");
    assert!(!sandbox.try_run("preforkd reload").status.success());
    let journal = sandbox.run("journalctl --no-pager -o json -u preforkd -t preforkd");
    let mut priorities = std::collections::BTreeMap::new();
    for line in journal.lines() {
        let entry: Value = serde_json::from_str(line).unwrap();
        let message = entry["MESSAGE"].as_str().unwrap_or_default();
        assert!(
            !message.starts_with('<'),
            "a priority that was not understood: {message}"
        );
        *priorities.entry(entry["PRIORITY"].to_string()).or_insert(0) += 1;
    }
    println!("journal lines by priority: {priorities:?}");
    assert!(priorities.contains_key("\"6\""), "info: {journal}");
    assert!(
        priorities.contains_key("\"3\""),
        "the refused reload is an error: {journal}"
    );
}

#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_install_changes_nothing_twice_and_uninstall_leaves_the_configuration() {
    let sandbox = Sandbox::with_preforkd("[workers]\ncount = 1", "");
    let again = sandbox.run("systemd/install");
    assert!(!again.contains("installed "), "{again}");
    assert!(again.contains("kept "), "{again}");
    sandbox.run("systemctl start preforkd");
    sandbox.run("systemd/install --uninstall");
    let left = sandbox.run("find /usr /etc /run -xdev -name 'preforkd*' | sort");
    assert!(left.contains("/etc/preforkd/preforkd.toml"), "{left}");
    for gone in [
        "/usr/bin/preforkd",
        "/usr/lib/systemd/system/preforkd.service",
    ] {
        assert!(!left.lines().any(|line| line == gone), "{left}");
    }
    assert!(
        !sandbox
            .try_run("systemctl is-active preforkd")
            .status
            .success()
    );
}

#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_the_readme_installs_it() {
    let readme = std::fs::read_to_string(source().join("README.md")).unwrap();
    let sandbox = Sandbox::up();
    let mut ran = 0;
    for block in markdown::blocks(&readme) {
        if block.language == "sh" && block.text.contains("systemctl") {
            // root needs no sudo, and the build of cargo is already the binary under test.
            sandbox.run(&format!(
                "sudo() {{ \"$@\"; }}\ncargo() {{ :; }}\n{}",
                block.text
            ));
            ran += 1;
        }
    }
    assert!(ran > 0, "the README tells how to install it");
    sandbox.ready_workers();
    sandbox.assert_serves();
}

/// Installs into a separate directory, so it needs no sandbox.
#[test]
fn install_takes_the_packaged_build_from_the_directory_of_cargo() {
    let dir = Dir::new();
    for profile in ["release", "dist"] {
        let built = dir.join("built").join(profile);
        std::fs::create_dir_all(&built).unwrap();
        std::fs::copy("/bin/true", built.join("preforkd")).unwrap();
        let mut file = std::fs::File::options()
            .append(true)
            .open(built.join("preforkd"))
            .unwrap();
        file.write_all(profile.as_bytes()).unwrap();
        let installed = Command::new(source().join("systemd/install"))
            .arg("--root")
            .arg(&*dir)
            .env("CARGO_TARGET_DIR", dir.join("built"))
            .env_remove("PREFORKD_BINARY")
            .output()
            .unwrap();
        assert!(installed.status.success(), "{}", text(&installed));
        let bytes = std::fs::read(dir.join("usr/bin/preforkd")).unwrap();
        assert!(bytes.ends_with(profile.as_bytes()), "{profile}");
    }
}

/// The commands stand in the comment of the socket unit and in operations.md.
#[test]
#[ignore = "needs root and cgroup2: tests/run runs it where they are"]
fn systemd_a_service_that_runs_is_switched_to_the_socket_unit() {
    let read = |file: &str| std::fs::read_to_string(source().join(file)).unwrap();
    let unit = read("systemd/preforkd.socket");
    let (_, how) = unit.split_once("To switch:").unwrap();
    let commands: Vec<&str> = how
        .lines()
        .filter_map(|line| line.strip_prefix("#   "))
        .filter(|line| line.starts_with("systemctl "))
        .collect();
    let page = read("docs/operations.md");
    let is_told = |block: &markdown::Block| block.text.lines().eq(commands.iter().copied());
    assert!(markdown::blocks(&page).iter().any(is_told), "{commands:?}");
    let sandbox = Sandbox::with_preforkd("", "");
    sandbox.run("systemctl enable --now preforkd.service");
    let refused = sandbox.try_run("systemctl enable --now preforkd.socket");
    assert!(!refused.status.success(), "{}", text(&refused));
    sandbox.run(&commands.join("\n"));
    sandbox.assert_serves();
    sandbox.run("systemctl is-active preforkd.socket preforkd.service");
    // From now on systemd holds the address.
    sandbox.run("systemctl stop preforkd.service && preforkd call ping 1");
}
