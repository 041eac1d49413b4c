//! Defines the options of `bench`.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::dialect::BenchDialect;
use crate::cli::parse::{duration, json};
use crate::cli::target::TargetArgs;
use crate::cli::units::plural;
use crate::error::{Error, Result};

/// The options of `bench`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct BenchOptions {
    /// The name of the method
    pub method: String,
    /// The server
    #[command(flatten)]
    pub target: TargetArgs,
    /// The number of connections
    #[arg(long, short, value_name = "N", default_value = "64")]
    pub connections: NonZeroU32,
    /// The number of open calls on each connection
    #[arg(long, short = 'P', value_name = "N", default_value = "1")]
    pub depth: NonZeroU32,
    /// How long to run [default: 10s, unless --count is given]
    #[arg(long, short, value_name = "TIME", value_parser = duration, conflicts_with = "count")]
    pub duration: Option<Duration>,
    /// The number of calls, instead of a duration
    #[arg(long, short = 'n', value_name = "N")]
    pub count: Option<NonZeroU64>,
    /// Open loop: this number of calls is due each second, also if the server is slow
    #[arg(long, short, value_name = "N")]
    pub rate: Option<NonZeroU64>,
    /// The number of threads that send calls
    #[arg(long, short, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: u16,
    /// The params of each call, as JSON
    #[arg(
        long,
        value_name = "JSON",
        default_value = "null",
        allow_negative_numbers = true
    )]
    pub params: String,
    /// A file with one JSON value per line; the calls use them in turn as params
    #[arg(long, value_name = "FILE", conflicts_with = "params")]
    pub params_file: Option<PathBuf>,
    /// The time limit of each answer; after it, the call has failed
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub timeout: Duration,
    /// The dialect of the connections
    #[arg(long, value_name = "NAME", default_value = "frame")]
    pub dialect: BenchDialect,
    /// Print JSON, for programs
    #[arg(long)]
    pub json: bool,
}

impl BenchOptions {
    /// Checks combinations of options.
    pub(crate) fn check(&self) -> Result<()> {
        json(&self.params, "--params")?;
        if u32::from(self.threads) > self.connections.get() {
            return Err(Error::Usage(format!(
                "--threads {} is too many for {}: each thread needs a connection; give fewer threads or more \
                 --connections",
                self.threads,
                plural(self.connections.get().into(), "connection")
            )));
        }
        if self.depth.get() > MOST_DEPTH {
            return Err(Error::Usage(format!(
                "--depth {} is out of range; give 1 to {MOST_DEPTH}",
                self.depth
            )));
        }
        // A duration of zero is a mistake, and its report would be empty.
        if self.duration.is_some_and(|duration| duration.is_zero()) {
            return Err(Error::Usage(
                "--duration is zero, and no call is made in that time; give 1s or more".into(),
            ));
        }
        if self.timeout.is_zero() {
            return Err(Error::Usage(
                "--timeout is zero, so no answer can arrive in time; give 1ms or more".into(),
            ));
        }
        Ok(())
    }
}

/// The largest number of open calls on one connection.
const MOST_DEPTH: u32 = 65_536;

/// The duration if none is given.
pub(super) const DEFAULT_DURATION: Duration = Duration::from_secs(10);
