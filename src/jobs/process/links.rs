//! Holds the links of the jobs process to workers, pool processes and sessions.
//!
//! Each link has a number that is never used again, so a late answer never reaches another process. A peer that sends
//! an invalid frame loses its link.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::OwnedFd;

use crate::link::call_frame::{AnswerFrame, Frame, longest_payload};
use crate::link::call_link::CallLink;
use crate::link::scoreboard::WorkerRecord;
use crate::protocol::call_id::CallRunner;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::Reactor;
use crate::sys::process::Pid;

use super::ticket::CallPlace;

/// The first number under which the reactor watches links.
pub const LINK_BASE: u16 = 0x100;
/// The largest number of links. Further ones are refused.
const MAX_LINKS: usize = 16_384;

/// A session has this number of links at most. It is not trusted, and could ask for new ones again and again.
const SESSION_LINKS: usize = 2;
/// The largest number of bytes of params in the calls of a session without an answer, over one link. They may wait for
/// a store that is away.
const SESSION_BYTES: usize = 4 * 1024 * 1024;

/// With more unsent bytes over one link, further records are refused.
const UNSENT_RECORDS: usize = 16 * 1024 * 1024;
/// The largest number of bytes of params in the calls of all sessions that have no answer.
const ALL_SESSION_BYTES: usize = 64 * 1024 * 1024;

/// The process at the other end of a link.
#[derive(Debug, Clone, Copy)]
pub enum LinkEnd {
    /// A worker or pool process, with its record in the scoreboard.
    Executor(&'static WorkerRecord),
    /// The session with this index. It runs no attempts.
    Session(u32),
}

/// A link to another process.
#[derive(Debug)]
pub struct JobLink {
    pub link: CallLink,
    /// The other end.
    pub end: LinkEnd,
    /// The bytes of params of each call of a session that is not answered, by its number.
    open: HashMap<u64, usize>,
    /// The number under which the reactor watches it.
    watch: u16,
}

/// Whether a call may begin.
#[derive(Debug, PartialEq, Eq)]
pub enum CallAdmission {
    Accepted,
    /// The session has too many bytes of params in calls without an answer.
    TooManyBytes,
    /// No process of preforkd sends such a call.
    Invalid,
}

/// All links, by their numbers.
#[derive(Debug, Default)]
pub struct JobLinks {
    all: BTreeMap<u64, JobLink>,
    /// The link of each watch.
    watched: BTreeMap<u16, u64>,
    /// The links that may have queued frames, or that are watched for other events than needed. A turn visits only
    /// these, because each session has a link.
    unsettled: BTreeSet<u64>,
    last: u64,
    /// `limits.frame`.
    frame_limit: usize,
    own_pid: i32,
    /// The bytes of params in the open calls of all sessions.
    open_bytes: usize,
}

impl JobLinks {
    /// Creates an empty table. `frame_limit` is `limits.frame`.
    pub fn new(frame_limit: usize) -> Self {
        JobLinks {
            frame_limit,
            own_pid: Pid::current().0,
            ..JobLinks::default()
        }
    }

    /// Adds a link that the master has made. Returns its number; `None` if there are too many.
    pub fn add(&mut self, fd: OwnedFd, end: LinkEnd) -> Option<u64> {
        if self.all.len() >= MAX_LINKS {
            return None;
        }
        let watch = (LINK_BASE..=u16::MAX).find(|watch| !self.watched.contains_key(watch))?;
        self.last += 1;
        self.watched.insert(watch, self.last);
        let link = JobLink {
            link: CallLink::new(fd),
            end,
            open: HashMap::new(),
            watch,
        };
        self.all.insert(self.last, link);
        self.unsettled.insert(self.last);
        Some(self.last)
    }

    /// Returns the link of a session that must go before the session gets another one.
    pub fn surplus_of(&self, session: u32) -> Option<u64> {
        let is_its = |link: &JobLink| matches!(link.end, LinkEnd::Session(of) if of == session);
        let mut links = self.all.iter().filter(|(_, link)| is_its(link));
        let oldest = *links.next()?.0;
        (links.count() + 1 >= SESSION_LINKS).then_some(oldest)
    }

