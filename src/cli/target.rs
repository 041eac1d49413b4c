//! Selects the server to call: by an address of the command line, else by the first listener of the
//! configuration. If the command line names a running server, `find_running` has replaced the name by an address.

use std::path::PathBuf;

use clap::Args;

use super::parse::name;
use crate::config::{self, Address, Overrides};
use crate::error::{Error, Result};

/// The server that is to be called.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct TargetArgs {
    /// The server address, such as 127.0.0.1:8080 or unix:/run/preforkd/rpc.sock [default: the first
    /// listener in the configuration]
    #[arg(long, value_name = "ADDR")]
    pub address: Option<String>,
    /// The configuration file [default: /etc/preforkd/preforkd.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The name of the running server, as given to its `run` [default: that of the program]
    #[arg(long, value_name = "NAME", value_parser = name, conflicts_with = "address")]
    pub name: Option<String>,
}

impl TargetArgs {
    /// Returns the address of the server.
    pub(super) fn address(&self, overrides: &Overrides) -> Result<String> {
        if let Some(address) = &self.address {
            return Ok(address.clone());
        }
        let listeners = config::listeners(self.config.as_deref(), overrides)?;
        match listeners.first().map(|listen| &listen.address) {
            Some(Address::Tcp(address)) if address.port() == 0 => Err(Error::Usage(
                "the configuration leaves the port to the system; give the address with --address \
                 (`status` shows it)"
                    .into(),
            )),
            Some(address) => Ok(address.to_string()),
            None => Err(Error::Bug("a configuration without a listener".into())),
        }
    }
}
