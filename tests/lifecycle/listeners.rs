//! Listeners at a reload: added, removed, moved, tuned; and left as they were when it is refused.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use serde_json::json;

use crate::support::{Client, Daemon, PATIENCE, wait_for};

const GOOD: &str = "[workers]\ncount = 2\nthreads = 2\n";

/// A port that was free a moment ago.
fn free_address() -> SocketAddr {
    let spare = TcpListener::bind("127.0.0.1:0").unwrap();
    spare.local_addr().unwrap()
}

fn listen(entries: &[(&str, &str)]) -> String {
    let entry =
        |(address, more): &(&str, &str)| format!("[[listen]]\naddress = \"{address}\"\n{more}\n");
    GOOD.to_owned() + &entries.iter().map(entry).collect::<String>()
}

#[track_caller]
fn reload(daemon: &Daemon, config: &str) {
    daemon.configure(config);
    let done = daemon.command(&["reload"]);
    assert!(done.status.success(), "{done:?}");
}

#[track_caller]
fn refused(daemon: &Daemon, config: &str) -> String {
    daemon.configure(config);
    let done = daemon.command(&["reload"]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(1), "{said}");
    said
}

#[track_caller]
fn ping(client: &mut Client) {
    assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
}

#[test]
fn backlog_and_mode_change_at_a_reload_on_the_socket_that_is_there() {
    let daemon = Daemon::builder().config(GOOD).start();
    let own = daemon.address().to_string();
    let path = daemon.dir().join("rpc.sock");
    reload(
        &daemon,
        &listen(&[(&own, ""), ("unix:rpc.sock", "mode = \"0600\"")]),
    );
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    let inode = fs::metadata(&path).unwrap().ino();
    assert_eq!(mode(), 0o600);
    let mut lasting = Client::connect_unix(&path);
    ping(&mut lasting);
    let config = listen(&[
        (&own, "backlog = 17"),
        ("unix:rpc.sock", "mode = \"0660\"\nbacklog = 9"),
    ]);
    reload(&daemon, &config);
    assert_eq!(mode(), 0o660);
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    let status = daemon.status();
    println!("{}", status["listeners"]);
    assert_eq!(status["listeners"][0]["backlog"], 17);
    assert_eq!(status["listeners"][1]["backlog"], 9);
    ping(&mut lasting);
    ping(&mut Client::connect_unix(&path));
}

/// The owner and the group of a file.
fn owner(path: &Path) -> (u32, u32) {
    let file = fs::metadata(path).unwrap();
    (file.uid(), file.gid())
}

#[test]
fn a_unix_socket_belongs_to_the_workers_or_to_the_configured_owner() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let config = |more: &str| {
        format!(
            "user = \"65534\"\ngroup = 54321\n{GOOD}[[listen]]\naddress = \"unix:rpc.sock\"\nmode = \"0660\"\n{more}\n"
        )
    };
    let daemon = Daemon::builder()
        .config(&config("name = \"unused\""))
        .start();
    let path = daemon.dir().join("rpc.sock");
    assert_eq!(owner(&path), (65534, 54321));
    let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o660);
    // The control socket is still the master's alone.
    assert_eq!(owner(&daemon.dir().join("control.sock")), (0, 0));
    reload(
        &daemon,
        &config("socket-user = 0\nsocket-group = \"54322\""),
    );
    assert_eq!(owner(&path), (0, 54322));
    reload(&daemon, &config(""));
    assert_eq!(owner(&path), (65534, 54321));
    // Also what is bound at a reload.
    reload(&daemon, &config("").replace("rpc.sock", "new.sock"));
    assert_eq!(owner(&daemon.dir().join("new.sock")), (65534, 54321));
}

