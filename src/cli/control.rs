//! `status`, `reload`, `upgrade`, `scale` and `stop`: asks a running master over its control socket.
//!
//! Finds the socket, sends one request, waits for the answer. What the answers mean is the master's
//! affair; here a refusal becomes the error, and the exit code, that the master gave it. Places where
//! nobody is are passed over; a socket that belongs to somebody else is not, unless another one
//! answers.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::slice;
use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::args::ServerSelector;
use super::units;
use crate::config;
use crate::error::{Error, Result};
use crate::protocol::control::{
    ControlRequest, ControlResponse, MOST_DRAINING_GENERATIONS, Status, WorkerPhase, to_line,
};
use crate::sys::account::effective_ids;
use crate::sys::{other_writer, socket};

/// How long the master may take for what it answers at once. It does not wait for workers then, so
/// a master that takes longer is stopped or stuck.
const PROMPT: Duration = Duration::from_secs(10);

const STUCK: &str = "the master does not answer: it is stopped, stuck or busy";

/// How long a stop may take before it is said what it waits for.
const HINT_AFTER: Duration = Duration::from_secs(2);

/// How long an answer is waited for.
enum Patience<'a> {
    /// A master that takes longer is stopped or stuck.
    AtMost(Duration),
    /// Without a limit; after a while this is told what the wait is for.
    Endless(&'a mut dyn FnMut(&str)),
}

