//! Finds out which file of `src` imports which other files, from the paths in the code. Finds import cycles.
//!
//! A path counts for the file of the longest module that it names: `crate::link::ids::Pid` is an
//! import of `link/ids.rs`, and `super::Fleet` one of the parent's `mod.rs`. `mod x;` is no import.

use std::collections::{BTreeMap, BTreeSet};

use super::source_file::{SourceFile, is_word};

/// A path of module names below the crate's root.
pub type ModulePath = Vec<String>;

/// The imports of each file.
pub struct Imports {
    edges: BTreeMap<String, BTreeSet<String>>,
}

impl Imports {
    /// Reads all imports of these files, except tests, `lib.rs` and `main.rs`.
    pub fn of(files: &[SourceFile]) -> Self {
        let files: Vec<_> = files
            .iter()
            .filter(|file| !file.is_test && !matches!(&*file.name, "src/lib.rs" | "src/main.rs"))
            .collect();
        let modules: BTreeMap<ModulePath, &str> = files
            .iter()
            .map(|file| (module_path(&file.name), file.name.as_str()))
            .collect();
        let edges = files.iter().map(|file| {
            let targets = paths(file, &modules)
                .iter()
                .filter_map(|path| file_of(path, &modules))
                .filter(|target| *target != file.name)
                .map(str::to_owned)
                .collect();
            (file.name.clone(), targets)
        });
        Imports {
            edges: edges.collect(),
        }
    }

    /// Returns the files that import each other, directly or indirectly. Each set is one cycle.
    pub fn circles(&self) -> Vec<BTreeSet<String>> {
        let reached: BTreeMap<&String, BTreeSet<String>> = self
            .edges
            .keys()
            .map(|file| (file, self.reach(file)))
            .collect();
        let mut circles = BTreeSet::new();
        for (file, reach) in &reached {
            let circle: BTreeSet<String> = reach
                .iter()
                .filter(|other| reached.get(other).is_some_and(|back| back.contains(*file)))
                .cloned()
                .collect();
            if circle.len() > 1 {
                circles.insert(circle);
            }
        }
        circles.into_iter().collect()
    }

    /// Returns the files of a cycle that a file imports directly, to show which imports to remove.
    pub fn inside(&self, circle: &BTreeSet<String>, file: &str) -> Vec<&str> {
        let targets = self.edges.get(file).into_iter().flatten();
        targets
            .filter(|target| circle.contains(*target))
            .map(String::as_str)
            .collect()
    }

    /// Returns all files that a file imports, directly or indirectly; itself only if there is a circle.
    fn reach(&self, file: &str) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut pending = vec![file.to_owned()];
        while let Some(next) = pending.pop() {
            for target in self.edges.get(&next).into_iter().flatten() {
                if found.insert(target.clone()) {
                    pending.push(target.clone());
                }
            }
        }
        found
    }
}

/// Returns the module of a file: `src/a/b.rs` and `src/a/b/mod.rs` are `a::b`.
pub fn module_path(file: &str) -> ModulePath {
    let path = file.trim_start_matches("src/").trim_end_matches(".rs");
    let mut parts: Vec<_> = path.split('/').map(str::to_owned).collect();
    if parts.last().is_some_and(|last| last == "mod") {
        parts.pop();
    }
    parts
}

/// Returns the file of the longest module that a path names.
fn file_of<'a>(path: &[String], modules: &BTreeMap<ModulePath, &'a str>) -> Option<&'a str> {
    (1..=path.len())
        .rev()
        .find_map(|length| modules.get(&path[..length]).copied())
}

/// Returns all paths that a file names, from the crate's root.
fn paths(file: &SourceFile, modules: &BTreeMap<ModulePath, &str>) -> Vec<ModulePath> {
    let module = module_path(&file.name);
    // Names with which a path may begin: child modules, and imported modules.
    let mut in_scope: BTreeMap<String, ModulePath> = modules
        .keys()
        .filter(|path| path.len() == module.len() + 1 && path.starts_with(&module))
        .map(|path| (path.last().cloned().unwrap_or_default(), path.clone()))
        .collect();
    let mut found = Vec::new();
    for (path, name) in imports(&file.code) {
        if let Some(path) = resolve(&path, &module, &in_scope) {
            if modules.contains_key(&path) {
                in_scope.insert(name, path.clone());
            }
            found.push(path);
        }
    }
    for path in inline_paths(&file.code) {
        found.extend(resolve(&path, &module, &in_scope));
    }
    found
}

