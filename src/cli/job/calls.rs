//! Enqueues a job, waits for its end and cancels jobs: calls over a listener.
//!
//! A wait continues on a new connection if the old one ends or the server restarts, because it changes nothing. A job
//! that is dead or cancelled is [`Error::Refused`].

use std::thread;
use std::time::{Duration, Instant};

use serde_json::value::RawValue;

use super::options::EnqueueArgs;
use crate::cli::call::{params_of, refusal};
use crate::cli::target::TargetArgs;
use crate::client::retry::Retry;
use crate::client::{Client, ClientError, EnqueueOptions, new_job_id};
use crate::config::Overrides;
use crate::error::{Error, Result};
use crate::protocol::call::JOB_ENQUEUE;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;

/// The longest wait for an answer to a call that does not wait for a job.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// How long a wait is repeated if the server does not answer. A restart of the server ends earlier.
const RETRY: Retry = Retry {
    patience: Duration::from_secs(30),
};
/// A wait that ends earlier than this counts as failed. Otherwise a server that closes each connection would be called
/// without end.
const SHORT_WAIT: Duration = Duration::from_secs(1);

/// Stores a job. Returns its id, or with `--wait` its result.
pub(crate) fn enqueue(args: &EnqueueArgs, overrides: &Overrides) -> Result<String> {
    let text = params_of(&args.params)?;
    let params: &RawValue = serde_json::from_str(&text)
        .map_err(|error| Error::Usage(format!("PARAMS is not JSON: {error}")))?;
    let address = args.target.address(overrides)?;
    let id = match &args.id {
        Some(id) => id.clone(),
        None => new_job_id()?,
    };
    let options = EnqueueOptions {
        id: Some(id.clone()),
        key: args.key.clone(),
        delay: args.delay,
        at_ms: args.at,
        priority: args.priority,
        max_attempts: args.max_attempts,
        timeout: args.timeout,
        expires: args.expires,
    };
    let mut client = Client::connect(&address, Some(ANSWER_LIMIT))?;
    let stored = client.enqueue_with(&args.method, params, &options);
    let job = stored.map_err(|error| unclear(&args.method, &id, error))?;
    drop(client);
    match args.wait {
        true => wait_over(None, &address, job.id()),
        false => Ok(job.id().to_owned()),
    }
}

/// Returns the error of an enqueue. If the job may be stored, it says how to find out.
fn unclear(method: &str, id: &str, error: ClientError) -> Error {
    let may_be_stored = !error.is_safe_to_repeat();
    let hint = format!("\nthe job may be stored; the same command with --id {id} stores it once");
    match error {
        ClientError::Refused(error) if may_be_stored => {
            Error::Refused(refusal(method, &error) + &hint)
        }
        ClientError::Refused(error) if is_without_jobs(&error) => Error::Refused(format!(
            "{}\nthis server has no durable jobs; add the table [jobs] with its store to the configuration",
            refusal(method, &error)
        )),
        ClientError::Refused(error) => Error::Refused(refusal(method, &error)),
        error if may_be_stored => Error::Protocol(error.to_string() + &hint),
        error => error.into(),
    }
}

/// Returns whether the server has no method for enqueues.
fn is_without_jobs(error: &RpcError) -> bool {
    error.table_code() == Some(Code::MethodNotFound) && error.message.contains(JOB_ENQUEUE)
}

/// Waits until a job has ended. Returns its result.
pub(crate) fn wait(job: &str, target: &TargetArgs, overrides: &Overrides) -> Result<String> {
    let address = target.address(overrides)?;
    // Without a server, it fails at once.
    let client = Client::connect(&address, None)?;
    wait_over(Some(client), &address, job)
}

/// Waits over `client`, and over new connections to `address` if there is none or it is lost.
fn wait_over(mut client: Option<Client>, address: &str, job: &str) -> Result<String> {
    let (mut failures, mut first_failure) = (0, Instant::now());
    loop {
        let begun = Instant::now();
        let connected = client.take();
        let connected = connected.map_or_else(|| Client::connect(address, None), Ok);
        let has_connected = connected.is_ok();
        let waited = connected.and_then(|mut client| client.wait_job::<Box<RawValue>>(job));
        let error = match waited {
            Ok(result) => return Ok(result.get().to_owned()),
            Err(error) => error,
        };
        // A server that has no jobs process answers late, so only a lost connection shows that it had worked.
        let has_worked = has_connected && !matches!(error, ClientError::Refused(_));
        if failures == 0 || has_worked && begun.elapsed() >= SHORT_WAIT {
            (failures, first_failure) = (0, Instant::now());
        }
        failures += 1;
        let delay = match error {
            // The server there may be no preforkd.
            ClientError::Protocol(_) => None,
            _ => RETRY.after_repeatable(&error, failures, first_failure.elapsed()),
        };
        match delay {
            Some(delay) => thread::park_timeout(delay),
            None => return Err(failed_wait(job, error)),
        }
    }
}

/// Returns the error of a wait. If another wait may succeed, says how to continue.
fn failed_wait(job: &str, error: ClientError) -> Error {
    let hint = format!("\nthe job may still run; to wait for it again, use job wait {job}");
    let may_succeed = RETRY.after_repeatable(&error, 1, Duration::ZERO).is_some();
    match error {
        ClientError::Refused(error) if may_succeed => {
            Error::Refused(refusal("job wait", &error) + &hint)
        }
        ClientError::Job(_) | ClientError::Refused(_) => failed("job wait", error),
        error => Error::Protocol(error.to_string() + &hint),
    }
}

/// Cancels jobs. Returns a line for each.
///
/// # Errors
/// The first error. The jobs before it are cancelled.
pub(crate) fn cancel(
    jobs: &[String],
    target: &TargetArgs,
    overrides: &Overrides,
) -> Result<String> {
    let mut client = Client::connect(&target.address(overrides)?, Some(ANSWER_LIMIT))?;
    let mut lines = Vec::new();
    for job in jobs {
        let cancelled = client.cancel_job(job);
        lines.push(match cancelled.map_err(|error| failed(job, error))? {
            true => format!("{job} cancelled, or asked to end if it was running"),
            false => format!("{job} had ended before"),
        });
    }
    Ok(lines.join("\n"))
}

fn failed(what: &str, error: ClientError) -> Error {
    match error {
        ClientError::Refused(error) => Error::Refused(refusal(what, &error)),
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn an_enqueue_that_may_be_stored_says_how_to_repeat_it() {
        let refused =
            |code, started| ClientError::Refused(RpcError::of(code, "no answer", started));
        let gone = || ClientError::Gone(io::ErrorKind::ConnectionReset.into());
        for (error, code, is_told) in [
            (refused(Code::Unavailable, true), 1, true),
            (refused(Code::Unavailable, false), 1, false),
            (gone(), 69, true),
        ] {
            let error = unclear("mail", "ID", error);
            assert_eq!(error.exit_code(), code, "{error}");
            let text = error.to_string();
            assert_eq!(
                text.contains("the same command with --id ID"),
                is_told,
                "{text}"
            );
        }
    }
}
