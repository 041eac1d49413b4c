//! Reports all errors of a configuration, not only the first one.
//!
//! The key of an error is removed, and the rest is checked again, until there is no error. Some keys are needed to
//! check others (a drain timeout, the user, a misspelled table). If the error is in such a key, only unknown keys and
//! wrong types are reported, because other errors could be wrong. After a syntax error nothing else is reported.

use std::collections::BTreeSet;

use super::environment::Environment;
use super::files::Files;
use super::overrides::Overrides;
use super::raw::Raw;
use super::resolve;
use super::settings::Settings;
use super::source_map;
use super::source_map::SourceMap;
use crate::error::Error;

/// The largest number of errors that are reported at once. A file with more was written for another program.
const MOST: usize = 20;

/// Keys that the checks of other keys need.
const PREREQUISITES: [&str; 6] = [
    "include",
    "jobs.store",
    "user",
    "log.file",
    "workers.drain-timeout",
    "limits.timeout",
];

/// Keys of listeners, methods and pools that no check of another key in their table needs.
const INDEPENDENT: [&str; 27] = [
    "backlog",
    "boot-timeout",
    "concurrency",
    "directory",
    "environment",
    "http-methods",
    "idle-timeout",
    "max-calls",
    "max-lifetime",
    "max-memory",
    "max-output",
    "mode",
    "name",
    "output",
    "per-source",
    "processes",
    "rate",
    "ready",
    "reload",
    "respawn-burst",
    "respawn-max-delay",
    "rlimits",
    "socket-group",
    "socket-user",
    "spare",
    "stderr-level",
    "timeout",
];

/// Returns the settings of `files`, or all errors that can be reported, in the order of the files.
pub(super) fn settings_or_faults(
    here: &Environment,
    files: &Files,
    overrides: &Overrides,
) -> Result<Settings, Vec<Error>> {
    let places = source_map::places(files);
    let mut faults = Vec::new();
    let mut without = BTreeSet::new();
    // Tables with an unknown key or a wrong type. They are removed when all such errors are reported.
    let mut doubtful = BTreeSet::new();
    // Whether all keys that the checks of others need are valid.
    let mut complete = true;
    while faults.len() < MOST {
        let (error, dependent) = match source_map::parse_without(files, &without) {
            Err(error) => (error, None),
            Ok(_) if !complete => break,
            Ok(_) if !doubtful.is_empty() => {
                without.append(&mut doubtful);
                continue;
            }
            Ok((raw, places)) => match resolve::resolve(&raw, &places, overrides, here) {
                Ok(settings) if faults.is_empty() => return Ok(settings),
                Ok(_) => break,
                Err(error) => {
                    let dependent = dependent(&error, &raw);
                    (error, Some(dependent))
                }
            },
        };
        let places = places.as_ref().ok();
        let mut culprit = places.and_then(|places| culprit(&error, places));
        if dependent.is_none() {
            // Keys and types are checked without other keys, so errors about them can still be reported.
            let named = places.and_then(|places| named(&error, places));
            match culprit {
                None => complete = false,
                Some(table) if named.as_ref() != Some(&table) => drop(doubtful.insert(table)),
                Some(_) => {}
            }
            culprit = named;
        }
        let is_last = culprit.is_none();
        without.extend(dependent.into_iter().flatten());
        // If its key is removed already, the error would come for ever.
        if culprit.is_some_and(|key| !without.insert(key)) {
            break;
        }
        faults.push(error);
        if is_last {
            break;
        }
    }
    faults.sort_by_key(|fault| match fault {
        Error::Config { file, position, .. } => {
            let place = position.map(|position| (position.line, position.column));
            (file.clone(), place)
        }
        _ => (None, None),
    });
    Err(faults)
}