/// Converts a path as written to one from the crate's root; `None` for another crate.
fn resolve(
    path: &[String],
    module: &ModulePath,
    in_scope: &BTreeMap<String, ModulePath>,
) -> Option<ModulePath> {
    let first = path.first()?;
    let ups = path.iter().take_while(|part| *part == "super").count();
    let mut base = match first.as_str() {
        "crate" => Vec::new(),
        "self" => module.clone(),
        "super" => module[..module.len().checked_sub(ups)?].to_vec(),
        name => in_scope.get(name)?.clone(),
    };
    base.extend(path[ups.max(1)..].iter().cloned());
    Some(base)
}

/// Returns all paths of a file as they are written, in `use` declarations and elsewhere.
pub fn written_paths(code: &str) -> Vec<Vec<String>> {
    let declared = imports(code).into_iter().map(|(path, _)| path);
    declared.chain(inline_paths(code)).collect()
}

/// Returns the paths of all `use` declarations, each with the name that it brings into scope.
fn imports(code: &str) -> Vec<(Vec<String>, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let is_word_part = code[..at].chars().next_back().is_some_and(is_word);
        let Some(end) = code[at..].find(';').filter(|_| !is_word_part) else {
            continue;
        };
        let tree: String = code[at + 4..at + end]
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ");
        expand(&tree, &[], &mut found);
    }
    found
}

/// Returns the paths of a use-tree: `a::{b, c::d}` has two.
fn expand(tree: &str, prefix: &[String], found: &mut Vec<(Vec<String>, String)>) {
    let tree = tree.trim();
    if let Some(group) = tree
        .strip_prefix('{')
        .and_then(|rest| rest.strip_suffix('}'))
    {
        let mut depth = 0;
        let is_end = |c: char| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == ',' && depth == 0
        };
        for part in group.split(is_end).filter(|part| !part.trim().is_empty()) {
            expand(part, prefix, found);
        }
        return;
    }
    let mut path = prefix.to_vec();
    match tree.split_once("::") {
        Some((first, rest)) => {
            path.push(first.trim().to_owned());
            expand(rest, &path, found);
        }
        None => {
            let (name, alias) = tree.split_once(" as ").unwrap_or((tree, tree));
            if name != "self" && name != "*" {
                path.push(name.trim().to_owned());
            }
            let is_renamed = alias != tree;
            let last = path.last().cloned().unwrap_or_default();
            found.push((
                path,
                if is_renamed {
                    alias.trim().to_owned()
                } else {
                    last
                },
            ));
        }
    }
}

/// Returns paths with at least two parts in the code outside of `use`.
fn inline_paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut rest = code;
    while let Some(at) = rest.find("::") {
        let start = rest[..at]
            .rfind(|c| !is_word(c))
            .map_or(0, |before| before + 1);
        let end = rest[at..]
            .find(|c: char| !is_word(c) && c != ':')
            .map_or(rest.len(), |length| at + length);
        let path = rest[start..end].trim_end_matches(':');
        // `pub(in crate::master)` restricts visibility and imports nothing.
        let names_an_item = path.contains("::");
        if names_an_item && !rest[..start].ends_with("(in ") {
            found.push(path.split("::").map(str::to_owned).collect());
        }
        rest = &rest[end.max(at + 2)..];
    }
    found
}

#[test]
fn the_reader_of_imports_resolves_paths() {
    let file = |name: &str, code: &str| SourceFile::for_test(name, code);
    let files = [
        file(
            "src/a/mod.rs",
            "pub use b::X; use crate::c::{self, d::{E, F as G}};",
        ),
        file("src/a/b.rs", "fn f() { super::y(); c(std::mem::take(x)) }"),
        file("src/c/mod.rs", "mod d;"),
        file("src/c/d.rs", "use super::Z;"),
        file("src/e.rs", "use crate::c; fn g() { c::d::h() }"),
    ];
    let imports = Imports::of(&files);
    let of = |name: &str| {
        imports.edges[name]
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        of("src/a/mod.rs"),
        ["src/a/b.rs", "src/c/d.rs", "src/c/mod.rs"]
    );
    assert_eq!(of("src/e.rs"), ["src/c/d.rs", "src/c/mod.rs"]);
    assert_eq!(of("src/c/d.rs"), ["src/c/mod.rs"]);
    let circle = ["src/a/b.rs", "src/a/mod.rs"].map(str::to_owned);
    assert_eq!(imports.circles(), [BTreeSet::from(circle)]);
}
