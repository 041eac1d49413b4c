//! Prepares a configured program for starting: converts its strings for the kernel.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::Context;
use super::job_attempt::{JOB_VARIABLES, JobAttempt};
use crate::config;
use crate::sys::spawn::{ProcessLimits, SpawnError, SpawnStep, SpawnTemplate};

/// What all processes of a program share.
#[derive(Debug)]
pub(super) struct PreparedProgram {
    pub template: SpawnTemplate,
    /// The configured environment, without the variable of the call.
    environment: Vec<CString>,
}

impl PreparedProgram {
    pub fn new(program: &config::ProgramConfig) -> Self {
        let limits = &program.rlimits;
        let variables = program.variables.iter();
        let has_path = program.variables.contains_key("PATH");
        let path = (!has_path).then(|| format!("PATH={}", config::SEARCH_PATH));
        PreparedProgram {
            template: SpawnTemplate {
                program: c_path(&program.file),
                directory: c_path(&program.directory),
                account: program.account.clone(),
                limits: ProcessLimits {
                    cpu_seconds: limits.cpu.map(|time| time.as_secs()),
                    memory: limits.memory,
                    files: limits.files,
                    processes: limits.processes,
                },
                guard: program.guard,
            },
            environment: variables
                .map(|(name, value)| format!("{name}={value}"))
                .chain(path)
                .map(c_string)
                .collect(),
        }
    }

    /// Adds a variable, which replaces a configured one.
    pub fn with_variable(mut self, name: &str, value: &str) -> Self {
        let is_other = |one: &CString| !one.as_bytes().starts_with(format!("{name}=").as_bytes());
        self.environment.retain(is_other);
        self.environment.push(c_string(format!("{name}={value}")));
        self
    }

    /// Returns the whole environment: `call` is the variable that names the call, and `own` is what `call_variables`
    /// returns. If `own` has a variable of a group, no configured variable of the group is used.
    pub fn environment<'a>(&'a self, call: &'a CStr, own: &'a [CString]) -> Vec<&'a CStr> {
        // The variable of the call comes first, because the search for leftovers reads only the beginning
        // of a long environment.
        let is_replaced = |one: &CString| {
            GROUPS.iter().any(|group| {
                let is_in = |it: &CString| {
                    let name = it.as_bytes().split(|byte| *byte == b'=').next();
                    group.iter().any(|known| Some(known.as_bytes()) == name)
                };
                is_in(one) && own.iter().any(is_in)
            })
        };
        let configured = self.environment.iter();
        let configured = configured.filter(|one| own.is_empty() || !is_replaced(one));
        let others = own.iter().chain(configured).map(|one| &**one);
        [call].into_iter().chain(others).collect()
    }
}

/// The variables of a trace: the names of the headers in capitals.
const TRACE_VARIABLES: [&str; 2] = ["TRACEPARENT", "TRACESTATE"];

/// The variables that replace configured ones together.
const GROUPS: [&[&str]; 2] = [&TRACE_VARIABLES, &JOB_VARIABLES];

/// Returns the variables of the place of a call in a trace, and those of the attempt of a job.
pub(super) fn call_variables(context: &Context<'_>) -> Vec<CString> {
    let mut variables = Vec::new();
    if let Some(trace) = context.trace() {
        let parent = trace.traceparent();
        let values = [Some(parent.as_str()), trace.tracestate()];
        let named = TRACE_VARIABLES.iter().zip(values);
        variables
            .extend(named.filter_map(|(name, value)| Some(c_string(format!("{name}={}", value?)))));
    }
    variables.extend(context.job().into_iter().flat_map(JobAttempt::variables));
    variables
}

/// Returns what to change if the system refuses the guard; otherwise an empty text.
pub(super) fn guard_hint(error: &SpawnError) -> &'static str {
    match error.step {
        SpawnStep::Guard => "; guard = false starts it without one",
        _ => "",
    }
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("`config` refuses a path with a NUL")
}

pub(super) fn c_string(text: impl Into<Vec<u8>>) -> CString {
    CString::new(text).expect("`config` refuses text with a NUL")
}
