//! Measures gunicorn with the same number of threads or processes, for comparison. It has no bar to reach.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::support::Failure;
use super::support::http::HttpClient;
use super::support::python_servers::{gunicorn, installed};
use super::{CALL, POSSIBLE, Row, THREADS, WORKERS, clients};

/// Returns the rows of gunicorn, with gthread and with sync workers.
pub fn rows() -> Result<Vec<Row>, Failure> {
    let bin = installed()?;
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/capacity");
    let mut rows = Vec::new();
    for (name, workers, threads) in [
        ("gthread", WORKERS, Some(THREADS)),
        ("sync", WORKERS * THREADS, None),
    ] {
        for connections in [Some(8), Some(16), Some(32), None] {
            let what = connections.map_or("a connection per call".to_owned(), |count| {
                format!("{count} connections")
            });
            let (bin, directory): (PathBuf, PathBuf) = (bin.clone(), directory.clone());
            rows.push(Row {
                name: format!("gunicorn {name}, {what}"),
                possible: POSSIBLE,
                bar: None,
                server: Box::new(move || gunicorn(&bin, &directory, workers, threads)),
                load: Box::new(move |address, length| load(address, connections, length)),
            });
        }
    }
    Ok(rows)
}

/// Returns the calls per second of this number of lasting connections, which are opened in one burst. With `None`, as
/// many clients as calls can run at once make a connection per call.
fn load(address: SocketAddr, connections: Option<usize>, length: Duration) -> Result<f64, Failure> {
    let count = connections.unwrap_or(WORKERS * THREADS);
    clients(count, length, |_, goes_on| {
        let mut client = HttpClient::new(address);
        while goes_on() {
            let called = client.call("sleep", &CALL.to_string());
            called.map_err(|error| error.to_string())?;
            if connections.is_none() {
                client.disconnect();
            }
        }
        Ok(())
    })
}
