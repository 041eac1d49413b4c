//! Whom to call: the command line's word, else the configuration's first listener, else the default.

use std::path::PathBuf;

use clap::Args;

use crate::config::{self, Address, Overrides};
use crate::error::{Error, Result};

/// The server that is to be called.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct TargetArgs {
    /// Where the server is, such as 127.0.0.1:8080 or unix:/run/preforkd/rpc.sock [default: the
    /// configuration's first listener]
    #[arg(long, value_name = "ADDR")]
    pub address: Option<String>,
    /// The configuration file [default: /etc/preforkd/preforkd.toml, if there is one]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl TargetArgs {
    /// Its address, as the client takes it.
    pub(super) fn address(&self, overrides: &Overrides) -> Result<String> {
        if let Some(address) = &self.address {
            return Ok(address.clone());
        }
        let listeners = config::listeners(self.config.as_deref(), overrides)?;
        match listeners.first().map(|listen| &listen.address) {
            Some(Address::Tcp(address)) if address.port() == 0 => Err(Error::Usage(
                "the configuration leaves the port to the system; say with --address which one it \
                 is (`status` shows it)"
                    .into(),
            )),
            Some(address) => Ok(address.to_string()),
            None => Err(Error::Bug("a configuration without a listener".into())),
        }
    }
}
