//! Tests reloads under full load in nine combinations: a new connection per call, lasting connections and deep
//! pipelines, each with frames, lines and HTTP. nginx runs in the same test with the same client.
//!
//! Ten reloads per cell, or as many as `PREFORKD_RELOADS` says.

use std::net::SocketAddr;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::load::{Load, Plan, Shape, Tally};
use crate::support::nginx::{self, Nginx};
use crate::support::wire::{DIALECTS, Dialect};
use crate::support::{Daemon, PATIENCE, Sweep, alone, from_environment, process, wait_for};

const CONFIG: &str = "[workers]\ncount = 2\n";

pub const SHAPES: [(&str, Shape, usize); 3] = [
    ("a connection a call", Shape::PerCall, 16),
    ("lasting connections", Shape::Lasting, 16),
    ("pipelined 16 deep", Shape::Pipelined(16), 8),
];

/// The number of calls answered between two reloads.
const BETWEEN: u64 = 50;

/// Runs one cell: its load, with `reloads` reloads.
fn cell(plan: Plan, reloads: u64, reload: impl Fn()) -> Tally {
    let load = Load::of(plan);
    for _ in 0..reloads {
        let enough = load.answered() + BETWEEN;
        wait_for("calls answered between reloads", PATIENCE, || {
            load.answered() >= enough
        });
        reload();
    }
    load.stop()
}

/// Returns the load of a cell.
pub fn plan(address: SocketAddr, dialect: Dialect, cell: &(&str, Shape, usize)) -> Plan {
    let &(_, shape, clients) = cell;
    Plan {
        address,
        clients,
        shape,
        dialect,
        pause: Duration::ZERO,
        methods: &["ping"],
    }
}

#[test]
fn reloads_at_full_load_lose_no_call_in_any_of_nine_cells() {
    let _alone = alone();
    let reloads = from_environment("PREFORKD_RELOADS", 10);
    let daemon = Daemon::builder().config(CONFIG).start();
    let sweep = Sweep::of(&daemon);
    let descriptors = process::descriptors_at_rest(daemon.pid());
    let mut faulty = Vec::new();
    for dialect in DIALECTS {
        for shape in &SHAPES {
            let (name, plan) = (shape.0, plan(daemon.address(), dialect, shape));
            let tally = cell(plan, reloads, || {
                let done = daemon.command(&["reload"]);
                assert!(done.status.success(), "{done:?}");
                assert_eq!(daemon.ready_workers().len(), 2);
            });
            println!("{dialect:?}, {name}, {reloads} reloads: {}", tally.line());
            if tally.lost() + tally.closed > 0 {
                let faults = &tally.faults[..tally.faults.len().min(5)];
                faulty.push(format!("{dialect:?}, {name}: {faults:#?}"));
            }
        }
    }
    assert!(faulty.is_empty(), "{faulty:#?}");
    wait_for("the old generations gone", PATIENCE, || {
        process::workers(daemon.pid()).len() == 2
    });
    process::wait_for_descriptors(daemon.pid(), descriptors);
    sweep.assert_like(&daemon);
    drop(daemon);

    let Some(program) = nginx::program() else {
        return println!("no nginx beside it: tests/run fetches one");
    };
    let nginx = Nginx::start(program, 2);
    for shape in &SHAPES[..2] {
        let (name, plan) = (shape.0, plan(nginx.address(), Dialect::Http, shape));
        let tally = cell(plan, reloads, || nginx.reload());
        println!("nginx, {name}, {reloads} reloads: {}", tally.line());
    }
}

/// All nine at once, including calls that take some time, while workers are replaced.
#[test]
fn workers_that_come_and_go_cost_none_of_nine_kinds_of_clients_a_call() {
    let _alone = alone();
    let changes = from_environment("PREFORKD_CHANGES", 24);
    let config = format!("{CONFIG}[methods.sleep]\nbuiltin = \"sleep\"\n");
    let daemon = Daemon::builder().config(&config).start();
    let sweep = Sweep::of(&daemon);
    let loads: Vec<Load> = DIALECTS
        .into_iter()
        .flat_map(|dialect| SHAPES.iter().map(move |shape| (dialect, shape)))
        .map(|(dialect, shape)| {
            Load::of(Plan {
                clients: 2,
                methods: &["ping", "ping", "sleep"],
                ..plan(daemon.address(), dialect, shape)
            })
        })
        .collect();
    let answered = || loads.iter().map(Load::answered).sum::<u64>();
    for change in 0..changes {
        let enough = answered() + 20 * BETWEEN;
        wait_for("calls answered between changes", PATIENCE, || {
            answered() >= enough
        });
        match change % 6 {
            0 => daemon.signal(Signal::SIGTTIN),
            1 | 4 => {
                for worker in daemon.ready_workers().into_iter().skip(1) {
                    kill(Pid::from_raw(worker), Signal::SIGTERM).unwrap();
                }
            }
            2 => assert!(daemon.command(&["scale", "5"]).status.success()),
            3 => daemon.signal(Signal::SIGTTOU),
            _ => assert!(daemon.command(&["scale", "1"]).status.success()),
        }
    }
    for (number, load) in loads.into_iter().enumerate() {
        let (dialect, shape) = (DIALECTS[number / 3], SHAPES[number % 3].0);
        let what = format!("{dialect:?}, {shape}, {changes} changes");
        load.stop().assert_whole(&what);
    }
    assert!(daemon.command(&["scale", "2"]).status.success());
    wait_for("two workers", PATIENCE, || daemon.workers().len() == 2);
    sweep.assert_like(&daemon);
}
