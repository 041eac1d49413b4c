//! Tests several servers on one machine, each with its own name.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::{Dir, PATIENCE, binary, example, process, source, wait_for};

/// The servers of one test. Each has a unique name, because the files of root's servers are all below
/// /run.
struct Servers {
    dir: Dir,
    names: Vec<String>,
    pids: Vec<i32>,
}

impl Servers {
    fn new(names: &[&str]) -> Self {
        let own = std::process::id();
        Servers {
            dir: Dir::new(),
            names: names.iter().map(|name| format!("{name}{own}")).collect(),
            pids: Vec::new(),
        }
    }

    /// Returns the output of a command that finds its files only by names.
    fn ask(&self, program: &PathBuf, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        command.args(arguments).env("XDG_RUNTIME_DIR", &*self.dir);
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// Starts a server in the background.
    fn start(&mut self, program: &PathBuf, name: &[&str]) -> Output {
        let socket = format!("unix:{}/{}.sock", self.dir.display(), self.pids.len());
        let config =
            format!("log.file = \"log\"\n[workers]\ncount = 1\n[[listen]]\naddress = {socket:?}\n");
        let file = self.dir.write(&format!("{}.toml", self.pids.len()), config);
        let arguments = ["run", "--daemon", "--config", file.to_str().unwrap()];
        let started = self.ask(program, &[&arguments, name].concat());
        if started.status.success() {
            let status = self.ask(program, &[&["status", "--json"], name].concat());
            let status: Value = serde_json::from_slice(&status.stdout).unwrap();
            self.pids
                .push(status["master"]["pid"].as_i64().unwrap() as i32);
        }
        started
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for pid in &self.pids {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGINT);
            wait_for("its end", PATIENCE, || !process::runs(*pid));
        }
        if nix::unistd::geteuid().is_root() {
            for name in &self.names {
                let _ = fs::remove_dir(format!("/run/{name}"));
            }
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_second_server_needs_a_name_and_nothing_else() {
    let mut servers = Servers::new(&["first", "second"]);
    let (first, second) = (servers.names[0].clone(), servers.names[1].clone());
    let started = servers.start(&binary(), &["--name", &first]);
    assert!(started.status.success(), "{started:?}");
    let same = servers.start(&binary(), &["--name", &first]);
    let said = text(&same.stderr);
    assert_eq!(same.status.code(), Some(71), "{said}");
    assert!(
        said.contains("start a second server with --name NAME"),
        "{said}"
    );
    let other = servers.start(&binary(), &["--name", &second]);
    assert!(other.status.success(), "{other:?}");
    assert_ne!(servers.pids[0], servers.pids[1]);
    let title = process::title(servers.pids[1]);
    assert!(title.starts_with(&format!("{second}: master ")), "{title}");
    let page = servers.ask(&binary(), &["status", "--name", &second]);
    let page = text(&page.stdout);
    let version = env!("CARGO_PKG_VERSION");
    assert!(
        page.starts_with(&format!("{second} (preforkd {version})  pid ")),
        "{page}"
    );
    let checked = servers.ask(&binary(), &["check", "--name", &second]);
    let checked = text(&checked.stdout);
    assert!(
        checked.contains(&format!("/{second}/{second}.pid")),
        "{checked}"
    );
    let called = servers.ask(&binary(), &["call", "ping", "7", "--name", &second]);
    assert_eq!(text(&called.stdout), "7\n", "{called:?}");
    let bench = ["bench", "ping", "--count", "5", "--name", &second];
    assert!(servers.ask(&binary(), &bench).status.success());
    let unknown = servers.ask(&binary(), &["map", "ping", "--name", "no-such-server"]);
    assert_eq!(unknown.status.code(), Some(69), "{unknown:?}");
    let stopped = servers.ask(&binary(), &["stop", "--name", &second]);
    assert!(stopped.status.success(), "{stopped:?}");
    let gone = servers.ask(&binary(), &["status", "--name", &second]);
    assert_eq!(gone.status.code(), Some(69), "{gone:?}");
    let wrong = servers.ask(&binary(), &["status", "--name", "../x"]);
    assert_eq!(wrong.status.code(), Some(64), "{wrong:?}");
}

#[test]
fn a_program_on_the_library_has_paths_of_its_own() {
    let mut servers = Servers::new(&["acme"]);
    let own = servers.names[0].clone();
    let program = servers.dir.join(&own);
    std::os::unix::fs::symlink(example("arithmetic"), &program).unwrap();
    let started = servers.start(&program, &[]);
    assert!(started.status.success(), "{started:?}");
    // Without a configuration at the usual place, a call goes to the running server of that name.
    let called = servers.ask(&program, &["call", "subtract", "[42, 23]"]);
    assert_eq!(text(&called.stdout), "19\n", "{called:?}");
    let gone = servers.ask(&program, &["status", "--name", "no-such-server"]);
    let said = text(&gone.stderr);
    let remedy = format!(
        "start one with `{own} run`, or name the running one with --config FILE or --name NAME"
    );
    assert!(said.contains(&remedy), "{said}");
    // Another program does not take it for its own server.
    let other = servers.ask(&binary(), &["status", "--name", "no-such-server"]);
    assert_eq!(other.status.code(), Some(69), "{other:?}");
    for arguments in [["upgrade"].as_slice(), &["status"]] {
        let done = servers.ask(&program, arguments);
        let said = text(&done.stdout);
        let version = format!("{own} (preforkd {})", env!("CARGO_PKG_VERSION"));
        assert!(done.status.success(), "{done:?}");
        assert!(said.contains(&version), "{said}");
        assert!(!said.contains("restart the server"), "{said}");
    }
}

#[test]
fn a_unit_of_another_name_has_everything_of_its_own() {
    let dir = Dir::new();
    let install = |more: &[&str]| {
        let mut install = Command::new(source().join("systemd/install"));
        install
            .arg("--root")
            .arg(&*dir)
            .args(["--name", "acme"])
            .args(more);
        let done = install.output().unwrap();
        assert!(done.status.success(), "{done:?}");
    };
    install(&["--binary", "/bin/true"]);
    let unit = dir.read("usr/lib/systemd/system/acme.service");
    for line in [
        "ExecStart=/usr/bin/acme run --config /etc/acme/acme.toml",
        "RuntimeDirectory=acme",
        "User=acme",
        "Documentation=man:preforkd(8)",
    ] {
        assert!(
            unit.lines().any(|other| other == line),
            "{line} is not in {unit}"
        );
    }
    for file in [
        "usr/bin/acme",
        "usr/lib/systemd/system/acme.socket",
        "usr/lib/sysusers.d/acme.conf",
        "usr/lib/tmpfiles.d/acme.conf",
        "etc/acme/acme.toml",
        "usr/share/doc/preforkd/examples/alerts.yml",
        "usr/share/doc/preforkd/examples/scrape.yml",
        "usr/share/doc/preforkd/examples/preforkd.json",
        "usr/share/doc/preforkd/examples/preforkd.logrotate",
    ] {
        assert!(dir.join(file).exists(), "{file}");
    }
    install(&["--uninstall"]);
    assert!(!dir.join("usr/bin/acme").exists());
    assert!(dir.join("etc/acme/acme.toml").exists());
}
