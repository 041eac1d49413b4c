//! Configurations and their settings, errors and warnings.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::Duration;

use std::collections::BTreeSet;

use super::*;
use crate::error::Error;

mod broken;
mod jobs;
mod round_trip;

/// Returns the environment of root on a machine with 4 CPUs.
pub(super) fn root() -> Environment {
    Environment {
        uid: 0,
        gid: 0,
        runtime_roots: vec![("/run".into(), String::new())],
        default_file: "/no/such/file".into(),
        directory: "/home".into(),
        cpus: 4,
        memory: 8 << 30,
        guard_missing: None,
        no_new_privs: false,
        has_served: false,
        kept_variables: KeptVariables::default(),
        variable: |name| (name == "SET").then(|| "of the server".to_owned()),
        is_check: false,
    }
}

/// Returns the environment of an account without rights that every Linux system has.
fn nobody() -> Environment {
    let nobody = crate::sys::account::Account::lookup("nobody", None).unwrap();
    Environment {
        uid: nobody.uid,
        gid: nobody.gid,
        runtime_roots: vec![
            ("/session".into(), String::new()),
            ("/tmp".into(), "-65534".into()),
        ],
        ..root()
    }
}

/// Returns the settings of a file /etc/x.toml with that content.
pub(super) fn settings(here: &Environment, text: &str) -> Result<Settings> {
    with(here, text, &Overrides::default())
}

fn with(here: &Environment, text: &str, overrides: &Overrides) -> Result<Settings> {
    let files = Files::of_text(Path::new("/etc/x.toml"), text.to_owned())?;
    settings_of(here, &files, overrides)
}

fn functions(names: &[&str]) -> Overrides {
    Overrides {
        functions: names.iter().map(|name| name.to_string()).collect(),
        ..Overrides::default()
    }
}

fn listen(addresses: &[&str]) -> Overrides {
    Overrides {
        listen: addresses.iter().map(|text| text.to_string()).collect(),
        ..Overrides::default()
    }
}

#[test]
fn no_file_and_an_empty_file_are_the_defaults() {
    let none = load_in(&root(), None, &Overrides::default()).unwrap();
    assert_eq!(none.file, None);
    assert_eq!(none.listen[0].address.to_string(), "127.0.0.1:8080");
    assert_eq!(none.listen[0].backlog, 4096);
    assert_eq!(none.workers.count, 4);
    assert_eq!(none.limits.frame, 16 << 20);
    assert_eq!(none.methods.len(), 1);
    assert_eq!(
        none.methods["ping"].kind,
        MethodKind::Builtin(Builtin::Ping)
    );
    let empty = settings(&root(), "").unwrap();
    assert_eq!(empty.file.as_deref(), Some(Path::new("/etc/x.toml")));
    assert_eq!(
        Settings {
            file: None,
            ..empty
        },
        none
    );
}

#[test]
fn the_default_file_is_read_when_it_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("preforkd.toml");
    fs::write(&path, "[workers]\ncount = 3").unwrap();
    let here = Environment {
        default_file: path.clone(),
        ..root()
    };
    let settings = load_in(&here, None, &Overrides::default()).unwrap();
    assert_eq!(settings.workers.count, 3);
    assert_eq!(settings.file, Some(path));
}

#[test]
fn relative_paths_are_beside_the_file_that_sets_them() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("conf.d")).unwrap();
    fs::write(
        at("a.toml"),
        "include = [\"conf.d/*.toml\"]\npid-file = \"./a.pid\"\nlog.file = \"a.log\"\n\
         [[listen]]\naddress = \"unix:a.sock\"\n",
    )
    .unwrap();
    fs::write(
        at("conf.d/b.toml"),
        "control-socket = \"b.sock\"\n[[listen]]\naddress = \"unix:b2.sock\"\nmode = \"0660\"\n",
    )
    .unwrap();
    fs::write(at("conf.d/.#b.toml"), "not = read").unwrap();
    let settings = load_in(&root(), Some(&at("a.toml")), &Overrides::default()).unwrap();
    assert_eq!(settings.pid_file, at("a.pid"));
    assert_eq!(settings.log.file, Some(at("a.log")));
    assert_eq!(settings.control_socket, at("conf.d/b.sock"));
    let addresses: Vec<Address> = settings.listen.iter().map(|l| l.address.clone()).collect();
    let expected = ["a.sock", "conf.d/b2.sock"].map(|name| Address::Unix(at(name)));
    assert_eq!(addresses, expected);
    assert_eq!(settings.listen[1].mode, Some(0o660));
}

