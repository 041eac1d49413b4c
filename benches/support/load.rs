//! Runs a closed-loop load: C connections with one outstanding call each, on one thread.
//!
//! Every byte of every answer is compared with the first answer, which is parsed as JSON. The load must
//! not be the bottleneck. So a call costs it one write, one read and a part of an epoll_wait, as it costs
//! the bare server.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::Failure;

/// The longest time for any answer before the run fails.
const PATIENCE: Duration = Duration::from_secs(10);

/// When a run ends. Calls outstanding then are still awaited and counted.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// After this many calls.
    Calls(u64),
    /// After this time.
    Elapsed(Duration),
}

/// The results of a run.
pub struct Outcome {
    /// The number of calls, each answered correctly.
    pub calls: u64,
    /// The time from the first send to the last answer.
    pub elapsed: Duration,
    /// The latency of each call in nanoseconds.
    pub latencies: Histogram<u64>,
}

/// Open connections to one server, idle between runs.
pub struct Load {
    connections: Vec<Connection>,
    epoll: Epoll,
    request: Vec<u8>,
    answer: Answer,
}

/// The call of a load. Params and result are JSON.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    pub method: &'a str,
    pub params: &'a str,
    pub result: &'a str,
    /// Whether it is an HTTP request instead of a frame.
    pub http: bool,
}

/// The answer that every call gets, including its length or head.
struct Answer {
    bytes: Vec<u8>,
    /// Its bytes that are not compared: the value of a `Date` header, which changes.
    varying: Range<usize>,
}

struct Connection {
    stream: TcpStream,
    sent: Instant,
    /// The received bytes of the answer; also 0 if no call is outstanding.
    received: usize,
}

/// Returns a frame with this body.
pub fn frame(body: &str) -> Vec<u8> {
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(body.as_bytes());
    bytes
}

impl Load {
    /// Opens `count` connections and makes one call on each in turn, so that all are accepted. `params`
    /// is JSON.
    pub fn open(address: SocketAddr, count: usize, params: &str) -> Result<Self, Failure> {
        Self::of(address, count, "ping", params)
    }

    /// Does the same with a method that returns its params.
    pub fn of(
        address: SocketAddr,
        count: usize,
        method: &str,
        params: &str,
    ) -> Result<Self, Failure> {
        let call = Call {
            method,
            params,
            result: params,
            http: false,
        };
        Self::calling(address, count, &call)
    }

    /// Does the same with any call.
    pub fn calling(address: SocketAddr, count: usize, call: &Call<'_>) -> Result<Self, Failure> {
        let request = call.request();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut connections = Vec::with_capacity(count);
        let mut answer: Option<Answer> = None;
        for token in 0..count {
            let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.write_all(&request)?;
            let first = call.read_answer(&mut stream)?;
            match &answer {
                None => answer = Some(first),
                Some(answer) if answer.is_like(&first) => {}
                Some(_) => return Err("the connections get different answers".into()),
            }
            let token = token as u64;
            epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
            connections.push(Connection {
                stream,
                sent: Instant::now(),
                received: 0,
            });
        }
        Ok(Load {
            connections,
            epoll,
            request,
            answer: answer.ok_or("no connection")?,
        })
    }

    /// Sends `depth` calls at a time on each connection from now on, and counts them as one.
    pub fn send_together(&mut self, depth: usize) {
        self.request = self.request.repeat(depth);
        self.answer.bytes = self.answer.bytes.repeat(depth);
    }

    /// Returns the answer that every call gets: length and body.
    pub fn answer(&self) -> &[u8] {
        &self.answer.bytes
    }

    /// Calls on all connections until the end. A wrong or missing answer is a failure.
    pub fn run(&mut self, until: Until) -> Result<Outcome, Failure> {
        let mut latencies = Histogram::new_with_bounds(1_000, 60_000_000_000, 3)?;
        let begin = Instant::now();
        let mut calls = 0_u64;
        let mut outstanding = 0;
        for connection in &mut self.connections {
            connection.send(&self.request)?;
            outstanding += 1;
        }
        let mut events = [EpollEvent::empty(); 512];
        let mut buffer = vec![0; 64 << 10];
        let patience = EpollTimeout::try_from(PATIENCE)?;
        while outstanding > 0 {
            let count = match self.epoll.wait(&mut events, patience) {
                Ok(0) => return Err("no answer within 10 s".into()),
                Err(Errno::EINTR) => continue,
                count => count?,
            };
            for event in &events[..count] {
                let connection = &mut self.connections[event.data() as usize];
                if !connection.receive(&self.answer, &mut buffer)? {
                    continue;
                }
                let now = Instant::now();
                let latency = now.duration_since(connection.sent).as_nanos();
                latencies.saturating_record(u64::try_from(latency)?);
                calls += 1;
                let more = match until {
                    Until::Calls(limit) => calls + outstanding <= limit,
                    Until::Elapsed(limit) => now.duration_since(begin) < limit,
                };
                if more {
                    connection.send(&self.request)?;
                } else {
                    outstanding -= 1;
                }
            }
        }
        Ok(Outcome {
            calls,
            elapsed: begin.elapsed(),
            latencies,
        })
    }
}

