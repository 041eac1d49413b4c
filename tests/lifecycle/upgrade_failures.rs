//! Tests upgrades that fail in different ways: the old program continues to serve, no client loses a
//! call, the reason is reported, and the next upgrade works.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::lifecycle::upgrade::without_loss;
use crate::support::fault_library::Sabotage;
use crate::support::installed::{Installed, upgrade, wait_for_children, wait_kinds};
use crate::support::process::{executable, kinds};
use crate::support::{Builder, Client, Daemon, PATIENCE, binary, process, wait_for};

const CONFIG: &str = "[workers]\ncount = 2\nboot-timeout = \"4s\"\n";

/// Its workers wait for a program that never reports ready.
const TOO_SLOW: &str = "
[workers]
count = 2
boot-timeout = \"500ms\"
[pools.p]
processes = 1
command = [\"sleep\", \"60\"]
ready = \"message\"
[methods.m]
pool = \"p\"
";

/// The state that must be the same after a refused upgrade.
struct Before {
    workers: Vec<i32>,
    inode: u64,
    kinds: Vec<String>,
}

impl Before {
    fn of(daemon: &Daemon) -> Self {
        Before {
            workers: daemon.ready_workers(),
            inode: executable(daemon.pid()),
            kinds: kinds(daemon.pid()),
        }
    }

    #[track_caller]
    fn assert_same(&self, daemon: &Daemon, what: &str) {
        wait_for("the probe or the new workers gone", PATIENCE, || {
            process::workers(daemon.pid()).len() == self.workers.len()
        });
        assert_eq!(daemon.ready_workers(), self.workers, "{what}");
        assert_eq!(
            executable(daemon.pid()),
            self.inode,
            "{what}: the old binary runs"
        );
        wait_kinds(daemon.pid(), &self.kinds);
        let pid = format!("{}\n", daemon.pid());
        assert_eq!(daemon.dir().read("preforkd.pid"), pid, "{what}");
        process::wait_for_no_zombies(daemon.pid());
    }
}

/// Requests it with the command and returns its stderr; the command must exit with 1.
#[track_caller]
fn refused(daemon: &Daemon) -> String {
    let refused = daemon.command(&["upgrade"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}\n{}", daemon.log());
    said
}

/// Starts a daemon that will refuse upgrades, and whose other errors fail the test.
fn to_refuse(installed: &Installed) -> Daemon {
    let daemon = installed.daemon(CONFIG);
    daemon.expect_log("upgrade refused").start()
}

#[test]
fn what_can_not_take_over_is_found_by_the_probe_and_nothing_changes() {
    let installed = Installed::new();
    let daemon = to_refuse(&installed);
    let before = Before::of(&daemon);
    let whole = fs::read(binary()).unwrap();
    type Put<'a> = Box<dyn Fn(&Installed) + 'a>;
    let ways: Vec<(&str, &str, Put<'_>)> = vec![
        (
            "missing",
            "No such file",
            Box::new(|it| fs::remove_file(it.path()).unwrap()),
        ),
        (
            "/bin/false",
            "exit code 1",
            Box::new(|it| it.put(Path::new("/bin/false"))),
        ),
        (
            "/bin/true",
            "without a result",
            Box::new(|it| it.put(Path::new("/bin/true"))),
        ),
        (
            "killed in start",
            "SIGSEGV",
            Box::new(|it| it.script("kill -SEGV $$")),
        ),
        (
            "gives up",
            "no such model",
            Box::new(|it| it.script("echo no such model >&2; exit 3")),
        ),
        (
            "hangs",
            "boot-timeout",
            Box::new(|it| it.script("echo still thinking; exec sleep 1000")),
        ),
        (
            "truncated",
            // The kernel decides what happens then.
            "/preforkd",
            Box::new(|it| it.write(&whole[..5000], 0o755)),
        ),
        (
            "empty",
            "could not be started",
            Box::new(|it| it.write(b"", 0o755)),
        ),
        (
            "not executable",
            "Permission denied",
            Box::new(|it| it.write(&whole, 0o644)),
        ),
        (
            "one that knows of no upgrades",
            "holds the lock",
            Box::new(|it| it.script("unset PREFORKD_UPGRADE; exec $good \"$@\"")),
        ),
    ];
    without_loss(&daemon, &format!("{} ways to fail", ways.len()), |_| {
        for (number, (what, reason, put)) in ways.iter().enumerate() {
            put(&installed);
            let said = refused(&daemon);
            assert!(said.contains(reason), "{what}: {said}");
            before.assert_same(&daemon, what);
            // Also by signal: the log and the status have the reason, because no command waits for it.
            daemon.signal(Signal::SIGUSR2);
            wait_for("the refusal in the log", PATIENCE, || {
                let refusal = "upgrade refused, everything stays as it was";
                daemon.log().matches(refusal).count() == 2 * (number + 1)
            });
            before.assert_same(&daemon, what);
            let last = daemon.status()["master"]["last_upgrade"].take();
            assert_eq!(last["ok"], false);
            assert!(
                last["error"].as_str().unwrap().contains(reason),
                "{what}: {last}"
            );
        }
        installed.renew();
        upgrade(&daemon);
    });
    assert_ne!(executable(daemon.pid()), before.inode);
    wait_for_children(&daemon, 2);
    wait_kinds(daemon.pid(), &before.kinds);
}

#[test]
fn a_configuration_that_is_wrong_is_found_by_the_probe_too() {
    let installed = Installed::new();
    let daemon = to_refuse(&installed);
    let before = Before::of(&daemon);
    daemon.configure("color = 1\n");
    let said = refused(&daemon);
    assert!(said.contains("preforkd.toml:3:1: color"), "{said}");
    before.assert_same(&daemon, "a wrong key");
    assert!(
        !daemon.log().contains("upgrade: executing"),
        "{}",
        daemon.log()
    );
}

/// These pass the probe, because the probe binds nothing and starts no worker.
#[test]
fn what_fails_after_the_exec_goes_back_to_the_old_program() {
    let installed = Installed::new();
    let daemon = installed
        .daemon(CONFIG)
        .expect_log("reload refused")
        .expect_log("upgrade refused")
        .expect_log("within boot-timeout")
        .start();
    let before = Before::of(&daemon);
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let (own, taken) = (daemon.address(), held.local_addr().unwrap());
    let in_use =
        format!("{CONFIG}[[listen]]\naddress = \"{own}\"\n[[listen]]\naddress = \"{taken}\"\n");
    without_loss(&daemon, "errors after the exec", |some_calls| {
        for (number, (config, reason)) in [
            (in_use.as_str(), "another server"),
            (TOO_SLOW, "boot-timeout"),
            (in_use.as_str(), "another server"),
        ]
        .into_iter()
        .enumerate()
        {
            installed.renew();
            daemon.configure(config);
            let said = refused(&daemon);
            assert!(said.contains(reason), "{said}");
            let execs = daemon.log().matches("upgrade: executing").count();
            assert_eq!(execs, number + 1, "{}", daemon.log());
            before.assert_same(&daemon, reason);
            let status = daemon.status();
            assert_eq!(status["master"]["last_upgrade"]["ok"], false, "{status}");
            some_calls();
        }
        daemon.configure(CONFIG);
        upgrade(&daemon);
    });
    assert_ne!(executable(daemon.pid()), before.inode);
    wait_for_children(&daemon, 2);
    wait_kinds(daemon.pid(), &before.kinds);
    // READY=1 follows each RELOADING=1, because a service manager would wait for it.
    wait_for("the last word of it", PATIENCE, || {
        let told = daemon.notifications();
        let last = |what: &str| told.iter().rposition(|line| line == what);
        last("READY=1") > last("RELOADING=1")
    });
}

/// The file of the variables is gone by then.
#[test]
fn programs_keep_their_variables_on_the_way_back() {
    let installed = Installed::new();
    let secret = "[workers]\ncount = 1\nboot-timeout = \"4s\"\n[methods.secret]\n\
                  command = [\"printenv\", \"KEY\"]\nenvironment-file = \"secrets.env\"\noutput = \"line\"\n";
    let daemon = installed
        .daemon(secret)
        .file("secrets.env", "KEY=one\n")
        .expect_log("reload refused")
        .expect_log("upgrade refused")
        .expect_log("within boot-timeout")
        .expect_log("ended by SIG")
        .start();
    let asked = || daemon.client().call(&json!({"in": "secret"}))["result"].clone();
    assert_eq!(asked(), "one");
    let worker = daemon.ready_workers()[0];
    fs::remove_file(daemon.dir().join("secrets.env")).unwrap();
    installed.renew();
    daemon.configure(TOO_SLOW);
    let said = refused(&daemon);
    assert!(said.contains("boot-timeout"), "{said}");
    assert!(daemon.log().contains("rolling back to the old program"));
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    wait_for("another worker", PATIENCE, || {
        daemon.ready_workers().iter().any(|pid| *pid != worker)
    });
    assert_eq!(asked(), "one");
    for place in ["cmdline", "environ"] {
        let shown = fs::read(format!("/proc/{}/{place}", daemon.pid())).unwrap();
        assert!(!shown.windows(7).any(|text| text == b"KEY=one"), "{place}");
    }
}

/// A daemon whose new program is broken as a test orders.
fn sabotaged(installed: &Installed, sabotage: &Sabotage) -> Builder {
    installed
        .daemon(CONFIG)
        .env("LD_PRELOAD", sabotage.library())
        .env("SABOTAGE", sabotage.place())
        .expect_log("upgrade refused")
}

/// A daemon whose new program panics after the exec: it has a second thread, so the master cannot fork.
fn panicking(installed: &Installed, sabotage: &Sabotage) -> Daemon {
    sabotaged(installed, sabotage)
        .expect_log("panic at")
        .expect_log("reload refused")
        .start()
}

#[test]
fn a_second_thread_of_the_new_program_goes_back_to_the_old_one_without_a_panic() {
    let (installed, sabotage) = (Installed::new(), Sabotage::new());
    let daemon = sabotaged(&installed, &sabotage).start();
    let before = Before::of(&daemon);
    installed.renew();
    sabotage.order("main-thread", "");
    let said = refused(&daemon);
    assert!(said.contains("2 threads run in the master"), "{said}");
    before.assert_same(&daemon, "a thread");
    upgrade(&daemon);
}

#[test]
fn a_panic_of_the_new_program_goes_back_to_the_old_one() {
    let (installed, sabotage) = (Installed::new(), Sabotage::new());
    let daemon = panicking(&installed, &sabotage);
    let before = Before::of(&daemon);
    without_loss(&daemon, "panics after the exec", |some_calls| {
        for _ in 0..3 {
            installed.renew();
            sabotage.order("thread", "");
            let said = refused(&daemon);
            assert!(said.contains("panicked"), "{said}");
            before.assert_same(&daemon, "a panic");
            some_calls();
        }
        upgrade(&daemon);
    });
    wait_for_children(&daemon, 2);
    wait_kinds(daemon.pid(), &before.kinds);
}

/// A worker of the new program already serves.
#[test]
fn a_panic_on_the_way_goes_back_with_all_that_was_heard() {
    let (installed, sabotage) = (Installed::new(), Sabotage::new());
    let daemon = panicking(&installed, &sabotage);
    let before = Before::of(&daemon);
    without_loss(&daemon, "panics on the way", |some_calls| {
        // One more worker, which the new program had postponed.
        sabotage.order("fork", &(Signal::SIGTTIN as i32).to_string());
        installed.renew();
        let said = refused(&daemon);
        assert!(said.contains("panicked"), "{said}");
        wait_for("a third worker", PATIENCE, || {
            daemon.ready_workers().len() == 3
        });
        wait_for_children(&daemon, 3);
        assert_eq!(daemon.ready_workers()[..2], before.workers);
        assert_eq!(executable(daemon.pid()), before.inode);
        some_calls();
        // A reload, which the old program must do.
        sabotage.order("fork", &(Signal::SIGHUP as i32).to_string());
        let said = refused(&daemon);
        assert!(said.contains("panicked"), "{said}");
        wait_for("the reload", PATIENCE, || {
            let status = daemon.status();
            status["master"]["last_reload"]["ok"] == true && daemon.ready_workers().len() == 2
        });
        wait_for_children(&daemon, 2);
        assert_eq!(executable(daemon.pid()), before.inode);
    });
    wait_kinds(daemon.pid(), &before.kinds);
    process::wait_for_no_zombies(daemon.pid());
    assert_eq!(daemon.status()["deaths"].as_array().map(Vec::len), Some(0));
}

/// The signal arrives after the last check of the new program.
#[test]
fn what_comes_at_the_last_moment_is_heard_by_the_old_program() {
    let (installed, sabotage) = (Installed::new(), Sabotage::new());
    let daemon = sabotaged(&installed, &sabotage)
        .expect_log("within boot-timeout")
        .expect_log("reload refused")
        .start();
    let before = Before::of(&daemon);
    daemon.configure(TOO_SLOW);
    sabotage.order("memfd", &(Signal::SIGTTIN as i32).to_string());
    let said = refused(&daemon);
    assert!(said.contains("boot-timeout"), "{said}");
    assert!(!sabotage.did("memfd"), "it was raised");
    wait_for("a third worker", PATIENCE, || {
        daemon.ready_workers().len() == 3
    });
    assert_eq!(executable(daemon.pid()), before.inode);
    assert_eq!(daemon.ready_workers()[..2], before.workers);
}

/// Asserts that a second master with the same pid file does not start, and its message.
#[track_caller]
fn assert_locked(daemon: &Daemon) {
    let mut second = Command::new(binary());
    second.arg("run").arg("--config");
    second.arg(daemon.dir().join("preforkd.toml"));
    let second = second.env("TMPDIR", &**daemon.dir()).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(71), "{said}");
    assert!(said.contains("holds the lock"), "{said}");
}

#[test]
fn the_lock_is_held_all_the_way_back() {
    let (installed, sabotage) = (Installed::new(), Sabotage::new());
    let daemon = panicking(&installed, &sabotage);
    let before = Before::of(&daemon);
    for order in ["thread", "fork"] {
        sabotage.order(order, "");
        sabotage.order("hold", "");
        daemon.signal(Signal::SIGUSR2);
        wait_for("the way back", PATIENCE, || sabotage.did("held"));
        assert_locked(&daemon);
        sabotage.let_go();
        wait_for("the refusal", PATIENCE, || {
            daemon.status()["master"]["last_upgrade"]["ok"] == false
        });
        assert_locked(&daemon);
        before.assert_same(&daemon, order);
    }
}

#[test]
fn a_second_upgrade_while_one_runs_is_refused_and_disturbs_nothing() {
    let installed = Installed::new();
    let daemon = installed.daemon("[workers]\ncount = 2\n").start();
    installed.script("while [ ! -e $dir/go ]; do sleep 0.02; done; exec $good \"$@\"");
    without_loss(&daemon, "a second upgrade during one", |_| {
        std::thread::scope(|scope| {
            let first = scope.spawn(|| daemon.command(&["upgrade"]));
            daemon.wait_log("upgrade: probing");
            let said = refused(&daemon);
            assert!(said.contains("another upgrade is under way"), "{said}");
            for _ in 0..20 {
                daemon.signal(Signal::SIGUSR2);
            }
            daemon.wait_log("upgrade refused: another upgrade is under way");
            fs::write(installed.file("go"), "").unwrap();
            let first = first.join().unwrap();
            assert!(first.status.success(), "{first:?}");
        });
    });
    wait_for_children(&daemon, 2);
    assert_eq!(daemon.log().matches("upgrade: executing").count(), 1);
}

#[test]
fn a_stop_ends_an_upgrade_that_is_tried() {
    let installed = Installed::new();
    let mut daemon = installed.daemon("[workers]\ncount = 2\n").start();
    installed.script("echo $$ >$dir/probe; exec sleep 1000");
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| daemon.command(&["upgrade"]));
        wait_for("the probe", PATIENCE, || {
            !installed_probe(&installed).is_empty()
        });
        daemon.signal(Signal::SIGTERM);
        let refused = upgrade.join().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{said}");
        assert!(said.contains("the server stops"), "{said}");
    });
    assert!(daemon.wait_exit().success());
    daemon.wait_group_gone();
    let probe = installed_probe(&installed).trim().parse().unwrap();
    wait_for("the probe's end", PATIENCE, || !process::runs(probe));
}