#[test]
fn the_file_is_absolute_and_keeps_its_symbolic_link() {
    let directory = tempfile::tempdir().unwrap();
    let here = Environment {
        directory: directory.path().into(),
        ..root()
    };
    fs::write(directory.path().join("real.toml"), "").unwrap();
    symlink("real.toml", directory.path().join("link.toml")).unwrap();
    let link = Path::new("link.toml");
    let settings = load_in(&here, Some(link), &Overrides::default()).unwrap();
    assert_eq!(settings.file, Some(directory.path().join(link)));
}

#[test]
fn listen_options_take_the_place_of_all_listeners() {
    let text = "[[listen]]\naddress = \"127.0.0.1:1\"\n[[listen]]\naddress = \"127.0.0.1:2\"";
    let settings = with(&root(), text, &listen(&["127.0.0.1:0", "unix:x.sock"])).unwrap();
    let addresses: Vec<String> = settings
        .listen
        .iter()
        .map(|l| l.address.to_string())
        .collect();
    assert_eq!(addresses, ["127.0.0.1:0", "unix:/home/x.sock"]);
}

#[test]
fn anchored_options_do_not_depend_on_the_directory() {
    let mut overrides = listen(&["unix:x.sock", "127.0.0.1:1", "unix:/y", "unix:"]);
    overrides.make_absolute();
    let here = crate::sys::process::current_directory().unwrap();
    let expected = format!("unix:{}", here.join("x.sock").display());
    assert_eq!(
        overrides.listen,
        [expected.as_str(), "127.0.0.1:1", "unix:/y", "unix:"]
    );
}

#[test]
fn functions_have_an_entry_with_or_without_the_file() {
    let text = "[limits]\ntimeout = \"7s\"\n[methods.\"a.b\"]\ntimeout = \"2s\"\nrate = 3\n\
                concurrency = 2\n[methods.wait]\nbuiltin = \"sleep\"";
    let settings = with(&root(), text, &functions(&["a.b", "add"])).unwrap();
    let seconds = Duration::from_secs;
    let of = |kind, timeout| MethodConfig {
        kind,
        timeout: seconds(timeout),
        concurrency: 0,
        rate: 0,
        slow: None,
        kills_abandoned: false,
    };
    let expected = BTreeSet::from(["a.b", "add", "ping", "wait"]);
    let names: BTreeSet<&str> = settings.methods.keys().map(String::as_str).collect();
    assert_eq!(names, expected);
    assert_eq!(settings.methods["add"], of(MethodKind::Function, 7));
    assert_eq!(
        settings.methods["ping"],
        of(MethodKind::Builtin(Builtin::Ping), 7)
    );
    assert_eq!(
        settings.methods["wait"],
        of(MethodKind::Builtin(Builtin::Sleep), 7)
    );
    let dotted = MethodConfig {
        concurrency: 2,
        rate: 3,
        ..of(MethodKind::Function, 2)
    };
    assert_eq!(settings.methods["a.b"], dotted);
}

#[test]
fn functions_with_impossible_names_are_the_programs_mistake() {
    for name in ["ping", "rpc.x", "error", "", "a b"] {
        let error = with(&root(), "", &functions(&[name])).unwrap_err();
        assert!(matches!(error, Error::Usage(_)), "{name}: {error}");
    }
}

#[test]
fn defaults_of_later_keys_are_accepted() {
    let text = "http-origins = []\n[workers]\nevents = \"epoll\"\nkeep-connections = false";
    let workers = settings(&root(), text).unwrap().workers;
    assert!(!workers.keep_connections);
}

#[test]
fn workers_are_recycled_only_where_that_is_asked_for() {
    let limits = |text: &str| {
        let workers = settings(&root(), &format!("[workers]\n{text}"))
            .unwrap()
            .workers;
        let (calls, memory) = (workers.max_calls, workers.max_memory);
        (calls, memory, workers.max_lifetime, workers.max_unavailable)
    };
    let never = (0, 0, Duration::ZERO, 1);
    assert_eq!(limits(""), never);
    assert_eq!(
        limits("max-calls = 0\nmax-memory = \"0\"\nmax-lifetime = \"0s\""),
        never
    );
    let set = "max-calls = 1000\nmax-memory = \"1GiB\"\nmax-lifetime = \"1h\"\nmax-unavailable = 2";
    assert_eq!(limits(set), (1000, 1 << 30, Duration::from_secs(3600), 2));
}

