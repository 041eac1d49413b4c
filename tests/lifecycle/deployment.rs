//! Tests releases in separate directories, with a symbolic link to the current one.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::json;

use crate::lifecycle::start::{DETACHED, OWN_SOCKET, Running};
use crate::support::{Client, Dir, binary};

const WHICH: &str = "[methods.which]\ncommand = [\"cat\", \"release\"]\ndirectory = \".\"\n";

/// Creates a directory with the program, its configuration and a file that names it.
fn release(dir: &Dir, name: &str) {
    let place = dir.join(name);
    fs::create_dir(&place).unwrap();
    let config = format!("{DETACHED}{OWN_SOCKET}{WHICH}")
        .replace("\"p.pid\"", &format!("{:?}", dir.join("p.pid")))
        .replace("\"c.sock\"", &format!("{:?}", dir.join("c.sock")))
        .replace("unix:rpc.sock", &format!("unix:{}/rpc.sock", dir.display()))
        .replace("\"log\"", &format!("{:?}", dir.join("log")));
    fs::write(place.join("p.toml"), &config).unwrap();
    fs::write(place.join("release"), name).unwrap();
    symlink(binary(), place.join("preforkd")).unwrap();
    // For the command that ends it.
    dir.write("p.toml", config);
}

fn switch(dir: &Dir, name: &str) {
    symlink(name, dir.join("new")).unwrap();
    fs::rename(dir.join("new"), dir.join("current")).unwrap();
}

/// Runs a command as from a shell whose directory is `place`.
fn from_shell(place: &Path, arguments: &[&str]) -> Output {
    Command::new("./preforkd")
        .args(arguments)
        .args(["--config", "p.toml"])
        .current_dir(place)
        .env("PWD", place)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn a_server_started_through_a_link_goes_where_the_link_leads_now() {
    let dir = Dir::new();
    release(&dir, "first");
    release(&dir, "second");
    switch(&dir, "first");
    let current = dir.join("current");
    let started = from_shell(&current, &["run"]);
    assert!(started.status.success(), "{started:?}");
    let _daemon = Running(&dir);
    let which = || {
        let mut client = Client::connect_unix(&dir.join("rpc.sock"));
        client.call(&json!({"in": "which"}))["result"].clone()
    };
    assert_eq!(which(), "first");
    switch(&dir, "second");
    // The old release is removed before the reload, and its directory was the master's.
    fs::remove_dir_all(dir.join("first")).unwrap();
    for command in ["reload", "upgrade"] {
        let done = from_shell(&current, &[command]);
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(done.status.success(), "{done:?}");
        for part in ["p.toml", "preforkd"] {
            let path = current.join(part).display().to_string();
            assert!(said.contains(&path), "{said}");
        }
        assert_eq!(which(), "second");
    }
}
