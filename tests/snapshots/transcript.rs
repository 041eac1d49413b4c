//! Runs transcripts: what is sent to a daemon and what it answers, in one text file per group.
//!
//! The head of a file configures the daemon, of which each dialect has its own:
//! - `program NAME`: a program of `examples/` instead of preforkd;
//! - `log TEXT`: a line of the log that would fail the test otherwise;
//! - lines that begin with four spaces: its configuration.
//!
//! Then come conversations, each on a new connection:
//! - `= DIALECTS: TITLE` begins one, which is held in each of these dialects;
//! - `> BODY` sends a body in the dialect, `>/PATH BODY` posts it to a path, `>> BYTES` sends bytes as
//!   they are; such lines without another line between them are one write;
//! - `DIALECTS < ANSWER` is one answer, `DIALECTS end BYTES` all that comes until the server closes.
//!   To add a case, write a bare `<` or `end`, and record;
//! - `half-close`; `signal NAME`; `ask JSON` sends a request to the control socket;
//! - `wait command` (a call of a command has begun), `wait queued N`, `wait idle` (no call is left),
//!   `wait deaths N` (and all are replaced), `wait unhealthy`, `wait refused` (no new connection is
//!   accepted), `wait exit`.
//!
//! In bodies and answers `\n`, `\r`, `\t`, `\\` and `\xNN` stand for bytes, and `\(N*TEXT)` for N times
//! TEXT. Lines of an HTTP head are separated by ` | `, and its body follows ` || `.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::panic::resume_unwind;
use std::str::FromStr;
use std::thread::ScopedJoinHandle;

use nix::sys::signal::Signal;

use super::{assert_recorded, mask, mask_between};
use crate::support::client::frame;
use crate::support::daemon::Worker;
use crate::support::wire::{DIALECTS, Dialect, Wire, post};
use crate::support::{Daemon, PATIENCE, control, example, process, source, wait_for};

/// One step of a file.
enum Step {
    /// A comment, an empty line or a line of the head.
    Text(String),
    /// A new connection in these dialects.
    Connect(Vec<Dialect>, String),
    /// Lines that are sent in one write, as they are in the file.
    Send(Vec<String>),
    /// What is expected in each dialect: `true` is the end of the connection.
    Receive([Vec<bool>; 3]),
    /// Anything else.
    Do(String),
}

/// Holds all conversations of `tests/snapshots/wire/NAME.txt` and compares the answers.
#[track_caller]
pub fn check(name: &str) {
    let name = format!("wire/{name}.txt");
    let text = fs::read_to_string(source().join("tests/snapshots").join(&name)).unwrap();
    let steps = parse(&text);
    let answers = std::thread::scope(|scope| {
        let run = |dialect| {
            let steps = &steps;
            scope.spawn(move || run(steps, dialect))
        };
        let join =
            |thread: ScopedJoinHandle<'_, _>| thread.join().unwrap_or_else(|it| resume_unwind(it));
        DIALECTS.map(run).map(join)
    });
    assert_recorded(&name, &render(&steps, answers));
}

fn word(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Frame => "frame",
        Dialect::Line => "line",
        Dialect::Http => "http",
    }
}

fn parse(text: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut current = Vec::new();
    for line in text.lines() {
        if let Some((of, is_end)) = awaited(line, &current) {
            if !matches!(steps.last(), Some(Step::Receive(_))) {
                steps.push(Step::Receive(Default::default()));
            }
            if let Some(Step::Receive(each)) = steps.last_mut() {
                of.iter().for_each(|it| each[*it as usize].push(is_end));
            }
        } else if line.starts_with('>') {
            match steps.last_mut() {
                Some(Step::Send(lines)) => lines.push(line.to_owned()),
                _ => steps.push(Step::Send(vec![line.to_owned()])),
            }
        } else if let Some(begin) = line.strip_prefix("= ") {
            let (names, _) = begin.split_once(": ").expect("= DIALECTS: TITLE");
            current = names
                .split(' ')
                .map(dialect)
                .collect::<Option<_>>()
                .unwrap();
            steps.push(Step::Connect(current.clone(), line.to_owned()));
        } else if ["half-close", "signal ", "ask ", "wait "]
            .iter()
            .any(|it| line.starts_with(it))
        {
            steps.push(Step::Do(line.to_owned()));
        } else {
            let head = ["#", "    ", "program ", "log "];
            let is_known = line.is_empty() || head.iter().any(|it| line.starts_with(it));
            assert!(is_known, "no step: {line}");
            steps.push(Step::Text(line.to_owned()));
        }
    }
    steps
}

