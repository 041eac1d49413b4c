//! Tests failing system calls: with any call at any time the daemon continues to serve, or exits with a
//! reason. It never hangs and never sends a wrong answer.
//!
//! strace makes them fail (`-e inject`), the k-th call of each process. Start, calls, reload and stop are
//! one cycle. Some of each kind are tested, or all up to the highest k of `PREFORKD_INJECTIONS`.

use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::load::{Load, Shape};
use crate::support::{Daemon, Dir, PATIENCE, alone, from_environment, pass, wait_for};

/// What fails, how, and in how many different places at least.
const FAILURES: [(&str, &[&str], u64); 30] = [
    ("accept4", &["EMFILE", "ECONNABORTED", "EINTR"], 2),
    ("recvfrom", &["ECONNRESET", "ENOMEM", "EINTR"], 2),
    ("recvmsg", &["ENOMEM", "EINTR"], 2),
    ("sendto", &["ENOBUFS", "EPIPE", "EINTR"], 2),
    ("sendmsg", &["ENOBUFS", "EINTR"], 4),
    ("read", &["EIO", "EINTR"], 3),
    ("write", &["ENOSPC", "EINTR"], 2),
    ("epoll_ctl", &["ENOMEM"], 8),
    ("epoll_wait", &["EINTR"], 2),
    ("epoll_create1", &["EMFILE"], 1),
    ("eventfd2", &["EMFILE"], 1),
    ("clone", &["EAGAIN"], 3),
    ("clone3", &["EAGAIN"], 3),
    ("pipe2", &["EMFILE"], 3),
    ("socketpair", &["EMFILE"], 6),
    ("openat", &["EMFILE", "EIO"], 8),
    ("poll", &["EINTR", "ENOMEM"], 3),
    ("wait4", &["EINTR"], 2),
    ("waitid", &["EINTR"], 1),
    ("fcntl", &["EMFILE"], 6),
    ("flock", &["EINTR", "ENOLCK"], 1),
    ("renameat2", &["EINVAL"], 1),
    ("ftruncate", &["ENOSPC"], 1),
    ("listen", &["EADDRINUSE"], 1),
    ("prctl", &["EINVAL"], 3),
    ("close_range", &["ENOSYS"], 2),
    ("memfd_create", &["EMFILE"], 1),
    ("landlock_create_ruleset", &["ENOSYS", "EMFILE"], 3),
    ("landlock_add_rule", &["ENOMEM"], 1),
    ("landlock_restrict_self", &["E2BIG"], 2),
];

