//! Gives each child its block of the metrics board, and names its methods there.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use super::generation_info::GenerationContext;
use crate::config::MethodKind;
use crate::link::ids::Slot;
use crate::link::metrics_board::layout::{HandlerKind, NAMES};
use crate::link::metrics_board::{self, MetricsAccess, MetricsBoard};

/// Returns the counters for the process that has this slot and scoreboard record, and the places of its methods there.
///
/// # Errors
/// If there is not enough memory.
pub fn metrics_access(
    board: &mut MetricsBoard,
    (slot, record): (Slot, usize),
    context: &GenerationContext,
) -> io::Result<MetricsAccess> {
    let configured = &context.settings.methods;
    let kind = |name: &str| match configured.get(name).map(|method| &method.kind) {
        Some(MethodKind::Command(_)) => HandlerKind::Command,
        Some(MethodKind::Pool(_)) => HandlerKind::Pool,
        Some(MethodKind::Builtin(_)) => HandlerKind::Builtin,
        Some(MethodKind::Function) | None => HandlerKind::Function,
    };
    let methods = context.registry.methods().iter();
    let methods = methods.map(|method| (method.name.as_str(), kind(&method.name)));
    let pools = context.registry.all_pools().iter();
    let pools = pools.map(|pool| pool.name());
    let mut access = board.access(record, methods, pools)?;
    if slot.is_jobs() {
        access.jobs = Some(board.job_cells(record)?);
    }
    if board.take_overflow() {
        log::warn!(
            "there were more than {NAMES} method names since the start: further methods are counted \
             together as _OTHER, until the server is restarted"
        );
    }
    Ok(access)
}

/// Counts a fork, if it was that of a worker.
pub fn count_start(board: &MetricsBoard, slot: Slot) {
    let header = board.header();
    if slot.is_worker() {
        metrics_board::count(&header.worker_starts, 1);
        let slots = header.slots.load(Relaxed).max(u64::from(slot.0) + 1);
        header.slots.store(slots, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use crate::handler::pool::definition::ProgramExit;
    use crate::link::metrics_board::layout::{CloseReason, HandlerKind, MoveReason, labels};
    use crate::master::policy::death_log::WorkerExit;

    /// `OutOfMemory` is `oom`, `ReadTimeout` is `read_timeout`.
    fn label(name: &str) -> String {
        let mut label = String::new();
        for c in name.chars() {
            if c.is_uppercase() && !label.is_empty() {
                label.push('_');
            }
            label.extend(c.to_lowercase());
        }
        label.replace("out_of_memory", "oom")
    }

    #[test]
    fn each_value_has_its_label() {
        macro_rules! check {
            ($labels:expr, $kind:ident: $($name:ident)*) => {
                $(assert_eq!($labels[$kind::$name as usize], label(stringify!($name)));)*
            };
        }
        check!(labels::WORKER_EXITS, WorkerExit: Ordered Recycled Exit Signal OutOfMemory Stuck Boot);
        check!(labels::PROGRAM_EXITS, ProgramExit: Ordered Recycled Idle Exit Signal Timeout Protocol Boot);
        check!(labels::CLOSED, CloseReason: Client Idle ReadTimeout WriteTimeout Protocol Stop Crash Limit);
        check!(labels::MOVED, MoveReason: Drain Crash Balance);
        check!(labels::KINDS, HandlerKind: Builtin Function Command Pool);
    }
}
