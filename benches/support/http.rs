//! A client for HTTP that makes a new connection when the server has closed the last one, as gunicorn's
//! sync workers do after each answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::Failure;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// At most one connection to a server.
pub struct HttpClient {
    address: SocketAddr,
    stream: Option<BufReader<TcpStream>>,
}

impl HttpClient {
    /// Without a connection.
    pub fn new(address: SocketAddr) -> Self {
        HttpClient {
            address,
            stream: None,
        }
    }

    /// Connects, unless it is connected.
    pub fn connect(&mut self) -> Result<&mut BufReader<TcpStream>, Failure> {
        let stream = match self.stream.take() {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.address)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                BufReader::new(stream)
            }
        };
        Ok(self.stream.insert(stream))
    }

    /// The next call makes a new connection.
    pub fn disconnect(&mut self) {
        self.stream = None;
    }

    /// Calls a method, and returns its result.
    pub fn call(&mut self, method: &str, params: &str) -> Result<String, Failure> {
        self.request(&format!(
            "POST /{method} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{params}",
            params.len()
        ))
    }

    /// Gets a page.
    pub fn get(&mut self, path: &str) -> Result<String, Failure> {
        self.request(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    }

    /// Sends a request, and returns the body of its answer.
    fn request(&mut self, request: &str) -> Result<String, Failure> {
        let stream = self.connect()?;
        stream.get_mut().write_all(request.as_bytes())?;
        let (mut length, mut closes, mut line) = (0, false, String::new());
        stream.read_line(&mut line)?;
        let is_ok = line.starts_with("HTTP/1.1 200 ");
        let status = line.trim_end().to_owned();
        loop {
            line.clear();
            if stream.read_line(&mut line)? == 0 {
                return Err(format!("no whole answer: {status:?}").into());
            }
            let header = line.trim_end().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
            closes |= header == "connection: close";
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body)?;
        if closes {
            self.disconnect();
        }
        let body = String::from_utf8(body)?;
        match is_ok {
            true => Ok(body),
            false => Err(format!("{status}: {body}").into()),
        }
    }
}
