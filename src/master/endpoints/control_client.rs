//! Defines a client of the control socket, and the state of the socket that crosses an upgrade.

use std::os::fd::{OwnedFd, RawFd};

use serde::{Deserialize, Serialize};

use super::audit::PendingRequest;
use super::owned_path::OwnedPath;
use crate::logging::ControlPeer;
use crate::master::policy::event::Millis;
use crate::sys::rights::GuardedSocket;

/// Identifies a client of the control socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(pub(crate) u64);

#[derive(Debug)]
pub(super) struct ControlClient {
    pub(super) stream: GuardedSocket,
    pub(super) peer: ControlPeer,
    pub(super) received: Vec<u8>,
    /// The part of the answer that was not sent yet.
    pub(super) unsent: Vec<u8>,
    /// The descriptors that are sent with the first byte of the answer. They are not passed on at an upgrade.
    pub(super) attached: Vec<OwnedFd>,
    pub(super) asked: bool,
    /// Whether its request was too long. The rest is read, because a close with unread bytes loses the answer.
    pub(super) is_refused: bool,
    /// Whether it has closed its sending side. It may still wait for its answer.
    pub(super) ended: bool,
    /// Whether it is the observer, which stays connected and may ask for the status only.
    pub(super) is_observer: bool,
    /// Whether it stays open after its answer. A `stop` waits for the end of the connection.
    pub(super) keep: bool,
    pub(super) deadline: Option<Millis>,
}

/// The control socket in the state of an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlState {
    pub path: OwnedPath,
    /// The number of its descriptor.
    pub fd: RawFd,
    /// The number of the next client.
    pub next: u64,
    pub clients: Vec<ClientState>,
    /// Requests without a result yet, by the number of their client. Older versions do not write them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<(u64, PendingRequest)>,
}

/// A client of the control socket in the state of an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientState {
    pub id: u64,
    /// The number of its descriptor.
    pub fd: RawFd,
    /// The part of its request that was received.
    pub received: Vec<u8>,
    /// The part of the answer that was not sent yet.
    pub unsent: Vec<u8>,
    pub asked: bool,
    /// Whether it has closed its sending side.
    pub ended: bool,
    /// Whether it stays open after its answer.
    pub keep: bool,
    /// When it is closed.
    pub deadline: Option<Millis>,
}
