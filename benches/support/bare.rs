//! Runs a minimal prefork epoll server, the reference for the CPU time of a call.
//!
//! It has one shared listener and N forked workers, each with its own level-triggered epoll. A call costs one read(2)
//! and one write(2). Calls are not parsed: the bytes of one read count as one frame. So a client must have only one
//! small call outstanding per connection. No timeouts, no limits, no buffers. It uses the same kernel interfaces as
//! nginx and does less than any useful server.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::socket::{self, SockFlag, sockopt};
use nix::unistd::{ForkResult, close, fork, getppid, pause, read, write};

use super::Failure;

/// The params for which the bare server's answer is correct.
pub const PARAMS: &str = "\"hello\"";

/// The body of its only answer, with as many bytes as preforkd's.
pub const PONG: &str = r#"{"out":"pong","result":"hello"}"#;

/// After this many accepts a worker removes the listener from its epoll and adds it again, which puts it
/// at the end of the listener's queue of waiters. Otherwise the first worker would get nearly all
/// connections.
const ACCEPTS_A_TURN: u32 = 4;

/// The listener's value in the epoll data; connections have their descriptor there.
const LISTENER: u64 = u64::MAX;

/// Serves with `workers` workers until a signal ends it; the workers end with it.
pub fn serve(address: SocketAddr, workers: usize, answer: &[u8]) -> Result<(), Failure> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let master = nix::unistd::getpid();
    for _ in 0..workers {
        // SAFETY: this process has one thread, so the child may do whatever the parent may.
        match unsafe { fork() }? {
            ForkResult::Parent { .. } => {}
            ForkResult::Child => {
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                if getppid() != master {
                    return Ok(());
                }
                return Ok(work(&listener, answer)?);
            }
        }
    }
    sd_notify::notify(&[sd_notify::NotifyState::Ready])?;
    loop {
        pause();
    }
}

fn work(listener: &TcpListener, answer: &[u8]) -> nix::Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let listening = || EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE, LISTENER);
    epoll.add(listener, listening())?;
    let mut accepts = 0;
    let mut events = [EpollEvent::empty(); 512];
    let mut buffer = [0; 64 << 10];
    loop {
        let count = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            count => count?,
        };
        for event in &events[..count] {
            if event.data() != LISTENER {
                answer_one(event.data() as RawFd, &mut buffer, answer);
                continue;
            }
            if accept(listener, &epoll)? {
                accepts += 1;
                if accepts % ACCEPTS_A_TURN == 0 {
                    epoll.delete(listener)?;
                    epoll.add(listener, listening())?;
                }
            }
        }
    }
}

/// Accepts one connection, unless another worker was faster.
fn accept(listener: &TcpListener, epoll: &Epoll) -> nix::Result<bool> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = match socket::accept4(listener.as_raw_fd(), flags) {
        Err(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => return Ok(false),
        fd => fd?,
    };
    // SAFETY: accept4 has just returned it, and only `answer_one` closes it.
    let connection = unsafe { BorrowedFd::borrow_raw(fd) };
    socket::setsockopt(&connection, sockopt::TcpNoDelay, &true)?;
    epoll.add(connection, EpollEvent::new(EpollFlags::EPOLLIN, fd as u64))?;
    Ok(true)
}

/// Handles one call: reads everything that is there and writes the answer.
fn answer_one(fd: RawFd, buffer: &mut [u8], answer: &[u8]) {
    // SAFETY: the descriptor is in the epoll until it is closed below.
    let connection = unsafe { BorrowedFd::borrow_raw(fd) };
    let served = match read(connection, buffer) {
        Ok(0) => false,
        Ok(_) => write(connection, answer) == Ok(answer.len()),
        Err(Errno::EAGAIN | Errno::EINTR) => true,
        Err(_) => false,
    };
    if !served {
        let _ = close(fd);
    }
}
