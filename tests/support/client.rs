//! A blocking client of the frame dialect, written from the protocol alone.
//!
//! Every read has a deadline, so that a server that falls silent fails a test and hangs none.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;

use super::PATIENCE;

/// A connection.
pub struct Client {
    stream: TcpStream,
}

impl Client {
    /// Over TCP.
    #[track_caller]
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
        stream.set_nodelay(true).unwrap();
        Self::over(stream)
    }

    /// Over a unix socket. The type of the stream says TCP; what is used of it are calls that
    /// every stream socket knows.
    #[track_caller]
    pub fn connect_unix(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        Self::over(TcpStream::from(OwnedFd::from(stream)))
    }

    /// Over a connection that stands.
    #[track_caller]
    pub fn over(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Client { stream }
    }

    /// The same connection once more, for a thread that writes while this one reads.
    pub fn second(&self) -> Self {
        Client {
            stream: self.stream.try_clone().unwrap(),
        }
    }

    /// One call, and the answer that comes next.
    #[track_caller]
    pub fn call(&mut self, call: &Value) -> Value {
        let answer = self.call_text(&call.to_string());
        serde_json::from_str(&answer).unwrap()
    }

    /// One call as it is spelt, and the next answer as it is spelt: for what must pass to the
    /// letter.
    #[track_caller]
    pub fn call_text(&mut self, call: &str) -> String {
        self.send(call);
        self.recv_text()
    }

    /// Sends one frame with this body, in one write.
    #[track_caller]
    pub fn send(&mut self, body: &str) {
        self.send_raw(&frame(body.as_bytes()));
    }

    /// Sends a frame with each of these bodies, all in one write: the server sees no pause in between.
    #[track_caller]
    pub fn send_together(&mut self, bodies: impl IntoIterator<Item = Value>) {
        let frames = bodies
            .into_iter()
            .flat_map(|body| frame(body.to_string().as_bytes()));
        self.send_raw(&frames.collect::<Vec<u8>>());
    }

    /// Sends one frame with this body, if the connection takes it.
    pub fn try_send(&mut self, body: &str) -> io::Result<()> {
        self.stream.write_all(&frame(body.as_bytes()))
    }

    /// Sends bytes as they are.
    #[track_caller]
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The same, where the server may have ended the connection meanwhile.
    pub fn try_send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The body of the next frame; an error at the end of the stream and after 20 s of silence.
    pub fn recv(&mut self) -> io::Result<Vec<u8>> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length);
        let mut body = Vec::new();
        // by the bytes that come, not by the length that is declared
        (&self.stream).take(length.into()).read_to_end(&mut body)?;
        if body.len() < length as usize {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(body)
    }

    /// The body of the next frame as text.
    #[track_caller]
    pub fn recv_text(&mut self) -> String {
        let body = self
            .recv()
            .unwrap_or_else(|error| panic!("no answer: {error}"));
        String::from_utf8(body).unwrap()
    }

    /// The body of the next frame as JSON.
    #[track_caller]
    pub fn recv_json(&mut self) -> Value {
        serde_json::from_str(&self.recv_text()).unwrap()
    }

    /// Asserts that the server closes without another byte (by a reset, or in order).
    #[track_caller]
    pub fn assert_closed(&mut self) {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            // a read with a deadline is not taken up again after a signal (signal(7))
            Err(error) if error.kind() == io::ErrorKind::Interrupted => self.assert_closed(),
            other => panic!("the connection should be closed, but: {other:?} {byte:?}"),
        }
    }

    /// Ends with a reset in place of a FIN: what the peer has not read is lost to it.
    pub fn reset(self) {
        let at_once = nix::libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&self.stream, sockopt::Linger, &at_once).unwrap();
    }

    /// All bodies that come until the server ends the connection, by a reset or in order.
    #[track_caller]
    pub fn recv_all(&mut self) -> Vec<Vec<u8>> {
        let mut bodies = Vec::new();
        loop {
            match self.recv() {
                Ok(body) => bodies.push(body),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    panic!("after {} answers the end does not come", bodies.len())
                }
                Err(_) => return bodies,
            }
        }
    }

    /// Says that nothing more will be sent; answers are still read.
    pub fn half_close(&self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    /// The connection itself, for its options.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }
}

/// A frame with this body.
pub fn frame(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend_from_slice(body);
    frame
}
