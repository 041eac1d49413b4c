//! Opens the listening sockets: binds them, takes them from the service manager, or keeps them from one
//! generation to the next.
//!
//! New ones are opened before old ones are closed, so a reload that fails here has changed nothing. Errors
//! name the address, its owner, and what to do.

use std::cell::Cell;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use nix::fcntl::{AtFlags, FcntlArg, OFlag, fcntl};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, fchownat};
use serde::{Deserialize, Serialize};

use super::owned_path::{OwnedPath, PathState};
use crate::config::{Address, ListenConfig, Settings};
use crate::error::{Error, Result};
use crate::sys::account::{Account, NamedId};
use crate::sys::notify::PassedListener;
use crate::sys::rights;
use crate::sys::socket::{self, Bound};

#[derive(Debug)]
pub struct Listener {
    /// The address in the configuration.
    pub address: Address,
    /// The name that the service manager has given, if any.
    name: Option<String>,
    /// The address that it has. Differs from `address` for port 0.
    pub bound: String,
    /// The socket, shared with the workers.
    pub fd: Rc<OwnedFd>,
    /// The backlog that was set last.
    backlog: Cell<u32>,
    /// The path of a unix socket that this master has bound. It is removed at the end.
    path: Option<OwnedPath>,
}

/// A listener in the state of an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerState {
    /// The address in the configuration.
    pub address: String,
    /// The name that the service manager has given, if any.
    pub name: Option<String>,
    pub bound: String,
    pub backlog: u32,
    /// The path that is removed at the end.
    pub path: Option<OwnedPath>,
    /// The number of its descriptor.
    pub fd: RawFd,
}

impl Listener {
    /// Returns the state for an upgrade.
    pub fn export(&self) -> ListenerState {
        ListenerState {
            address: self.address.to_string(),
            name: self.name.clone(),
            bound: self.bound.clone(),
            backlog: self.backlog.get(),
            path: self.path.clone(),
            fd: self.fd.as_raw_fd(),
        }
    }

    /// Restores a listener after an upgrade.
    ///
    /// # Errors
    /// If the descriptor is no listening socket, or the address is invalid.
    pub fn import(state: ListenerState, fd: OwnedFd) -> Result<Self> {
        let wrong = |what: &str| Error::Refused(format!("listener {}: {what}", state.address));
        if !socket::is_listening(&fd) {
            return Err(wrong("its descriptor is not a listening socket"));
        }
        // A socket of an older version still accepts descriptors.
        rights::refuse(&fd);
        Ok(Listener {
            address: state
                .address
                .parse()
                .map_err(|error: String| wrong(&error))?,
            name: state.name,
            bound: state.bound,
            fd: Rc::new(fd),
            backlog: Cell::new(state.backlog),
            path: state.path,
        })
    }

    /// Returns the number of connections in the queue, and its limit.
    pub fn queue(&self) -> (Option<u32>, u32) {
        match socket::accept_queue(&self.fd) {
            Some((queue, limit)) => (Some(queue), limit),
            None => (None, self.backlog.get()),
        }
    }

    /// Returns the state of the path of a unix socket that this master has bound.
    fn state(&self) -> PathState {
        self.path.as_ref().map_or(PathState::Ours, OwnedPath::state)
    }