#[test]
fn a_user_is_taken_on_by_root_only() {
    let account = settings(&root(), "user = \"nobody\"")
        .unwrap()
        .account
        .unwrap();
    assert_eq!(account.name, "nobody");
    // The account of the master needs no change.
    let settings = settings(&nobody(), "user = \"nobody\"").unwrap();
    assert_eq!(settings.account, None);
    assert_eq!(
        settings.pid_file,
        Path::new("/session/preforkd/preforkd.pid")
    );
}

#[test]
fn where_a_server_is_is_told_by_its_file_whatever_else_is_wrong_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("preforkd.toml");
    let here = Environment {
        default_file: file.clone(),
        ..root()
    };
    let listen = "[[listen]]\naddress = \"127.0.0.1:9000\"\n";
    let of = |named: Option<&Path>| {
        let found = listeners_in(&here, named, &Overrides::default()).ok()?;
        Some(found[0].address.to_string())
    };
    assert_eq!(of(None).unwrap(), "127.0.0.1:8080");
    for (text, expected) in [
        (listen.to_owned(), Some("127.0.0.1:9000")),
        (format!("nonsense = 1\n{listen}"), Some("127.0.0.1:9000")),
        (
            format!("include = [\"gone.toml\"]\n{listen}"),
            Some("127.0.0.1:9000"),
        ),
        ("daemon = false".to_owned(), Some("127.0.0.1:8080")),
        ("[workers]\ncuont = 1".to_owned(), Some("127.0.0.1:8080")),
        ("include = [\"gone.toml\"]".to_owned(), None),
        ("[[lisden]]".to_owned(), None),
        ("daemon =".to_owned(), None),
        (format!("{listen}nonsense = 1"), None),
    ] {
        fs::write(&file, &text).unwrap();
        for named in [None, Some(file.as_path())] {
            assert_eq!(of(named).as_deref(), expected, "{text}");
        }
    }
}

#[test]
fn programs_are_guarded_unless_they_say_otherwise() {
    let text = "[methods.a]\ncommand = [\"true\"]\n[methods.b]\ncommand = [\"true\"]\nguard = false\n\
                [pools.c]\ncommand = [\"true\"]\n[pools.d]\ncommand = [\"true\"]\nguard = false\n";
    let settings = settings(&root(), text).unwrap();
    let command = |name: &str| match &settings.methods[name].kind {
        MethodKind::Command(command) => command.program.guard,
        kind => panic!("{kind:?}"),
    };
    let pool = |name: &str| settings.pools[name].program.guard;
    assert_eq!([command("a"), command("b")], [true, false]);
    assert_eq!([pool("c"), pool("d")], [true, false]);
}

#[test]
fn warnings_name_what_the_guard_is_in_the_way_of() {
    let dir = tempfile::tempdir().unwrap();
    let program = |name: &str, mode| {
        let path = dir.path().join(name);
        fs::write(&path, "\x7fELF").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    let (gdb, setuid) = (program("gdb-14", 0o755), program("tool", 0o4755));
    let text = |guard: bool| {
        format!(
            "[methods.look]\ncommand = [{gdb:?}]\nguard = {guard}\n\
             [methods.get]\ncommand = [{setuid:?}]\nguard = {guard}\n"
        )
    };
    // a file of the user who runs this: another user's for one of the two that are asked as
    let stranger = Environment {
        uid: 54_321,
        gid: 54_321,
        ..nobody()
    };
    let warnings = |here: &Environment, guard| settings(here, &text(guard)).unwrap().warnings;
    assert_eq!(
        warnings(&stranger, true),
        [
            format!(
                "{}, the program of methods.get, is a setuid file, which has no effect in the \
                 guard; if it needs that, set guard = false there",
                setuid.display()
            ),
            format!(
                "{}, the program of methods.look, looks into processes, and the guard hides those \
                 that it did not start; if it needs that, set guard = false there",
                gdb.display()
            ),
        ]
    );
    assert!(warnings(&stranger, false).is_empty());
    // where they have no effect anyway, the guard takes nothing from them
    let without = Environment {
        no_new_privs: true,
        ..stranger.clone()
    };
    assert_eq!(warnings(&without, true).len(), 1);
    // once for all, and not for those that want no guard
    let old = Environment {
        guard_missing: Some("this kernel has no Landlock"),
        ..stranger
    };
    let found = warnings(&old, true);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("without a guard: this kernel has no Landlock."));
    assert!(warnings(&old, false).is_empty());
}

