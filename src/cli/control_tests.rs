//! The control commands with a simulated master.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};

use super::args::ServerSelector;
use super::control::{ControlConnection, check_peer, reload, scale, status, stop};
use crate::protocol::control::{
    ControlRequest, ControlResponse, IsolatedStatus, MasterStatus, OldestCall, PoolStatus, Status,
    WorkerStatus, to_line,
};

/// The path of a socket for one test. The file is removed when this value is dropped.
struct Socket(PathBuf);

impl Socket {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "preforkd-control-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        Socket(std::env::temp_dir().join(name))
    }

    fn place(&self) -> ServerSelector {
        ServerSelector::Socket(self.0.clone())
    }

    /// Starts a simulated master that answers one request per connection with the next of `answers`. It keeps all
    /// connections open until the last answer is sent. Returns the requests.
    fn master(&self, answers: Vec<Vec<u8>>) -> JoinHandle<Vec<ControlRequest>> {
        let listener = UnixListener::bind(&self.0).unwrap();
        thread::spawn(move || {
            let mut open = Vec::new();
            let mut requests = Vec::new();
            for answer in answers {
                let mut stream = BufReader::new(listener.accept().unwrap().0);
                requests.push(take(&mut stream));
                stream.get_mut().write_all(&answer).unwrap();
                open.push(stream);
            }
            requests
        })
    }
}

