//! Says what to write instead of what the TOML parser or serde refuses.
//!
//! Knows the keys of all tables from serde. A remedy is empty if nothing better is known than the problem
//! itself. `files` and `source_map` add the position.

use serde::de::DeserializeOwned;
use toml::de::DeTable;

use super::raw::{
    Raw, RawAccessLog, RawJobs, RawLimits, RawListen, RawLog, RawMethod, RawMethodJob, RawObserve,
    RawPool, RawRlimits, RawSlowLog, RawTrace, RawWorkers,
};

/// How similar two words must be for "did you mean". 1 is equal; 0.8 is one wrong letter in five.
const LIKENESS: f64 = 0.8;

/// How similar a word must be to a key of its own table, if another table has that word as a key.
const TYPO: f64 = 0.95;

/// The keys above the first table. Below it, they would become part of that table.
const TOP_KEYS: [&str; 7] = [
    "daemon",
    "pid-file",
    "control-socket",
    "user",
    "group",
    "include",
    "http-origins",
];

type KnownKeys = fn() -> Vec<String>;

/// The headers of tables, each with the keys of the table.
const TABLES: [(&str, KnownKeys); 12] = [
    ("[log]", known_keys::<RawLog>),
    ("[workers]", known_keys::<RawWorkers>),
    ("[limits]", known_keys::<RawLimits>),
    ("[observe]", known_keys::<RawObserve>),
    ("[access-log]", known_keys::<RawAccessLog>),
    ("[slow-log]", known_keys::<RawSlowLog>),
    ("[trace]", known_keys::<RawTrace>),
    ("[jobs]", known_keys::<RawJobs>),
    ("[[listen]]", known_keys::<RawListen>),
    ("[methods.NAME]", known_keys::<RawMethod>),
    ("[methods.NAME.job]", known_keys::<RawMethodJob>),
    ("[pools.NAME]", known_keys::<RawPool>),
];

/// Returns the candidate that is most similar to `word`, if one is similar enough.
pub(super) fn nearest<'c>(word: &str, candidates: &[&'c str]) -> Option<&'c str> {
    candidates
        .iter()
        .map(|candidate| (strsim::jaro_winkler(word, candidate), *candidate))
        .filter(|(likeness, _)| *likeness >= LIKENESS)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, candidate)| candidate)
}

/// Returns the keys at the top of the file, those of tables included.
pub(super) fn top_keys() -> Vec<String> {
    known_keys::<Raw>()
}

/// Returns the keys of a table of this type: serde lists them in its error about an unknown one.
fn known_keys<T: DeserializeOwned>() -> Vec<String> {
    let error = toml::from_str::<T>("\"\" = 0").err();
    let keys = error.iter().flat_map(|error| listed(error.message()));
    keys.map(str::to_owned).collect()
}

/// Returns the keys in serde's error about an unknown one.
fn listed(message: &str) -> Vec<&str> {
    let (_, list) = message.rsplit_once(", expected ").unwrap_or_default();
    list.split('`').skip(1).step_by(2).collect()
}

/// Returns what to do about a key that serde does not know. `message` lists the known ones.
pub(super) fn unknown_key(path: &str, is_table: bool, message: &str) -> String {
    let known = listed(message);
    let (table, word) = path.rsplit_once('.').unwrap_or(("", path));
    let near = nearest(word, &known);
    let is_typo = near.is_some_and(|near| strsim::jaro_winkler(word, near) >= TYPO);
    let dotted = ["methods", "pools"].into_iter().find_map(|tables| {
        let name = path.strip_prefix(tables)?.strip_prefix('.')?;
        is_table.then(|| format!("a name with dots is quoted: [{tables}.{name:?}]"))
    });
    let owners: Vec<String> = owners(table, word);
    if !table.is_empty() && TOP_KEYS.contains(&word) {
        format!("`{word}` must stand above the first [table] of its file")
    } else if !is_table && !is_typo && !owners.is_empty() {
        format!("`{word}` is a key of {}", owners.join(", "))
    } else if let Some(near) = near {
        format!("did you mean `{near}`?")
    } else {
        dotted.unwrap_or_else(|| format!("known here are {}", known.join(", ")))
    }
}

/// Returns the headers of the tables that have this key. `rlimits` belongs to a method or a pool.
fn owners(table: &str, word: &str) -> Vec<String> {
    let has = |keys: Vec<String>| keys.iter().any(|key| key == word);
    let found = TABLES.into_iter().filter(|(_, keys)| has(keys()));
    let mut headers: Vec<String> = found.map(|(header, _)| header.to_owned()).collect();
    let is_program = ["methods.", "pools."]
        .iter()
        .any(|it| table.starts_with(it));
    if is_program && has(known_keys::<RawRlimits>()) {
        headers.push(format!("[{table}.rlimits]"));
    }
    headers
}

