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

/// The words of `bench`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct BenchOptions {
    /// The method's name
    pub method: String,
    /// The server
    #[command(flatten)]
    pub target: TargetArgs,
    /// How many connections
    #[arg(long, short, value_name = "N", default_value = "64")]
    pub connections: NonZeroU32,
    /// How many calls may be unanswered on each connection
    #[arg(long, short = 'P', value_name = "N", default_value = "1")]
    pub depth: NonZeroU32,
    /// For how long [default: 10s, unless there is --count]
    #[arg(long, short, value_name = "TIME", value_parser = duration, conflicts_with = "count")]
    pub duration: Option<Duration>,
    /// How many calls
    #[arg(long, short = 'n', value_name = "N")]
    pub count: Option<NonZeroU64>,
    /// Open loop: so many calls are due each second, whatever the server does
    #[arg(long, short, value_name = "N")]
    pub rate: Option<NonZeroU64>,
    /// Threads that make the load
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
    /// Params from a file, one JSON a line, in turn
    #[arg(long, value_name = "FILE", conflicts_with = "params")]
    pub params_file: Option<PathBuf>,
    /// How long an answer may take before its call has failed
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub timeout: Duration,
    /// How calls are written
    #[arg(long, value_name = "NAME", default_value = "frame")]
    pub dialect: BenchDialect,
    /// Print it as JSON, for programs
    #[arg(long)]
    pub json: bool,
}

impl BenchOptions {
    /// What no single word can be blamed for.
    pub(crate) fn checked(self) -> Result<Self> {
        json(self.params.clone(), "--params")?;
        if u32::from(self.threads) > self.connections.get() {
            return Err(Error::Usage(format!(
                "{} threads have nothing to do with {}; each needs one at least",
                self.threads,
                plural(self.connections.get().into(), "connection")
            )));
        }
        if self.depth.get() > MOST_DEPTH {
            return Err(Error::Usage(format!(
                "--depth {} is more than {MOST_DEPTH}, and no server reads that far ahead",
                self.depth
            )));
        }
        // Too short for anybody to mean it, and the report would be of nothing.
        if self.duration.is_some_and(|duration| duration.is_zero()) {
            return Err(Error::Usage(
                "--duration is zero, and no call is made in that time; give 1s or more".into(),
            ));
        }
        if self.timeout.is_zero() {
            return Err(Error::Usage(
                "--timeout is zero; no answer comes that fast".into(),
            ));
        }
        Ok(self)
    }
}

/// The most calls ahead on one connection.
const MOST_DEPTH: u32 = 65_536;

/// For how long, where nothing else is said.
pub(super) const DEFAULT_DURATION: Duration = Duration::from_secs(10);
