//! Runs clients that send a call byte by byte and expect an answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::{Value, json};

use super::load::Tally;
use super::{Client, frame, pass};

/// Running clients, one thread each.
pub struct Dawdlers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Tally>>,
}

impl Dawdlers {
    /// Starts `count` clients, each with a new connection for each call of `echo`.
    pub fn start(address: SocketAddr, count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..count).map(|number| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                let mut tally = Tally::default();
                while !stop.load(Ordering::Relaxed) {
                    tally.sent += 1;
                    let mut client = Client::connect(address);
                    let port = client.stream().local_addr().map_or(0, |it| it.port());
                    match dawdle(&mut client, number) {
                        Ok(()) => tally.answered += 1,
                        Err((false, what)) => tally.fault(port, 1, false, what),
                        Err((true, what)) => tally.ended(port, 1, what),
                    }
                }
                tally
            })
        });
        let threads = threads.collect();
        Dawdlers { stop, threads }
    }

    /// Stops them after the last answer of each.
    pub fn stop(self) -> Vec<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        let tallies = self.threads.into_iter().map(|it| it.join().unwrap());
        tallies.collect()
    }
}

/// Sends one call. On failure returns the reason, and whether the connection was lost.
fn dawdle(client: &mut Client, number: usize) -> Result<(), (bool, String)> {
    let text = format!("slow {number}");
    let call = json!({"in": "echo", "params": text}).to_string();
    for byte in frame(call.as_bytes()) {
        client
            .try_send_raw(&[byte])
            .map_err(|error| (true, format!("a slow call was not sent: {error}")))?;
        pass(Duration::from_millis(20 + number as u64));
    }
    let answer = client.recv();
    let answer =
        answer.map_err(|error| (true, format!("a slow call was not answered: {error}")))?;
    let expected = json!({"out": "echo", "result": text});
    match serde_json::from_slice::<Value>(&answer) {
        Ok(value) if value == expected => Ok(()),
        _ => Err((false, String::from_utf8_lossy(&answer).into_owned())),
    }
}
