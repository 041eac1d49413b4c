//! The meaning of command lines, one for each row.
#![allow(clippy::unwrap_used)]

use super::args::{
    CallArgs, CliCommand, ConfigArgs, ParamsSource, PlaceArgs, ServerSelector, parse,
};
use super::job::options::{EnqueueArgs, JobCommand, SelectionArgs};
use super::target::TargetArgs;
use crate::error::Error;
use std::time::Duration;

fn read(line: &str) -> Result<CliCommand, Error> {
    let words = line.split_whitespace().map(Into::into);
    parse(
        "preforkd",
        [std::ffi::OsString::from("/usr/bin/whatever")]
            .into_iter()
            .chain(words),
    )
}

fn default_call() -> CallArgs {
    CallArgs {
        method: "ping".into(),
        params: ParamsSource::Here("null".into()),
        target: TargetArgs::default(),
        timeout: None,
        id: None,
        jsonrpc: false,
    }
}

#[test]
fn each_command_means_what_the_contract_says() {
    let here = PlaceArgs::default;
    let file = || ConfigArgs {
        config: Some("a.toml".into()),
        name: None,
    };
    let second = || ConfigArgs {
        config: None,
        name: Some("second".into()),
    };
    for (line, command) in [
        (
            "run",
            CliCommand::Run {
                config: ConfigArgs::default(),
                daemon: false,
                listen: vec![],
            },
        ),
        (
            "run --daemon --config a.toml --listen [::1]:1 --listen unix:/x",
            CliCommand::Run {
                config: file(),
                daemon: true,
                listen: vec!["[::1]:1".into(), "unix:/x".into()],
            },
        ),
        (
            "run --name second",
            CliCommand::Run {
                config: second(),
                daemon: false,
                listen: vec![],
            },
        ),
        (
            "check --config a.toml",
            CliCommand::Check { config: file() },
        ),
        (
            "status --name second",
            CliCommand::Status {
                place: PlaceArgs {
                    config: second(),
                    control_socket: None,
                },
                json: false,
                connections: false,
            },
        ),
        (
            "status",
            CliCommand::Status {
                place: here(),
                json: false,
                connections: false,
            },
        ),
        (
            "status --json --control-socket /s",
            CliCommand::Status {
                place: PlaceArgs {
                    control_socket: Some("/s".into()),
                    ..here()
                },
                json: true,
                connections: false,
            },
        ),
        (
            "reload --config a.toml",
            CliCommand::Reload {
                place: PlaceArgs {
                    config: file(),
                    control_socket: None,
                },
            },
        ),
        ("upgrade", CliCommand::Upgrade { place: here() }),
        (
            "scale 4",
            CliCommand::Scale {
                place: here(),
                count: 4,
            },
        ),
        (
            "stop",
            CliCommand::Stop {
                place: here(),
                now: false,
                after: None,
            },
        ),
        (
            "stop --after 5s",
            CliCommand::Stop {
                place: here(),
                now: false,
                after: Some(Duration::from_secs(5)),
            },
        ),
        (
            "stop --now",
            CliCommand::Stop {
                place: here(),
                now: true,
                after: None,
            },
        ),
        ("call ping", CliCommand::Call(default_call())),
        (
            "call ping - --address unix:/x --timeout 1m --id 7",
            CliCommand::Call(CallArgs {
                params: ParamsSource::Stdin,
                target: TargetArgs {
                    address: Some("unix:/x".into()),
                    ..TargetArgs::default()
                },
                timeout: Some(Duration::from_secs(60)),
                id: Some("7".into()),
                ..default_call()
            }),
        ),
        (
            "call ping --jsonrpc [1]",
            CliCommand::Call(CallArgs {
                params: ParamsSource::Here("[1]".into()),
                jsonrpc: true,
                ..default_call()
            }),
        ),
        (
            "call ping -5 --id -5",
            CliCommand::Call(CallArgs {
                params: ParamsSource::Here("-5".into()),
                id: Some("-5".into()),
                ..default_call()
            }),
        ),
    ] {
        assert_eq!(read(line).unwrap(), command, "{line}");
    }
}

