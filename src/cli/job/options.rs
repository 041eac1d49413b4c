//! Defines the commands of `job` and their options.
//!
//! `enqueue`, `wait` and `cancel` are calls over a listener. `check` and `schema` need no server. All others
//! use the control socket, because they show params or concern the jobs of all clients.

use std::time::Duration;

use clap::{Args, Subcommand};

use crate::cli::parse::{duration, job_id, job_state, utc_time};
use crate::cli::place::{ConfigArgs, ParamsSource, PlaceArgs};
use crate::cli::target::TargetArgs;

/// The commands of `job`.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum JobCommand {
    /// Store a call as a job, and print its id
    Enqueue(EnqueueArgs),
    /// Wait until a job has ended, and print its result
    Wait {
        /// The id of the job
        #[arg(value_name = "ID", value_parser = job_id)]
        job: String,
        #[command(flatten)]
        target: TargetArgs,
    },
    /// Cancel jobs: a waiting one ends now, a running one is asked to end
    Cancel {
        /// The ids of the jobs
        #[arg(value_name = "ID", required = true, value_parser = job_id)]
        jobs: Vec<String>,
        #[command(flatten)]
        target: TargetArgs,
    },
    /// List jobs in the order of their enqueue, or ended jobs of a state in the order of their end
    List {
        #[command(flatten)]
        place: PlaceArgs,
        /// Only jobs of this state: waiting, running, done, dead or cancelled
        #[arg(long, value_name = "STATE", value_parser = job_state)]
        state: Option<String>,
        /// Only jobs of this method
        #[arg(long, value_name = "METHOD")]
        method: Option<String>,
        /// Print one JSON object per job and line, for programs
        #[arg(long)]
        json: bool,
    },
    /// Print a job with its params as JSON
    Show {
        /// The id of the job
        #[arg(value_name = "ID", value_parser = job_id)]
        job: String,
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Let dead and cancelled jobs wait again, with new attempts
    Retry(SelectionArgs),
    /// Remove ended jobs from the store
    Purge(SelectionArgs),
    /// Begin no further attempts of a method
    Pause {
        /// The name of the method
        #[arg(value_name = "METHOD")]
        method: String,
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Begin attempts of a paused method again
    Resume {
        /// The name of the method
        #[arg(value_name = "METHOD")]
        method: String,
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Write all jobs to stdout, one JSON object per line: the backup of a store
    Export {
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Read the lines of an export from stdin, and store the jobs that do not exist
    Import {
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Test the store that the configuration names; it works with and without a running server
    Check {
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Print the SQL of the store's schema
    Schema,
}

/// The options of `job enqueue`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct EnqueueArgs {
    /// The name of the method
    pub method: String,
    /// The params as JSON; `-` reads them from stdin
    #[arg(default_value = "null", allow_negative_numbers = true)]
    pub params: ParamsSource,
    #[command(flatten)]
    pub target: TargetArgs,
    /// The id of the job, a UUID: the same enqueue can be sent again [default: a new one]
    #[arg(long, value_name = "ID", value_parser = job_id)]
    pub id: Option<String>,
    /// If a job of the method with this key has not ended, print its id and store nothing
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
    /// When the job is due, in UTC, such as 2026-12-01T08:00:00Z [default: now]
    #[arg(long, value_name = "TIME", value_parser = utc_time, conflicts_with = "delay")]
    pub at: Option<u64>,
    /// The time until the job is due, such as 30s or 2h
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub delay: Option<Duration>,
    /// -9 to 9; a higher one begins first [default: that of the method]
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(i8).range(-9..=9))]
    pub priority: Option<i8>,
    /// The number of attempts, at most that of the method [default: that of the method]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_attempts: Option<u32>,
    /// The longest run of one attempt, at most that of the method [default: that of the method]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// A job that still waits after this time is dead
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub expires: Option<Duration>,
    /// Wait until the job has ended, and print its result instead of its id
    #[arg(long)]
    pub wait: bool,
}

/// Selects jobs by their ids, or by state and method.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct SelectionArgs {
    /// The ids of the jobs
    #[arg(value_name = "ID", value_parser = job_id, required_unless_present = "state",
          conflicts_with_all = ["state", "method"])]
    pub jobs: Vec<String>,
    /// All jobs of this state: done, dead or cancelled
    #[arg(long, value_name = "STATE", value_parser = job_state)]
    pub state: Option<String>,
    /// Of these, only the jobs of this method
    #[arg(long, value_name = "METHOD", requires = "state")]
    pub method: Option<String>,
    #[command(flatten)]
    pub place: PlaceArgs,
}
