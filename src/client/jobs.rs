//! Stores calls as durable jobs (docs/jobs.md) and reads their outcome: the part of `Client` for jobs.
//!
//! The client makes the id of a job before it sends the enqueue. So an enqueue without an answer can be sent
//! again with the same id, and the server stores the job once.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::connection::{Client, whole_millis};
use super::error::ClientError;
use super::job_info::JobInfo;
use crate::protocol::call::{JOB_CANCEL, JOB_ENQUEUE, JOB_GET, JOB_WAIT};
use crate::protocol::job_id::JobId;
use crate::sys::{process, random};

/// A job that the server has stored.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct JobHandle {
    #[serde(rename = "job")]
    id: String,
    #[serde(rename = "new")]
    is_new: bool,
}

impl JobHandle {
    /// Returns the id of the job, a UUID. It is the right to read and cancel the job.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns whether this enqueue has stored the job. False if it existed: its id or its key was used before.
    pub fn is_new(&self) -> bool {
        self.is_new
    }
}

impl AsRef<str> for JobHandle {
    fn as_ref(&self) -> &str {
        &self.id
    }
}

/// What an enqueue may set. `None` leaves a value to the server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EnqueueOptions {
    /// The id, a UUID. An enqueue with the same id, method and params can be sent again: the job is stored
    /// once. Without one the client makes an id.
    pub id: Option<String>,
    /// At most one live job of the method has this key, of 1 to 255 bytes. If there is one, the enqueue is
    /// answered with it.
    pub key: Option<String>,
    /// How long after the enqueue the job is due, at most 365 days.
    pub delay: Option<Duration>,
    /// When the job is due, in milliseconds since 1970 (UTC). It cannot be combined with `delay`.
    pub at_ms: Option<u64>,
    /// -9 to 9. A higher one begins first.
    pub priority: Option<i8>,
    /// The number of attempts, at most the value of the server.
    pub max_attempts: Option<u32>,
    /// The longest run of one attempt, at most the value of the server.
    pub timeout: Option<Duration>,
    /// The time after the enqueue at which the job is dead unless an attempt runs.
    pub expires: Option<Duration>,
}

/// The params of an enqueue.
#[derive(Serialize)]
pub(super) struct EnqueueParams<'a> {
    method: &'a str,
    params: &'a RawValue,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delay_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    at_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<i8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_attempts: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_ms: Option<u64>,
}

impl<'a> EnqueueParams<'a> {
    /// `id` is the one of the options, or a new one.
    pub(super) fn new(
        (method, params): (&'a str, &'a RawValue),
        id: &'a str,
        options: &'a EnqueueOptions,
    ) -> Self {
        EnqueueParams {
            method,
            params,
            id,
            key: options.key.as_deref(),
            delay_ms: options.delay.map(whole_millis),
            at_ms: options.at_ms,
            priority: options.priority,
            max_attempts: options.max_attempts,
            timeout_ms: options.timeout.map(whole_millis),
            expires_ms: options.expires.map(whole_millis),
        }
    }
}

/// Returns a new id for a job: a UUID of version 7 (RFC 9562), so that new ids are close together in the store.
///
/// # Errors
/// [`ClientError::NotSent`] if the kernel gives no random bytes.
pub(crate) fn new_job_id() -> Result<String, ClientError> {
    let random: [u8; 10] = random::random_bytes().map_err(ClientError::NotSent)?;
    Ok(JobId::at(process::unix_time_ms(), random).to_string())
}

impl Client {
    /// Stores a call as a job, which runs later. Returns when the job is on disk.
    ///
    /// # Errors
    /// As for [`Client::call`] and [`Client::connect`]. An enqueue whose connection breaks is sent once more, over a new connection and with the
    /// same id. The job may be stored if [`ClientError::is_safe_to_repeat`] is false. To send such an enqueue again, use
    /// [`Client::enqueue_with`] and an id of your own.
    pub fn enqueue(
        &mut self,
        method: &str,
        params: impl Serialize,
    ) -> Result<JobHandle, ClientError> {
        self.enqueue_with(method, params, &EnqueueOptions::default())
    }