fn installed_probe(installed: &Installed) -> String {
    fs::read_to_string(installed.file("probe")).unwrap_or_default()
}

/// An upgrade fails while a stop is scheduled, and the stop still comes. Only the program that got the order knows
/// its time.
#[test]
fn a_stop_that_is_to_come_ends_an_upgrade_that_is_tried_and_comes() {
    let installed = Installed::new();
    let mut daemon = installed.daemon("[workers]\ncount = 2\n").start();
    let before = executable(daemon.pid());
    installed.script("while [ ! -e $dir/go ]; do sleep 0.02; done; exec $good \"$@\"");
    let ask = |arguments: &[&str]| {
        let mut command = daemon.asking(arguments);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let upgrade = ask(&["upgrade"]);
    daemon.wait_log("upgrade: probing");
    let mut stop = ask(&["stop", "--after", "8s"]);
    daemon.wait_log("stop scheduled in 8 s");
    fs::write(installed.file("go"), "").unwrap();
    let refused = upgrade.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("the server stops in"), "{said}");
    assert_eq!(executable(daemon.pid()), before);
    // An upgrade that is requested now is refused too.
    let refused = daemon.command(&["upgrade"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let mut client = daemon.client();
    let pong = r#"{"out":"pong","result":null}"#;
    assert_eq!(client.call_text(r#"{"in":"ping"}"#), pong);
    assert!(stop.wait().unwrap().success());
    assert!(daemon.wait_exit().success());
    daemon.wait_group_gone();
    assert!(!daemon.log().contains("upgrade: executing"));
}

#[test]
fn killed_after_the_exec_it_is_a_killed_master() {
    let installed = Installed::new();
    let mut daemon = installed
        .daemon("[workers]\ncount = 2\n")
        .expect_log("the master has died")
        .start();
    let workers = daemon.ready_workers();
    installed.script(
        "if [ $when = exec ]; then touch $dir/between; exec sleep 1000; fi; exec $good \"$@\"",
    );
    daemon.signal(Signal::SIGUSR2);
    wait_for("the exec", PATIENCE, || installed.file("between").exists());
    // A program that hangs there is not noticed, because the workers serve.
    let mut client = daemon.client();
    assert_eq!(
        client.call_text(r#"{"in":"ping"}"#),
        r#"{"out":"pong","result":null}"#
    );
    daemon.signal(Signal::SIGKILL);
    daemon.wait_exit();
    wait_for("the workers gone", PATIENCE, || {
        workers.iter().all(|pid| !process::runs(*pid))
    });
    daemon.wait_group_gone();
    client.assert_closed();
    installed.renew();
    let daemon = daemon.start_again();
    assert_eq!(daemon.ready_workers().len(), 2);
    drop(Client::connect(daemon.address()));
}

#[test]
fn a_probe_does_not_outlive_a_master_that_is_killed() {
    let installed = Installed::new();
    let mut daemon = installed
        .daemon("[workers]\ncount = 2\n")
        .expect_log("the master has died")
        .start();
    installed.script("echo $$ >$dir/probe; exec sleep 1000");
    daemon.signal(Signal::SIGUSR2);
    wait_for("the probe", PATIENCE, || {
        !installed_probe(&installed).is_empty()
    });
    let probe: i32 = installed_probe(&installed).trim().parse().unwrap();
    kill(Pid::from_raw(daemon.pid()), Signal::SIGKILL).unwrap();
    daemon.wait_exit();
    wait_for("the probe's end", PATIENCE, || !process::runs(probe));
}
