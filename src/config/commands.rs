//! Resolves the keys of a method with `command`: where params go in its arguments, and its input and
//! output. `programs` resolves the program itself.

use super::check::Check;
use super::programs::{self, Ids};
use super::raw::RawMethod;
use super::settings::{CommandConfig, OutputFormat, Stdin};
use super::source_map::join;
use super::units::ByteSize;
use crate::error::Result;

const MIB: u64 = 1 << 20;

/// Returns the name if the whole argument is a placeholder, such as `{name}`.
pub fn placeholder(argument: &str) -> Option<&str> {
    let name = argument.strip_prefix('{')?.strip_suffix('}')?;
    is_name(name).then_some(name)
}

fn is_name(text: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_';
    text.starts_with(first)
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
}

/// Returns an argument as the program gets it: `{{` becomes `{`.
pub fn literal(argument: &str) -> String {
    argument.replace("{{", "{")
}

/// Returns whether a text has something that looks like a placeholder. `${…}` belongs to a shell.
pub(super) fn has_placeholder(text: &str) -> bool {
    text.match_indices('{').any(|(at, _)| {
        let name = text[at + 1..].split_once('}');
        name.is_some_and(|(name, _)| is_name(name)) && !text[..at].ends_with('$')
    })
}

/// Returns whether an argument has a placeholder beside other text. In a text with blanks, braces most
/// likely belong to another language, and `${…}` to a shell.
fn has_partial_placeholder(argument: &str) -> bool {
    let argument = argument.replace("{{", "");
    !argument.contains(char::is_whitespace) && has_placeholder(&argument)
}

pub(super) fn resolve(
    key: &str,
    command: &[String],
    raw: &RawMethod,
    check: &Check<'_>,
    workers: Ids,
) -> Result<CommandConfig> {
    let takes_params = command
        .iter()
        .any(|argument| placeholder(argument).is_some());
    let default = if takes_params {
        Stdin::None
    } else {
        Stdin::Params
    };
    let stdin = check.word(&join(key, "stdin"), raw.stdin.as_ref(), default)?;
    let output = check.word(
        &join(key, "output"),
        raw.output.as_ref(),
        OutputFormat::Text,
    )?;
    let max_output = raw.max_output.unwrap_or(ByteSize(MIB));
    let max_output = check.size(&join(key, "max-output"), max_output, 1, 128 * MIB, "")?;
    check_placeholders(&join(key, "command"), command, check)?;
    let example = "[\"getent\", \"hosts\", \"{name}\"]";
    Ok(CommandConfig {
        program: programs::resolve(key, (command, example), &raw.into(), check, workers)?,
        stdin,
        output,
        max_output: max_output as usize,
    })
}

fn check_placeholders(key: &str, command: &[String], check: &Check<'_>) -> Result<()> {
    for argument in command {
        if placeholder(argument).is_none() && has_partial_placeholder(argument) {
            return Err(check.places.error(
                key,
                format!("in {argument:?} the placeholder is a part of an argument"),
                "make it an argument of its own, which is replaced as a whole; a literal { is written {{",
            ));
        }
    }
    match command.first() {
        Some(name) if placeholder(name).is_some() => Err(check.places.error(
            key,
            "the program cannot be a placeholder",
            "write its path here",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placeholder_is_a_whole_argument_or_an_error() {
        assert_eq!(placeholder("{name}"), Some("name"));
        assert_eq!(placeholder("{first_name-2}"), Some("first_name-2"));
        for literal in ["{}", "{print $1}", "{a}{b}", "${HOME}", "{1}", "{a", "name"] {
            assert_eq!(placeholder(literal), None, "{literal}");
        }
        for partial in ["--host={name}", "/srv/{name}.txt", "{a}{b}"] {
            assert!(has_partial_placeholder(partial), "{partial}");
        }
        for text in [
            "echo {name} x",
            "${HOME}",
            "{}",
            "{print $1}",
            "a{1,2}",
            "{{name}",
            "a{{b}",
        ] {
            assert!(!has_partial_placeholder(text), "{text}");
        }
        assert_eq!(placeholder("{{name}"), None);
        assert_eq!(literal("a{{name}{}"), "a{name}{}");
    }
}
