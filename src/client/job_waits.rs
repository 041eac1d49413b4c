//! Waits for the ends of a pool's jobs in one thread, over one connection.
//!
//! Each wait is a call that the server answers when the job has ended, or earlier with the job as it is. If the job
//! has not ended, or the connection was lost, the wait is sent again. It changes nothing. The thread ends when
//! no job can be added and all have ended, or when the pool is terminated.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, TryRecvError};

use super::error::ClientError;
use super::handle::Handle;
use super::job_info::JobInfo;
use super::jobs::JobParams;
use super::pipeline::Pipeline;
use super::pool_thread::Shared;
use crate::protocol::call::JOB_WAIT;

/// The largest number of waits at one time. A server with a `limits.pipeline` below this number (1024 by default) reads
/// the rest later, so their answers are delayed.
const MOST_WAITS: usize = 64;
/// How long the server waits for the end of a job before it answers with the job as it is.
const WAIT_MS: u64 = 10_000;
/// After this time without an answer the connection counts as lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// What is done with a job that has ended.
pub(super) type JobResult = Box<dyn FnOnce(Result<JobInfo, ClientError>) + Send>;

/// A job to wait for.
pub(super) struct JobWait {
    pub(super) job: String,
    pub(super) done: JobResult,
}

/// The thread that waits.
pub(super) struct JobWaiter {
    shared: Arc<Shared>,
    /// Disconnected when the pool is terminated. Nothing is ever sent.
    stop: Receiver<()>,
    pipeline: Option<Pipeline>,
    /// Jobs whose wait is to be sent.
    unsent: VecDeque<JobWait>,
    /// Jobs whose wait has no answer yet, with the time when it was sent.
    sent: Vec<(JobWait, Handle<JobInfo>, Instant)>,
    /// The failures in a row, the time of the first one, and the time of the next try.
    failures: u32,
    failing_since: Option<Instant>,
    next_try: Option<Instant>,
}

impl JobWaiter {
    pub(super) fn new(shared: Arc<Shared>, stop: Receiver<()>) -> Self {
        JobWaiter {
            shared,
            stop,
            pipeline: None,
            unsent: VecDeque::new(),
            sent: Vec::new(),
            failures: 0,
            failing_since: None,
            next_try: None,
        }
    }

    /// Waits for the jobs that arrive, until there can be no more.
    pub(super) fn run(mut self, jobs: &Receiver<JobWait>) {
        let mut is_open = true;
        loop {
            while is_open {
                match jobs.try_recv() {
                    Ok(job) => self.unsent.push_back(job),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => is_open = false,
                }
            }
            if self.shared.ended.load(Ordering::SeqCst) {
                return self.end_all();
            }
            self.take_answers();
            self.send_waits();
            if !is_open && self.unsent.is_empty() && self.sent.is_empty() {
                return;
            }
            self.sleep(is_open.then_some(jobs));
        }
    }

    /// Sleeps until a job arrives, an answer arrives, the pool ends, or it is time for the next try.
    fn sleep(&self, jobs: Option<&Receiver<JobWait>>) {
        let mut select = Select::new();
        select.recv(&self.stop);
        if let Some(jobs) = jobs {
            select.recv(jobs);
        }
        for (_, handle, _) in &self.sent {
            select.recv(handle.outcome());
        }
        let oldest = self.sent.iter().map(|(_, _, sent)| *sent + ANSWER_LIMIT);
        match oldest.chain(self.next_try).min() {
            // It does not matter what is ready: `run` looks at everything.
            Some(deadline) => _ = select.ready_deadline(deadline),
            None => _ = select.ready(),
        }
    }

    fn take_answers(&mut self) {
        let now = Instant::now();
        for (job, handle, sent) in std::mem::take(&mut self.sent) {
            match handle.try_wait() {
                Ok(Ok(info)) => {
                    self.failures = 0;
                    self.failing_since = None;
                    self.next_try = None;
                    match info.ended {
                        true => end(job, Ok(info)),
                        false => self.unsent.push_back(job),
                    }
                }
                Ok(Err(error)) => self.failed(job, error),
                Err(_) if now >= sent + ANSWER_LIMIT => {
                    // The answers of the others are lost with the connection too.
                    self.pipeline = None;
                    self.failed(job, ClientError::TimedOut(ANSWER_LIMIT));
                }
                Err(handle) => self.sent.push((job, handle, sent)),
            }
        }
    }

    fn send_waits(&mut self) {
        if self.next_try.is_some_and(|at| at > Instant::now()) {
            return;
        }
        self.next_try = None;
        while self.sent.len() < MOST_WAITS
            && self.next_try.is_none()
            && let Some(job) = self.unsent.pop_front()
        {
            match self.send(&job.job) {
                Ok(handle) => self.sent.push((job, handle, Instant::now())),
                Err(error) => self.failed(job, error),
            }
        }
    }

    fn send(&mut self, job: &str) -> Result<Handle<JobInfo>, ClientError> {
        let pipeline = match self.pipeline.take() {
            Some(pipeline) => self.pipeline.insert(pipeline),
            None => {
                let pipeline = Pipeline::connect(&self.shared.address, Some(ANSWER_LIMIT))?;
                self.pipeline.insert(pipeline)
            }
        };
        let params = JobParams {
            job,
            timeout_ms: Some(WAIT_MS),
        };
        pipeline.submit(JOB_WAIT, params)
    }

    /// Sends the wait again later, or passes on the error.
    fn failed(&mut self, job: JobWait, error: ClientError) {
        let now = Instant::now();
        if self.next_try.is_none() {
            self.failures += 1;
        }
        let since = *self.failing_since.get_or_insert(now);
        let retry = self.shared.retry;
        match retry.after_repeatable(&error, self.failures, now - since) {
            Some(delay) => {
                self.next_try = Some(now + delay);
                self.unsent.push_back(job);
            }
            None => end(job, Err(error)),
        }
    }

    /// The pool was terminated. The jobs continue in the server.
    fn end_all(mut self) {
        self.pipeline = None;
        let sent = self.sent.drain(..).map(|(job, ..)| job);
        for job in sent.chain(self.unsent.drain(..)) {
            end(job, Err(ClientError::Ended));
        }
    }
}

/// Calls the callback. A panic of it does not end the thread.
fn end(job: JobWait, outcome: Result<JobInfo, ClientError>) {
    if catch_unwind(AssertUnwindSafe(|| (job.done)(outcome))).is_err() {
        log::error!("a callback of the client panicked; its result is lost");
    }
}
