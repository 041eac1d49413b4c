//! The command line of preforkd, and of every program built on the library.
//!
//! [`main`] reads the words, has the right file do the work, and is the one place that prints an
//! error and picks the exit code. What a command has to say comes back to it as text; `run` alone
//! stays, for as long as the server does.

pub mod args;
pub mod bench;
mod call;
mod check;
mod control;
pub mod map;
pub mod output;
mod parse;
mod status;
mod table;
pub mod target;
mod units;

#[cfg(test)]
mod args_tests;
#[cfg(test)]
mod control_tests;
#[cfg(test)]
mod status_tests;

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use crate::config::{Overrides, server_name};
use crate::error::{Error, Result};
use crate::logging::printable_json;
use crate::server::Server;
use crate::sys::process;
use args::CliCommand;

/// The exit code of a panic, whose own message has been printed when it gets here.
const BUG: u8 = 70;

impl Server {
    /// Does what the command line says, `run` and all the other commands: the whole `main` of a
    /// program. The exit code is one of sysexits.h(3head); README has the list.
    ///
    /// # Before the fork
    /// - **Arguments:** read [`std::env::args`] before `run`, never in a handler. The titles that `ps`
    ///   shows are written over the arguments, so what is read later is wrong.
    /// - **Files:** a file, socket or pipe that the program opens in `main` or in
    ///   [`Server::on_master_start`] stays open in all workers, also with `--daemon` and after an upgrade.
    ///   All workers share it, its position included, so open files for writing with `append`. In `main`
    ///   a C library must open it with `O_CLOEXEC`, as [`std::fs`] does. A descriptor without that flag
    ///   counts as passed on by the shell, and a worker closes it.
    /// - **Threads:** join them before the fork, which copies one thread only. They may be started in
    ///   [`Server::on_worker_start`] instead.
    ///
    /// ```no_run
    /// fn main() -> std::process::ExitCode {
    ///     let arguments: Vec<String> = std::env::args().collect();
    ///     preforkd::Server::new()
    ///         .method("arguments", move |()| Ok(arguments.clone()))
    ///         .run()
    /// }
    /// ```
    pub fn run(self) -> ExitCode {
        main(self)
    }
}

/// Does what the command line says, with this server as the one that `run` starts.
pub fn main(server: Server) -> ExitCode {
    let name = server.name().to_owned();
    let code = match catch_unwind(AssertUnwindSafe(|| dispatch(&name, server))) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            output::print_error(&name, &error.to_string());
            error.exit_code()
        }
        Err(_) => BUG,
    };
    ExitCode::from(code)
}

fn dispatch(name: &str, server: Server) -> Result<()> {
    let mut overrides = Overrides {
        functions: server.functions(),
        ..Overrides::default()
    };
    match args::parse(name, env::args_os())? {
        CliCommand::Print(text) => output::print(&text),
        CliCommand::Run {
            config,
            daemon,
            listen,
            name,
        } => {
            overrides.daemon = daemon;
            overrides.listen = listen;
            let server = match name {
                Some(name) => server.named(name),
                None => server,
            };
            server.serve(config, overrides)
        }
        CliCommand::Check {
            config,
            name: given,
        } => {
            overrides.name = Some(given.unwrap_or_else(|| server_name(name)));
            let checked = check::check(config.as_deref(), &overrides)
                .map_err(|faults| all_but_last(name, faults))?;
            for warning in &checked.warnings {
                output::print_error(name, &format!("warning: {warning}"));
            }
            output::print(&checked.effective)
        }
        CliCommand::Status { place, json } => {
            let answered = control::status(&place)?;
            if json {
                return print_json(&answered.json);
            }
            let colours = output::wants_colours();
            output::print(&status::render(
                name,
                &answered.status,
                process::unix_seconds(),
                colours,
            ))
        }
        CliCommand::Reload { place } => print_line(control::reload(&place, &mut |hint| {
            output::print_error(name, hint);
        })?),
        CliCommand::Upgrade { place } => print_line(control::upgrade(&place, &mut |hint| {
            output::print_error(name, hint);
        })?),
        CliCommand::Scale { place, count } => print_line(control::scale(&place, count)?),
        CliCommand::Stop { place, now, after } => {
            let hint = &mut |hint: &str| output::print_error(name, hint);
            control::stop(&place, now, after, hint)
        }
        CliCommand::Call(call) => print_json(&call::call(&call, &overrides)?),
        CliCommand::Map(options) => map::map(name, &options, &overrides),
        CliCommand::Bench(options) => bench::bench(name, &options, &overrides),
    }
}

/// Prints errors, and leaves the last one to be printed as any other is.
fn all_but_last(name: &str, mut errors: Vec<Error>) -> Error {
    let last = errors.pop();
    for error in errors {
        output::print_error(name, &error.to_string());
    }
    last.unwrap_or_else(|| Error::Bug("a refusal without a reason".into()))
}

fn print_line(text: String) -> Result<()> {
    output::print(&(output::printable(&text) + "\n"))
}

fn print_json(text: &str) -> Result<()> {
    output::print(&(printable_json(text) + "\n"))
}
