//! Writes the fields of a line of the access log, as JSON and as text.
//!
//! The names never change. Both forms are made from one structure with values of the right type, so no text of a
//! client can begin a field or a line. Texts are bounded, so a line has at most `LINE_BYTES` bytes.

use std::borrow::Cow;
use std::io::Write;
use std::net::SocketAddr;

use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use crate::config::LogFormat;
use crate::logging::{printable, printable_json};
use crate::protocol::body::Form;
use crate::protocol::call_id::CallRunner;
use crate::protocol::detect::Dialect;
use crate::protocol::reply::Framing;
use crate::sys::process::{monotonic_ns, unix_time};
use crate::worker::slow_log::record::begin_of;

/// The largest number of bytes of a method's name, if the method is not configured.
const METHOD_BYTES: usize = 128;

/// The process that has the connections of the calls.
#[derive(Debug, Clone, Copy)]
pub struct LineProcess {
    pub pid: i32,
    pub slot: u16,
    pub generation: u32,
}

/// The place of a call in a trace.
#[derive(Debug, Clone, Copy, Default)]
pub struct LineTrace {
    /// 0: none.
    pub trace_id: u128,
    /// The span of the call; 0: not known.
    pub span_id: u64,
    /// The span of the caller; 0: it sent none.
    pub parent_id: u64,
    pub flags: u8,
}

/// What is known of a call when it was read.
#[derive(Debug, Clone, Default)]
pub struct CallStart {
    /// Its number in the process.
    pub number: u64,
    /// The name of its method, cut; empty if there is none.
    pub method: Cow<'static, str>,
    pub kind: Option<&'static str>,
    /// The address of its client and the dialect of its connection.
    pub from: (Option<SocketAddr>, Option<Dialect>),
    pub request_id: Option<Box<str>>,
    pub trace: LineTrace,
    /// When it was read, in nanoseconds (CLOCK_MONOTONIC).
    pub read_ns: u64,
    pub accept_wait_ms: u64,
    pub received_bytes: usize,
    /// When its handler began, in nanoseconds (CLOCK_MONOTONIC); 0: it has not begun, or that is not known.
    pub began_ns: u64,
    pub runner: CallRunner,
}

/// One line.
#[derive(Debug, Default)]
pub struct AccessLine {
    pub start: CallStart,
    pub form: &'static str,
    pub outcome: &'static str,
    /// The name of the error code.
    pub code: Option<&'static str>,
    pub started: bool,
    pub queue_ns: Option<u64>,
    pub run_ns: Option<u64>,
    pub total_ns: u64,
    pub sent_bytes: usize,
}

/// The line as JSON, without the fields that have no value.
#[derive(Serialize)]
struct JsonFields<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<&'a str>,
    call: Id,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<Hex<16>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    span_id: Option<Hex<8>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_id: Option<Hex<8>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_flags: Option<Hex<1>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<MethodName<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dialect: Option<&'static str>,
    form: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    slot: Option<u16>,
    worker: i32,
    generation: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    runner: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    program: Option<i32>,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    started: bool,
    accept_wait_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    run_us: Option<u64>,
    total_us: u64,
    received_bytes: usize,
    sent_bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_rss_bytes: Option<u64>,
    /// When the call was read. Only lines of the log have it, because their `time` says when they were logged.
    #[serde(skip_serializing_if = "Option::is_none")]
    start: Option<&'a str>,
}

/// Formats lines. It reads the clocks once for many of them.
#[derive(Debug)]
pub struct LineWriter {
    process: LineProcess,
    format: LogFormat,
    /// This plus a time of CLOCK_MONOTONIC is the time since 1970, in nanoseconds.
    epoch_offset_ns: u64,
    clock: ClockText,
}

impl LineWriter {
    pub fn new(process: LineProcess, format: LogFormat) -> Self {
        let mut writer = LineWriter {
            process,
            format,
            epoch_offset_ns: 0,
            clock: ClockText::default(),
        };
        writer.read_clocks();
        writer
    }

    /// Reads the clocks. Call it before a batch of lines, because the time since 1970 may jump.
    pub fn read_clocks(&mut self) {
        let now = unix_time().as_nanos() as u64;
        self.epoch_offset_ns = now.wrapping_sub(monotonic_ns());
    }

    /// Appends a line of the file.
    pub fn append(&mut self, out: &mut Vec<u8>, line: &AccessLine) {
        self.set_time(line);
        match self.format {
            LogFormat::Json => {
                let fields = JsonFields {
                    time: Some(self.clock.text()),
                    ..self.fields(line)
                };
                // Writing to memory cannot fail, and all fields have a text.
                let _ = serde_json::to_writer(&mut *out, &fields);
            }
            LogFormat::Text => {
                out.extend_from_slice(self.clock.text().as_bytes());
                out.push(b' ');
                append_text(out, &self.fields(line));
            }
        }
        out.push(b'\n');
    }

