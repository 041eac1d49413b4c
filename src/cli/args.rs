//! The command line: what may be written there, and what it means.
//!
//! In two steps: clap's mirror of the words, then one [`CliCommand`] with everything parsed
//! that can be parsed without looking at the machine. A wrong word is an
//! [`Error::Usage`] that says what to write instead; help and version are a [`CliCommand`] like any
//! other, so that nothing here prints or exits.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use super::bench::BenchOptions;
use super::map::options::MapOptions;
use super::parse::{duration, id_as_json, json, name, stop_delay};
use super::target::TargetArgs;
use crate::config::server_name;
use crate::error::{Error, Result};
use crate::protocol::control::version_of;

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CliCommand {
    /// Print this: help, or the version.
    Print(String),
    /// Start a server.
    Run {
        /// `--config`.
        config: Option<PathBuf>,
        /// `--daemon`.
        daemon: bool,
        /// Each `--listen`, as written.
        listen: Vec<String>,
        /// `--name`.
        name: Option<String>,
    },
    /// Check the configuration.
    Check {
        /// `--config`.
        config: Option<PathBuf>,
        /// `--name`.
        name: Option<String>,
    },
    /// Show what a server does.
    Status {
        /// Which server.
        place: ServerSelector,
        /// `--json`.
        json: bool,
    },
    /// Have a server read its configuration again.
    Reload {
        /// Which server.
        place: ServerSelector,
    },
    /// Have a server run its new binary.
    Upgrade {
        /// Which server.
        place: ServerSelector,
    },
    /// Change a server's number of workers.
    Scale {
        /// Which server.
        place: ServerSelector,
        /// How many there are to be, 1 to 1024.
        count: usize,
    },
    /// End a server.
    Stop {
        /// Which server.
        place: ServerSelector,
        /// `--now`.
        now: bool,
        /// `--after`: serve so long first, not ready for health checks.
        after: Option<Duration>,
    },
    /// Call a method.
    Call(CallArgs),
    /// Call a method for each line of stdin.
    Map(MapOptions),
    /// Load a server.
    Bench(BenchOptions),
}

/// Which running server is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerSelector {
    /// That of this configuration file, or of the default one, and of this name.
    Config(Option<PathBuf>, String),
    /// The one with this control socket.
    Socket(PathBuf),
}

/// A call, as the command line has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallArgs {
    /// The method.
    pub method: String,
    /// The params.
    pub params: ParamsSource,
    /// `--address` and `--config`.
    pub target: TargetArgs,
    /// `--timeout`.
    pub timeout: Option<Duration>,
    /// `--id`, as JSON: a string or a number.
    pub id: Option<String>,
    /// `--jsonrpc`.
    pub jsonrpc: bool,
}

/// Where a call's params are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParamsSource {
    /// Here, as JSON.
    Here(String),
    /// They come on stdin.
    Stdin,
}

/// A prefork RPC server: one master, a worker per CPU, and your functions.
#[derive(Parser)]
#[command(
    max_term_width = 100,
    after_help = "Exit codes: 0 fine; 1 a call was answered with an error, or a reload or upgrade \
                  was refused; 64 usage; 69 no server there; 70 a bug; 71 the system refused; \
                  77 permission; 78 configuration."
)]
struct Low {
    #[command(subcommand)]
    command: Option<LowCommand>,
}

