//! Upgrades that can't be, each in its way: the old program serves on, nobody loses a call, the
//! reason is told, and the next upgrade works.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Client, Daemon, Dir, PATIENCE, binary, process, source, wait_for};
use crate::upgrade::{Installed, inode_of, kinds, upgrade, wait_for_children, without_loss};

const CONFIG: &str = "[workers]\ncount = 2\nboot-timeout = \"4s\"\n";

/// What has to be the same after an upgrade that was refused.
struct Before {
    workers: Vec<i32>,
    inode: u64,
    kinds: Vec<String>,
}

impl Before {
    fn of(daemon: &Daemon) -> Self {
        Before {
            workers: daemon.ready_workers(),
            inode: inode_of(daemon.pid()),
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
            inode_of(daemon.pid()),
            self.inode,
            "{what}: the old binary runs"
        );
        assert_eq!(kinds(daemon.pid()), self.kinds, "{what}");
        let pid = format!("{}\n", daemon.pid());
        assert_eq!(daemon.dir().read("preforkd.pid"), pid, "{what}");
        assert!(process::zombies(daemon.pid()).is_empty(), "{what}");
    }
}

/// Asks for it by the command, and gives what that says on stderr; it must end with 1.
#[track_caller]
fn refused(daemon: &Daemon) -> String {
    let refused = daemon.command(&["upgrade"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}\n{}", daemon.log());
    said
}

#[test]
fn what_can_not_take_over_is_found_by_the_probe_and_nothing_changes() {
    let installed = Installed::new();
    let daemon = Daemon::builder()
        .program(installed.path())
        .config(CONFIG)
        .expect_log("upgrade refused")
        .start();
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
            "without a word",
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
            // what comes of that is the kernel's affair
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
            // by signal as well, which nobody waits for: the log has it, and the status
            daemon.signal(Signal::SIGUSR2);
            wait_for("the refusal in the log", PATIENCE, || {
                daemon.log().matches("upgrade refused").count() == 2 * (number + 1)
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
    assert_ne!(inode_of(daemon.pid()), before.inode);
    wait_for_children(&daemon, 2);
    assert_eq!(kinds(daemon.pid()), before.kinds);
}

#[test]
fn a_configuration_that_is_wrong_is_found_by_the_probe_too() {
    let installed = Installed::new();
    let daemon = Daemon::builder()
        .program(installed.path())
        .config(CONFIG)
        .expect_log("upgrade refused")
        .start();
    let before = Before::of(&daemon);
    daemon.configure("color = 1\n");
    let said = refused(&daemon);
    assert!(said.contains("preforkd.toml:3:1: color"), "{said}");
    before.assert_same(&daemon, "a wrong key");
    assert!(
        !daemon.log().contains("upgrade: becomes"),
        "{}",
        daemon.log()
    );
}

/// These pass the probe, for nothing is bound and no worker started there.
#[test]
fn what_fails_after_the_exec_goes_back_to_the_old_program() {
    let installed = Installed::new();
    let daemon = Daemon::builder()
        .program(installed.path())
        .config(CONFIG)
        .expect_log("reload refused")
        .expect_log("upgrade refused")
        .expect_log("not ready within boot-timeout")
        .start();
    let before = Before::of(&daemon);
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let (own, taken) = (daemon.address(), held.local_addr().unwrap());
    let in_use =
        format!("{CONFIG}[[listen]]\naddress = \"{own}\"\n[[listen]]\naddress = \"{taken}\"\n");
    let too_slow = "[workers]\ncount = 2\nthreads = 1000\nboot-timeout = \"1ms\"\n";
    without_loss(&daemon, "errors after the exec", |some_calls| {
        for (number, (config, reason)) in [
            (in_use.as_str(), "another server"),
            (too_slow, "boot-timeout"),
            (in_use.as_str(), "another server"),
        ]
        .into_iter()
        .enumerate()
        {
            installed.renew();
            daemon.configure(config);
            let said = refused(&daemon);
            assert!(said.contains(reason), "{said}");
            let execs = daemon.log().matches("upgrade: becomes").count();
            assert_eq!(execs, number + 1, "{}", daemon.log());
            before.assert_same(&daemon, reason);
            let status = daemon.status();
            assert_eq!(status["master"]["last_upgrade"]["ok"], false, "{status}");
            some_calls();
        }
        daemon.configure(CONFIG);
        upgrade(&daemon);
    });
    assert_ne!(inode_of(daemon.pid()), before.inode);
    wait_for_children(&daemon, 2);
    assert_eq!(kinds(daemon.pid()), before.kinds);
    // READY=1 follows each RELOADING=1: a service manager would wait for it
    let told = daemon.notifications();
    let last = |what: &str| told.iter().rposition(|line| line == what);
    assert!(last("READY=1") > last("RELOADING=1"), "{told:?}");
}

/// A library that is loaded into the new program starts a thread there. A master that has two
/// does not fork: it panics.
#[test]
fn a_panic_of_the_new_program_goes_back_to_the_old_one() {
    const THREAD: &str = r#"
        #[used]
        #[unsafe(link_section = ".init_array")]
        static START: extern "C" fn() = start;
        extern "C" fn start() {
            let wanted = std::env::var("STRAY_THREAD").unwrap_or_default();
            let upgrade = std::env::var("PREFORKD_UPGRADE").unwrap_or_default();
            if upgrade.starts_with("exec") && std::fs::remove_file(wanted).is_ok() {
                std::thread::spawn(|| loop { std::thread::park() });
            }
        }"#;
    let dir = Dir::new();
    let (code, library) = (dir.write("thread.rs", THREAD), dir.join("thread.so"));
    let mut compiler = Command::new("rustc");
    compiler.args(["--edition=2024", "--crate-type=cdylib", "-Cpanic=abort"]);
    compiler
        .arg("-o")
        .arg(&library)
        .arg(code)
        .current_dir(source());
    let compiled = compiler.output().expect("rustc is where cargo is");
    assert!(compiled.status.success(), "{compiled:?}");

    let installed = Installed::new();
    let daemon = Daemon::builder()
        .program(installed.path())
        .config(CONFIG)
        .env("LD_PRELOAD", &library)
        .env("STRAY_THREAD", dir.join("wanted"))
        .expect_log("panic at")
        .expect_log("upgrade refused")
        .start();
    let before = Before::of(&daemon);
    without_loss(&daemon, "panics after the exec", |some_calls| {
        for _ in 0..3 {
            installed.renew();
            dir.write("wanted", "");
            let said = refused(&daemon);
            assert!(said.contains("panicked"), "{said}");
            before.assert_same(&daemon, "a panic");
            some_calls();
        }
        upgrade(&daemon);
    });
    wait_for_children(&daemon, 2);
    assert_eq!(kinds(daemon.pid()), before.kinds);
}

#[test]
fn a_second_upgrade_while_one_runs_is_refused_and_disturbs_nothing() {
    let installed = Installed::new();
    let daemon = Daemon::builder()
        .program(installed.path())
        .config("[workers]\ncount = 2\n")
        .start();
    installed.script("while [ ! -e $dir/go ]; do sleep 0.02; done; exec $good \"$@\"");
    without_loss(&daemon, "a second upgrade during one", |_| {
        std::thread::scope(|scope| {
            let first = scope.spawn(|| daemon.command(&["upgrade"]));
            daemon.wait_log("upgrade: tries");
            let said = refused(&daemon);
            assert!(said.contains("another one is under way"), "{said}");
            for _ in 0..20 {
                daemon.signal(Signal::SIGUSR2);
            }
            daemon.wait_log("upgrade refused: another one is under way");
            fs::write(installed.file("go"), "").unwrap();
            let first = first.join().unwrap();
            assert!(first.status.success(), "{first:?}");
        });
    });
    wait_for_children(&daemon, 2);
    assert_eq!(daemon.log().matches("upgrade: becomes").count(), 1);
}

#[test]
fn a_stop_ends_an_upgrade_that_is_tried() {
    let installed = Installed::new();
    let mut daemon = Daemon::builder()
        .program(installed.path())
        .config("[workers]\ncount = 2\n")
        .start();
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

#[test]
fn killed_after_the_exec_it_is_a_killed_master() {
    let installed = Installed::new();
    let mut daemon = Daemon::builder()
        .program(installed.path())
        .config("[workers]\ncount = 2\n")
        .expect_log("the master has died")
        .start();
    let workers = daemon.ready_workers();
    installed.script(
        "if [ $when = exec ]; then touch $dir/between; exec sleep 1000; fi; exec $good \"$@\"",
    );
    daemon.signal(Signal::SIGUSR2);
    wait_for("the exec", PATIENCE, || installed.file("between").exists());
    // a program that hangs there is noticed by nobody: the workers serve
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
    let mut daemon = Daemon::builder()
        .program(installed.path())
        .config("[workers]\ncount = 2\n")
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