    /// Sets the owner of a unix socket that this master has bound: the one in `wanted`, or else that of the
    /// workers. Without either the owner stays.
    fn set_owner(&self, wanted: &ListenConfig, workers: Option<&Account>) -> Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let id = |named: &Option<NamedId>| named.as_ref().map(|named| named.id);
        let uid = id(&wanted.socket_user).or(workers.map(|workers| workers.uid));
        let gid = id(&wanted.socket_group).or(workers.map(|workers| workers.gid));
        let set = || {
            let file = path.open_socket()?;
            let has = file.metadata()?;
            let differs = |wanted: Option<u32>, has| wanted.filter(|&wanted| wanted != has);
            let (uid, gid) = (differs(uid, has.uid()), differs(gid, has.gid()));
            if (uid, gid) == (None, None) {
                return Ok(());
            }
            let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
            fchownat(&file, "", uid, gid, AtFlags::AT_EMPTY_PATH).map_err(io::Error::from)
        };
        set().map_err(|error| {
            let remedy = match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    "start as root, or name a socket-group that this user is in and no socket-user"
                }
                _ => "",
            };
            Error::system_with(format!("set the owner of {}", self.bound), error, remedy)
        })
    }

    /// Removes the path of a unix socket. The descriptor is closed by its last owner.
    pub fn remove_path(&self) {
        if let Some(path) = &self.path {
            path.remove();
        }
    }
}

/// Options for all listeners.
pub struct SocketOptions<'a> {
    write_timeout: Duration,
    /// The account of the workers, if it is not the master's.
    workers: Option<&'a Account>,
}

impl<'a> SocketOptions<'a> {
    pub fn of(settings: &'a Settings) -> Self {
        SocketOptions {
            write_timeout: settings.limits.write_timeout,
            workers: settings.account.as_ref(),
        }
    }
}

/// Opens the listeners for `wanted`: takes those of `current` with the same address, those of `passed`, and
/// new ones. A unix socket whose path was removed is bound again; the old workers accept what is in the old
/// queue. All of `passed` are used, by name, then by address, then in order. Otherwise connections would
/// wait in a socket from which no worker accepts.
///
/// # Errors
/// If an address cannot be bound. Then the new listeners are closed.
pub fn open(
    wanted: &[ListenConfig],
    current: &[Rc<Listener>],
    passed: &[Rc<Listener>],
    options: &SocketOptions<'_>,
) -> Result<Vec<Rc<Listener>>> {
    let mut spare: Vec<&Rc<Listener>> = passed.iter().collect();
    let mut take = |fits: &dyn Fn(&Listener) -> bool| {
        let found = spare.iter().position(|has| fits(has))?;
        Some(spare.remove(found))
    };
    // First all by name, then all by address, then the rest in order.
    let mut matched: Vec<Option<&Rc<Listener>>> = wanted
        .iter()
        .map(|listen| {
            let name = listen.name.as_ref()?;
            take(&|has| has.name.as_ref() == Some(name))
        })
        .collect();
    for (listen, matched) in wanted.iter().zip(&mut matched) {
        let address = listen.address.to_string();
        *matched = matched.or_else(|| take(&|has| has.bound == address));
    }
    let mut spare = spare.into_iter();
    let mut opened: Vec<Rc<Listener>> = Vec::new();
    let mut fresh: Vec<Rc<Listener>> = Vec::new();
    for (listen, matched) in wanted.iter().zip(matched) {
        let kept = || {
            current
                .iter()
                .find(|has| has.address == listen.address && !is_in(passed, has))
        };
        let listener = match matched.or_else(|| spare.next()).or_else(kept) {
            Some(listener) => Ok(match renew(listener, listen, options) {
                None => Rc::clone(listener),
                Some(renewed) => {
                    let renewed = Rc::new(renewed);
                    fresh.push(Rc::clone(&renewed));
                    renewed
                }
            }),
            None => bind(listen, options).map(|listener| {
                let listener = Rc::new(listener);
                fresh.push(Rc::clone(&listener));
                listener
            }),
        };
        match listener {
            Ok(listener) => opened.push(listener),
            Err(mut error) => {
                fresh.iter().for_each(|listener| listener.remove_path());
                let own = current
                    .iter()
                    .find(|has| has.address.is_in_the_way_of(&listen.address));
                if let (Some(own), Error::System { source, remedy, .. }) = (own, &mut error)
                    && source.kind() == io::ErrorKind::AddrInUse
                {
                    *remedy = format!(
                        "this server listens at {} and keeps that until the new workers are ready: \
                         restart it to change from one to the other",
                        own.bound
                    );
                }
                return Err(error);
            }
        }
    }
    opened.extend(spare.map(Rc::clone));
    Ok(opened)
}

