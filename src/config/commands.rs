//! The keys of a method with `command`: where params go into its arguments, what is done with its
//! input and output. The program itself is `programs`' business.

use super::check::Check;
use super::programs::{self, Ids};
use super::raw::RawMethod;
use super::settings::{CommandConfig, OutputFormat, Stdin};
use super::source_map::join;
use super::units::ByteSize;
use crate::error::Result;

const MIB: u64 = 1 << 20;

/// The name in an argument that is a placeholder, as in `{name}`.
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

/// An argument that is no placeholder, as the program gets it: `{{` stands for `{`.
pub fn literal(argument: &str) -> String {
    argument.replace("{{", "{")
}

/// Whether a text has something that looks like a placeholder. `${…}` is a shell's own.
pub(super) fn has_placeholder(text: &str) -> bool {
    text.match_indices('{').any(|(at, _)| {
        let name = text[at + 1..].split_once('}');
        name.is_some_and(|(name, _)| is_name(name)) && !text[..at].ends_with('$')
    })
}

/// Whether this looks like a placeholder that is only a part of its argument. In a text with
/// blanks, braces are most likely another language's, and `${…}` is a shell's.
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
    let stdin = match &raw.stdin {
        None if takes_params => Stdin::None,
        None => Stdin::Params,
        Some(word) => match check.choice(&join(key, "stdin"), word, &["params", "text", "none"])? {
            "none" => Stdin::None,
            "text" => Stdin::Text,
            _ => Stdin::Params,
        },
    };
    let output = match &raw.output {
        None => OutputFormat::Text,
        Some(word) => match check.choice(&join(key, "output"), word, &["text", "line", "json"])? {
            "json" => OutputFormat::Json,
            "line" => OutputFormat::Line,
            _ => OutputFormat::Text,
        },
    };
    let max_output = raw.max_output.map_or(MIB, |ByteSize(bytes)| bytes);
    if !(1..=128 * MIB).contains(&max_output) {
        return Err(check.places.error(
            &join(key, "max-output"),
            format!("{} is out of range", ByteSize(max_output)),
            "give 1 to 128MiB",
        ));
    }
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
        Some(name) if placeholder(name).is_some() => {
            Err(check
                .places
                .error(key, "a caller can't name the program", "name it here"))
        }
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