fn dialect(word_of: &str) -> Option<Dialect> {
    DIALECTS.into_iter().find(|it| word(*it) == word_of)
}

/// Returns the dialects in which an answer is expected, and whether it is the end of the connection;
/// `None` for any other line.
fn awaited(line: &str, current: &[Dialect]) -> Option<(Vec<Dialect>, bool)> {
    let mut of = Vec::new();
    for one in line.split(' ') {
        match (one, dialect(one)) {
            (_, Some(dialect)) => of.push(dialect),
            ("<" | "end", None) if of.is_empty() => return Some((current.to_vec(), one == "end")),
            ("<" | "end", None) => return Some((of, one == "end")),
            _ => return None,
        }
    }
    None
}

/// Returns all answers in one dialect, in the order of the file.
fn run(steps: &[Step], dialect: Dialect) -> Vec<String> {
    let speaks = |step: &Step| matches!(step, Step::Connect(of, _) if of.contains(&dialect));
    if !steps.iter().any(speaks) {
        return Vec::new();
    }
    let mut daemon = start(steps);
    let mut connection = None;
    let mut answers = Vec::new();
    for step in steps {
        match (step, &mut connection) {
            (Step::Connect(..), _) => {
                connection = speaks(step).then(|| Connection::open(&daemon, dialect));
            }
            (_, None) | (Step::Text(_), _) => {}
            (Step::Send(lines), Some(connection)) => {
                let bytes = lines.iter().flat_map(|line| sent(line, dialect));
                connection.send(&bytes.collect::<Vec<u8>>());
            }
            (Step::Receive(each), Some(connection)) => {
                let each = each[dialect as usize].iter();
                answers.extend(each.map(|is_end| connection.receive(*is_end)));
            }
            (Step::Do(line), Some(connection)) => {
                act(line, &mut daemon, connection);
            }
        }
    }
    answers
}

fn start(steps: &[Step]) -> Daemon {
    let mut builder = Daemon::builder();
    let mut config = String::new();
    for step in steps {
        let Step::Text(line) = step else { continue };
        if let Some(line) = line.strip_prefix("    ") {
            config += &format!("{line}\n");
        } else if let Some(name) = line.strip_prefix("program ") {
            builder = builder.program(example(name));
        } else if let Some(text) = line.strip_prefix("log ") {
            builder = builder.expect_log(text);
        }
    }
    builder.config(&config).start()
}

/// Returns the bytes that a line of the file sends.
fn sent(line: &str, dialect: Dialect) -> Vec<u8> {
    if let Some(raw) = line.strip_prefix(">> ") {
        return unescape(raw);
    }
    let (path, body) = line[1..].split_once(' ').expect("a blank before the body");
    let body = unescape(body);
    match dialect {
        Dialect::Frame => frame(&body),
        Dialect::Line => [&body, &b"\n"[..]].concat(),
        Dialect::Http => {
            let path = if path.is_empty() { "/" } else { path };
            let empty = post(path, "").replace(": 0", &format!(": {}", body.len()));
            [empty.as_bytes(), &body].concat()
        }
    }
}

