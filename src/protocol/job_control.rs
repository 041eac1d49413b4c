//! Defines the messages of the commands about jobs (`job list`, `show`, `retry`, …) over the control socket.
//!
//! 1. The command sends [`ControlRequest::Job`](super::control::ControlRequest) to the master.
//! 2. The master passes the connection to the jobs process, which answers `{"ok":true}`.
//! 3. The command sends a [`JobRequest`] in one line, and for an import the jobs, one per line, and an empty
//!    line.
//! 4. The jobs process sends any number of lines with jobs, and at last a
//!    [`ControlResponse`](super::control::ControlResponse), which begins with `{"ok":`.
//!
//! Ids and states are text here: the jobs process checks them.

use serde::{Deserialize, Serialize};

/// How the last line of an answer begins. The line of a job begins with another member.
pub const LAST_LINE: &str = "{\"ok\":";

/// The request of a command to the jobs process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "job", rename_all = "kebab-case")]
pub enum JobRequest {
    /// Answered with the record of each job.
    List(JobFilter),
    /// Answered with one job and its params.
    Show { id: String },
    /// Lets dead and cancelled jobs wait again. Answered with a [`LeftJob`] for each job that was left alone.
    Retry(JobChoice),
    /// Removes ended jobs. Answered in the same way.
    Purge(JobChoice),
    /// Stops the claims of a method.
    Pause { method: String },
    /// Allows them again.
    Resume { method: String },
    /// Answered with all jobs.
    Export,
    /// Followed by jobs.
    Import,
}

impl JobRequest {
    /// Returns the name of the command.
    pub const fn name(&self) -> &'static str {
        match self {
            JobRequest::List(_) => "list",
            JobRequest::Show { .. } => "show",
            JobRequest::Retry(_) => "retry",
            JobRequest::Purge(_) => "purge",
            JobRequest::Pause { .. } => "pause",
            JobRequest::Resume { .. } => "resume",
            JobRequest::Export => "export",
            JobRequest::Import => "import",
        }
    }

    /// Returns whether it changes nothing.
    pub const fn only_reads(&self) -> bool {
        matches!(
            self,
            JobRequest::List(_) | JobRequest::Show { .. } | JobRequest::Export
        )
    }
}

/// Which jobs a list has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobFilter {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
}

/// The jobs that a command means: those with these ids, or all of a state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobChoice {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<String>,
    #[serde(flatten)]
    pub filter: JobFilter,
}

/// A job that a command left alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftJob {
    pub job: String,
    /// Why, for people.
    pub left: String,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::protocol::control::{ControlResponse, to_line};

    #[test]
    fn requests_are_written_and_read_alike() {
        let dead = JobFilter {
            state: Some("dead".into()),
            method: None,
        };
        for (request, json) in [
            (JobRequest::List(JobFilter::default()), r#"{"job":"list"}"#),
            (
                JobRequest::Show { id: "ID".into() },
                r#"{"job":"show","id":"ID"}"#,
            ),
            (
                JobRequest::Retry(JobChoice {
                    ids: vec!["ID".into()],
                    ..JobChoice::default()
                }),
                r#"{"job":"retry","ids":["ID"]}"#,
            ),
            (
                JobRequest::Purge(JobChoice {
                    ids: Vec::new(),
                    filter: dead,
                }),
                r#"{"job":"purge","state":"dead"}"#,
            ),
            (JobRequest::Import, r#"{"job":"import"}"#),
        ] {
            assert_eq!(serde_json::to_string(&request).unwrap(), json);
            assert_eq!(serde_json::from_str::<JobRequest>(json).unwrap(), request);
            assert!(json.contains(&format!("\"job\":\"{}\"", request.name())));
        }
    }

    #[test]
    fn the_last_line_is_known_by_its_beginning() {
        for response in [ControlResponse::done(), ControlResponse::refused("no", 1)] {
            let line = String::from_utf8(to_line(&response).unwrap()).unwrap();
            assert!(line.starts_with(LAST_LINE), "{line}");
        }
        let left = LeftJob {
            job: "ID".into(),
            left: "it is running".into(),
        };
        let line = serde_json::to_string(&left).unwrap();
        assert!(!line.starts_with(LAST_LINE), "{line}");
    }
}
