//! Commands as handlers: one process a call, its params in arguments or on its standard input, its
//! standard output the result.
//!
//! `arguments` makes the argument list of a call, `run` feeds and reads the process, `output` makes
//! a result of what it wrote, `sweep` sees to it that a call leaves nothing behind. What goes wrong is told to the caller with the end of
//! the program's standard error; a thread that runs a command waits with the call's deadline, and
//! is woken when the call is given up.

mod arguments;
mod marks;
pub mod output;
mod run;
pub mod sweep;

use log::Level;
use nix::errno::Errno;
use serde::Serialize;
use std::borrow::Cow;
use std::ffi::CStr;

use super::prepared_program::{PreparedProgram, guard_hint};
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

/// A command and what is to be done with its output.
#[derive(Debug)]
pub struct CommandHandler {
    program: PreparedProgram,
    arguments: Arguments,
    stdin: Stdin,
    output: OutputFormat,
    max_output: usize,
    /// The nesting that a result may have, and its length in bytes.
    limits: (usize, usize),
}

impl CommandHandler {
    /// The handler of a configured command. `limits`: `limits.depth` and `limits.frame`.
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
        let running = RunningCommand::begin()
            .ok_or_else(|| RpcError::of(Code::Stopping, "this worker leaves", false))?;
        let variable = running.variable();
        let environment = self.program.environment(&variable);
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
            Stopped::TimedOut => RpcError::of(Code::Timeout, "its time was over", true),
            Stopped::GivenUp => RpcError::of(Code::Cancelled, "it was given up", true),
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
            let text = format!("the command wrote what can't be its result: {problem}");
            RpcError::of(Code::BadOutput, text, true).with_data(Data::of(ran.exit, &ran.stderr))
        })
    }
}

/// What the caller is told beside the message.
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
        // The system has nothing to give for now: sending it again is safe, and may do.
        _ if error.is_temporary() => {
            log::debug!("{text}");
            RpcError::of(Code::Overloaded, text, false)
        }
        // What was there at `check` is not any more: somebody has to look at it.
        (SpawnStep::Execute | SpawnStep::Directory, _) => {
            let remedy = "correct the configuration, or put back what is missing";
            TROUBLE.log(Level::Error, format!("{text}; {remedy}"));
            RpcError::of(Code::CommandFailed, text, true)
        }
        _ => {
            TROUBLE.log(Level::Error, format!("{text}{}", guard_hint(error)));
            RpcError::of(Code::CommandFailed, text, true)
        }
    }
}
