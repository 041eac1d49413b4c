#![allow(clippy::unwrap_used)]
use std::time::Duration;

use proptest::prelude::*;
use serde_json::Value;

use super::*;

const PROCESS: LineProcess = LineProcess {
    pid: 4712,
    slot: 3,
    generation: 2,
};

fn line() -> AccessLine {
    AccessLine {
        start: CallStart {
            number: 90_211,
            method: Cow::Borrowed("score"),
            kind: Some("command"),
            from: ("10.0.0.7:51122".parse().ok(), Some(Dialect::Http)),
            request_id: Some("r-1 a".into()),
            trace: LineTrace {
                trace_id: 0x4bf9,
                span_id: 7,
                parent_id: 8,
                flags: 1,
            },
            read_ns: monotonic_ns(),
            accept_wait_ms: 4,
            received_bytes: 218,
            began_ns: 0,
            runner: CallRunner {
                process: 4713,
                program: 5000,
                cpu: Duration::from_micros(42),
                max_rss_bytes: 4096,
            },
        },
        form: "plain",
        outcome: "timeout",
        code: Some("timeout"),
        started: true,
        queue_ns: Some(812_999),
        run_ns: Some(5_000_213_000),
        total_ns: 5_001_101_000,
        sent_bytes: 141,
    }
}

fn written(format: LogFormat, line: &AccessLine) -> String {
    let mut out = Vec::new();
    LineWriter::new(PROCESS, format).append(&mut out, line);
    String::from_utf8(out).unwrap()
}

fn json(line: &AccessLine) -> Value {
    serde_json::from_str(&written(LogFormat::Json, line)).unwrap()
}

#[test]
fn a_line_has_each_field_with_its_name() {
    let before = unix_time();
    let mut value = json(&line());
    let time = value["time"].take();
    let at = humantime::parse_rfc3339(time.as_str().unwrap()).unwrap();
    let since = at.duration_since(std::time::UNIX_EPOCH).unwrap();
    assert!(since.abs_diff(before) < Duration::from_secs(5), "{time}");
    assert_eq!(time.as_str().unwrap().len(), 27, "{time}");
    let expected = serde_json::json!({
        "time": null, "call": "4712.90211", "request_id": "r-1 a",
        "trace_id": "00000000000000000000000000004bf9", "span_id": "0000000000000007",
        "parent_id": "0000000000000008", "trace_flags": "01",
        "method": "score", "kind": "command", "dialect": "http", "form": "plain", "peer": "10.0.0.7:51122",
        "slot": 3, "worker": 4712, "generation": 2, "runner": 4713, "program": 5000,
        "outcome": "timeout", "code": "timeout", "started": true,
        "accept_wait_us": 4000, "queue_us": 812, "run_us": 5_000_213, "total_us": 5_001_101,
        "received_bytes": 218, "sent_bytes": 141, "cpu_us": 42, "max_rss_bytes": 4096,
    });
    assert_eq!(value, expected);
}

#[test]
fn fields_without_a_value_are_left_out() {
    let value = json(&AccessLine::default());
    let names: Vec<&String> = value.as_object().unwrap().keys().collect();
    let expected = [
        "accept_wait_us",
        "call",
        "form",
        "generation",
        "outcome",
        "received_bytes",
        "sent_bytes",
        "slot",
        "started",
        "time",
        "total_us",
        "worker",
    ];
    let mut sorted = names.clone();
    sorted.sort();
    assert_eq!(sorted, expected);
    // The runner is the worker itself.
    let mut line = line();
    line.start.runner.process = PROCESS.pid;
    assert_eq!(json(&line).get("runner"), None);
}

#[test]
fn a_line_of_text_has_the_documented_beginning() {
    let text = written(LogFormat::Text, &line());
    let (time, rest) = text.split_once(' ').unwrap();
    assert!(time.ends_with('Z') && time.len() == 27, "{time}");
    let expected = "4712.90211 score timeout total=5.001101s queue=0.000812s run=5.000213s \
                    accept_wait=0.004000s peer=10.0.0.7:51122 slot=3 received=218 sent=141 code=timeout \
                    started=true kind=command dialect=http form=plain worker=4712 generation=2 runner=4713 \
                    program=5000 cpu=0.000042s max_rss=4096 request_id=\"r-1 a\" \
                    trace=00000000000000000000000000004bf9 span=0000000000000007 parent=0000000000000008 \
                    flags=01\n";
    assert_eq!(rest, expected);
}

#[test]
fn a_line_of_the_log_has_no_name_twice() {
    let (text, members) = LineWriter::new(PROCESS, LogFormat::Json).log_line(&line());
    assert!(
        text.starts_with("access 4712.90211 score timeout total="),
        "{text}"
    );
    let value: Value = serde_json::from_str(&members).unwrap();
    for name in ["time", "slot", "level", "pid", "role", "thread", "message"] {
        assert_eq!(value.get(name), None, "{name}");
    }
    assert!(value["start"].as_str().unwrap().ends_with('Z'));
}

#[test]
fn the_time_is_kept_for_one_second_only() {
    let mut clock = ClockText::default();
    for (us, expected) in [
        (0, "1970-01-01T00:00:00.000000Z"),
        (999_999, "1970-01-01T00:00:00.999999Z"),
        (1_000_007, "1970-01-01T00:00:01.000007Z"),
        (86_400_000_000, "1970-01-02T00:00:00.000000Z"),
    ] {
        clock.set(us);
        assert_eq!(clock.text(), expected);
    }
}

#[test]
fn the_bytes_of_a_body_are_those_behind_its_framing() {
    for (wrap, answer, expected) in [
        (Framing::Line, &b"{}\n"[..], 2),
        (Framing::Frame, b"\x02\0\0\0{}", 2),
        (Framing::Member, b",{}", 2),
        (Framing::Member, b"{}", 2),
        (
            Framing::Http(Default::default()),
            b"HTTP/1.1 200 OK\r\n\r\n{}",
            2,
        ),
        (Framing::Line, b"", 0),
    ] {
        assert_eq!(body_bytes(answer, wrap), expected, "{wrap:?}");
    }
}

proptest! {
    /// Whatever a client chooses as the name of a method: one line, valid JSON, and nothing that a terminal obeys.
    #[test]
    fn no_text_of_a_client_breaks_a_line(name in any::<String>(), more in "[\\PC\n\r\t\u{1b}\u{2028}\u{202e}\"\\\\=]{0,200}") {
        for name in [name, more] {
            let mut line = line();
            line.start.method = Cow::Owned(cut_method(&name));
            prop_assert!(line.start.method.len() <= METHOD_BYTES);
            let text = written(LogFormat::Json, &line);
            let value: Value = serde_json::from_str(&text).unwrap();
            let method = value["method"].as_str().unwrap_or_default();
            prop_assert_eq!(method, &*line.start.method);
            for text in [text, written(LogFormat::Text, &line)] {
                let body = text.strip_suffix('\n').unwrap();
                prop_assert_eq!(&printable(body), body);
                prop_assert!(text.len() <= crate::logging::LINE_BYTES);
            }
        }
    }
}
