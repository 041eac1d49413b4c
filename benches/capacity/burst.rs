//! Measures a burst of connections on workers that have run for some time: how soon the connections are spread evenly
//! over the workers. Checks that no connection is closed or loses an
//! answer while it moves.

use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use super::support::Failure;
use super::support::server::Server;
use super::{WORKERS, answer, connect, frame};

const CONNECTIONS: usize = 256;
/// How long the workers have run.
const AGE: Duration = Duration::from_secs(10);
/// When they must be spread.
const BAR: Duration = Duration::from_secs(2);
/// For how long it is looked.
const PATIENCE: Duration = Duration::from_secs(5);

/// Prints what each round gave. Returns whether all were within the bar.
pub fn burst(rounds: usize) -> Result<bool, Failure> {
    let mut is_good = true;
    for _ in 0..rounds {
        let server = Server::preforkd_with(&format!("[workers]\ncount = {WORKERS}\n"))?;
        thread::sleep(AGE);
        let mut streams = Vec::new();
        for _ in 0..CONNECTIONS {
            streams.push(connect(server.address)?);
        }
        let begin = Instant::now();
        let (mut failed, mut even) = (0, None);
        let mut counts = Vec::new();
        while even.is_none() && begin.elapsed() < PATIENCE {
            failed += ping(&mut streams);
            counts = server.connections()?;
            even = is_even(&counts).then(|| begin.elapsed());
        }
        failed += ping(&mut streams);
        let is_in_time = even.is_some_and(|took| took <= BAR);
        let when = even.map_or("never".to_owned(), |took| format!("after {took:.1?}"));
        println!(
            "{:<40} spread {when}: {counts:?}; {failed} closed or without an answer (bar {BAR:?}, 0)",
            format!("burst of {CONNECTIONS} connections")
        );
        is_good &= is_in_time && failed == 0;
    }
    Ok(is_good)
}

/// Returns whether the worker with the most connections has at most 1.25 times the mean, or at most one more than the
/// mean rounded up.
fn is_even(counts: &[u64]) -> bool {
    let (workers, total) = (counts.len() as u64, counts.iter().sum::<u64>());
    let fullest = counts.iter().copied().max().unwrap_or(0);
    total == CONNECTIONS as u64
        && (fullest * workers * 4 <= total * 5 || fullest <= total.div_ceil(workers) + 1)
}

/// Calls over each connection, and drops those that fail. Returns how many those are.
fn ping(streams: &mut Vec<TcpStream>) -> usize {
    let before = streams.len();
    streams.retain_mut(|stream| {
        let sent = stream.write_all(&frame(r#"{"in": "ping"}"#));
        sent.is_ok() && answer(stream).is_ok()
    });
    before - streams.len()
}