#[test]
fn users_and_groups_may_be_numbers() {
    let by_name = settings(&root(), "user = \"daemon\"").unwrap().account;
    let account = by_name.clone().unwrap();
    let (uid, gid) = (account.uid, account.gid);
    for user in [format!("{uid}"), format!("\"{uid}\"")] {
        let text = format!(
            "user = {user}\ngroup = {gid}\n[methods.a]\ncommand = [\"true\"]\nuser = {user}\n\
             [pools.p]\ncommand = [\"true\"]\nuser = {user}\ngroup = {gid}\n"
        );
        let found = settings(&root(), &text).unwrap();
        assert_eq!(found.account, by_name, "{text}");
        assert_eq!(found.pools["p"].program.account, by_name, "{text}");
    }
    let error = settings(&root(), "user = 3999999999")
        .unwrap_err()
        .to_string();
    assert!(error.contains("so no group"), "{error}");
    for wrong in ["user = -1", "user = 4294967295", "user = 1.5"] {
        assert!(settings(&root(), wrong).is_err(), "{wrong}");
    }
}

#[test]
fn warnings_name_what_root_exposes() {
    let warnings = |here: Environment, text: &str| settings(&here, text).unwrap().warnings;
    let public = "[[listen]]\naddress = \"0.0.0.0:80\"\n[[listen]]\naddress = \"127.0.0.1:81\"";
    assert_eq!(
        warnings(root(), public),
        [
            "workers run as root, so a fault in a handler has the rights of root; set user to an \
             account without rights",
            "0.0.0.0:80 can be reached from other machines and workers run as root; anyone there \
             can call every method; set user, or listen on 127.0.0.1 or a unix socket"
        ]
    );
    assert_eq!(warnings(root(), "").len(), 1);
    let check = || Environment {
        is_check: true,
        ..root()
    };
    assert!(warnings(check(), "").is_empty());
    assert_eq!(warnings(check(), public).len(), 1);
    let braces =
        "[methods.a]\ncommand = [\"echo\", \"{{a}\"]\n[methods.b]\ncommand = [\"echo\", \"{ a\"]\n";
    for here in [check(), root()] {
        let mut told = warnings(here, braces);
        told.retain(|it| it.contains("placeholder"));
        assert!(
            told.len() == 1 && told[0].starts_with("methods.b.command: "),
            "{told:?}"
        );
    }
    assert_eq!(warnings(root(), "user = \"root\"").len(), 1);
    assert!(warnings(root(), &format!("user = \"nobody\"\n{public}")).is_empty());
    assert!(warnings(nobody(), public).is_empty());
}

#[test]
fn a_daemon_by_option_needs_a_log_as_well() {
    let overrides = Overrides {
        daemon: true,
        ..Overrides::default()
    };
    assert!(
        with(&root(), "log.file = \"/tmp/x.log\"", &overrides)
            .unwrap()
            .daemon
    );
    let error = with(&root(), "daemon = false", &overrides).unwrap_err();
    assert_eq!(
        error.to_string(),
        "command line: --daemon: the log of a daemon goes nowhere without log.file; set log.file, \
         or run in the foreground under a service manager"
    );
    assert_eq!(error.exit_code(), 78);
}

