//! Warns about commands that run what a caller sends as a program, `sh -c` and the like, and about
//! placeholders with a typing mistake.
//!
//! A placeholder is safe as an argument of a program that takes data. But the argument after `sh -c` is a
//! program, and so is the first argument of `env` or `xargs`. Only known programs are recognized.

use std::path::Path;

use super::commands::{has_placeholder, placeholder};
use super::settings::Settings;
use super::source_map::join;

/// Programs that run the argument after this option.
const INTERPRETERS: [(&str, &str); 17] = [
    ("sh", "-c"),
    ("bash", "-c"),
    ("dash", "-c"),
    ("ash", "-c"),
    ("ksh", "-c"),
    ("mksh", "-c"),
    ("zsh", "-c"),
    ("fish", "-c"),
    ("python", "-c"),
    ("perl", "-e"),
    ("ruby", "-e"),
    ("lua", "-e"),
    ("node", "-e"),
    ("nodejs", "-e"),
    ("php", "-r"),
    ("Rscript", "-e"),
    ("osascript", "-e"),
];
/// Programs that run the first argument that is not an option.
const LAUNCHERS: [&str; 12] = [
    "doas", "env", "flock", "ionice", "nice", "nohup", "setsid", "ssh", "stdbuf", "sudo",
    "timeout", "xargs",
];

/// Returns the warnings about the commands of methods and pools.
pub(super) fn warnings(settings: &Settings) -> impl Iterator<Item = String> {
    settings.programs().filter_map(|(table, name, program)| {
        let problem = match table {
            "methods" => problem(&program.arguments).or_else(|| misspelt(&program.arguments)),
            _ => of_pool(&program.arguments),
        };
        Some(format!("{}.command: {}", join(table, name), problem?))
    })
}

/// Returns what is wrong with the command of a pool, whose arguments are passed as they are.
fn of_pool(arguments: &[String]) -> Option<String> {
    let argument = arguments.iter().find(|it| placeholder(it).is_some())?;
    Some(format!(
        "the program gets {argument} as it is, because it gets the params with each call; read them there"
    ))
}

/// Returns what is wrong with an argument that is most likely meant as a placeholder: it has blanks, no name
/// or no second brace. Braces with other text are those of awk, JSON and the like.
fn misspelt(arguments: &[String]) -> Option<String> {
    let file_name = |argument: &String| Some(Path::new(argument).file_name()?.to_owned());
    let names = arguments.iter().filter_map(file_name);
    let mut launchers = names.filter(|name| {
        ["find", "fd", "xargs", "parallel"]
            .iter()
            .any(|it| name == it)
    });
    // Programs for which {} is a placeholder of their own.
    let replaces_braces = launchers.next().is_some();
    let (argument, name) = arguments.iter().find_map(|argument| {
        let inner = argument.trim().strip_prefix('{')?;
        let words: Vec<&str> = inner.trim_end_matches('}').split_whitespace().collect();
        let name = match inner {
            "}" if replaces_braces => return None,
            "}" => "name".to_owned(),
            _ => words.join("-"),
        };
        let is_meant = placeholder(&format!("{{{name}}}")).is_some();
        (is_meant && placeholder(argument).is_none()).then_some((argument, name))
    })?;
    let literal = argument.replace('{', "{{");
    Some(format!(
        "the program gets {argument:?} as it is, because it is not a placeholder; write \"{{{name}}}\" for the \
         member {name} of the params, or {literal:?} for that text"
    ))
}

/// Returns what is dangerous in a command line.
fn problem(arguments: &[String]) -> Option<String> {
    (0..arguments.len()).find_map(|at| {
        let name = Path::new(&arguments[at]).file_name()?.to_str()?;
        let rest = &arguments[at + 1..];
        let known = INTERPRETERS.iter().find(|(known, _)| is_version_of(name, known));
        if let Some((_, option)) = known {
            let code = code_behind(rest, option)?;
            return has_placeholder(code).then(|| interpreted(name, option, code));
        }
        if LAUNCHERS.contains(&name) {
            let program = rest.iter().find(|argument| !argument.starts_with('-'))?;
            return placeholder(program).map(|param| {
                format!(
                    "{name} runs the program that a caller names in {{{param}}}, whatever it is; name the \
                     program in the command"
                )
            });
        }
        None
    })
}

fn interpreted(name: &str, option: &str, code: &str) -> String {
    let what = match placeholder(code) {
        Some(param) => {
            format!("{name} {option} runs whatever a caller sends in {{{param}}} as a program")
        }
        None => format!(
            "{code:?} is a program for {name} {option}: a placeholder is not replaced within it, and text of a \
             caller there would let the caller run any program"
        ),
    };
    format!(
        "{what}; pass it as an argument: [\"sh\", \"-c\", \"… \\\"$1\\\"\", \"sh\", \"{{name}}\"]"
    )
}