#[test]
fn a_server_is_meant_by_its_socket_or_by_its_file_and_name() {
    let selector = |line: &str| match read(line).unwrap() {
        CliCommand::Reload { place } => place.selector("adder"),
        command => panic!("{command:?}"),
    };
    let config = |file: Option<&str>, name: &str| {
        ServerSelector::Config(file.map(Into::into), name.to_owned())
    };
    assert_eq!(selector("reload"), config(None, "adder"));
    assert_eq!(selector("reload --name second"), config(None, "second"));
    assert_eq!(
        selector("reload --config a.toml"),
        config(Some("a.toml"), "adder")
    );
    let socket = ServerSelector::Socket("/s".into());
    assert_eq!(selector("reload --control-socket /s"), socket);
}

#[test]
fn job_commands_mean_what_the_contract_says() {
    const ID: &str = "017f22e2-79b0-7cc3-98c4-dc0c0c07398f";
    let job = |line: &str| match read(&format!("job {line}")) {
        Ok(CliCommand::Job { command }) => command,
        other => panic!("{line}: {other:?}"),
    };
    let enqueue = || EnqueueArgs {
        method: "mail".into(),
        params: ParamsSource::Here("null".into()),
        target: TargetArgs::default(),
        id: None,
        key: None,
        at: None,
        delay: None,
        priority: None,
        max_attempts: None,
        timeout: None,
        expires: None,
        wait: false,
    };
    assert_eq!(job("enqueue mail"), JobCommand::Enqueue(enqueue()));
    let all = format!(
        "enqueue mail - --id {ID} --key k --delay 2s --priority -3 --max-attempts 4 --timeout 5s --expires 6s --wait"
    );
    let expected = EnqueueArgs {
        params: ParamsSource::Stdin,
        id: Some(ID.into()),
        key: Some("k".into()),
        delay: Some(Duration::from_secs(2)),
        priority: Some(-3),
        max_attempts: Some(4),
        timeout: Some(Duration::from_secs(5)),
        expires: Some(Duration::from_secs(6)),
        wait: true,
        ..enqueue()
    };
    assert_eq!(job(&all), JobCommand::Enqueue(expected));
    let selection = |jobs: &[&str], state: Option<&str>| SelectionArgs {
        jobs: jobs.iter().map(|&id| id.to_owned()).collect(),
        state: state.map(str::to_owned),
        method: None,
        place: PlaceArgs::default(),
    };
    let two = format!("retry {ID} {ID}");
    assert_eq!(job(&two), JobCommand::Retry(selection(&[ID, ID], None)));
    let dead = JobCommand::Purge(selection(&[], Some("dead")));
    assert_eq!(job("purge --state dead"), dead);
    let place = PlaceArgs {
        control_socket: Some("/s".into()),
        ..PlaceArgs::default()
    };
    assert_eq!(
        job("export --control-socket /s"),
        JobCommand::Export { place }
    );
    for (line, told) in [
        ("enqueue mail hello", "'\"hello\"'"),
        (
            "enqueue mail --at 1970-01-01T00:00:01Z --delay 2s",
            "cannot be used with",
        ),
        ("enqueue mail --at soon", "2026-12-01T08:00:00Z"),
        ("enqueue mail --priority 10", "-9..=9"),
        ("enqueue mail --id 7", "UUID"),
        ("wait", "<ID>"),
        ("cancel", "<ID>"),
        ("retry", "<ID>"),
        (
            "purge --state died",
            "waiting, running, done, dead, cancelled",
        ),
        ("purge --method mail", "--state"),
        (&format!("purge {ID} --state dead"), "cannot be used with"),
    ] {
        let error = read(&format!("job {line}")).unwrap_err();
        assert_eq!(error.exit_code(), 64, "{line}: {error}");
        assert!(error.to_string().contains(told), "{line}: {error}");
    }
}

