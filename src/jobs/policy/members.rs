//! Reads the members of a JSON object one by one, so that each error names the member.
//!
//! Values stay as they are written, byte for byte. A member that occurs twice is refused, because a filter in
//! front of the server could have read the other one.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::protocol::job_id::JobId;
use crate::protocol::rpc_error::excerpt;

/// The largest number of members of an object. Each new one is compared with all others, and an export has 25.
const MOST_MEMBERS: usize = 64;

/// The members of an object that were not taken yet.
pub struct JsonMembers<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

/// A name of a member. It is borrowed if it has no escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for JsonMembers<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = Vec<(Cow<'de, str>, &'de RawValue)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members: Self::Value = Vec::new();
                while let Some((Name(name), value)) = map.next_entry::<Name<'de>, &RawValue>()? {
                    if members.iter().any(|(known, _)| *known == name) {
                        let text = format_args!("`{}` occurs twice", excerpt(&name));
                        return Err(de::Error::custom(text));
                    }
                    if members.len() == MOST_MEMBERS {
                        let text = format_args!("it has more than {MOST_MEMBERS} members");
                        return Err(de::Error::custom(text));
                    }
                    members.push((name, value));
                }
                Ok(members)
            }
        }

        deserializer.deserialize_map(Members).map(JsonMembers)
    }
}

impl<'a> JsonMembers<'a> {
    /// Parses an object.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn parse(json: &'a str) -> Result<Self, String> {
        if !json.trim_start().starts_with('{') {
            return Err("the params must be an object".to_owned());
        }
        serde_json::from_str(json).map_err(|error| {
            let said = error.to_string();
            let end = said.rfind(" at line ").unwrap_or(said.len());
            said[..end].to_owned()
        })
    }

    /// Takes the value of a member as it is written; `None` if there is no such member.
    pub fn raw(&mut self, name: &str) -> Option<&'a str> {
        let at = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.swap_remove(at).1.get())
    }

    /// Takes a string. An absent member and null are `None`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn string(&mut self, name: &str) -> Result<Option<String>, String> {
        self.typed(name, "a string")
    }

    /// Takes an integer of these bounds. An absent member and null are `None`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn integer(&mut self, name: &str, bounds: (i64, i64)) -> Result<Option<i64>, String> {
        let (least, most) = bounds;
        let kind = format!("an integer from {least} to {most}");
        let number: Option<i64> = self.typed(name, &kind)?;
        match number {
            Some(number) if !(least..=most).contains(&number) => {
                Err(format!("`{name}` must be {kind}"))
            }
            number => Ok(number),
        }
    }

    /// Takes the id of a job. An absent member and null are `None`.
    ///
    /// # Errors
    /// If it is no UUID.
    pub fn id(&mut self, name: &str) -> Result<Option<JobId>, String> {
        let kind = "a UUID of 36 characters";
        let Some(text) = self.typed::<String>(name, kind)? else {
            return Ok(None);
        };
        match JobId::parse(&text) {
            Some(id) => Ok(Some(id)),
            None => Err(format!("`{name}` must be {kind}")),
        }
    }

    /// Checks that no member is left.
    ///
    /// # Errors
    /// A sentence that names one that is left. `known` are the names that exist, and `reserved` those that a
    /// later version will have.
    pub fn finish(self, known: &[&str], reserved: &[&str]) -> Result<(), String> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) if reserved.contains(&&**name) => {
                Err(format!("`{name}` is not supported yet"))
            }
            Some((name, _)) => {
                let name = excerpt(name);
                Err(format!(
                    "unknown member `{name}`; known are {}",
                    known.join(", ")
                ))
            }
        }
    }

    fn typed<T: Deserialize<'a>>(&mut self, name: &str, kind: &str) -> Result<Option<T>, String> {
        let Some(json) = self.raw(name) else {
            return Ok(None);
        };
        serde_json::from_str(json).map_err(|_| format!("`{name}` must be {kind}"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn values_keep_their_bytes_and_escaped_names_are_read() {
        let mut members =
            JsonMembers::parse(r#" {"params": [1e0,  2] , "k\u0065y":"a\n"}"#).unwrap();
        assert_eq!(members.raw("params"), Some("[1e0,  2]"));
        assert_eq!(members.string("key").unwrap().as_deref(), Some("a\n"));
        assert_eq!(members.raw("key"), None);
        members.finish(&[], &[]).unwrap();
    }

    #[test]
    fn each_error_names_its_member() {
        for (json, expected) in [
            ("[]", "the params must be an object"),
            (r#"{"a":1,"a":2}"#, "`a` occurs twice"),
            (r#"{"n":"1"}"#, "`n` must be an integer from 0 to 9"),
            (r#"{"n":1.5}"#, "`n` must be an integer from 0 to 9"),
            (r#"{"n":10}"#, "`n` must be an integer from 0 to 9"),
            (
                r#"{"n":99999999999999999999}"#,
                "`n` must be an integer from 0 to 9",
            ),
            (r#"{"id":"x"}"#, "`id` must be a UUID of 36 characters"),
            (r#"{"later":1}"#, "`later` is not supported yet"),
            (r#"{"x":1}"#, "unknown member `x`; known are n, id"),
        ] {
            let read = || {
                let mut members = JsonMembers::parse(json)?;
                members.integer("n", (0, 9))?;
                members.id("id")?;
                members.finish(&["n", "id"], &["later"])
            };
            assert_eq!(read(), Err(expected.to_owned()), "{json}");
        }
    }

    #[test]
    fn null_is_the_same_as_absent() {
        let mut members = JsonMembers::parse(r#"{"n":null,"id":null,"s":null}"#).unwrap();
        assert_eq!(members.integer("n", (0, 9)), Ok(None));
        assert_eq!(members.id("id"), Ok(None));
        assert_eq!(members.string("s"), Ok(None));
    }
}