/// Binds a new socket at the path of one that was removed. A failure is only logged, because the reload
/// makes nothing worse.
fn renew(has: &Listener, listen: &ListenConfig, options: &SocketOptions<'_>) -> Option<Listener> {
    let address = &has.bound;
    let what =
        "this server listens: clients cannot reach this listener; remove that file and reload";
    if !has.path.as_ref()?.warn_if_replaced(address, what) {
        return None;
    }
    match bind(listen, options) {
        Ok(renewed) => {
            log::warn!("{address} was removed: recreated it");
            Some(renewed)
        }
        Err(error) => {
            log::warn!("{address} was removed, and recreating it failed: {error}");
            None
        }
    }
}

fn is_in(all: &[Rc<Listener>], one: &Rc<Listener>) -> bool {
    all.iter().any(|other| Rc::ptr_eq(other, one))
}

/// Makes listeners of the sockets that the service manager has passed.
///
/// # Errors
/// If one of them is no listening stream socket.
pub fn adopt_passed(passed: Vec<PassedListener>) -> Result<Vec<Rc<Listener>>> {
    passed
        .into_iter()
        .map(|PassedListener { fd, name }| {
            let refuse = |error: io::Error| {
                Error::system_with(
                    format!("take over the socket {name:?} of the service manager"),
                    error,
                    "pass listening stream sockets: ListenStream= in the socket unit, Accept=no",
                )
            };
            let not_ours = || refuse(io::Error::other("it is not a listening stream socket"));
            let address = match socket::bound_address(&fd).ok_or_else(not_ours)? {
                Bound::Tcp(address) => Address::Tcp(address),
                Bound::Unix(path) => Address::Unix(path),
            };
            if !socket::is_listening(&fd) {
                return Err(not_ours());
            }
            // Before it serves, even if its options are set later.
            rights::refuse(&fd);
            // A blocking socket would block the event loop if another worker accepts the client first.
            fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(|error| refuse(error.into()))?;
            Ok(Rc::new(Listener {
                bound: address.to_string(),
                address,
                name: Some(name),
                fd: Rc::new(fd),
                backlog: Cell::new(socket::MOST_BACKLOG),
                path: None,
            }))
        })
        .collect()
}

fn bind(listen: &ListenConfig, options: &SocketOptions<'_>) -> Result<Listener> {
    let (fd, path) = match &listen.address {
        Address::Tcp(address) => (socket::bind_tcp(*address), None),
        Address::Unix(path) => (bind_path(path, listen.mode), Some(path)),
    };
    let fd = fd.map_err(|error| refused(&listen.address, error))?;
    let listener = Listener {
        bound: bound_name(&fd, &listen.address),
        address: listen.address.clone(),
        name: None,
        fd: Rc::new(fd),
        backlog: Cell::new(listen.backlog),
        path: path.map(|path| OwnedPath::of(path)),
    };
    let listening = socket::start_listening(&listener.fd, listen.backlog)
        .map_err(|error| refused(&listen.address, error))
        .and_then(|()| set_options(&listener, options.write_timeout))
        .and_then(|()| listener.set_owner(listen, options.workers));
    if let Err(error) = listening {
        listener.remove_path();
        return Err(error);
    }
    Ok(listener)
}

/// Sets backlog, mode and options of existing listeners. A failure is logged, and the old value stays.
pub fn tune(settings: &Settings, listeners: &[Rc<Listener>]) {
    tune_all(&settings.listen, listeners, &SocketOptions::of(settings));
}

