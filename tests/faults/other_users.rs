//! Tests files that other users can write: a master of root does not follow them, and `check` reports
//! them.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::process::Command;

use nix::sys::signal::Signal;
use nix::unistd::geteuid;

use crate::support::{Daemon, Dir, PATIENCE, binary, check, wait_for};

const OTHER: u32 = 65534;

/// Returns a directory that root gives to another user; `None` if this is not root.
fn given_away() -> Option<Dir> {
    if !geteuid().is_root() {
        println!("not run: it needs root");
        return None;
    }
    let dir = Dir::new();
    fs::set_permissions(&*dir, Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(dir.join("log")).unwrap();
    chown(dir.join("log"), Some(OTHER), Some(OTHER)).unwrap();
    Some(dir)
}

#[test]
fn root_follows_no_link_of_another_user_to_its_log() {
    let Some(dir) = given_away() else { return };
    let (log, target) = (dir.join("log/p.log"), dir.join("target"));
    let config = format!(
        "[workers]\ncount = 1\n[log]\nfile = \"{}\"\n",
        log.display()
    );
    let daemon = Daemon::builder().config(&config).start();
    assert!(
        fs::read_to_string(&log)
            .unwrap()
            .contains("can be written by user 65534, its owner")
    );
    fs::rename(&log, dir.join("log/old")).unwrap();
    symlink(&target, &log).unwrap();
    daemon.signal(Signal::SIGUSR1);
    wait_for("the refusal in the old file", PATIENCE, || {
        dir.read("log/old")
            .contains("it is a symbolic link, or below one")
    });
    assert!(!target.exists());
    // A start must not follow the link either.
    drop(daemon);
    let failure = Daemon::builder().config(&config).try_start().err().unwrap();
    assert_eq!(failure.code, Some(71), "{}", failure.log);
    assert!(
        failure.log.contains("root follows no link there"),
        "{}",
        failure.log
    );
    assert!(!target.exists());
    // If only root can write, a link is followed.
    fs::remove_file(&log).unwrap();
    let own = dir.join("own.log");
    symlink(&target, &own).unwrap();
    let config = format!(
        "[workers]\ncount = 1\n[log]\nfile = \"{}\"\n",
        own.display()
    );
    drop(Daemon::builder().config(&config).start());
    assert!(target.exists());
}

#[test]
fn check_names_what_another_user_can_write() {
    let dir = Dir::new();
    let config = |name: &str, text: &str| {
        let path = dir.write(name, text);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let output = check(&path);
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let shared = dir.join("shared");
    fs::create_dir(&shared).unwrap();
    fs::create_dir(dir.join("own")).unwrap();
    fs::set_permissions(&shared, Permissions::from_mode(0o1777)).unwrap();
    let text = |at: &str| {
        format!(
            "include = [\"{at}/*.toml\"]\npid-file = \"{at}/p.pid\"\ncontrol-socket = \"{at}/c.sock\"\n\
             [log]\nfile = \"{at}/p.log\"\n[[listen]]\naddress = \"unix:{at}/u.sock\"\n\
             [jobs]\nstore = \"sqlite:{at}/jobs.db\"\n"
        )
    };
    assert!(!config("own.toml", &text("own")).contains("can be written"));
    let warned = config("shared.toml", &text("shared"));
    let listener = format!("the listener unix:{}/u.sock", shared.display());
    let wanted = format!(
        "pid-file, control-socket, log.file, jobs.store, {listener}, the configuration: {} can be written by all users",
        shared.display()
    );
    assert!(warned.contains(&wanted), "{warned}");
    fs::set_permissions(dir.write("open.toml", ""), Permissions::from_mode(0o666)).unwrap();
    let output = check(&dir.join("open.toml"));
    let warned = String::from_utf8(output.stderr).unwrap();
    assert!(
        warned.contains("open.toml can be written by all users"),
        "{warned}"
    );
}

/// Answers each request as a master does, and keeps what it was asked.
const IMPOSTOR: &str = r#"
import os, socket, sys
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
while True:
    client, _ = server.accept()
    request = client.recv(4096)
    if request:
        with open(sys.argv[1] + ".asked", "ab") as file:
            file.write(request)
        client.sendall(b'{"ok": true, "text": "generation 2 serves"}\n')
    client.close()
"#;

#[test]
fn a_command_of_root_asks_no_server_of_another_user_where_all_users_can_write() {
    if !geteuid().is_root() {
        return println!("not run: it needs root");
    }
    let dir = Dir::new();
    fs::set_permissions(&*dir, Permissions::from_mode(0o1777)).unwrap();
    let socket = dir.join("c.sock");
    let mut server = Command::new("python3")
        .args(["-c", IMPOSTOR])
        .arg(&socket)
        .spawn()
        .unwrap();
    wait_for("its socket", PATIENCE, || {
        UnixStream::connect(&socket).is_ok()
    });
    let commands = [
        &["reload"][..],
        &["upgrade"],
        &["scale", "2"],
        &["stop"],
        &["status"],
    ];
    let outputs = commands.map(|words| {
        let mut command = Command::new(binary());
        command.args(words).arg("--control-socket").arg(&socket);
        command.output().unwrap()
    });
    server.kill().unwrap();
    server.wait().unwrap();
    for output in outputs {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(77), "{said}");
        assert!(said.contains("no request was sent"), "{said}");
    }
    assert!(!dir.join("c.sock.asked").exists());
}
