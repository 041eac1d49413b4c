//! Carries out one command of an operator, in a thread of its own.
//!
//! If the process ends during a command, some of its requests are done and the others are not, because each is a
//! transaction.

use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::jobs::policy::states::JobState;
use crate::jobs::record::JobDetails;
use crate::jobs::store::group::{MOST_BYTES, MOST_JOBS};
use crate::jobs::store::request::{
    JobSelection, LeftAlone, ListFilter, ListPage, Selected, StoreReply, StoreRequest,
};
use crate::logging::{ControlPeer, pluralize};
use crate::protocol::control::{ControlResponse, to_line};
use crate::protocol::job_control::{JobChoice, JobFilter, JobRequest, LeftJob};
use crate::protocol::job_id::JobId;
use crate::protocol::json;
use crate::sys::socket;

/// After this pause a command is given up.
const PATIENCE: Duration = Duration::from_secs(600);
/// The largest number of bytes of a line: a request, or a job with its params and result.
const LONGEST_LINE: u64 = 256 << 20;
/// The exit code of a command with wrong arguments.
const USAGE: u8 = 64;
/// The exit code of a command whose server cannot answer now.
pub const UNAVAILABLE: u8 = 69;

/// What a command needs of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlTask {
    Write(StoreRequest),
    List(ListFilter),
    Details(JobId),
    /// The jobs behind this place.
    Export(u64),
}

/// The reply to the task of the same name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlReply {
    Written(StoreReply),
    Listed(ListPage),
    Details(Option<Box<JobDetails>>),
    /// The jobs, and the place of the last one.
    Exported(Vec<JobDetails>, u64),
}

/// The store as the threads of commands use it.
pub trait ControlStore: Send + Sync {
    /// Does a task, and returns after the commit.
    ///
    /// # Errors
    /// Why the store cannot do it now.
    fn run(&self, task: ControlTask) -> Result<ControlReply, String>;

    /// Returns whether jobs of this method can run in this generation.
    fn has_method(&self, method: &str) -> bool;
}

/// Why a command has no answer: a refusal, or the connection is gone.
#[derive(Debug)]
enum CommandEnd {
    Refused(String, u8),
    Gone,
}

impl From<io::Error> for CommandEnd {
    fn from(_: io::Error) -> Self {
        CommandEnd::Gone
    }
}

fn usage(text: impl Into<String>) -> CommandEnd {
    CommandEnd::Refused(text.into(), USAGE)
}

type Outcome<T> = Result<T, CommandEnd>;

/// One command and its connection.
pub struct OperatorCommand<'a> {
    store: &'a dyn ControlStore,
    peer: ControlPeer,
    input: BufReader<UnixStream>,
    output: BufWriter<UnixStream>,
}

impl<'a> OperatorCommand<'a> {
    /// Takes a connection that the master has passed on.
    ///
    /// # Errors
    /// If it is no unix socket.
    pub fn new(stream: UnixStream, store: &'a dyn ControlStore) -> io::Result<Self> {
        let (uid, pid) = socket::peer_process(&stream.as_fd())?;
        // The master reads without waiting.
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(OperatorCommand {
            store,
            peer: ControlPeer::new(uid, pid),
            input: BufReader::new(stream.try_clone()?),
            output: BufWriter::new(stream),
        })
    }

    /// Reads the request, carries it out, and answers.
    pub fn serve(mut self) {
        let begun = Instant::now();
        let Ok(request) = self.begin() else {
            return;
        };
        let (name, only_reads, outcome) = match request {
            Ok(request) => (
                request.name(),
                request.only_reads(),
                self.carry_out(request),
            ),
            Err(text) => ("unknown", false, Err(usage(text))),
        };
        let took_ms = begun.elapsed().as_millis() as u64;
        let command = format!("job-{name}");
        let response = match outcome {
            Ok(text) => {
                let what = text.as_deref().unwrap_or_default();
                self.peer.log_done(&command, only_reads, what, took_ms);
                ControlResponse {
                    message: text,
                    ..ControlResponse::done()
                }
            }
            Err(CommandEnd::Refused(reason, code)) => {
                // The reason may contain a part of the request, which must not look like fields of this line.
                let quoted = format!("{reason:?}");
                self.peer.log_refused(&command, &quoted, took_ms);
                ControlResponse::refused(reason, code)
            }
            Err(CommandEnd::Gone) => {
                let reason = "its connection has ended";
                return match only_reads {
                    // As in `job list | head`.
                    true => self.peer.log_done(&command, true, reason, took_ms),
                    false => self.peer.log_refused(&command, reason, took_ms),
                };
            }
        };
        let _ = self.send(&response);
        let _ = self.output.flush();
    }