#[test]
fn an_id_that_is_no_json_is_a_string() {
    for (word, id) in [
        ("7", "7"),
        ("1e400", "\"1e400\""),
        ("7a", "\"7a\""),
        ("\"7\"", "\"7\""),
        ("null", "\"null\""),
        ("a\"b", "\"a\\\"b\""),
    ] {
        let CliCommand::Call(call) = read(&format!("call ping --id {word}")).unwrap() else {
            panic!("not a call");
        };
        assert_eq!(call.id.as_deref(), Some(id), "{word}");
    }
}

#[test]
fn a_wrong_word_is_a_usage_error_that_says_what_to_write() {
    for (line, told) in [
        ("rum", "'run'"),
        ("mop ping", "'map'"),
        ("run --deamon", "'--daemon'"),
        ("scale", "<N>"),
        ("scale 0", "1..=1024"),
        ("scale 1025", "1..=1024"),
        ("call", "<METHOD>"),
        ("call ping hello", "'\"hello\"'"),
        ("call ping --timeout soon", "500ms"),
        (
            "status --config a --control-socket b",
            "cannot be used with",
        ),
        ("status now", "'now'"),
        ("stop --now --after 5s", "cannot be used with"),
        ("stop --after soon", "500ms"),
        ("bench ping --duration 0s", "--duration is zero"),
        ("bench ping --timeout 0s", "--timeout is zero"),
        ("bench ping --count 0", "zero"),
        ("bench ping --rate 0", "zero"),
        ("bench ping --connections 0", "zero"),
        ("bench ping --depth 0", "zero"),
        ("bench ping --threads 0", "1..=256"),
        (
            "bench ping --threads 2 --connections 1",
            "too many for 1 connection:",
        ),
        ("map ping --parallel 0", "1..=1024"),
    ] {
        let error = read(line).unwrap_err();
        assert_eq!(error.exit_code(), 64, "{line}: {error}");
        assert!(error.to_string().contains(told), "{line}: {error}");
        assert!(!error.to_string().starts_with("error"), "{line}: {error}");
    }
}

#[test]
fn the_old_name_of_parallel_still_works_and_is_in_no_help() {
    let parallel = |line: &str| match read(line).unwrap() {
        CliCommand::Map(options) => options.parallel,
        other => panic!("{line}: {other:?}"),
    };
    for option in ["--parallel", "--jobs", "-j"] {
        assert_eq!(parallel(&format!("map ping {option} 3")), 3, "{option}");
    }
    let CliCommand::Print(help) = read("map --help").unwrap() else {
        panic!("help is printed");
    };
    assert!(
        help.contains("--parallel") && !help.contains("--jobs"),
        "{help}"
    );
}

#[test]
fn help_and_version_are_printed_under_the_programs_own_name() {
    let CliCommand::Print(help) = read("").unwrap() else {
        panic!("plain preforkd prints help");
    };
    assert_eq!(read("--help").unwrap(), CliCommand::Print(help.clone()));
    for word in "run check status reload upgrade scale stop call map bench job".split(' ') {
        assert!(help.contains(&format!("\n  {word} ")), "{word} in {help}");
    }
    assert!(help.contains("Usage: preforkd [COMMAND]"), "{help}");

    let number = env!("CARGO_PKG_VERSION");
    let version = read("--version").unwrap();
    assert_eq!(version, CliCommand::Print(format!("preforkd {number}\n")));
    let other = parse("adder", ["x", "--version"].map(Into::into)).unwrap();
    assert_eq!(
        other,
        CliCommand::Print(format!("adder (preforkd {number})\n"))
    );
    let CliCommand::Print(help) = parse("adder", ["x", "run", "--help"].map(Into::into)).unwrap()
    else {
        panic!("help is printed");
    };
    assert!(help.contains("Usage: adder run [OPTIONS]"), "{help}");
}
