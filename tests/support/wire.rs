//! Sends and receives bytes on a connection, for tests of the dialects: lines, HTTP, and other bytes.
//!
//! Like `Client` it knows nothing of the crate, and every read has a deadline.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::ops::Range;

use serde_json::Value;

use super::client::frame;
use super::{Daemon, PATIENCE};

/// How a body is encoded on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    Frame,
    Line,
    Http,
}

pub const DIALECTS: [Dialect; 3] = [Dialect::Frame, Dialect::Line, Dialect::Http];

/// A connection, and the received bytes that were not consumed.
pub struct Wire {
    stream: TcpStream,
    inbox: Vec<u8>,
}

/// An HTTP response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    /// All lines of the head except the first, in lower case.
    pub headers: Vec<String>,
    pub body: String,
}

impl Response {
    /// Returns the body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Returns whether the connection ends with it.
    pub fn closes(&self) -> bool {
        self.headers.iter().any(|line| line == "connection: close")
    }
}

impl Wire {
    #[track_caller]
    pub fn open(address: SocketAddr) -> Self {
        Self::try_open(address).unwrap()
    }

    /// Does the same for a server that may not run.
    pub fn try_open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Wire {
            stream,
            inbox: Vec::new(),
        })
    }

    /// Returns the client's port; 0 if it is no longer known.
    pub fn port(&self) -> u16 {
        self.stream.local_addr().map_or(0, |own| own.port())
    }

    #[track_caller]
    pub fn to(daemon: &Daemon) -> Self {
        Self::open(daemon.address())
    }

    /// Returns the same connection for a thread that only sends.
    #[track_caller]
    pub fn twin(&self) -> Self {
        Wire {
            stream: self.stream.try_clone().unwrap(),
            inbox: Vec::new(),
        }
    }

    /// Returns whether the server has closed the connection, without waiting.
    #[track_caller]
    pub fn is_closed(&self) -> bool {
        self.stream.set_nonblocking(true).unwrap();
        let peeked = self.stream.peek(&mut [0]);
        self.stream.set_nonblocking(false).unwrap();
        match peeked {
            Ok(count) => count == 0,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        }
    }

    /// Sends bytes as they are. A server that has refused earlier bytes may have closed the connection.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        let _ = self.stream.write_all(bytes.as_ref());
        self
    }

    /// Ends the sending direction.
    pub fn half_close(&mut self) -> &mut Self {
        let _ = self.stream.shutdown(Shutdown::Write);
        self
    }

    /// Receives more bytes; returns false at the end.
    #[track_caller]
    fn more(&mut self) -> bool {
        let mut buffer = [0; 16 << 10];
        match self.stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(count) => {
                self.inbox.extend_from_slice(&buffer[..count]);
                true
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!(
                "nothing in {PATIENCE:?}: {error}; so far: {:?}",
                self.text()
            ),
        }
    }

    fn text(&self) -> String {
        self.inbox.escape_ascii().to_string()
    }

    #[track_caller]
    fn need(&mut self, count: usize) {
        while self.inbox.len() < count {
            assert!(self.more(), "ended early: {:?}", self.text());
        }
    }

    /// Returns all bytes until the server closes the connection.
    #[track_caller]
    pub fn rest(&mut self) -> Vec<u8> {
        while self.more() {}
        std::mem::take(&mut self.inbox)
    }

    /// Receives the next line, without its line feed.
    #[track_caller]
    pub fn line(&mut self) -> String {
        loop {
            if let Some(end) = self.inbox.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.inbox.drain(..=end).collect();
                return String::from_utf8(line[..end].to_vec()).unwrap();
            }
            assert!(self.more(), "no line, but: {:?}", self.text());
        }
    }

    /// Receives the body of the next frame.
    #[track_caller]
    pub fn frame(&mut self) -> String {
        self.need(4);
        let length = u32::from_le_bytes(self.inbox[..4].try_into().unwrap()) as usize;
        self.need(4 + length);
        let frame: Vec<u8> = self.inbox.drain(..4 + length).collect();
        String::from_utf8(frame[4..].to_vec()).unwrap()
    }

    /// Receives the next response to a method other than HEAD.
    #[track_caller]
    pub fn response(&mut self) -> Response {
        let mut response = self.head();
        let length = response
            .headers
            .iter()
            .find_map(|line| line.strip_prefix("content-length: "))
            .map_or(0, |length| length.parse().unwrap());
        self.need(length);
        let body: Vec<u8> = self.inbox.drain(..length).collect();
        response.body = String::from_utf8(body).unwrap();
        response
    }

    /// Receives the head of the next response.
    #[track_caller]
    pub fn head(&mut self) -> Response {
        let end = loop {
            let found = self.inbox.windows(4).position(|bytes| bytes == b"\r\n\r\n");
            match found {
                Some(end) => break end,
                None => assert!(self.more(), "no response, but: {:?}", self.text()),
            }
        };
        let head: Vec<u8> = self.inbox.drain(..end + 4).collect();
        let head = String::from_utf8(head[..end].to_vec()).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap();
        Response {
            status: status
                .strip_prefix("HTTP/1.1 ")
                .and_then(|rest| rest.split(' ').next()?.parse().ok())
                .unwrap_or_else(|| panic!("no status line: {status}")),
            headers: lines.map(str::to_ascii_lowercase).collect(),
            body: String::new(),
        }
    }

    /// Sends a body in a dialect.
    pub fn ask(&mut self, dialect: Dialect, body: &str) -> &mut Self {
        match dialect {
            Dialect::Frame => self.send(frame(body.as_bytes())),
            Dialect::Line => self.send(format!("{}\n", body.replace('\n', " "))),
            Dialect::Http => self.send(post("/", body)),
        }
    }

    /// Receives the next answer in a dialect; `None` for an HTTP response without content.
    #[track_caller]
    pub fn answer(&mut self, dialect: Dialect) -> Option<String> {
        match dialect {
            Dialect::Frame => Some(self.frame()),
            Dialect::Line => Some(self.line()),
            Dialect::Http => {
                let response = self.response();
                (response.status != 204).then_some(response.body)
            }
        }
    }
}

