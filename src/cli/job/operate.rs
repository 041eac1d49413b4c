//! Shows and changes the jobs of a server over its control socket: `job list`, `show`, `retry`, `purge`,
//! `pause`, `resume`, `export` and `import`.
//!
//! The master passes the connection to the jobs process, which sends any number of lines and then its answer. A
//! refusal is an error with the exit code that the server has sent.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;

use super::options::{JobCommand, SelectionArgs};
use crate::cli::args::{PlaceArgs, ServerSelector};
use crate::cli::control::ControlConnection;
use crate::cli::output;
use crate::cli::units;
use crate::error::{Error, Result};
use crate::logging::printable_json;
use crate::protocol::control::{ControlRequest, ControlResponse, to_line};
use crate::protocol::job_control::{JobChoice, JobFilter, JobRequest, LAST_LINE, LeftJob};

/// How the lines with jobs are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum JobFormat {
    /// A row of a table for each job.
    Table,
    /// As they came, with unprintable characters escaped.
    Json,
    /// Byte for byte, because `import` reads it.
    Exact,
    /// A message for each job that was left alone, on stderr.
    Left,
}

/// Carries out a command. `name` is the name of the program, and `now_ms` the time in milliseconds since 1970.
pub(crate) fn operate(name: &str, command: JobCommand, now_ms: u64) -> Result<()> {
    let (place, request, format) = request(command)?;
    let format = (format, now_ms);
    let mut connection = JobConnection::open(&place.selector(name), &request)?;
    if request == JobRequest::Import {
        connection.send_jobs(&mut io::stdin().lock())?;
    }
    let said = connection.receive(&mut |line| print_job(name, line, format))?;
    match said {
        Some(text) if format.0 != JobFormat::Exact => {
            output::print(&format!("{}\n", output::printable(&text)))
        }
        // The output of an export has jobs only.
        Some(text) => {
            output::print_error(name, &text);
            Ok(())
        }
        None => Ok(()),
    }
}

/// Returns the server, the request and the format of the jobs in its answer.
fn request(command: JobCommand) -> Result<(PlaceArgs, JobRequest, JobFormat)> {
    let chosen = |args: SelectionArgs| {
        let filter = JobFilter {
            state: args.state,
            method: args.method,
        };
        let ids = args.jobs;
        (args.place, JobChoice { ids, filter })
    };
    Ok(match command {
        JobCommand::List {
            place,
            state,
            method,
            json,
        } => {
            let format = if json {
                JobFormat::Json
            } else {
                JobFormat::Table
            };
            (place, JobRequest::List(JobFilter { state, method }), format)
        }
        JobCommand::Show { job, place } => (place, JobRequest::Show { id: job }, JobFormat::Json),
        JobCommand::Retry(args) => {
            let (place, choice) = chosen(args);
            (place, JobRequest::Retry(choice), JobFormat::Left)
        }
        JobCommand::Purge(args) => {
            let (place, choice) = chosen(args);
            (place, JobRequest::Purge(choice), JobFormat::Left)
        }
        JobCommand::Pause { method, place } => {
            (place, JobRequest::Pause { method }, JobFormat::Left)
        }
        JobCommand::Resume { method, place } => {
            (place, JobRequest::Resume { method }, JobFormat::Left)
        }
        JobCommand::Export { place } => (place, JobRequest::Export, JobFormat::Exact),
        JobCommand::Import { place } => (place, JobRequest::Import, JobFormat::Left),
        other => return Err(Error::Bug(format!("{other:?} needs no control socket"))),
    })
}

/// A connection to the jobs process.
struct JobConnection {
    stream: BufReader<UnixStream>,
}

