#!/usr/bin/env python3
"""Writes preforkd.json, the Grafana dashboard of preforkd, beside this file.

Needs grafana-foundation-sdk from PyPI. Each panel is one line of the table below; the positions and the ids follow
from the order. `--check` compares the file with what would be written.
"""

import json
import pathlib
import sys

from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, DashboardCursorSync, GridPos
from grafana_foundation_sdk.builders.common import StackingConfig

FILE = pathlib.Path(__file__).resolve().parent / "preforkd.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
SERVER = 'job=~"$job",instance=~"$instance"'


def quantile(share, metric="call_duration_seconds"):
    return (
        f"histogram_quantile({share}, sum by (method, le) "
        f"(rate(preforkd_{metric}_bucket{{{SERVER},method=~\"$method\"}}[$__rate_interval])))"
    )


def rate(metric, by, labels=""):
    return f"sum by ({by}) (rate(preforkd_{metric}{{{SERVER}{labels}}}[$__rate_interval]))"


def gauge(metric, by, labels=""):
    return f"sum by ({by}) (preforkd_{metric}{{{SERVER}{labels}}})"


METHOD = ',method=~"$method"'
SHED = METHOD + ',code=~"overloaded|timeout|stopping",started="false"'
# kind, title, width of 24, unit, [(expression, legend)]
ROWS = [
    (
        "Overview",
        [
            ("stat", "Workers ready", 4, "none", [(gauge("workers", "instance", ',state="ready"'), "{{instance}}")]),
            ("stat", "Calls/s", 4, "reqps", [(rate("calls_total", "instance"), "{{instance}}")]),
            ("stat", "Errors/s", 4, "reqps", [(rate("call_errors_total", "instance"), "{{instance}}")]),
            ("stat", "Accept queue", 4, "none", [(gauge("listener_queued_connections", "instance"), "{{instance}}")]),
            ("stat", "Quarantined calls", 4, "none", [(gauge("quarantined_calls", "instance"), "{{instance}}")]),
            ("stat", "Last reload", 4, "bool", [(f"min by (instance) (preforkd_last_reload_successful{{{SERVER}}})", "{{instance}}")]),
        ],
    ),
    (
        "Calls",
        [
            ("lines", "Calls/s by method", 12, "reqps", [(rate("calls_total", "method", METHOD), "{{method}}")]),
            ("lines", "Errors/s by code", 12, "reqps", [(rate("call_errors_total", "code", METHOD), "{{code}}")]),
            ("lines", "Shed calls/s by method", 8, "reqps", [(rate("call_errors_total", "method", SHED), "{{method}}")]),
            ("lines", "p50 by method", 8, "s", [(quantile(0.5), "{{method}}")]),
            ("lines", "p99 by method", 8, "s", [(quantile(0.99), "{{method}}")]),
            (
                "heat",
                "Latency",
                12,
                "s",
                [(f'sum by (le) (increase(preforkd_call_duration_seconds_bucket{{{SERVER}{METHOD}}}[$__rate_interval]))', "{{le}}")],
            ),
            ("lines", "p99 of waiting by method", 12, "s", [(quantile(0.99, "call_queue_seconds"), "{{method}}")]),
        ],
    ),
    (
        "Capacity",
        [
            (
                "lines",
                "Handler threads",
                8,
                "none",
                [(gauge(name, "instance"), label + " {{instance}}") for name, label in (
                    ("handler_threads", "all"), ("handler_threads_busy", "busy"), ("handler_threads_lost", "lost"))],
            ),
            ("stack", "Programs by state", 8, "none", [(gauge("pool_programs", "pool, state"), "{{pool}} {{state}}")]),
            (
                "lines",
                "Queued calls",
                8,
                "none",
                [(gauge("calls_queued", "instance"), "threads {{instance}}"), (gauge("pool_calls_queued", "pool"), "pool {{pool}}")],
            ),
            (
                "lines",
                "Accept queue",
                12,
                "none",
                [
                    (gauge("listener_queued_connections", "address"), "{{address}}"),
                    (gauge("listener_backlog_connections", "address"), "limit {{address}}"),
                ],
            ),
            (
                "lines",
                "Wait in the accept queue, p99",
                12,
                "s",
                [(f"histogram_quantile(0.99, sum by (instance, le) (rate(preforkd_accept_wait_seconds_bucket{{{SERVER}}}[$__rate_interval])))", "{{instance}}")],
            ),
        ],
    ),
    (
        "Jobs",
        [
            ("stat", "Job store works", 4, "bool", [(f"min by (instance) (preforkd_jobs_store_up{{{SERVER}}})", "{{instance}}")]),
            ("stat", "Dead jobs", 4, "none", [(gauge("jobs", "instance", ',state="dead"'), "{{instance}}")]),
            ("stat", "Oldest due job", 4, "s", [(f"max by (instance) (preforkd_jobs_oldest_due_seconds{{{SERVER}}})", "{{instance}}")]),
            ("stat", "Enqueued jobs/s", 4, "ops", [(rate("jobs_enqueued_total", "instance"), "{{instance}}")]),
            ("stat", "Refused outcomes", 4, "none", [(gauge("jobs_stale_total", "instance"), "{{instance}}")]),
            ("stack", "Live jobs by state", 8, "none", [(gauge("jobs", "state", ',state!="dead"'), "{{state}}")]),
            ("lines", "Attempts/s by outcome", 8, "ops", [(rate("jobs_attempts_total", "outcome", METHOD), "{{outcome}}")]),
            ("lines", "Ended jobs/s by state", 8, "ops", [(rate("jobs_ended_total", "state, reason", METHOD), "{{state}} {{reason}}")]),
            (
                "lines",
                "p99 of waiting, running and committing",
                8,
                "s",
                [
                    (
                        f"histogram_quantile(0.99, sum by (le) (rate(preforkd_jobs_{name}_seconds_bucket{{{SERVER}}}[$__rate_interval])))",
                        name,
                    )
                    for name in ("wait", "run", "commit")
                ],
            ),
        ],
    ),
    (
        "Processes",
        [
            ("stack", "Workers by state", 8, "none", [(gauge("workers", "state"), "{{state}}")]),
            ("lines", "Exits of workers per minute", 8, "none", [(f"60 * {rate('worker_exits_total', 'reason')}", "{{reason}}")]),
            ("lines", "Exits of programs per minute", 8, "none", [(f"60 * {rate('pool_program_exits_total', 'pool, reason')}", "{{pool}} {{reason}}")]),
            ("lines", "Resident memory by slot", 8, "bytes", [(gauge("worker_resident_memory_bytes", "instance, slot"), "{{instance}} {{slot}}")]),
            ("lines", "CPU by slot", 8, "percentunit", [(rate("worker_cpu_seconds_total", "instance, slot"), "{{instance}} {{slot}}")]),
            ("lines", "CPU of commands", 8, "percentunit", [(rate("command_cpu_seconds_total", "method", METHOD), "{{method}}")]),
            ("lines", "Connections by slot", 8, "none", [(gauge("worker_connections", "instance, slot"), "{{instance}} {{slot}}")]),
            (
                "lines",
                "Connections accepted, closed and moved per second",
                8,
                "none",
                [
                    (rate("connections_accepted_total", "instance"), "accepted {{instance}}"),
                    (rate("connections_closed_total", "reason"), "closed {{reason}}"),
                    (rate("connections_moved_total", "reason"), "moved {{reason}}"),
                ],
            ),
            (
                "lines",
                "Traffic",
                8,
                "Bps",
                [(rate("received_bytes_total", "dialect"), "received {{dialect}}"), (rate("sent_bytes_total", "dialect"), "sent {{dialect}}")],
            ),
            (
                "lines",
                "Connections of isolated listeners",
                8,
                "none",
                [
                    (gauge("listener_sessions", "address"), "{{address}}"),
                    (gauge("listener_sessions_limit", "address"), "limit {{address}}"),
                ],
            ),
        ],
    ),
]
HEIGHTS = {"stat": 4, "lines": 8, "stack": 8, "heat": 8}


