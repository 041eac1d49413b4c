//! Mistakes that a program on the library can make, one at a time. For example, run
//! `MISTAKE=thread cargo run --example mistakes -- run` to see the message for a thread in the master.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use preforkd::{RawValue, RpcError, Server};
use signal_hook::consts::SIGPIPE;
use signal_hook::flag::register_conditional_default;

/// Panics when it is dropped.
#[derive(serde::Serialize)]
struct Grudge;

impl Drop for Grudge {
    fn drop(&mut self) {
        panic!("dropped, and not happy about it");
    }
}

fn main() -> ExitCode {
    let server = Server::new()
        .method("panic", |text: String| -> Result<(), RpcError> {
            panic!("{text}")
        })
        .method("throw", |number: u64| -> Result<(), RpcError> {
            std::panic::panic_any(number)
        })
        .method("throw_grudge", |()| -> Result<(), RpcError> {
            std::panic::panic_any(Grudge)
        })
        .method("grudge", |()| Ok(Grudge))
        // Asks for state that was never created.
        .method_with("no_state", |call, ()| Ok(*call.state::<u64>()))
        // Returns JSON on several lines. A client of the line dialect would read several answers.
        .raw("lines", |_, params| {
            RawValue::from_string(format!("[\n  {params},\r\n  {params}\n]"))
                .map_err(|error| RpcError::new(1, error.to_string()))
        });
    let mistake = std::env::var("MISTAKE").unwrap_or_default();
    match &*mistake {
        // Registers a name that is already used.
        "twice" => server.method("panic", |()| Ok(())),
        // Registers the name under which metrics count all other methods.
        "other" => server.method("_OTHER", |()| Ok(())),
        // Starts a thread in the master. A fork copies only the thread that calls it.
        "thread" => server.on_master_start(|| {
            thread::spawn(forever);
            Ok(())
        }),
        "master" => server.on_master_start::<()>(|| Err("the table can't be read".into())),
        // Starts a program as a child of the master. This is not a mistake. The program is not left over
        // from a worker.
        "helper" => server.on_master_start(helper),
        "worker" => server.on_worker_start::<()>(|_| panic!("no database in sight")),
        // Lets SIGPIPE end the process when it writes to a pipe without a reader, as in C programs.
        "sigpipe" => server.on_master_start(|| {
            let at_once = Arc::new(AtomicBool::new(true));
            Ok(register_conditional_default(SIGPIPE, at_once)?)
        }),
        // Never returns from the stop hook.
        "stop" => server.on_worker_stop(|_| forever()),
        _ => server,
    }
    .run()
}

fn forever() {
    loop {
        thread::park_timeout(Duration::from_secs(3600));
    }
}

fn helper() -> Result<u32, Box<dyn Error + Send + Sync>> {
    let child = Command::new("sleep").arg("3600").spawn()?;
    let path = std::env::var_os("HELPERS").unwrap_or_default();
    let mut list = File::options().append(true).create(true).open(path)?;
    writeln!(list, "{}", child.id())?;
    Ok(child.id())
}