    /// Stores a call as a job with options.
    ///
    /// # Errors
    /// As for [`Client::enqueue`]. With an id the enqueue can always be sent again.
    pub fn enqueue_with(
        &mut self,
        method: &str,
        params: impl Serialize,
        options: &EnqueueOptions,
    ) -> Result<JobHandle, ClientError> {
        let params = to_raw_value(&params).map_err(ClientError::Params)?;
        let new_id = match options.id {
            Some(_) => None,
            None => Some(new_job_id()?),
        };
        let id = options.id.as_deref().or(new_id.as_deref());
        let id = id.unwrap_or_default();
        let params = EnqueueParams::new((method, &params), id, options);
        let stored = self.call(JOB_ENQUEUE, &params);
        let first = match stored {
            Err(error @ (ClientError::Gone(_) | ClientError::NotSent(_) | ClientError::Closed)) => {
                error
            }
            stored => return stored,
        };
        // The server stores a job with this id once.
        let again = Client::connect(&self.address, self.timeout).and_then(|client| {
            *self = client;
            self.call(JOB_ENQUEUE, &params)
        });
        again.map_err(|error| error.or_earlier(Some(first)))
    }

    /// Returns the state of a job, given by its handle or its id.
    ///
    /// # Errors
    /// As for [`Client::call`]. An unknown or removed job is refused as `no-such-job`.
    pub fn job(&mut self, job: impl AsRef<str>) -> Result<JobInfo, ClientError> {
        self.call(JOB_GET, JobParams::of(job.as_ref()))
    }

    /// Waits until a job has ended, however long that takes, and returns its result. The timeout of the client
    /// limits only the wait for each answer of the server.
    ///
    /// # Errors
    /// [`ClientError::Job`] if it is dead or cancelled, and those of [`Client::job`].
    pub fn wait_job<R: DeserializeOwned>(
        &mut self,
        job: impl AsRef<str>,
    ) -> Result<R, ClientError> {
        loop {
            // Half of the time is for the answer to arrive.
            let timeout_ms = self.timeout.map(|limit| whole_millis(limit / 2));
            let params = JobParams {
                timeout_ms,
                ..JobParams::of(job.as_ref())
            };
            let info: JobInfo = self.call(JOB_WAIT, params)?;
            if info.ended {
                return result_of(info);
            }
        }
    }

    /// Cancels a job. A waiting one ends now. A running one is asked to end.
    ///
    /// # Errors
    /// As for [`Client::job`].
    ///
    /// # Returns
    /// False if the job had ended before.
    pub fn cancel_job(&mut self, job: impl AsRef<str>) -> Result<bool, ClientError> {
        self.call(JOB_CANCEL, JobParams::of(job.as_ref()))
    }
}

/// Reads the result of a job that has ended.
pub(super) fn result_of<R: DeserializeOwned>(info: JobInfo) -> Result<R, ClientError> {
    match &info.result {
        Some(result) => serde_json::from_str(result.get()).map_err(ClientError::Result),
        None => Err(ClientError::Job(Box::new(info))),
    }
}

/// The params of the methods that name a job.
#[derive(Serialize)]
pub(super) struct JobParams<'a> {
    pub(super) job: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) timeout_ms: Option<u64>,
}

impl<'a> JobParams<'a> {
    fn of(job: &'a str) -> Self {
        JobParams {
            job,
            timeout_ms: None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_new_id_is_another_one() {
        assert_ne!(new_job_id().unwrap(), new_job_id().unwrap());
    }

    #[test]
    fn an_enqueue_has_only_the_members_that_are_set() {
        let json = |options: &EnqueueOptions| {
            let params = to_raw_value(&[1, 2]).unwrap();
            let params = EnqueueParams::new(("mail", &params), "ID", options);
            serde_json::to_string(&params).unwrap()
        };
        assert_eq!(
            json(&EnqueueOptions::default()),
            r#"{"method":"mail","params":[1,2],"id":"ID"}"#
        );
        let all = EnqueueOptions {
            id: Some("ID".into()),
            key: Some("k".into()),
            delay: Some(Duration::from_micros(1_500)),
            at_ms: Some(9),
            priority: Some(-1),
            max_attempts: Some(2),
            timeout: Some(Duration::from_secs(1)),
            expires: Some(Duration::from_secs(2)),
        };
        assert_eq!(
            json(&all),
            r#"{"method":"mail","params":[1,2],"id":"ID","key":"k","delay_ms":2,"at_ms":9,"priority":-1,"max_attempts":2,"timeout_ms":1000,"expires_ms":2000}"#
        );
    }
}
