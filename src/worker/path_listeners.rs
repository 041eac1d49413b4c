//! Holds the listeners where an HTTP request must name its method in the path.
//!
//! A connection is identified by its local address, so this also works for one that another worker has
//! accepted. Without such listeners, which is the default, it costs nothing. It never fails: a connection
//! with an unknown address counts as one of them.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use crate::config::{HttpMethods, ListenConfig};
use crate::sys::socket::{self, Bound};

/// The addresses of these listeners.
#[derive(Debug, Default)]
pub struct PathListeners(Vec<Option<Bound>>);

impl PathListeners {
    /// Selects them from the listeners `configured`, whose sockets have the same order.
    pub fn of<'a>(
        configured: impl Iterator<Item = &'a ListenConfig>,
        sockets: &[Rc<OwnedFd>],
    ) -> Self {
        let listeners = configured.zip(sockets);
        let listeners = listeners.filter(|(listen, _)| listen.http_methods == HttpMethods::Path);
        PathListeners(listeners.map(|(_, fd)| socket::bound_address(fd)).collect())
    }

    /// Returns whether a connection was made to one of them.
    #[inline]
    pub fn contain(&self, connection: &impl AsFd) -> bool {
        !self.0.is_empty() && self.has_address_of(connection)
    }

    #[cold]
    fn has_address_of(&self, connection: &impl AsFd) -> bool {
        let Some(own) = socket::bound_address(connection) else {
            return true;
        };
        let mut listeners = self.0.iter();
        listeners.any(|listener| is_listener_of(listener.as_ref(), &own))
    }
}

/// Returns whether a connection with the local address `own` may have been made to a listener. `None` is one
/// whose address is unknown.
pub(super) fn is_listener_of(listener: Option<&Bound>, own: &Bound) -> bool {
    match (listener, own) {
        (Some(Bound::Tcp(listener)), Bound::Tcp(own)) => {
            let is_any = listener.ip().is_unspecified();
            listener.port() == own.port() && (is_any || listener.ip() == own.ip())
        }
        (Some(listener), own) => listener == own,
        (None, _) => true,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::config::Address;

    #[test]
    fn a_connection_is_identified_by_its_local_address() {
        let fds = ["127.0.0.1:0", "0.0.0.0:0", "127.0.0.1:0"]
            .map(|address| Rc::new(OwnedFd::from(TcpListener::bind(address).unwrap())));
        let kinds = [HttpMethods::Path, HttpMethods::Path, HttpMethods::Any];
        let configured = kinds.map(|http_methods| ListenConfig {
            address: Address::Tcp("127.0.0.1:0".parse().unwrap()),
            name: None,
            backlog: 1,
            mode: None,
            socket_user: None,
            socket_group: None,
            http_methods,
            per_source: 0,
            isolation: None,
        });
        let listeners = PathListeners::of(configured.iter(), &fds);
        let is_known = |fd: &Rc<OwnedFd>, host: [u8; 4]| {
            let Some(Bound::Tcp(address)) = socket::bound_address(fd) else {
                panic!("no TCP address");
            };
            let _client =
                TcpStream::connect((std::net::IpAddr::from(host), address.port())).unwrap();
            let listener = TcpListener::from(fd.try_clone().unwrap());
            listeners.contain(&listener.accept().unwrap().0)
        };
        assert!(is_known(&fds[0], [127, 0, 0, 1]));
        assert!(is_known(&fds[1], [127, 0, 0, 7]));
        assert!(!is_known(&fds[2], [127, 0, 0, 1]));
        assert!(!PathListeners::default().contain(&fds[0]));
    }
}
