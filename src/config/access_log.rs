//! `[access-log]`: where a line for each call goes, in which format, and which calls have one.
//!
//! Refuses a share that is not between 0 and 1, and names of methods that do not exist, because the log would have
//! no line of them.

use log::LevelFilter;
use std::collections::BTreeMap;

use super::check::{Check, KeyValue};
use super::keys::{Time, Word};
use super::raw::RawAccessLog;
use super::remedies::nearest;
use super::settings::{AccessLogConfig, LogConfig, LogFormat, MethodConfig};
use super::units::DurationValue;
use crate::error::Result;
use crate::protocol::call;

/// The methods of the protocol itself.
const PROTOCOL_METHODS: [&str; 2] = [call::CANCEL, call::DISCOVER];
/// The methods that `[jobs]` adds.
const JOB_METHODS: [&str; 4] = [
    call::JOB_ENQUEUE,
    call::JOB_GET,
    call::JOB_WAIT,
    call::JOB_CANCEL,
];

impl AccessLogConfig {
    /// Returns the table as it is written in the file.
    pub(super) fn to_raw(&self) -> RawAccessLog {
        RawAccessLog {
            file: (self.file.as_ref()).map(|path| path.to_string_lossy().into()),
            format: Some(self.format.word()),
            sample: Some(self.sample),
            always_above: Time(Some(DurationValue(self.always_above))),
            methods: Some(self.methods.clone()),
        }
    }
}

/// Resolves the table.
pub(super) fn resolve(
    check: &Check<'_>,
    raw: Option<&RawAccessLog>,
    methods: &BTreeMap<String, MethodConfig>,
    has_jobs: bool,
) -> Result<Option<AccessLogConfig>> {
    let Some(raw) = raw else { return Ok(None) };
    let file = raw.file.as_ref();
    let file = file.map(|text| check.log_file("access-log.file", text));
    Ok(Some(AccessLogConfig {
        file: file.transpose()?,
        format: check.word("access-log.format", raw.format.as_ref(), LogFormat::Json)?,
        sample: sample(check, raw.sample.unwrap_or(1.0))?,
        always_above: raw.always_above.value(check, "access-log.always-above")?,
        methods: match &raw.methods {
            Some(names) => known(check, names, methods, has_jobs)?,
            None => Vec::new(),
        },
    }))
}

/// Returns the warning about lines that the log does not show.
pub(super) fn warning(table: Option<&AccessLogConfig>, log: &LogConfig) -> Option<String> {
    let is_hidden = table?.file.is_none() && log.level < LevelFilter::Info;
    is_hidden.then(|| {
        format!(
            "[access-log] has no file, so its lines go to the log at level info, but log.level is {}, which hides \
             them; set access-log.file, or log.level = \"info\"",
            log.level.word()
        )
    })
}

fn sample(check: &Check<'_>, share: f64) -> Result<f64> {
    // Not a number is in no range.
    if (0.0..=1.0).contains(&share) {
        return Ok(share);
    }
    let problem = format!("{share} is out of range");
    let remedy = "give 0.0 (only errors) to 1.0 (all calls)";
    Err(check.places.error("access-log.sample", problem, remedy))
}

fn known(
    check: &Check<'_>,
    names: &[String],
    methods: &BTreeMap<String, MethodConfig>,
    has_jobs: bool,
) -> Result<Vec<String>> {
    let configured = methods.keys().map(String::as_str);
    let of_jobs = JOB_METHODS.into_iter().filter(|_| has_jobs);
    let all: Vec<&str> = configured.chain(PROTOCOL_METHODS).chain(of_jobs).collect();
    for (index, name) in names.iter().enumerate() {
        let error = |problem: String, remedy: String| {
            let key = format!("access-log.methods[{index}]");
            Err(check.places.error(&key, problem, remedy))
        };
        if !all.contains(&name.as_str()) {
            let remedy = match nearest(name, &all) {
                Some(near) => format!("did you mean {near:?}?"),
                None => "remove it, or add the method".to_owned(),
            };
            return error(format!("there is no method {name:?}"), remedy);
        }
        if names[..index].contains(name) {
            return error(
                format!("{name:?} is there twice"),
                "keep one of the two".into(),
            );
        }
    }
    Ok(names.to_vec())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;
    use crate::config::tests::{root, settings};

    fn table(text: &str) -> Result<AccessLogConfig> {
        let found = settings(&root(), &format!("[access-log]\n{text}"))?;
        Ok(found.access_log.unwrap())
    }

    #[test]
    fn an_empty_table_is_a_line_for_each_call_in_the_log() {
        assert_eq!(settings(&root(), "").unwrap().access_log, None);
        let expected = AccessLogConfig {
            file: None,
            format: LogFormat::Json,
            sample: 1.0,
            always_above: Duration::ZERO,
            methods: Vec::new(),
        };
        assert_eq!(table("").unwrap(), expected);
    }

    #[test]
    fn what_is_refused_says_what_to_write() {
        for (text, expected) in [
            ("sample = 1.5", "1.5 is out of range; give 0.0"),
            ("sample = -1", "-1 is out of range; give 0.0"),
            ("sample = nan", "NaN is out of range; give 0.0"),
            ("sample = '0.5'", "write sample = 0.5, without quotes"),
            ("format = 'jsn'", "did you mean \"json\"?"),
            ("file = ''", "the path is empty"),
            ("file = '/'", "/ is a directory; name a file in it"),
            ("file = '/none/here.log'", "there is no directory /none"),
            (
                "methods = ['pin']",
                "there is no method \"pin\"; did you mean \"ping\"?",
            ),
            ("methods = ['ping', 'ping']", "\"ping\" is there twice"),
            (
                "methods = ['rpc.job.get']",
                "there is no method \"rpc.job.get\"",
            ),
            ("always-above = '-1s'", "always-above"),
            ("allways-above = '1s'", "did you mean `always-above`?"),
        ] {
            let error = table(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let text = "methods = ['ping', 'rpc.discover']\nsample = 0";
        assert_eq!(table(text).unwrap().methods, ["ping", "rpc.discover"]);
    }

    #[test]
    #[cfg(feature = "jobs-sqlite")]
    fn the_methods_of_jobs_can_be_named_where_there_are_jobs() {
        let text = "methods = ['rpc.job.enqueue']\n[jobs]\nstore = 'sqlite:/tmp/jobs.db'";
        assert_eq!(table(text).unwrap().methods, ["rpc.job.enqueue"]);
    }

    #[test]
    fn a_level_that_hides_the_lines_is_warned_of() {
        for (text, is_told) in [
            ("log.level = 'warn'\n[access-log]", true),
            (
                "log.level = 'warn'\n[access-log]\nfile = '/dev/null'",
                false,
            ),
            ("[access-log]", false),
            ("log.level = 'warn'", false),
        ] {
            let warnings = settings(&root(), text).unwrap().warnings;
            let told = warnings.iter().any(|it| it.starts_with("[access-log]"));
            assert_eq!(told, is_told, "{text}: {warnings:?}");
        }
    }

    #[test]
    fn the_file_is_no_file_of_the_server() {
        let text = "log.file = '/tmp/a.log'\n[access-log]\nfile = '/tmp/a.log'";
        let error = settings(&root(), text).unwrap_err().to_string();
        assert!(
            error.contains("access-log.file") && error.contains("log.file too"),
            "{error}"
        );
    }
}