/// Returns the key or table to remove so that the rest can be checked; `None` if there is none.
fn culprit(error: &Error, places: &SourceMap<'_>) -> Option<String> {
    let Error::Config { key, .. } = error else {
        return None;
    };
    let within = |table: &str| {
        let rest = key.strip_prefix(table);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    let is_table = ["listen", "methods", "pools"].into_iter().any(within);
    if let Some(key) = independent(key, places).filter(|_| is_table) {
        return Some(key);
    }
    if PREREQUISITES.iter().any(|leaned_on| within(leaned_on)) {
        return None;
    }
    // No listener needs another one and no method another one, but the keys of one do.
    if within("listen") {
        // Another address takes the place of this one.
        let is_address = key.ends_with("].address") && places.is_value(key);
        return Some(if is_address {
            key.clone()
        } else {
            "listen".into()
        });
    }
    if let Some(table) = ["methods.", "pools."]
        .iter()
        .find(|it| key.starts_with(**it))
    {
        return places.table_of(table, key);
    }
    let key = key.split('[').next().unwrap_or_default();
    places.is_value(key).then(|| key.to_owned())
}

/// Returns the methods of the pool with this error.
fn dependent(error: &Error, raw: &Raw) -> Vec<String> {
    let Error::Config { key, .. } = error else {
        return Vec::new();
    };
    let is_of = |pool: &String| {
        let rest = key.strip_prefix(&source_map::join("pools", pool));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    let methods = raw.methods.iter();
    let methods = methods.filter(|(_, method)| method.pool.as_ref().is_some_and(is_of));
    methods
        .map(|(name, _)| source_map::join("methods", name))
        .collect()
}

/// If `key` is one of `INDEPENDENT` or below one (`rlimits.files`), returns what to leave out: `key` if the file has
/// it, otherwise the key of `INDEPENDENT`.
fn independent(key: &str, places: &SourceMap<'_>) -> Option<String> {
    INDEPENDENT.iter().find_map(|name| {
        let (table, behind) = key.rsplit_once(&format!(".{name}"))?;
        let is_whole = behind.is_empty() || behind.starts_with('.');
        let known = [key.to_owned(), format!("{table}.{name}")];
        known
            .into_iter()
            .find(|known| is_whole && places.is_set(known))
    })
}

/// Returns the key of an error, or the array that it is in.
fn named(error: &Error, places: &SourceMap<'_>) -> Option<String> {
    let Error::Config { key, .. } = error else {
        return None;
    };
    if let Some(key) = independent(key, places) {
        return Some(key);
    }
    let key = key.split('[').next().unwrap_or_default();
    places.is_set(key).then(|| key.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use super::super::tests::root;
    use super::*;

    fn diagnostics(text: &str) -> Vec<String> {
        let files = Files::of_text(Path::new("/etc/x.toml"), text.to_owned()).unwrap();
        match settings_or_faults(&root(), &files, &Overrides::default()) {
            Ok(settings) => panic!("accepted: {settings:?}"),
            Err(faults) => faults
                .iter()
                .map(|fault| fault.to_string().replace("/etc/x.toml:", ""))
                .collect(),
        }
    }

    #[track_caller]
    fn assert_begin(reported: &[String], begins: &[&str]) {
        assert_eq!(reported.len(), begins.len(), "{reported:#?}");
        for (fault, begin) in reported.iter().zip(begins) {
            assert!(fault.starts_with(begin), "{fault}, not {begin}");
        }
    }

    #[test]
    fn independent_faults_are_told_together_in_the_order_of_the_file() {
        let reported = diagnostics(
            "deamon = true\n\
             http-origins = [\"nowhere\"]\n\
             [limits]\nframe = \"1GiB\"\nbatch = 0\n\
             [workers]\ncuont = 3\nthreads = \"many\"\n\
             [[listen]]\naddress = \"here\"\n\
             [methods.a]\ncommand = [\"/no/such/program\"]\n\
             [methods.\"b c\"]\nbuiltin = \"echo\"\n\
             [methods.d]\nbuiltin = \"ehco\"\n",
        );
        let begins = [
            "1:1: deamon: unknown key",
            "2:",
            "4:9: limits.frame: ",
            "5:9: limits.batch: ",
            "7:1: workers.cuont: unknown key",
            "8:11: workers.threads: ",
            "10:11: listen[0].address: ",
            "12:11: methods.a.command: ",
            "13:10: methods.\"b c\": ",
            "16:11: methods.d.builtin: ",
        ];
        assert_begin(&reported, &begins);
    }

    #[test]
    fn all_faults_of_one_table_are_told() {
        let reported = diagnostics(
            "[[listen]]\naddress = \"here\"\nbacklog = 0\nname = \"a:b\"\n\
             [methods.a]\ncommand = [\"/no/such/program\"]\ntimeout = \"400d\"\nrate = -1\n\
             output = \"xml\"\ndirectory = \"/no/such\"\nrlimits = { files = 1, processes = 0 }\n\
             [methods.b]\nbuiltin = \"ehco\"\nconcurrency = \"x\"\nrate = -1\nfoo = 1\nbar = 2\n\
             [pools.p]\ncommand = [\"true\"]\nprocesses = 0\nready = \"x\"\nmax-calls = -1\n",
        );
        let begins = [
            "2:11: listen[0].address: ",
            "3:11: listen[0].backlog: ",
            "4:8: listen[0].name: ",
            "6:11: methods.a.command: ",
            "7:11: methods.a.timeout: ",
            "8:8: methods.a.rate: ",
            "9:10: methods.a.output: ",
            "10:13: methods.a.directory: ",
            "11:21: methods.a.rlimits.files: ",
            "11:36: methods.a.rlimits.processes: ",
            "14:15: methods.b.concurrency: ",
            "16:1: methods.b.foo: unknown key",
            "17:1: methods.b.bar: unknown key",
            "20:13: pools.p.processes: ",
            "21:9: pools.p.ready: ",
            "22:13: pools.p.max-calls: ",
        ];
        assert_begin(&reported, &begins);
    }

    #[test]
    fn a_broken_pool_or_address_hides_no_fault_elsewhere() {
        let reported = diagnostics(
            "[[listen]]\naddress = \"here\"\nmode = \"0660\"\nper-source = -1\n\
             [[listen]]\naddress = \"there\"\nhttp-methods = \"x\"\n\
             [pools.p]\ncommand = [\"/no/such/program\"]\nstderr-level = \"x\"\n\
             [pools.q]\ncommand = []\n\
             [methods.a]\npool = \"p\"\n\
             [methods.b]\npool = \"r\"\n\
             [limits]\nbatch = 0\n",
        );
        let begins = [
            "2:11: listen[0].address: ",
            "4:14: listen[0].per-source: ",
            "6:11: listen[1].address: ",
            "7:16: listen[1].http-methods: ",
            "9:11: pools.p.command: ",
            "10:16: pools.p.stderr-level: ",
            "12:11: pools.q.command: ",
            "16:8: methods.b.pool: ",
            "18:9: limits.batch: ",
        ];
        assert_begin(&reported, &begins);
    }

    /// A method's timeout is too long for a drain of 30 s, but may be right for the intended one. A group
    /// needs the user, which is misspelled.
    #[test]
    fn nothing_is_said_that_another_fault_may_have_caused() {
        for text in [
            "[workers]\ndrain-timeout = \"400d\"\n[limits]\ntimeout = \"60s\"\n",
            "user = \"no-such-user\"\ngroup = \"daemon\"\n",
            "daemon = true\n[log]\nfile = \"/no/such/directory/log\"\n",
            "[methods.a]\ncommand = [\"/no/such/program\"]\nstdin = \"none\"\nrate = 1\n",
        ] {
            assert_eq!(
                diagnostics(text).len(),
                1,
                "{text}: {:#?}",
                diagnostics(text)
            );
        }
    }

    /// The drain may be 60 s, and the pool may exist.
    #[test]
    fn what_is_misspelt_hides_no_fault_of_form() {
        let reported = diagnostics(
            "[wrokers]\ndrain-timeout = \"60s\"\n\
             [limits]\ntimeout = \"60s\"\nbatsh = 1\n\
             [pools.p]\ncomand = [\"x\"]\nready = 5\n\
             [log]\nfile = 5\n\
             [methods.a]\npool = \"p\"\n\
             [methods.b]\nrate = \"x\"\n",
        );
        let begins = [
            "1:2: wrokers: unknown key",
            "5:1: limits.batsh: unknown key",
            "7:1: pools.p.comand: unknown key",
            "8:9: pools.p.ready: ",
            "10:8: log.file: ",
            "14:8: methods.b.rate: ",
        ];
        assert_begin(&reported, &begins);
    }

    #[test]
    fn a_file_of_faults_alone_is_cut_short() {
        let many: String = (0..100).map(|number| format!("k{number} = 1\n")).collect();
        assert_eq!(diagnostics(&many).len(), MOST);
    }
}
