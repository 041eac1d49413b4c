//! Resolves the environment of commands and pools: `environment`, `environment-file`, and `${NAME}`, which
//! stands for a variable of the server.
//!
//! Values from a file or from the server are kept apart from those in the configuration, so `check` prints
//! only their names. An error names the key, the variable or the line of the file.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::check::Check;
use super::environment::{Environment, KeptVariables};
use super::files::read_bytes;
use super::settings::{ProgramConfig, Settings};
use super::source_map::join;
use crate::error::Result;

/// Preforkd sets it.
const CALL_VARIABLE: &str = "PREFORKD_CALL";

/// The environment of a program.
pub(super) struct Variables {
    /// `environment` as written, with its `${NAME}`.
    pub written: BTreeMap<String, String>,
    /// `environment-file`, absolute.
    pub file: Option<PathBuf>,
    /// What the program gets.
    pub values: BTreeMap<String, String>,
}

/// Resolves the environment in the table `key`. `environment` has precedence over the file.
pub(super) fn resolve(
    key: &str,
    written: BTreeMap<String, String>,
    file: Option<&str>,
    check: &Check<'_>,
) -> Result<Variables> {
    let file_key = join(key, "environment-file");
    let file = file.map(|text| check.path(&file_key, text)).transpose()?;
    if let (Some(_), Some(kept)) = (&file, check.here.kept_variables.get(key)) {
        return Ok(Variables {
            written,
            file,
            values: kept.clone(),
        });
    }
    let mut values = match &file {
        None => BTreeMap::new(),
        Some(path) => match read(path) {
            Ok(values) => values,
            // The file has changed since it was read.
            Err((problem, _)) if check.here.has_served => {
                log::error!(
                    "{problem}; commands and programs that start from now on lack its variables; correct it and reload"
                );
                BTreeMap::new()
            }
            Err((problem, remedy)) => return Err(check.places.error(&file_key, problem, remedy)),
        },
    };
    for (name, value) in &written {
        let key = join(&join(key, "environment"), name);
        if let Err(problem) = check_variable(name, value) {
            return Err(check.places.error(&key, problem, "remove it"));
        }
        match expand(value, check.here.variable) {
            Ok(value) => values.insert(name.clone(), value),
            Err(_) if check.here.is_check => values.insert(name.clone(), String::new()),
            Err(missing) => {
                let problem = format!("the environment of the server has no {missing}");
                let remedy = "set it where the server is started (Environment= of a unit), put its value into \
                              environment-file, or write $${ for a literal ${";
                return Err(check.places.error(&key, problem, remedy));
            }
        };
    }
    Ok(Variables {
        written,
        file,
        values,
    })
}

/// Returns the values from each `environment-file`, for the program of an upgrade: the file may have
/// changed.
pub fn secrets_of(settings: &Settings) -> KeptVariables {
    let all = settings.programs();
    let with_file = all.filter(|(_, _, program)| program.environment_file.is_some());
    with_file
        .map(|(table, name, program)| (join(table, name), program.variables.clone()))
        .collect()
}

/// Returns warnings about environment files that all users can read, because they may have secrets. Also returns the
/// notes of `check` about variables that the server needs and that are not set here.
pub(super) fn warnings(settings: &Settings, here: &Environment) -> Vec<String> {
    let open = |(table, owner, program): (&'static str, &String, &ProgramConfig)| {
        let file = program.environment_file.as_ref()?;
        let mode = file.metadata().ok()?.permissions().mode() & 0o777;
        (mode & 0o004 != 0).then(|| {
            format!(
                "{}.environment-file: every user can read {} (mode {mode:04o}), and it may have secrets; chmod \
                 it to 0600",
                join(table, owner),
                file.display()
            )
        })
    };
    let mut found: Vec<String> = settings.programs().filter_map(open).collect();
    if !here.is_check {
        return found;
    }
    let missing = |(table, owner, program): (&'static str, &String, &ProgramConfig)| {
        let missing = |(name, value): (&String, &String)| {
            let missing = expand(value, here.variable).err()?;
            Some(format!(
                "{table}.{owner}.environment.{name} needs the variable {missing}, which is not set in the environment \
                 of this command; the start fails if it is not set in the environment of the server (Environment= of a unit)"
            ))
        };
        program
            .environment
            .iter()
            .filter_map(missing)
            .collect::<Vec<_>>()
    };
    found.extend(settings.programs().flat_map(missing));
    found
}

