//! Prepares a configured program for starting: converts its strings for the kernel.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::trace::Trace;
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

    /// Returns the whole environment, with the variables of the call and of its trace. The latter replace
    /// configured ones.
    pub fn environment<'a>(&'a self, call: &'a CStr, trace: &'a [CString]) -> Vec<&'a CStr> {
        // The variable of the call comes first, because the search for leftovers reads only the beginning
        // of a long environment.
        let is_of_trace = |one: &&CString| {
            let name = one.as_bytes().split(|byte| *byte == b'=').next();
            TRACE_VARIABLES.iter().any(|it| Some(it.as_bytes()) == name)
        };
        let configured = self.environment.iter();
        let configured = configured.filter(|one| trace.is_empty() || !is_of_trace(one));
        let others = trace.iter().chain(configured).map(|one| &**one);
        [call].into_iter().chain(others).collect()
    }
}

/// The variables of a trace: the names of the headers in capitals.
const TRACE_VARIABLES: [&str; 2] = ["TRACEPARENT", "TRACESTATE"];

/// Returns the variables of the place of a call in a trace.
pub(super) fn trace_variables(trace: Option<&Trace<'_>>) -> Vec<CString> {
    let Some(trace) = trace else {
        return Vec::new();
    };
    let parent = trace.traceparent();
    let values = [Some(parent.as_str()), trace.tracestate()];
    let variables = TRACE_VARIABLES.iter().zip(values);
    variables
        .filter_map(|(name, value)| Some(c_string(format!("{name}={}", value?))))
        .collect()
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
