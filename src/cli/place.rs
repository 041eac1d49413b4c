//! Defines the options that select a running server and its configuration, and the source of params.

use std::path::PathBuf;

use clap::Args;

use super::parse::name;
use crate::config::server_name;

/// The configuration, and the name of its server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct ConfigArgs {
    /// The configuration file [default: /etc/preforkd/preforkd.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The name of the server, in its pid file, control socket and process titles [default: that of
    /// the program]
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,
}

/// The options that select a running server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct PlaceArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The control socket of the server [default: as in the configuration]
    #[arg(long, value_name = "PATH", conflicts_with_all = ["config", "name"])]
    pub control_socket: Option<PathBuf>,
}

/// Selects a running server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerSelector {
    /// By a configuration file, or the default one, and a name.
    Config(Option<PathBuf>, String),
    /// By its control socket.
    Socket(PathBuf),
}

impl PlaceArgs {
    /// Returns the selected server. `own` is the name of the program.
    pub(super) fn selector(self, own: &str) -> ServerSelector {
        let ConfigArgs { config, name } = self.config;
        match self.control_socket {
            Some(path) => ServerSelector::Socket(path),
            None => ServerSelector::Config(config, name.unwrap_or_else(|| server_name(own))),
        }
    }
}

/// The source of a call's params.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParamsSource {
    /// The text on the command line.
    Here(String),
    /// Standard input.
    Stdin,
}

impl From<String> for ParamsSource {
    fn from(text: String) -> Self {
        match text.as_str() {
            "-" => ParamsSource::Stdin,
            _ => ParamsSource::Here(text),
        }
    }
}