/// Reads the lines `KEY=VALUE` of a file. An error has the problem and what to do.
fn read(path: &Path) -> std::result::Result<BTreeMap<String, String>, (String, &'static str)> {
    let refused = |problem: &str, remedy| (format!("{}: {problem}", path.display()), remedy);
    let bytes = read_bytes(path).map_err(|error| {
        let problem = format!("it can't be read: {error}");
        refused(
            &problem,
            "create it, let this user read it, or correct the path",
        )
    })?;
    let text = String::from_utf8(bytes)
        .map_err(|_| refused("it is not UTF-8", "save the file as UTF-8"))?;
    let mut values = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // The text of the line is not shown, because it may be a secret.
        let refused = |problem| {
            refused(
                &format!("line {}: {problem}", index + 1),
                "correct the line",
            )
        };
        let (name, value) = line
            .split_once('=')
            .filter(|(name, _)| is_name(name))
            .ok_or_else(|| refused("this is not KEY=VALUE, with a KEY of letters, digits and _"))?;
        check_variable(name, value).map_err(refused)?;
        values.insert(name.to_owned(), unquoted(value.trim()).to_owned());
    }
    Ok(values)
}

/// Removes the pair of quotes around a value.
fn unquoted(value: &str) -> &str {
    let inner = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
    inner('"').or_else(|| inner('\'')).unwrap_or(value)
}

fn check_variable(name: &str, value: &str) -> std::result::Result<(), &'static str> {
    if name.is_empty() || name.contains(['=', '\0']) {
        Err("this can't be the name of a variable")
    } else if name == CALL_VARIABLE {
        Err("this variable is set by preforkd, and says which call it is")
    } else if value.contains('\0') {
        Err("a variable can't have a NUL byte")
    } else {
        Ok(())
    }
}

fn is_name(text: &str) -> bool {
    !text.starts_with(|first: char| first.is_ascii_digit())
        && !text.is_empty()
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Replaces each `${NAME}` in `value`. Returns the first NAME that does not exist. `$${` is a literal `${`.
fn expand(value: &str, variable: fn(&str) -> Option<String>) -> std::result::Result<String, &str> {
    let mut expanded = String::new();
    let mut rest = value;
    while let Some(at) = rest.find("${") {
        let (before, from) = rest.split_at(at);
        let name = from[2..].split_once('}').filter(|(name, _)| is_name(name));
        if let Some(before) = before.strip_suffix('$') {
            expanded += before;
            expanded += "${";
            rest = &from[2..];
        } else if let Some((name, behind)) = name {
            expanded += before;
            expanded += &variable(name).ok_or(name)?;
            rest = behind;
        } else {
            expanded += before;
            expanded += "${";
            rest = &from[2..];
        }
    }
    Ok(expanded + rest)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_reference_is_replaced_wherever_it_stands() {
        let variable = |name: &str| (name == "A_1").then(|| "${B}".to_owned());
        for (value, expanded) in [
            ("", Ok("")),
            ("plain $A_1 {A_1}", Ok("plain $A_1 {A_1}")),
            ("${A_1}", Ok("${B}")),
            ("<${A_1}|${A_1}>", Ok("<${B}|${B}>")),
            ("$${A_1} $$${A_1}", Ok("${A_1} $${A_1}")),
            ("${} ${1} ${A_1:-x} ${A_1", Ok("${} ${1} ${A_1:-x} ${A_1")),
            ("${A_1}${C}", Err("C")),
        ] {
            assert_eq!(
                expand(value, variable).as_deref(),
                expanded.as_deref(),
                "{value}"
            );
        }
    }

    #[test]
    fn a_file_that_every_user_can_read_is_warned_of() {
        use crate::config::tests::{root, settings};
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display();
        let text = format!("[methods.a]\ncommand = ['true']\nenvironment-file = '{path}'\n");
        for (mode, is_told) in [(0o600, false), (0o640, false), (0o644, true)] {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(file.path(), mode).unwrap();
            let warnings = settings(&root(), &text).unwrap().warnings;
            let told = warnings
                .iter()
                .any(|it| it.starts_with("methods.a.environment-file: "));
            assert_eq!(told, is_told, "{warnings:?}");
        }
    }

    #[test]
    fn a_file_is_read_line_by_line_and_a_wrong_line_is_not_quoted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "# a comment\n\n  A = b\nB=\" c \"\r\nC='d\"'\nD=\nE=\"\nF=a=${A}\n";
        std::fs::write(file.path(), text.replace("A = ", "A= ")).unwrap();
        let values = read(file.path()).unwrap();
        let values: Vec<_> = values.iter().map(|(a, b)| (&**a, &**b)).collect();
        let expected = [
            ("A", "b"),
            ("B", " c "),
            ("C", "d\""),
            ("D", ""),
            ("E", "\""),
            ("F", "a=${A}"),
        ];
        assert_eq!(values, expected);
        for wrong in [
            "secret",
            "1A=secret",
            "A B=secret",
            "export A=secret",
            "=secret",
            "PREFORKD_CALL=secret",
        ] {
            std::fs::write(file.path(), format!("A=b\n{wrong}\n")).unwrap();
            let (problem, _) = read(file.path()).unwrap_err();
            assert!(
                problem.contains("line 2: ") && !problem.contains("secret"),
                "{problem}"
            );
        }
        std::fs::write(file.path(), b"A=\xff").unwrap();
        assert!(read(file.path()).unwrap_err().0.contains("UTF-8"));
        assert!(read(Path::new("/no/such/file")).is_err());
    }
}
