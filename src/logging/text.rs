//! Makes text for messages: counts with the right plural, and escaped control characters.

/// So many things, as in `1 worker drains`, `2 workers drain`.
pub fn pluralize(number: usize, one: &str, several: &str) -> String {
    let things = if number == 1 { one } else { several };
    format!("{number} {things}")
}

/// Returns a message with its control characters escaped, so that text of a client cannot start a
/// line of its own or control a terminal.
pub fn printable(message: &str) -> String {
    let mut safe = String::with_capacity(message.len());
    for character in message.chars() {
        if character.is_control() {
            safe.extend(character.escape_default());
        } else {
            safe.push(character);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_one_and_none_are_several() {
        let workers = |number| pluralize(number, "worker drains", "workers drain");
        assert_eq!(workers(1), "1 worker drains");
        assert_eq!(workers(0), "0 workers drain");
        assert_eq!(workers(12), "12 workers drain");
    }
}
