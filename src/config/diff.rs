//! What a reload from one configuration to another changes, and what it can't.
//!
//! Pure comparison. Everything that a new generation of workers simply starts with (limits,
//! methods, workers, log) is not listed: it takes effect with the generation. Listed are the
//! listeners, which the master binds and closes, and the keys that belong to the life of the
//! master itself and wait for a restart, as in PostgreSQL.

use super::settings::{Listen, Settings};

/// The difference of two configurations, as far as the master must act on it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// The keys that differ and that only a restart brings into effect, in the file's order.
    pub needs_restart: Vec<&'static str>,
    /// Listeners to bind: their address is new.
    pub added: Vec<Listen>,
    /// Listeners to close: their address is gone.
    pub removed: Vec<Listen>,
    /// Listeners that stay bound and get a new backlog or mode, as they are to be.
    pub changed: Vec<Listen>,
}

impl Changes {
    /// Whether the master itself has nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Changes::default()
    }
}

/// Compares two configurations; listeners are the same when their addresses are.
pub fn diff(old: &Settings, new: &Settings) -> Changes {
    let names = |settings: &Settings| {
        let account = settings.account.as_ref();
        account.map_or((None, None), |account| {
            (Some((account.uid, account.name.clone())), Some(account.gid))
        })
    };
    let ((old_user, old_group), (new_user, new_group)) = (names(old), names(new));
    let needs_restart = [
        ("daemon", old.daemon != new.daemon),
        ("pid-file", old.pid_file != new.pid_file),
        ("control-socket", old.control_socket != new.control_socket),
        // The master's own files and sockets were made for that account.
        ("user", old_user != new_user),
        ("group", old_group != new_group && old_user == new_user),
    ];
    let mut changes = Changes {
        needs_restart: needs_restart
            .into_iter()
            .filter_map(|(key, differs)| differs.then_some(key))
            .collect(),
        ..Changes::default()
    };
    let at = |settings: &Settings, listen: &Listen| {
        let mut all = settings.listen.iter();
        all.find(|other| other.address == listen.address).cloned()
    };
    for listen in &new.listen {
        match at(old, listen) {
            None => changes.added.push(listen.clone()),
            Some(before) if before != *listen => changes.changed.push(listen.clone()),
            Some(_) => {}
        }
    }
    let gone = old.listen.iter().filter(|listen| at(new, listen).is_none());
    changes.removed = gone.cloned().collect();
    changes
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::tests::{root, settings};
    use crate::sys::account::Account;

    #[test]
    fn equal_settings_have_no_difference() {
        let one = settings(&root(), "").unwrap();
        assert!(diff(&one, &one).is_empty());
    }

    #[test]
    fn listeners_are_told_apart_by_address() {
        let of = |text: &str| settings(&root(), text).unwrap();
        let old = of(
            "[[listen]]\naddress = '127.0.0.1:1'\n[[listen]]\naddress = '127.0.0.1:2'\n\
                      [[listen]]\naddress = 'unix:/x'\nmode = '0600'",
        );
        let new = of("[[listen]]\naddress = 'unix:/x'\nmode = '0660'\n\
                      [[listen]]\naddress = '127.0.0.1:2'\n[[listen]]\naddress = '127.0.0.1:3'");
        let changes = diff(&old, &new);
        assert_eq!(changes.added, [new.listen[2].clone()]);
        assert_eq!(changes.removed, [old.listen[0].clone()]);
        assert_eq!(changes.changed, [new.listen[0].clone()]);
        assert!(changes.needs_restart.is_empty());
    }

    #[test]
    fn what_belongs_to_the_master_waits_for_a_restart() {
        let old = settings(&root(), "").unwrap();
        let mut new = old.clone();
        new.daemon = true;
        new.pid_file = "/x".into();
        new.control_socket = "/y".into();
        new.account = Some(Account::lookup("nobody", None).unwrap());
        let keys = ["daemon", "pid-file", "control-socket", "user"];
        assert_eq!(diff(&old, &new).needs_restart, keys);
        let old = new.clone();
        new.account = Some(Account::lookup("nobody", Some("root")).unwrap());
        assert_eq!(diff(&old, &new).needs_restart, ["group"]);
    }
}
