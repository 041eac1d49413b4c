//! Adds members to JSON lines of the log, beside the message, for programs that read them. Text lines have none.

use std::cell::RefCell;

thread_local! {
    /// The object whose members the lines of this thread have now; empty: none.
    static MEMBERS: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs `run`. The JSON lines that this thread logs meanwhile have the members of `object`, which is JSON.
pub fn with_members(object: &str, run: impl FnOnce()) {
    MEMBERS.with_borrow_mut(|members| object.clone_into(members));
    run();
    MEMBERS.with_borrow_mut(String::clear);
}

/// Adds the members to a JSON object.
pub(super) fn add_members(line: &mut String) {
    MEMBERS.with_borrow(|members| {
        let own = members.strip_prefix('{').filter(|own| own.len() > 1);
        if let Some(own) = own
            && line.pop() == Some('}')
        {
            line.push(',');
            line.push_str(own);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_added_only_while_they_are_set() {
        let line = || {
            let mut line = r#"{"a":1}"#.to_owned();
            add_members(&mut line);
            line
        };
        with_members(r#"{"b":"}"}"#, || {
            assert_eq!(line(), r#"{"a":1,"b":"}"}"#);
        });
        with_members("{}", || assert_eq!(line(), r#"{"a":1}"#));
        assert_eq!(line(), r#"{"a":1}"#);
    }
}