/// A connection to a master, good for one request.
pub(super) struct ControlConnection {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

/// Just the status of a response, to the letter: members that this version does not know are for
/// programs that do.
#[derive(Deserialize)]
struct Raw {
    status: Option<Box<RawValue>>,
}

/// The status of a server, read, and as it was sent.
#[derive(Debug)]
pub(super) struct Answered {
    pub status: Status,
    pub json: String,
}

pub(super) fn status(place: &ServerSelector) -> Result<Answered> {
    ControlConnection::find(place)?.status()
}

/// Asks for a reload and waits for the verdict. Returns what the master says about it. After a while
/// `hint` is told what it waits for.
pub(super) fn reload(place: &ServerSelector, hint: &mut dyn FnMut(&str)) -> Result<String> {
    // No limit: the verdict takes as long as two times boot-timeout, and longer while another
    // reload is under way. A master that dies ends the wait.
    let response = ControlConnection::find(place)?
        .ask(
            &ControlRequest::Reload {
                config: named_file(place),
            },
            Patience::Endless(hint),
        )?
        .0;
    Ok(response.message.unwrap_or_else(|| "reloaded".into()))
}

/// Asks for the upgrade to the binary that is installed now and waits for the verdict, which comes
/// from the new one. Returns what it says. After a while `hint` is told what it waits for.
pub(super) fn upgrade(place: &ServerSelector, hint: &mut dyn FnMut(&str)) -> Result<String> {
    // No limit, as for a reload, which is the last part of it.
    let response = ControlConnection::find(place)?
        .ask(
            &ControlRequest::Upgrade {
                config: named_file(place),
            },
            Patience::Endless(hint),
        )?
        .0;
    Ok(response.message.unwrap_or_else(|| "upgraded".into()))
}

/// Asks for so many workers. Returns what the master says about it.
pub(super) fn scale(place: &ServerSelector, count: usize) -> Result<String> {
    let request = ControlRequest::Scale { count };
    let response = ControlConnection::find(place)?
        .ask(&request, Patience::AtMost(PROMPT))?
        .0;
    Ok(response
        .message
        .unwrap_or_else(|| format!("scaling to {count}")))
}

/// Ends the server, which may serve on for a time `after` that, and waits until the master is gone.
/// After a while `hint` is told what it waits for.
pub(super) fn stop(
    place: &ServerSelector,
    now: bool,
    after: Option<Duration>,
    hint: &mut dyn FnMut(&str),
) -> Result<()> {
    let mut control = ControlConnection::find(place)?;
    let after_ms = after.map(|after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
    let request = ControlRequest::Stop { now, after_ms };
    control.ask(&request, Patience::AtMost(PROMPT))?;
    let quiet = HINT_AFTER.saturating_add(after.unwrap_or_default());
    if control.ends_within(Some(quiet))? {
        return Ok(());
    }
    hint(&waits_for(control.status_beside().as_ref()));
    control.ends_within(None).map(|_| ())
}

impl ControlConnection {
    /// Connects to the master that is meant.
    fn find(place: &ServerSelector) -> Result<Self> {
        match place {
            ServerSelector::Socket(path) => Self::open(slice::from_ref(path)),
            ServerSelector::Config(file, name) => {
                // A broken file is fine, for that is when a reload has something to say. But one
                // that is not there is a slip of the pen, and the default server not the one meant.
                if let Some(file) = file.as_deref().filter(|file| !file.exists()) {
                    return Err(Error::Config {
                        file: Some(file.to_owned()),
                        position: None,
                        key: String::new(),
                        problem: "there is no such file, so it can't tell which server is meant"
                            .into(),
                        remedy: "name the right one, or the server's socket with --control-socket"
                            .into(),
                    });
                }
                let candidates = |name| config::control_socket_candidates(file.as_deref(), name);
                let (own, common) = (candidates(name)?, candidates(config::DEFAULT_NAME)?);
                match Self::open(&own) {
                    Err(error @ Error::NoServer { .. }) if own != common => {
                        Self::upgraded(&common, name).ok_or(error)
                    }
                    found => found,
                }
            }
        }
    }

    /// Connects to a server of this name that keeps the paths of its first start, under a version that
    /// gave all servers the same ones. A server that says that it has another name is not meant.
    pub(super) fn upgraded(candidates: &[PathBuf], name: &str) -> Option<Self> {
        let said = Self::open(candidates).ok()?.status().ok()?.status;
        let said = said.master.name;
        let is_meant = said.is_empty() || config::server_name(&said) == name;
        Self::open(candidates).ok().filter(|_| is_meant)
    }

    /// Connects to the first of these where somebody is.
    fn open(candidates: &[PathBuf]) -> Result<Self> {
        let mut forbidden = None;
        let mut nobody = io::Error::from(ErrorKind::NotFound);
        for path in candidates {
            match socket::connect_unix(path, Some(PROMPT)) {
                Ok(stream) => {
                    check_peer(path, socket::peer_user(&stream).ok(), effective_ids())?;
                    return Ok(ControlConnection {
                        stream: BufReader::new(stream),
                        path: path.clone(),
                    });
                }
                Err(error) => match error.kind() {
                    ErrorKind::NotFound
                    | ErrorKind::ConnectionRefused
                    | ErrorKind::NotADirectory => nobody = error,
                    ErrorKind::PermissionDenied => forbidden = forbidden.or(Some(path)),
                    // So many wait there already.
                    ErrorKind::TimedOut => {
                        return Err(Error::Protocol(format!("{}: {STUCK}", path.display())));
                    }
                    _ => {
                        let attempt = format!("connect to the control socket {}", path.display());
                        return Err(Error::system(attempt, error));
                    }
                },
            }
        }
        if let Some(path) = forbidden {
            return Err(Error::Permission(format!(
                "{}: this user may not use that control socket; become the user that the server \
                 runs as, or root",
                path.display()
            )));
        }
        let tried: Vec<_> = candidates
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        Err(Error::NoServer {
            place: tried.join(" or "),
            source: nobody,
        })
    }

    fn status(mut self) -> Result<Answered> {
        let (response, line) = self.ask(&ControlRequest::Status, Patience::AtMost(PROMPT))?;
        let raw: Option<Raw> = serde_json::from_str(&line).ok();
        match (response.status, raw.and_then(|raw| raw.status)) {
            (Some(status), Some(json)) => Ok(Answered {
                status,
                json: json.get().to_owned(),
            }),
            _ => Err(self.alien("the answer has no status")),
        }
    }

    /// Sends a request and waits for its answer, which is returned read and as it came. A refusal
    /// is an error.
    fn ask(
        &mut self,
        request: &ControlRequest,
        patience: Patience<'_>,
    ) -> Result<(ControlResponse, String)> {
        let line = self.exchange(request, patience).map_err(|error| {
            let text = match error.kind() {
                ErrorKind::WouldBlock if *request == ControlRequest::Status => STUCK,
                ErrorKind::WouldBlock => {
                    let text = format!("{STUCK}, and does what was asked of it when it goes on");
                    return self.alien(&text);
                }
                ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                    "the master left before it answered; its log says why"
                }
                _ => return Error::system(format!("ask {}", self.path.display()), error),
            };
            self.alien(text)
        })?;
        let response: ControlResponse = serde_json::from_str(&line)
            .map_err(|error| self.alien(&format!("the answer is none: {error}")))?;
        if response.ok {
            return Ok((response, line));
        }
        let message = response
            .error
            .unwrap_or_else(|| "refused without a reason".into());
        Err(match response.code.unwrap_or(1) {
            1 => Error::Refused(message),
            code => Error::Daemon { code, message },
        })
    }

    /// The status, asked for on a second connection.
    fn status_beside(&self) -> Option<Status> {
        let again = ControlConnection::open(slice::from_ref(&self.path))
            .and_then(ControlConnection::status);
        Some(again.ok()?.status)
    }

    fn exchange(&mut self, request: &ControlRequest, patience: Patience<'_>) -> io::Result<String> {
        let first = match patience {
            Patience::AtMost(limit) => limit,
            Patience::Endless(_) => HINT_AFTER,
        };
        let stream = self.stream.get_mut();
        stream.set_write_timeout(Some(first))?;
        stream.set_read_timeout(Some(first))?;
        stream.write_all(&to_line(request)?)?;
        if let Patience::Endless(hint) = patience {
            let begun = self.stream.fill_buf().map(drop);
            if begun.is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
                hint(&reload_waits_for(self.status_beside().as_ref()));
            }
            self.stream.get_ref().set_read_timeout(None)?;
        }
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        if line.ends_with('\n') {
            Ok(line)
        } else {
            Err(ErrorKind::UnexpectedEof.into())
        }
    }

