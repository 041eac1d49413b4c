//! Reads the text of the configuration: one file and the files that it includes. Maps a byte of the text to
//! its file, line and column.
//!
//! All texts are counted as one sequence of bytes, so one number gives both file and position. `source_map`
//! parses the text. A file that cannot be read is an error with its path. No file is skipped.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use toml::de::{DeTable, DeValue};

use super::environment::clean;
use super::remedies;
use crate::error::{Error, Position, Result};

/// The largest configuration file, in bytes.
const SIZE_MAX: u64 = 16 << 20;

#[derive(Debug)]
pub(super) struct File {
    /// Absolute.
    pub path: PathBuf,
    pub text: String,
    /// The number of the first byte of its text in all files.
    pub start: usize,
}

impl File {
    /// Returns the path of the control socket that the file names. If the file has syntax errors, looks at
    /// each line on its own.
    pub fn control_socket(&self) -> Option<PathBuf> {
        let path = |text: &str| {
            let table = DeTable::parse_recoverable(text).0.into_inner();
            match table.get("control-socket")?.get_ref() {
                DeValue::String(path) if !path.is_empty() => {
                    Some(clean(&self.path.parent()?.join(path.as_ref())))
                }
                _ => None,
            }
        };
        path(&self.text).or_else(|| self.text.lines().find_map(path))
    }

    /// Returns whether a line may be meant to set that key.
    pub fn may_name_control_socket(&self) -> bool {
        let key = |line: &str| line.trim_start_matches([' ', '\t', '"', '\'']).to_owned();
        self.text
            .lines()
            .any(|line| key(line).starts_with("control"))
    }
}

/// The main file, then the included ones in order. Empty if there is no configuration file.
#[derive(Debug, Default)]
pub(super) struct Files(Vec<File>);

