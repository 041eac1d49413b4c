//! Who a process is and whom its workers become: users and groups from the system's databases.
//!
//! It only looks up (getpwnam(3), getgrnam(3), getgrouplist(3), by whatever nsswitch.conf names);
//! taking an account on is the business of `privilege`. An unknown name and a database that does
//! not answer are different errors, for the first is a typing mistake and the second is not.

use std::ffi::CString;
use std::fmt;

use nix::errno::Errno;
use nix::unistd::{Gid, Group, Uid, User};

/// The account that workers run under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub name: String,
    /// The user's id.
    pub uid: u32,
    /// The name of the group with id `gid`; the id in digits if that group has no name.
    pub group: String,
    /// The group's id: the one asked for, else the user's primary one.
    pub gid: u32,
    /// The supplementary groups, sorted, `gid` among them.
    pub groups: Vec<u32>,
}

/// Why there is no such account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccountError {
    NoUser(String),
    NoGroup(String),
    /// A user that is a number without an account, and no group: nothing tells it.
    GroupUnknown(String),
    /// The database of users or groups did not answer.
    System(Errno),
}

impl fmt::Display for AccountError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AccountError::NoUser(name) => write!(f, "there is no user {name:?} on this machine"),
            AccountError::NoGroup(name) => write!(f, "there is no group {name:?} on this machine"),
            AccountError::GroupUnknown(uid) => {
                write!(
                    f,
                    "the user {uid} has no account on this machine, so nothing tells its group"
                )
            }
            AccountError::System(errno) => {
                write!(f, "the database of users did not answer: {}", errno.desc())
            }
        }
    }
}

impl std::error::Error for AccountError {}

impl Account {
    /// Looks up `user`, with `group` in the place of its primary group where one is given. As in
    /// chown(1), what is no name but a number is that id. An id without an account has no other groups.
    pub fn lookup(user: &str, group: Option<&str>) -> Result<Account, AccountError> {
        let group = group.map(group_named).transpose()?;
        let no_user = || AccountError::NoUser(user.to_owned());
        let found = match User::from_name(user).map_err(AccountError::System)? {
            Some(found) => Some(found),
            None => {
                let uid = id(user).ok_or_else(no_user)?;
                User::from_uid(Uid::from_raw(uid)).map_err(AccountError::System)?
            }
        };
        let Some(found) = found else {
            let group = group.ok_or_else(|| AccountError::GroupUnknown(user.to_owned()))?;
            return Ok(Account {
                name: user.to_owned(),
                uid: id(user).ok_or_else(no_user)?,
                group: group.name,
                gid: group.gid.as_raw(),
                groups: vec![group.gid.as_raw()],
            });
        };
        let group = group.map_or_else(|| group_of(found.gid), Ok)?;
        let c_name = CString::new(&*found.name).map_err(|_| no_user())?;
        let mut groups: Vec<u32> = nix::unistd::getgrouplist(&c_name, group.gid)
            .map_err(AccountError::System)?
            .into_iter()
            .map(Gid::as_raw)
            .collect();
        groups.sort_unstable();
        groups.dedup();
        Ok(Account {
            name: found.name,
            uid: found.uid.as_raw(),
            group: group.name,
            gid: group.gid.as_raw(),
            groups,
        })
    }
}

/// A number as an id. The last one means "no change" to setuid(2).
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX)
}

fn group_named(name: &str) -> Result<Group, AccountError> {
    match Group::from_name(name).map_err(AccountError::System)? {
        Some(group) => Ok(group),
        None => match id(name) {
            Some(gid) => group_of(Gid::from_raw(gid)),
            None => Err(AccountError::NoGroup(name.to_owned())),
        },
    }
}

/// The group with that id; if it has no name, its digits are one.
fn group_of(gid: Gid) -> Result<Group, AccountError> {
    let found = Group::from_gid(gid).map_err(AccountError::System)?;
    Ok(found.unwrap_or_else(|| Group {
        name: gid.to_string(),
        passwd: CString::default(),
        gid,
        mem: Vec::new(),
    }))
}

/// The effective user and group of this process: geteuid(2), getegid(2).
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
    fn a_group_takes_the_place_of_the_primary_one() {
        let account = Account::lookup("nobody", Some("root")).unwrap();
        assert_eq!((account.gid, account.group.as_str()), (0, "root"));
        assert_ne!(account.uid, 0);
        // A number needs no name, and reads as it was written.
        let account = Account::lookup("nobody", Some("54321")).unwrap();
        assert_eq!((account.gid, account.group.as_str()), (54321, "54321"));
    }

    #[test]
    fn a_number_is_a_user_with_an_account_or_without() {
        let by_name = Account::lookup("daemon", None).unwrap();
        let by_number = Account::lookup(&by_name.uid.to_string(), None).unwrap();
        assert_eq!(by_name, by_number);
        let unknown = "3999999999";
        let account = Account::lookup(unknown, Some("54321")).unwrap();
        assert_eq!((account.uid, account.gid), (3_999_999_999, 54321));
        assert_eq!((&*account.name, account.groups), (unknown, vec![54321]));
        let error = Account::lookup(unknown, None).unwrap_err();
        assert_eq!(error, AccountError::GroupUnknown(unknown.into()));
        for no_id in ["4294967295", "4294967296", "-1", "1x", ""] {
            assert!(Account::lookup(no_id, Some("root")).is_err(), "{no_id}");
            assert!(Account::lookup("root", Some(no_id)).is_err(), "{no_id}");
        }
    }

    #[test]
    fn unknown_names_are_told_apart() {
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
