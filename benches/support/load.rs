//! A closed-loop load: C connections, one outstanding call each, one thread.
//!
//! Every byte of every answer is compared with the first answer, which is read as JSON. It must
//! not be the bottleneck, so a call costs it one write, one read and a share of an epoll_wait, as it
//! costs the bare server.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::Failure;

/// How long any one answer may take before the run has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// When a run is over. What is outstanding then is still waited for and counted.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// After so many calls.
    Calls(u64),
    /// After this time.
    Elapsed(Duration),
}

/// What a run saw.
pub struct Outcome {
    /// Calls that were answered, each correctly.
    pub calls: u64,
    /// From the first call's sending to the last answer.
    pub elapsed: Duration,
    /// How long each took, in nanoseconds.
    pub latencies: Histogram<u64>,
}

/// Open connections to one server, at rest between runs.
pub struct Load {
    connections: Vec<Connection>,
    epoll: Epoll,
    request: Vec<u8>,
    answer: Answer,
}

/// What a load calls. Params and result are JSON.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// The method.
    pub method: &'a str,
    /// The params of each call.
    pub params: &'a str,
    /// The result of each call.
    pub result: &'a str,
    /// Whether it is a request in HTTP instead of a frame.
    pub http: bool,
}

/// The answer that every call gets, length or head included.
struct Answer {
    bytes: Vec<u8>,
    /// Bytes of it that are not compared: the value of a `Date` header, which changes.
    varying: Range<usize>,
}

struct Connection {
    stream: TcpStream,
    sent: Instant,
    /// How much of the answer has come; 0 also when none is outstanding.
    received: usize,
}

/// A frame with this body.
pub fn frame(body: &str) -> Vec<u8> {
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(body.as_bytes());
    bytes
}

impl Load {
    /// Opens so many connections, and makes one call on each of them in turn, so that every one has
    /// been accepted. `params` is JSON.
    pub fn open(address: SocketAddr, count: usize, params: &str) -> Result<Self, Failure> {
        Self::of(address, count, "ping", params)
    }

    /// Likewise, with a method that answers its params.
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

    /// Likewise, with any call.
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

    /// The answer that every call gets, length and body.
    pub fn answer(&self) -> &[u8] {
        &self.answer.bytes
    }

    /// Calls on all connections until it is over; an answer that is wrong or missing is a failure.
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

    /// Reads once; whether the answer is whole now.
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

    /// Reads one answer, which has to be the right one.
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
    /// Returns whether these bytes stand at `offset` in it.
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

/// The length of an HTTP head with the empty line at its end, once all of it is there.
fn head_length(bytes: &[u8]) -> Option<usize> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    Some(end + 4)
}

/// Reads one HTTP response, which has to have a `Content-Length`.
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

/// Fails unless it is the answer to such a call.
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
