//! Finds connections that a worker had accepted but not recorded when it died. Between accept4(2) and the
//! I/O record there is a short time in which only the descriptor table has such a connection.

#![allow(unsafe_code)]

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;

use crate::sys::clone_files;
use crate::sys::socket::{self, Bound};

/// Returns the addresses of the listeners. Call it before their numbers can be reused.
pub fn addresses(listeners: &[Rc<OwnedFd>]) -> Vec<Bound> {
    let bound = listeners.iter().map(|fd| socket::bound_address(&**fd));
    bound.flatten().collect()
}

/// Returns the connected sockets of these listeners that are not among the `known` ones.
pub fn find(addresses: &[Bound], known: &[RawFd]) -> Vec<RawFd> {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return Vec::new();
    };
    let numbers = entries.flatten().filter_map(|entry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        (!known.contains(&number)).then_some(number)
    });
    // Read all first, because the directory itself is open meanwhile.
    let numbers: Vec<RawFd> = numbers.collect();
    let is_client = |number: &RawFd| {
        let look = |fd: BorrowedFd<'_>| is_client_of(fd, addresses);
        // SAFETY: the worker that could close it has ended, and the keeper has one thread.
        unsafe { clone_files::borrow_fd(*number, look) }.unwrap_or(false)
    };
    numbers.into_iter().filter(is_client).collect()
}

fn is_client_of(fd: BorrowedFd<'_>, addresses: &[Bound]) -> bool {
    let here = |bound: &Bound| match (bound, socket::bound_address(&fd)) {
        // A listener on all addresses of the machine has clients at each of them.
        (Bound::Tcp(listener), Some(Bound::Tcp(client))) => {
            listener.port() == client.port()
                && (listener.ip() == client.ip() || listener.ip().is_unspecified())
        }
        (Bound::Unix(listener), Some(Bound::Unix(client))) => *listener == client,
        _ => false,
    };
    socket::is_connected(&fd.as_fd()) && addresses.iter().any(here)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    #[test]
    fn only_accepted_sockets_are_found() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (one, _) = listener.accept().unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (two, _) = listener.accept().unwrap();
        let listeners = [Rc::new(OwnedFd::from(listener))];
        let found = find(&addresses(&listeners), &[one.as_raw_fd()]);
        assert_eq!(found, [two.as_raw_fd()]);
        drop((client, other));
    }
}
