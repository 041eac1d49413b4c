//! Each kind of error, with the sentence that the operator gets.

use super::*;

/// Returns each file in broken.txt, and the error that it causes.
fn cases() -> impl Iterator<Item = (String, &'static str)> {
    include_str!("broken.txt").split("\n\n").map(|case| {
        let (text, error) = case.split_once("\n=> ").unwrap();
        (text.to_owned(), error.trim_end())
    })
}

#[test]
fn every_broken_file_gets_its_sentence() {
    let (mut count, mut different) = (0, Vec::new());
    for (text, expected) in cases() {
        let found = match with(&root(), &text, &functions(&["f"])) {
            Ok(settings) => panic!("accepted:\n{text}\n{settings:?}"),
            Err(error) => error,
        };
        assert_eq!(found.exit_code(), 78, "{text}");
        let found = found.to_string().replace("/etc/x.toml:", "");
        if found != expected {
            different.push(format!("{text}\n=> {found}\n"));
        }
        count += 1;
    }
    assert!(different.is_empty(), "\n{}", different.join("\n"));
    assert!(count >= 100, "{count} cases");
}

/// `check` reports the same error among others, and ends.
#[test]
fn the_sentence_is_among_all_that_check_tells() {
    for (text, expected) in cases() {
        let Ok(files) = Files::of_text(Path::new("/etc/x.toml"), text.clone()) else {
            continue;
        };
        let told =
            diagnostics::settings_or_faults(&root(), &files, &functions(&["f"])).unwrap_err();
        let told: Vec<String> = told
            .iter()
            .map(|fault| fault.to_string().replace("/etc/x.toml:", ""))
            .collect();
        assert!(
            told.iter().any(|fault| fault == expected),
            "{text}\n{told:#?}"
        );
    }
}

/// Returns the error of loading `main.toml` in a directory with these files, without its path.
fn error_of(files: &[(&str, &[u8])]) -> String {
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let main = directory.path().join("main.toml");
    let error = load_in(&root(), Some(&main), &Overrides::default()).unwrap_err();
    let directory = format!("{}/", directory.path().display());
    error.to_string().replace(&directory, "")
}

#[test]
fn what_is_no_readable_text_is_refused_with_its_path() {
    assert_eq!(
        error_of(&[]),
        "main.toml: there is no such file; create it, or name another with --config"
    );
    assert_eq!(
        error_of(&[("main.toml/x", b"")]),
        "main.toml: it can't be read: it is a directory, not a file"
    );
    assert_eq!(
        error_of(&[("main.toml", b"# \xc3\xa9\nuser = \"\xc3\xa9\xff\"")]),
        "main.toml:2:10: byte 0xff is not UTF-8; save the file as UTF-8"
    );
    assert_eq!(
        error_of(&[("main.toml", &vec![b'\n'; (16 << 20) + 1])]),
        "main.toml: it can't be read: it is larger than 16MiB, too large for a configuration"
    );
    let error = load_in(&root(), Some(Path::new("")), &Overrides::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        ": there is no such file; create it, or name another with --config"
    );
}

#[test]
fn a_fifo_is_refused_and_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = load_in(&root(), Some(&path), &Overrides::default()).unwrap_err();
    assert!(
        error.to_string().contains("it is not a plain file"),
        "{error}"
    );
    assert!(candidates_in(&root(), Some(&path), DEFAULT_NAME).is_err());
    let null = Path::new("/dev/null");
    assert!(load_in(&root(), Some(null), &Overrides::default()).is_ok());
}

#[test]
fn errors_of_included_files_name_the_right_file() {
    let main: (&str, &[u8]) = (
        "main.toml",
        b"include = [\"d/*.toml\"]\n[workers]\nthreads = 8\n",
    );
    for (text, expected) in [
        (
            "daemon = maybe",
            "d/1.toml:1:10: this is not TOML: a string needs quotes; write daemon = \"maybe\"",
        ),
        (
            "# x\n[limits]\nbatsh = 1",
            "d/1.toml:3:1: limits.batsh: unknown key; did you mean `batch`?",
        ),
        (
            "[limits]\nbatch = \"é\"",
            "d/1.toml:2:9: limits.batch: expected an integer, found string \"é\"",
        ),
        (
            "\n\n[workers]\ncount = 0",
            "d/1.toml:4:9: workers.count: 0 is out of range; give 1 to 1024 or \"auto\"",
        ),
        (
            "[workers]\nthreads = 8",
            "d/1.toml:2:1: workers.threads: it is set in main.toml:3:1 already; keep one of the two",
        ),
        (
            "workers = 5",
            "d/1.toml:1:1: workers: it is set in main.toml:2:2 already; keep one of the two",
        ),
        (
            "include = []",
            "d/1.toml:1:1: include: an included file can't include another; list all of them in the main file",
        ),
    ] {
        assert_eq!(error_of(&[main, ("d/1.toml", text.as_bytes())]), expected);
    }
    // Two listeners at one address, in two files.
    let listen = b"[[listen]]\naddress = \"127.0.0.1:1\"";
    assert_eq!(
        error_of(&[main, ("d/1.toml", listen), ("d/2.toml", listen)]),
        "d/2.toml:2:11: listen[1].address: there is another listener at 127.0.0.1:1, in \
         d/1.toml:2:11; give each an address of its own"
    );
}

#[test]
fn includes_that_mean_no_good_file_are_refused() {
    for (text, expected) in [
        (
            "include = [\"no.toml\"]",
            "main.toml:1:12: include: there is no file no.toml; create it, or remove it from the list",
        ),
        (
            "include = [\"*.toml\"]",
            "main.toml:1:12: include: \"*.toml\" matches this very file; keep included files in a directory of their own",
        ),
        (
            "include = [\"main.toml\"]",
            "main.toml:1:12: include: \"main.toml\" matches this very file; keep included files in a directory of their own",
        ),
        (
            "\ninclude = [\"d/[\"]",
            "main.toml:2:12: include: \"d/[\": invalid range pattern",
        ),
    ] {
        assert_eq!(error_of(&[("main.toml", text.as_bytes())]), expected);
    }
    assert_eq!(
        error_of(&[("main.toml", b"include = [\"d/*\"]"), ("d/x/y", b"")]),
        "d/x: it can't be read: it is a directory, not a file"
    );
}

#[test]
fn bad_listen_options_are_errors_of_the_command_line() {
    for (options, expected) in [
        (
            &["localhost:1"][..],
            "command line: --listen: \"localhost:1\" is no IP address with a port; did you mean \"127.0.0.1:1\"?",
        ),
        (
            &["[::1]:1", "[::1]:1"],
            "command line: --listen: there is another listener at [::1]:1; give each an address of its own",
        ),
        (
            &["unix:/run/preforkd/preforkd.pid"],
            "command line: --listen: /run/preforkd/preforkd.pid is the path of pid-file too; give each a path of its own",
        ),
    ] {
        let error = with(&root(), "", &listen(options)).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn a_user_who_is_not_root_can_take_on_nobody_else() {
    let nobody = nobody();
    let error = settings(&nobody, "user = \"root\"").unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "/etc/x.toml:1:8: user: only root can start workers as root:root, and this is uid {}, \
             gid {}; start as root, or take user and group out",
            nobody.uid, nobody.gid
        )
    );
}
