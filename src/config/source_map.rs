//! Merges the tables of all files, lets serde read them, and records the position of every key.
//!
//! The position tells where an error about a key is, which directory a relative path belongs to, and
//! whether the key is set. Errors of syntax, type, unknown keys and keys in two files are made here.
//! `resolve` checks the values.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeArray, DeString, DeTable, DeValue, Deserializer};

use super::files::Files;
use super::raw::Raw;
use super::remedies;
use crate::error::{Error, Result};

/// The positions of all keys.
#[derive(Debug)]
pub(super) struct SourceMap<'a> {
    files: &'a Files,
    /// By the dotted key, such as `workers.count`, `listen[0].address`, `methods."a.b".timeout`.
    keys: BTreeMap<String, SourceSpan>,
}

#[derive(Debug)]
struct SourceSpan {
    /// The bytes of the key; those of the value in an array.
    key: Range<usize>,
    value: Range<usize>,
    kind: &'static str,
}

/// Parses `files` and records the positions of their keys.
pub(super) fn parse(files: &Files) -> Result<(Raw, SourceMap<'_>)> {
    parse_without(files, &BTreeSet::new())
}

/// Parses `files` as [`parse`], but without the keys in `without`.
pub(super) fn parse_without<'f>(
    files: &'f Files,
    without: &BTreeSet<String>,
) -> Result<(Raw, SourceMap<'f>)> {
    let whole = pruned("", merged(files)?, without);
    let places = SourceMap::of(files, &whole);
    let raw = Raw::deserialize(Deserializer::from(Spanned::new(0..0, whole)))
        .map_err(|error| places.explain(&error))?;
    Ok((raw, places))
}

/// Parses `files` as [`parse`], but only the key `wanted`. If `wanted` is not set, an unknown key is an error, because
/// it may be a misspelled `wanted`.
pub(super) fn parse_only<'f>(files: &'f Files, wanted: &str) -> Result<(Raw, SourceMap<'f>)> {
    let whole = merged(files)?;
    let is_there = whole.get(wanted).is_some();
    let known = remedies::top_keys();
    let is_known = |key: &str| known.iter().any(|known| known == key);
    let others = whole.keys().map(|key| key.get_ref().as_ref());
    let others = others.filter(|key| *key != wanted && (is_there || is_known(key)));
    parse_without(files, &others.map(|key| join("", key)).collect())
}

/// Returns the positions of the keys of `files`, if their syntax is valid.
pub(super) fn places(files: &Files) -> Result<SourceMap<'_>> {
    Ok(SourceMap::of(files, &merged(files)?))
}

/// Merges the tables of all files.
fn merged(files: &Files) -> Result<DeTable<'_>> {
    let mut whole = DeTable::new();
    for (number, file) in files.iter().enumerate() {
        let table = moved(files.parse(file)?, file.start);
        if number > 0
            && let Some((key, _)) = table.get_key_value("include")
        {
            return Err(files.error(
                key.span().start,
                "include",
                "an included file can't include another",
                "list all of them in the main file",
            ));
        }
        merge(files, "", &mut whole, table)?;
    }
    Ok(whole)
}

/// Removes keys from a table and the tables in it. The address of a listener gets another one instead.
fn pruned<'t>(path: &str, table: DeTable<'t>, without: &BTreeSet<String>) -> DeTable<'t> {
    let mut kept = DeTable::with_capacity(table.len());
    for (key, mut value) in table {
        let path = join(path, key.get_ref());
        if without.contains(&path) {
            // Without an address, its other keys could not be checked.
            if !(path.starts_with("listen[") && path.ends_with("].address")) {
                continue;
            }
            *value.get_mut() = DeValue::String(format!("unix:/{path}").into());
        }
        match value.get_mut() {
            DeValue::Table(inner) => prune(&path, inner, without),
            DeValue::Array(array) => {
                for (index, element) in array.iter_mut().enumerate() {
                    if let DeValue::Table(inner) = element.get_mut() {
                        prune(&format!("{path}[{index}]"), inner, without);
                    }
                }
            }
            _ => {}
        }
        kept.insert(key, value);
    }
    kept
}

