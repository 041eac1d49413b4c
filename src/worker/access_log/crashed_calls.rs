//! Writes the lines of the calls that a keeper answers with `crashed`, after the death of their worker.
//!
//! First it reads the file to count how many lines of the worker's last batch are in it. All other lines that the
//! worker had not written are lost, and the master counts them when the keeper has ended. If the lines go to the log,
//! the keeper writes none, because it has no log.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;

use super::hooks::{line_process, method_table};
use super::line::{
    AccessLine, CallStart, LineProcess, LineTrace, LineWriter, dialect_of, form_name,
};
use super::queue::{LineOutput, LineSink};
use super::rules::AccessRules;
use crate::link::access_counts::LineBatch;
use crate::link::ids::Pid;
use crate::link::metrics_board::BlockWriter;
use crate::link::metrics_board::layout::OTHER;
use crate::protocol::code::Code;
use crate::sys::process::monotonic_ns;
use crate::worker::crash::recovery::CrashedCall;
use crate::worker_init::WorkerInit;

/// The lines of one keeper; empty without an access log in a file.
pub struct CrashedCallLines {
    active: Option<ActiveLines>,
}

struct ActiveLines {
    output: LineOutput,
    rules: AccessRules,
    counts: BlockWriter,
    methods: Box<[(&'static str, &'static str)]>,
    pid: i32,
}

/// Counts which lines of its last batch the worker `pid` has written. It has ended, so this process alone counts in its
/// block.
pub fn recover_lines(boot: &WorkerInit<'_>, pid: Pid) {
    if let (Some(_), Some(file)) = (&boot.settings.access_log, &boot.access_file) {
        let find = |batch: LineBatch| file.recover(pid.0, batch.first_call, batch.position);
        let counts = BlockWriter::new(boot.metrics.block, false);
        counts.block.access.recover(find);
    }
}

impl CrashedCallLines {
    /// Recovers what the worker `pid` was writing, see [`recover_lines`].
    pub fn new(boot: &WorkerInit<'_>, pid: Pid) -> Self {
        recover_lines(boot, pid);
        let config = boot.settings.access_log.as_ref();
        let both = config.zip(boot.access_file.as_ref());
        let active = both.map(|(config, file)| {
            let counts = BlockWriter::new(boot.metrics.block, false);
            let process = LineProcess {
                pid: pid.0,
                ..line_process(boot)
            };
            let writer = LineWriter::new(process, config.format);
            let methods = method_table(boot);
            let place = |name: &str| methods.iter().position(|(it, _)| *it == name);
            let rules = AccessRules::new(config, |name| place(name).unwrap_or(OTHER));
            ActiveLines {
                output: LineOutput::new((LineSink::File(Arc::clone(file)), writer), counts, None),
                rules,
                counts,
                methods,
                pid: pid.0,
            }
        });
        CrashedCallLines { active }
    }

    /// Adds the line of a call that is answered and counted. `place` is that of its method on the metrics board.
    pub fn add(&mut self, call: &CrashedCall, place: usize, peer: Option<SocketAddr>) {
        let Some(active) = &mut self.active else {
            return;
        };
        let (name, kind) = active.methods.get(place).copied().unwrap_or_default();
        let ids = (call.trace_id, active.pid, call.number);
        if !active.rules.takes((place, name), ids, true, 0) {
            return active.counts.block.access.exempt(1);
        }
        let now_ns = monotonic_ns();
        let read_ns = if call.read_ns > 0 {
            call.read_ns
        } else {
            now_ns
        };
        active.output.add(&AccessLine {
            start: CallStart {
                number: call.number,
                method: Cow::Borrowed(name),
                kind: (!kind.is_empty()).then_some(kind),
                trace: LineTrace {
                    trace_id: call.trace_id,
                    ..LineTrace::default()
                },
                from: (peer, dialect_of(call.shape.wrap)),
                read_ns,
                received_bytes: call.received_bytes,
                ..CallStart::default()
            },
            form: form_name(call.shape.form),
            outcome: "crashed",
            code: Some(Code::Crashed.name()),
            started: call.begun,
            queue_ns: None,
            run_ns: None,
            total_ns: now_ns.saturating_sub(read_ns),
            sent_bytes: call.sent_bytes,
        });
    }

    /// Writes the lines.
    pub fn flush(&mut self) {
        if let Some(active) = &mut self.active {
            active.output.flush();
        }
    }
}