impl JobConnection {
    fn open(place: &ServerSelector, request: &JobRequest) -> Result<Self> {
        let first = ControlRequest::Job {
            job: request.name().to_owned(),
        };
        let stream = ControlConnection::find(place)?.pass_on(&first)?;
        let mut connection = JobConnection { stream };
        let line = to_line(request).map_err(lost)?;
        connection.send(&line)?;
        Ok(connection)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        match self.stream.get_mut().write_all(bytes) {
            // A refusal may be on its way.
            Err(error) if is_end(&error) => Ok(()),
            outcome => outcome.map_err(lost),
        }
    }

    /// Sends the lines of an export, and an empty line as their end.
    fn send_jobs(&mut self, lines: &mut impl BufRead) -> Result<()> {
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = lines.read_until(b'\n', &mut line);
            match read {
                Ok(0) => return self.send(b"\n"),
                // An empty line would end the import.
                Ok(_) if line.trim_ascii().is_empty() => {}
                Ok(_) => {
                    if !line.ends_with(b"\n") {
                        line.push(b'\n');
                    }
                    self.send(&line)?;
                }
                Err(error) => return Err(Error::system("read the jobs from stdin", error)),
            }
        }
    }

    /// Passes each line with a job to `each`, and returns the message of the answer.
    fn receive(&mut self, each: &mut dyn FnMut(&str) -> Result<bool>) -> Result<Option<String>> {
        let mut line = String::new();
        loop {
            line.clear();
            self.stream.read_line(&mut line).map_err(lost)?;
            let Some(text) = line.strip_suffix('\n') else {
                return Err(lost(ErrorKind::UnexpectedEof.into()));
            };
            if !text.starts_with(LAST_LINE) {
                match each(text)? {
                    true => continue,
                    // Nothing reads the output any more.
                    false => return Ok(None),
                }
            }
            let response: ControlResponse = serde_json::from_str(text)
                .map_err(|error| Error::Protocol(format!("the answer is invalid: {error}")))?;
            return match response.ok {
                true => Ok(response.message),
                false => Err(response.into_error()),
            };
        }
    }
}

fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
    )
}

fn lost(error: io::Error) -> Error {
    match is_end(&error) {
        true => Error::Protocol(
            "the jobs process ended before its answer was complete; the log of the server says why"
                .into(),
        ),
        false => Error::system("exchange with the jobs process", error),
    }
}

/// Prints the line of a job. Returns whether there still is a reader.
fn print_job(name: &str, line: &str, (format, now_ms): (JobFormat, u64)) -> Result<bool> {
    match format {
        JobFormat::Table => output::print_part(&(row(line, now_ms)? + "\n")),
        JobFormat::Json => output::print_part(&(printable_json(line).into_owned() + "\n")),
        JobFormat::Exact => output::print_part(&format!("{line}\n")),
        JobFormat::Left => {
            let left: LeftJob = serde_json::from_str(line)
                .map_err(|error| Error::Protocol(format!("the answer is invalid: {error}")))?;
            output::print_error(name, &format!("{}: {}", left.job, left.left));
            Ok(true)
        }
    }
}

