//! Tests refused and successful reloads while clients call continuously.

use std::net::{TcpListener, TcpStream};

use nix::sys::signal::Signal;

use crate::support::{Callers, Daemon, PATIENCE, process, wait_for};

const GOOD: &str = "[workers]\ncount = 2\nthreads = 2\n";

/// Returns broken configurations, each with what its error must contain. In the file they follow two
/// other lines (`Daemon::configure`).
fn broken(own: &str, taken: &str) -> Vec<(String, Vec<String>)> {
    let case = |text: &str, reasons: &[&str]| {
        let reasons = reasons.iter().map(|it| (*it).to_owned()).collect();
        (text.to_owned(), reasons)
    };
    let listen = format!("[[listen]]\naddress = \"{own}\"\n[[listen]]\naddress = \"{taken}\"\n");
    vec![
        case("[workers\ncount = 2\n", &["preforkd.toml:3:"]),
        case("[workers]\ncount = \n", &["preforkd.toml:4:"]),
        case("color = 1\n", &["preforkd.toml:3:", "color"]),
        case("[workers]\nthread = 2\n", &["preforkd.toml:4:", "threads"]),
        case("[worker]\ncount = 2\n", &["preforkd.toml:3:", "workers"]),
        case(
            "[workers]\ncount = 0\n",
            &["preforkd.toml:4:", "workers.count"],
        ),
        case("[workers]\ncount = \"two\"\n", &["preforkd.toml:4:"]),
        case("[workers]\ncount = 2\ncount = 3\n", &["preforkd.toml:5:"]),
        case(
            "[workers]\nboot-timeout = 30\n",
            &["preforkd.toml:4:", "boot-timeout"],
        ),
        case(
            "[workers]\ndrain-timeout = \"soon\"\n",
            &["preforkd.toml:4:", "soon"],
        ),
        case(
            "[limits]\nframe = \"1GiB\"\n",
            &["preforkd.toml:4:", "limits.frame"],
        ),
        case(
            "[limits]\ntimeout = \"5m\"\n",
            &["preforkd.toml:4:", "drain-timeout"],
        ),
        case("[limits]\ndepth = -1\n", &["preforkd.toml:4:", "depth"]),
        case("[log]\nlevel = \"loud\"\n", &["preforkd.toml:4:", "loud"]),
        case(
            "[log]\nfile = \"no/such/directory/log\"\n",
            &["no/such/directory"],
        ),
        case(
            "[methods.m]\nbuiltin = \"nothing\"\n",
            &["preforkd.toml:4:", "nothing"],
        ),
        case(
            "[methods.m]\ntimeout = \"1s\"\n",
            &["preforkd.toml:", "methods.m"],
        ),
        case(
            "[[listen]]\naddress = \"localhost\"\n",
            &["preforkd.toml:4:", "localhost"],
        ),
        case(
            "user = \"no-such-user-here\"\n",
            &["preforkd.toml:3:", "no-such-user-here"],
        ),
        case("include = [\"missing.toml\"]\n", &["missing.toml"]),
        case(&listen, &[taken, "another server"]),
    ]
}