    /// Says that the process has the connection, and reads the request.
    fn begin(&mut self) -> Outcome<Result<JobRequest, String>> {
        self.send(&ControlResponse::done())?;
        self.output.flush()?;
        let line = self.line()?.ok_or(CommandEnd::Gone)?;
        let request = serde_json::from_str(&line);
        Ok(request.map_err(|error| format!("the jobs process does not know the command: {error}")))
    }

    fn send(&mut self, message: &impl serde::Serialize) -> io::Result<()> {
        self.output.write_all(&to_line(message)?)
    }

    /// Reads a line without its line feed; `None` at the end.
    fn line(&mut self) -> Outcome<Option<String>> {
        let mut line = Vec::new();
        let mut input = self.input.by_ref().take(LONGEST_LINE);
        input.read_until(b'\n', &mut line)?;
        if line.pop() != Some(b'\n') {
            return Ok(None);
        }
        match String::from_utf8(line) {
            Ok(line) => Ok(Some(line)),
            Err(_) => Err(usage("a line is not UTF-8")),
        }
    }

    fn run(&self, task: ControlTask) -> Outcome<ControlReply> {
        let ran = self.store.run(task);
        ran.map_err(|reason| CommandEnd::Refused(reason, UNAVAILABLE))
    }

    fn write(&self, request: StoreRequest) -> Outcome<StoreReply> {
        match self.run(ControlTask::Write(request))? {
            ControlReply::Written(reply) => Ok(reply),
            other => Err(unexpected(&other)),
        }
    }

    /// Carries out a request. Returns what was done, for people.
    fn carry_out(&mut self, request: JobRequest) -> Outcome<Option<String>> {
        match request {
            JobRequest::List(filter) => self.list(filter).map(|()| None),
            JobRequest::Show { id } => self.show(&id).map(|()| None),
            JobRequest::Retry(choice) => {
                let (done, left) = self.select(
                    choice,
                    "wait again",
                    JobState::may_wait_again,
                    StoreRequest::Retry,
                )?;
                report(done, left, ["job waits again", "jobs wait again"]).map(Some)
            }
            JobRequest::Purge(choice) => {
                let (done, left) = self.select(
                    choice,
                    "be removed",
                    JobState::is_ended,
                    StoreRequest::Purge,
                )?;
                report(done, left, ["job was removed", "jobs were removed"]).map(Some)
            }
            JobRequest::Pause { method } => {
                self.pause(&method, true)?;
                let what = "is paused: no attempt of it begins, and running ones continue";
                Ok(Some(format!("{method} {what}{}", self.unknown(&method))))
            }
            JobRequest::Resume { method } => {
                self.pause(&method, false)?;
                let what = "is not paused: attempts of its due jobs begin";
                Ok(Some(format!("{method} {what}{}", self.unknown(&method))))
            }
            JobRequest::Export => self.export().map(Some),
            JobRequest::Import => self.import().map(Some),
        }
    }

    fn list(&mut self, filter: JobFilter) -> Outcome<()> {
        let mut filter = ListFilter {
            state: state(filter.state.as_deref())?,
            method: filter.method,
            after: None,
        };
        loop {
            let page = match self.run(ControlTask::List(filter.clone()))? {
                ControlReply::Listed(page) => page,
                other => return Err(unexpected(&other)),
            };
            for job in &page.jobs {
                self.row(|out| job.write(out))?;
            }
            if page.next.is_none() {
                return Ok(());
            }
            filter.after = page.next;
        }
    }

