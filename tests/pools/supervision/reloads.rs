//! Reloads at which a pool process stays: its programs are replaced one by one, or kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;
use crate::support::load::{Load, Plan, Shape};
use crate::support::wire::Dialect;

/// Another pool, whose name comes first, and a method before all others: the numbers of pools and methods
/// differ from those without them.
fn shifted(config: &str, program: &Path) -> String {
    let program = program.to_str().unwrap();
    format!(
        "{config}[pools.a]\nprocesses = 1\ncommand = [\"python3\", {program:?}, \"ready\"]\n[methods.aa]\npool = \
         \"a\"\n[methods.a]\nbuiltin = \"ping\"\n"
    )
}

fn configured(program: &Path, mode: &str, pool: &str) -> String {
    config(program, mode, "", &format!("ready = \"message\"\n{pool}"))
}

/// What `status` shows of the pool `p` in the newest generation.
fn shown(daemon: &Daemon) -> Value {
    let status = daemon.status();
    let pools = status["pools"].as_array().unwrap().iter();
    let pool = pools
        .filter(|pool| pool["name"] == "p")
        .max_by_key(|pool| pool["generation"].as_u64());
    pool.unwrap_or_else(|| panic!("{status}")).clone()
}

fn pool_pid(daemon: &Daemon) -> i32 {
    shown(daemon)["pid"].as_i64().unwrap() as i32
}

/// Waits until a pool process has this number of programs, none of which was there `before`.
#[track_caller]
fn wait_for_fresh(pool: i32, count: usize, before: &[i32]) -> Vec<i32> {
    wait_for("fresh programs", PATIENCE, || {
        let programs = process::children(pool);
        programs.len() == count && programs.iter().all(|pid| !before.contains(pid))
    });
    process::children(pool)
}

/// Counts the programs of a pool process all the time.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<usize>,
}

impl Watch {
    fn start(pool: i32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut most = 0;
            while !stopped.load(Ordering::Relaxed) {
                most = most.max(process::children(pool).len());
            }
            most
        });
        Watch { stop, thread }
    }

    /// The most that there were at any time.
    fn most(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn load(daemon: &Daemon) -> Load {
    Load::of(Plan {
        address: daemon.address(),
        clients: 12,
        shape: Shape::Lasting,
        dialect: Dialect::Frame,
        pause: Duration::ZERO,
        methods: &["echo"],
    })
}

#[test]
fn a_rolling_reload_under_full_load_loses_no_call_and_has_one_program_more() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let with = |processes: usize| {
        let pool = format!("reload = \"rolling\"\nprocesses = {processes}");
        configured(&program, "ready", &pool)
    };
    let daemon = Daemon::builder().config(&with(3)).start();
    let pool = pool_pid(&daemon);
    let mut programs = process::children(pool);
    let load = load(&daemon);
    let mut before = 3;
    for (round, count) in [3, 3, 5, 2].into_iter().enumerate() {
        let config = match round % 2 {
            0 => shifted(&with(count), &program),
            _ => with(count),
        };
        let watch = Watch::start(pool);
        daemon.reload_with(&config);
        programs = wait_for_fresh(pool, count, &programs);
        let most = watch.most();
        assert!(most <= before.max(count) + 1, "{most} programs");
        before = count;
    }
    wait_for("calls to all programs", PATIENCE, || {
        let shown = shown(&daemon);
        let list = shown["list"].as_array().unwrap();
        list.len() == 2 && list.iter().all(|it| it["calls"].as_u64() > Some(0))
    });
    load.stop().assert_whole("four rolling reloads");
    let shown = shown(&daemon);
    assert_eq!(shown["pid"], pool, "{shown}");
    assert_eq!(
        (&shown["generation"], &shown["programs"]),
        (&json!(5), &json!(2))
    );
    assert_eq!(shown["down"], 0, "{shown}");
}

#[test]
fn a_call_of_the_generation_before_ends_well_at_a_rolling_reload() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let config = configured(&program, "ready", "reload = \"rolling\"\nprocesses = 2");
    let daemon = Daemon::builder().config(&config).start();
    let pool = pool_pid(&daemon);
    let before = process::children(pool);
    let mut clients: Vec<Client> = (0..2).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.send(r#"{"in": "nap", "params": 2}"#);
    }
    daemon.wait_busy(2);
    daemon.reload_with(&shifted(&config, &program));
    // The fresh program serves while the old ones finish.
    assert_eq!(result(&mut daemon.client(), "echo", &json!(1)), 1);
    for client in &mut clients {
        assert_eq!(client.recv_json()["result"], 2);
        assert_eq!(result(client, "echo", &json!(3)), 3);
    }
    wait_for_fresh(pool, 2, &before);
}

