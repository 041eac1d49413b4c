//! Runs the blocks of the README, of the protocol page and of the page about jobs in their order, unchanged. Network,
//! /run, /srv and /etc/preforkd are their own; the calls go to the server that a block starts.
//!
//! A `text` block is the exact output of the block before it. A `console` block shows output and is not compared.
//! The `toml` blocks of a page make one configuration file, except on the protocol page. A server that has not been
//! started with it is replaced. A `py` block is /srv/model.py.
//! `systemd.rs` runs the blocks for systemd.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};

use crate::support::{Dir, binary, markdown, source};

/// Runs the blocks, each with its own output file. The block that starts the server runs in the
/// background here, because a reader has it in the foreground of a terminal.
const DRIVER: &str = r#"
set -eu
mount -t tmpfs -o mode=755 tmpfs /run
[ ! -d /etc/preforkd ] || mount -t tmpfs tmpfs /etc/preforkd
ip link set lo up
mount -t tmpfs tmpfs /srv
# Waits for the server that was started in the background.
ready() {
    tries=0
    until preforkd status 2>/dev/null | grep -Eq '^preforkd .* [1-9][0-9]* of [0-9]+ workers? ready'; do
        tries=$((tries + 1))
        [ $tries -lt 400 ] || { cat log; exit 1; }
        sleep 0.05
    done
}
for block in block-*; do
    case $block in
    *.python) python3 "$block" >"out-$block" ;;
    *.py) cp "$block" /srv/model.py && cp preforkd.py /srv ;;
    *.toml)
        [ -e server.toml ] || preforkd stop
        cat "$block" >>server.toml
        preforkd status >/dev/null 2>&1 || { preforkd run --config server.toml 2>>log & ready; }
        ;;
    *)
        if grep -Eq -- '^(cargo run .*|preforkd) run( |$)' "$block"; then
            bash -eu "$block" >"out-$block" 2>log &
            ready
        else
            bash -eu "$block" >"out-$block"
        fi
        ;;
    esac || { echo "$block failed"; cat "$block" log; exit 1; }
done
[ ! -e server.toml ] || preforkd stop
wait
"#;

/// Builds nothing; `cargo run -- ARGUMENTS` runs the program.
const CARGO: &str = r#"#!/bin/sh
[ "$1" = run ] || exit 0
while [ "$1" != -- ]; do shift; done
shift
exec preforkd "$@"
"#;

#[test]
#[ignore = "needs network and mount namespaces: tests/run runs it where they are"]
fn readme_blocks_run_as_printed() {
    blocks_run_as_printed("README.md");
}

#[test]
#[ignore = "needs network and mount namespaces: tests/run runs it where they are"]
fn protocol_blocks_run_as_printed() {
    blocks_run_as_printed("docs/protocol.md");
}

#[test]
#[ignore = "needs network and mount namespaces: tests/run runs it where they are"]
fn blocks_about_jobs_run_as_printed() {
    blocks_run_as_printed("docs/jobs.md");
}

fn blocks_run_as_printed(page: &str) {
    let text = fs::read_to_string(source().join(page)).unwrap();
    let dir = Dir::new();
    let mut expected = Vec::new();
    let mut last = String::new();
    let blocks = markdown::blocks(&text);
    for block in blocks
        .iter()
        .filter(|block| !block.text.contains("systemctl"))
    {
        match block.language.as_str() {
            "toml" | "py" if page == "docs/protocol.md" => {}
            "sh" | "python" | "toml" | "py" => {
                last = format!("block-{:04}.{}", block.line, block.language);
                dir.write(&last, &block.text);
            }
            "text" => expected.push((last.clone(), block)),
            _ => {}
        }
    }
    assert!(
        expected.len() >= 3,
        "the examples of {page} show what they print"
    );

    let helper = source().join("examples/python/preforkd.py");
    fs::copy(helper, dir.join("preforkd.py")).unwrap();
    let programs = dir.join("bin");
    fs::create_dir(&programs).unwrap();
    symlink(binary(), programs.join("preforkd")).unwrap();
    // The binary that it would build is already under test.
    let cargo = programs.join("cargo");
    fs::write(&cargo, CARGO).unwrap();
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();

    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    command.args([
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]);
    command.args(["bash", "-c", DRIVER]).current_dir(&*dir);
    let path = std::env::var("PATH").unwrap();
    command.env(
        "PATH",
        format!("{}:{path}:/usr/sbin:/sbin", programs.display()),
    );
    command
        .env_remove("RUST_LOG")
        .env_remove("XDG_RUNTIME_DIR")
        .stdin(Stdio::null());
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    for (file, block) in expected {
        let printed = dir.read(&format!("out-{file}"));
        assert_eq!(
            printed.trim_end(),
            block.text.trim_end(),
            "{page}:{}",
            block.line
        );
    }
}
