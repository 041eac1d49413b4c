//! A configured program as it is started: its strings as the kernel wants them.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::config;
use crate::sys::spawn::{ProcessLimits, SpawnError, SpawnStep, SpawnTemplate};

/// What all processes of a program have in common.
#[derive(Debug)]
pub(super) struct PreparedProgram {
    pub template: SpawnTemplate,
    /// All of its environment but the variable of the call.
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

    /// All of its environment, with the variable of the call.
    pub fn environment<'a>(&'a self, call: &'a CStr) -> Vec<&'a CStr> {
        // First: of a long environment only the beginning is read when what a call left is looked for.
        let configured = self.environment.iter().map(|one| &**one);
        [call].into_iter().chain(configured).collect()
    }
}

/// Returns what an operator can do where the system refuses the guard; else nothing.
pub(super) fn guard_hint(error: &SpawnError) -> &'static str {
    match error.step {
        SpawnStep::Guard => "; guard = false starts it without one",
        _ => "",
    }
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("`config` lets no path with NUL through")
}

pub(super) fn c_string(text: impl Into<Vec<u8>>) -> CString {
    CString::new(text).expect("`config` lets nothing with NUL through")
}