/// Returns what to write for `key`, where serde expected something else. `kind` is the type of the value in
/// the file and `text` is its text. `only` is the text of the only element, if the value is an array of one
/// string.
pub(super) fn wrong_type(
    key: &str,
    expected: &str,
    (kind, text): (&str, &str),
    only: Option<&str>,
) -> String {
    let name = key.rsplit('.').next().unwrap_or(key);
    let write = |value: &str| match name.ends_with(']') {
        true => format!("write {value}"),
        false => format!("write {name} = {value}"),
    };
    let bare = text.trim_matches(['"', '\'']);
    match (expected, kind) {
        // The text may contain a password.
        (_, _) if key == "jobs.store" => write("\"sqlite:PATH\""),
        ("a boolean", "string") => "write true or false, without quotes".into(),
        ("a boolean", _) => "write true or false".into(),
        ("a string", "table") | ("a string", "array") if only.is_none() => write("\"…\""),
        ("a string", "array") => write(only.unwrap_or_default()),
        ("a string", _) if name == "address" => {
            let port = text.parse::<u16>().unwrap_or(8080);
            write(&format!("\"127.0.0.1:{port}\""))
        }
        ("a string", _) if name == "mode" => {
            let digits = text.trim_start_matches("0o");
            write(&format!("\"{digits:0>4}\""))
        }
        ("a string", _) => write(&format!("{text:?}")),
        ("an integer" | "\"auto\" or an integer", "string") if bare.parse::<i64>().is_ok() => {
            write(bare) + ", without quotes"
        }
        ("f64", "string") if bare.parse::<f64>().is_ok() => write(bare) + ", without quotes",
        ("an integer" | "\"auto\" or an integer", "float") => "write a whole number".into(),
        ("an array" | "a table", "string") if key == "listen" || key == "listen[0]" => {
            format!("write [[listen]], and address = {text} below it")
        }
        ("an array", "table") if key == "listen" => "write [[listen]] above its keys".into(),
        ("an array", "string") => write(&format!("[{text}]")),
        ("a table", _) if name == "environment" => write("{ NAME = \"VALUE\" }"),
        ("a table", _) if key == "methods" || key == "pools" => {
            format!("write [{key}.NAME] above the keys of each")
        }
        ("a table", _) if key.starts_with("listen[") => "write [[listen]] above its keys".into(),
        ("a table", _) => format!("write [{key}] above its keys"),
        _ => String::new(),
    }
}

/// Returns problem and remedy for a syntax error at the byte `at` of `text`. `message` is the parser's.
pub(super) fn syntax(message: &str, text: &str, at: usize) -> (String, String) {
    let problem = || format!("this is not TOML: {message}");
    let at = (0..=at.min(text.len()))
        .rev()
        .find(|at| text.is_char_boundary(*at));
    let at = at.unwrap_or_default();
    let start = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
    let line = text[start..].lines().next().unwrap_or_default();
    if line.trim_start().starts_with('[') && !line.contains('=') {
        return (problem(), header(line.trim()).unwrap_or_default());
    }
    let Some((key, value)) = line.split_once('=') else {
        return (problem(), String::new());
    };
    let key = key.trim();
    let value = value.split(" #").next().unwrap_or_default().trim();
    if value.is_empty() {
        let problem = "this is not TOML: there is no value".to_owned();
        return (problem, "write one behind the =".into());
    }
    let is_wrong = |value: &str| DeTable::parse(&format!("x = {value}")).is_err();
    if ["yes", "no", "on", "off", "True", "False", "TRUE", "FALSE"].contains(&value) {
        let problem = format!("this is not TOML: {value} is not a value");
        return (problem, "write true or false".into());
    }
    // A number with a typing mistake is no string.
    let is_text = value.starts_with(|c: char| c.is_alphanumeric() || "/.-*:".contains(c))
        && value.contains(|c: char| c.is_alphabetic() || "/:".contains(c));
    if is_text && is_wrong(value) && !is_wrong(&format!("\"{value}\"")) {
        let problem = "this is not TOML: a string needs quotes".to_owned();
        // A URL may contain a password.
        let shown = if value.contains('@') || value.contains("://") {
            "..."
        } else {
            value
        };
        return (problem, format!("write {key} = \"{shown}\""));
    }
    let remedy = match message.starts_with("string values must be quoted") {
        true => "put each text in quotes",
        false => "",
    };
    (problem(), remedy.into())
}

/// Returns how to write a header that is no TOML, if it names a table. Names have no blanks.
fn header(line: &str) -> Option<String> {
    let name = line.split(" #").next()?.trim_matches(['[', ']', ' ', '\t']);
    let name: Vec<&str> = name.split_whitespace().collect();
    let name = name.join("-");
    let fitting = |header: String| DeTable::parse(&header).is_ok().then_some(header);
    let brackets = match line.starts_with("[[") {
        true => ("[[", "]]"),
        false => ("[", "]"),
    };
    let whole = fitting(format!("{}{name}{}", brackets.0, brackets.1));
    let quoted = || {
        let (tables, name) = name.split_once('.')?;
        fitting(format!("[{tables}.{:?}]", name.trim_matches(['"', '\''])))
    };
    let right = whole.or_else(quoted).filter(|right| right != line)?;
    Some(format!("write {right}"))
}
