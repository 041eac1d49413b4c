//! Finds the clients of a process just before it is killed, to know what its death may cost.

use std::collections::HashSet;
use std::fs;
use std::net::SocketAddr;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{PATIENCE, process, wait_for};

/// Stops a worker and returns the ports of its connected clients; from then on it accepts no others.
/// Returns `None` if it is already gone.
pub fn stop(pid: i32, server: SocketAddr) -> Option<HashSet<u16>> {
    kill(Pid::from_raw(pid), Signal::SIGSTOP).ok()?;
    wait_for("a stopped worker", PATIENCE, || {
        !matches!(process::state(pid), Some('R' | 'S' | 'D'))
    });
    Some(clients(pid, server))
}

/// Returns the ports of the clients that are connected to this process (proc_pid_net(5)).
pub fn clients(pid: i32, server: SocketAddr) -> HashSet<u16> {
    let held: HashSet<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|target| {
            let target = target.to_str()?.strip_prefix("socket:[")?;
            Some(target.trim_end_matches(']').to_owned())
        })
        .collect();
    // The table is read page by page while connections change, so one read may miss an entry, but hardly
    // all of them.
    let tables = (0..3).map(|_| fs::read_to_string("/proc/net/tcp").unwrap_or_default());
    let table: String = tables.collect();
    let own = format!(":{:04X}", server.port());
    let connections = table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let ours = fields.get(1)?.ends_with(&own) && held.contains(*fields.get(9)?);
        let (_, port) = fields[2].split_once(':')?;
        ours.then(|| u16::from_str_radix(port, 16).ok()).flatten()
    });
    connections.filter(|port| *port != 0).collect()
}
