//! Records the protocol in its three dialects, as transcripts in `wire/`.

use super::transcript::check;

#[test]
fn plain_calls_are_answered_as_recorded() {
    check("plain");
}

#[test]
fn json_rpc_calls_are_answered_as_recorded() {
    check("jsonrpc");
}

#[test]
fn discovery_is_answered_as_recorded() {
    check("discover");
}

#[test]
fn first_bytes_are_answered_as_recorded() {
    check("detect");
}

#[test]
fn http_requests_are_answered_as_recorded() {
    check("http");
}

#[test]
fn large_calls_are_answered_as_recorded() {
    check("too_large");
}

#[test]
fn full_queues_are_answered_as_recorded() {
    check("overloaded");
}

#[test]
fn timeouts_and_cancels_are_answered_as_recorded() {
    check("time");
}

#[test]
fn functions_that_fail_are_answered_as_recorded() {
    check("functions");
}

#[test]
fn workers_that_crash_are_answered_for_as_recorded() {
    check("crashed");
}

#[test]
fn commands_are_answered_as_recorded() {
    check("commands");
}

#[test]
fn pools_are_answered_as_recorded() {
    check("pools");
}

#[test]
fn a_stop_is_answered_as_recorded() {
    check("stopping");
}
