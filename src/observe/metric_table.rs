//! Lists all metrics: name, type, labels and help, in the order in which they are exported.
//!
//! Names, types and labels never change. docs/metrics.md describes the same metrics, and a test compares
//! the two.

use prometheus::proto::MetricType;

/// The prefix of every name.
pub const PREFIX: &str = "preforkd_";

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct MetricInfo {
    /// The name without its prefix.
    pub name: &'static str,
    pub kind: MetricType,
    pub labels: Labels,
    pub help: &'static str,
}

type Labels = &'static [&'static str];

const fn metric(
    kind: MetricType,
    name: &'static str,
    labels: Labels,
    help: &'static str,
) -> MetricInfo {
    MetricInfo {
        name,
        kind,
        labels,
        help,
    }
}

const fn counter(name: &'static str, labels: Labels, help: &'static str) -> MetricInfo {
    metric(MetricType::COUNTER, name, labels, help)
}

const fn gauge(name: &'static str, labels: Labels, help: &'static str) -> MetricInfo {
    metric(MetricType::GAUGE, name, labels, help)
}

const fn histogram(name: &'static str, labels: Labels, help: &'static str) -> MetricInfo {
    metric(MetricType::HISTOGRAM, name, labels, help)
}

/// All metrics.
pub const METRICS: &[MetricInfo] = &[
    gauge(
        "build_info",
        &["version"],
        "Always 1; the version of preforkd is the label.",
    ),
    gauge(
        "start_time_seconds",
        &[],
        "Start of the master in seconds since 1970. An upgrade keeps it.",
    ),
    gauge("generation", &[], "Generation that serves."),
    gauge(
        "stopping",
        &[],
        "1 while a stop is scheduled or in progress.",
    ),
    gauge(
        "master_responding",
        &[],
        "1 if the master answered the observer within 1 s.",
    ),
    counter("reloads_total", &["result"], "Finished reloads."),
    counter("upgrades_total", &["result"], "Finished upgrades."),
    gauge(
        "last_reload_successful",
        &[],
        "1 if the last reload succeeded or there was none.",
    ),
    gauge(
        "last_reload_timestamp_seconds",
        &[],
        "End of the last reload, or the start, in seconds since 1970.",
    ),
    gauge("workers", &["state"], "Workers by state."),
    gauge("workers_target", &[], "Wanted workers."),
    counter("worker_starts_total", &[], "Forked workers."),
    counter("worker_exits_total", &["reason"], "Workers that ended."),
    gauge("worker_connections", &["slot"], "Open client connections."),
    gauge(
        "worker_resident_memory_bytes",
        &["slot"],
        "Resident memory of the workers of a slot.",
    ),
    gauge(
        "worker_heartbeat_timestamp_seconds",
        &["slot"],
        "Last turn of the event loop in seconds since 1970; the oldest of a slot.",
    ),
    counter(
        "worker_cpu_seconds_total",
        &["slot"],
        "CPU time of workers, without their programs.",
    ),
    gauge("handler_threads", &[], "Handler threads."),
    gauge(
        "handler_threads_busy",
        &[],
        "Handler threads that run a call.",
    ),
    gauge(
        "handler_threads_lost",
        &[],
        "Handler threads past the deadline of their call.",
    ),
    gauge("calls_queued", &[], "Calls that wait for a handler thread."),
    gauge(
        "pool_programs",
        &["pool", "state"],
        "Programs of a pool by state.",
    ),
    gauge(
        "pool_calls_queued",
        &["pool"],
        "Calls that wait for a program.",
    ),
    counter(
        "pool_program_starts_total",
        &["pool"],
        "Started programs of a pool.",
    ),
    counter(
        "pool_program_exits_total",
        &["pool", "reason"],
        "Programs of a pool that ended.",
    ),
    counter(
        "command_cpu_seconds_total",
        &["method"],
        "CPU time of commands.",
    ),
    gauge(
        "listener_queued_connections",
        &["address"],
        "Connections in the accept queue.",
    ),
    gauge(
        "listener_backlog_connections",
        &["address"],
        "Limit of the accept queue.",
    ),
    gauge(
        "listener_sessions",
        &["address"],
        "Open connections of an isolated listener, each with a process.",
    ),
    gauge(
        "listener_sessions_limit",
        &["address"],
        "Connections that an isolated listener may have at once.",
    ),
    counter(
        "listener_full_total",
        &["address"],
        "Times that an isolated listener reached its limit.",
    ),
    counter(
        "listener_refused_connections_total",
        &["address", "reason"],
        "Connections that a listener refused.",
    ),
    counter(
        "listener_session_crashes_total",
        &["address"],
        "Processes of connections that have crashed.",
    ),
    counter("connections_accepted_total", &[], "Accepted connections."),
    counter(
        "connections_moved_total",
        &["reason"],
        "Connections handed to another worker.",
    ),
    counter(
        "connections_closed_total",
        &["reason"],
        "Closed connections.",
    ),
    histogram(
        "accept_wait_seconds",
        &[],
        "Time of a connection in the accept queue, a lower bound.",
    ),
    counter(
        "received_bytes_total",
        &["dialect"],
        "Bytes received from clients.",
    ),
    counter("sent_bytes_total", &["dialect"], "Bytes sent to clients."),
    counter(
        "requests_total",
        &["dialect", "form"],
        "Bodies read; a batch is one.",
    ),
    counter(
        "calls_total",
        &["method"],
        "Answered calls, including refusals, and notifications.",
    ),
    counter(
        "calls_forwarded_total",
        &[],
        "Calls sent to another worker.",
    ),
    counter(
        "calls_returned_total",
        &[],
        "Forwarded calls that the other worker returned before they began.",
    ),
    counter(
        "call_errors_total",
        &["method", "code", "started"],
        "Calls answered with an error.",
    ),
    histogram(
        "call_duration_seconds",
        &["method"],
        "Time from reading a call to writing its answer; not of calls refused at once.",
    ),
    histogram(
        "call_queue_seconds",
        &["method"],
        "Time that a call waited for a thread or program.",
    ),
    histogram(
        "call_run_seconds",
        &["method"],
        "Time of a call in its handler.",
    ),
    counter(
        "slow_calls_total",
        &["method"],
        "Calls over the threshold of the slow log.",
    ),
    gauge("quarantined_calls", &[], "Calls in quarantine."),
    counter(
        "quarantine_refusals_total",
        &[],
        "Calls refused because they are in quarantine.",
    ),
    counter(
        "log_lines_lost_total",
        &["log"],
        "Log lines that could not be written.",
    ),
    counter(
        "access_log_lines_total",
        &[],
        "Lines that were written to the access log.",
    ),
    counter("jobs_enqueued_total", &[], "Stored jobs."),
    counter(
        "jobs_attempts_total",
        &["method", "outcome"],
        "Ended attempts of jobs.",
    ),
    counter(
        "jobs_ended_total",
        &["method", "state", "reason"],
        "Jobs that are done, dead or cancelled.",
    ),
    counter(
        "jobs_stale_total",
        &[],
        "Outcomes of attempts that were refused, because the job was claimed again.",
    ),
    gauge("jobs", &["state"], "Jobs by state."),
    gauge(
        "jobs_oldest_due_seconds",
        &[],
        "How long the due job that waits longest has been due; 0 if no job is due.",
    ),
    gauge("jobs_store_up", &[], "1 if the store of the jobs works."),
    histogram("jobs_commit_seconds", &[], "Time of a commit."),
    histogram(
        "jobs_wait_seconds",
        &[],
        "Time from the due time of a job to its attempt.",
    ),
    histogram("jobs_run_seconds", &[], "Time of an attempt."),
    gauge("scrape_duration_seconds", &[], "Time to build this answer."),
];
