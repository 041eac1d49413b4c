//! Counts of things in sentences, whose words and verbs agree with the number.

/// So many things, as in `1 worker drains`, `2 workers drain`.
pub fn pluralize(number: usize, one: &str, several: &str) -> String {
    let things = if number == 1 { one } else { several };
    format!("{number} {things}")
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