const CONFIG: &str = "
[workers]
count = 2
threads = 2
[methods.echo]
builtin = \"echo\"
[methods.cat]
command = [\"cat\"]
output = \"json\"
";

/// What fails while an observer and a pool start beside the workers.
const FAILURES_BESIDE: [(&str, &str, u64); 5] = [
    ("socketpair", "EMFILE", 8),
    ("memfd_create", "EMFILE", 6),
    ("clone", "EAGAIN", 6),
    ("clone3", "EAGAIN", 4),
    ("ftruncate", "ENOSPC", 4),
];

const BESIDE: &str = "
[workers]
count = 1
threads = 1
[observe]
address = \"127.0.0.1:0\"
[methods.echo]
builtin = \"echo\"
[methods.cat]
command = [\"cat\"]
output = \"json\"
[pools.idle]
processes = 1
command = [\"sleep\", \"1000\"]
ready = \"alive\"
[methods.idle]
pool = \"idle\"
";

/// The longest time for any step.
const MOST: Duration = Duration::from_secs(10);

/// Returns the command line in front of a daemon whose system calls fail in these ways.
fn injected(failures: &[(&str, &str)]) -> Vec<String> {
    let calls: Vec<&str> = failures.iter().map(|(calls, _)| *calls).collect();
    let words = ["strace", "-DD", "-f", "-qq", "-o", "/dev/null"];
    let mut words: Vec<String> = words.map(str::to_owned).to_vec();
    words.extend(["-e".to_owned(), format!("trace={}", calls.join(","))]);
    for (calls, fault) in failures {
        words.extend(["-e".to_owned(), format!("inject={calls}:{fault}")]);
    }
    words
}

/// The results of calls: correct answers, errors, connections that ended.
#[derive(Debug, Default, Clone, Copy)]
struct Outcome {
    right: usize,
    refused: usize,
    ended: usize,
}

/// Makes some calls on some connections. A wrong or missing answer is a failure.
fn call(daemon: &Daemon, outcome: &mut Outcome) -> Result<(), String> {
    for number in 0..5 {
        let Ok(mut client) = daemon.try_client() else {
            outcome.ended += 1;
            continue;
        };
        let _ = client.stream().set_read_timeout(Some(MOST));
        for method in ["ping", "echo", "cat"] {
            let params = format!("{method} {number}");
            let call = json!({"in": method, "params": params, "id": number}).to_string();
            let answer = client.try_send(&call).and_then(|()| client.recv());
            let answer: Value = match answer {
                Ok(body) => serde_json::from_slice(&body).unwrap_or_default(),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return Err(format!("{call}: no answer within {MOST:?}"));
                }
                Err(_) => {
                    outcome.ended += 1;
                    break;
                }
            };
            if answer["result"] == params && answer["id"] == number {
                outcome.right += 1;
            } else if answer["out"] == "error" && answer["result"]["code"].is_i64() {
                outcome.refused += 1;
            } else {
                return Err(format!("{call} was answered {answer}"));
            }
        }
    }
    Ok(())
}

/// Runs one start, with calls, a reload and a stop if it gets that far.
fn cycle(config: &str, calls: &str, fault: &str) -> Result<String, String> {
    let words = injected(&[(calls, fault)]);
    let begin = Instant::now();
    let started = Daemon::builder().config(config).under(&words).try_start();
    let took = begin.elapsed();
    if took > MOST {
        return Err(format!("the start took {took:?}"));
    }
    let daemon = match started {
        Ok(daemon) => daemon,
        Err(failure) if failure.log.contains("panic") => return Err(failure.log),
        Err(failure) if failure.code.unwrap_or(0) == 0 || failure.log.is_empty() => {
            return Err(format!(
                "it did not start, and does not say why: {failure:?}"
            ));
        }
        Err(failure) => return Ok(format!("did not start, code {:?}", failure.code)),
    };
    let mut outcome = Outcome::default();
    let served = serve(&daemon, &mut outcome);
    let begin = Instant::now();
    let (status, log) = daemon.end().map_err(|faults| format!("{faults:?}"))?;
    let took = begin.elapsed();
    let reload = served.map_err(|what| format!("{what}: {log}"))?;
    if took > MOST {
        return Err(format!("the stop took {took:?}: {log}"));
    }
    if log.contains("panic") || (!status.success() && log.is_empty()) {
        return Err(format!("{status}: {log}"));
    }
    Ok(format!("{outcome:?}, reload {reload:?}, {status}"))
}

/// Makes calls, a reload and calls again. Returns the exit code of the reload.
fn serve(daemon: &Daemon, outcome: &mut Outcome) -> Result<Option<i32>, String> {
    call(daemon, outcome)?;
    let begin = Instant::now();
    let reload = daemon.command(&["reload"]).status.code();
    let took = begin.elapsed();
    if took > MOST {
        return Err(format!("the reload took {took:?}"));
    }
    call(daemon, outcome)?;
    Ok(reload)
}

#[test]
#[ignore = "needs strace and the right to trace; tests/run runs it"]
fn whichever_system_call_fails_nothing_hangs_and_no_answer_is_wrong() {
    let _alone = alone();
    let at_least = from_environment("PREFORKD_INJECTIONS", 0);
    let mut cases = Vec::new();
    for (calls, errors, times) in FAILURES {
        for error in errors {
            for k in 1..=times.max(at_least) {
                cases.push((calls, format!("error={error}:when={k}")));
            }
        }
    }
    run_cycles(CONFIG, &cases);
}

/// Runs a cycle for each case. Fails if one hangs, panics or answers wrongly.
#[track_caller]
fn run_cycles(config: &str, cases: &[(&str, String)]) {
    let next = AtomicUsize::new(0);
    let faults = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while let Some((calls, fault)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match cycle(config, calls, fault) {
                        Ok(what) => println!("{calls}:{fault}: {what}"),
                        Err(what) => {
                            let mut faults = faults.lock().unwrap();
                            faults.push(format!("{calls}:{fault}: {what}"));
                        }
                    }
                }
            });
        }
    });
    let faults = faults.into_inner().unwrap();
    println!("{} cycles, {} of them at fault", cases.len(), faults.len());
    assert!(faults.is_empty(), "{faults:#?}");
}