/// Returns the argument that an interpreter runs: after `-c`, after `-ec`, or within `-cCODE`. After the
/// name of a script, options belong to the script.
fn code_behind<'a>(arguments: &'a [String], option: &str) -> Option<&'a str> {
    let letter = option.chars().last()?;
    let is_wanted = |it: &str| it.starts_with('-') && !it.starts_with("--") && it.contains(letter);
    let mut takes_value = false;
    let at = arguments.iter().position(|it| {
        let is_script = !takes_value && !it.starts_with('-');
        takes_value = ["-o", "-O", "-W", "-X"].contains(&it.as_str());
        is_script || is_wanted(it)
    })?;
    if !is_wanted(&arguments[at]) {
        return None;
    }
    match arguments[at].strip_prefix(option) {
        Some(code) if code.contains('{') => Some(code),
        _ => arguments.get(at + 1).map(String::as_str),
    }
}

/// Returns whether this is `known`, possibly with a version: `python3.12`.
fn is_version_of(name: &str, known: &str) -> bool {
    let rest = name.strip_prefix(known);
    rest.is_some_and(|rest| {
        rest.chars()
            .all(|c| c.is_ascii_digit() || c == '.' || c == '-')
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn of(arguments: &[&str]) -> Option<String> {
        let arguments: Vec<String> = arguments.iter().map(|it| (*it).to_owned()).collect();
        problem(&arguments)
    }

    #[test]
    fn text_of_a_caller_that_becomes_a_program_is_seen() {
        for dangerous in [
            &["sh", "-c", "{script}"][..],
            &["/bin/sh", "-c", "grep {name} /etc/hosts | head"],
            &["bash", "-euc", "echo {name} x"],
            &["bash", "-o", "pipefail", "-c", "echo {name} x"],
            &["env", "A=1", "bash", "-c", "echo {name} x"],
            &["xargs", "-0", "sh", "-c", "echo {name} x"],
            &["python3.12", "-c", "print({value}) # x"],
            &["python3", "-cprint({value})"],
            &["perl", "-e", "{program}"],
            &["env", "{program}"],
            &["timeout", "--foreground", "{program}"],
            &["xargs", "{program}"],
        ] {
            let problem = of(dangerous);
            assert!(problem.is_some(), "{dangerous:?}");
        }
        let text = of(&["sh", "-c", "{script}"]).unwrap();
        assert!(
            text.starts_with("sh -c runs whatever a caller sends in {script}"),
            "{text}"
        );
        assert!(
            text.ends_with(r#"["sh", "-c", "… \"$1\"", "sh", "{name}"]"#),
            "{text}"
        );
    }

    #[test]
    fn text_of_a_caller_that_is_an_argument_is_fine() {
        for safe in [
            &["sh", "-c", "grep \"$1\" /etc/hosts", "sh", "{name}"][..],
            &["getent", "hosts", "{name}"],
            &["sh", "/srv/script", "{name}"],
            &["python3", "-c", "import sys; print(sys.argv[1])", "{name}"],
            &["python3", "/srv/tool.py", "-c", "{name}"],
            &["env", "A=1", "tool", "{name}"],
            &["awk", "{print $1}"],
            &["bash", "-c", "echo ${HOME}; f() { true; }"],
        ] {
            assert_eq!(of(safe), None, "{safe:?}");
        }
    }

    #[test]
    fn a_placeholder_with_a_typing_mistake_is_told() {
        let of = |argument: &str| misspelt(&["echo".to_owned(), argument.to_owned()]);
        for (argument, right) in [
            ("{name", "\"{name}\""),
            ("{na me}", "\"{na-me}\""),
            ("{ name }", "\"{name}\""),
            ("{name} ", "\"{name}\""),
            ("{}", "\"{name}\""),
            ("{name", "\"{{name\""),
            ("{}", "\"{{}\""),
        ] {
            let told = of(argument);
            assert!(
                told.as_ref().is_some_and(|told| told.contains(right)),
                "{told:?}"
            );
        }
        for right in [
            "{name}",
            "{{name",
            "{{}",
            "{print $1}",
            "{\"a\": 1}",
            "{1}",
            "${HOME}",
            "a{b}c",
            "name",
            "name}",
            "",
        ] {
            assert_eq!(of(right), None, "{right}");
        }
        let find = ["find", "/srv", "-exec", "ls", "{}", ";"].map(str::to_owned);
        assert_eq!(misspelt(&find), None);
    }

    #[test]
    fn a_placeholder_of_a_pool_is_told() {
        assert!(of_pool(&["cat".into(), "{name}".into()]).is_some());
        assert!(of_pool(&["cat".into(), "name".into()]).is_none());
    }
}
