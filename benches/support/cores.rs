//! Pins this process to a CPU; processes that it starts afterwards are pinned to it too.

use std::fs;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::Failure;

/// Returns two CPUs that this process may use: `(server, load)`. If possible they are on different cores,
/// because two threads of one core slow each other down.
pub fn two() -> Result<(usize, usize), Failure> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut cpus = Vec::new();
    for cpu in 0..CpuSet::count() {
        if allowed.is_set(cpu)? {
            cpus.push(cpu);
        }
    }
    let core = |cpu: usize| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        fs::read_to_string(path).ok()
    };
    let [server, next, ..] = cpus[..] else {
        return Err("server and load need a CPU each, and this process may use one alone".into());
    };
    let elsewhere = cpus.iter().find(|cpu| core(**cpu) != core(server));
    Ok((server, elsewhere.copied().unwrap_or(next)))
}

/// Lets this process run on this CPU only.
pub fn pin(cpu: usize) -> Result<(), Failure> {
    let mut only = CpuSet::new();
    only.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &only)?)
}