/// The board, the observer's socket and its fork are among what fails.
#[test]
#[ignore = "needs strace and the right to trace; tests/run runs it"]
fn whichever_part_of_the_observer_fails_the_server_serves_or_says_why_not() {
    let _alone = alone();
    let cases: Vec<(&str, String)> = FAILURES_BESIDE
        .iter()
        .flat_map(|&(calls, error, times)| {
            (1..=times).map(move |k| (calls, format!("error={error}:when={k}")))
        })
        .collect();
    run_cycles(BESIDE, &cases);
}

#[test]
#[ignore = "needs strace and the right to trace; tests/run runs it"]
fn every_seventh_call_that_can_wait_is_interrupted_and_no_call_is_lost() {
    let _alone = alone();
    // The dynamic loader makes the first reads and gives up.
    let words = injected(&[
        ("read", "error=EINTR:when=15+7"),
        (
            "write,recvfrom,sendto,recvmsg,sendmsg,accept4,epoll_wait,poll",
            "error=EINTR:when=3+7",
        ),
    ]);
    let daemon = Daemon::builder().config(CONFIG).under(&words).start();
    let shapes = [Shape::PerCall, Shape::Lasting, Shape::Pipelined(16)];
    let loads = shapes.map(|shape| Load::start(daemon.address(), 2, shape));
    for _ in 0..3 {
        pass(Duration::from_millis(500));
        assert!(daemon.command(&["reload"]).status.success());
    }
    for load in loads {
        load.stop().assert_whole("every seventh call interrupted");
    }
}

/// A kernel without Landlock, one where it is off, a filter that does not know it, and version 1 (before Linux 5.19),
/// which would refuse each rename across directories.
#[test]
#[ignore = "needs strace and the right to trace; tests/run runs it"]
fn where_landlock_is_missing_programs_run_and_the_status_says_why() {
    for (fault, reason) in [
        ("error=ENOSYS", "this kernel has no Landlock"),
        ("error=EOPNOTSUPP", "Landlock is off in this kernel"),
        (
            "error=EPERM",
            "a system call filter refuses landlock_create_ruleset",
        ),
        (
            "retval=1",
            "this kernel's Landlock refuses renames across directories",
        ),
    ] {
        let words = injected(&[("landlock_create_ruleset", fault)]);
        let daemon = Daemon::builder().config(CONFIG).under(&words).start();
        assert_eq!(
            daemon.client().call(&json!({"in": "cat", "params": fault}))["result"],
            fault
        );
        let warnings = daemon.status()["master"]["warnings"].clone();
        let warnings: Vec<String> = serde_json::from_value(warnings).unwrap();
        let about: Vec<&String> = warnings
            .iter()
            .filter(|warning| warning.contains("without a guard"))
            .collect();
        assert_eq!(about.len(), 1, "{warnings:?}");
        assert!(about[0].contains(reason), "{about:?}");
        let log = daemon.log();
        assert_eq!(log.matches("without a guard").count(), 1, "{log}");
    }
}

/// Another user could put a link in the place of a socket between bind(2) and a change of its mode by path.
#[test]
#[ignore = "needs strace and the right to trace; tests/run runs it"]
fn no_socket_gets_its_mode_by_its_path() {
    let dir = Dir::new();
    let calls = "trace=bind,fchmod,?chmod,fchmodat,?fchmodat2";
    let words = ["strace", "-DD", "-f", "-qq", "-s", "200", "-e", calls, "-o"];
    let mut words: Vec<String> = words.map(str::to_owned).to_vec();
    words.push(dir.join("trace").display().to_string());
    let config = |mode: &str| {
        format!(
            "[workers]\ncount = 1\n[[listen]]\naddress = \"unix:rpc.sock\"\nmode = \"{mode}\"\n"
        )
    };
    let daemon = Daemon::builder()
        .config(&config("0606"))
        .under(&words)
        .start();
    let path = daemon.dir().join("rpc.sock");
    let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(), 0o606);
    daemon.reload_with(&config("0640"));
    assert_eq!(mode(), 0o640);
    drop(daemon);
    // strace writes the rest of its file when the last process has ended.
    wait_for("the trace", PATIENCE, || dir.read("trace").contains("0640"));
    let trace = dir.read("trace");
    let lines: Vec<&str> = trace.lines().collect();
    let at = |call: &str, text: &str| {
        let mut lines = lines.iter();
        lines.position(|line| line.contains(call) && line.contains(text))
    };
    let (set, bound) = (at("fchmod(", ", 0606)"), at("bind(", "rpc.sock"));
    assert!(set.is_some() && set < bound, "{trace}");
    assert_eq!(at("chmod", ".sock"), None, "{trace}");
}
