//! The `preforkd` command: the server of the library without methods of its own.

use std::process::ExitCode;

fn main() -> ExitCode {
    preforkd::Server::new().run()
}
