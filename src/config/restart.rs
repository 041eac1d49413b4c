//! Finds the keys that a reload cannot change, because they belong to the master itself.
//!
//! Pure. All other keys take effect with the new generation. `listeners` of the master decides which
//! listeners are kept, opened and closed.

use super::job_config::JobsConfig;
use super::resolve::{ROOT_WORKERS, root_warnings};
use super::settings::Settings;

/// Returns `new` as it takes effect at a reload of `running`: keys that need a restart keep their old
/// values, and a warning names them.
pub fn keep_restart_only_keys(mut new: Settings, running: &Settings) -> Settings {
    new.needs_restart = needs_restart(running, &new);
    new.daemon = running.daemon;
    new.pid_file.clone_from(&running.pid_file);
    new.control_socket.clone_from(&running.control_socket);
    new.account.clone_from(&running.account);
    match (&mut new.jobs, &running.jobs) {
        (Some(new), Some(running)) => new.store.clone_from(&running.store),
        (None, Some(running)) => new.jobs = Some(running.clone()),
        // A reload may add jobs.
        (_, None) => {}
    }
    if new.needs_restart.is_empty() {
        return new;
    }
    // The account stays the same, so the warnings about root do too.
    let about_root: Vec<String> = root_warnings(&new.listen).collect();
    new.warnings.retain(|warning| !about_root.contains(warning));
    if running
        .warnings
        .iter()
        .any(|warning| warning == ROOT_WORKERS)
    {
        new.warnings.splice(0..0, about_root);
    }
    new.warnings.extend(new.restart_warning());
    new
}

/// Returns the keys that differ and need a restart, in the order of the file.
fn needs_restart(old: &Settings, new: &Settings) -> Vec<&'static str> {
    let names = |settings: &Settings| {
        let account = settings.account.as_ref();
        account.map_or((None, None), |account| {
            (Some((account.uid, account.name.clone())), Some(account.gid))
        })
    };
    let ((old_user, old_group), (new_user, new_group)) = (names(old), names(new));
    let keys = [
        ("daemon", old.daemon != new.daemon),
        ("pid-file", old.pid_file != new.pid_file),
        ("control-socket", old.control_socket != new.control_socket),
        // The master's files and sockets were made for that account.
        ("user", old_user != new_user),
        ("group", old_group != new_group && old_user == new_user),
        ("jobs.store", moves_jobs(old, new)),
    ];
    keys.into_iter()
        .filter_map(|(key, differs)| differs.then_some(key))
        .collect()
}

/// Returns whether stored jobs would be left behind.
fn moves_jobs(old: &Settings, new: &Settings) -> bool {
    let stays = |old: &JobsConfig| new.jobs.as_ref().is_some_and(|new| new.store == old.store);
    old.jobs.as_ref().is_some_and(|old| !stays(old))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::tests::{root, settings};
    use crate::sys::account::Account;

    #[test]
    fn what_takes_effect_at_a_reload_needs_no_restart() {
        let of = |text: &str| settings(&root(), text).unwrap();
        let old = of("");
        assert!(needs_restart(&old, &old).is_empty());
        let new = of("[workers]\ncount = 7\n[[listen]]\naddress = '127.0.0.1:3'");
        assert!(needs_restart(&old, &new).is_empty());
    }

    #[test]
    fn who_keeps_root_is_warned_of_it_whatever_the_file_says() {
        let of = |text: &str| settings(&root(), text).unwrap();
        let public = "[[listen]]\naddress = '0.0.0.0:3'";
        let (running, new) = (of(""), of(&format!("user = 'nobody'\n{public}")));
        assert!(new.warnings.is_empty());
        let kept = keep_restart_only_keys(new.clone(), &running);
        assert_eq!((kept.account, kept.warnings.len()), (None, 3));
        assert_eq!(kept.warnings[0], ROOT_WORKERS);
        assert!(kept.warnings[1].starts_with("0.0.0.0:3 can be reached"));
        assert!(kept.warnings[2].starts_with("user cannot change"));
        // A master that has given up root is not warned.
        let kept = keep_restart_only_keys(of(public), &new);
        assert_eq!((kept.account.is_some(), kept.warnings.len()), (true, 1));
    }

    #[test]
    fn jobs_may_be_added_but_their_store_stays() {
        let of = |text: &str| settings(&root(), text).unwrap();
        let (none, one) = (of(""), of("[jobs]\nstore = 'sqlite:/one.db'"));
        let other = of("[jobs]\nstore = 'sqlite:/other.db'\nmax-attempts = 3");
        assert_eq!(needs_restart(&none, &one), [""; 0]);
        assert_eq!(needs_restart(&one, &other), ["jobs.store"]);
        assert_eq!(needs_restart(&one, &none), ["jobs.store"]);
        let kept = keep_restart_only_keys(other, &one).jobs.unwrap();
        assert_eq!(kept.store, one.jobs.as_ref().unwrap().store);
        assert_eq!(kept.defaults.max_attempts, 3, "other keys change");
        assert_eq!(keep_restart_only_keys(none, &one).jobs, one.jobs);
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
        assert_eq!(needs_restart(&old, &new), keys);
        let old = new.clone();
        new.account = Some(Account::lookup("nobody", Some("root")).unwrap());
        assert_eq!(needs_restart(&old, &new), ["group"]);
    }
}