/// Formats a job: id, state, attempts, time and method. The method comes last, because its length is unknown.
fn row(line: &str, now_ms: u64) -> Result<String> {
    let job: crate::client::JobInfo = serde_json::from_str(line)
        .map_err(|error| Error::Protocol(format!("the answer is invalid: {error}")))?;
    let ago = |at: Option<u64>| {
        let age = units::milliseconds(now_ms.saturating_sub(at.unwrap_or(now_ms)));
        format!("{age} ago")
    };
    let when = match &*job.state {
        "waiting" if job.due_at_ms > now_ms => {
            format!("due in {}", units::milliseconds(job.due_at_ms - now_ms))
        }
        "waiting" => format!("due {}", ago(Some(job.due_at_ms))),
        "running" => format!("began {}", ago(job.started_at_ms)),
        _ => format!("ended {}", ago(job.finished_at_ms)),
    };
    let attempts = format!("{}/{}", job.attempt, job.max_attempts);
    let reason = job.reason.map(|reason| format!(" ({reason})"));
    let state = job.state + &reason.unwrap_or_default();
    let text = format!(
        "{}  {state:<16}  {attempts:>9}  {when:<20}  {}",
        job.id, job.method
    );
    // A line feed in a field would begin another row.
    Ok(output::printable(&text).replace(['\n', '\t'], " "))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Cursor;

    const ID: &str = "017f22e2-79b0-7cc3-98c4-dc0c0c07398f";

    fn job(members: &str) -> String {
        format!(
            r#"{{"job":"{ID}","attempt":1,"max_attempts":10,"created_at_ms":0,"due_at_ms":5000,{members}}}"#
        )
    }

    #[test]
    fn each_state_has_its_time() {
        let row = |members: &str| row(&job(members), 10_000).unwrap();
        assert_eq!(
            row(r#""method":"a\nb","state":"waiting","ended":false"#),
            format!("{ID}  waiting                1/10  due 5.0s ago          a b")
        );
        assert_eq!(
            row(
                r#""method":"a","state":"dead","ended":true,"reason":"attempts","finished_at_ms":9500"#
            ),
            format!("{ID}  dead (attempts)        1/10  ended 500ms ago       a")
        );
        assert!(
            row(r#""method":"a","state":"running","ended":false,"started_at_ms":9000"#)
                .contains("  began 1.0s ago  ")
        );
        let late = job(r#""method":"a","state":"waiting","ended":false"#);
        let early = super::row(&late, 2_000).unwrap();
        assert!(early.contains("  due in 3.0s  "), "{early}");
    }

    fn connection() -> (JobConnection, UnixStream) {
        let (own, other) = UnixStream::pair().unwrap();
        let stream = BufReader::new(own);
        (JobConnection { stream }, other)
    }

    #[test]
    fn an_answer_has_jobs_and_ends_with_a_result() {
        let (mut connection, mut server) = connection();
        server
            .write_all(b"{\"job\":1}\n{\"job\":2}\n{\"ok\":true,\"message\":\"two\"}\n")
            .unwrap();
        let mut lines = Vec::new();
        let said = connection.receive(&mut |line| {
            lines.push(line.to_owned());
            Ok(true)
        });
        assert_eq!(said.unwrap().as_deref(), Some("two"));
        assert_eq!(lines, [r#"{"job":1}"#, r#"{"job":2}"#]);
        server
            .write_all(b"{\"ok\":false,\"error\":\"away\",\"code\":69}\n{\"job\":1}\n{\"job\"")
            .unwrap();
        drop(server);
        let refused = connection.receive(&mut |_| Ok(true)).unwrap_err();
        assert_eq!(refused.exit_code(), 69);
        let cut = connection.receive(&mut |_| Ok(true)).unwrap_err();
        assert!(
            cut.to_string().contains("before its answer was complete"),
            "{cut}"
        );
    }

    #[test]
    fn the_lines_of_an_import_are_sent_with_one_empty_line_at_the_end() {
        let (mut connection, server) = connection();
        let mut input = Cursor::new("{\"job\":1}\n\n  \n{\"job\":2}");
        connection.send_jobs(&mut input).unwrap();
        drop(connection);
        let sent = BufReader::new(server).lines();
        let sent: Vec<String> = sent.map(|line| line.unwrap()).collect();
        assert_eq!(sent, [r#"{"job":1}"#, r#"{"job":2}"#, ""]);
    }

    #[test]
    fn an_import_that_was_refused_still_reads_the_refusal() {
        let (mut connection, mut server) = connection();
        server
            .write_all(b"{\"ok\":false,\"error\":\"line 1\"}\n")
            .unwrap();
        drop(server);
        connection.send_jobs(&mut Cursor::new("{}\n")).unwrap();
        let error = connection.receive(&mut |_| Ok(true)).unwrap_err();
        assert_eq!(
            error.to_string(),
            Error::Refused("line 1".into()).to_string()
        );
    }
}
