//! Resolves the keys of a listener with `isolation = "connection"`, which gives each connection a process.
//!
//! Refuses these keys on other listeners, because they would have no effect there.

use super::check::{Check, KeyValue};
use super::raw::{RawLimits, RawListen};
use super::settings::IsolationConfig;
use super::source_map::join;
use super::units::ByteSize;
use crate::error::Result;
use crate::sys::account::Account;

const DEFAULT_SPARE: i64 = 4;
const MAX_SPARE: usize = 256;
/// The unfinished calls of all sessions together may use a quarter of the memory.
const UNFINISHED_SHARE: u64 = 4;
const LEAST_UNFINISHED: u64 = 1 << 20;

/// Resolves the keys of the listener at `key`; `None` if its connections share the workers.
pub(super) fn resolve(
    check: &Check<'_>,
    key: &str,
    raw: &RawListen,
    limits: &RawLimits,
) -> Result<Option<IsolationConfig>> {
    let word = raw.isolation.as_deref().unwrap_or("shared");
    let key_of = |name: &str| join(key, name);
    let kind = check.choice(&key_of("isolation"), word, &["shared", "connection"])?;
    if kind == "shared" {
        return match raw.of_isolation() {
            None => Ok(None),
            Some(name) => Err(check.places.error(
                &key_of(name),
                "it belongs to a listener with isolation = \"connection\"",
                match name {
                    "user" | "group" => {
                        "add isolation = \"connection\", or remove it; the owner of a unix socket is \
                         socket-user and socket-group"
                    }
                    _ => "add isolation = \"connection\", or remove it",
                },
            )),
        };
    }
    let processes: usize = raw.processes.value(check, &key_of("processes"))?;
    let most = processes.min(MAX_SPARE) as i64;
    let spare = check.integer(
        &key_of("spare"),
        raw.spare.unwrap_or(DEFAULT_SPARE.min(most)),
        0..=most,
        "(processes, and 256 at most)",
    )?;
    let unfinished = match (raw.unfinished, limits.unfinished) {
        (Some(size), _) => check.size(&key_of("unfinished"), size, 1 << 10, i64::MAX as u64, "")?,
        (None, Some(ByteSize(bytes))) => bytes,
        (None, None) => {
            let share = check.here.memory / UNFINISHED_SHARE / processes as u64;
            ((share >> 20) << 20).max(LEAST_UNFINISHED)
        }
    };
    Ok(Some(IsolationConfig {
        processes,
        spare,
        max_lifetime: raw.max_lifetime.value(check, &key_of("max-lifetime"))?,
        account: account(check, key, raw)?,
        unfinished: usize::try_from(unfinished).unwrap_or(usize::MAX),
    }))
}

/// Returns the account of the acceptor and its sessions; `None` for that of the workers.
fn account(check: &Check<'_>, key: &str, raw: &RawListen) -> Result<Option<Account>> {
    let Some(account) = check.account(key, raw.user.as_ref(), raw.group.as_ref())? else {
        return Ok(None);
    };
    let own = (check.here.uid, check.here.gid);
    if own.0 != 0 && (account.uid, account.gid) != own {
        let problem = format!(
            "only root can start sessions as {}:{}, and this is uid {}, gid {}",
            account.name, account.group, own.0, own.1
        );
        let remedy = "start as root, or take user and group out";
        return Err(check.places.error(&join(key, "user"), problem, remedy));
    }
    Ok(Some(account))
}
