//! Compares the manual page with the program: it explains everything that `--help` lists, and names no
//! missing command or option.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use crate::support::{binary, source};

fn page() -> String {
    let page = fs::read_to_string(source().join("docs/preforkd.8")).unwrap();
    // In roff a typed hyphen is written \-.
    page.replace("\\-", "-")
}

fn help(arguments: &[&str]) -> String {
    let output = Command::new(binary())
        .args(arguments)
        .arg("--help")
        .output()
        .unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the commands that `--help` lists.
fn commands() -> BTreeSet<String> {
    listed(&help(&[]))
}

/// Returns the commands of a command.
fn subcommands(command: &str) -> BTreeSet<String> {
    listed(&help(&[command]))
}

fn listed(help: &str) -> BTreeSet<String> {
    let (_, list) = help
        .split_once("Commands:\n")
        .expect("the help lists commands");
    let names = list.lines().take_while(|line| !line.is_empty());
    let names = names.filter(|line| line.starts_with("  ") && !line.starts_with("    "));
    let names = names.filter_map(|line| line.split_whitespace().next());
    names
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

/// Returns the long options in a text.
fn options(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    let words = words.filter(|word| word.starts_with("--") && word.len() > 3);
    words.map(str::to_owned).collect()
}

/// Returns the options of a command and of its own commands.
fn all_options(command: &str) -> BTreeSet<String> {
    let mut all = options(&help(&[command]));
    if command == "job" {
        for own in subcommands(command) {
            all.extend(options(&help(&[command, &own])));
        }
    }
    all
}

#[test]
fn the_manual_page_explains_every_command_and_option() {
    let page = page();
    for own in subcommands("job") {
        let entry = format!("job {own}");
        assert!(page.contains(&entry), "no {entry:?} in the page");
    }
    for command in commands() {
        let entry = format!(".SS {command}");
        let begin = page
            .find(&entry)
            .unwrap_or_else(|| panic!("no {entry:?} in the page"));
        let section = &page[begin + entry.len()..];
        let section = section.split("\n.S").next().unwrap();
        for option in all_options(&command) {
            if matches!(option.as_str(), "--help" | "--version") {
                continue;
            }
            assert!(
                section.contains(&option),
                "{command} {option} is not explained"
            );
        }
    }
}

#[test]
fn the_manual_page_promises_nothing_else() {
    let commands = commands();
    let mut known = options(&help(&[]));
    for command in &commands {
        known.extend(all_options(command));
    }
    let page = page();
    for heading in page.lines().filter_map(|line| line.strip_prefix(".SS ")) {
        let name = heading.split_whitespace().next().unwrap();
        assert!(
            commands.contains(name),
            "the page has {name}, the program has not"
        );
    }
    let stray: Vec<_> = options(&page).difference(&known).cloned().collect();
    assert!(stray.is_empty(), "options that no command knows: {stray:?}");
}

/// roff removes quotes from the arguments of a macro, unless they are written \(dq.
#[test]
fn json_and_toml_on_the_page_keep_their_quotes() {
    let page = page();
    for code in [
        "{\"in\": \"METHOD\", \"params\": ANY}",
        "command = [\\(dq",
        "pool = \\(dq",
    ] {
        assert!(page.contains(code), "{code} is not on the page");
    }
}