    /// Returns the number of the link that is watched under this number.
    pub fn of_watch(&self, watch: u16) -> Option<u64> {
        self.watched.get(&watch).copied()
    }

    /// Returns a link, to read it or to queue a frame.
    pub fn get_mut(&mut self, number: u64) -> Option<&mut JobLink> {
        let link = self.all.get_mut(&number)?;
        self.unsettled.insert(number);
        Some(link)
    }

    /// Queues a frame for each process.
    pub fn queue_all(&mut self, frame: &Frame<'_>) {
        for (number, link) in &mut self.all {
            link.link.queue(frame);
            self.unsettled.insert(*number);
        }
    }

    /// Counts a call with `bytes` of params, which is to be answered. A session is not trusted, and each call takes
    /// memory: it may send `most` calls ahead.
    pub fn begin_call(&mut self, call: CallPlace, bytes: usize, most: usize) -> CallAdmission {
        let Some(link) = self.all.get_mut(&call.link) else {
            return CallAdmission::Invalid;
        };
        if matches!(link.end, LinkEnd::Executor(_)) {
            return CallAdmission::Accepted;
        }
        if link.open.len() >= most || link.open.contains_key(&call.number) {
            return CallAdmission::Invalid;
        }
        let before: usize = link.open.values().sum();
        // A single call may have as many as a frame.
        let is_over = (before > 0 && before + bytes > SESSION_BYTES)
            || (self.open_bytes > 0 && self.open_bytes + bytes > ALL_SESSION_BYTES);
        let counted = if is_over { 0 } else { bytes };
        link.open.insert(call.number, counted);
        self.open_bytes += counted;
        match is_over {
            true => CallAdmission::TooManyBytes,
            false => CallAdmission::Accepted,
        }
    }

    /// Stops counting a call that gets no answer.
    pub fn end_call(&mut self, call: CallPlace) {
        if let Some(link) = self.all.get_mut(&call.link) {
            self.open_bytes -= link.open.remove(&call.number).unwrap_or(0);
        }
    }

    /// Queues the answer to a call, if its link still exists. `took_us` is its run time, or 0 if that says nothing.
    pub fn answer(&mut self, call: CallPlace, outcome: Result<Vec<u8>, RpcError>, took_us: u64) {
        let (limit, process) = (self.frame_limit, self.own_pid);
        self.end_call(call);
        let Some(link) = self.get_mut(call.link) else {
            return;
        };
        let outcome = outcome.and_then(|result| check_length(result, limit));
        link.link.queue(&Frame::Answer(AnswerFrame {
            id: call.number,
            took_us,
            runner: CallRunner {
                process,
                ..CallRunner::default()
            },
            name: None,
            outcome: outcome.map(Cow::Owned).map_err(Cow::Owned),
        }));
    }

    /// Queues the record of a job as the answer to a call. It is refused if many records wait for the other process,
    /// because a short call can ask for a long one.
    pub fn answer_record(&mut self, call: CallPlace, outcome: Result<Vec<u8>, RpcError>) {
        let unsent = (self.all.get(&call.link)).map_or(0, |link| link.link.unsent_len());
        let outcome = match unsent > UNSENT_RECORDS {
            true => {
                let text = "many records are on their way to this process; ask again";
                Err(RpcError::of(Code::Overloaded, text, false))
            }
            false => outcome,
        };
        self.answer(call, outcome, 0);
    }

    /// Sends queued frames, and watches the links for the needed events.
    pub fn settle(&mut self, reactor: &mut Reactor) {
        let all = &mut self.all;
        self.unsettled.retain(|number| {
            let Some(link) = all.get_mut(number) else {
                return false;
            };
            // A process that does not read its answers is not read either.
            !link.link.settle(link.watch, true, reactor)
        });
    }

