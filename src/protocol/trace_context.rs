//! Decodes and encodes W3C Trace Context, level 2: `traceparent` and `tracestate`.
//!
//! Pure. [`TraceFields`] collects what a request says, from headers or from members, and decides what is
//! valid. An invalid or repeated `traceparent` counts as none, and so does its `tracestate`. An invalid
//! `tracestate` is dropped alone. Nothing here fails a call. [`trace_search`](super::trace_search) finds the
//! members in a body.

use std::borrow::Cow;

/// The length of a `traceparent` of version 00.
const LENGTH: usize = 55;
/// The flags that version 00 has, sampled and random. Others must be sent as 0.
const KNOWN_FLAGS: u8 = 0b11;
/// The flag of a trace that the caller records.
pub const SAMPLED: u8 = 0b01;
/// The flag of a trace id that is random.
pub const RANDOM: u8 = 0b10;
/// The largest number of members of a `tracestate`.
const MAX_MEMBERS: usize = 32;
/// The largest number of bytes of a key and of a value.
const MAX_PART: usize = 256;
/// The largest number of bytes of a `tracestate` with its white space: enough for 32 of the longest members (16,447),
/// and for all that a head of HTTP may have (16,384).
const MAX_STATE: usize = 16 * 1024 + 512;

/// The place of a call in a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    /// Never 0.
    pub trace_id: u128,
    /// The parent span: that of the caller in a received context, that of the call in one that is passed on. Never 0.
    pub parent_id: u64,
    /// Only known flags.
    pub flags: u8,
    /// A valid `tracestate`, not empty.
    pub state: Option<Box<str>>,
}

impl TraceContext {
    /// Decodes a `traceparent`.
    pub fn decode(text: &[u8]) -> Option<Self> {
        let (start, rest) = text.split_at_checked(LENGTH)?;
        if [2, 35, 52].iter().any(|&at| start[at] != b'-') {
            return None;
        }
        let is_known = match hex(&start[..2])? {
            0xFF => false,
            0 => rest.is_empty(),
            // A later version may have more, behind a dash.
            _ => rest.first().is_none_or(|byte| *byte == b'-'),
        };
        let context = TraceContext {
            trace_id: hex(&start[3..35])?,
            parent_id: hex(&start[36..52])? as u64,
            flags: hex(&start[53..])? as u8 & KNOWN_FLAGS,
            state: None,
        };
        (is_known && context.trace_id != 0 && context.parent_id != 0).then_some(context)
    }

    /// Decodes what `to_text` has written.
    pub fn from_text(text: &str) -> Option<Self> {
        let (parent, state) = match text.split_once('\n') {
            Some((parent, state)) => (parent, Some(state)),
            None => (text, None),
        };
        let context = TraceContext::decode(parent.as_bytes())?;
        Some(TraceContext {
            state: state.map(Box::from),
            ..context
        })
    }

    /// Returns it as one text: the `traceparent`, and the `tracestate` on a second line.
    pub fn to_text(&self) -> String {
        let parent = self.traceparent();
        match &self.state {
            Some(state) => format!("{parent}\n{state}"),
            None => parent,
        }
    }

    /// Returns the `traceparent`.
    pub fn traceparent(&self) -> String {
        self.traceparent_of(self.parent_id)
    }

    /// Returns the `traceparent` with another parent id.
    pub fn traceparent_of(&self, parent_id: u64) -> String {
        let (trace_id, flags) = (self.trace_id, self.flags);
        format!("00-{trace_id:032x}-{parent_id:016x}-{flags:02x}")
    }
}

/// Returns a hash by which all processes sample alike. `id` is that of a trace or a call, which a client may
/// have chosen.
#[inline]
pub fn sample_hash(id: u128) -> u64 {
    // The finalizer of MurmurHash3: each bit of the id changes half of the bits.
    let mut hash = (id >> 64) as u64 ^ (id as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for factor in [0xFF51_AFD7_ED55_8CCD, 0xC4CE_B9FE_1A85_EC53] {
        hash = (hash ^ hash >> 33).wrapping_mul(factor);
    }
    hash ^ hash >> 33
}

/// Returns the limit for a sample of a share (0 to 1) of all ids: an id is in it if its `sample_hash` is below. `None`:
/// all are.
pub fn sample_limit(share: f64) -> Option<u64> {
    // A power of two, so the product is exact; `as` keeps it in range.
    (share < 1.0).then_some((share * (u64::MAX as f64)) as u64)
}

/// Decodes hexadecimal digits, which must be in lower case. At most 32 fit.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |value, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(value << 4 | u128::from(digit))
    })
}

