//! Builds the arguments of a command: the configured ones, with each `{name}` replaced by a member of the
//! params.
//!
//! A placeholder is always one whole argument. Its value is neither split nor read by a shell, and cannot
//! be taken for an option. Strings are used as they are; numbers, true and false as they are spelt. Any
//! other value is refused before a process is created.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::fmt;

use serde::Deserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::config::{literal, placeholder};
use crate::handler::prepared_program::c_string;
use crate::protocol::rpc_error::{RpcError, excerpt};

/// The longest argument that the kernel accepts, without its NUL (MAX_ARG_STRLEN, execve(2)).
const LONGEST: usize = 128 * 1024 - 1;

#[derive(Debug)]
pub(super) struct Arguments(Vec<Argument>);

#[derive(Debug)]
enum Argument {
    Fixed(CString),
    Param {
        name: String,
        /// Whether an argument `--` is before it. No argument after it is an option.
        after_dashes: bool,
    },
}

impl Arguments {
    pub fn new(command: &[String]) -> Self {
        let mut after_dashes = false;
        let argument = |text: &String| match placeholder(text) {
            Some(name) => Argument::Param {
                name: name.to_owned(),
                after_dashes,
            },
            None => {
                after_dashes |= text == "--";
                Argument::Fixed(c_string(literal(text)))
            }
        };
        Arguments(command.iter().map(argument).collect())
    }

    /// Returns the arguments of one call.
    ///
    /// # Errors
    /// `invalid-params`.
    pub fn of_call(&self, params: &str) -> Result<Vec<Cow<'_, CStr>>, RpcError> {
        let names: Vec<&str> = self.names().collect();
        let values = if names.is_empty() {
            Vec::new()
        } else {
            values(params, &names)?
        };
        let mut arguments = Vec::with_capacity(self.0.len());
        for argument in &self.0 {
            arguments.push(match argument {
                Argument::Fixed(text) => Cow::Borrowed(&**text),
                Argument::Param { name, after_dashes } => {
                    let value = values.iter().find(|(found, _)| found == name);
                    let Some((_, value)) = value else {
                        let text = format!(
                            "params have no member {name:?}; this method takes {}",
                            list(&names)
                        );
                        return Err(RpcError::invalid_params(text));
                    };
                    Cow::Owned(checked(name, value, *after_dashes)?)
                }
            });
        }
        Ok(arguments)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|argument| match argument {
            Argument::Param { name, .. } => Some(name.as_str()),
            Argument::Fixed(_) => None,
        })
    }
}

fn list(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    quoted.join(", ")
}

fn checked(name: &str, value: &RawValue, after_dashes: bool) -> Result<CString, RpcError> {
    let refused = |problem: String| {
        Err(RpcError::invalid_params(format!(
            "the member {name:?} {problem}"
        )))
    };
    let raw = value.get();
    let text = match raw.as_bytes().first() {
        Some(b'"') => match serde_json::from_str::<String>(raw) {
            Ok(text) => text,
            Err(_) => return refused("is not valid Unicode text".into()),
        },
        Some(b'-' | b'0'..=b'9' | b't' | b'f') => raw.to_owned(),
        _ => return refused("must be a string, a number, true or false".into()),
    };
    if text.starts_with('-') && !after_dashes {
        return refused(format!(
            "is {:?}, which the program could take for an option",
            excerpt(&text)
        ));
    }
    if text.len() > LONGEST {
        return refused(format!(
            "has {} bytes; an argument may have at most {LONGEST}",
            text.len()
        ));
    }
    match CString::new(text) {
        Ok(text) => Ok(text),
        Err(_) => refused("contains a NUL, which an argument cannot contain".into()),
    }
}

