//! Writes to the terminal: results to stdout, everything else to stderr.
//!
//! A reader that has closed the pipe (`preforkd status | head -1`) is no failure, but a full device is. An
//! error on stderr is ignored, because it cannot be reported anywhere.

use std::borrow::Cow;
use std::env;
use std::io::{self, ErrorKind, IsTerminal, Write};

use crate::error::{Error, Result};
use crate::logging::escape_unprintable;

/// Writes to stdout.
pub fn print(text: &str) -> Result<()> {
    deliver(&mut io::stdout().lock(), text).map(drop)
}

/// Writes to stdout. Returns whether stdout still has a reader.
pub fn print_part(text: &str) -> Result<bool> {
    deliver(&mut io::stdout().lock(), text)
}

fn deliver(out: &mut impl Write, text: &str) -> Result<bool> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        outcome => outcome.map(|()| true).map_err(|error| {
            Error::system_with("write to stdout", error, "the output is not complete")
        }),
    }
}

/// Writes one message to stderr, behind the program's name.
pub fn print_error(name: &str, text: &str) {
    let line = format!("{name}: {}\n", printable(text));
    // One write, so that the lines of several programs on one terminal are not mixed.
    let _ = io::stderr().lock().write_all(line.as_bytes());
}

/// Returns whether stdout is a terminal whose user wants colours (<https://no-color.org>).
pub fn wants_colours() -> bool {
    let set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    io::stdout().is_terminal()
        && !set("NO_COLOR")
        && env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Escapes the unprintable characters of a text except line feeds and tabs: what a server or a handler
/// sends must not control the terminal.
pub fn printable(text: &str) -> Cow<'_, str> {
    escape_unprintable(text, &['\n', '\t'])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs::OpenOptions;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_reader_that_left_is_no_failure() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(!deliver(&mut ours, "no reader for this\n").unwrap());
    }

    #[test]
    fn a_full_device_is_one() {
        let mut full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = deliver(&mut full, "no room for this\n").unwrap_err();
        assert_eq!(error.exit_code(), 71, "{error}");
        assert!(error.to_string().contains("write to stdout"), "{error}");
    }

    #[test]
    fn control_characters_are_shown_and_not_obeyed() {
        assert_eq!(
            printable("a\x1b[31mb\u{9b}\0c\n\td"),
            "a\\u{1b}[31mb\\u{9b}\\u{0}c\n\td"
        );
        assert!(matches!(printable("plain, naïve\n"), Cow::Borrowed(_)));
    }
}
