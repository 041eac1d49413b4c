//! Keeps the resume file of `map`: which lines are completed, so that a second run skips them.
//!
//! It is a text file that is only appended to. Its first line names the method. Each further line is the
//! number of a completed line, written after its result. An incomplete last line (the machine went down) is
//! ignored. flock(2) prevents a second run with the same file.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::error::{Error, Result};

const HEAD: &str = "# preforkd map ";

#[derive(Debug)]
pub(super) struct ResumeFile {
    path: PathBuf,
    file: Flock<File>,
    done: BTreeSet<u64>,
}

impl ResumeFile {
    /// Opens the file at `path`, or creates it.
    pub(super) fn open(path: &Path, method: &str) -> Result<Self> {
        let failed = |what: &str, error| Error::system(format!("{what} {}", path.display()), error);
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        let file = options.open(path).map_err(|error| failed("open", error))?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
            |(_, error)| match error {
                Errno::EWOULDBLOCK => Error::Usage(format!(
                    "{} is in use by another run; use another file for each run",
                    path.display()
                )),
                error => failed("lock", error.into()),
            },
        )?;
        let mut text = String::new();
        match file.read_to_string(&mut text) {
            Err(error) if error.kind() == ErrorKind::InvalidData => return Err(alien(path)),
            outcome => outcome.map_err(|error| failed("read", error))?,
        };
        // An incomplete line is removed, because the next number would be joined to it.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let head = format!("{HEAD}{method}\n");
        if whole == 0 && !head.starts_with(&text) {
            return Err(alien(path));
        }
        let done = parse(&text[..whole], path, method)?;
        if whole < text.len() {
            file.set_len(whole as u64)
                .map_err(|error| failed("truncate", error))?;
            text.truncate(whole);
        }
        if text.is_empty() {
            file.write_all(head.as_bytes())
                .map_err(|error| failed("write", error))?;
        }
        Ok(ResumeFile {
            path: path.to_owned(),
            file,
            done,
        })
    }

    /// Returns whether a line was completed in an earlier run.
    pub(super) fn has(&self, number: u64) -> bool {
        self.done.contains(&number)
    }

    /// Appends completed lines.
    pub(super) fn add(&mut self, numbers: &[u64]) -> Result<()> {
        let text: String = numbers.iter().map(|number| format!("{number}\n")).collect();
        self.file.write_all(text.as_bytes()).map_err(|error| {
            Error::system_with(
                format!("write {}", self.path.display()),
                error,
                "the resume file is not complete: the next run repeats lines that it does not name",
            )
        })
    }
}

fn parse(text: &str, path: &Path, method: &str) -> Result<BTreeSet<u64>> {
    let mut lines = text.lines();
    if let Some(head) = lines.next() {
        match head.strip_prefix(HEAD) {
            Some(name) if name == method => {}
            Some(name) => {
                return Err(Error::Usage(format!(
                    "{} is the resume file of method {name}; use another file",
                    path.display()
                )));
            }
            None => return Err(alien(path)),
        }
    }
    lines
        .map(|line| line.parse().map_err(|_| alien(path)))
        .collect()
}

fn alien(path: &Path) -> Error {
    Error::Usage(format!(
        "{} is not a resume file; --resume takes a file that an earlier run has begun, or a new one",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs;

    #[test]
    fn what_is_added_is_known_to_the_next_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let mut record = ResumeFile::open(&path, "ping").unwrap();
        record.add(&[1, 3]).unwrap();
        record.add(&[20]).unwrap();
        let locked = ResumeFile::open(&path, "ping").unwrap_err();
        assert!(locked.to_string().contains("in use"), "{locked}");
        drop(record);

        // The machine went down while 21 was written.
        let mut text = fs::read_to_string(&path).unwrap();
        text += "2";
        fs::write(&path, &text).unwrap();
        let mut record = ResumeFile::open(&path, "ping").unwrap();
        let has = [1, 2, 3, 20].map(|number| record.has(number));
        assert_eq!(has, [true, false, true, true]);
        record.add(&[4]).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, "# preforkd map ping\n1\n3\n20\n4\n");
    }

    #[test]
    fn the_file_of_another_method_and_any_other_file_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (text, told) in [
            ("# preforkd map pong\n1\n", "method pong"),
            ("# preforkd map ping\none\n", "not a resume file"),
            ("important\n", "not a resume file"),
            ("important", "not a resume file"),
        ] {
            let path = dir.path().join("record");
            fs::write(&path, text).unwrap();
            let error = ResumeFile::open(&path, "ping").unwrap_err();
            assert_eq!(error.exit_code(), 64);
            assert!(error.to_string().contains(told), "{error}");
            assert_eq!(
                fs::read_to_string(&path).unwrap(),
                text,
                "nothing was changed"
            );
        }
    }
}