    /// Returns what a line of the log has: its text, and its members as JSON.
    pub fn log_line(&mut self, line: &AccessLine) -> (String, String) {
        self.set_time(line);
        let fields = self.fields(line);
        let mut text = b"access ".to_vec();
        append_text(&mut text, &fields);
        let members = JsonFields {
            start: Some(self.clock.text()),
            // The log has it already.
            slot: None,
            ..fields
        };
        let members = serde_json::to_string(&members).unwrap_or_default();
        (String::from_utf8_lossy(&text).into_owned(), members)
    }

    fn set_time(&mut self, line: &AccessLine) {
        let at_ns = self.epoch_offset_ns.wrapping_add(line.start.read_ns);
        self.clock.set(at_ns / 1000);
    }

    fn fields<'a>(&self, line: &'a AccessLine) -> JsonFields<'a> {
        let (start, runner) = (&line.start, &line.start.runner);
        let (trace, us) = (&start.trace, |ns: u64| ns / 1000);
        let is_traced = trace.trace_id != 0;
        let some = |number: i32| (number != 0).then_some(number);
        let is_command = runner.max_rss_bytes > 0;
        JsonFields {
            time: None,
            call: Id(self.process.pid, start.number),
            request_id: start.request_id.as_deref(),
            trace_id: is_traced.then_some(Hex(trace.trace_id)),
            span_id: (trace.span_id != 0).then(|| Hex(trace.span_id.into())),
            parent_id: (trace.parent_id != 0).then(|| Hex(trace.parent_id.into())),
            // Of a crashed call only the trace id is known.
            trace_flags: (trace.span_id != 0).then(|| Hex(trace.flags.into())),
            method: (!start.method.is_empty()).then(|| MethodName(&start.method)),
            kind: start.kind,
            dialect: start.from.1.and_then(dialect_name),
            form: line.form,
            peer: start.from.0,
            slot: Some(self.process.slot),
            worker: self.process.pid,
            generation: self.process.generation,
            runner: some(runner.process).filter(|pid| *pid != self.process.pid),
            program: some(runner.program),
            outcome: line.outcome,
            code: line.code,
            started: line.started,
            accept_wait_us: start.accept_wait_ms * 1000,
            queue_us: line.queue_ns.map(us),
            run_us: line.run_ns.map(us),
            total_us: us(line.total_ns),
            received_bytes: start.received_bytes,
            sent_bytes: line.sent_bytes,
            cpu_us: is_command.then_some(runner.cpu.as_micros() as u64),
            max_rss_bytes: is_command.then_some(runner.max_rss_bytes),
            start: None,
        }
    }
}

/// Appends the fields as text, without the time.
fn append_text(out: &mut Vec<u8>, fields: &JsonFields<'_>) {
    let seconds = |us: u64| us as f64 / 1e6;
    // Writing to memory cannot fail.
    macro_rules! put {
        ($($part:tt)*) => { let _ = write!(out, $($part)*); };
    }
    macro_rules! put_some {
        ($value:expr, $($part:tt)*) => {
            if let Some(value) = $value { let _ = write!(out, $($part)*, value); }
        };
    }
    let method = fields.method.as_ref().map_or("-", |method| method.0);
    put!("{} {} {}", fields.call, text_value(method), fields.outcome);
    put!(" total={:.6}s", seconds(fields.total_us));
    put_some!(fields.queue_us.map(seconds), " queue={:.6}s");
    put_some!(fields.run_us.map(seconds), " run={:.6}s");
    if fields.accept_wait_us > 0 {
        put!(" accept_wait={:.6}s", seconds(fields.accept_wait_us));
    }
    put_some!(fields.peer, " peer={}");
    put_some!(fields.slot, " slot={}");
    put!(
        " received={} sent={}",
        fields.received_bytes,
        fields.sent_bytes
    );
    put_some!(fields.code, " code={}");
    put!(" started={}", fields.started);
    put_some!(fields.kind, " kind={}");
    put_some!(fields.dialect, " dialect={}");
    put!(" form={} worker={}", fields.form, fields.worker);
    put!(" generation={}", fields.generation);
    put_some!(fields.runner, " runner={}");
    put_some!(fields.program, " program={}");
    put_some!(fields.cpu_us.map(seconds), " cpu={:.6}s");
    put_some!(fields.max_rss_bytes, " max_rss={}");
    put_some!(fields.request_id.map(text_value), " request_id={}");
    put_some!(fields.trace_id.as_ref(), " trace={}");
    put_some!(fields.span_id.as_ref(), " span={}");
    put_some!(fields.parent_id.as_ref(), " parent={}");
    put_some!(fields.trace_flags.as_ref(), " flags={}");
}