/// Sets backlog, mode and options of `listeners`. `wanted` has their configurations in the same order. A failure is
/// logged, and the old value stays.
pub fn tune_all(wanted: &[ListenConfig], listeners: &[Rc<Listener>], options: &SocketOptions<'_>) {
    for (number, listener) in listeners.iter().enumerate() {
        if let Err(error) = tune_one(listener, wanted.get(number), options) {
            log::warn!("{error}; the old value stays");
        }
    }
}

fn tune_one(
    listener: &Listener,
    wanted: Option<&ListenConfig>,
    options: &SocketOptions<'_>,
) -> Result<()> {
    set_options(listener, options.write_timeout)?;
    let Some(wanted) = wanted else {
        return Ok(());
    };
    socket::start_listening(&listener.fd, wanted.backlog)
        .map_err(|error| refused(&wanted.address, error))?;
    listener.backlog.set(wanted.backlog);
    let (Some(path), PathState::Ours) = (&listener.path, listener.state()) else {
        return Ok(());
    };
    if let Some(mode) = wanted.mode {
        // By the descriptor, because the path may lead to another file by now.
        let set = path.open_socket().and_then(|file| {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            fs::set_permissions(path, fs::Permissions::from_mode(mode))
        });
        set.map_err(|error| Error::system(format!("set the mode of {}", listener.bound), error))?;
    }
    listener.set_owner(wanted, options.workers)
}

fn set_options(listener: &Listener, write_timeout: Duration) -> Result<()> {
    if matches!(listener.address, Address::Unix(_)) {
        rights::refuse(&*listener.fd);
        return Ok(());
    }
    socket::set_tcp_options(&listener.fd, write_timeout)
        .map_err(|error| Error::system(format!("set the options of {}", listener.bound), error))
}

/// Binds a unix socket. Removes a path that a dead server has left. Call it while the pid file is locked.
pub fn bind_path(path: &Path, mode: Option<u32>) -> io::Result<OwnedFd> {
    if let Ok(found) = fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            let text = "there is a file that is not a socket; it is left alone";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        // Removes the path only if no process listens there. Otherwise it belongs to another server.
        match socket::try_unix(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path)?
            }
            _ => return Err(io::ErrorKind::AddrInUse.into()),
        }
    }
    let Some(mode) = mode else {
        return socket::bind_unix(path, 0o666);
    };
    let before = umask(Mode::empty());
    let bound = socket::bind_unix(path, mode);
    umask(before);
    bound
}

fn bound_name(fd: &OwnedFd, wanted: &Address) -> String {
    match socket::bound_address(fd) {
        Some(Bound::Tcp(address)) => address.to_string(),
        _ => wanted.to_string(),
    }
}

