//! Warns in `check` about configured paths in directories that do not exist, because they are often misspelled.
//!
//! A start creates the directory of the pid file and of the control socket, but not that of a listener. At a
//! start nothing is said: what cannot be bound is an error there. The directory of the log file is checked
//! where that is resolved.

use std::path::Path;

use super::address::Address;
use super::environment::Environment;
use super::raw::Raw;
use super::settings::Settings;

/// Returns the warnings, in the order of the settings.
pub(super) fn warnings(settings: &Settings, raw: &Raw, here: &Environment) -> Vec<String> {
    if !here.is_check {
        return Vec::new();
    }
    let created = "the start creates it, so check that the path is right";
    let needed =
        "the start fails without it: create it (RuntimeDirectory= in a unit), or take another path";
    let own = [
        ("pid-file", &raw.pid_file, &settings.pid_file),
        (
            "control-socket",
            &raw.control_socket,
            &settings.control_socket,
        ),
    ];
    let own = own.into_iter().filter(|(_, set, _)| set.is_some());
    let mut found: Vec<String> = own
        .filter_map(|(key, _, path)| missing(key, path, created))
        .collect();
    // A socket that the service manager passes is bound already.
    let bound = settings
        .listen
        .iter()
        .filter(|listen| listen.name.is_none());
    let sockets = bound.filter_map(|listen| match &listen.address {
        Address::Unix(path) => missing("listen", path, needed),
        Address::Tcp(_) => None,
    });
    found.extend(sockets);
    let observe = settings.observe.path();
    found.extend(observe.and_then(|path| missing("observe.address", path, needed)));
    found
}

fn missing(key: &str, path: &Path, follows: &str) -> Option<String> {
    let directory = path.parent().filter(|it| !it.is_dir())?;
    Some(format!(
        "{key}: {} is in {}, and there is no such directory; {follows}",
        path.display(),
        directory.display()
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::tests::{root, settings};

    #[test]
    fn check_names_paths_in_directories_that_do_not_exist() {
        let text = "pid-file = '/no/such/x.pid'\n[observe]\naddress = 'unix:/no/other/o.sock'\n\
                    [[listen]]\naddress = 'unix:/no/third/l.sock'\n\
                    [[listen]]\naddress = 'unix:/tmp/l.sock'\n";
        let check = Environment {
            is_check: true,
            ..root()
        };
        let told = |here: &Environment, text: &str| {
            let mut all = settings(here, text).unwrap().warnings;
            all.retain(|it| it.contains("no such directory"));
            all
        };
        let all = told(&check, text);
        let begins = [
            "pid-file: /no/such/",
            "listen: /no/third/",
            "observe.address: /no/other/",
        ];
        assert_eq!(all.len(), begins.len(), "{all:#?}");
        for (one, begin) in all.iter().zip(begins) {
            assert!(one.starts_with(begin), "{one}");
        }
        assert!(all[0].contains("the start creates it") && all[1].contains("the start fails"));
        assert!(told(&root(), text).is_empty(), "a start does not say it");
        assert!(told(&check, "").is_empty(), "defaults are not checked");
    }
}
