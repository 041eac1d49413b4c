//! Sends `status`, `reload`, `upgrade`, `scale` and `stop` to a running master over its control socket.
//!
//! Finds the socket, sends one request and waits for the answer. A refusal becomes the error with the exit
//! code that the master has sent. A path without a server is skipped. A socket of another user is an error,
//! unless another candidate answers.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
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
use crate::sys::{attached, other_writer, socket};

/// The longest wait for an immediate answer. The master does not wait for workers then, so one that takes
/// longer is stopped or stuck.
const PROMPT: Duration = Duration::from_secs(10);

const STUCK: &str = "the master does not answer: it is stopped, stuck or busy";

/// After this time a stop reports what it waits for.
const HINT_AFTER: Duration = Duration::from_secs(2);

/// How long to wait for an answer.
enum Patience<'a> {
    /// At most this time. A master that takes longer is stopped or stuck.
    AtMost(Duration),
    /// Without a limit. After `HINT_AFTER` the function is called with a text that says what the wait is for.
    Endless(&'a mut dyn FnMut(&str)),
}

/// A connection to a master for one request.
pub(super) struct ControlConnection {
    stream: BufReader<UnixStream>,
    path: PathBuf,
    /// Descriptors that came with an answer.
    received: Vec<OwnedFd>,
}

/// The status of a response, byte for byte: programs may know members that this version does not.
#[derive(Deserialize)]
struct Raw {
    status: Option<Box<RawValue>>,
}

/// The status of a server: parsed, and as it was sent.
#[derive(Debug)]
pub(super) struct Answered {
    pub status: Status,
    pub json: String,
}

pub(super) fn status(place: &ServerSelector) -> Result<Answered> {
    status_within(place, PROMPT)
}

/// Returns the status, if the master answers within this time.
pub(super) fn status_within(place: &ServerSelector, limit: Duration) -> Result<Answered> {
    ControlConnection::find(place)?.status(limit)
}

/// Returns the control socket of a server.
pub(super) fn locate(place: &ServerSelector) -> Result<PathBuf> {
    Ok(ControlConnection::find(place)?.path)
}

/// Requests a reload and waits for the result. Returns the master's text. If it takes long, `hint` gets a text that
/// says what the wait is for.
pub(super) fn reload(place: &ServerSelector, hint: &mut dyn FnMut(&str)) -> Result<String> {
    let config = named_file(place);
    // No limit: the result takes up to two times boot-timeout, and longer while another reload runs. If the
    // master dies, the connection ends.
    let patience = Patience::Endless(hint);
    let text = request(place, &ControlRequest::Reload { config }, patience)?;
    Ok(text.unwrap_or_else(|| "reloaded".into()))
}

/// Requests the upgrade to the installed program, and waits for the result, which comes from the new program. Returns
/// its text. If it takes long, `hint` gets a text that says what the wait is for.
pub(super) fn upgrade(place: &ServerSelector, hint: &mut dyn FnMut(&str)) -> Result<String> {
    let config = named_file(place);
    // No limit, because the last part of an upgrade is a reload.
    let patience = Patience::Endless(hint);
    let text = request(place, &ControlRequest::Upgrade { config }, patience)?;
    Ok(text.unwrap_or_else(|| "upgraded".into()))
}

/// Requests a number of workers. Returns the master's text.
pub(super) fn scale(place: &ServerSelector, count: usize) -> Result<String> {
    let patience = Patience::AtMost(PROMPT);
    let text = request(place, &ControlRequest::Scale { count }, patience)?;
    Ok(text.unwrap_or_else(|| format!("scaling to {count}")))
}

/// Sends a request to the selected master. Returns the text of its answer.
fn request(
    place: &ServerSelector,
    request: &ControlRequest,
    patience: Patience<'_>,
) -> Result<Option<String>> {
    let (response, _) = ControlConnection::find(place)?.ask(request, patience)?;
    Ok(response.message)
}

