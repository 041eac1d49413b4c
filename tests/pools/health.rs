//! Tests `health = true` of a pool: `/healthz` answers 503 while the pool has no program that serves.

use std::fs;
use std::net::SocketAddr;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::wire::Wire;
use crate::support::{Daemon, PATIENCE, wait_for};

/// Two workers, an observer, and a pool whose program ends at once while there is a file.
fn config(daemon: &Daemon, health: bool) -> String {
    let down = daemon.dir().join("down");
    format!(
        "[workers]\ncount = 2\n[observe]\naddress = \"127.0.0.1:0\"\n\
         [pools.frail]\ncommand = [\"/bin/sh\", \"-c\", \"test -e {} || exec sleep 1000\"]\n\
         processes = 1\nready = \"alive\"\nboot-timeout = \"1s\"\nrespawn-max-delay = \"500ms\"\n\
         health = {health}\n[methods.frail]\npool = \"frail\"\n",
        down.display()
    )
}

/// The status of a health check at an address.
fn health(address: SocketAddr) -> u16 {
    let request = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
    Wire::open(address).send(request).response().status
}

fn daemon() -> Daemon {
    Daemon::builder()
        .config("[workers]\ncount = 2\n")
        .expect_log("frail")
        .start()
}

/// Ends the program, so that no other one serves.
fn break_pool(daemon: &Daemon) {
    fs::write(daemon.dir().join("down"), "").unwrap();
    let program = daemon.status()["pools"][0]["list"][0]["pid"].as_i64();
    kill(Pid::from_raw(program.unwrap() as i32), Signal::SIGTERM).unwrap();
}

#[test]
fn health_checks_fail_while_no_program_has_been_ready_for_its_boot_timeout() {
    let daemon = daemon();
    daemon.reload_with(&config(&daemon, true));
    let observer = daemon.status()["master"]["observer"]["address"].clone();
    let observer = observer.as_str().unwrap().parse().unwrap();
    let both = || [daemon.address(), observer].map(health);
    assert_eq!(both(), [200, 200]);
    assert_eq!(daemon.status()["pools"][0]["unhealthy"], json!(false));
    break_pool(&daemon);
    wait_for("health checks that fail", PATIENCE, || both() == [503, 503]);
    assert_eq!(daemon.status()["pools"][0]["unhealthy"], json!(true));
    fs::remove_file(daemon.dir().join("down")).unwrap();
    wait_for("health checks that succeed", PATIENCE, || {
        both() == [200, 200]
    });
}

#[test]
fn without_the_key_a_pool_is_no_matter_of_health_checks() {
    let daemon = daemon();
    daemon.reload_with(&config(&daemon, false));
    break_pool(&daemon);
    wait_for("the pool without a program", PATIENCE, || {
        daemon.status()["pools"][0]["down"] == 1
    });
    // Longer than the boot-timeout: the third start has failed.
    wait_for("three starts", PATIENCE, || {
        daemon.status()["pools"][0]["starts"].as_u64() > Some(3)
    });
    assert_eq!(health(daemon.address()), 200);
}
