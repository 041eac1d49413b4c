//! The members of a call's object, before anything is made of them.
//!
//! [`CallMembers`] takes an object apart without a tree: it knows the members that some form of a
//! call has, each as its JSON text, and which of them were given again. What they must be, and
//! what is said about it, is the form's business. The grammar is judged to the end of the body
//! before any of them is looked at.

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;

/// The members that some form of a call gives a meaning to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Member {
    In,
    Params,
    Id,
    TimeoutMs,
    Method,
    Jsonrpc,
}

impl Member {
    /// All of them, in the order of their numbers.
    const ALL: [Member; 6] = [
        Member::In,
        Member::Params,
        Member::Id,
        Member::TimeoutMs,
        Member::Method,
        Member::Jsonrpc,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Member::In => "in",
            Member::Params => "params",
            Member::Id => "id",
            Member::TimeoutMs => "timeout_ms",
            Member::Method => "method",
            Member::Jsonrpc => "jsonrpc",
        }
    }

    /// The member that a key names; `raw` is the key as it was written, quotes included.
    #[inline]
    fn of(raw: &str) -> Option<Member> {
        Member::named(inside_quotes(raw)?).or_else(|| Member::of_escaped(raw))
    }

    #[inline]
    fn named(name: &str) -> Option<Member> {
        Member::ALL.into_iter().find(|member| member.name() == name)
    }

    /// The same for a key that writes its letters as `\u0069`.
    fn of_escaped(raw: &str) -> Option<Member> {
        // The longest name with each letter six bytes long: nothing longer is worth decoding.
        if raw.len() > "\"\"".len() + 6 * "timeout_ms".len() || !raw.contains('\\') {
            return None;
        }
        let name: String = serde_json::from_str(raw).ok()?;
        Member::named(&name)
    }
}

/// The members' values as JSON text.
#[derive(Default)]
pub(super) struct CallMembers<'a> {
    first: [Option<&'a str>; Member::ALL.len()],
    /// `Some` only where `first` is.
    again: [Option<&'a str>; Member::ALL.len()],
}

impl<'a> CallMembers<'a> {
    /// A member's value; the first one, should there be more.
    #[inline]
    pub(super) fn get(&self, member: Member) -> Option<&'a str> {
        self.first[member as usize]
    }

    /// A member's second value.
    #[inline]
    pub(super) fn again(&self, member: Member) -> Option<&'a str> {
        self.again[member as usize]
    }

    /// A member that was given twice, with its second value.
    pub(super) fn given_twice(&self) -> Option<(Member, &'a str)> {
        Member::ALL
            .into_iter()
            .find_map(|member| Some((member, self.again(member)?)))
    }
}

/// What stands between the quotes of a JSON string, undecoded; `None` for any other JSON value.
#[inline]
pub(super) fn inside_quotes(raw: &str) -> Option<&str> {
    raw.strip_prefix('"')?.strip_suffix('"')
}

impl<'de> Deserialize<'de> for CallMembers<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EnvelopeVisitor)
    }
}

struct EnvelopeVisitor;

impl<'de> Visitor<'de> for EnvelopeVisitor {
    type Value = CallMembers<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a call")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<CallMembers<'de>, A::Error> {
        let mut envelope = CallMembers::default();
        // Keys are taken raw: decoded, those with a lone surrogate would be refused as no JSON.
        while let Some((key, value)) = map.next_entry::<&RawValue, &RawValue>()? {
            if let Some(member) = Member::of(key.get()) {
                let first = &mut envelope.first[member as usize];
                let again = &mut envelope.again[member as usize];
                match first {
                    None => *first = Some(value.get()),
                    Some(_) => *again = again.or(Some(value.get())),
                }
            }
        }
        Ok(envelope)
    }
}
