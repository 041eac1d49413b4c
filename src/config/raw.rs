//! The file as it is written: one field for each key. Only types are checked.
//!
//! Serde reads the merged tables into it, and writes it for `check`. A key that is not set is `None`, and
//! its type in `keys` has the default and the bounds. Integers are `i64`, as in TOML, so that the error about a
//! negative one names its range instead of a Rust type.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::keys::{Integer, Lifetime, RespawnDelay, Time, WorkerMemory};
use super::units::{ByteSize, DurationValue};

/// The default of `backlog`, which a listener of the command line has too.
pub(super) const DEFAULT_BACKLOG: i64 = 4096;

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
    /// Handled before serde runs. The field is here for its name and its type.
    pub include: Option<Vec<String>>,
    pub http_origins: Option<Vec<String>>,
    pub log: StrictTable<RawLog>,
    pub workers: StrictTable<RawWorkers>,
    pub limits: StrictTable<RawLimits>,
    pub observe: StrictTable<RawObserve>,
    pub access_log: Option<StrictTable<RawAccessLog>>,
    pub slow_log: Option<StrictTable<RawSlowLog>>,
    pub trace: Option<StrictTable<RawTrace>>,
    pub listen: Option<Vec<StrictTable<RawListen>>>,
    pub jobs: Option<StrictTable<RawJobs>>,
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
    pub threads: Integer<8, 1, 1024>,
    pub events: Option<String>,
    pub boot_timeout: Time<30_000, 1>,
    pub drain_timeout: Time<30_000, 1>,
    pub heartbeat_timeout: Time<30_000, 1_000>,
    pub respawn_burst: Integer<5, 0, 1_000_000>,
    pub respawn_max_delay: RespawnDelay,
    pub keep_connections: Option<bool>,
    pub max_calls: Integer<0, 0, { 1 << 50 }>,
    pub max_memory: WorkerMemory,
    pub max_lifetime: Lifetime,
    pub max_unavailable: Integer<1, 1, 1024>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawLimits {
    pub connections: Integer<16_384, 1, { 1 << 20 }>,
    pub frame: Option<ByteSize>,
    pub unfinished: Option<ByteSize>,
    pub depth: Integer<128, 1, 10_000>,
    pub pipeline: Integer<1024, 1, 1_000_000>,
    pub batch: Integer<1000, 1, 1_000_000>,
    pub queue: Integer<4096, 1, 1_000_000>,
    pub timeout: Option<DurationValue>,
    pub read_timeout: Time<30_000, 1>,
    pub write_timeout: Time<30_000, 1>,
    pub idle_timeout: Time<0, 0>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawObserve {
    pub address: Option<String>,
    pub mode: Option<String>,
    pub hosts: Option<Vec<String>>,
    pub histograms: Option<Vec<String>>,
    pub buckets: Option<Vec<DurationValue>>,
    pub page: Option<bool>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawAccessLog {
    pub file: Option<String>,
    pub format: Option<String>,
    pub sample: Option<f64>,
    pub always_above: Time<0, 0>,
    pub methods: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawSlowLog {
    pub threshold: Time<1_000, 0>,
    pub params: Integer<0, 0, 4096>,
    pub lines: Integer<50, 1, 10_000>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawTrace {
    pub propagate: Option<bool>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawListen {
    pub address: Option<String>,
    pub name: Option<String>,
    pub backlog: Integer<DEFAULT_BACKLOG, 1, { i32::MAX as i64 }>,
    pub mode: Option<String>,
    #[serde(deserialize_with = "account_name")]
    pub socket_user: Option<String>,
    #[serde(deserialize_with = "account_name")]
    pub socket_group: Option<String>,
    pub http_methods: Option<String>,
    pub per_source: Integer<0, 0, 1_000_000>,
    pub isolation: Option<String>,
    pub processes: Integer<256, 1, 3072>,
    pub spare: Option<i64>,
    pub max_lifetime: Lifetime,
    pub unfinished: Option<ByteSize>,
    #[serde(deserialize_with = "account_name")]
    pub user: Option<String>,
    #[serde(deserialize_with = "account_name")]
    pub group: Option<String>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawMethod {
    pub builtin: Option<String>,
    pub timeout: Option<DurationValue>,
    pub concurrency: Integer<0, 0, 1_000_000>,
    pub rate: Integer<0, 0, { u32::MAX as i64 }>,
    pub slow: Option<DurationValue>,
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
    pub job: Option<StrictTable<RawMethodJob>>,
}

/// `[jobs]`. Keys of a later version are `toml::Value`: they are known, and refused.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawJobs {
    pub store: Option<String>,
    pub password_file: Option<String>,
    pub concurrency: Option<i64>,
    pub max_attempts: Option<i64>,
    pub backoff: Option<DurationValue>,
    pub max_backoff: Option<DurationValue>,
    pub max_crashes: Option<i64>,
    pub timeout: Option<DurationValue>,
    pub drain_timeout: Option<DurationValue>,
    pub lease: Time<30_000, 5_000>,
    pub poll: Time<1_000, 10>,
    pub enqueue_timeout: Time<5_000, 1>,
    pub max_jobs: Integer<1_000_000, 1, { 1 << 40 }>,
    pub max_size: Option<ByteSize>,
    pub result: Option<ByteSize>,
    pub retention: Option<StrictTable<RawRetention>>,
    pub schedules: Option<toml::Value>,
}

/// `[methods.NAME.job]`: what a method has instead of the values of `[jobs]`.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawMethodJob {
    pub max_attempts: Option<i64>,
    pub backoff: Option<DurationValue>,
    pub max_backoff: Option<DurationValue>,
    pub max_crashes: Option<i64>,
    pub timeout: Option<DurationValue>,
    pub drain_timeout: Option<DurationValue>,
    pub priority: Option<i64>,
    pub retention: Option<StrictTable<RawRetention>>,
    pub concurrency: Option<toml::Value>,
    pub rate: Option<toml::Value>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawRetention {
    pub done: Option<DurationValue>,
    pub dead: Option<DurationValue>,
    pub cancelled: Option<DurationValue>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct RawPool {
    #[serde(deserialize_with = "command")]
    pub command: Option<Vec<String>>,
    pub scope: Option<String>,
    pub processes: Option<Count>,
    pub concurrency: Integer<1, 1, 65_536>,
    pub when_abandoned: Option<String>,
    pub ready: Option<String>,
    pub reload: Option<String>,
    pub boot_timeout: Option<DurationValue>,
    pub idle_timeout: Time<0, 0>,
    pub max_calls: Integer<0, 0, { i64::MAX }>,
    pub max_memory: Option<ByteSize>,
    pub max_lifetime: Time<0, 0>,
    pub health: Option<bool>,
    pub respawn_burst: Integer<5, 0, 1_000_000>,
    pub respawn_max_delay: RespawnDelay,
    pub stderr_level: Option<String>,
    pub stack_signal: Option<String>,
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

impl RawListen {
    /// Returns the first set key that belongs only to a listener with a process for each connection.
    pub(super) fn of_isolation(&self) -> Option<&'static str> {
        first_set(self, "processes spare max-lifetime unfinished user group")
    }
}

impl RawPool {
    /// The first key that is set and that only a pool with the scope "shared" has.
    pub(super) fn of_shared(&self) -> Option<&'static str> {
        first_set(
            self,
            "processes reload health idle-timeout max-calls max-memory max-lifetime respawn-burst respawn-max-delay",
        )
    }
}

impl RawMethod {
    /// Returns the first set key that belongs only to a command.
    pub(super) fn of_commands(&self) -> Option<&'static str> {
        first_set(
            self,
            "stdin output max-output environment environment-file directory user group rlimits guard",
        )
    }
}

/// Returns the first of these keys that is set in a table.
fn first_set(table: &impl Serialize, keys: &'static str) -> Option<&'static str> {
    let set = toml::Table::try_from(table).unwrap_or_default();
    keys.split(' ').find(|key| set.contains_key(*key))
}

/// A table and nothing else. Serde alone would accept an array for a struct.
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

/// A user or a group: a name, or a number with or without quotes.
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

/// `workers.count`, and `processes` of a pool: `"auto"` or a number.
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