/// Returns the requested members of the params.
fn values<'p>(
    params: &'p str,
    names: &[&str],
) -> Result<Vec<(Cow<'p, str>, &'p RawValue)>, RpcError> {
    struct Members<'n>(&'n [&'n str]);

    impl<'p> Visitor<'p> for Members<'_> {
        type Value = Result<Vec<(Cow<'p, str>, &'p RawValue)>, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "an object with {}", list(self.0))
        }

        fn visit_map<A: MapAccess<'p>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut found: Vec<(Cow<'p, str>, &'p RawValue)> = Vec::new();
            let mut twice = None;
            while let Some(name) = map.next_key::<String>()? {
                if !self.0.contains(&name.as_str()) {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
                let value = map.next_value()?;
                // A parser in front of this server may have used the other one of the two.
                if found.iter().any(|(other, _)| *other == name) {
                    twice = Some(format!("the member {name:?} occurs twice"));
                }
                found.push((name.into(), value));
            }
            Ok(twice.map_or(Ok(found), Err))
        }
    }

    let wrong = || {
        let text = format!("params must be an object with {}", list(names));
        RpcError::invalid_params(text)
    };
    if !params.trim_start().starts_with('{') {
        return Err(wrong());
    }
    let mut deserializer = serde_json::Deserializer::from_str(params);
    let members = (&mut deserializer).deserialize_map(Members(names));
    members
        .map_err(|_| wrong())?
        .map_err(RpcError::invalid_params)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn of(command: &[&str], params: &str) -> Result<Vec<String>, String> {
        let command: Vec<String> = command.iter().map(|&text| text.to_owned()).collect();
        let arguments = Arguments::new(&command);
        let made = arguments.of_call(params).map_err(|error| {
            assert_eq!(error.code, -32602);
            error.message
        })?;
        Ok(made
            .iter()
            .map(|argument| argument.to_str().unwrap().to_owned())
            .collect())
    }

    #[test]
    fn a_placeholder_is_replaced_as_one_argument() {
        let command = ["p", "{a}", "x", "{b}", "{a}"];
        let params = r#"{"b": 1.50e400, "a": "; rm -rf / \"$(id)\"\n", "more": [{}]}"#;
        let evil = "; rm -rf / \"$(id)\"\n";
        assert_eq!(
            of(&command, params).unwrap(),
            ["p", evil, "x", "1.50e400", evil]
        );
        assert_eq!(of(&["p", "{a}"], r#"{"a": true}"#).unwrap(), ["p", "true"]);
        assert_eq!(of(&["p", "{a}"], r#"{"a": ""}"#).unwrap(), ["p", ""]);
        // Without a placeholder any params are accepted.
        assert_eq!(of(&["p"], "[1]").unwrap(), ["p"]);
    }

    #[test]
    fn a_leading_dash_is_allowed_only_after_two_dashes() {
        for params in [r#"{"a": "-x"}"#, r#"{"a": -1}"#, r#"{"a": "--"}"#] {
            let refused = of(&["p", "{a}", "--"], params).unwrap_err();
            assert!(refused.contains("option"), "{refused}");
            assert!(of(&["p", "--", "{a}"], params).is_ok());
        }
    }

    #[test]
    fn values_that_cannot_be_arguments_are_refused() {
        let long = format!(r#"{{"a": "{}"}}"#, "x".repeat(200_000));
        for (params, reason) in [
            ("null", "must be an object"),
            ("[1]", "must be an object"),
            ("{}", "no member"),
            (r#"{"a": null}"#, "must be a string"),
            (r#"{"a": ["x"]}"#, "must be a string"),
            (r#"{"a": {}}"#, "must be a string"),
            (r#"{"a": "\u0000"}"#, "NUL"),
            (r#"{"a": "\ud800"}"#, "Unicode"),
            (r#"{"a": 1, "a": 2}"#, "twice"),
            (long.as_str(), "200000 bytes"),
        ] {
            let refused = of(&["p", "{a}"], params).unwrap_err();
            assert!(refused.contains(reason), "{params:.40}: {refused}");
        }
    }

    proptest! {
        #[test]
        fn any_text_arrives_whole_or_not_at_all(text in "\\PC{0,40}|.{0,40}") {
            let params = serde_json::json!({"a": text}).to_string();
            match of(&["p", "{a}", "z"], &params) {
                Ok(made) => prop_assert_eq!(made, ["p", text.as_str(), "z"]),
                Err(_) => prop_assert!(text.starts_with('-') || text.contains('\0')),
            }
        }
    }
}
