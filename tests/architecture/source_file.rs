//! Reads source files as text, without comments and literals.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::source;

/// A source file.
pub struct SourceFile {
    /// Its path from the top directory of the tree.
    pub name: String,
    /// Its unchanged text.
    pub text: String,
    /// Without comments, literals and the tests at its end; the line numbers stay.
    pub code: String,
    /// Whether it has only the tests of another file.
    pub is_test: bool,
}

impl SourceFile {
    /// Returns its layer; `None` for `lib.rs` and `main.rs`, which are above all layers.
    pub fn layer(&self) -> Option<String> {
        let path = self.name.strip_prefix("src/")?;
        let first = path.split('/').next()?.trim_end_matches(".rs");
        (!matches!(first, "lib" | "main")).then(|| first.to_owned())
    }

    /// Creates a file that is not on disk.
    pub fn for_test(name: &str, code: &str) -> Self {
        SourceFile {
            name: name.to_owned(),
            text: code.to_owned(),
            code: code.to_owned(),
            is_test: false,
        }
    }

    /// Returns the names at the crate's root that it uses, by `crate::` or by enough `super::`.
    pub fn uses(&self) -> BTreeSet<String> {
        let mut roots = vec!["crate::".to_owned()];
        let inside = self.name.matches('/').count() - 1;
        let depth = inside + usize::from(!self.name.ends_with("/mod.rs"));
        roots.push("super::".repeat(depth));
        let mut found = BTreeSet::new();
        for root in roots {
            for (at, _) in self.code.match_indices(&root) {
                let before = self.code[..at].chars().next_back();
                // It is part of another name, or the last of even more `super`.
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

/// Returns the names with which a path or a use-tree begins: `a::b` has one, `{a::{x, y}, b}` two.
pub fn first_names(tree: &str) -> Vec<String> {
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

/// Returns all Rust files under a directory of the source tree; none if it does not exist.
pub fn source_files(under: &str) -> impl Iterator<Item = SourceFile> {
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
            || name.ends_with("_world.rs")
            || name.contains("/tests/");
        // Tests are last in a file, and may use anything.
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

/// Returns where an inline module of tests begins.
fn inline_tests(code: &str) -> Option<usize> {
    let mut marks = code.match_indices("#[cfg(test)]");
    let found = marks.find(|(at, _)| {
        let rest = &code[*at..];
        let head = rest.find(['{', ';']).map_or(rest, |end| &rest[..=end]);
        head.ends_with('{') && has_word(head, "mod")
    });
    found.map(|(at, _)| at)
}

/// Returns the positions at which one of these functions is called, and the path written before its name.
pub fn calls_of<'a>(code: &'a str, names: &[&str]) -> Vec<(usize, &'a str)> {
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

pub fn has_word(line: &str, word: &str) -> bool {
    line.split(|c| !is_word(c)).any(|it| it == word)
}

pub fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Blanks out comments, strings and characters. Line feeds stay, so that line numbers do not change.
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

/// Returns the length of a literal that ends at the next unescaped `quote`.
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

/// Returns the length of `r#"…"#` and similar literals.
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

/// Returns the length of a character literal; a lifetime is none.
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
