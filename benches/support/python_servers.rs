//! Other servers of Python functions, installed by pip into `target/python-servers`, once.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Failure;
use super::server::Server;

const PACKAGES: [&str; 2] = ["gunicorn==23.0.0", "uWSGI==2.0.31"];

/// The programs of the virtual environment, which is made if it is not there.
pub fn installed() -> Result<PathBuf, Failure> {
    let environment = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/python-servers");
    let bin = environment.join("bin");
    if !bin.join("uwsgi").exists() || !bin.join("gunicorn").exists() {
        eprintln!("installing {PACKAGES:?} into {}", environment.display());
        run(Command::new("python3")
            .args(["-m", "venv"])
            .arg(&environment))?;
        run(Command::new(bin.join("pip"))
            .args(["install", "--quiet", "--disable-pip-version-check"])
            .args(PACKAGES))?;
    }
    Ok(bin)
}

fn run(command: &mut Command) -> Result<(), Failure> {
    let status = command.status()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{command:?} ended with {status}").into()),
    }
}

/// gunicorn with `wsgi.py` of a directory. Without `threads` its workers are of the kind sync.
pub fn gunicorn(
    bin: &Path,
    directory: &Path,
    workers: usize,
    threads: Option<usize>,
) -> Result<Server, Failure> {
    Server::other(|address| {
        let mut command = Command::new(bin.join("gunicorn"));
        command.args(["--workers", &workers.to_string()]);
        match threads {
            Some(threads) => command
                .args(["--worker-class", "gthread", "--keep-alive", "60"])
                .args(["--threads", &threads.to_string()]),
            None => command.args(["--worker-class", "sync"]),
        };
        command.args(["--log-level", "warning", "--bind"]);
        command.arg(address.to_string()).arg("wsgi:application");
        command.current_dir(directory);
        command
    })
}

/// uWSGI's http router with `wsgi.py` of a directory.
pub fn uwsgi(bin: &Path, directory: &Path, processes: usize) -> Result<Server, Failure> {
    Server::other(|address| {
        let mut command = Command::new(bin.join("uwsgi"));
        command.args(["--master", "--disable-logging", "--die-on-term"]);
        command.args(["--processes", &processes.to_string()]);
        command.args(["--listen", "128", "--http-keepalive", "--http-auto-chunked"]);
        command.args(["--need-app", "--wsgi-file", "wsgi.py", "--http"]);
        command.arg(address.to_string());
        command.current_dir(directory).stderr(Stdio::null());
        command
    })
}