/// Stops the server, after the time `after` if it is given, and waits until the master has exited. If it takes long,
/// `hint` gets a text that says what the wait is for.
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
    /// Connects to the selected master.
    pub(super) fn find(place: &ServerSelector) -> Result<Self> {
        match place {
            ServerSelector::Socket(path) => Self::open(slice::from_ref(path)),
            ServerSelector::Config(file, name) => {
                // An invalid file is allowed, because a reload reports its errors. A file that does not
                // exist is an error: it is a typing mistake, and the default server must not be reached.
                if let Some(file) = file.as_deref().filter(|file| !file.exists()) {
                    return Err(Error::Config {
                        file: Some(file.to_owned()),
                        position: None,
                        key: String::new(),
                        problem: "there is no such file, so it is unknown which server is meant"
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

    /// Connects to a server of this name that was first started by a version without `--name`. It keeps the default
    /// paths after an upgrade. Skips a server that reports another name.
    pub(super) fn upgraded(candidates: &[PathBuf], name: &str) -> Option<Self> {
        let said = Self::open(candidates).ok()?.status(PROMPT).ok()?.status;
        let said = said.master.name;
        let is_meant = said.is_empty() || config::server_name(&said) == name;
        Self::open(candidates).ok().filter(|_| is_meant)
    }

    /// Connects to the first candidate where a server answers.
    fn open(candidates: &[PathBuf]) -> Result<Self> {
        let mut forbidden = None;
        let mut not_found = io::Error::from(ErrorKind::NotFound);
        for path in candidates {
            match socket::connect_unix(path, Some(PROMPT)) {
                Ok(stream) => {
                    check_peer(path, socket::peer_user(&stream).ok(), effective_ids())?;
                    return Ok(ControlConnection {
                        stream: BufReader::new(stream),
                        path: path.clone(),
                        received: Vec::new(),
                    });
                }
                Err(error) => match error.kind() {
                    ErrorKind::NotFound
                    | ErrorKind::ConnectionRefused
                    | ErrorKind::NotADirectory => not_found = error,
                    ErrorKind::PermissionDenied => forbidden = forbidden.or(Some(path)),
                    // The queue of the socket is full.
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
            source: not_found,
        })
    }

    /// The status, with the descriptors of the metrics board and the scoreboard. `None`: the master is of an
    /// older version, which has no such request.
    pub(super) fn observe(mut self) -> Result<Option<(Answered, Vec<OwnedFd>)>> {
        match self.ask(&ControlRequest::Metrics, Patience::AtMost(PROMPT)) {
            Ok(answer) => Ok(Some((self.answered(answer)?, self.received))),
            Err(Error::Daemon { code: 64, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a request after which another process has this connection. Returns the stream when that process
    /// has answered.
    pub(super) fn pass_on(mut self, request: &ControlRequest) -> Result<BufReader<UnixStream>> {
        self.ask(request, Patience::AtMost(PROMPT))?;
        let stream = self.stream.get_ref();
        let unlimited = stream
            .set_read_timeout(None)
            .and(stream.set_write_timeout(None));
        unlimited.map_err(|error| Error::system("use the control socket", error))?;
        Ok(self.stream)
    }

    fn status(mut self, limit: Duration) -> Result<Answered> {
        let answer = self.ask(&ControlRequest::Status, Patience::AtMost(limit))?;
        self.answered(answer)
    }

    fn answered(&self, (response, line): (ControlResponse, String)) -> Result<Answered> {
        let raw: Option<Raw> = serde_json::from_str(&line).ok();
        match (response.status, raw.and_then(|raw| raw.status)) {
            (Some(status), Some(json)) => Ok(Answered {
                status,
                json: json.get().to_owned(),
            }),
            _ => Err(self.alien("the answer has no status")),
        }
    }

    /// Sends a request and waits for its answer. Returns it parsed and as it was sent. A refusal is an error.
    fn ask(
        &mut self,
        request: &ControlRequest,
        patience: Patience<'_>,
    ) -> Result<(ControlResponse, String)> {
        let line = self.exchange(request, patience).map_err(|error| {
            use ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof, WouldBlock};
            let text = match (error.kind(), request) {
                // The command itself is sent after the first answer.
                (WouldBlock, ControlRequest::Job { .. }) => {
                    "the jobs process or the master does not answer: it is stopped, stuck or busy; nothing was done"
                }
                (UnexpectedEof | BrokenPipe | ConnectionReset, ControlRequest::Job { .. }) => {
                    "the jobs process or the master exited before it answered; the log says why, and nothing was done"
                }
                (WouldBlock, request) if only_reads(request) => STUCK,
                (WouldBlock, _) => {
                    let text = format!("{STUCK}; it will carry out the request when it continues");
                    return self.alien(&text);
                }
                (UnexpectedEof | BrokenPipe | ConnectionReset, _) => {
                    "the master exited before it answered; its log says why"
                }
                _ => return Error::system(format!("ask {}", self.path.display()), error),
            };
            self.alien(text)
        })?;
        let response: ControlResponse = serde_json::from_str(&line)
            .map_err(|error| self.alien(&format!("the answer is invalid: {error}")))?;
        if response.ok {
            return Ok((response, line));
        }
        Err(response.into_error())
    }

    /// Requests the status on a second connection.
    fn status_beside(&self) -> Option<Status> {
        let again = ControlConnection::open(slice::from_ref(&self.path))
            .and_then(|connection| connection.status(PROMPT));
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
        if *request == ControlRequest::Metrics {
            let (line, received) = attached::receive_line(stream, first)?;
            self.received = received;
            return Ok(line);
        }
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

    /// Returns whether the connection ends within the limit. Then the master and all processes that had the
    /// connection have exited.
    fn ends_within(&mut self, limit: Option<Duration>) -> Result<bool> {
        let wait = |error| Error::system("wait until the master exits", error);
        self.stream
            .get_ref()
            .set_read_timeout(limit)
            .map_err(wait)?;
        loop {
            match self.stream.read(&mut [0; 64]) {
                Ok(0) => return Ok(true),
                // More bytes are unexpected, but they are not the end.
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

fn only_reads(request: &ControlRequest) -> bool {
    matches!(request, ControlRequest::Status | ControlRequest::Metrics)
}

/// Returns the absolute path of the named configuration file, which the server compares with its own.
/// Returns `None` if JSON cannot contain it.
fn named_file(place: &ServerSelector) -> Option<String> {
    match place {
        ServerSelector::Config(Some(file), _) => {
            let path = config::main_file(Some(file))?;
            path.to_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// Checks that the peer may be the server: it runs as root or as this user (SO_PEERCRED, unix(7)). Root may
/// also reach another user's server, if no third user can have created a socket at `path`.
pub(super) fn check_peer(path: &Path, peer: Option<u32>, own: (u32, u32)) -> Result<()> {
    let is_alone = |peer| other_writer::of_path(path, (peer, own.1)).is_none();
    match peer {
        Some(peer) if peer == 0 || peer == own.0 || own.0 == 0 && is_alone(peer) => Ok(()),
        peer => {
            let who = peer.map_or("an unknown user".into(), |peer| format!("user {peer}"));
            Err(Error::Permission(format!(
                "{}: the process at this control socket runs as {who}, so it may not be the server, and \
                 no request was sent; become the user that the server runs as, or let only root and that \
                 user write to the directories above the socket",
                path.display()
            )))
        }
    }
}

/// Returns what a stop waits for, if that is known.
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
            let pools: u64 = status.pools.iter().map(|pool| pool.busy).sum();
            let sessions: u64 = status.isolated.iter().map(|one| one.running).sum();
            let others = [(pools, "pool call"), (sessions, "isolated connection")];
            let others = others.iter().filter(|(count, _)| *count > 0);
            let others = others.map(|(count, what)| format!(", {}", units::plural(*count, what)));
            format!(
                "{}{} on {}{}",
                units::plural(calls, "call"),
                oldest.unwrap_or_default(),
                units::plural(workers, "worker"),
                others.collect::<String>()
            )
        },
    );
    format!(
        "waiting for {what}, at most for the longest drain-timeout (workers and jobs); `stop --now` does not wait"
    )
}

/// Returns what a reload waits for, if that is known.
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
            "waiting until one of the {many} generations that still drain has exited, at most for \
             the longest drain-timeout (workers and jobs); then the reload begins"
        ),
        _ => "waiting for the new workers to be ready: at most workers.boot-timeout for the first \
              one, and the same time again for the others"
            .to_owned(),
    }
}