#[test]
fn the_control_socket_is_found_in_a_broken_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.toml");
    let found = |text: &[u8]| {
        fs::write(&path, text).unwrap();
        candidates_in(&nobody(), Some(&path), DEFAULT_NAME).unwrap_or_default()
    };
    let beside = [directory.path().join("c.sock")];
    for text in [
        "control-socket = \"c.sock\"",
        "daemon = maybe\ncontrol-socket = \"c.sock\"\n",
        "control-socket = \"./c.sock\"\n[log\nlevel = ",
        "pid-file = \"unclosed\ncontrol-socket = \"c.sock\"",
        "nonsense = 1\n= 5\ncontrol-socket = \"c.sock\" # and so on",
        "[[\ncontrol-socket = \"c.sock\"\n",
    ] {
        assert_eq!(found(text.as_bytes()), beside, "{text}");
    }
    assert_eq!(found(b"control-socket = \"c.sock\"\n# \xff"), beside);
    let defaults = ["/session/preforkd", "/tmp/preforkd-65534", "/run/preforkd"]
        .map(|path| Path::new(path).join("control.sock"));
    for text in ["", "daemon = false", "[[\n# control-socket = 1"] {
        assert_eq!(found(text.as_bytes()), defaults, "{text}");
    }
    // No candidate is better than another user's server.
    for text in [
        "control-socket = 5",
        "control-socket = \"\"",
        "control-sockt = \"c.sock\"",
    ] {
        assert!(found(text.as_bytes()).is_empty(), "{text}");
    }
    fs::remove_file(&path).unwrap();
    for unreadable in [&path, directory.path()] {
        let error = candidates_in(&nobody(), Some(unreadable), DEFAULT_NAME).unwrap_err();
        assert!(error.to_string().contains("which server"), "{error}");
    }
    let of = |here: &Environment, name: &str| candidates_in(here, None, name).unwrap();
    assert_eq!(of(&nobody(), DEFAULT_NAME), defaults);
    assert_eq!(of(&root(), DEFAULT_NAME).len(), 1);
    assert_eq!(
        of(&root(), "second"),
        [Path::new("/run/second/control.sock")]
    );
}

#[test]
fn the_control_socket_is_found_in_an_included_file() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("d")).unwrap();
    fs::write(
        at("x.toml"),
        "include = [\"none.toml\", \"d/*.toml\"]\ndaemon = maybe",
    )
    .unwrap();
    fs::write(at("d/1.toml"), "control-socket = \"c.sock\"\nx = =").unwrap();
    assert_eq!(
        candidates_in(&root(), Some(&at("x.toml")), DEFAULT_NAME).unwrap(),
        [at("d/c.sock")]
    );
}

#[test]
fn a_script_has_to_say_what_it_is_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.toml");
    fs::write(&path, "[methods.a]\ncommand = [\"./program\"]\n").unwrap();
    for (head, is_program) in [
        (&b"echo here\n"[..], false),
        (b"", false),
        (b"#!\n", false),
        (b"#!/no/such/interpreter -x\n", false),
        (b"#!/bin/sh\r\necho here\r\n", false),
        (b"\xef\xbb\xbf#!/bin/sh\n", false),
        (b"#! /bin/sh -e\n", true),
        (b"#!sh", true),
        (b"#!/bin/sh\necho here\n", true),
        (b"\x7fELF\x02", true),
        // what the system may have been taught
        (b"\xca\xfe\xba\xbe\0\0", true),
    ] {
        let program = directory.path().join("program");
        fs::write(&program, head).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        match load_in(&root(), Some(&path), &Overrides::default()) {
            Ok(_) => assert!(is_program, "{}", head.escape_ascii()),
            Err(error) => {
                let text = error.to_string();
                assert!(
                    !is_program && text.contains("/program is a script "),
                    "{text}"
                );
            }
        }
    }
}

#[test]
fn every_shipped_file_loads_for_root_and_for_a_user() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let mut count = 0;
    let entries = fs::read_dir(directory).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    for path in paths.filter(|path| path.is_file()) {
        for here in [root(), nobody()] {
            let settings = load_in(&here, Some(&path), &Overrides::default());
            settings.unwrap_or_else(|error| panic!("{error}"));
        }
        count += 1;
    }
    assert!(count >= 3, "{count} files");
}

#[test]
fn the_commented_example_is_the_defaults() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/preforkd.toml");
    let here = root();
    let example = load_in(&here, Some(&path), &Overrides::default()).unwrap();
    let defaults = load_in(&here, None, &Overrides::default()).unwrap();
    assert_eq!(
        Settings {
            file: None,
            ..example
        },
        defaults
    );
}

#[test]
fn a_pool_program_says_when_it_is_ready_unless_the_pool_says_otherwise() {
    let text = "[pools.a]\ncommand = ['true']\n[pools.b]\ncommand = ['true']\nready = 'alive'\n";
    let settings = settings(&root(), text).unwrap();
    assert!(settings.pools["a"].handshake && !settings.pools["b"].handshake);
}
