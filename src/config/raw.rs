//! The file as it is written: one field for each key, nothing checked but the types.
//!
//! Serde reads the merged tables into it and writes it out again for `check`. A key that is not
//! there is `None`; what then holds is decided in `resolve`. Integers are `i64`, TOML's own, so
//! that a negative one is told its range and not the name of a Rust type.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::units::{ByteSize, DurationValue};

/// The whole file.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct Raw {
    pub daemon: Option<bool>,
    pub pid_file: Option<String>,
    pub control_socket: Option<String>,
    #[serde(deserialize_with = "account_name")]
    pub user: Option<String>,
    #[serde(deserialize_with = "account_name")]
    pub group: Option<String>,
    /// Done with before serde runs; here for its name and its type.
    pub include: Option<Vec<String>>,
    pub http_origins: Option<Vec<String>>,
    pub log: StrictTable<RawLog>,
    pub workers: StrictTable<RawWorkers>,
    pub limits: StrictTable<RawLimits>,
    pub listen: Option<Vec<StrictTable<RawListen>>>,
    pub methods: BTreeMap<String, StrictTable<RawMethod>>,
    pub pools: BTreeMap<String, StrictTable<RawPool>>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawLog {
    pub level: Option<String>,
    pub format: Option<String>,
    pub file: Option<String>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawWorkers {
    pub count: Option<Count>,
    pub threads: Option<i64>,
    pub events: Option<String>,
    pub boot_timeout: Option<DurationValue>,
    pub drain_timeout: Option<DurationValue>,
    pub heartbeat_timeout: Option<DurationValue>,
    pub respawn_burst: Option<i64>,
    pub respawn_max_delay: Option<DurationValue>,
    pub keep_connections: Option<bool>,
    pub max_calls: Option<i64>,
    pub max_memory: Option<ByteSize>,
    pub max_lifetime: Option<DurationValue>,
    pub max_unavailable: Option<i64>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawLimits {
    pub connections: Option<i64>,
    pub frame: Option<ByteSize>,
    pub unfinished: Option<ByteSize>,
    pub depth: Option<i64>,
    pub pipeline: Option<i64>,
    pub batch: Option<i64>,
    pub queue: Option<i64>,
    pub timeout: Option<DurationValue>,
    pub read_timeout: Option<DurationValue>,
    pub write_timeout: Option<DurationValue>,
    pub idle_timeout: Option<DurationValue>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawListen {
    pub address: Option<String>,
    pub name: Option<String>,
    pub backlog: Option<i64>,
    pub mode: Option<String>,
    #[serde(deserialize_with = "account_name")]
    pub socket_user: Option<String>,
    #[serde(deserialize_with = "account_name")]
    pub socket_group: Option<String>,
    pub http_methods: Option<String>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawMethod {
    pub builtin: Option<String>,
    pub timeout: Option<DurationValue>,
    pub concurrency: Option<i64>,
    pub rate: Option<i64>,
    pub when_abandoned: Option<String>,
    #[serde(deserialize_with = "command")]
    pub command: Option<Vec<String>>,
    pub pool: Option<String>,
    pub stdin: Option<String>,
    pub output: Option<String>,
    pub max_output: Option<ByteSize>,
    pub environment: Option<BTreeMap<String, String>>,
    pub environment_file: Option<String>,
    pub directory: Option<String>,
    #[serde(deserialize_with = "account_name")]
    pub user: Option<String>,
    #[serde(deserialize_with = "account_name")]
    pub group: Option<String>,
    pub rlimits: Option<StrictTable<RawRlimits>>,
    pub guard: Option<bool>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawPool {
    #[serde(deserialize_with = "command")]
    pub command: Option<Vec<String>>,
    pub processes: Option<Count>,
    pub concurrency: Option<i64>,
    pub when_abandoned: Option<String>,
    pub ready: Option<String>,
    pub boot_timeout: Option<DurationValue>,
    pub idle_timeout: Option<DurationValue>,
    pub max_calls: Option<i64>,
    pub max_memory: Option<ByteSize>,
    pub max_lifetime: Option<DurationValue>,
    pub respawn_burst: Option<i64>,
    pub respawn_max_delay: Option<DurationValue>,
    pub stderr_level: Option<String>,
    pub environment: Option<BTreeMap<String, String>>,
    pub environment_file: Option<String>,
    pub directory: Option<String>,
    #[serde(deserialize_with = "account_name")]
    pub user: Option<String>,
    #[serde(deserialize_with = "account_name")]
    pub group: Option<String>,
    pub rlimits: Option<StrictTable<RawRlimits>>,
    pub guard: Option<bool>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawRlimits {
    pub cpu: Option<DurationValue>,
    pub memory: Option<ByteSize>,
    pub files: Option<i64>,
    pub processes: Option<i64>,
}

impl RawMethod {
    /// The first key that is set and that only a command has.
    pub(super) fn of_commands(&self) -> Option<&'static str> {
        [
            ("stdin", self.stdin.is_some()),
            ("output", self.output.is_some()),
            ("max-output", self.max_output.is_some()),
            ("environment", self.environment.is_some()),
            ("environment-file", self.environment_file.is_some()),
            ("directory", self.directory.is_some()),
            ("user", self.user.is_some()),
            ("group", self.group.is_some()),
            ("rlimits", self.rlimits.is_some()),
            ("guard", self.guard.is_some()),
        ]
        .into_iter()
        .find_map(|(key, is_set)| is_set.then_some(key))
    }
}

/// A table and nothing else: left to itself, serde takes an array for a struct.
#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
pub(super) struct StrictTable<T>(pub T);

impl<T> Deref for StrictTable<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for StrictTable<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
            type Value = StrictTable<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<StrictTable<T>, A::Error> {
                T::deserialize(de::value::MapAccessDeserializer::new(map)).map(StrictTable)
            }
        }

        deserializer.deserialize_map(Visitor(PhantomData))
    }
}

/// A user or a group: a name, or a number with quotes or without.
fn account_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    struct Visitor;

    impl de::Visitor<'_> for Visitor {
        type Value = Option<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a name or a number")
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
            Ok(Some(number.to_string()))
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            Ok(Some(text.to_owned()))
        }
    }

    deserializer.deserialize_any(Visitor)
}

/// A command: a list. A text is most likely a shell line, so the error shows how to write one safely.
fn command<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    struct Visitor;

    impl<'de> de::Visitor<'de> for Visitor {
        type Value = Option<Vec<String>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of a program and its arguments")
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
            Vec::deserialize(de::value::SeqAccessDeserializer::new(list)).map(Some)
        }

        fn visit_str<E: de::Error>(self, _: &str) -> Result<Self::Value, E> {
            Err(E::custom(
                "a command is a list of a program and its arguments, which no shell reads: [\"wc\", \"-w\"]. \
                 With a shell, pass values behind the script, where they are never read as code: \
                 [\"sh\", \"-c\", \"printf %s \\\"$1\\\" | wc -w\", \"sh\", \"{text}\"]",
            ))
        }
    }

    deserializer.deserialize_any(Visitor)
}

/// `workers.count`: `"auto"` or a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Count {
    Auto,
    Number(i64),
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = Count;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"auto\" or an integer")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Count, E> {
                Ok(Count::Number(number))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Count, E> {
                match text {
                    "auto" => Ok(Count::Auto),
                    _ => Err(E::invalid_type(de::Unexpected::Str(text), &self)),
                }
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl Serialize for Count {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Count::Auto => serializer.serialize_str("auto"),
            Count::Number(number) => serializer.serialize_i64(*number),
        }
    }
}
