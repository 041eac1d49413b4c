//! Accepting: shared listeners, and a fair share of what comes.

#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{SockFlag, accept4};

use super::floor::{Floor, LISTENER_BASE};
use super::{Completion, Driver};

/// Accepts after which a worker goes to the end of the kernel's queue of waiters. EPOLLEXCLUSIVE
/// wakes the first of that queue, so without this one worker would get all that comes slowly;
/// a smaller number is fairer, and costs two epoll_ctl(2) per that many accepts.
const FAIR_SHARE: u32 = 8;

/// A listening socket, shared with the sibling workers.
#[derive(Debug)]
pub(super) struct Listener {
    fd: Rc<OwnedFd>,
    watched: bool,
    /// Accepts since this worker last went to the end of the queue.
    accepts: u32,
}

impl Floor {
    /// Takes part in accepting from `listeners`.
    ///
    /// # Errors
    /// When epoll refuses one.
    pub fn listen(&mut self, listeners: Vec<Rc<OwnedFd>>) -> io::Result<()> {
        self.listeners = listeners
            .into_iter()
            .map(|fd| Listener {
                fd,
                watched: false,
                accepts: 0,
            })
            .collect();
        self.resume_listeners()
    }

    /// Watches the listeners again, after `AcceptFailed` or `pause_listeners`.
    ///
    /// # Errors
    /// When epoll refuses one.
    pub fn resume_listeners(&mut self) -> io::Result<()> {
        for index in 0..self.listeners.len() {
            if !self.listeners[index].watched {
                self.watch_listener(index)?;
            }
        }
        Ok(())
    }

    /// Accepts nothing until `resume_listeners`; the siblings go on.
    pub fn pause_listeners(&mut self) {
        for listener in &mut self.listeners {
            if mem::take(&mut listener.watched) {
                let _ = self.epoll.delete(listener.fd.as_fd());
            }
        }
    }

    /// Accepts nothing more, ever. Only this process's descriptors are closed.
    pub fn close_listeners(&mut self) {
        self.pause_listeners();
        self.listeners.clear();
    }

    /// Whether any listener is watched.
    pub fn is_listening(&self) -> bool {
        self.listeners.iter().any(|listener| listener.watched)
    }

    fn watch_listener(&mut self, index: usize) -> io::Result<()> {
        let listener = &mut self.listeners[index];
        // EPOLLEXCLUSIVE can't be changed by EPOLL_CTL_MOD: leaving and joining is the only way.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        let event = EpollEvent::new(flags, LISTENER_BASE + index as u64);
        self.epoll.add(listener.fd.as_fd(), event)?;
        listener.watched = true;
        listener.accepts = 0;
        Ok(())
    }

    /// Accepts whatever waits, a bounded number, from every watched listener: a sibling that was
    /// stopped may have swallowed the wake-up.
    pub fn try_accept(&mut self, driver: &mut impl Driver) {
        for index in 0..self.listeners.len() {
            if self.listeners.get(index).is_some_and(|l| l.watched) {
                self.accept(index, driver);
            }
        }
    }

    pub(super) fn accept(&mut self, index: usize, driver: &mut impl Driver) {
        for round in 0..FAIR_SHARE {
            // The driver may have closed or paused the listeners in between.
            let Some(listener) = self.listeners.get_mut(index).filter(|l| l.watched) else {
                return;
            };
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            match accept4(listener.fd.as_raw_fd(), flags) {
                Ok(fd) => {
                    // SAFETY: accept4 has just made this descriptor, nobody else owns it.
                    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
                    listener.accepts += 1;
                    if listener.accepts >= FAIR_SHARE {
                        self.go_to_the_end(index);
                    }
                    driver.complete(self, Completion::Accepted { socket });
                }
                Err(Errno::EAGAIN) => {
                    self.spurious_wakes += u64::from(round == 0);
                    return;
                }
                // The connection was gone before we came, or its network was: the next one.
                Err(
                    Errno::EINTR
                    | Errno::ECONNABORTED
                    | Errno::ENETDOWN
                    | Errno::EPROTO
                    | Errno::ENOPROTOOPT
                    | Errno::EHOSTDOWN
                    | Errno::ENONET
                    | Errno::EHOSTUNREACH
                    | Errno::EOPNOTSUPP
                    | Errno::ENETUNREACH
                    | Errno::EPERM,
                ) => {}
                Err(error) => {
                    // Left in, a level-triggered listener would spin at 100 %.
                    self.pause_listeners();
                    let error = error.into();
                    return driver.complete(self, Completion::AcceptFailed { error });
                }
            }
        }
    }

    fn go_to_the_end(&mut self, index: usize) {
        let _ = self.epoll.delete(self.listeners[index].fd.as_fd());
        self.listeners[index].watched = false;
        // Refused for want of memory: the next tick's `resume_listeners` tries again.
        let _ = self.watch_listener(index);
    }
}
