//! What a program may do before its workers are forked: open files, in `main` and in
//! `on_master_start`.
//!
//! `RECORDS=/tmp cargo run --example before_fork -- run`, then
//! `preforkd call record '["main", "a line"]'` appends a line to `/tmp/main`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use preforkd::{Context, RpcError, Server, StartError};

/// The files that are opened in `on_master_start`. All workers share them.
type Files = BTreeMap<&'static str, File>;

fn main() -> ExitCode {
    let main = record("main").expect("RECORDS names a directory that may be written to");
    Server::new()
        .on_master_start(open_files)
        .method_with(
            "record",
            move |call: &Context<'_>, (name, line): (String, String)| {
                let files = call.state::<Files>();
                let mut file = files.get(&*name).unwrap_or(&main);
                let line = format!("{line}\n");
                file.write_all(line.as_bytes())
                    .map_err(|error| RpcError::new(500, error.to_string()))
            },
        )
        .run()
}

fn path(name: &str) -> PathBuf {
    let directory = std::env::var_os("RECORDS").map_or_else(std::env::temp_dir, PathBuf::from);
    directory.join(name)
}

/// Opens a file for whole lines: with O_APPEND, no process overwrites what another has written.
fn record(name: &str) -> io::Result<File> {
    File::options().create(true).append(true).open(path(name))
}

fn open_files() -> Result<Files, StartError> {
    // As a C library may open its file: without O_CLOEXEC.
    let flags = OFlag::O_CREAT | OFlag::O_APPEND | OFlag::O_WRONLY;
    let library = open(&path("library"), flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
    Ok(Files::from([
        ("hook", record("hook")?),
        ("library", library.into()),
    ]))
}