fn act(line: &str, daemon: &mut Daemon, connection: &Connection) {
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        ["half-close"] => {
            let _ = connection.stream.shutdown(Shutdown::Write);
        }
        ["signal", name] => daemon.signal(Signal::from_str(name).unwrap()),
        // The process of a command shows that the call has begun; a number in the status does not.
        ["wait", "command"] => wait_for(line, PATIENCE, || {
            !process::children(daemon.ready_workers()[0]).is_empty()
        }),
        ["wait", "idle"] => wait_for(line, PATIENCE, || {
            let workers = daemon.workers();
            let is_idle = |it: &Worker| {
                (it.running, it.queued) == (0, 0) && process::children(it.pid).is_empty()
            };
            workers.iter().all(is_idle)
        }),
        ["wait", "queued", count] => {
            let count: u64 = count.parse().unwrap();
            wait_for(line, PATIENCE, || daemon.workers()[0].queued == count);
        }
        ["wait", "deaths", count] => {
            let count: usize = count.parse().unwrap();
            wait_for(line, PATIENCE, || {
                // The dead worker's keeper is reaped too, so that its call is counted.
                let children = process::children(daemon.pid()).len();
                let deaths = daemon.status()["deaths"].as_array().unwrap().len();
                deaths == count && children == 2 && daemon.ready_workers().len() == 1
            });
        }
        ["wait", "unhealthy"] => wait_for(line, PATIENCE, || {
            let mut wire = Wire::to(daemon);
            wire.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
            wire.response().status == 503
        }),
        ["ask", request] => {
            let answer = control::ask(&daemon.dir().join("control.sock"), request);
            assert!(answer.contains("\"ok\":true"), "{line}: {answer}");
        }
        ["wait", "exit"] => assert!(daemon.wait_exit().success()),
        ["wait", "refused"] => wait_for(line, PATIENCE, || daemon.try_client().is_err()),
        _ => panic!("no step: {line}"),
    }
}

/// A connection, and the received bytes that were not consumed.
struct Connection {
    dialect: Dialect,
    stream: TcpStream,
    inbox: Vec<u8>,
    /// An answer did not arrive, so no other one is awaited.
    is_broken: bool,
}

impl Connection {
    fn open(daemon: &Daemon, dialect: Dialect) -> Self {
        let stream = TcpStream::connect_timeout(&daemon.address(), PATIENCE).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Connection {
            dialect,
            stream,
            inbox: Vec::new(),
            is_broken: false,
        }
    }

    /// A server that has refused earlier bytes may have closed the connection; its answer is compared.
    fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Returns the next answer, or everything until the end, in the format of a file.
    fn receive(&mut self, is_end: bool) -> String {
        if self.is_broken {
            return "no answer either".into();
        }
        loop {
            let whole = (!is_end)
                .then(|| length(self.dialect, &self.inbox))
                .flatten();
            if let Some(length) = whole {
                let answer: Vec<u8> = self.inbox.drain(..length).collect();
                return shown(self.dialect, &answer);
            }
            let mut buffer = [0; 16 << 10];
            match self.stream.read(&mut buffer) {
                Ok(count @ 1..) => self.inbox.extend_from_slice(&buffer[..count]),
                // A reset may come instead of the end, after the answer.
                Ok(_) | Err(_) if is_end => {
                    return shown(self.dialect, &std::mem::take(&mut self.inbox));
                }
                failed => {
                    self.is_broken = true;
                    let so_far = shown(self.dialect, &std::mem::take(&mut self.inbox));
                    return format!("no answer ({failed:?}), but: {so_far}");
                }
            }
        }
    }
}

/// Returns the length in bytes of the first complete answer.
fn length(dialect: Dialect, bytes: &[u8]) -> Option<usize> {
    let length = match dialect {
        Dialect::Frame => 4 + u32::from_le_bytes(*bytes.first_chunk()?) as usize,
        Dialect::Line => 1 + bytes.iter().position(|byte| *byte == b'\n')?,
        Dialect::Http => {
            let head = 4 + bytes.windows(4).position(|it| it == b"\r\n\r\n")?;
            let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
            let body = text
                .lines()
                .find_map(|it| it.strip_prefix("Content-Length: "));
            head + body.map_or(0, |length| length.parse().unwrap())
        }
    };
    (bytes.len() >= length).then_some(length)
}