    /// Whether the connection ends within the limit: the master, and all that held it, are gone.
    fn ends_within(&mut self, limit: Option<Duration>) -> Result<bool> {
        let wait = |error| Error::system("wait for the master's end", error);
        self.stream
            .get_ref()
            .set_read_timeout(limit)
            .map_err(wait)?;
        loop {
            match self.stream.read(&mut [0; 64]) {
                Ok(0) => return Ok(true),
                // Nothing more is due; whatever it is, it is not the end.
                Ok(_) => {}
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::ConnectionReset => return Ok(true),
                    ErrorKind::WouldBlock => return Ok(false),
                    _ => return Err(wait(error)),
                },
            }
        }
    }

    fn alien(&self, text: &str) -> Error {
        Error::Protocol(format!("{}: {text}", self.path.display()))
    }
}

/// The absolute path of the configuration file that the command was given, for the server to compare
/// with its own. A name that JSON cannot hold is not compared.
fn named_file(place: &ServerSelector) -> Option<String> {
    match place {
        ServerSelector::Config(Some(file), _) => {
            let path = config::main_file(Some(file))?;
            path.to_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// Whether the process at the other end may be the server: it runs as root or as this user (SO_PEERCRED,
/// unix(7)). Root also asks the server of another user, if no third user can have put a socket at `path`.
pub(super) fn check_peer(path: &Path, peer: Option<u32>, own: (u32, u32)) -> Result<()> {
    let is_alone = |peer| other_writer::of_path(path, (peer, own.1)).is_none();
    match peer {
        Some(peer) if peer == 0 || peer == own.0 || own.0 == 0 && is_alone(peer) => Ok(()),
        peer => {
            let who = peer.map_or("an unknown user".into(), |peer| format!("user {peer}"));
            Err(Error::Permission(format!(
                "{}: the process at this control socket runs as {who}, so it may not be the server, and \
                 nothing was asked of it; become the user that the server runs as, or let only root and that \
                 user write to the directories above the socket",
                path.display()
            )))
        }
    }
}

/// What a stop waits for, as far as it can be known.
fn waits_for(status: Option<&Status>) -> String {
    let what = status.map_or_else(
        || "what still runs".to_owned(),
        |status| {
            let calls: u64 = status.workers.iter().map(|w| w.running + w.queued).sum();
            let workers = status.workers.iter().filter(|w| w.pid.is_some()).count() as u64;
            let oldest = status.workers.iter().filter_map(|w| w.oldest_call.as_ref());
            let oldest = oldest.max_by_key(|call| call.age_ms).map(|call| {
                let age = units::milliseconds(call.age_ms);
                format!(" (the oldest: {}, {age})", call.method)
            });
            format!(
                "{}{} on {}",
                units::plural(calls, "call"),
                oldest.unwrap_or_default(),
                units::plural(workers, "worker")
            )
        },
    );
    format!("waiting for {what}, at most for workers.drain-timeout; `stop --now` does not wait")
}

/// What a reload waits for, as far as it can be known.
fn reload_waits_for(status: Option<&Status>) -> String {
    let Some(status) = status else {
        return format!("{STUCK}; waiting for it");
    };
    let workers = status.workers.iter();
    let draining = workers.filter(|worker| worker.state == WorkerPhase::Draining);
    let mut drain: Vec<u32> = draining.map(|worker| worker.generation).collect();
    drain.sort_unstable();
    drain.dedup();
    match drain.len() {
        many @ MOST_DRAINING_GENERATIONS.. => format!(
            "waiting until one of the {many} generations that still drain has left, at most for \
             workers.drain-timeout; then the reload begins"
        ),
        _ => "waiting for the new workers to be ready, at most for workers.boot-timeout and once \
              more for those after the first"
            .to_owned(),
    }
}