impl Connection {
    fn send(&mut self, request: &[u8]) -> io::Result<()> {
        self.sent = Instant::now();
        self.stream.write_all(request)
    }

    /// Reads once. Returns whether the answer is complete.
    fn receive(&mut self, answer: &Answer, buffer: &mut [u8]) -> Result<bool, Failure> {
        let count = self.stream.read(buffer)?;
        if count == 0 {
            return Err("the server closed a connection".into());
        }
        let end = self.received + count;
        if !answer.holds(self.received, &buffer[..count]) {
            let got = buffer[..count.min(200)].escape_ascii();
            return Err(format!("a wrong answer: \"{got}\"").into());
        }
        self.received = if end == answer.bytes.len() { 0 } else { end };
        Ok(self.received == 0)
    }
}

impl Call<'_> {
    fn request(&self) -> Vec<u8> {
        let body = format!(r#"{{"in":"{}","params":{}}}"#, self.method, self.params);
        match self.http {
            false => frame(&body),
            true => format!(
                "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .into_bytes(),
        }
    }

    /// Reads one answer, which must be correct.
    fn read_answer(&self, stream: &mut TcpStream) -> Result<Answer, Failure> {
        let answer = match self.http {
            false => Answer {
                bytes: read_frame(stream)?,
                varying: 0..0,
            },
            true => read_response(stream)?,
        };
        let body = match self.http {
            false => 4,
            true => head_length(&answer.bytes).unwrap_or(0),
        };
        check(&answer.bytes[body..], self)?;
        Ok(answer)
    }
}

impl Answer {
    /// Returns whether these bytes are at `offset` in it.
    fn holds(&self, offset: usize, bytes: &[u8]) -> bool {
        let end = offset + bytes.len();
        let Some(own) = self.bytes.get(offset..end) else {
            return false;
        };
        let skipped_from = self.varying.start.clamp(offset, end) - offset;
        let skipped_to = self.varying.end.clamp(offset, end) - offset;
        own[..skipped_from] == bytes[..skipped_from] && own[skipped_to..] == bytes[skipped_to..]
    }

    fn is_like(&self, other: &Answer) -> bool {
        self.bytes.len() == other.bytes.len() && self.holds(0, &other.bytes)
    }
}

fn read_frame(stream: &mut TcpStream) -> Result<Vec<u8>, Failure> {
    let mut bytes = vec![0; 4];
    stream.read_exact(&mut bytes)?;
    let length = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    stream.take(length.into()).read_to_end(&mut bytes)?;
    if bytes.len() == 4 + length as usize {
        Ok(bytes)
    } else {
        Err("the server closed in the middle of an answer".into())
    }
}

/// Returns the length of an HTTP head including the empty line, once it is complete.
fn head_length(bytes: &[u8]) -> Option<usize> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    Some(end + 4)
}

/// Reads one HTTP response, which must have a `Content-Length`.
fn read_response(stream: &mut TcpStream) -> Result<Answer, Failure> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(length) = head_length(&bytes) {
            break length;
        }
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        bytes.push(byte[0]);
    };
    let text = String::from_utf8_lossy(&bytes).to_lowercase();
    let value = |name: &str| {
        let start = text.find(name)? + name.len();
        let length = text[start..].find("\r\n")?;
        Some(start..start + length)
    };
    let length = value("\r\ncontent-length: ").ok_or("a response without Content-Length")?;
    let length: usize = text[length].parse()?;
    let varying = value("\r\ndate: ").unwrap_or(0..0);
    bytes.resize(head + length, 0);
    stream.read_exact(&mut bytes[head..])?;
    Ok(Answer { bytes, varying })
}

/// Fails unless it is the correct answer to this call.
fn check(body: &[u8], call: &Call<'_>) -> Result<(), Failure> {
    let value: serde_json::Value = serde_json::from_slice(body)?;
    let result: serde_json::Value = serde_json::from_str(call.result)?;
    let out = match call.method {
        "ping" => "pong",
        method => method,
    };
    if value["out"] == out && value["result"] == result {
        Ok(())
    } else {
        Err(format!("not the answer to {}: {value}", call.method).into())
    }
}
