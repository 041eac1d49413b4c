//! A blocking client of the frame dialect, written from the protocol alone.
//!
//! Every read has a deadline, so that a silent server fails a test and does not block it.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use serde_json::Value;

use super::PATIENCE;

/// A connection.
pub struct Client {
    stream: TcpStream,
}

impl Client {
    /// Connects over TCP.
    #[track_caller]
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
        stream.set_nodelay(true).unwrap();
        Self::over(stream)
    }

    /// Over TCP, from an address of this machine (127.0.0.0/8).
    #[track_caller]
    pub fn connect_from(source: Ipv4Addr, address: SocketAddr) -> Self {
        Self::try_connect_from(source, address).unwrap()
    }

    /// Connects like `connect_from`. Returns an error if it cannot connect.
    pub fn try_connect_from(source: Ipv4Addr, address: SocketAddr) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
        bind(
            socket.as_raw_fd(),
            &SockaddrStorage::from(SocketAddr::from((source, 0))),
        )?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true)?;
        Ok(Self::over(stream))
    }

    /// Connects to a unix socket. The stream has the type of a TCP stream, but only system calls that work on every
    /// stream socket are used.
    #[track_caller]
    pub fn connect_unix(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        Self::over(TcpStream::from(OwnedFd::from(stream)))
    }

    /// Uses an open connection.
    #[track_caller]
    pub fn over(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Client { stream }
    }

    /// Returns the same connection for a thread that writes while this one reads.
    pub fn second(&self) -> Self {
        Client {
            stream: self.stream.try_clone().unwrap(),
        }
    }

    /// Sends one call and returns the next answer.
    #[track_caller]
    pub fn call(&mut self, call: &Value) -> Value {
        let answer = self.call_text(&call.to_string());
        serde_json::from_str(&answer).unwrap()
    }

    /// Sends one call as it is spelt and returns the next answer as it is spelt, to compare them byte for
    /// byte.
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

    /// Sends a frame with each of these bodies in one write, so that the server sees no pause between
    /// them.
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

    /// Does the same if the server may have closed the connection meanwhile.
    pub fn try_send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Receives the body of the next frame. Fails at the end of the stream and after 20 s of silence.
    pub fn recv(&mut self) -> io::Result<Vec<u8>> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length);
        let mut body = Vec::new();
        // Read by the received bytes, not by the declared length.
        (&self.stream).take(length.into()).read_to_end(&mut body)?;
        if body.len() < length as usize {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(body)
    }

    /// Receives the body of the next frame as text.
    #[track_caller]
    pub fn recv_text(&mut self) -> String {
        let body = self
            .recv()
            .unwrap_or_else(|error| panic!("no answer: {error}"));
        String::from_utf8(body).unwrap()
    }

    /// Receives the body of the next frame as JSON.
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
            // A read with a deadline is not restarted after a signal (signal(7)).
            Err(error) if error.kind() == io::ErrorKind::Interrupted => self.assert_closed(),
            other => panic!("the connection should be closed, but: {other:?} {byte:?}"),
        }
    }

    /// Closes with a reset instead of a FIN, so the peer loses what it has not read.
    pub fn reset(self) {
        let at_once = nix::libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&self.stream, sockopt::Linger, &at_once).unwrap();
    }

    /// Returns all bodies until the server closes the connection, with or without a reset.
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

    /// Ends the sending direction; answers are still read.
    pub fn half_close(&self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    /// Returns the connection itself, to set its options.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }
}

/// Returns a frame with this body.
pub fn frame(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend_from_slice(body);
    frame
}
