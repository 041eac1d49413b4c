//! Tests that a call that crashes its worker runs three times and not a fourth time.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{Client, Daemon, PATIENCE, example, process, wait_for};

fn daemon(ends_by: &str) -> Daemon {
    Daemon::builder()
        .program(example("misbehave"))
        .config("[workers]\ncount = 1\nthreads = 3\nrespawn-max-delay = \"0s\"\n")
        .expect_log(ends_by)
        .start()
}

/// Returns whether a crashed call had begun.
#[track_caller]
fn began(answer: &Value) -> bool {
    assert_eq!(answer["result"]["name"], "crashed", "{answer}");
    answer["result"]["started"].as_bool().unwrap()
}

fn quarantine(daemon: &Daemon) -> Vec<Value> {
    daemon.status()["quarantine"].as_array().unwrap().clone()
}

/// Waits until `count` deaths are counted, because a caller may be faster.
fn wait_deaths(daemon: &Daemon, count: usize) {
    wait_for("the death counted", PATIENCE, || {
        let deaths = daemon.status()["deaths"].as_array().unwrap().len();
        // The dead worker's keeper is reaped too.
        let children = process::children(daemon.pid()).len();
        deaths == count && children == 2 && daemon.ready_workers().len() == 1
    });
}

#[test]
fn a_call_that_ends_its_worker_three_times_is_refused_until_the_next_reload() {
    let daemon = daemon("ended by SIG");
    let mut client = daemon.client();
    let calls = [
        json!({"in": "crash", "params": "abort"}),
        json!({"in": "crash", "params": "fill the stack"}),
        json!({"in": "crash-inline", "id": 7}),
    ];
    for (number, call) in calls.iter().enumerate() {
        for run in 1..=3 {
            assert!(began(&client.call(call)), "run {run} of {call}");
            wait_deaths(&daemon, number * 3 + run);
        }
        assert!(!began(&client.call(call)), "{call}");
    }
    assert!(!began(&client.call(&calls[0])));
    let held = quarantine(&daemon);
    let shown: Vec<_> = held
        .iter()
        .map(|call| (call["method"].as_str().unwrap(), call["refused"].as_u64()))
        .collect();
    assert_eq!(
        shown,
        [
            ("crash", Some(2)),
            ("crash", Some(1)),
            ("crash-inline", Some(1))
        ]
    );
    daemon.wait_log("it is refused until the next reload");
    let page = String::from_utf8(daemon.command(&["status"]).stdout).unwrap();
    assert!(page.contains("In quarantine"), "{page}");
    // Other params of the same method are another call.
    let other = client.call(&json!({"in": "crash", "params": 5}));
    assert_eq!(other["result"]["name"], "invalid-params");
    assert!(daemon.command(&["reload"]).status.success());
    assert_eq!(quarantine(&daemon), Vec::<Value>::new());
    assert!(began(&client.call(&calls[0])), "it runs again");
}

#[test]
fn a_call_that_only_ran_beside_an_abort_is_not_refused() {
    a_call_beside_is_not_refused("abort");
}

#[test]
fn a_call_that_only_ran_beside_a_fault_of_the_processor_is_not_refused() {
    a_call_beside_is_not_refused("fill the stack");
}

fn a_call_beside_is_not_refused(how: &str) {
    let daemon = daemon("ended by SIG");
    let (mut client, mut beside) = (daemon.client(), daemon.client());
    let long = json!({"in": "wait", "params": 60_000}).to_string();
    let crash = json!({"in": "crash", "params": how});
    for deaths in 1..=3 {
        beside.send(&long);
        daemon.wait_running(1);
        assert!(began(&client.call(&crash)));
        assert!(began(&beside.recv_json()));
        wait_deaths(&daemon, deaths);
    }
    assert!(!began(&client.call(&crash)));
    let held = quarantine(&daemon);
    assert_eq!(held.len(), 1, "{held:?}");
    beside.send(&long);
    daemon.wait_running(1);
    kill(Pid::from_raw(daemon.ready_workers()[0]), Signal::SIGSEGV).unwrap();
    assert!(began(&beside.recv_json()));
}

/// Kills the worker while a call runs.
fn kill_running(daemon: &Daemon, client: &mut Client, call: &Value, signal: Signal, deaths: usize) {
    client.send(&call.to_string());
    kill(Pid::from_raw(daemon.wait_running(1)), signal).unwrap();
    assert!(began(&client.recv_json()));
    wait_deaths(daemon, deaths);
}

#[test]
fn nobody_is_blamed_for_a_signal_from_outside() {
    for signal in [Signal::SIGSEGV, Signal::SIGKILL] {
        let daemon = daemon(&format!("ended by {signal}"));
        let mut client = daemon.client();
        let long = json!({"in": "wait", "params": 60_000});
        for deaths in 1..=4 {
            kill_running(&daemon, &mut client, &long, signal, deaths);
        }
        assert_eq!(quarantine(&daemon), Vec::<Value>::new());
    }
}