fn prune(path: &str, table: &mut DeTable<'_>, without: &BTreeSet<String>) {
    let all = mem::replace(table, DeTable::new());
    *table = pruned(path, all, without);
}

/// Appends a key of a table to a dotted key.
pub(super) fn join(parent: &str, key: &str) -> String {
    let bare = !key.is_empty()
        && key
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    let key = if bare {
        key.to_owned()
    } else {
        format!("{key:?}")
    };
    if parent.is_empty() {
        key
    } else {
        format!("{parent}.{key}")
    }
}

impl<'a> SourceMap<'a> {
    fn of(files: &'a Files, whole: &DeTable<'_>) -> Self {
        let mut places = SourceMap {
            files,
            keys: BTreeMap::new(),
        };
        places.note_table("", whole);
        places
    }
}

impl SourceMap<'_> {
    pub fn main(&self) -> Option<&Path> {
        self.files.main()
    }

    /// Returns the paths of all files, the main one first.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// Returns whether a file sets `key`.
    pub fn is_set(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    /// Returns whether a file sets `key` and it is not a table.
    pub fn is_value(&self, key: &str) -> bool {
        self.keys
            .get(key)
            .is_some_and(|place| place.kind != "table")
    }

    /// Returns the method or pool that `key` is of; `tables` is "methods." or "pools.".
    pub fn table_of(&self, tables: &str, key: &str) -> Option<String> {
        let known = self.keys.keys().filter(|known| known.starts_with(tables));
        let within = |table: &&String| {
            let rest = key.strip_prefix(table.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        (known.filter(within).min_by_key(|known| known.len())).cloned()
    }

    /// Returns the file that sets `key`.
    pub fn file_of(&self, key: &str) -> Option<&Path> {
        let place = self.keys.get(key)?;
        self.files.place(place.value.start).map(|(path, _)| path)
    }

    /// Returns file, line and column of the value of `key`.
    pub fn name(&self, key: &str) -> Option<String> {
        self.files.name(self.keys.get(key)?.value.start)
    }

    /// Makes an error about `key`: at its value, at the table without it, or without a position.
    pub fn error(&self, key: &str, problem: impl Into<String>, remedy: impl Into<String>) -> Error {
        let mut known = key;
        loop {
            if let Some(place) = self.keys.get(known) {
                let at = match place.kind {
                    "table" => place.key.start,
                    _ => place.value.start,
                };
                return self.files.error(at, key, problem, remedy);
            }
            match known.rfind('.') {
                Some(dot) => known = &known[..dot],
                None => {
                    return Error::Config {
                        file: self.main().map(Path::to_owned),
                        position: None,
                        key: key.to_owned(),
                        problem: problem.into(),
                        remedy: remedy.into(),
                    };
                }
            }
        }
    }

    fn note_table(&mut self, path: &str, table: &DeTable<'_>) {
        for (key, value) in table {
            self.note(join(path, key.get_ref()), key.span(), value);
        }
    }

    fn note(&mut self, path: String, key: Range<usize>, value: &Spanned<DeValue<'_>>) {
        match value.get_ref() {
            DeValue::Table(table) => self.note_table(&path, table),
            DeValue::Array(array) => {
                for (index, element) in array.iter().enumerate() {
                    self.note(format!("{path}[{index}]"), element.span(), element);
                }
            }
            _ => {}
        }
        let place = SourceSpan {
            key,
            value: value.span(),
            kind: value.get_ref().type_str(),
        };
        self.keys.insert(path, place);
    }

    /// Translates serde's error: shows the value as it is in the file, and the most similar known key for
    /// an unknown one.
    fn explain(&self, error: &toml::de::Error) -> Error {
        let span = error.span().unwrap_or_default();
        let message = error.message();
        if message.starts_with("unknown field ") {
            let (key, place) = self
                .keys
                .iter()
                .find(|(_, place)| place.key == span)
                .unzip();
            let key = key.map_or("", String::as_str);
            let is_table = place.is_some_and(|place| place.kind == "table");
            let remedy = remedies::unknown_key(key, is_table, message);
            return self.files.error(span.start, key, "unknown key", remedy);
        }
        // A table or an array begins where its first member does, so the first one here is the outermost.
        let (key, place) = self
            .keys
            .iter()
            .find(|(_, place)| place.value == span)
            .unzip();
        let key = key.map_or("", String::as_str);
        let (problem, remedy) = match (message.strip_prefix("invalid type: "), place) {
            (Some(rest), Some(place)) => {
                let expected = rest
                    .rsplit_once(", expected ")
                    .map_or(rest, |(_, last)| last);
                let expected = plain(expected, place.kind);
                let value = (place.kind, self.files.slice(&place.value));
                let remedy = remedies::wrong_type(key, expected, value, self.only_string(key));
                (
                    format!("expected {expected}, found {}", self.found(place)),
                    remedy,
                )
            }
            _ => (message.to_owned(), String::new()),
        };
        self.files.error(span.start, key, problem, remedy)
    }

    /// Returns the only element of an array as it is in the file, if that is a string.
    fn only_string(&self, array: &str) -> Option<&str> {
        let place = self.keys.get(&format!("{array}[0]"))?;
        let is_only = !self.keys.contains_key(&format!("{array}[1]"));
        (is_only && place.kind == "string").then(|| self.files.slice(&place.value))
    }

    /// Returns a value as it is in the file.
    fn found(&self, place: &SourceSpan) -> String {
        match place.kind {
            "array" => return "an array".into(),
            "table" => return "a table".into(),
            _ => {}
        }
        let text = self.files.slice(&place.value);
        if text.chars().count() > 40 || text.contains('\n') {
            let start: String = text.chars().take(40).take_while(|c| *c != '\n').collect();
            format!("{} {start}…", place.kind)
        } else {
            format!("{} {text}", place.kind)
        }
    }
}

/// Returns what serde expects, without the names of Rust types.
fn plain<'e>(expected: &'e str, found: &str) -> &'e str {
    match expected {
        "i64" if found == "integer" => "a smaller number",
        "i64" => "an integer",
        "a map" => "a table",
        "a sequence" => "an array",
        _ => expected,
    }
}