/// What a request says of its trace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ReceivedTrace {
    /// Nothing.
    #[default]
    Absent,
    /// Something invalid, so a new trace begins.
    Invalid,
    Valid(Box<TraceContext>),
}

impl ReceivedTrace {
    /// Returns the context, if it is valid.
    pub fn valid(self) -> Option<Box<TraceContext>> {
        match self {
            ReceivedTrace::Valid(context) => Some(context),
            ReceivedTrace::Absent | ReceivedTrace::Invalid => None,
        }
    }
}

/// The values of both fields in one request.
#[derive(Debug, Default)]
pub struct TraceFields<'a> {
    /// The last one, and the number of all.
    parent: Cow<'a, [u8]>,
    parents: usize,
    states: Vec<Cow<'a, [u8]>>,
    is_state_invalid: bool,
}

impl<'a> TraceFields<'a> {
    /// Adds the value of a header; other headers are ignored. White space around it does not belong to it.
    pub fn add_header(&mut self, name: &str, value: &'a [u8]) {
        if name.eq_ignore_ascii_case("traceparent") {
            self.parents += 1;
            self.parent = Cow::Borrowed(trim(value));
        } else if name.eq_ignore_ascii_case("tracestate") {
            self.states.push(Cow::Borrowed(value));
        }
    }

    /// Adds the value of a member `traceparent`; `None` if it is no string.
    pub fn add_parent(&mut self, value: Option<Cow<'a, str>>) {
        self.parents += 1;
        self.parent = value.map_or_else(Cow::default, bytes);
    }

    /// Adds the value of a member `tracestate`; `None` if it is no string. Only headers can be repeated.
    pub fn add_state(&mut self, value: Option<Cow<'a, str>>) {
        self.is_state_invalid |= value.is_none() || !self.states.is_empty();
        self.states.extend(value.map(bytes));
    }

    /// Returns the trace context that the collected fields have.
    pub fn received(self) -> ReceivedTrace {
        let context = match self.parents {
            0 => return ReceivedTrace::Absent,
            1 => TraceContext::decode(&self.parent),
            // With several values it is not known which one is right.
            _ => None,
        };
        match context {
            None => ReceivedTrace::Invalid,
            Some(context) => {
                let state = match self.is_state_invalid {
                    true => None,
                    false => joined(&self.states),
                };
                ReceivedTrace::Valid(Box::new(TraceContext { state, ..context }))
            }
        }
    }
}

fn bytes(text: Cow<'_, str>) -> Cow<'_, [u8]> {
    match text {
        Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
        Cow::Owned(text) => Cow::Owned(text.into_bytes()),
    }
}

/// Joins the values of several fields in their order. Returns `None` if there are no members, or if one is
/// invalid.
fn joined(values: &[Cow<'_, [u8]>]) -> Option<Box<str>> {
    let values: Vec<&[u8]> = values.iter().map(|value| trim(value)).collect();
    let values: Vec<&[u8]> = values.into_iter().filter(|it| !it.is_empty()).collect();
    let state = values.join(&b","[..]);
    let mut members = 0;
    for member in state.split(|byte| *byte == b',').map(trim) {
        // White space between commas is allowed.
        if !member.is_empty() {
            members += 1;
            if !is_member(member) {
                return None;
            }
        }
    }
    if members == 0 || members > MAX_MEMBERS || state.len() > MAX_STATE {
        return None;
    }
    String::from_utf8(state).ok().map(String::into_boxed_str)
}

fn is_member(member: &[u8]) -> bool {
    let Some(equals) = memchr::memchr(b'=', member) else {
        return false;
    };
    let (key, value) = (&member[..equals], &member[equals + 1..]);
    let is_first = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_key = |byte: &u8| is_first(byte) || b"_-*/@".contains(byte);
    let is_value = |byte: &u8| (b' '..=b'~').contains(byte) && *byte != b'=';
    key.len() <= MAX_PART
        && key.first().is_some_and(is_first)
        && key.iter().all(is_key)
        && (1..=MAX_PART).contains(&value.len())
        && value.iter().all(is_value)
}

/// Removes spaces and tabs at both ends.
fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "trace_context_tests.rs"]
mod tests;