impl Files {
    /// Reads `path` and the files that it includes.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of_text(path, read(path)?)
    }

    /// Reads only `path`.
    pub fn read_alone(path: &Path) -> Result<Self> {
        let mut files = Files::default();
        files.push(path.to_owned(), read(path)?);
        Ok(files)
    }

    /// Takes `text` as the content of `path`, and reads the files that it includes.
    pub fn of_text(path: &Path, text: String) -> Result<Self> {
        let mut files = Files::default();
        files.push(path.to_owned(), text);
        let table = files.parse(&files.0[0])?;
        for (at, pattern) in includes(&table) {
            for path in files.expand(at, &pattern)? {
                if !files.0[1..].iter().any(|file| file.path == path) {
                    let text = read(&path)?;
                    files.push(path, text);
                }
            }
        }
        Ok(files)
    }

    /// Reads what can be read, without an error. Bytes that are not UTF-8 are replaced.
    pub fn read_leniently(path: &Path) -> Self {
        let mut files = Files::default();
        let Ok(bytes) = read_bytes(path) else {
            return files;
        };
        files.push(path.to_owned(), String::from_utf8_lossy(&bytes).into());
        let table = DeTable::parse_recoverable(&files.0[0].text).0.into_inner();
        for (at, pattern) in includes(&table) {
            for path in files.expand(at, &pattern).unwrap_or_default() {
                if let Ok(bytes) = read_bytes(&path) {
                    files.push(path, String::from_utf8_lossy(&bytes).into());
                }
            }
        }
        files
    }

    /// Returns all files, the main one first.
    pub fn iter(&self) -> impl Iterator<Item = &File> {
        self.0.iter()
    }

    /// Returns the path of the main file, if there is one.
    pub fn main(&self) -> Option<&Path> {
        self.0.first().map(|file| file.path.as_path())
    }

    /// Parses the tables of `file`, or returns its first syntax error.
    pub fn parse<'a>(&self, file: &'a File) -> Result<DeTable<'a>> {
        let (table, errors) = DeTable::parse_recoverable(&file.text);
        match errors.first() {
            None => Ok(table.into_inner()),
            Some(error) => {
                let span = error.span().unwrap_or_default();
                let at = file.start + span.start;
                Err(match (error.message(), file.text.get(span.clone())) {
                    ("duplicate key", Some(key)) => match header_at(&file.text, span.start) {
                        Some(table) => self.second_header(file, at, table),
                        None => self.error(at, key, "it is set twice", "keep one of the two"),
                    },
                    (message, _) => {
                        let (problem, remedy) = remedies::syntax(message, &file.text, span.start);
                        self.error(at, "", problem, remedy)
                    }
                })
            }
        }
    }

    /// Makes the error about a second header of a `table`.
    fn second_header(&self, file: &File, at: usize, table: &str) -> Error {
        let mut before = file.text[..at - file.start].lines();
        let problem = match before.position(|line| header(line) == Some(table)) {
            Some(first) => format!("this table has a header in line {} already", first + 1),
            None => "this table has keys above already".into(),
        };
        self.error(at, table, problem, "put all its keys below one header")
    }

    /// Returns the text between two bytes of one file.
    pub fn slice(&self, span: &Range<usize>) -> &str {
        self.file_at(span.start)
            .and_then(|file| {
                file.text
                    .get(span.start - file.start..span.end - file.start)
            })
            .unwrap_or_default()
    }

    /// Returns the file and the position of the byte `at`.
    pub fn place(&self, at: usize) -> Option<(&Path, Position)> {
        let file = self.file_at(at)?;
        let mut offset = (at - file.start).min(file.text.len());
        while !file.text.is_char_boundary(offset) {
            offset -= 1;
        }
        Some((&file.path, position(&file.text[..offset])))
    }

    /// Returns file, line and column of the byte `at`, for an error that mentions a second position.
    pub fn name(&self, at: usize) -> Option<String> {
        let (path, at) = self.place(at)?;
        Some(format!("{}:{}:{}", path.display(), at.line, at.column))
    }

    /// Makes an error about `key` at the byte `at`.
    pub fn error(
        &self,
        at: usize,
        key: &str,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Error {
        let place = self.place(at);
        Error::Config {
            file: place.map(|(path, _)| path.to_owned()),
            position: place.map(|(_, position)| position),
            key: key.to_owned(),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }

    fn file_at(&self, at: usize) -> Option<&File> {
        self.0.iter().rfind(|file| file.start <= at)
    }

    fn push(&mut self, path: PathBuf, text: String) {
        // One byte between two files, so that the end of one is not the start of the next.
        let start = self
            .0
            .last()
            .map_or(0, |file| file.start + file.text.len() + 1);
        self.0.push(File { path, text, start });
    }

    /// Returns the files that match a pattern of `include`, sorted. A pattern without a wildcard must
    /// name a file that exists.
    fn expand(&self, at: usize, pattern: &str) -> Result<Vec<PathBuf>> {
        let error = |problem: String, remedy: &str| self.error(at, "include", problem, remedy);
        let main = &self.0[0].path;
        let directory = main.parent().unwrap_or(Path::new("/"));
        let mut paths = Vec::new();
        if pattern.contains(['*', '?', '[']) {
            let options = glob::MatchOptions {
                // As in a shell, because an editor's hidden lock file does not belong to the configuration.
                require_literal_leading_dot: true,
                require_literal_separator: true,
                case_sensitive: true,
            };
            let whole = Path::new(&glob::Pattern::escape(&directory.to_string_lossy()))
                .join(pattern)
                .to_string_lossy()
                .into_owned();
            let matches = glob::glob_with(&whole, options)
                .map_err(|problem| error(format!("{pattern:?}: {}", problem.msg), ""))?;
            for path in matches {
                paths.push(path.map_err(|problem| error(problem.to_string(), ""))?);
            }
        } else {
            let path = directory.join(pattern);
            if !path.try_exists().unwrap_or(true) {
                return Err(error(
                    format!("there is no file {}", path.display()),
                    "create it, or remove it from the list",
                ));
            }
            paths.push(path);
        }
        if paths.contains(main) {
            return Err(error(
                format!("{pattern:?} matches this very file"),
                "keep included files in a directory of their own",
            ));
        }
        Ok(paths)
    }
}

/// Returns the patterns of `include` with their positions. Serde refuses those of a wrong type.
fn includes(table: &DeTable<'_>) -> Vec<(usize, String)> {
    let Some(DeValue::Array(patterns)) = table.get("include").map(|value| value.get_ref()) else {
        return Vec::new();
    };
    patterns
        .iter()
        .filter_map(|pattern| match pattern.get_ref() {
            DeValue::String(text) => Some((pattern.span().start, text.to_string())),
            _ => None,
        })
        .collect()
}

/// Returns the table of the header that contains the byte `at`.
fn header_at(text: &str, at: usize) -> Option<&str> {
    let start = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
    header(text[start..].lines().next()?)
}

/// Returns the table if a line is a header.
fn header(line: &str) -> Option<&str> {
    let inner = line.trim_start().strip_prefix('[')?;
    let (table, _) = inner.trim_start_matches('[').split_once(']')?;
    // A line of a value may begin like a header.
    (!table.contains(['=', '{'])).then(|| table.trim())
}

/// Returns the position directly behind the text `before`.
fn position(before: &str) -> Position {
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    Position {
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
    }
}

/// Reads a file that must be UTF-8.
fn read(path: &Path) -> Result<String> {
    let refuse = |position, problem: String, remedy: &str| Error::Config {
        file: Some(path.to_owned()),
        position,
        key: String::new(),
        problem,
        remedy: remedy.to_owned(),
    };
    let bytes = read_bytes(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => refuse(
            None,
            "there is no such file".into(),
            "create it, or name another with --config",
        ),
        io::ErrorKind::PermissionDenied => Error::system_with(
            format!("read the configuration {}", path.display()),
            source,
            "let this user read it and every directory above it",
        ),
        _ => refuse(None, format!("it can't be read: {source}"), ""),
    })?;
    String::from_utf8(bytes).map_err(|problem| {
        let good = &problem.as_bytes()[..problem.utf8_error().valid_up_to()];
        let bad = problem.as_bytes()[good.len()];
        refuse(
            // This part is valid UTF-8, so nothing is replaced.
            Some(position(&String::from_utf8_lossy(good))),
            format!("byte 0x{bad:02x} is not UTF-8"),
            "save the file as UTF-8",
        )
    })
}

/// Reads a regular file. Refuses others, because opening a FIFO would block a reload for ever.
pub(super) fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        return Err(io::Error::other("it is a directory, not a file"));
    }
    if !kind.is_file() && path != Path::new("/dev/null") {
        return Err(io::Error::other(
            "it is not a plain file, and could not be read again on a reload",
        ));
    }
    let mut bytes = Vec::new();
    file.take(SIZE_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > SIZE_MAX {
        return Err(io::Error::other(
            "it is larger than 16MiB, too large for a configuration",
        ));
    }
    Ok(bytes)
}
