//! Tests listeners at a reload: added, removed, moved, tuned, and unchanged if the reload is refused.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use serde_json::json;

use crate::support::{Client, Daemon, PATIENCE, wait_for};

const GOOD: &str = "[workers]\ncount = 2\nthreads = 2\n";

/// Returns a port that was free just before.
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
fn ping(client: &mut Client) {
    assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
}

#[test]
fn backlog_and_mode_change_at_a_reload_on_the_socket_that_is_there() {
    let daemon = Daemon::builder().config(GOOD).start();
    let own = daemon.address().to_string();
    let path = daemon.dir().join("rpc.sock");
    daemon.reload_with(&listen(&[(&own, ""), ("unix:rpc.sock", "mode = \"0600\"")]));
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    let inode = fs::metadata(&path).unwrap().ino();
    assert_eq!(mode(), 0o600);
    let mut lasting = Client::connect_unix(&path);
    ping(&mut lasting);
    let config = listen(&[
        (&own, "backlog = 17"),
        ("unix:rpc.sock", "mode = \"0660\"\nbacklog = 9"),
    ]);
    daemon.reload_with(&config);
    assert_eq!(mode(), 0o660);
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    let status = daemon.status();
    println!("{}", status["listeners"]);
    assert_eq!(status["listeners"][0]["backlog"], 17);
    assert_eq!(status["listeners"][1]["backlog"], 9);
    ping(&mut lasting);
    ping(&mut Client::connect_unix(&path));
}

/// Returns the owner and the group of a file.
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
    // Only the master's user can still use the control socket.
    assert_eq!(owner(&daemon.dir().join("control.sock")), (0, 0));
    daemon.reload_with(&config("socket-user = 0\nsocket-group = \"54322\""));
    assert_eq!(owner(&path), (0, 54322));
    daemon.reload_with(&config(""));
    assert_eq!(owner(&path), (65534, 54321));
    // This includes sockets that are bound at a reload.
    daemon.reload_with(&config("").replace("rpc.sock", "new.sock"));
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
    daemon.reload_with(&listen(&[(&own, ""), ("unix:old.sock", "")]));
    let mut lasting = Client::connect_unix(&old);
    ping(&mut lasting);
    daemon.reload_with(&listen(&[(&own, ""), ("unix:new.sock", "")]));
    assert!(!old.exists());
    ping(&mut Client::connect_unix(&new));
    ping(&mut lasting);
    // Return to the first path. The TCP listener stays removed.
    daemon.reload_with(&listen(&[(&own, ""), ("unix:old.sock", "")]));
    assert!(!new.exists());
    ping(&mut Client::connect_unix(&old));
    ping(&mut lasting);
}

#[test]
fn what_a_refused_reload_had_bound_is_given_back() {
    let daemon = Daemon::builder()
        .config(GOOD)
        .expect_log("reload refused")
        .expect_log("could not start handler threads")
        .start();
    let own = daemon.address().to_string();
    let before = daemon.ready_workers();
    let (fresh, held) = (free_address(), TcpListener::bind("127.0.0.1:0").unwrap());
    let taken = held.local_addr().unwrap().to_string();
    let fresh_text = fresh.to_string();
    // Refused while binding: the third address belongs to another process.
    let config = listen(&[
        (&own, ""),
        (&fresh_text, ""),
        ("unix:new.sock", ""),
        (&taken, ""),
    ]);
    let said = daemon.refused_reload(&config);
    assert!(
        said.contains(&taken) && said.contains("another server has it"),
        "{said}"
    );
    assert!(!daemon.dir().join("new.sock").exists());
    TcpStream::connect(fresh).unwrap_err();
    // Refused after all are bound, because the new workers do not become ready.
    let wide = listen(&[(&own, ""), (&fresh_text, ""), ("unix:new.sock", "")]);
    daemon.cramp();
    daemon.refused_reload(&wide);
    daemon.uncramp();
    wait_for("the new address to refuse", PATIENCE, || {
        TcpStream::connect(fresh).is_err()
    });
    assert!(!daemon.dir().join("new.sock").exists());
    assert_eq!(daemon.ready_workers(), before);
    ping(&mut daemon.client());
    daemon.reload_with(&wide);
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
    // Bound by the server itself: a listener that was passed to it always belongs to its service manager.
    let address = free_address();
    let daemon = Daemon::builder()
        .config(&listen(&[(&address.to_string(), "")]))
        .expect_log("reload refused")
        .start();
    let said = daemon.refused_reload(&listen(&[(&format!("0.0.0.0:{}", address.port()), "")]));
    println!("{said}");
    assert!(said.contains("this server listens at"), "{said}");
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
