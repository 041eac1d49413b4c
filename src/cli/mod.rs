//! The command line of preforkd, and of every program that uses the library.
//!
//! [`main`] parses the command line, calls the file of the command, prints its error and chooses the exit code. Most
//! commands return their output as text. `map`, `bench`, `job` and those that stay (`run`, `observe`, `top`) print
//! their output and warnings themselves.

pub mod args;
pub mod bench;
mod call;
mod check;
mod control;
mod job;
mod jobs_table;
pub mod map;
mod metrics;
mod observe;
pub mod output;
mod parse;
mod place;
mod slow;
mod status;
mod table;
pub mod target;
#[cfg(feature = "top")]
mod top;
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
use std::time::Duration;

use crate::config::{Overrides, main_file, server_name};
use crate::error::{Error, Result};
use crate::logging::printable_json;
use crate::server::Server;
use crate::sys::process;
use args::{CliCommand, ConfigArgs, ServerSelector};
use job::options::JobCommand;
use target::TargetArgs;

/// The exit code after a panic. Its message was printed already.
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

/// Runs the command line. `run` starts this server.
pub fn main(server: Server) -> ExitCode {
    let name = server.name().to_owned();
    let code = match catch_unwind(AssertUnwindSafe(|| dispatch(&name, server))) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            output::print_error(&name, &message(&name, &error));
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
            config: ConfigArgs { config, name },
            daemon,
            listen,
        } => {
            overrides.daemon = daemon;
            overrides.listen = listen;
            let server = match name {
                Some(name) => server.named(name),
                None => server,
            };
            server.serve(config, overrides)
        }
        CliCommand::Check { config: given } => {
            overrides.name = Some(given.name.unwrap_or_else(|| server_name(name)));
            let checked = check::check(given.config.as_deref(), &overrides)
                .map_err(|faults| all_but_last(name, faults))?;
            for warning in &checked.warnings {
                output::print_error(name, &format!("warning: {warning}"));
            }
            output::print(&checked.effective)
        }
        CliCommand::Status {
            place,
            json,
            connections,
        } => {
            if json {
                let (status, warning) = metrics::status_json(&place.selector(name))?;
                print_warning(name, warning);
                return print_json(&status);
            }
            let mut answered = control::status(&place.selector(name))?;
            if !connections {
                let isolated = answered.status.isolated.iter_mut();
                isolated.for_each(|listener| listener.list.clear());
            }
            let colours = output::wants_colours();
            output::print(&status::render(
                name,
                &answered.status,
                process::unix_seconds(),
                colours,
            ))
        }
        CliCommand::Metrics { place, textfile } => {
            let (text, warning) = metrics::metrics(&place.selector(name), &overrides)?;
            print_warning(name, warning);
            match textfile {
                Some(file) => metrics::replace_file(&file, &text),
                None => output::print(&text),
            }
        }
        CliCommand::Slow { place, json } => {
            let text = slow::slow(&place.selector(name), json, process::unix_seconds())?;
            if json { print_json(&text) } else { output::print(&text) }
        }
        CliCommand::Reload { place } => {
            print_line(control::reload(&place.selector(name), &mut |hint| {
                output::print_error(name, hint);
            })?)
        }
        CliCommand::Upgrade { place } => {
            print_line(control::upgrade(&place.selector(name), &mut |hint| {
                output::print_error(name, hint);
            })?)
        }
        CliCommand::Scale { place, count } => {
            print_line(control::scale(&place.selector(name), count.into())?)
        }
        CliCommand::Stop { place, now, after } => {
            let hint = &mut |hint: &str| output::print_error(name, hint);
            control::stop(&place.selector(name), now, after, hint)
        }
        CliCommand::Observe { place, address } => {
            observe::observe(name, &place.selector(name), &address, &overrides)
        }
        #[cfg(feature = "top")]
        CliCommand::Top {
            place,
            interval,
            once,
            json,
        } => {
            let output = top::TopOutput { once, json };
            top::top(name, place.selector(name), interval, output)
        }
        #[cfg(not(feature = "top"))]
        CliCommand::Top { .. } => Err(Error::Usage(
            "this program was built without the feature `top`; use `status`, or `status --json` for programs"
                .into(),
        )),
        CliCommand::Call(mut call) => {
            find_running(&mut call.target, name)?;
            print_json(&call::call(&call, &overrides)?)
        }
        CliCommand::Map(mut options) => {
            find_running(&mut options.target, name)?;
            map::map(name, &options, &overrides)
        }
        CliCommand::Bench(mut options) => {
            find_running(&mut options.target, name)?;
            bench::bench(name, &options, &overrides)
        }
        CliCommand::Job { command } => work_with_jobs(name, command, overrides),
    }
}

fn work_with_jobs(name: &str, command: JobCommand, mut overrides: Overrides) -> Result<()> {
    match command {
        JobCommand::Enqueue(mut args) => {
            find_running(&mut args.target, name)?;
            print_json(&job::calls::enqueue(&args, &overrides)?)
        }
        JobCommand::Wait { job, mut target } => {
            find_running(&mut target, name)?;
            print_json(&job::calls::wait(&job, &target, &overrides)?)
        }
        JobCommand::Cancel { jobs, mut target } => {
            find_running(&mut target, name)?;
            print_line(job::calls::cancel(&jobs, &target, &overrides)?)
        }
        JobCommand::Check { config: given } => {
            overrides.name = Some(given.name.unwrap_or_else(|| server_name(name)));
            let report = job::check::check(given.config.as_deref(), &overrides)
                .map_err(|faults| all_but_last(name, faults))?;
            output::print(&report)
        }
        JobCommand::Schema => output::print(&job::check::schema()?),
        command => job::operate::operate(name, command, process::unix_time_ms()),
    }
}

/// Sets the address to the first listener of a running server. If a name is given, that server is asked. If no address,
/// name or configuration is given, the server named `own` is asked; if it does not answer, the default listener is
/// called.
fn find_running(target: &mut TargetArgs, own: &str) -> Result<()> {
    /// Calls must work while the master is stuck.
    const LIMIT: Duration = Duration::from_secs(1);
    let is_unknown = target.address.is_none() && main_file(target.config.as_deref()).is_none();
    let listeners = match &target.name {
        Some(name) => {
            let place = ServerSelector::Config(target.config.clone(), server_name(name));
            control::status(&place)?.status.listeners
        }
        None if is_unknown => {
            let place = ServerSelector::Config(None, server_name(own));
            let answered = control::status_within(&place, LIMIT);
            answered.map_or_else(|_| Vec::new(), |answered| answered.status.listeners)
        }
        None => return Ok(()),
    };
    let first = listeners.into_iter().next();
    target.address = first.map(|listener| listener.address);
    Ok(())
}

/// Returns the message of an error. If no server answers, the message says how to start one with the program `name`.
fn message(name: &str, error: &Error) -> String {
    match error {
        Error::NoServer { .. } => format!(
            "{error}; start one with `{name} run`, or name the running one with --config FILE or --name NAME"
        ),
        _ => error.to_string(),
    }
}

/// Prints all errors except the last one, and returns that.
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

fn print_warning(name: &str, warning: Option<String>) {
    if let Some(warning) = warning {
        output::print_error(name, &format!("warning: {warning}"));
    }
}

fn print_json(text: &str) -> Result<()> {
    output::print(&(printable_json(text) + "\n"))
}
