//! The `preforkd` command: the library's server with no method of its own.

use std::process::ExitCode;

fn main() -> ExitCode {
    preforkd::Server::new().run()
}