fn refused(address: &Address, error: io::Error) -> Error {
    let remedy = match (error.kind(), address) {
        (io::ErrorKind::AddrInUse, Address::Tcp(address)) => format!(
            "another server has it (`ss -ltnp 'sport = :{}'` says which): stop that one, or listen \
             at another address with [[listen]] or --listen",
            address.port()
        ),
        (io::ErrorKind::AddrInUse, Address::Unix(_)) => {
            "another server answers there: stop that one, or choose another path".into()
        }
        (io::ErrorKind::AddrNotAvailable, _) => {
            "no interface of this machine has that address".into()
        }
        (io::ErrorKind::PermissionDenied, Address::Tcp(address)) if address.port() < 1024 => {
            "ports below 1024 need root, CAP_NET_BIND_SERVICE or a socket unit".into()
        }
        (io::ErrorKind::PermissionDenied, _) => "choose a path that this user may write".into(),
        (io::ErrorKind::NotFound, _) => "create the directory first".into(),
        (io::ErrorKind::AlreadyExists, _) => "remove it, or choose another path".into(),
        _ => String::new(),
    };
    Error::system_with(format!("listen at {address}"), error, remedy)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn listen(address: &str) -> ListenConfig {
        ListenConfig {
            backlog: 16,
            ..ListenConfig::at(address.parse().unwrap())
        }
    }

    const OPTIONS: SocketOptions<'_> = SocketOptions {
        write_timeout: Duration::from_secs(30),
        workers: None,
    };

    #[test]
    fn a_listener_is_kept_as_long_as_its_address_is_wanted() {
        let first = open(&[listen("127.0.0.1:0")], &[], &[], &OPTIONS).unwrap();
        let wanted = [listen("127.0.0.1:0"), listen("[::1]:0")];
        let second = open(&wanted, &first, &[], &OPTIONS).unwrap();
        assert!(Rc::ptr_eq(&first[0], &second[0]));
        assert_eq!(second.len(), 2);
        assert_eq!(second[0].queue(), (Some(0), 16));
    }

    #[test]
    fn passed_listeners_are_matched_by_name_by_address_then_in_order_and_none_is_left_out() {
        let pass = |name: &str| {
            let fd = socket::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
            socket::start_listening(&fd, 8).unwrap();
            let name = name.to_owned();
            PassedListener { fd, name }
        };
        let passed = adopt_passed(vec![pass("a"), pass("b"), pass("c"), pass("rpc")]).unwrap();
        let named = ListenConfig {
            name: Some("rpc".into()),
            ..listen("127.0.0.1:8081")
        };
        let wanted = [listen("127.0.0.1:8080"), listen(&passed[0].bound), named];
        let opened = open(&wanted, &[], &passed, &OPTIONS).unwrap();
        let order: Vec<usize> = opened
            .iter()
            .map(|one| {
                passed
                    .iter()
                    .position(|other| Rc::ptr_eq(one, other))
                    .unwrap()
            })
            .collect();
        assert_eq!(order, [1, 0, 3, 2]);
    }

    #[test]
    fn an_address_in_use_is_named_with_its_remedy() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let error = open(&[listen(&address)], &[], &[], &OPTIONS).unwrap_err();
        assert_eq!(error.exit_code(), 71);
        let text = error.to_string();
        assert!(
            text.contains(&address) && text.contains("another server"),
            "{text}"
        );
    }

    #[test]
    fn a_link_that_another_user_puts_in_a_sockets_place_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rpc.sock");
        let wanted = ListenConfig {
            mode: Some(0o666),
            socket_user: Some(crate::sys::account::lookup_user("54321").unwrap()),
            ..listen(&format!("unix:{}", path.display()))
        };
        let unowned = ListenConfig {
            socket_user: None,
            ..wanted.clone()
        };
        let listener = bind(&unowned, &OPTIONS).unwrap();
        let secret = directory.path().join("secret");
        fs::write(&secret, "").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&secret, &path).unwrap();
        tune_one(&listener, Some(&wanted), &OPTIONS).unwrap();
        listener.set_owner(&wanted, None).unwrap_err();
        let found = fs::metadata(&secret).unwrap();
        let own = crate::sys::account::effective_ids().0;
        assert_eq!((found.mode() & 0o777, found.uid()), (0o600, own));
    }

    #[test]
    fn a_stale_path_is_replaced_and_a_file_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rpc.sock");
        drop(socket::bind_unix(&path, 0o600).unwrap());
        let fd = bind_path(&path, Some(0o660)).unwrap();
        socket::start_listening(&fd, 8).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o660
        );
        let in_use = bind_path(&path, None).unwrap_err();
        assert_eq!(in_use.kind(), io::ErrorKind::AddrInUse);
        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert_eq!(
            bind_path(&file, None).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    }

    /// The kernel gives the path the mode of the socket. Changed later by path, it could be that of another file.
    #[test]
    fn a_socket_has_its_mode_before_it_has_a_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rpc.sock");
        let fd = bind_path(&path, Some(0o606)).unwrap();
        let of_path = fs::metadata(&path).unwrap().mode();
        let of_socket = fs::File::from(fd).metadata().unwrap().mode();
        assert_eq!((of_path & 0o777, of_socket & 0o777), (0o606, 0o606));
    }
}
