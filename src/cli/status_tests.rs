//! The whole page of `status`.
#![allow(clippy::unwrap_used)]

use super::status::render;
use crate::protocol::control::*;

fn busy() -> Status {
    let worker = |slot, pid, state| WorkerStatus {
        slot,
        pid,
        generation: 3,
        state,
        uptime_s: 187_200,
        connections: 12,
        running: 3,
        calls: 1_204_311,
        errors: 7,
        rss_bytes: 12 << 20,
        threads: 8,
        ..WorkerStatus::default()
    };
    Status {
        isolated: Vec::new(),
        jobs: None,
        reloads: Vec::new(),
        pools: Vec::new(),
        master: MasterStatus {
            observer: None,
            pid: 4242,
            version: "0.1.0".into(),
            name: String::new(),
            config: Some("/etc/preforkd/preforkd.toml".into()),
            binary: "/usr/bin/preforkd".into(),
            generation: 3,
            uptime_s: 360_000,
            stops_in_ms: Some(4_200),
            stopping: false,
            last_reload: Some(LastReload {
                ok: true,
                at: 1_000,
                error: None,
            }),
            last_upgrade: None,
            target: 3,
            warnings: vec!["workers run as root".into()],
            lost_log_lines: 1_234,
            lost_access_lines: 56,
        },
        workers: vec![
            WorkerStatus {
                oldest_call: Some(OldestCall {
                    method: "sleep".into(),
                    age_ms: 1_250,
                }),
                lost_threads: 1,
                ..worker(0, Some(4243), WorkerPhase::Ready)
            },
            WorkerStatus {
                generation: 2,
                ..worker(0, Some(99), WorkerPhase::Draining)
            },
            WorkerStatus {
                programs: 4,
                programs_down: 1,
                ..worker(1, Some(4244), WorkerPhase::Ready)
            },
            WorkerStatus {
                throttle: Some(ThrottleStatus {
                    failures: 6,
                    retry_in_ms: 1_600,
                }),
                ..worker(2, None, WorkerPhase::Throttled)
            },
        ],
        quarantine: vec![Quarantined {
            method: "score".into(),
            key: "00ff00ff00ff00ff".into(),
            refused: 12,
            at: 1_000,
        }],
        deaths: vec![
            DeathStatus {
                slot: Some(2),
                pid: 4245,
                exit: Some(0),
                uptime_s: 4_000,
                rss_bytes: 5 << 20,
                reason: "told to retire".into(),
                at: 1_100,
                ..DeathStatus::default()
            },
            DeathStatus {
                slot: Some(2),
                pid: 4250,
                signal: Some("SIGSEGV".into()),
                uptime_s: 0,
                method: Some("score".into()),
                rss_bytes: 812 << 10,
                reason: "died of \x1b[31mitself\nagain".into(),
                at: 1_195,
                ..DeathStatus::default()
            },
        ],
        listeners: vec![
            ListenerStatus {
                address: "127.0.0.1:8080".into(),
                queue: Some(0),
                backlog: 4096,
                refused_per_source: 0,
            },
            ListenerStatus {
                address: "unix:/run/preforkd/rpc.sock".into(),
                queue: None,
                backlog: 128,
                refused_per_source: 0,
            },
        ],
    }
}

#[test]
fn the_page_has_everything_in_line() {
    let page = render("preforkd", &busy(), 1_200, false);
    let expected = "\
preforkd 0.1.0  pid 4242  generation 3  up 4d 4h  2 of 3 workers ready
configuration /etc/preforkd/preforkd.toml  binary /usr/bin/preforkd
last reload: fine, 3m 20s ago
stops in 4.2s: calls are served, health checks get 503
could not write the log: 1,234 lines lost
the access log has lost 56 lines since the start
warning: workers run as root

SLOT   PID  GEN  STATE         UP  CONNS  RUNNING  QUEUED      CALLS  ERRORS    MEMORY  OLDEST CALL
   0  4243    3  ready      2d 4h     12        3       0  1,204,311       7  12.0 MiB  sleep, 1.2s; 1 of 8 threads lost
   0    99    2  draining   2d 4h     12        3       0  1,204,311       7  12.0 MiB  -
   1  4244    3  ready      2d 4h     12        3       0  1,204,311       7  12.0 MiB  1 of 4 programs down
   2     -    3  throttled      -      -        -       -          -       -         -  6 failures, next try in 1.6s

LISTENER                     QUEUE  BACKLOG
127.0.0.1:8080                   0     4096
unix:/run/preforkd/rpc.sock      -      128

In quarantine until the next reload:
 SINCE  METHOD  KEY               REFUSED
3m 20s  score   00ff00ff00ff00ff       12

Deaths, the latest first:
   AGO  KIND    NAME  SLOT   PID  LIVED  END      METHOD   MEMORY  REASON
    5s  worker  -        2  4250     0s  SIGSEGV  score   812 KiB  died of \\u{1b}[31mitself again
1m 40s  worker  -        2  4245  1h 6m  exit 0   -       5.0 MiB  told to retire
";
    assert_eq!(page, expected, "\n{page}");
}

#[test]
fn colours_change_nothing_but_the_colours() {
    let plain = render("preforkd", &busy(), 1_200, false);
    let mut painted = render("preforkd", &busy(), 1_200, true);
    assert!(painted.contains("\x1b[32mready\x1b[0m"), "{painted}");
    assert!(
        painted.contains("\x1b[33m2 of 3 workers ready\x1b[0m"),
        "{painted}"
    );
    for code in [0, 1, 2, 31, 32, 33, 36] {
        painted = painted.replace(&format!("\x1b[{code}m"), "");
    }
    assert_eq!(painted, plain);
}

#[test]
fn a_long_reason_is_cut_and_says_where_the_rest_is() {
    let mut status = busy();
    status.deaths[0].reason = "é".repeat(121);
    status.deaths[1].reason = "x".repeat(120);
    let page = render("preforkd", &status, 1_200, false);
    let cut = format!("  {}... (whole with --json)\n", "é".repeat(120));
    assert!(page.contains(&cut), "{page}");
    assert!(page.contains(&format!("  {}\n", "x".repeat(120))), "{page}");
}

#[test]
fn a_refused_reload_and_a_fresh_start_are_said() {
    let mut status = busy();
    status.master.last_reload = Some(LastReload {
        ok: false,
        at: 1_199,
        error: Some("preforkd.toml:3:1: unknown key".into()),
    });
    let page = render("preforkd", &status, 1_200, false);
    let told = "\nlast reload: refused 1s ago: preforkd.toml:3:1: unknown key\n";
    assert!(page.contains(told), "{page}");

    let page = render("preforkd", &Status::default(), 0, false);
    assert!(
        page.contains("\nlast reload: none since the start\n"),
        "{page}"
    );
    assert!(!page.contains("Deaths"), "{page}");
}
