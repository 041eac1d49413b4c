//! Turns the standard output and error of a pool program into lines for the log.
//!
//! Pure: bytes and the time in, lines out. A long line is cut, bytes that are not UTF-8 are escaped, and
//! the number of lines per second is limited; the others are counted. So a program can fill neither the
//! disk nor the memory.

use std::fmt::Write;
use std::mem;

use log::Level;

use crate::logging::pluralize;
use crate::throttle::Millis;

/// The largest number of bytes kept of a line.
const LONGEST: usize = 4096;
/// The largest number of lines per second.
const PER_SECOND: u32 = 500;
const SECOND: Millis = 1000;

/// One output stream.
#[derive(Debug, Default)]
pub(super) struct Lines {
    tail: Vec<u8>,
    /// Whether the rest of a line is skipped, because it was cut.
    skips: bool,
    /// When this second began, and how many lines it had.
    second: Millis,
    count: u32,
    dropped: u64,
}

impl Lines {
    /// Adds bytes, and passes the completed lines to `say`.
    pub fn add(&mut self, bytes: &[u8], now: Millis, say: &mut impl FnMut(&str)) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let ended = piece.last() == Some(&b'\n');
            let text = if ended {
                &piece[..piece.len() - 1]
            } else {
                piece
            };
            if !self.skips {
                let room = LONGEST - self.tail.len();
                self.tail.extend_from_slice(&text[..text.len().min(room)]);
                if text.len() > room {
                    self.say(" (cut)", now, say);
                    self.skips = true;
                }
            }
            if ended && !mem::take(&mut self.skips) {
                self.say("", now, say);
            }
        }
    }

    /// Ends the stream and passes the last incomplete line to `say`.
    pub fn end(&mut self, now: Millis, say: &mut impl FnMut(&str)) {
        if !self.tail.is_empty() {
            self.say("", now, say);
        }
        self.report_dropped(say);
    }

    fn say(&mut self, end: &str, now: Millis, say: &mut impl FnMut(&str)) {
        if now >= self.second + SECOND {
            self.report_dropped(say);
            self.second = now;
            self.count = 0;
        }
        self.count += 1;
        if self.count <= PER_SECOND {
            let line = self.tail.strip_suffix(b"\r").unwrap_or(&self.tail);
            say(&(escaped(line) + end));
        } else {
            self.dropped += 1;
        }
        self.tail.clear();
    }

    fn report_dropped(&mut self, say: &mut impl FnMut(&str)) {
        let dropped = mem::take(&mut self.dropped);
        if dropped > 0 {
            say(&format!(
                "({} left out: more than {PER_SECOND} a second)",
                pluralize(dropped as usize, "line", "lines")
            ));
        }
    }
}

/// Returns the level and the rest of a line that begins with a syslog priority: `<3>text` (sd-daemon(3)).
pub(super) fn with_priority(line: &str) -> Option<(Level, &str)> {
    let (priority, text) = line.strip_prefix('<')?.split_once('>')?;
    let level = match priority {
        "0" | "1" | "2" | "3" => Level::Error,
        "4" => Level::Warn,
        "5" | "6" => Level::Info,
        "7" => Level::Debug,
        _ => return None,
    };
    Some((level, text))
}

/// Converts a line to text. The log escapes control characters.
fn escaped(line: &[u8]) -> String {
    let mut text = String::with_capacity(line.len());
    for chunk in line.utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(lines: &mut Lines, pieces: &[&[u8]], now: Millis) -> Vec<String> {
        let mut said = Vec::new();
        for piece in pieces {
            lines.add(piece, now, &mut |line| said.push(line.to_owned()));
        }
        said
    }

    #[test]
    fn lines_are_whole_in_every_split() {
        let mut lines = Lines::default();
        assert_eq!(
            said(&mut lines, &[b"a", b"b\nc\r\n", b"\n", b"d"], 0),
            ["ab", "c", ""]
        );
        let mut rest = Vec::new();
        lines.end(0, &mut |line| rest.push(line.to_owned()));
        lines.end(0, &mut |line| rest.push(line.to_owned()));
        assert_eq!(rest, ["d"]);
        assert_eq!(
            said(&mut lines, &[b"\xff\xc3\xa9\xc3\n"], 0),
            ["\\xff\u{e9}\\xc3"]
        );
    }

    #[test]
    fn a_line_may_begin_with_a_priority() {
        assert_eq!(with_priority("<3>full"), Some((Level::Error, "full")));
        assert_eq!(with_priority("<4>"), Some((Level::Warn, "")));
        assert_eq!(with_priority("<6> a"), Some((Level::Info, " a")));
        assert_eq!(with_priority("<7>a>b"), Some((Level::Debug, "a>b")));
        for line in ["", "<", "<8>x", "<>x", "<a>x", "<31>x", " <3>x"] {
            assert_eq!(with_priority(line), None, "{line}");
        }
    }

    #[test]
    fn a_line_without_an_end_is_cut_once_and_keeps_no_memory() {
        let mut lines = Lines::default();
        let piece = [b'x'; 1000];
        let mut all = Vec::new();
        for _ in 0..1000 {
            all.extend(said(&mut lines, &[&piece], 0));
        }
        all.extend(said(&mut lines, &[b"y\nz\n"], 0));
        assert_eq!(all.len(), 2);
        assert!(all[0].ends_with("x (cut)") && all[0].len() == LONGEST + 6);
        assert_eq!(all[1], "z");
        assert!(lines.tail.capacity() <= 2 * LONGEST);
        // A line of exactly the largest length.
        let exact = [b'x'; LONGEST];
        assert_eq!(said(&mut lines, &[&exact, b"\n"], 0).len(), 1);
    }

    #[test]
    fn many_lines_are_limited_and_counted() {
        let mut lines = Lines::default();
        let flood = b"x\n".repeat(2000);
        assert_eq!(said(&mut lines, &[&flood], 5).len(), PER_SECOND as usize);
        let next = said(&mut lines, &[b"y\n"], 1500);
        assert_eq!(next, ["(1500 lines left out: more than 500 a second)", "y"]);
    }
}
