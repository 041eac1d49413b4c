//! Defines the options of `map`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::cli::parse::duration;
use crate::cli::target::TargetArgs;

/// The words of `map`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct MapOptions {
    /// The method's name
    pub method: String,
    /// The server
    #[command(flatten)]
    pub target: TargetArgs,
    /// How many calls run at once, each on a connection of its own
    #[arg(long, short, value_name = "N", default_value_t = 8,
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub jobs: u16,
    /// How long each call may take, such as 500ms or 30s [default: the server's limit]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// For how long a call that did not begin is made again, while the server restarts or is overloaded
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub patience: Duration,
    /// Keep in this file which lines are done, and make no call for those that it names
    #[arg(long, value_name = "FILE")]
    pub resume: Option<PathBuf>,
    /// Write the line's number and a tab before each result
    #[arg(long)]
    pub tag: bool,
}
