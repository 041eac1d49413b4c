//! Reloads at full load, in nine cells: a connection a call, lasting ones, deep pipelines, each in
//! frames, lines and HTTP. Beside them nginx, in the same run and with the same client.
//!
//! Ten reloads a cell, or as many as `PREFORKD_RELOADS` says.

use crate::support::load::{Load, Plan, Shape, Tally};
use crate::support::nginx::{self, Nginx};
use crate::support::wire::{DIALECTS, Dialect};
use crate::support::{Daemon, PATIENCE, Sweep, alone, from_environment, process, wait_for};

const CONFIG: &str = "[workers]\ncount = 2\n";

const SHAPES: [(&str, Shape, usize); 3] = [
    ("a connection a call", Shape::PerCall, 16),
    ("lasting connections", Shape::Lasting, 16),
    ("pipelined 16 deep", Shape::Pipelined(16), 8),
];

/// Between two reloads so many calls are answered.
const BETWEEN: u64 = 50;

/// One cell: its load, with so many reloads in it.
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

fn plan(address: std::net::SocketAddr, dialect: Dialect, shape: Shape, clients: usize) -> Plan {
    Plan {
        address,
        clients,
        shape,
        dialect,
        pause: std::time::Duration::ZERO,
    }
}

#[test]
fn reloads_at_full_load_lose_no_call_in_any_of_nine_cells() {
    let _alone = alone();
    let reloads = from_environment("PREFORKD_RELOADS", 10);
    let daemon = Daemon::builder().config(CONFIG).start();
    let sweep = Sweep::of(&daemon);
    let descriptors = process::descriptors(daemon.pid());
    let mut faulty = Vec::new();
    for dialect in DIALECTS {
        for (name, shape, clients) in SHAPES {
            let plan = plan(daemon.address(), dialect, shape, clients);
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
        process::children(daemon.pid()).len() == 2
    });
    assert_eq!(process::descriptors(daemon.pid()), descriptors);
    sweep.assert_like(&daemon);
    drop(daemon);

    let Some(program) = nginx::program() else {
        return println!("no nginx beside it: tests/run fetches one");
    };
    let nginx = Nginx::start(program, 2);
    for (name, shape, clients) in &SHAPES[..2] {
        let plan = plan(nginx.address(), Dialect::Http, *shape, *clients);
        let tally = cell(plan, reloads, || nginx.reload());
        println!("nginx, {name}, {reloads} reloads: {}", tally.line());
    }
}
