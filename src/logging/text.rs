//! Makes text for messages: counts with the right plural, and escaped control characters.

use std::borrow::Cow;
use std::fmt;

/// Returns a number with its noun, as in `1 worker drains`, `2 workers drain`.
pub fn pluralize(number: usize, one: &str, several: &str) -> String {
    let things = if number == 1 { one } else { several };
    format!("{number} {things}")
}

/// A time in milliseconds as people say it: `350 ms`, `1.6 s`.
pub struct HumanDuration(pub u64);

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ms @ 0..1000 => write!(f, "{ms} ms"),
            // In tenths, cut and not rounded: 59.96 s is not 60.
            ms if ms % 1000 < 100 => write!(f, "{} s", ms / 1000),
            ms => write!(f, "{}.{} s", ms / 1000, ms % 1000 / 100),
        }
    }
}

/// Returns whether a character changes where or in which order other characters are shown. These are the control
/// characters (C0, DEL, C1), the separators of lines and paragraphs, and the characters that change the direction of
/// text (UAX #9).
pub fn is_unprintable(character: char) -> bool {
    let changes_direction = matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    character.is_control() || matches!(character, '\u{2028}' | '\u{2029}') || changes_direction
}

/// Returns a message with its unprintable characters escaped. So a client's text cannot start a new line
/// or control a terminal.
pub fn printable(message: &str) -> String {
    escape_unprintable(message, &[]).into_owned()
}

/// Returns a text with its unprintable characters escaped, except for those in `kept`.
pub fn escape_unprintable<'a>(text: &'a str, kept: &[char]) -> Cow<'a, str> {
    escape(
        text,
        |c| is_unprintable(c) && !kept.contains(&c),
        |safe, c| safe.extend(c.escape_default()),
    )
}

/// Returns JSON with its unprintable characters escaped as in JSON, so its value is the same. Line feeds
/// and tabs between values are kept.
pub fn printable_json(json: &str) -> Cow<'_, str> {
    // All escaped characters have at most four hexadecimal digits. Control characters below U+0020 occur only between
    // values, because JSON escapes them in strings.
    escape(
        json,
        |c| is_unprintable(c) && c >= ' ',
        |safe, c| safe.push_str(&format!("\\u{:04x}", u32::from(c))),
    )
}

fn escape(
    text: &str,
    is_escaped: impl Fn(char) -> bool,
    append: impl Fn(&mut String, char),
) -> Cow<'_, str> {
    if !text.contains(&is_escaped) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for character in text.chars() {
        match is_escaped(character) {
            true => append(&mut safe, character),
            false => safe.push(character),
        }
    }
    Cow::Owned(safe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_as_people_say_them() {
        assert_eq!(HumanDuration(350).to_string(), "350 ms");
        assert_eq!(HumanDuration(1600).to_string(), "1.6 s");
        assert_eq!(HumanDuration(30_000).to_string(), "30 s");
    }

    #[test]
    fn what_steers_a_terminal_or_a_reader_is_escaped() {
        let text = "a\n\u{1b}[2J\u{7f}\u{9b}\u{2028}\u{202e}gpj.\u{2066}\u{200f} naïve \u{200d}€";
        let shown =
            "a\\n\\u{1b}[2J\\u{7f}\\u{9b}\\u{2028}\\u{202e}gpj.\\u{2066}\\u{200f} naïve \u{200d}€";
        assert_eq!(printable(text), shown);
        assert!(escape_unprintable(text, &['\n']).starts_with("a\n\\u{1b}"));
        let json = serde_json::to_string(text).unwrap_or_default();
        let safe = printable_json(&json);
        assert!(!safe.chars().any(is_unprintable), "{safe}");
        assert_eq!(serde_json::from_str(&safe).ok(), Some(text.to_owned()));
        assert!(matches!(printable_json("{\n\t\"a\": 1}"), Cow::Borrowed(_)));
    }

    #[test]
    fn one_is_singular_and_zero_is_plural() {
        let workers = |number| pluralize(number, "worker drains", "workers drain");
        assert_eq!(workers(1), "1 worker drains");
        assert_eq!(workers(0), "0 workers drain");
        assert_eq!(workers(12), "12 workers drain");
    }
}