#[test]
fn a_unix_socket_whose_owner_cannot_be_set_is_named_at_the_start() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let config = listen(&[("unix:rpc.sock", "socket-user = \"root\"")]);
    let failed = Daemon::builder().user(65534).config(&config).try_start();
    let failed = failed.map(|_| ()).unwrap_err();
    assert_eq!(failed.code, Some(77), "{failed:?}");
    for text in ["set the owner of unix:", "rpc.sock", "start as root, or"] {
        assert!(failed.log.contains(text), "{text}: {failed:?}");
    }
}

#[test]
fn a_unix_socket_moves_to_another_path_and_its_connections_go_on() {
    let daemon = Daemon::builder().config(GOOD).start();
    let own = daemon.address().to_string();
    let (old, new) = (daemon.dir().join("old.sock"), daemon.dir().join("new.sock"));
    reload(&daemon, &listen(&[(&own, ""), ("unix:old.sock", "")]));
    let mut lasting = Client::connect_unix(&old);
    ping(&mut lasting);
    reload(&daemon, &listen(&[(&own, ""), ("unix:new.sock", "")]));
    assert!(!old.exists());
    ping(&mut Client::connect_unix(&new));
    ping(&mut lasting);
    // And back to where it was, with TCP gone for good.
    reload(&daemon, &listen(&[(&own, ""), ("unix:old.sock", "")]));
    assert!(!new.exists());
    ping(&mut Client::connect_unix(&old));
    ping(&mut lasting);
}

#[test]
fn what_a_refused_reload_had_bound_is_given_back() {
    let daemon = Daemon::builder()
        .config(GOOD)
        .expect_log("reload refused")
        .expect_log("can't start handler threads")
        .start();
    let own = daemon.address().to_string();
    let before = daemon.ready_workers();
    let (fresh, held) = (free_address(), TcpListener::bind("127.0.0.1:0").unwrap());
    let taken = held.local_addr().unwrap().to_string();
    let fresh_text = fresh.to_string();
    // Refused while it binds: the third is somebody else's.
    let config = listen(&[
        (&own, ""),
        (&fresh_text, ""),
        ("unix:new.sock", ""),
        (&taken, ""),
    ]);
    let said = refused(&daemon, &config);
    assert!(
        said.contains(&taken) && said.contains("another server has it"),
        "{said}"
    );
    assert!(!daemon.dir().join("new.sock").exists());
    TcpStream::connect(fresh).unwrap_err();
    // Refused when all was bound, because the new workers did not come up.
    let wide = listen(&[(&own, ""), (&fresh_text, ""), ("unix:new.sock", "")]);
    daemon.cramp();
    refused(&daemon, &wide);
    daemon.uncramp();
    wait_for("the new address to refuse", PATIENCE, || {
        TcpStream::connect(fresh).is_err()
    });
    assert!(!daemon.dir().join("new.sock").exists());
    assert_eq!(daemon.ready_workers(), before);
    ping(&mut daemon.client());
    reload(&daemon, &wide);
    ping(&mut Client::connect(fresh));
    assert!(
        fs::metadata(daemon.dir().join("new.sock"))
            .unwrap()
            .file_type()
            .is_socket()
    );
}

#[test]
fn an_address_that_the_server_itself_has_in_another_way_is_told_as_its_own() {
    // Bound by the server itself: one that was passed to it is its service manager's for life.
    let address = free_address();
    let daemon = Daemon::builder()
        .config(&listen(&[(&address.to_string(), "")]))
        .expect_log("reload refused")
        .start();
    let said = refused(
        &daemon,
        &listen(&[(&format!("0.0.0.0:{}", address.port()), "")]),
    );
    println!("{said}");
    assert!(said.contains("this server itself listens at"), "{said}");
    ping(&mut Client::connect(address));
}

#[test]
fn variables_that_pass_listeners_to_another_process_are_ignored() {
    let daemon = Daemon::builder()
        .config(&listen(&[("unix:rpc.sock", "")]))
        .env("LISTEN_FDS", "1")
        .env("LISTEN_FDNAMES", "rpc")
        .before("export LISTEN_PID=1")
        .start();
    ping(&mut Client::connect_unix(&daemon.dir().join("rpc.sock")));
}