    /// Returns whether all queued frames were sent.
    pub fn are_sent(&self) -> bool {
        self.all.values().all(|link| !link.link.has_unsent())
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Removes a link that has ended.
    pub fn remove(&mut self, number: u64, reactor: &mut Reactor) -> Option<JobLink> {
        let link = self.all.remove(&number)?;
        self.open_bytes -= link.open.values().sum::<usize>();
        self.watched.remove(&link.watch);
        reactor.unwatch(link.watch);
        Some(link)
    }
}

/// Returns the result, unless it does not fit into a frame: a stored result may be older than `limits.frame`, and the
/// other process would end the link.
fn check_length(result: Vec<u8>, limit: usize) -> Result<Vec<u8>, RpcError> {
    if result.len() <= longest_payload(limit) {
        return Ok(result);
    }
    let text = format!(
        "a record of {} bytes; limits.frame allows {limit}; preforkd job show prints it",
        result.len()
    );
    Err(RpcError::of(Code::BadOutput, text, true))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_session_has_a_limit_of_calls_and_of_their_bytes() {
        let (own, _other) = UnixStream::pair().unwrap();
        let mut links = JobLinks::new(100);
        let link = links.add(own.into(), LinkEnd::Session(1)).unwrap();
        let call = |number| CallPlace { link, number };
        let mut begin = |number, bytes| links.begin_call(call(number), bytes, 3);
        assert_eq!(begin(1, 2 * SESSION_BYTES), CallAdmission::Accepted);
        assert_eq!(begin(1, 1), CallAdmission::Invalid, "its number is in use");
        assert_eq!(begin(2, 1), CallAdmission::TooManyBytes);
        links.answer(call(1), Ok(Vec::new()), 0);
        let mut begin = |number, bytes| links.begin_call(call(number), bytes, 3);
        assert_eq!(begin(3, SESSION_BYTES - 1), CallAdmission::Accepted);
        assert_eq!(begin(4, 1), CallAdmission::Accepted);
        assert_eq!(begin(5, 0), CallAdmission::Invalid, "that are too many");
        links.end_call(call(2));
        assert_eq!(links.begin_call(call(5), 1, 3), CallAdmission::TooManyBytes);
    }

    #[test]
    fn records_that_a_process_does_not_read_are_limited() {
        let (own, _other) = UnixStream::pair().unwrap();
        let mut links = JobLinks::new(2 * UNSENT_RECORDS);
        let link = links.add(own.into(), LinkEnd::Session(1)).unwrap();
        let call = |number| CallPlace { link, number };
        links.answer_record(call(1), Ok(vec![b' '; UNSENT_RECORDS + 1]));
        let before = links.all[&link].link.unsent_len();
        links.answer_record(call(2), Ok(vec![b' '; 100_000]));
        let more = links.all[&link].link.unsent_len() - before;
        assert!((1..1000).contains(&more), "an error of {more} bytes");
    }

    #[test]
    fn all_sessions_together_have_a_limit_of_bytes() {
        let mut links = JobLinks::new(100);
        let ends: Vec<_> = (0..3).map(|_| UnixStream::pair().unwrap()).collect();
        let mut numbers = Vec::new();
        for (index, (own, _)) in ends.iter().enumerate() {
            let fd = own.try_clone().unwrap().into();
            numbers.push(links.add(fd, LinkEnd::Session(index as u32)).unwrap());
        }
        let mut begin = |at: usize, bytes| {
            let call = CallPlace {
                link: numbers[at],
                number: 1,
            };
            links.begin_call(call, bytes, 3)
        };
        assert_eq!(begin(0, ALL_SESSION_BYTES), CallAdmission::Accepted);
        assert_eq!(begin(1, 1), CallAdmission::TooManyBytes);
        links.end_call(CallPlace {
            link: numbers[0],
            number: 1,
        });
        let call = CallPlace {
            link: numbers[2],
            number: 1,
        };
        assert_eq!(links.begin_call(call, 1, 3), CallAdmission::Accepted);
        assert_eq!(links.open_bytes, 1);
    }

    #[test]
    fn a_record_that_does_not_fit_into_a_frame_is_an_error() {
        let longest = longest_payload(100);
        assert_eq!(
            check_length(vec![b' '; longest], 100).unwrap().len(),
            longest
        );
        let error = check_length(vec![b' '; longest + 1], 100).unwrap_err();
        assert_eq!(error.code, Code::BadOutput.number());
    }
}