/// A handler that calls exit(3) is identified, and concurrent calls are not suspected.
#[test]
fn a_call_that_exits_is_the_only_one_that_is_refused() {
    let daemon = daemon("exit code 3");
    let (mut client, mut beside) = (daemon.client(), daemon.client());
    let some = json!({"in": "wait", "params": 4000});
    let exit = json!({"in": "exit", "params": [3, 0]});
    for deaths in 1..=3 {
        client.send(&some.to_string());
        daemon.wait_running(1);
        assert!(began(&beside.call(&exit)));
        assert!(began(&client.recv_json()));
        wait_deaths(&daemon, deaths);
    }
    assert_eq!(quarantine(&daemon).len(), 1);
    assert!(!began(&beside.call(&exit)));
    assert_eq!(client.call(&some)["result"], 4000);
}

/// If a thread that a handler has started calls exit, no call is identified as the cause.
#[test]
fn without_evidence_only_a_call_that_ran_alone_is_counted() {
    let daemon = daemon("exit code 3");
    let (mut client, mut beside) = (daemon.client(), daemon.client());
    let long = json!({"in": "wait", "params": 60_000});
    let alone = json!({"in": "exit-from-thread", "params": [3, 0]});
    let in_batch =
        json!({"jsonrpc": "2.0", "id": 1, "method": "exit-from-thread", "params": [3, 0]});
    for deaths in 1..=6 {
        client.send(&long.to_string());
        daemon.wait_running(1);
        if deaths % 2 == 0 {
            assert!(began(&beside.call(&alone)));
        } else {
            // The calls of a batch have no key, and its connection is reset.
            beside.send(&json!([in_batch]).to_string());
        }
        assert!(began(&client.recv_json()));
        wait_deaths(&daemon, deaths);
        beside = daemon.client();
    }
    assert_eq!(quarantine(&daemon), Vec::<Value>::new());
    for deaths in 7..=9 {
        assert!(began(&client.call(&alone)));
        wait_deaths(&daemon, deaths);
    }
    assert_eq!(quarantine(&daemon).len(), 1);
    assert!(!began(&client.call(&alone)));
}

#[test]
fn for_a_stuck_event_loop_only_the_call_that_it_runs_is_counted() {
    let daemon = Daemon::builder()
        .program(example("misbehave"))
        .config(
            "[workers]\ncount = 1\nthreads = 3\nrespawn-max-delay = \"0s\"\nheartbeat-timeout = \"1s\"\n",
        )
        .expect_log("event loop stuck")
        .expect_log("ended by SIGABRT")
        .start();
    let (mut client, mut beside) = (daemon.client(), daemon.client());
    let long = json!({"in": "wait", "params": 2_000});
    let block = json!({"in": "block", "params": 60});
    for deaths in 1..=3 {
        beside.send(&long.to_string());
        daemon.wait_running(1);
        assert!(began(&client.call(&block)));
        assert!(began(&beside.recv_json()));
        wait_deaths(&daemon, deaths);
    }
    let held = quarantine(&daemon);
    assert_eq!(held.len(), 1, "{held:?}");
    assert_eq!(held[0]["method"], "block");
    assert!(!began(&client.call(&block)));
    beside.send(&long.to_string());
    daemon.wait_running(1);
}

/// A cgroup of processes with a memory limit; removed when dropped.
struct Squeeze(PathBuf);

impl Squeeze {
    fn of(bytes: u64) -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let version_1 = own.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let path = rest.strip_prefix("memory:/")?;
            let own = Path::new("/sys/fs/cgroup/memory").join(path);
            Some((own, "memory.limit_in_bytes"))
        });
        let version_2 = (PathBuf::from("/sys/fs/cgroup"), "memory.max");
        let (above, limit) = version_1.unwrap_or(version_2);
        let group = above.join(format!("preforkd-squeeze-{}", std::process::id()));
        fs::create_dir(&group).unwrap();
        fs::write(group.join(limit), bytes.to_string()).unwrap();
        // Otherwise the kernel would swap.
        let _ = fs::write(group.join("memory.swap.max"), "0");
        Squeeze(group)
    }
}

impl Drop for Squeeze {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
#[ignore = "needs root and a cgroup with a limit on memory; tests/run runs it"]
fn a_call_that_takes_all_memory_each_time_is_caught() {
    let squeeze = Squeeze::of(96 << 20);
    let group = squeeze.0.join("cgroup.procs");
    let daemon = Daemon::builder()
        .program(example("misbehave"))
        .config("[workers]\ncount = 1\nthreads = 3\nrespawn-max-delay = \"0s\"\n")
        .before(&format!("echo $$ >{}", group.display()))
        .expect_log("ended by SIGKILL")
        .start();
    let mut client = daemon.client();
    let hog = json!({"in": "leak", "params": 1_u64 << 30});
    for deaths in 1..=3 {
        assert!(began(&client.call(&hog)), "death {deaths}");
        wait_deaths(&daemon, deaths);
    }
    assert!(!began(&client.call(&hog)));
    let held = quarantine(&daemon);
    assert_eq!(held.len(), 1);
    assert_eq!(held[0]["method"], "leak");
}