#[derive(Subcommand)]
enum LowCommand {
    /// Start a server and stay in the foreground
    Run {
        #[command(flatten)]
        config: LowConfig,
        /// Leave the terminal; return when every worker is ready (needs log.file)
        #[arg(long)]
        daemon: bool,
        /// Listen here instead of where the configuration says; may be given more than once
        #[arg(long, value_name = "ADDR")]
        listen: Vec<String>,
    },
    /// Check the configuration and print what is in effect
    Check {
        #[command(flatten)]
        config: LowConfig,
    },
    /// Show what master and workers are doing
    Status {
        #[command(flatten)]
        place: LowPlace,
        /// Print it as JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Read the configuration again; wait for the verdict
    Reload {
        #[command(flatten)]
        place: LowPlace,
    },
    /// Replace the running binary by the one that is installed now
    Upgrade {
        #[command(flatten)]
        place: LowPlace,
    },
    /// Change the number of workers, until the next reload
    Scale {
        /// How many workers there are to be, 1 to 1024
        #[arg(value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
        count: u16,
        #[command(flatten)]
        place: LowPlace,
    },
    /// End the server when its calls are answered; wait until it is gone
    Stop {
        #[command(flatten)]
        place: LowPlace,
        /// Do not wait for the calls that run
        #[arg(long)]
        now: bool,
        /// Serve on for so long first, and answer health checks with 503
        #[arg(long, value_name = "TIME", value_parser = stop_delay, conflicts_with = "now")]
        after: Option<Duration>,
    },
    /// Call a method and print its result
    Call {
        /// The method's name
        method: String,
        /// The params as JSON; `-` reads them from stdin
        #[arg(default_value = "null", allow_negative_numbers = true)]
        params: String,
        #[command(flatten)]
        target: TargetArgs,
        /// How long to wait for the answer, such as 500ms or 30s [default: the server's limit]
        #[arg(long, value_name = "TIME", value_parser = duration)]
        timeout: Option<Duration>,
        /// The call's id, a number or a string
        #[arg(long, allow_negative_numbers = true)]
        id: Option<String>,
        /// Call in the JSON-RPC 2.0 form, whose params are an array or an object
        #[arg(long)]
        jsonrpc: bool,
    },
    /// Call a method for each line of stdin, and print the results in their order
    Map(MapOptions),
    /// Load a server with calls of a method, and print how it bears them
    Bench(BenchOptions),
}

#[derive(Args)]
struct LowConfig {
    /// The configuration file [default: /etc/preforkd/preforkd.toml, if there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The server's name, which gives it a pid file, a control socket and titles of its own [default:
    /// the program's]
    #[arg(long, value_name = "NAME", value_parser = name)]
    name: Option<String>,
}

#[derive(Args)]
struct LowPlace {
    #[command(flatten)]
    config: LowConfig,
    /// The server's control socket [default: where the configuration has it]
    #[arg(long, value_name = "PATH", conflicts_with_all = ["config", "name"])]
    control_socket: Option<PathBuf>,
}

impl LowPlace {
    /// The server that is meant, by a program of the name `own`.
    fn selector(self, own: &str) -> ServerSelector {
        let LowConfig { config, name } = self.config;
        match self.control_socket {
            Some(path) => ServerSelector::Socket(path),
            None => ServerSelector::Config(config, name.unwrap_or_else(|| server_name(own))),
        }
    }
}

/// Reads the command line. `name` is what the program calls itself; `words` begins with the
/// program's own.
pub fn parse(name: &str, words: impl IntoIterator<Item = OsString>) -> Result<CliCommand> {
    let version = version_of(name, env!("CARGO_PKG_VERSION"));
    let mut command = Low::command()
        .name(name.to_owned())
        .bin_name(name.to_owned())
        .version(version);
    let low = match command.try_get_matches_from_mut(words) {
        Ok(matches) => Low::from_arg_matches(&matches),
        Err(error) => Err(error),
    };
    match low {
        Ok(Low { command: None }) => Ok(CliCommand::Print(command.render_help().to_string())),
        Ok(Low {
            command: Some(command),
        }) => raise(name, command),
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

/// From the words to what they mean.
fn raise(own: &str, low: LowCommand) -> Result<CliCommand> {
    Ok(match low {
        LowCommand::Run {
            config,
            daemon,
            listen,
        } => CliCommand::Run {
            config: config.config,
            daemon,
            listen,
            name: config.name,
        },
        LowCommand::Check { config } => CliCommand::Check {
            config: config.config,
            name: config.name,
        },
        LowCommand::Status { place, json } => CliCommand::Status {
            place: place.selector(own),
            json,
        },
        LowCommand::Reload { place } => CliCommand::Reload {
            place: place.selector(own),
        },
        LowCommand::Upgrade { place } => CliCommand::Upgrade {
            place: place.selector(own),
        },
        LowCommand::Scale { count, place } => CliCommand::Scale {
            place: place.selector(own),
            count: count.into(),
        },
        LowCommand::Stop { place, now, after } => CliCommand::Stop {
            place: place.selector(own),
            now,
            after,
        },
        LowCommand::Call {
            method,
            params,
            target,
            timeout,
            id,
            jsonrpc,
        } => CliCommand::Call(CallArgs {
            method,
            params: match params.as_str() {
                "-" => ParamsSource::Stdin,
                _ => ParamsSource::Here(json(params, "PARAMS")?),
            },
            target,
            timeout,
            id: id.map(id_as_json),
            jsonrpc,
        }),
        LowCommand::Map(options) => CliCommand::Map(options),
        LowCommand::Bench(options) => CliCommand::Bench(options.checked()?),
    })
}