#[test]
fn only_a_server_of_root_or_of_the_own_user_is_asked() {
    let socket = Socket::new();
    let asked = |peer, own| check_peer(&socket.0, peer, own);
    for (peer, own) in [(0, 0), (0, 1000), (1000, 1000)] {
        asked(Some(peer), (own, own)).unwrap();
    }
    // Any user could have created the socket in the temporary directory.
    for (peer, own) in [(Some(1001), 1000), (Some(12_345), 0), (None, 0)] {
        let error = asked(peer, (own, own)).unwrap_err();
        assert_eq!(error.exit_code(), 77);
        assert!(error.to_string().contains("no request was sent"), "{error}");
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn take(stream: &mut BufReader<UnixStream>) -> ControlRequest {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

fn line(response: &ControlResponse) -> Vec<u8> {
    to_line(response).unwrap()
}

#[test]
fn each_command_asks_in_its_words_and_returns_what_the_master_says() {
    let socket = Socket::new();
    let master = socket.master(vec![
        line(&ControlResponse::said("generation 2 serves")),
        line(&ControlResponse::done()),
        line(&ControlResponse::done()),
    ]);
    assert_eq!(
        reload(&socket.place(), &mut |_| {}).unwrap(),
        "generation 2 serves"
    );
    assert_eq!(scale(&socket.place(), 4).unwrap(), "scaling to 4");
    stop(&socket.place(), true, None, &mut |hint| panic!("{hint}")).unwrap();
    assert_eq!(
        master.join().unwrap(),
        [
            ControlRequest::Reload { config: None },
            ControlRequest::Scale { count: 4 },
            ControlRequest::Stop {
                now: true,
                after_ms: None
            }
        ]
    );
}

#[test]
fn a_status_comes_read_and_to_the_letter() {
    let socket = Socket::new();
    let json = r#"{"master": {"pid": 7, "version": "1", "generation": 1, "uptime_s": 2, "last_reload": null, "mood": 1.0}, "workers": [], "deaths": [], "listeners": []}"#;
    socket.master(vec![
        format!("{{\"ok\": true, \"status\": {json}}}\n").into(),
    ]);
    let answered = status(&socket.place()).unwrap();
    assert_eq!(answered.json, json);
    assert_eq!(answered.status.master.pid, 7);
}

#[test]
fn a_refusal_has_the_masters_reason_and_exit_code() {
    let socket = Socket::new();
    socket.master(vec![
        line(&ControlResponse::refused(
            "preforkd.toml:3:1: no\nworker 0: oh",
            1,
        )),
        line(&ControlResponse::refused("not yours", 77)),
    ]);
    let error = reload(&socket.place(), &mut |_| {}).unwrap_err();
    assert_eq!(error.to_string(), "preforkd.toml:3:1: no\nworker 0: oh");
    assert_eq!(error.exit_code(), 1);
    assert_eq!(scale(&socket.place(), 1).unwrap_err().exit_code(), 77);
}

#[test]
fn a_master_that_leaves_or_talks_nonsense_is_said_to() {
    let socket = Socket::new();
    // The master exits after the last request, and all its connections end.
    socket.master(vec![
        b"hello\n".to_vec(),
        line(&ControlResponse::done()),
        Vec::new(),
    ]);
    for told in [
        "the answer is invalid",
        "the answer has no status",
        "exited before",
    ] {
        let error = status(&socket.place()).unwrap_err();
        assert!(error.to_string().contains(told), "{error}");
        assert_eq!(error.exit_code(), 69);
    }
}

#[test]
fn a_stop_waits_for_the_end_and_says_what_for() {
    let socket = Socket::new();
    let listener = UnixListener::bind(&socket.0).unwrap();
    let master = thread::spawn(move || {
        let mut stopping = BufReader::new(listener.accept().unwrap().0);
        assert_eq!(
            take(&mut stopping),
            ControlRequest::Stop {
                now: false,
                after_ms: None
            }
        );
        stopping
            .get_mut()
            .write_all(&line(&ControlResponse::done()))
            .unwrap();
        // The command reports nothing at first, then asks what runs. After that the master exits.
        let mut asking = BufReader::new(listener.accept().unwrap().0);
        assert_eq!(take(&mut asking), ControlRequest::Status);
        let status = Status {
            workers: vec![WorkerStatus {
                pid: Some(5),
                running: 3,
                oldest_call: Some(OldestCall {
                    method: "sleep".into(),
                    age_ms: 4_200,
                }),
                ..WorkerStatus::default()
            }],
            pools: vec![PoolStatus {
                busy: 2,
                ..PoolStatus::default()
            }],
            isolated: vec![IsolatedStatus {
                running: 1,
                ..IsolatedStatus::default()
            }],
            ..Status::default()
        };
        let response = ControlResponse::status(status);
        asking.get_mut().write_all(&line(&response)).unwrap();
    });
    let mut hints = Vec::new();
    stop(&socket.place(), false, None, &mut |hint| {
        hints.push(hint.to_owned())
    })
    .unwrap();
    master.join().unwrap();
    assert_eq!(hints.len(), 1, "{hints:?}");
    assert!(
        hints[0].starts_with(
            "waiting for 3 calls (the oldest: sleep, 4.2s) on 1 worker, 2 pool calls, 1 isolated connection, "
        ),
        "{hints:?}"
    );
}

#[test]
fn nobody_there_is_told_with_the_places_that_were_tried() {
    let (absent, deserted) = (Socket::new(), Socket::new());
    drop(UnixListener::bind(&deserted.0).unwrap());
    for socket in [&absent, &deserted] {
        let error = status(&socket.place()).unwrap_err();
        assert_eq!(error.exit_code(), 69, "{error}");
        assert!(
            error.to_string().contains(socket.0.to_str().unwrap()),
            "{error}"
        );
    }
}

#[test]
fn a_configuration_file_that_is_not_there_names_no_server() {
    let place =
        ServerSelector::Config(Some("/nonexistent/preforkd.toml".into()), "preforkd".into());
    let error = stop(&place, true, None, &mut |_| {}).unwrap_err();
    assert_eq!(error.exit_code(), 78, "{error}");
    assert!(
        error.to_string().contains("/nonexistent/preforkd.toml"),
        "{error}"
    );
}

#[test]
fn a_server_that_keeps_the_common_paths_is_found_unless_it_has_another_name() {
    for (said, is_meant) in [("", true), ("acme", true), ("preforkd", false)] {
        let socket = Socket::new();
        let status = Status {
            master: MasterStatus {
                name: said.into(),
                ..MasterStatus::default()
            },
            ..Status::default()
        };
        socket.master(vec![line(&ControlResponse::status(status)), Vec::new()]);
        let found = ControlConnection::upgraded(std::slice::from_ref(&socket.0), "acme");
        assert_eq!(found.is_some(), is_meant, "{said}");
    }
}
