//! Splits the object of a call into its members.
//!
//! [`CallMembers`] finds the members that a form of a call has, without building a tree: each as its JSON
//! text, and which of them occur twice. `call` and `jsonrpc` check their values and make the messages.
//! The grammar is checked up to the end of the body before any member is used.

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;
use std::marker::PhantomData;

/// The members that have a meaning in some form of a call.
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

    /// Returns the member with this key. `raw` is the key as written, with its quotes.
    #[inline]
    fn of(raw: &str) -> Option<Member> {
        Member::named(inside_quotes(raw)?).or_else(|| Member::of_escaped(raw))
    }

    #[inline]
    fn named(name: &str) -> Option<Member> {
        Member::ALL.into_iter().find(|member| member.name() == name)
    }

    /// Returns the member with this name, for a key with escapes such as `\u0069`.
    fn of_escaped(raw: &str) -> Option<Member> {
        // The longest name with six bytes per letter; a longer key cannot match.
        if raw.len() > "\"\"".len() + 6 * "timeout_ms".len() || !raw.contains('\\') {
            return None;
        }
        let name: String = serde_json::from_str(raw).ok()?;
        Member::named(&name)
    }
}

/// The values of the members as JSON text.
#[derive(Default)]
pub(super) struct CallMembers<'a> {
    first: [Option<&'a str>; Member::ALL.len()],
    /// `Some` only if `first` is.
    again: [Option<&'a str>; Member::ALL.len()],
}

impl<'a> CallMembers<'a> {
    /// Returns the first value of a member.
    #[inline]
    pub(super) fn get(&self, member: Member) -> Option<&'a str> {
        self.first[member as usize]
    }

    /// Returns the second value of a member.
    #[inline]
    pub(super) fn again(&self, member: Member) -> Option<&'a str> {
        self.again[member as usize]
    }

    /// Returns a member that occurs twice, with its second value.
    pub(super) fn given_twice(&self) -> Option<(Member, &'a str)> {
        Member::ALL
            .into_iter()
            .find_map(|member| Some((member, self.again(member)?)))
    }
}

/// Returns the bytes between the quotes of a JSON string, undecoded; `None` for other JSON values.
#[inline]
pub(super) fn inside_quotes(raw: &str) -> Option<&str> {
    raw.strip_prefix('"')?.strip_suffix('"')
}

impl<'a> CallMembers<'a> {
    /// Reads the members of an object.
    ///
    /// # Errors
    /// What is wrong with the text as JSON.
    #[inline]
    pub(super) fn read(text: &'a str) -> serde_json::Result<Self> {
        let mut members = CallMembers::default();
        // serde refuses a key with half of a surrogate pair. The slower reading of raw keys ignores it, as any other
        // key that means nothing here.
        if members.fill::<DecodedKey>(text).is_err() {
            members = CallMembers::default();
            members.fill::<RawKey>(text)?;
        }
        Ok(members)
    }

    /// Adds the members of an object, read with keys of the type `K`. They are not returned through serde, which would
    /// copy them several times.
    #[inline]
    fn fill<K: Key + Deserialize<'a>>(&mut self, text: &'a str) -> serde_json::Result<()> {
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let key = PhantomData::<K>;
        deserializer.deserialize_map(MembersVisitor { members: self, key })?;
        deserializer.end()
    }

    #[inline]
    fn set(&mut self, member: Member, value: &'a str) {
        match &mut self.first[member as usize] {
            first @ None => *first = Some(value),
            Some(_) => _ = self.again[member as usize].get_or_insert(value),
        }
    }
}

/// A key of a call: the member that it names.
trait Key {
    fn member(self) -> Option<Member>;
}

struct DecodedKey(Option<Member>);

impl Key for DecodedKey {
    #[inline]
    fn member(self) -> Option<Member> {
        self.0
    }
}

impl<'de> Deserialize<'de> for DecodedKey {
    #[inline]
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(KeyVisitor)
    }
}

struct KeyVisitor;

impl Visitor<'_> for KeyVisitor {
    type Value = DecodedKey;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    #[inline]
    fn visit_str<E>(self, key: &str) -> Result<DecodedKey, E> {
        Ok(DecodedKey(Member::named(key)))
    }
}

struct RawKey(Option<Member>);

impl Key for RawKey {
    fn member(self) -> Option<Member> {
        self.0
    }
}

impl<'de> Deserialize<'de> for RawKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = <&RawValue>::deserialize(deserializer)?;
        Ok(RawKey(Member::of(raw.get())))
    }
}

/// Adds the members of an object, whose keys have the type `K`.
struct MembersVisitor<'m, 'a, K> {
    members: &'m mut CallMembers<'a>,
    key: PhantomData<K>,
}

impl<'de, K: Key + Deserialize<'de>> Visitor<'de> for MembersVisitor<'_, 'de, K> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a call")
    }

    #[inline]
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((key, value)) = map.next_entry::<K, &RawValue>()? {
            if let Some(member) = key.member() {
                self.members.set(member, value.get());
            }
        }
        Ok(())
    }
}