/// Formats answers as in a file. Correct lengths are left out, because they depend on masked text: those
/// of a frame, and the value of `Content-Length`.
fn shown(dialect: Dialect, bytes: &[u8]) -> String {
    let whole = length(dialect, bytes) == Some(bytes.len());
    match dialect {
        Dialect::Frame if whole => escape(&mask(&bytes[4..])),
        Dialect::Line if whole => escape(&mask(&bytes[..bytes.len() - 1])),
        Dialect::Http => {
            let at = bytes.windows(4).position(|it| it == b"\r\n\r\n");
            let Some(at) = at else {
                return escape(&mask(bytes));
            };
            let body = &bytes[at + 4..];
            let is_whole = format!("\r\nContent-Length: {}\r\n", body.len());
            let head = String::from_utf8_lossy(&bytes[..at + 2]).into_owned();
            let head = head.replace(&is_whole, "\r\nContent-Length: fits\r\n");
            let mut head = mask_between(&mask(head.as_bytes()), b"\r\nDate: ", b'\r');
            if body.is_empty() {
                // The answer to HEAD: the length of the body depends on masked text.
                head = mask_between(&head, b"\r\nContent-Length: ", b'\r');
            }
            let head = String::from_utf8(head).unwrap();
            let head = escape(head.trim_end().replace("\r\n", " | ").as_bytes());
            let body = escape(&mask(body));
            if body.is_empty() {
                head
            } else {
                format!("{head} || {body}")
            }
        }
        _ => escape(&mask(bytes)),
    }
}

fn render(steps: &[Step], answers: [Vec<String>; 3]) -> String {
    let mut answers = answers.map(Vec::into_iter);
    let mut text = String::new();
    for step in steps {
        match step {
            Step::Text(line) | Step::Connect(_, line) | Step::Do(line) => {
                text += &format!("{line}\n")
            }
            Step::Send(lines) => lines.iter().for_each(|line| text += &format!("{line}\n")),
            Step::Receive(each) => {
                for number in 0..each.iter().map(Vec::len).max().unwrap_or(0) {
                    let mut groups: Vec<(Vec<&str>, String)> = Vec::new();
                    for dialect in DIALECTS {
                        let Some(is_end) = each[dialect as usize].get(number) else {
                            continue;
                        };
                        let answer = answers[dialect as usize].next().unwrap();
                        let answer = format!("{} {answer}", if *is_end { "end" } else { "<" });
                        match groups.iter_mut().find(|(_, same)| *same == answer) {
                            Some((names, _)) => names.push(word(dialect)),
                            None => groups.push((vec![word(dialect)], answer)),
                        }
                    }
                    for (names, answer) in groups {
                        text += &format!("{} {}\n", names.join(" "), answer.trim_end());
                    }
                }
            }
        }
    }
    text
}

/// A run of one byte longer than this is written as `\(N*B)`.
const LONGEST_RUN: usize = 40;

fn escape(bytes: &[u8]) -> String {
    let mut text = String::new();
    for run in bytes.chunk_by(|a, b| a == b) {
        let byte = match run[0] {
            b'\n' => "\\n".into(),
            b'\r' => "\\r".into(),
            b'\t' => "\\t".into(),
            b'\\' => "\\\\".into(),
            byte @ b' '..=b'~' => char::from(byte).to_string(),
            byte => format!("\\x{byte:02x}"),
        };
        text += &match run.len() {
            length if length > LONGEST_RUN => format!("\\({length}*{byte})"),
            length => byte.repeat(length),
        };
    }
    text
}

fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((before, escape)) = rest.split_once('\\') {
        bytes.extend_from_slice(before.as_bytes());
        let (kind, after) = escape.split_at(1);
        rest = after;
        match kind {
            "n" => bytes.push(b'\n'),
            "r" => bytes.push(b'\r'),
            "t" => bytes.push(b'\t'),
            "\\" => bytes.push(b'\\'),
            "x" => {
                bytes.push(u8::from_str_radix(&after[..2], 16).unwrap());
                rest = &after[2..];
            }
            "(" => {
                let (count, after) = after.split_once('*').unwrap();
                let (part, after) = after.split_once(')').unwrap();
                let part = unescape(part);
                bytes.extend(part.repeat(count.parse().unwrap()));
                rest = after;
            }
            _ => panic!("no escape: \\{escape}"),
        }
    }
    bytes.extend_from_slice(rest.as_bytes());
    bytes
}

#[test]
fn bytes_survive_their_escapes() {
    let all: Vec<u8> = (0..=255).chain([b'['; 50]).collect();
    assert_eq!(unescape(&escape(&all)), all);
    assert_eq!(unescape("a\\(2*b\\n)c"), b"ab\nb\nc");
}
