//! Runs commands as handlers: one process per call. The params are in its arguments or on its standard
//! input, and its standard output is the result.
//!
//! `arguments` makes the argument list of a call. `run` feeds and reads the process, and `output` makes a
//! result of its output. `sweep` ends everything that a call leaves behind. An error contains the end
//! of the program's standard error. The handler thread waits until the call's deadline, and is woken if
//! the call is given up.

mod arguments;
pub mod in_progress;
mod marks;
pub mod output;
mod run;
pub mod sweep;

use log::Level;
use nix::errno::Errno;
use serde::Serialize;
use std::borrow::Cow;
use std::ffi::CStr;

use super::prepared_program::{PreparedProgram, call_variables, guard_hint};
use super::{Context, Handler};
use crate::config::{self, OutputFormat, Stdin};
use crate::logging::pluralize;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::Exit;
use crate::sys::spawn::{SpawnError, SpawnStep};

use arguments::Arguments;
use marks::TROUBLE;
use run::{Ran, Stopped};
use sweep::RunningCommand;

/// A command and how to handle its output.
#[derive(Debug)]
pub struct CommandHandler {
    program: PreparedProgram,
    arguments: Arguments,
    stdin: Stdin,
    output: OutputFormat,
    max_output: usize,
    /// `limits.depth` and `limits.frame`, for the result.
    limits: (usize, usize),
}

impl CommandHandler {
    /// Creates the handler of a configured command. `limits`: `limits.depth` and `limits.frame`.
    pub fn new(command: &config::CommandConfig, limits: (usize, usize)) -> Self {
        CommandHandler {
            program: PreparedProgram::new(&command.program),
            arguments: Arguments::new(&command.program.arguments),
            stdin: command.stdin,
            output: command.output,
            max_output: command.max_output,
            limits,
        }
    }

    fn run(&self, params: &str, context: &Context<'_>) -> Result<Ran, RpcError> {
        let arguments = self.arguments.of_call(params)?;
        let running = RunningCommand::begin(context.number())
            .ok_or_else(|| RpcError::of(Code::Stopping, "this worker is exiting", false))?;
        let variable = running.variable();
        let own = call_variables(context);
        let environment = self.program.environment(&variable, &own);
        let input = match self.stdin {
            Stdin::Params => Some(Cow::Borrowed(params)),
            Stdin::Text => match serde_json::from_str::<String>(params) {
                Ok(text) => Some(Cow::Owned(text)),
                Err(_) => return Err(RpcError::invalid_params("params must be a string")),
            },
            Stdin::None => None,
        };
        let ran = run::start(
            &self.program.template,
            &arguments,
            &environment,
            input.is_some(),
        )
        .map_err(|error| not_started(&self.program.template.program, &error))
        .and_then(|process| {
            process
                .finish(
                    input.as_deref().unwrap_or_default().as_bytes(),
                    self.max_output,
                    context,
                )
                .map_err(|stopped| self.stopped(stopped))
        });
        running.end();
        ran
    }

    fn stopped(&self, stopped: Stopped) -> RpcError {
        match stopped {
            Stopped::TimedOut => RpcError::of(Code::Timeout, "its deadline has passed", true),
            Stopped::GivenUp => RpcError::of(Code::Cancelled, "the call was cancelled", true),
            Stopped::Failed => {
                let text = "the system did not say how the command ended; memory may be short";
                RpcError::of(Code::Internal, text, true)
            }
            Stopped::TooMuch { stderr } => {
                let text = format!(
                    "it wrote more than the {} of max-output, and was killed",
                    pluralize(self.max_output, "byte", "bytes")
                );
                let data = Data {
                    exit: None,
                    signal: None,
                    stderr: &stderr,
                };
                RpcError::of(Code::BadOutput, text, true).with_data(data)
            }
        }
    }
}

impl Handler for CommandHandler {
    fn call(
        &self,
        params: &str,
        context: &Context<'_>,
        result: &mut Vec<u8>,
    ) -> Result<(), RpcError> {
        let ran = self.run(params, context)?;
        if ran.exit.code() != Some(0) {
            let text = format!("the command ended with {}", ran.exit);
            return Err(RpcError::of(Code::CommandFailed, text, true)
                .with_data(Data::of(ran.exit, &ran.stderr)));
        }
        output::append(self.output, ran.stdout, self.limits, result).map_err(|problem| {
            let text = format!("the output of the command cannot be its result: {problem}");
            RpcError::of(Code::BadOutput, text, true).with_data(Data::of(ran.exit, &ran.stderr))
        })
    }
}

/// The `data` of an error.
#[derive(Serialize)]
struct Data<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    exit: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    signal: Option<String>,
    stderr: &'a str,
}

impl<'a> Data<'a> {
    fn of(exit: Exit, stderr: &'a str) -> Self {
        Data {
            exit: exit.code(),
            signal: exit.signal_name(),
            stderr,
        }
    }
}

fn not_started(program: &CStr, error: &SpawnError) -> RpcError {
    let text = format!(
        "{} could not be started: {error}",
        program.to_string_lossy()
    );
    match (error.step, error.errno) {
        (SpawnStep::Execute, Errno::E2BIG) => RpcError::invalid_params(
            "the arguments and the environment together are longer than the system allows",
        ),
        // A temporary lack of resources: it is safe to send the call again, and that may succeed.
        _ if error.is_temporary() => {
            log::debug!("{text}");
            RpcError::of(Code::Overloaded, text, false)
        }
        // A file that existed at `check` is missing, so an operator has to act.
        (SpawnStep::Execute | SpawnStep::Directory, _) => {
            let remedy = "correct the configuration, or restore the missing file";
            TROUBLE.log(Level::Error, format!("{text}; {remedy}"));
            RpcError::of(Code::CommandFailed, text, true)
        }
        _ => {
            TROUBLE.log(Level::Error, format!("{text}{}", guard_hint(error)));
            RpcError::of(Code::CommandFailed, text, true)
        }
    }
}
