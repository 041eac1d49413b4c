//! Holds the shape of the source: who may use whom, where `unsafe`, `fork` and sleeping live,
//! how long a file may grow, and that each says at its head what it is for.
//!
//! It reads the source as text without comments and literals: enough for these rules, and no
//! compiler in a test. What a macro would hide from it, a reviewer sees.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::source;

/// The floors, ground first, each with those that it may use. A floor uses only what stands
/// above it in this table, so that every file can be read knowing what is below it and nothing
/// of what is above.
const FLOORS: [(&str, &[&str]); 13] = [
    // the ground: system calls made safe, which know nothing of preforkd
    ("sys", &[]),
    ("error", &["sys"]),
    ("logging", &["sys", "error"]),
    // pure: when to start again what has died; a worker's matter and the master's
    ("throttle", &[]),
    // pure: bytes in, bytes out; no system call, so no sys
    ("protocol", &["error"]),
    // sys: accounts are looked up while a configuration is checked
    ("config", &["sys", "error", "logging", "protocol"]),
    (
        "handler",
        &["sys", "error", "logging", "throttle", "protocol", "config"],
    ),
    // handler: a worker is handed the table of methods
    (
        "link",
        &["sys", "error", "logging", "protocol", "config", "handler"],
    ),
    // worker and master meet only through link: they are two processes
    (
        "worker",
        &[
            "sys", "error", "logging", "throttle", "protocol", "config", "handler", "link",
        ],
    ),
    (
        "master",
        &[
            "sys", "error", "logging", "throttle", "protocol", "config", "handler", "link",
        ],
    ),
    // the one place that joins the two
    (
        "server",
        &[
            "sys", "error", "logging", "protocol", "config", "handler", "link", "worker", "master",
        ],
    ),
    // knows a server only by what it says on the wire
    ("client", &["sys", "error", "logging", "protocol"]),
    (
        "cli",
        &[
            "sys", "error", "logging", "protocol", "config", "handler", "server", "client",
        ],
    ),
];

/// Macros that the language exports at the crate's root, and the floor that they belong to.
const ROOT_MACROS: [(&str, &str); 1] = [("shared_record", "sys")];

/// The most lines of a file, its tests aside.
const MOST_LINES: usize = 500;

#[test]
fn imports_go_down_only() {
    let mut wrong = Vec::new();
    for file in source_files("src") {
        let Some(floor) = file.floor() else { continue };
        let Some((_, allowed)) = FLOORS.iter().find(|(name, _)| *name == floor) else {
            wrong.push(format!(
                "{}: {floor} is no floor; give it its row",
                file.name
            ));
            continue;
        };
        for used in file.uses() {
            let used = ROOT_MACROS
                .iter()
                .find(|(name, _)| *name == used)
                .map_or(used.as_str(), |(_, owner)| owner);
            if used == floor || allowed.contains(&used) {
                continue;
            }
            let known = FLOORS.iter().any(|(name, _)| *name == used);
            wrong.push(if known {
                format!("{}: {floor} must not use {used}", file.name)
            } else {
                // what lib.rs re-exports is for users of the library: inside, a path through it
                // would hide which floor is meant
                format!("{}: crate::{used} names no floor", file.name)
            });
        }
    }
    assert_none(&wrong);
}

#[test]
fn the_table_of_floors_has_no_circle() {
    for (index, (floor, allowed)) in FLOORS.iter().enumerate() {
        for used in *allowed {
            let below = FLOORS[..index].iter().any(|(name, _)| name == used);
            assert!(
                below,
                "{floor} may use {used}, which does not stand above it"
            );
        }
    }
}

#[test]
fn unsafe_stays_in_sys() {
    let wrong = offenders(
        |file| file.floor().as_deref() == Some("sys"),
        |code| has_word(code, "unsafe"),
    );
    assert_none(&wrong);
}

/// fork(2) is safe only while a process has one thread: one wrapper asserts that, and two places
/// of the master call the wrapper, for workers and for readers of marks. `daemon` is the detach, before
/// there is a master.
#[test]
fn fork_is_called_in_two_places() {
    let homes = ["src/sys/process.rs", "src/sys/daemon.rs"];
    let callers = ["src/master/workers.rs", "src/master/marks.rs"];
    let mut wrong = Vec::new();
    let mut calls = Vec::new();
    for file in source_files("src") {
        if homes.contains(&file.name.as_str()) {
            continue;
        }
        for (line, _) in calls_of(&file.code, &["fork", "vfork", "forkpty", "clone3"]) {
            let place = format!("{}:{line}", file.name);
            if callers.contains(&file.name.as_str()) {
                calls.push(place);
            } else {
                wrong.push(place);
            }
        }
    }
    assert_none(&wrong);
    assert!(calls.len() <= callers.len(), "too many fork: {calls:?}");
}

