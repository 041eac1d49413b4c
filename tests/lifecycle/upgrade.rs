//! Tests upgrades in place: another binary in the same process, and no client notices.
//!
//! Each test replaces its own copy of the binary. Upgrades that must fail are in `upgrade_failures`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use crate::lifecycle::reload_matrix::{SHAPES, plan};
use crate::support::installed::{Installed, upgrade, wait_for_children, wait_kinds};
use crate::support::load::Load;
use crate::support::process::{executable, kinds};
use crate::support::wire::{DIALECTS, Dialect};
use crate::support::{
    Builder, Client, Daemon, PATIENCE, alone, binary, control, example, from_environment, process,
    wait_for,
};

/// Runs `run` while clients of all nine kinds call, and fails if one of them lost a call.
#[track_caller]
pub fn without_loss(daemon: &Daemon, what: &str, run: impl FnOnce(&dyn Fn())) {
    let loads: Vec<Load> = DIALECTS
        .into_iter()
        .flat_map(|dialect| SHAPES.iter().map(move |shape| (dialect, shape)))
        .map(|(dialect, shape)| {
            let mut plan = plan(daemon.address(), dialect, shape);
            plan.clients = if dialect == Dialect::Frame { 4 } else { 1 };
            Load::of(plan)
        })
        .collect();
    let answered = || loads.iter().map(Load::answered).sum::<u64>();
    let some_calls = || {
        let enough = answered() + 200;
        wait_for("calls answered in between", PATIENCE, || {
            answered() >= enough
        });
    };
    some_calls();
    run(&some_calls);
    some_calls();
    for (number, load) in loads.into_iter().enumerate() {
        let (dialect, shape) = (DIALECTS[number / 3], SHAPES[number % 3].0);
        load.stop()
            .assert_whole(&format!("{dialect:?}, {shape}, {what}"));
    }
}

const CONFIG: &str = "[workers]\ncount = 2\n";

#[test]
fn upgrades_at_full_load_lose_no_call_and_leave_no_trace() {
    let _alone = alone();
    let upgrades = from_environment("PREFORKD_UPGRADES", 20);
    let installed = Installed::new();
    let daemon = installed.daemon(CONFIG).start();
    let master = daemon.pid();
    let mut before = daemon.ready_workers();
    let fresh = kinds(master);
    without_loss(&daemon, &format!("{upgrades} upgrades"), |some_calls| {
        for _ in 0..upgrades {
            installed.renew();
            assert_ne!(executable(master), installed.inode());
            upgrade(&daemon);
            assert_eq!(executable(master), installed.inode(), "the new binary runs");
            let after = daemon.ready_workers();
            assert_eq!(after.len(), 2);
            assert!(after.iter().all(|pid| !before.contains(pid)));
            for worker in &after {
                assert_eq!(executable(*worker), installed.inode());
            }
            before = after;
            some_calls();
        }
    });
    wait_for_children(&daemon, 2);
    wait_kinds(master, &fresh);
    process::wait_for_no_zombies(master);
    assert_eq!(daemon.dir().read("preforkd.pid"), format!("{master}\n"));
    let status = daemon.status();
    assert_eq!(status["master"]["pid"], master);
    assert_eq!(status["master"]["generation"], 1 + upgrades);
    assert_eq!(status["deaths"].as_array().map(Vec::len), Some(0));
    assert_eq!(process::comm(master), "preforkd master");
    assert!(process::title(master).starts_with("preforkd: master /"));
    // It is reported like a reload.
    let count = |what: &str| {
        let told = daemon.notifications();
        told.iter().filter(|line| *line == what).count() as u64
    };
    wait_for("the last word of it", PATIENCE, || {
        count("READY=1") == 1 + upgrades
    });
    assert_eq!(count("RELOADING=1"), upgrades);
}