#[test]
fn a_rolling_reload_whose_first_program_cannot_start_changes_nothing() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let pool = "reload = \"rolling\"\nprocesses = 2";
    let good = configured(&program, "ready", pool);
    let daemon = Daemon::builder()
        .config(&good)
        .expect_log("before it was ready")
        .expect_log("can't open file")
        .expect_log("within boot-timeout (300ms)")
        .start();
    let before = (pool_pid(&daemon), process::children(pool_pid(&daemon)));
    let missing = configured(&dir.join("missing.py"), "ready", pool);
    let said = daemon.refused_reload(&missing);
    assert!(
        said.contains("the program of the pool p has exited with exit code 2 before it was ready"),
        "{said}"
    );
    assert!(
        said.contains("\n  it wrote: ") && said.contains("can't open file"),
        "{said}"
    );
    wait_for("the end of what was tried", PATIENCE, || {
        process::children(before.0).len() == 2
    });
    assert_eq!((pool_pid(&daemon), process::children(before.0)), before);
    assert_eq!(shown(&daemon)["generation"], 1);
    let silent = configured(&program, "", &format!("{pool}\nboot-timeout = \"300ms\""));
    let said = daemon.refused_reload(&silent);
    assert!(said.contains("within boot-timeout (300ms)"), "{said}");
    assert_eq!(result(&mut daemon.client(), "echo", &json!(1)), 1);
    daemon.reload_with(&good);
    wait_for_fresh(before.0, 2, &before.1);
}

#[test]
fn a_pool_that_is_kept_has_the_same_programs_after_a_reload() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let keep = configured(&program, "ready", "reload = \"keep\"\nprocesses = 2");
    let daemon = Daemon::builder().config(&keep).start();
    let pool = pool_pid(&daemon);
    let programs = process::children(pool);
    let load = load(&daemon);
    let longer = keep.replace("timeout = \"5s\"", "timeout = \"6s\"");
    for config in [&shifted(&keep, &program), &keep, &longer] {
        daemon.reload_with(config);
        assert_eq!(result(&mut daemon.client(), "echo", &json!(1)), 1);
        assert_eq!(
            (pool_pid(&daemon), process::children(pool)),
            (pool, programs.clone())
        );
    }
    assert_eq!(shown(&daemon)["generation"], 4);
    load.stop().assert_whole("three reloads that keep a pool");
}

#[test]
fn a_pool_that_is_kept_is_replaced_if_its_table_has_changed() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let keep = configured(&program, "ready", "reload = \"keep\"\nprocesses = 2");
    let daemon = Daemon::builder().config(&keep).start();
    let mut pool = pool_pid(&daemon);
    let load = load(&daemon);
    let with = |line: &str| keep.replace("processes = 2", &format!("processes = 2\n{line}"));
    for config in [
        &with("environment = { A = \"1\" }"),
        &with("environment = { A = \"2\" }"),
        &with("max-calls = 1000000"),
        &keep.replace("\"keep\"", "\"replace\""),
    ] {
        daemon.reload_with(config);
        let now = pool_pid(&daemon);
        assert_ne!(now, pool, "{config}");
        pool = now;
    }
    load.stop().assert_whole("four reloads with another table");
}

#[test]
fn a_kill_of_the_pool_process_during_a_rolling_reload_ends_well() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let rolling = "reload = \"rolling\"\nprocesses = 2";
    let config = configured(&program, "ready", rolling);
    let daemon = Daemon::builder()
        .config(&config)
        .expect_log("ended by SIGKILL")
        .start();
    let first = pool_pid(&daemon);
    // The first fresh program is not ready yet: the reload fails.
    daemon.configure(&configured(&program, "slow", rolling));
    let mut asking = daemon.asking(&["reload"]).spawn().unwrap();
    wait_for("the first program", PATIENCE, || {
        process::children(first).len() == 3
    });
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    assert!(!asking.wait().unwrap().success());
    wait_for("another pool process", PATIENCE, || {
        let shown = shown(&daemon);
        shown["state"] == "ready" && shown["pid"] != first
    });
    assert_eq!(shown(&daemon)["generation"], 1);
    assert_eq!(result(&mut daemon.client(), "echo", &json!(1)), 1);
    // The reload has succeeded: the next pool process serves workers of both generations.
    let mut old = daemon.client();
    old.send(r#"{"in": "nap", "params": 1}"#);
    daemon.wait_busy(1);
    let second = pool_pid(&daemon);
    daemon.reload_with(&shifted(&config, &program));
    kill(Pid::from_raw(second), Signal::SIGKILL).unwrap();
    assert_eq!(old.recv_json()["result"]["name"], "crashed");
    assert_eq!(result(&mut old, "echo", &json!(2)), 2);
    assert_eq!(result(&mut daemon.client(), "echo", &json!(3)), 3);
    assert_eq!(shown(&daemon)["generation"], 3);
}