/// A keeper is made in one place, once its worker is nobody else any more.
#[test]
fn a_twin_is_made_in_one_place() {
    let mut wrong = Vec::new();
    for file in source_files("src") {
        let calls = calls_of(&file.code, &["make"]);
        let twins = calls.iter().filter(|(_, path)| path.ends_with("twin::"));
        let home = file.name == "src/worker/keeper/mod.rs";
        wrong.extend(
            twins
                .skip(usize::from(home))
                .map(|(line, _)| format!("{}:{line}", file.name)),
        );
    }
    assert_none(&wrong);
}

/// What waits, waits for an event with a deadline. The builtin `sleep` is a method that sleeps.
#[test]
fn nothing_sleeps_for_timing() {
    let allowed = ["src/handler/builtin.rs", "tests/support/mod.rs"];
    let mut wrong = Vec::new();
    for file in source_files("src").chain(source_files("tests")) {
        if allowed.contains(&file.name.as_str()) {
            continue;
        }
        for (line, path) in calls_of(&file.code, &["sleep"]) {
            if path.ends_with("thread::") || path.ends_with("unistd::") {
                wrong.push(format!("{}:{line}", file.name));
            }
        }
    }
    assert_none(&wrong);
}

#[test]
fn files_stay_short_enough_to_be_read_whole() {
    let long = source_files("src")
        .filter(|file| !file.is_test)
        .map(|file| (file.code.lines().count(), file.name))
        .filter(|(lines, _)| *lines > MOST_LINES);
    let wrong: Vec<_> = long
        .map(|(lines, name)| format!("{name}: {lines} lines"))
        .collect();
    assert_none(&wrong);
}

#[test]
fn every_file_says_at_its_head_what_it_is_for() {
    let mut wrong = Vec::new();
    for file in ["src", "tests", "benches", "examples"]
        .into_iter()
        .flat_map(source_files)
    {
        // a file of tests beside its subject is explained by the subject
        let explained_elsewhere = file.is_test && file.name.starts_with("src/");
        if !explained_elsewhere && !file.text.starts_with("//!") {
            wrong.push(file.name);
        }
    }
    assert_none(&wrong);
}

/// A file, read.
struct SourceFile {
    /// Its path from the top of the tree.
    name: String,
    /// As it is.
    text: String,
    /// Without comments and literals, and without the tests at its end; line by line as before.
    code: String,
    /// Whether it is the sibling that holds another file's tests.
    is_test: bool,
}

impl SourceFile {
    /// The floor that it belongs to; none for `lib.rs` and `main.rs`, which stand above all.
    fn floor(&self) -> Option<String> {
        let path = self.name.strip_prefix("src/")?;
        let first = path.split('/').next()?.trim_end_matches(".rs");
        (!matches!(first, "lib" | "main")).then(|| first.to_owned())
    }

    /// What it names at the crate's root, by `crate::` or by as many `super::` as lead there.
    fn uses(&self) -> BTreeSet<String> {
        let mut roots = vec!["crate::".to_owned()];
        let inside = self.name.matches('/').count() - 1;
        let depth = inside + usize::from(!self.name.ends_with("/mod.rs"));
        roots.push("super::".repeat(depth));
        let mut found = BTreeSet::new();
        for root in roots {
            for (at, _) in self.code.match_indices(&root) {
                let before = self.code[..at].chars().next_back();
                // part of another name, or the last of even more `super`
                if before.is_some_and(|c| is_word(c) || (c == ':' && root.starts_with("super"))) {
                    continue;
                }
                found.extend(first_names(&self.code[at + root.len()..]));
            }
        }
        found.remove("super");
        found
    }
}

/// The names that a path or a use-tree begins with: `a::b` has one, `{a::{x, y}, b}` two.
fn first_names(tree: &str) -> Vec<String> {
    let Some(group) = tree.strip_prefix('{') else {
        let name: String = tree.chars().take_while(|&c| is_word(c)).collect();
        return vec![name];
    };
    let mut names = vec![String::new()];
    let mut depth = 0;
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => names.push(String::new()),
            _ if depth == 0 => names.last_mut().expect("it begins with one").push(c),
            _ => {}
        }
    }
    let names = names
        .iter()
        .map(|it| it.trim().split("::").next().unwrap_or(""));
    names
        .filter(|it| !it.is_empty())
        .map(str::to_owned)
        .collect()
}