def query(expression, legend, ref):
    return prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(ref).range()


def panel(kind, title, unit, queries):
    made = {"stat": stat.Panel, "heat": heatmap.Panel}.get(kind, timeseries.Panel)()
    if kind == "heat":
        made = made.calculate(False)
    if kind == "stack":
        made = made.stacking(StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(30)
    made = made.title(title).datasource(SOURCE).unit(unit)
    for number, (expression, legend) in enumerate(queries):
        target = query(expression, legend, chr(ord("A") + number))
        made = made.with_target(target.format("heatmap") if kind == "heat" else target)
    return made


def variable(name, label, metric):
    return (
        dashboard.QueryVariable(name).label(label).datasource(SOURCE)
        .query(f"label_values({metric}, {name})").multi(True).include_all(True)
    )


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def board():
    made = (
        dashboard.Dashboard("preforkd").uid("preforkd").tags(["preforkd"]).refresh("30s").time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR).editable()
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(variable("job", "Job", "preforkd_build_info"))
        .with_variable(variable("instance", "Instance", 'preforkd_build_info{job=~"$job"}'))
        .with_variable(variable("method", "Method", f"preforkd_calls_total{{{SERVER}}}"))
        .annotation(
            dashboard.AnnotationQuery().name("Reloads").datasource(SOURCE).enable(True).icon_color("blue")
            .expr(f"changes(preforkd_last_reload_timestamp_seconds{{{SERVER}}}[$__rate_interval]) > 0")
        )
    )
    x = y = number = 0
    for row_title, panels in ROWS:
        made = made.with_row(dashboard.Row(row_title).id(number := number + 1).grid_pos(GridPos(h=1, w=24, x=0, y=y)))
        y, x, tallest = y + 1, 0, 0
        for kind, title, width, unit, queries in panels:
            height = HEIGHTS[kind]
            if x + width > 24:
                x, y, tallest = 0, y + tallest, 0
            tallest = max(tallest, height)
            place = GridPos(h=height, w=width, x=x, y=y)
            made = made.with_panel(panel(kind, title, unit, queries).id(number := number + 1).grid_pos(place))
            x += width
        y += tallest
    plain = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    return json.dumps(without_nulls(plain), sort_keys=True, indent=2) + "\n"


def main():
    text = board()
    if "--check" in sys.argv:
        sys.exit(0 if FILE.read_text() == text else f"{FILE} is not what {sys.argv[0]} writes")
    FILE.write_text(text)


if __name__ == "__main__":
    main()