/// Returns a text as a value: in quotes if it has blanks, quotes or the like, and without control characters.
fn text_value(text: &str) -> Cow<'_, str> {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"\"\\=".contains(&byte);
    if text.bytes().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for character in text.chars() {
        if matches!(character, '"' | '\\') {
            quoted.push('\\');
        }
        quoted.push(character);
    }
    quoted.push('"');
    Cow::Owned(printable(&quoted))
}

fn dialect_name(dialect: Dialect) -> Option<&'static str> {
    match dialect {
        Dialect::Frame => Some("frame"),
        Dialect::Line => Some("line"),
        Dialect::Http => Some("http"),
        Dialect::Unknown => None,
    }
}

/// Returns the form of a call.
pub fn form_name(form: Form) -> &'static str {
    match form {
        Form::Plain | Form::ParamsOnly => "plain",
        Form::JsonRpc | Form::Notification => "jsonrpc",
    }
}

/// Returns the dialect of an answer; `None` for one of a batch.
pub fn dialect_of(wrap: Framing) -> Option<Dialect> {
    match wrap {
        Framing::Frame => Some(Dialect::Frame),
        Framing::Line => Some(Dialect::Line),
        Framing::Http(_) => Some(Dialect::Http),
        Framing::Member => None,
    }
}

/// Returns the number of bytes in the body of an answer.
pub fn body_bytes(answer: &[u8], wrap: Framing) -> usize {
    let head = match wrap {
        Framing::Frame => 4,
        Framing::Line => 1,
        // A comma is before all but the first one.
        Framing::Member => usize::from(answer.first() == Some(&b',')),
        Framing::Http(_) => memchr::memmem::find(answer, b"\r\n\r\n").map_or(0, |at| at + 4),
    };
    answer.len().saturating_sub(head)
}

/// Returns the beginning of the name of a method that is not configured.
pub fn cut_method(name: &str) -> String {
    begin_of(name, METHOD_BYTES).to_owned()
}

/// The id of a call.
#[derive(Debug, Clone, Copy)]
struct Id(i32, u64);

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl Serialize for Id {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (mut pid, mut number) = (itoa::Buffer::new(), itoa::Buffer::new());
        let (pid, number) = (pid.format(self.0), number.format(self.1));
        let mut text = [0; 40];
        text[..pid.len()].copy_from_slice(pid.as_bytes());
        text[pid.len()] = b'.';
        let length = pid.len() + 1 + number.len();
        text[pid.len() + 1..length].copy_from_slice(number.as_bytes());
        // Digits are ASCII.
        serializer.serialize_str(std::str::from_utf8(&text[..length]).unwrap_or_default())
    }
}

/// A number of `BYTES` bytes, written in hexadecimal digits.
#[derive(Debug, Clone, Copy)]
struct Hex<const BYTES: usize>(u128);

impl<const BYTES: usize> std::fmt::Display for Hex<BYTES> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:0width$x}", self.0, width = 2 * BYTES)
    }
}

impl<const BYTES: usize> Serialize for Hex<BYTES> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = [0; 32];
        for (place, digit) in text[..2 * BYTES].iter_mut().rev().enumerate() {
            *digit = b"0123456789abcdef"[(self.0 >> (4 * place)) as usize & 15];
        }
        serializer.serialize_str(std::str::from_utf8(&text[..2 * BYTES]).unwrap_or_default())
    }
}

/// The name of a method, which a client may have chosen.
struct MethodName<'a>(&'a str);

impl Serialize for MethodName<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_ascii() && !self.0.contains('\x7f') {
            return serializer.serialize_str(self.0);
        }
        let json = serde_json::to_string(self.0).unwrap_or_default();
        let json = printable_json(&json).into_owned();
        match RawValue::from_string(json) {
            Ok(value) => value.serialize(serializer),
            Err(_) => serializer.serialize_str(""),
        }
    }
}

/// A time as RFC 3339 in UTC with microseconds. The part up to the seconds is kept for the next one.
#[derive(Debug, Default)]
struct ClockText {
    second: u64,
    text: String,
}

impl ClockText {
    /// Sets the time, in microseconds since 1970.
    fn set(&mut self, us: u64) {
        let (second, mut us) = (us / 1_000_000, us % 1_000_000);
        if second != self.second || self.text.is_empty() {
            let at = std::time::UNIX_EPOCH + std::time::Duration::from_secs(second);
            self.text = humantime::format_rfc3339_micros(at).to_string();
            self.second = second;
        }
        let mut digits = [b'0'; 6];
        for digit in digits.iter_mut().rev() {
            *digit += (us % 10) as u8;
            us /= 10;
        }
        let digits = std::str::from_utf8(&digits).unwrap_or_default();
        let end = self.text.len() - 1;
        self.text.replace_range(end - 6..end, digits);
    }

    fn text(&self) -> &str {
        &self.text
    }
}

#[cfg(test)]
#[path = "line_tests.rs"]
mod tests;