/// Adds `from` to `into`. Tables and `[[listen]]` lists are joined. Any other key may be in one file only.
fn merge<'a>(files: &Files, path: &str, into: &mut DeTable<'a>, from: DeTable<'a>) -> Result<()> {
    for (key, value) in from {
        let path = join(path, key.get_ref());
        let Some((first, _)) = into.get_key_value(key.get_ref().as_ref()) else {
            into.insert(key, value);
            continue;
        };
        let first = files.name(first.span().start);
        let present = into.get_mut(key.get_ref().as_ref());
        match (present.map(Spanned::get_mut), value.into_inner()) {
            (Some(DeValue::Table(into)), DeValue::Table(from)) => merge(files, &path, into, from)?,
            (Some(DeValue::Array(into)), DeValue::Array(from)) if path == "listen" => {
                from.into_iter().for_each(|element| into.push(element));
            }
            _ => {
                let other = first.unwrap_or_default();
                return Err(files.error(
                    key.span().start,
                    &path,
                    format!("it is set in {other} already"),
                    "keep one of the two",
                ));
            }
        }
    }
    Ok(())
}

/// Adds `by` to all positions in a table, so that they count over all files.
fn moved(table: DeTable<'_>, by: usize) -> DeTable<'_> {
    let mut result = DeTable::with_capacity(table.len());
    for (key, value) in table {
        let span = shift(key.span(), by);
        let key: Spanned<DeString<'_>> = Spanned::new(span, key.into_inner());
        result.insert(key, moved_value(value, by));
    }
    result
}

fn moved_value(value: Spanned<DeValue<'_>>, by: usize) -> Spanned<DeValue<'_>> {
    let span = shift(value.span(), by);
    let value = match value.into_inner() {
        DeValue::Table(table) => DeValue::Table(moved(table, by)),
        DeValue::Array(elements) => {
            let mut array = DeArray::new();
            for element in elements {
                array.push(moved_value(element, by));
            }
            DeValue::Array(array)
        }
        scalar => scalar,
    };
    Spanned::new(span, value)
}

fn shift(span: Range<usize>, by: usize) -> Range<usize> {
    span.start + by..span.end + by
}
