//! Defines the options of `map`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::cli::parse::duration;
use crate::cli::target::TargetArgs;

/// The options of `map`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct MapOptions {
    /// The name of the method
    pub method: String,
    /// The server
    #[command(flatten)]
    pub target: TargetArgs,
    /// Calls that run at once, each on its own connection
    #[arg(long, short = 'j', alias = "jobs", value_name = "N", default_value_t = 8,
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub parallel: u16,
    /// The time limit of each call, such as 500ms or 30s [default: that of the server]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// How long to repeat a call that did not begin, while the server restarts or is overloaded
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub patience: Duration,
    /// Record the completed lines in this file, and skip those that it names
    #[arg(long, value_name = "FILE")]
    pub resume: Option<PathBuf>,
    /// Write the line number and a tab before each result
    #[arg(long)]
    pub tag: bool,
}
