//! The README does what it says: its blocks are run in their order, as they stand, on a machine
//! of their own as far as network, /run and /etc/preforkd go, against the daemon that they start.
//!
//! A `text` block is the exact output of the block before it; `console` shows what output looks
//! like and is not compared. The blocks for systemd are run by `systemd.rs`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};

use crate::support::{Dir, binary, markdown, source};

/// Runs the blocks, each to its own file of output. The one that starts the server stays in the
/// foreground of a reader's terminal, so here it goes into the background.
const DRIVER: &str = r#"
set -eu
mount -t tmpfs -o mode=755 tmpfs /run
[ ! -d /etc/preforkd ] || mount -t tmpfs tmpfs /etc/preforkd
ip link set lo up
for block in block-*; do
    case $block in
    *.python) python3 "$block" >"out-$block" ;;
    *)
        if grep -q -- '^cargo run .* run$' "$block"; then
            bash -eu "$block" >"out-$block" 2>log &
            tries=0
            until preforkd status >/dev/null 2>&1; do
                tries=$((tries + 1))
                [ $tries -lt 400 ] || { cat log; exit 1; }
                sleep 0.05
            done
        else
            bash -eu "$block" >"out-$block"
        fi
        ;;
    esac || { echo "$block failed"; cat "$block" log; exit 1; }
done
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
    let readme = fs::read_to_string(source().join("README.md")).unwrap();
    let dir = Dir::new();
    let mut expected = Vec::new();
    let mut last = String::new();
    let blocks = markdown::blocks(&readme);
    for block in blocks
        .iter()
        .filter(|block| !block.text.contains("systemctl"))
    {
        match block.language.as_str() {
            "sh" | "python" => {
                last = format!("block-{:04}.{}", block.line, block.language);
                dir.write(&last, &block.text);
            }
            "text" => expected.push((last.clone(), block)),
            _ => {}
        }
    }
    assert!(
        expected.len() >= 3,
        "nc, Python and `preforkd call` show what they print"
    );

    let programs = dir.join("bin");
    fs::create_dir(&programs).unwrap();
    symlink(binary(), programs.join("preforkd")).unwrap();
    // what it builds is what is under test already
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
            "README.md:{}",
            block.line
        );
    }
}
