//! Looks up users and groups in the system's databases.
//!
//! It only looks up (getpwnam(3), getgrnam(3), getgrouplist(3), through nsswitch.conf). `privilege`
//! switches to the account. An unknown name and a database that does not answer are different errors,
//! because only the first one is an error of the configuration.

use std::ffi::CString;
use std::fmt;

use nix::errno::Errno;
use nix::unistd::{Gid, Group, Uid, User};
use serde::{Deserialize, Serialize};

/// The account that workers run under.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    pub name: String,
    pub uid: u32,
    /// The name of the group with id `gid`, or the id in digits if the group has no name.
    pub group: String,
    /// The configured group, or the user's primary group if none is configured.
    pub gid: u32,
    /// The supplementary groups, sorted. They include `gid`.
    pub groups: Vec<u32>,
}

/// A configured user or group, with its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedId {
    /// The name, or the id in digits.
    pub name: String,
    pub id: u32,
}

/// Why an account cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccountError {
    NoUser(String),
    NoGroup(String),
    /// A user id without a name on this machine. So it has no primary group.
    GroupUnknown(u32),
    /// The database of users or groups did not answer.
    System(Errno),
}

impl fmt::Display for AccountError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AccountError::NoUser(name) => write!(f, "there is no user {name:?} on this machine"),
            AccountError::NoGroup(name) => write!(f, "there is no group {name:?} on this machine"),
            AccountError::GroupUnknown(uid) => {
                write!(f, "user {uid} has no name on this machine, so no group")
            }
            AccountError::System(errno) => {
                write!(
                    f,
                    "the database of users and groups did not answer: {}",
                    errno.desc()
                )
            }
        }
    }
}

impl std::error::Error for AccountError {}

impl Account {
    /// Looks up `user`. `group`, if given, replaces the user's primary group. As in chown(1), a number
    /// that is not a name is taken as an id. A user id without a name needs `group`.
    pub fn lookup(user: &str, group: Option<&str>) -> Result<Account, AccountError> {
        let (user, primary) = find_user(user)?;
        let group = match (group, primary) {
            (Some(group), _) => lookup_group(group)?,
            (None, Some(gid)) => group_of(gid)?,
            (None, None) => return Err(AccountError::GroupUnknown(user.id)),
        };
        let mut groups = match primary {
            None => vec![group.id],
            Some(_) => {
                let c_name = CString::new(user.name.as_str())
                    .map_err(|_| AccountError::NoUser(user.name.escape_debug().to_string()))?;
                let all = nix::unistd::getgrouplist(&c_name, Gid::from_raw(group.id))
                    .map_err(AccountError::System)?;
                all.into_iter().map(Gid::as_raw).collect()
            }
        };
        groups.sort_unstable();
        groups.dedup();
        Ok(Account {
            name: user.name,
            uid: user.id,
            group: group.name,
            gid: group.id,
            groups,
        })
    }
}

/// Parses an id. The highest number is no id, because setuid(2) takes it as "no change".
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX)
}

/// Looks up a user by name, then by number.
pub fn lookup_user(user: &str) -> Result<NamedId, AccountError> {
    find_user(user).map(|(user, _)| user)
}

/// Looks up a group by name, then by number.
pub fn lookup_group(group: &str) -> Result<NamedId, AccountError> {
    if let Some(group) = Group::from_name(group).map_err(AccountError::System)? {
        return Ok(named(group));
    }
    match id(group) {
        Some(gid) => group_of(Gid::from_raw(gid)),
        None => Err(AccountError::NoGroup(group.to_owned())),
    }
}

/// Returns the user with this name or number, and its primary group. A number without a name has none.
fn find_user(text: &str) -> Result<(NamedId, Option<Gid>), AccountError> {
    let mut found = User::from_name(text).map_err(AccountError::System)?;
    let number = id(text).filter(|_| found.is_none());
    if let Some(uid) = number {
        found = User::from_uid(Uid::from_raw(uid)).map_err(AccountError::System)?;
    }
    match (found, number) {
        (Some(user), _) => {
            let (name, id) = (user.name, user.uid.as_raw());
            Ok((NamedId { name, id }, Some(user.gid)))
        }
        (None, Some(id)) => {
            let name = id.to_string();
            Ok((NamedId { name, id }, None))
        }
        (None, None) => Err(AccountError::NoUser(text.to_owned())),
    }
}

/// Returns the group with this id. If it has no name, its digits are the name.
fn group_of(gid: Gid) -> Result<NamedId, AccountError> {
    let found = Group::from_gid(gid).map_err(AccountError::System)?;
    Ok(found.map_or_else(
        || NamedId {
            name: gid.to_string(),
            id: gid.as_raw(),
        },
        named,
    ))
}

fn named(group: Group) -> NamedId {
    NamedId {
        name: group.name,
        id: group.gid.as_raw(),
    }
}

/// Returns the effective user and group of this process (geteuid(2), getegid(2)).
pub fn effective_ids() -> (u32, u32) {
    (
        nix::unistd::geteuid().as_raw(),
        nix::unistd::getegid().as_raw(),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn root_is_found_with_its_group() {
        let root = Account::lookup("root", None).unwrap();
        assert_eq!((root.uid, root.gid, root.group.as_str()), (0, 0, "root"));
        assert!(root.groups.contains(&0));
    }

    #[test]
    fn a_group_replaces_the_primary_one() {
        let account = Account::lookup("nobody", Some("root")).unwrap();
        assert_eq!((account.gid, account.group.as_str()), (0, "root"));
        assert_ne!(account.uid, 0);
        // A number is valid without a name, and its digits are kept.
        let account = Account::lookup("nobody", Some("54321")).unwrap();
        assert_eq!((account.gid, account.group.as_str()), (54321, "54321"));
    }

    #[test]
    fn a_number_is_a_user_too() {
        let root = Account::lookup("root", None).unwrap();
        assert_eq!(Account::lookup("0", None).unwrap(), root);
        let nameless = Account::lookup("54321", Some("root")).unwrap();
        assert_eq!((nameless.name.as_str(), nameless.uid), ("54321", 54321));
        assert_eq!((nameless.gid, nameless.groups), (0, vec![0]));
        let error = Account::lookup("54321", None).unwrap_err();
        assert_eq!(error, AccountError::GroupUnknown(54321));
        for no_id in ["4294967295", "4294967296", "-1", "1x", ""] {
            assert!(Account::lookup(no_id, Some("root")).is_err(), "{no_id}");
            assert!(Account::lookup("root", Some(no_id)).is_err(), "{no_id}");
        }
    }

    #[test]
    fn unknown_users_and_groups_are_different_errors() {
        let user = Account::lookup("no-such-user", None).unwrap_err();
        assert_eq!(
            user.to_string(),
            "there is no user \"no-such-user\" on this machine"
        );
        let group = Account::lookup("root", Some("no-such-group")).unwrap_err();
        assert_eq!(group, AccountError::NoGroup("no-such-group".into()));
        assert!(Account::lookup("ro\0ot", None).is_err());
    }
}
