//! Checks what the pages say about things that a test can look up: error codes, configuration keys, links, and
//! paths of the source.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use preforkd::Code;

use crate::support::source;

/// README, CHANGELOG and the pages in `docs/`.
fn pages() -> Vec<PathBuf> {
    let docs = fs::read_dir(source().join("docs")).unwrap();
    let mut pages: Vec<_> = docs.map(|entry| entry.unwrap().path()).collect();
    pages.extend(["README.md", "CHANGELOG.md"].map(|name| source().join(name)));
    pages.retain(|path| path.extension().is_some_and(|end| end == "md"));
    pages
}

/// The lines of a page that are not in a block of code.
fn prose(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let mut is_code = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
        } else if !is_code {
            lines.push(line.to_owned());
        }
    }
    lines
}

/// The anchors of a page, made of its headings as GitHub does it.
fn anchors(path: &Path) -> BTreeSet<String> {
    let lines = prose(path);
    let headings = lines.iter().filter(|line| line.starts_with('#'));
    headings
        .map(|line| line.trim_start_matches('#').trim().to_lowercase())
        .map(|title| {
            let kept = title
                .chars()
                .filter(|&c| c.is_alphanumeric() || " -_".contains(c));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

/// The parts of a text between `open` and `close`.
fn between<'a>(text: &'a str, open: &str, close: &str) -> Vec<&'a str> {
    let parts = text.split(open).skip(1);
    parts
        .filter_map(|part| part.split_once(close).map(|(inside, _)| inside))
        .collect()
}

#[test]
fn links_lead_to_a_file_and_a_heading() {
    let mut broken = Vec::new();
    for page in pages() {
        for line in prose(&page) {
            for link in between(&line, "](", ")") {
                if link.contains("://") {
                    continue;
                }
                let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
                let target = match file {
                    "" => page.clone(),
                    _ => page.parent().unwrap().join(file),
                };
                let is_found =
                    target.exists() && (anchor.is_empty() || anchors(&target).contains(anchor));
                if !is_found {
                    broken.push(format!("{}: {link}", page.display()));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn paths_of_the_source_exist() {
    let mut missing = Vec::new();
    for page in pages()
        .into_iter()
        .filter(|page| !page.ends_with("CHANGELOG.md"))
    {
        for line in prose(&page) {
            for code in between(&line, "`src/", "`") {
                let path = source().join("src").join(code);
                if !path.exists() {
                    missing.push(format!("{}: src/{code}", page.display()));
                }
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

/// An operator looks an error up in one page, the author of a client in the other.
#[test]
fn two_pages_have_every_error_code() {
    for name in ["docs/protocol.md", "docs/operations.md"] {
        let page = fs::read_to_string(source().join(name)).unwrap();
        for code in Code::ALL {
            let row = format!("| {} | `{}` |", code.number(), code.name());
            assert!(page.contains(&row), "{name} has no row {row}");
        }
    }
}

/// The table of operations.md, which is the reference, against the sample.
#[test]
fn the_table_has_every_key_of_the_sample_configuration() {
    let page = fs::read_to_string(source().join("docs/operations.md")).unwrap();
    let (_, table) = page.split_once("\n## Configuration keys\n").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    let sample = fs::read_to_string(source().join("config/preforkd.toml")).unwrap();
    let keys = sample
        .lines()
        .filter_map(|line| line.trim_start_matches("# ").split_once(" = "));
    let is_key = |key: &str| key.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    for (key, _) in keys.filter(|(key, _)| is_key(key)) {
        assert!(
            table.contains(&format!("`{key}`")),
            "the table has no row for `{key}`"
        );
    }
}
