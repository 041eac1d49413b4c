//! Decides whether an HTTP request must name its method in the path.
//!
//! The listener of a connection is found by the local address, so this also works for a connection that another
//! worker has accepted. If no listener has that address, because a reload has removed or isolated it, the rule of the
//! previous worker holds. If no listener has this rule, which is the default, there is no cost. Nothing here fails: a
//! connection with an unknown address needs a path.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use crate::config::{HttpMethods, ListenConfig};
use crate::sys::socket::{self, Bound};

/// The addresses of the listeners, by their rule.
#[derive(Debug, Default)]
pub struct PathListeners {
    with_path: Vec<Option<Bound>>,
    others: Vec<Option<Bound>>,
}

impl PathListeners {
    /// Selects the listeners whose requests need a path. `sockets` has the sockets of the listeners `configured`, in
    /// the same order.
    pub fn of<'a>(
        configured: impl Iterator<Item = &'a ListenConfig>,
        sockets: &[Rc<OwnedFd>],
    ) -> Self {
        let mut all = PathListeners::default();
        for (listen, socket) in configured.zip(sockets) {
            match listen.http_methods {
                HttpMethods::Path => &mut all.with_path,
                HttpMethods::Any => &mut all.others,
            }
            .push(socket::bound_address(socket));
        }
        all
    }

    /// Returns whether a connection needs a path. `was_required` says whether the previous worker has required it.
    #[inline]
    pub fn require_path(&self, connection: &impl AsFd, was_required: bool) -> bool {
        (was_required || !self.with_path.is_empty()) && self.find(connection, was_required)
    }

    #[cold]
    fn find(&self, connection: &impl AsFd, was_required: bool) -> bool {
        let Some(own) = socket::bound_address(connection) else {
            return true;
        };
        let is_its = |listener: &Option<Bound>| is_listener_of(listener.as_ref(), &own);
        let is_certain = |listener: &Option<Bound>| listener.is_some() && is_its(listener);
        self.with_path.iter().any(is_its) || was_required && !self.others.iter().any(is_certain)
    }
}

/// Returns whether a connection with the local address `own` may have been made to `listener`. `None` is a listener
/// with an unknown address.
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
        // The last one is not configured any more.
        let fds = ["127.0.0.1:0", "0.0.0.0:0", "127.0.0.1:0", "127.0.0.1:0"]
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
        let requires = |fd: &Rc<OwnedFd>, host: [u8; 4]| {
            let Some(Bound::Tcp(address)) = socket::bound_address(fd) else {
                panic!("no TCP address");
            };
            let _client =
                TcpStream::connect((std::net::IpAddr::from(host), address.port())).unwrap();
            let listener = TcpListener::from(fd.try_clone().unwrap());
            let connection = listener.accept().unwrap().0;
            [false, true].map(|was_required| listeners.require_path(&connection, was_required))
        };
        assert_eq!(requires(&fds[0], [127, 0, 0, 1]), [true, true]);
        assert_eq!(requires(&fds[1], [127, 0, 0, 7]), [true, true]);
        assert_eq!(requires(&fds[2], [127, 0, 0, 1]), [false, false]);
        assert_eq!(requires(&fds[3], [127, 0, 0, 1]), [false, true]);
        assert!(!PathListeners::default().require_path(&fds[0], false));
    }
}