    fn row(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> Outcome<()> {
        let mut line = Vec::new();
        write(&mut line);
        // Params are kept as they came. A line break in them can only stand between tokens.
        json::flatten_to_one_line(&mut line);
        line.push(b'\n');
        Ok(self.output.write_all(&line)?)
    }

    fn show(&mut self, id: &str) -> Outcome<()> {
        match self.run(ControlTask::Details(job_id(id)?))? {
            ControlReply::Details(Some(job)) => self.row(|out| job.write(out)),
            ControlReply::Details(None) => {
                let text = format!("there is no job {id}: it is unknown or was removed");
                Err(CommandEnd::Refused(text, 1))
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Applies a request to the chosen jobs. `may` is whether it can be applied to a job in this state. Returns the
    /// number of jobs that were changed, and that of named jobs that were left alone.
    fn select(
        &mut self,
        choice: JobChoice,
        what: &str,
        may: fn(JobState) -> bool,
        request: impl Fn(JobSelection) -> StoreRequest,
    ) -> Outcome<(usize, usize)> {
        let (mut done, mut left) = (0, 0);
        let Some(state) = state(choice.filter.state.as_deref())? else {
            let ids: Outcome<Vec<JobId>> = choice.ids.iter().map(|id| job_id(id)).collect();
            for group in ids?.chunks(MOST_JOBS) {
                let selected = selected(self.write(request(JobSelection::Ids(group.to_vec())))?)?;
                done += selected.done.len();
                left += selected.left.len();
                self.send_left(selected.left)?;
            }
            return Ok((done, left));
        };
        if !choice.ids.is_empty() {
            return Err(usage("give ids or a state, not both"));
        }
        if !may(state) {
            let state = state.name();
            return Err(usage(format!("jobs that are {state} cannot {what}")));
        }
        let mut after = None;
        loop {
            let page = JobSelection::Ended {
                state,
                method: choice.filter.method.clone(),
                most: MOST_JOBS,
                after,
            };
            let selected = selected(self.write(request(page))?)?;
            done += selected.done.len();
            self.send_left(selected.left)?;
            if selected.next.is_none() {
                return Ok((done, 0));
            }
            after = selected.next;
        }
    }

    /// Sends which jobs were left alone, and why.
    fn send_left(&mut self, left: Vec<(JobId, LeftAlone)>) -> Outcome<()> {
        for (id, why) in left {
            self.send(&LeftJob {
                job: id.to_string(),
                left: reason(why),
            })?;
        }
        Ok(())
    }

    /// Returns what to add to a message about this method. It may come with the next reload, or its name is misspelled.
    fn unknown(&self, method: &str) -> &'static str {
        match self.store.has_method(method) {
            true => "",
            false => "; there is no method of this name now",
        }
    }

    fn pause(&mut self, method: &str, is_paused: bool) -> Outcome<()> {
        let method = method.to_owned();
        self.write(StoreRequest::Pause { method, is_paused })?;
        Ok(())
    }

    fn export(&mut self) -> Outcome<String> {
        let (mut after, mut count) = (0, 0);
        loop {
            let (jobs, last) = match self.run(ControlTask::Export(after))? {
                ControlReply::Exported(jobs, last) => (jobs, last),
                other => return Err(unexpected(&other)),
            };
            if jobs.is_empty() {
                return Ok(pluralize(count, "job was exported", "jobs were exported"));
            }
            count += jobs.len();
            for job in &jobs {
                self.row(|out| job.write(out))?;
            }
            after = last;
        }
    }

    fn import(&mut self) -> Outcome<String> {
        let (mut number, mut stored) = (0, 0);
        loop {
            let (mut jobs, mut size) = (Vec::new(), 0);
            let mut is_last = false;
            while jobs.len() < MOST_JOBS && size < MOST_BYTES {
                // Without the empty line at the end the export may be cut off.
                let line = self.line()?.ok_or(CommandEnd::Gone)?;
                if line.is_empty() {
                    is_last = true;
                    break;
                }
                number += 1;
                let job = JobDetails::read(&line).map_err(|error| {
                    let before = number - jobs.len() - 1;
                    usage(format!(
                        "line {number}: {error}; nothing from line {} on is stored",
                        before + 1
                    ))
                })?;
                size += job.size();
                jobs.push(job);
            }
            if !jobs.is_empty() {
                match self.write(StoreRequest::Import(jobs))? {
                    StoreReply::Imported(count) => stored += count,
                    other => return Err(unexpected(&other)),
                }
            }
            if is_last {
                let left_out = number - stored;
                let stored = pluralize(stored, "job was stored", "jobs were stored");
                return Ok(format!(
                    "{stored}, {left_out} left out (their id or key exists)"
                ));
            }
        }
    }
}

fn unexpected(reply: &impl std::fmt::Debug) -> CommandEnd {
    log::error!("the store gave an unexpected reply: {reply:?}");
    CommandEnd::Refused("the store gave an unexpected reply".into(), 70)
}

fn selected(reply: StoreReply) -> Outcome<Selected> {
    match reply {
        StoreReply::Retried(selected) | StoreReply::Purged(selected) => Ok(selected),
        other => Err(unexpected(&other)),
    }
}

fn job_id(text: &str) -> Outcome<JobId> {
    JobId::parse(text).ok_or_else(|| usage(format!("{text:?} is not the id of a job")))
}

fn state(name: Option<&str>) -> Outcome<Option<JobState>> {
    match name {
        None => Ok(None),
        Some(name) => match JobState::from_name(name) {
            Some(state) => Ok(Some(state)),
            None => Err(usage(format!("there is no state {name:?}"))),
        },
    }
}

fn reason(why: LeftAlone) -> String {
    match why {
        LeftAlone::NoSuchJob => "it is unknown or was removed".to_owned(),
        LeftAlone::Is(state) => format!("it is {}", state.name()),
        LeftAlone::KeyInUse => "another job of this method with this key has not ended".to_owned(),
        LeftAlone::TooMany => {
            "the number of jobs that have not ended has reached jobs.max-jobs".to_owned()
        }
    }
}

/// Says what was done. It is a refusal if jobs that were named were left alone.
fn report(done: usize, left: usize, [one, many]: [&str; 2]) -> Outcome<String> {
    let done = pluralize(done, one, many);
    match left {
        0 => Ok(done),
        _ => Err(CommandEnd::Refused(format!("{done}, {left} left alone"), 1)),
    }
}