#[test]
fn a_broken_configuration_changes_nothing_and_its_reason_is_told() {
    let daemon = Daemon::builder()
        .config(GOOD)
        .expect_log("reload refused")
        .start();
    let before = daemon.ready_workers();
    let descriptors = process::descriptors_at_rest(daemon.pid());
    let lasting = Callers::lasting(daemon.address(), 2);
    let connecting = Callers::connecting(daemon.address(), 2);
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = held.local_addr().unwrap().to_string();
    let cases = broken(&daemon.address().to_string(), &taken);
    let mut wrong = Vec::new();
    for (number, (text, reasons)) in cases.iter().enumerate() {
        daemon.configure(text);
        let refused = daemon.command(&["reload"]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        if refused.status.code() != Some(1) {
            wrong.push(format!("{text:?}: exit code {:?}", refused.status.code()));
        }
        for reason in reasons {
            if !said.contains(reason) {
                wrong.push(format!("{text:?}: no {reason:?} in {said:?}"));
            }
        }
        // Also by signal: the log has the reason, because no command waits for it.
        daemon.signal(Signal::SIGHUP);
        wait_for("the refusal in the log", PATIENCE, || {
            let refusal = "reload refused, everything stays as it was";
            daemon.log().matches(refusal).count() == 2 * (number + 1)
        });
        if daemon.ready_workers() != before {
            wrong.push(format!("{text:?}: other workers"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // A file that does not exist, and one that is not text.
    std::fs::remove_file(daemon.dir().join("preforkd.toml")).unwrap();
    assert_eq!(daemon.command(&["reload"]).status.code(), Some(1));
    daemon.dir().write("preforkd.toml", b"\xff\xfe\x00");
    assert_eq!(daemon.command(&["reload"]).status.code(), Some(1));
    assert_eq!(daemon.ready_workers(), before);
    println!("{} broken configurations, each refused twice", cases.len());
    lasting.stop_without_loss("lasting connections");
    process::wait_for_descriptors(daemon.pid(), descriptors);

    daemon.configure(GOOD);
    let accepted = daemon.command(&["reload"]);
    assert!(accepted.status.success(), "{accepted:?}");
    let after = daemon.ready_workers();
    assert!(after.len() == 2 && after.iter().all(|pid| !before.contains(pid)));
    connecting.stop_without_loss("a connection a call");
}

#[test]
fn methods_that_are_gone_are_told() {
    let daemon = Daemon::builder()
        .config(&format!("{GOOD}[methods.echo]\nbuiltin = \"echo\"\n"))
        .start();
    daemon.configure(GOOD);
    let done = daemon.command(&["reload"]);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(said.starts_with("generation 2 serves ("), "{done:?}");
    assert!(said.ends_with("); no longer served: echo\n"), "{done:?}");
    daemon.wait_log("reload: no longer served: echo");
}

#[test]
fn what_only_a_restart_changes_is_told_and_stands_in_the_status() {
    let daemon = Daemon::builder().config(GOOD).start();
    let file = daemon.dir().read("preforkd.toml");
    let moved = file.replace("pid-file = \"preforkd.pid\"", "pid-file = \"other.pid\"");
    assert_ne!(file, moved);
    daemon.dir().write("preforkd.toml", moved);
    let done = daemon.command(&["reload"]);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    let why =
        "pid-file cannot change while the master runs; restart the server to apply the change";
    assert!(done.status.success() && said.contains(why), "{done:?}");
    let warned = || {
        daemon.status()["master"]["warnings"]
            .to_string()
            .contains(why)
    };
    assert!(warned());
    daemon.dir().write("preforkd.toml", file);
    assert!(daemon.command(&["reload"]).status.success());
    assert!(!warned());
}

#[test]
fn twenty_reloads_lose_no_call() {
    let daemon = Daemon::builder().config(GOOD).start();
    let descriptors = process::descriptors_at_rest(daemon.pid());
    let connecting = Callers::connecting(daemon.address(), 4);
    let mut before = daemon.ready_workers();
    for _ in 0..20 {
        let done = daemon.command(&["reload"]);
        assert!(done.status.success(), "{done:?}");
        let after = daemon.ready_workers();
        assert_eq!(after.len(), 2);
        assert!(after.iter().all(|pid| !before.contains(pid)));
        before = after;
    }
    connecting.stop_without_loss("20 reloads, a connection a call");
    wait_for("the old generations gone", PATIENCE, || {
        process::workers(daemon.pid()).len() == 2
    });
    process::wait_for_descriptors(daemon.pid(), descriptors);
}

#[test]
fn a_lasting_connection_is_served_by_the_draining_worker() {
    let daemon = Daemon::builder().config(GOOD).start();
    let lasting = Callers::lasting(daemon.address(), 4);
    let mut client = daemon.client();
    client.call_text(r#"{"in":"ping"}"#);
    for _ in 0..2 {
        let done = daemon.command(&["reload"]);
        assert!(done.status.success(), "{done:?}");
    }
    assert_eq!(
        client.call_text(r#"{"in":"ping","params":1}"#),
        r#"{"out":"pong","result":1}"#
    );
    lasting.stop_without_loss("2 reloads, lasting connections");
    drop(client);
    wait_for("the old generations gone", PATIENCE, || {
        process::workers(daemon.pid()).len() == 2
    });
}

#[test]
fn a_burst_of_hups_is_few_reloads() {
    let daemon = Daemon::builder().config(GOOD).start();
    for _ in 0..50 {
        daemon.signal(Signal::SIGHUP);
    }
    // It runs after all of them.
    let done = daemon.command(&["reload"]);
    assert!(done.status.success(), "{done:?}");
    let reloads = daemon.log().matches("reload: reading").count();
    println!("50 HUPs and a reload: {reloads} reloads");
    assert!((1..=10).contains(&reloads), "{reloads}");
    wait_for("the old generations gone", PATIENCE, || {
        process::workers(daemon.pid()).len() == 2
    });
}

#[test]
fn a_generation_that_does_not_come_up_is_given_up_and_the_old_one_serves() {
    let daemon = Daemon::builder()
        .config(GOOD)
        .expect_log("reload refused")
        .expect_log("nine tenths of workers.boot-timeout")
        .start();
    let before = daemon.ready_workers();
    let load = Callers::connecting(daemon.address(), 2);
    // Its program never reports ready.
    daemon.configure(
        "[workers]\ncount = 2\nboot-timeout = \"3s\"\n\
         [pools.p]\nprocesses = 1\ncommand = [\"sleep\", \"60\"]\nready = \"message\"\n[methods.m]\npool = \"p\"\n",
    );
    let refused = daemon.command(&["reload"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("boot-timeout"), "{said}");
    wait_for("the new generation gone", PATIENCE, || {
        process::workers(daemon.pid()).len() == 2
    });
    assert_eq!(daemon.ready_workers(), before);
    load.stop_without_loss("a reload that is rolled back");
    daemon.configure(GOOD);
    assert!(daemon.command(&["reload"]).status.success());
}

#[test]
fn a_reload_adds_and_removes_a_listener_and_changes_count_and_threads() {
    let daemon = Daemon::builder().config(GOOD).start();
    let spare = TcpListener::bind("127.0.0.1:0").unwrap();
    let second = spare.local_addr().unwrap();
    drop(spare);
    let own = daemon.address();
    let threads = process::threads(daemon.ready_workers()[0]);
    let listen = |addresses: &[String]| {
        let entry = |address: &String| format!("[[listen]]\naddress = \"{address}\"\n");
        addresses.iter().map(entry).collect::<String>()
    };
    let both = listen(&[own.to_string(), second.to_string()]);
    daemon.configure(&format!("[workers]\ncount = 3\nthreads = 5\n{both}"));
    let done = daemon.command(&["reload"]);
    assert!(done.status.success(), "{done:?}");
    let workers = daemon.ready_workers();
    assert_eq!(workers.len(), 3);
    let more = workers.iter().map(|pid| process::threads(*pid) - threads);
    assert_eq!(more.collect::<Vec<_>>(), [3; 3]);
    for address in [own, second] {
        let mut client = crate::support::Client::connect(address);
        assert_eq!(
            client.call_text(r#"{"in":"ping"}"#),
            r#"{"out":"pong","result":null}"#
        );
    }
    let load = Callers::connecting(own, 2);
    daemon.configure(&format!("{GOOD}{}", listen(&[own.to_string()])));
    let done = daemon.command(&["reload"]);
    assert!(done.status.success(), "{done:?}");
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    let closed = format!("no longer listening at {second}");
    assert!(said.trim_end().ends_with(&closed), "{done:?}");
    daemon.wait_log(&format!("reload: {closed}"));
    wait_for("the removed address to refuse", PATIENCE, || {
        TcpStream::connect(second).is_err()
    });
    assert_eq!(daemon.ready_workers().len(), 2);
    load.stop_without_loss("a listener less");
}

#[test]
fn a_command_that_names_another_file_than_the_servers_is_refused() {
    let daemon = Daemon::builder().config(GOOD).start();
    let own = daemon.dir().join("preforkd.toml");
    let other = daemon.dir().join("other.toml");
    std::fs::copy(&own, &other).unwrap();
    let ask = |command: &str, file: &std::path::Path| {
        let mut ask = std::process::Command::new(crate::support::binary());
        ask.args([command, "--config"]).arg(file).output().unwrap()
    };
    for command in ["reload", "upgrade"] {
        let refused = ask(command, &other);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{said}");
        let reason = format!(
            "{command} refused: this server reads {}, not {}",
            own.display(),
            other.display()
        );
        assert!(said.contains(&reason), "{said}");
    }
    assert_eq!(daemon.status()["master"]["generation"], 1);
    // The same file under another name.
    let link = daemon.dir().join("link.toml");
    std::os::unix::fs::symlink(&own, &link).unwrap();
    let done = ask("reload", &link);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    let master = daemon.status()["master"].clone();
    let sources = format!(
        "(configuration {}, binary {})",
        own.display(),
        master["binary"].as_str().unwrap()
    );
    assert!(done.status.success() && said.contains(&sources), "{done:?}");
    assert_eq!(master["config"], own.display().to_string());
    let page = daemon.command(&["status"]);
    let page = String::from_utf8_lossy(&page.stdout).into_owned();
    assert!(page.contains(&format!("configuration {}", own.display())));
}

#[test]
fn a_warning_is_logged_once_and_stays_in_the_status() {
    let daemon = Daemon::builder().config(GOOD).start();
    let unused = format!("{GOOD}[pools.idle]\nprocesses = 1\ncommand = [\"cat\"]\n");
    for (config, is_new) in [(GOOD, false), (&unused, true), (&unused, false)] {
        daemon.configure(config);
        let done = daemon.command(&["reload"]);
        assert!(done.status.success(), "{done:?}");
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert_eq!(
            said.contains("; warning: no method uses the pool idle"),
            is_new,
            "{said}"
        );
    }
    let warnings = daemon.status()["master"]["warnings"].clone();
    let as_root = usize::from(nix::unistd::geteuid().is_root());
    assert_eq!(
        warnings.as_array().map(Vec::len),
        Some(as_root + 1),
        "{warnings}"
    );
    for (text, times) in [
        ("workers run as root", as_root),
        ("no method uses the pool idle", 1),
    ] {
        assert_eq!(daemon.log().matches(text).count(), times, "{text}");
    }
    let done = daemon.command(&["status"]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(said, "");
}
