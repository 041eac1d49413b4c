//! Parses the command line.
//!
//! Returns one [`CliCommand`] with everything parsed that needs no access to the machine. A wrong word is
//! an [`Error::Usage`] that says what to write instead. Help and version are a [`CliCommand`] too, so
//! nothing here prints or exits.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use super::bench::BenchOptions;
use super::job::options::{EnqueueArgs, JobCommand};
use super::map::options::MapOptions;
use super::parse::{duration, id_as_json, json, reading_interval, stop_delay};
pub use super::place::{ConfigArgs, ParamsSource, PlaceArgs, ServerSelector};
use super::target::TargetArgs;
use crate::error::{Error, Result};
use crate::protocol::control::version_of;

/// A prefork RPC server: a master process, one worker per CPU, and your functions.
#[derive(Parser)]
#[command(
    max_term_width = 100,
    after_help = "Exit codes: 0 success; 1 a call was answered with an error, a job is dead or cancelled, or a \
                  reload, a scale or an upgrade was refused; 64 wrong usage; 69 no server there, or it does not answer; 70 a \
                  bug of preforkd; 71 the system refused; 77 permission denied; 78 the configuration is wrong. \
                  `man preforkd` explains all commands and signals."
)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<CliCommand>,
}

/// The command of a command line.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum CliCommand {
    /// Print this text: the help or the version.
    #[command(skip)]
    Print(String),
    /// Start a server in the foreground
    Run {
        #[command(flatten)]
        config: ConfigArgs,
        /// Run in the background, and return when every worker is ready (needs log.file)
        #[arg(long)]
        daemon: bool,
        /// Listen on this address instead of those in the configuration; may be given more than once
        #[arg(long, value_name = "ADDR")]
        listen: Vec<String>,
    },
    /// Check the configuration, and print the values in effect or all errors
    Check {
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Show the master, the workers, the pools and the last deaths
    Status {
        #[command(flatten)]
        place: PlaceArgs,
        /// Print JSON, for programs
        #[arg(long)]
        json: bool,
        /// List the connections that have a process of their own
        #[arg(long)]
        connections: bool,
    },
    /// Print the metrics of the server as Prometheus text
    Metrics {
        #[command(flatten)]
        place: PlaceArgs,
        /// Write to this file instead of stdout, for the textfile collector of node_exporter
        #[arg(long, value_name = "FILE")]
        textfile: Option<PathBuf>,
    },
    /// Show the last slow calls and what they were doing (needs the table [slow-log])
    Slow {
        #[command(flatten)]
        place: PlaceArgs,
        /// Print a JSON array, for programs
        #[arg(long)]
        json: bool,
    },
    /// Reload the configuration, and wait for the result
    Reload {
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Replace the running binary with the installed one, and wait for the result
    Upgrade {
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Change the number of workers, until the next reload
    Scale {
        /// The number of workers, 1 to 1024
        #[arg(value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
        count: u16,
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Stop the server after its running calls, and wait until it is gone
    Stop {
        #[command(flatten)]
        place: PlaceArgs,
        /// Stop at once: the running calls are lost
        #[arg(long)]
        now: bool,
        /// Stop after this time, such as 5s; until then /healthz answers 503 and calls are served
        #[arg(long, value_name = "TIME", value_parser = stop_delay, conflicts_with = "now")]
        after: Option<Duration>,
    },
    /// Serve metrics and status of a running server over HTTP, in the foreground
    Observe {
        #[command(flatten)]
        place: PlaceArgs,
        /// Listen on this address, such as 127.0.0.1:9180 or unix:/run/preforkd/observe.sock
        #[arg(long, value_name = "ADDR")]
        address: String,
    },
    /// Show workers, methods, pools and events in the terminal, and refresh them
    Top {
        #[command(flatten)]
        place: PlaceArgs,
        /// The time between two readings, at least 100ms
        #[arg(long, value_name = "TIME", default_value = "1s", value_parser = reading_interval)]
        interval: Duration,
        /// Print the display once as text, or with --json one object, and exit
        #[arg(long)]
        once: bool,
        /// Print one line per reading: a JSON object in the format of /status.json
        #[arg(long)]
        json: bool,
    },
    /// Call a method and print its result
    Call(CallArgs),
    /// Call a method for each line of stdin, and print the results in order
    Map(MapOptions),
    /// Benchmark a method, and print throughput and latency
    Bench(BenchOptions),
    /// Work with durable jobs and their store
    Job {
        #[command(subcommand)]
        command: JobCommand,
    },
}

/// The options of `call`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct CallArgs {
    /// The name of the method
    pub method: String,
    /// The params as JSON; `-` reads them from stdin
    #[arg(default_value = "null", allow_negative_numbers = true)]
    pub params: ParamsSource,
    #[command(flatten)]
    pub target: TargetArgs,
    /// The time limit of the call, such as 500ms or 30s [default: that of the server]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// The id of the call, a number or a string
    #[arg(long, allow_negative_numbers = true, value_parser = id_as_json)]
    pub id: Option<String>,
    /// Use the JSON-RPC 2.0 form; its params are an array or an object
    #[arg(long)]
    pub jsonrpc: bool,
}

/// Parses the command line. `name` is the name of the program. `words` begins with the program's path.
pub fn parse(name: &str, words: impl IntoIterator<Item = OsString>) -> Result<CliCommand> {
    let version = version_of(name, env!("CARGO_PKG_VERSION"));
    let mut command = CommandLine::command()
        .name(name.to_owned())
        .bin_name(name.to_owned())
        .version(version);
    let low = match command.try_get_matches_from_mut(words) {
        Ok(matches) => CommandLine::from_arg_matches(&matches),
        Err(error) => Err(error),
    };
    match low {
        Ok(CommandLine { command: None }) => {
            Ok(CliCommand::Print(command.render_help().to_string()))
        }
        Ok(CommandLine {
            command: Some(command),
        }) => checked(command),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            ) =>
        {
            Ok(CliCommand::Print(error.render().to_string()))
        }
        Err(error) => {
            let text = error.render().to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            Err(Error::Usage(text.trim_end().to_owned()))
        }
    }
}

/// Checks combinations of options. Also checks JSON arguments, because clap's error text for them is hard to read.
fn checked(command: CliCommand) -> Result<CliCommand> {
    match &command {
        CliCommand::Call(CallArgs {
            params: ParamsSource::Here(text),
            ..
        })
        | CliCommand::Job {
            command:
                JobCommand::Enqueue(EnqueueArgs {
                    params: ParamsSource::Here(text),
                    ..
                }),
        } => json(text, "PARAMS")?,
        CliCommand::Bench(options) => options.check()?,
        _ => {}
    }
    Ok(command)
}