#[test]
fn what_status_knows_goes_on_and_a_signal_will_do() {
    let installed = Installed::new();
    let config = format!("{CONFIG}[methods.sleep]\nbuiltin = \"sleep\"\n");
    let daemon = installed
        .daemon(&config)
        .expect_log("ended by SIGSEGV")
        .start();
    let victim = daemon.ready_workers()[0];
    kill(Pid::from_raw(victim), Signal::SIGSEGV).unwrap();
    wait_for("its successor", PATIENCE, || {
        daemon.ready_workers().len() == 2 && !daemon.ready_workers().contains(&victim)
    });
    assert!(daemon.command(&["reload"]).status.success());
    wait_for_children(&daemon, 2);
    // A call that runs during all of this is answered by the worker that took it.
    let mut slow = daemon.client();
    slow.send(r#"{"in":"sleep","params":8}"#);
    daemon.wait_running(1);
    let before = daemon.status();
    installed.renew();
    daemon.signal(Signal::SIGUSR2);
    wait_for("the upgrade's verdict", PATIENCE, || {
        daemon.status()["master"]["last_upgrade"]["ok"] == true
    });
    let after = daemon.status();
    assert_eq!(executable(daemon.pid()), installed.inode());
    assert_eq!(before["deaths"], after["deaths"]);
    // An upgrade ends with a reload of its own.
    let reloads = after["reloads"].as_array().unwrap();
    assert_eq!(before["reloads"][0], reloads[0]);
    assert_eq!((reloads.len(), &reloads[1]["generation"]), (2, &3.into()));
    assert_eq!(after["deaths"][0]["pid"], victim);
    assert_eq!(after["master"]["generation"], 3);
    assert!(after["master"]["uptime_s"].as_u64() >= before["master"]["uptime_s"].as_u64());
    let draining = daemon
        .workers()
        .into_iter()
        .find(|worker| worker.running == 1);
    assert_eq!(draining.expect("it runs there").generation, 2);
    assert_eq!(slow.recv_text(), r#"{"out":"sleep","result":8}"#);
    wait_for_children(&daemon, 2);

    // With the new binary everything works as with the old one.
    assert!(daemon.command(&["scale", "3"]).status.success());
    wait_for("a third worker", PATIENCE, || {
        daemon.ready_workers().len() == 3
    });
    daemon.signal(Signal::SIGHUP);
    wait_for("a reload", PATIENCE, || {
        daemon.status()["master"]["generation"] == 4 && daemon.ready_workers().len() == 2
    });
}

#[test]
fn a_deleted_binary_is_no_reason_to_keep_the_old_one_once_there_is_a_new_one() {
    let installed = Installed::new();
    let daemon = installed
        .daemon(CONFIG)
        .expect_log("upgrade refused")
        .start();
    fs::remove_file(installed.path()).unwrap();
    let refused = daemon.command(&["upgrade"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let workers = daemon.ready_workers();
    // A worker of a master whose binary is gone is an ordinary worker.
    daemon.signal(Signal::SIGTTIN);
    wait_for("one more", PATIENCE, || daemon.ready_workers().len() == 3);
    assert!(workers.iter().all(|pid| process::runs(*pid)));
    installed.renew();
    upgrade(&daemon);
    assert_eq!(executable(daemon.pid()), installed.inode());
}

/// A relative path of program and configuration, as in a shell; a daemon that has left that directory; a
/// log file, a unix socket with its mode, and their paths at the end.
#[test]
fn a_daemon_is_upgraded_as_it_was_started_and_leaves_as_it_would_have() {
    let installed = Installed::new();
    let config = "pid-file = \"p.pid\"\ncontrol-socket = \"c.sock\"\nlog.file = \"log\"\n\
                  [workers]\ncount = 2\n\
                  [[listen]]\naddress = \"unix:rpc.sock\"\nmode = \"0640\"\n";
    let file = installed.dir.write("p.toml", config);
    let command = |program: &Path, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&*installed.dir);
        command.env("TMPDIR", &*installed.dir).stdin(Stdio::null());
        command.output().unwrap()
    };
    let started = command(
        Path::new("./preforkd"),
        &["run", "--daemon", "--config", "p.toml"],
    );
    assert!(started.status.success(), "{started:?}");
    let place = ["--config", file.to_str().unwrap()];
    let ask = |word: &str| command(&binary(), &[&[word], &place[..]].concat());
    let pid: i32 = installed.dir.read("p.pid").trim().parse().unwrap();
    let socket = installed.file("rpc.sock");
    let mut client = Client::connect_unix(&socket);
    client.call_text(r#"{"in":"ping"}"#);
    control::status(&installed.file("c.sock"));
    let fresh = kinds(pid);
    for _ in 0..3 {
        installed.renew();
        let done = ask("upgrade");
        assert!(
            done.status.success(),
            "{done:?}\n{}",
            installed.dir.read("log")
        );
        assert_eq!(executable(pid), installed.inode());
        let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
        assert_eq!(cwd, Path::new("/"));
        assert_eq!(
            client.call_text(r#"{"in":"ping"}"#),
            r#"{"out":"pong","result":null}"#
        );
    }
    drop(client);
    wait_for("the old workers gone", PATIENCE, || {
        process::workers(pid).len() == 2
    });
    wait_kinds(pid, &fresh);
    let mode = fs::metadata(&socket).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o640);
    // The log continues in the same file, and is reopened on request.
    fs::rename(installed.file("log"), installed.file("log.1")).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGUSR1).unwrap();
    wait_for("the log reopened", PATIENCE, || {
        installed.dir.read("log").contains("reopened")
    });
    assert!(installed.dir.read("log.1").contains("upgrade: preforkd"));
    let stopped = ask("stop");
    assert!(stopped.status.success(), "{stopped:?}");
    wait_for("its end", PATIENCE, || !process::runs(pid));
    for gone in ["p.pid", "c.sock", "rpc.sock"] {
        assert!(!installed.file(gone).exists(), "{gone} is left behind");
    }
}

#[test]
fn a_program_built_on_the_library_is_upgraded_likewise() {
    let installed = Installed::new();
    installed.put(&example("arithmetic"));
    let daemon = installed.daemon(CONFIG).start();
    let mut client = daemon.client();
    let sum = r#"{"in":"sum","params":[1,2,3]}"#;
    assert_eq!(client.call_text(sum), r#"{"out":"sum","result":6}"#);
    installed.put(&example("arithmetic"));
    upgrade(&daemon);
    assert_eq!(executable(daemon.pid()), installed.inode());
    assert_eq!(client.call_text(sum), r#"{"out":"sum","result":6}"#);
    // A program that lacks the methods: the old workers have them while they drain.
    installed.renew();
    upgrade(&daemon);
    wait_for("the methods of the new program", PATIENCE, || {
        daemon.client().call_text(sum).contains("method-not-found")
    });
}

/// A daemon between two programs, where neither of them can notice events. A script holds it, in a shell
/// that reaps no children, and waits for a line in a FIFO.
struct Between {
    installed: Installed,
    daemon: Daemon,
}

impl Between {
    fn of(builder: Builder) -> Self {
        let installed = Installed::new();
        let daemon = builder.program(installed.path()).config(CONFIG).start();
        mkfifo(&installed.file("go"), Mode::S_IRWXU).unwrap();
        installed.script(
            "if [ $when = exec ]; then : >$dir/between; read -r word <$dir/go; fi\nexec $good \"$@\"",
        );
        daemon.signal(Signal::SIGUSR2);
        wait_for("the exec", PATIENCE, || installed.file("between").exists());
        // The workers serve.
        let mut client = daemon.client();
        let pong = r#"{"out":"pong","result":null}"#;
        assert_eq!(client.call_text(r#"{"in":"ping"}"#), pong);
        Between { installed, daemon }
    }

    fn go_on(&self) {
        fs::write(self.installed.file("go"), "go\n").unwrap();
    }
}

#[test]
fn a_hup_and_a_death_during_the_exec_are_heard_after_it() {
    let between = Between::of(Daemon::builder().expect_log("ended by SIGKILL"));
    let daemon = &between.daemon;
    let workers = process::workers(daemon.pid());
    kill(Pid::from_raw(workers[0]), Signal::SIGKILL).unwrap();
    wait_for("a zombie", PATIENCE, || {
        process::state(workers[0]) == Some('Z')
    });
    daemon.signal(Signal::SIGHUP);
    between.go_on();
    wait_for("the upgrade and the reload", PATIENCE, || {
        let status = daemon.status();
        status["master"]["last_upgrade"]["ok"] == true && status["master"]["generation"] == 3
    });
    wait_for("all of them replaced", PATIENCE, || {
        let now = daemon.ready_workers();
        now.len() == 2 && now.iter().all(|pid| !workers.contains(pid))
    });
    let status = daemon.status();
    assert_eq!(status["deaths"][0]["pid"], workers[0], "{status}");
    assert_eq!(status["deaths"][0]["signal"], "SIGKILL");
    process::wait_for_no_zombies(daemon.pid());
}

#[test]
fn a_term_during_the_exec_is_obeyed_after_it() {
    // By an upgrade that has no result any more.
    let mut between = Between::of(Daemon::builder().expect_log("the server stops"));
    between.daemon.signal(Signal::SIGTERM);
    between.go_on();
    assert!(between.daemon.wait_exit().success());
    between.daemon.wait_group_gone();
    assert!(!between.daemon.dir().join("preforkd.pid").exists());
}

#[test]
fn an_upgrade_waits_for_a_reload_and_a_reload_for_an_upgrade() {
    let installed = Installed::new();
    let daemon = installed.daemon(CONFIG).start();
    installed.script("while [ ! -e $dir/go ]; do sleep 0.02; done; exec $good \"$@\"");
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| daemon.command(&["upgrade"]));
        daemon.wait_log("upgrade: probing");
        let reload = scope.spawn(|| daemon.command(&["reload"]));
        // Everything else continues meanwhile.
        assert!(daemon.command(&["scale", "3"]).status.success());
        wait_for("a third worker", Duration::from_secs(10), || {
            daemon.ready_workers().len() == 3
        });
        assert_eq!(daemon.status()["master"]["generation"], 1);
        fs::write(installed.file("go"), "").unwrap();
        for done in [upgrade.join().unwrap(), reload.join().unwrap()] {
            assert!(done.status.success(), "{done:?}");
        }
    });
    wait_for_children(&daemon, 2);
    assert_eq!(daemon.status()["master"]["last_reload"]["ok"], true);
}

/// Processes that a program starts in `on_master_start`, besides those that the end of a worker sweeps
/// away.
#[test]
fn children_of_the_new_programs_own_functions_are_no_orphans() {
    let installed = Installed::new();
    installed.put(&example("mistakes"));
    let daemon = installed
        .daemon("[workers]\ncount = 1\n")
        .env("MISTAKE", "helper")
        .before("export HELPERS=$TMPDIR/helpers")
        .expect_log("ended by SIGKILL")
        .start();
    let helpers = || -> Vec<i32> {
        let text = daemon.dir().read("helpers");
        text.lines().map(|line| line.parse().unwrap()).collect()
    };
    assert_eq!(helpers().len(), 1);
    for upgrades in 1..=2 {
        installed.put(&example("mistakes"));
        upgrade(&daemon);
        // The one of the probe is an orphan, and is killed with the leftovers of the old worker.
        let lost = helpers()[2 * upgrades - 1];
        wait_for("the orphan's end", PATIENCE, || !process::runs(lost));
    }
    // The helpers: one of the start, then for each of two upgrades one of the probe and one of the new program.
    let [first, lost, second, lost_again, third] = helpers()[..] else {
        panic!("{:?}", helpers());
    };
    let worker = daemon.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    wait_for("the orphans' end", PATIENCE, || {
        ![lost, lost_again].iter().any(|pid| process::runs(*pid))
            && daemon
                .ready_workers()
                .first()
                .is_some_and(|it| *it != worker)
    });
    for helper in [first, second, third] {
        assert!(process::runs(helper), "{helper} was taken for an orphan");
        assert_eq!(process::parent(helper), Some(daemon.pid()));
        // It receives the signal: signals are blocked across the exec, but not in these children.
        kill(Pid::from_raw(helper), Signal::SIGTERM).unwrap();
    }
}