/// All Rust files under a directory of the source tree; none if it is not there.
fn source_files(under: &str) -> impl Iterator<Item = SourceFile> {
    let mut paths = Vec::new();
    collect(&source().join(under), &mut paths);
    paths.sort();
    paths.into_iter().map(|path| {
        let name = path
            .strip_prefix(source())
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let text = fs::read_to_string(&path).unwrap();
        let is_test = name.ends_with("/tests.rs")
            || name.ends_with("_tests.rs")
            || name.ends_with("_properties.rs")
            || name.contains("/tests/");
        // tests are last in a file, and what they may use is everybody's own business
        let code = without_comments_and_literals(&text);
        let end = if name.starts_with("src/") {
            inline_tests(&code).unwrap_or(code.len())
        } else {
            code.len()
        };
        let code = if is_test {
            String::new()
        } else {
            code[..end].to_owned()
        };
        SourceFile {
            name,
            text,
            code,
            is_test,
        }
    })
}

fn collect(directory: &Path, into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// Where a module of tests begins that stands in the file itself.
fn inline_tests(code: &str) -> Option<usize> {
    let mut marks = code.match_indices("#[cfg(test)]");
    let found = marks.find(|(at, _)| {
        let rest = &code[*at..];
        let head = rest.find(['{', ';']).map_or(rest, |end| &rest[..=end]);
        head.ends_with('{') && has_word(head, "mod")
    });
    found.map(|(at, _)| at)
}

/// The lines of the files that `exempt` does not excuse and whose code, line by line, `forbid`s.
fn offenders(exempt: impl Fn(&SourceFile) -> bool, forbid: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for file in source_files("src").filter(|file| !exempt(file)) {
        for (index, line) in file.code.lines().enumerate() {
            if forbid(line) {
                found.push(format!("{}:{}: {}", file.name, index + 1, line.trim()));
            }
        }
    }
    found
}

/// Where one of these functions is called, and the path written before its name.
fn calls_of<'a>(code: &'a str, names: &[&str]) -> Vec<(usize, &'a str)> {
    let mut found = Vec::new();
    for name in names {
        for (at, _) in code.match_indices(&format!("{name}(")) {
            let start = code[..at]
                .rfind(|c| !is_word(c) && c != ':')
                .map_or(0, |before| before + 1);
            let path = &code[start..at];
            let is_method = code[..start].ends_with('.');
            let defines = code[..at].trim_end().ends_with("fn");
            if (path.is_empty() || path.ends_with("::")) && !defines && !is_method {
                found.push((code[..at].matches('\n').count() + 1, path));
            }
        }
    }
    found
}

fn has_word(line: &str, word: &str) -> bool {
    line.split(|c| !is_word(c)).any(|it| it == word)
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[track_caller]
fn assert_none(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Blanks out comments, strings and characters; newlines stay, so that lines keep their number.
fn without_comments_and_literals(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = String::with_capacity(text.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &text[at..];
        let after_word = code.chars().next_back().is_some_and(is_word);
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(length) = raw_string(rest).filter(|_| !after_word) {
            length
        } else if rest.starts_with('"') {
            closing(rest, '"')
        } else if let Some(length) = character(rest) {
            length
        } else {
            let c = rest.chars().next().expect("there is a rest");
            code.push(c);
            at += c.len_utf8();
            continue;
        };
        code.extend(rest[..length].matches('\n'));
        at += length;
    }
    code
}

/// The length of a literal that ends at the next `quote` that no backslash escapes.
fn closing(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The length of `r#"…"#` and its like.
fn raw_string(text: &str) -> Option<usize> {
    let after = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    after[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let start = text.len() - after.len() + hashes + 1;
    let length = text[start..]
        .find(&end)
        .map_or(text.len(), |at| start + at + end.len());
    Some(length)
}

/// The length of a character literal; a lifetime is none.
fn character(text: &str) -> Option<usize> {
    let inner = text.strip_prefix('\'')?;
    let mut chars = inner.chars();
    match chars.next()? {
        '\\' => Some(closing(text, '\'')),
        c => (chars.next()? == '\'').then_some(2 + c.len_utf8()),
    }
}

#[test]
fn the_reader_sees_code_and_nothing_else() {
    let text = "a // unsafe\n\"unsafe \\\" fork(\" b /* x\n */ 'u' c<'a> r#\"un\"safe\"# d";
    assert_eq!(without_comments_and_literals(text), "a \n b \n  c<'a>  d");
    assert_eq!(
        first_names("{sys::{a, b}, error::Error}, x"),
        ["sys", "error"]
    );
    assert_eq!(first_names("link::ids::Pid;"), ["link"]);
    assert_eq!(
        calls_of("x\nself.fork(); process::fork()", &["fork"]),
        [(2, "process::")]
    );
    assert_eq!(calls_of("pub fn fork() { refork(1) }", &["fork"]), []);
    assert!(has_word("= unsafe {", "unsafe") && !has_word("unsafe_code", "unsafe"));
}