impl Wire {
    /// Receives the body of the next answer, if the server may close the connection or send nothing.
    pub fn try_answer(&mut self, dialect: Dialect) -> io::Result<String> {
        let (body, end) = loop {
            if let Some(found) = whole(dialect, &self.inbox)? {
                break found;
            }
            let mut buffer = [0; 16 << 10];
            match self.stream.read(&mut buffer)? {
                0 => {
                    let end = format!("ended after {:?}", self.text());
                    return Err(io::Error::new(ErrorKind::UnexpectedEof, end));
                }
                count => self.inbox.extend_from_slice(&buffer[..count]),
            }
        };
        let text = String::from_utf8_lossy(&self.inbox[body]).into_owned();
        self.inbox.drain(..end);
        Ok(text)
    }
}

/// Returns the position of the first complete answer's body, and where the answer ends.
fn whole(dialect: Dialect, bytes: &[u8]) -> io::Result<Option<(Range<usize>, usize)>> {
    Ok(match dialect {
        Dialect::Frame => bytes.first_chunk().and_then(|length| {
            let end = 4 + u32::from_le_bytes(*length) as usize;
            (bytes.len() >= end).then_some((4..end, end))
        }),
        Dialect::Line => {
            let end = bytes.iter().position(|byte| *byte == b'\n');
            end.map(|end| (0..end, end + 1))
        }
        Dialect::Http => {
            let Some(head) = bytes.windows(4).position(|it| it == b"\r\n\r\n") else {
                return Ok(None);
            };
            let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
            let length = text
                .lines()
                .find_map(|it| it.strip_prefix("content-length: "));
            let length: usize = length
                .and_then(|length| length.parse().ok())
                .ok_or_else(|| io::Error::other(format!("no length: {text}")))?;
            let end = head + 4 + length;
            (bytes.len() >= end).then_some((head + 4..end, end))
        }
    })
}

/// Returns a request with this body.
pub fn post(target: &str, body: &str) -> String {
    format!(
        "POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}
