//! Load whose every answer is checked by its id: a call is lost when its bytes were sent and no
//! valid answer came.
//!
//! Closed loop: a client sends its next call when it has an answer. Each client is a thread, and
//! ends after its last answer, so nothing is cut off by the load's own end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Client;

/// How a client connects.
#[derive(Debug, Clone, Copy)]
pub enum Shape {
    /// A connection for each call.
    PerCall,
    /// One for all of them.
    Lasting,
    /// One for all of them, so many calls sent ahead.
    Pipelined(usize),
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Tally {
    pub sent: u64,
    pub answered: u64,
    /// What went wrong with the others, the first few.
    pub faults: Vec<String>,
    /// Of each answered call, from its sending on.
    pub latencies: Vec<Duration>,
}

impl Tally {
    pub fn lost(&self) -> u64 {
        self.sent - self.answered
    }

    /// A quantile of the latencies, 0.5 being the median.
    pub fn quantile(&self, quantile: f64) -> Duration {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let index = (sorted.len() as f64 * quantile) as usize;
        sorted
            .get(index.min(sorted.len().saturating_sub(1)))
            .copied()
            .unwrap_or_default()
    }

    fn add(&mut self, other: Tally) {
        self.sent += other.sent;
        self.answered += other.answered;
        self.latencies.extend(other.latencies);
        self.faults.extend(other.faults);
        self.faults.truncate(10);
    }

    /// In one line.
    pub fn line(&self) -> String {
        format!(
            "{} calls, {} answered, {} lost, p50 {:?}, p99 {:?}, max {:?}",
            self.sent,
            self.answered,
            self.lost(),
            self.quantile(0.5),
            self.quantile(0.99),
            self.quantile(1.0),
        )
    }

    /// Fails unless there was load, and every call of it was answered.
    #[track_caller]
    pub fn assert_whole(&self, what: &str) {
        println!("{what}: {}", self.line());
        assert!(self.sent > 0, "{what}: nothing was sent");
        assert_eq!(self.lost(), 0, "{what}: {:#?}", self.faults);
    }
}

/// Clients at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Tally>>,
}

impl Load {
    /// Starts so many clients, each calling `ping` until it is told to stop.
    pub fn start(address: SocketAddr, clients: usize, shape: Shape) -> Self {
        Self::paced(address, clients, shape, Duration::ZERO)
    }

    /// With a pause between an answer and the next call: a probe in place of a load.
    pub fn paced(address: SocketAddr, clients: usize, shape: Shape, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..clients)
            .map(|number| {
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || {
                    let mut tally = Tally::default();
                    let go_on = || {
                        super::pass(pause);
                        !stop.load(Ordering::Relaxed)
                    };
                    client(address, number as u64, shape, &mut tally, go_on);
                    tally
                })
            })
            .collect();
        Load { stop, clients }
    }

    /// Lets every client have its last answers.
    pub fn stop(self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        for client in self.clients {
            all.add(client.join().unwrap());
        }
        all
    }
}

/// A load for so long.
pub fn run(address: SocketAddr, clients: usize, shape: Shape, time: Duration) -> Tally {
    let load = Load::start(address, clients, shape);
    super::pass(time);
    load.stop()
}

/// One client; a connection that fails ends it, and what it had sent there is lost.
fn client(
    address: SocketAddr,
    number: u64,
    shape: Shape,
    tally: &mut Tally,
    mut go_on: impl FnMut() -> bool,
) {
    let mut connection = Client::connect(address);
    let depth = match shape {
        Shape::Pipelined(depth) => depth,
        _ => 1,
    };
    let mut next = number << 40;
    let mut outstanding: Vec<(u64, Instant)> = Vec::new();
    loop {
        let more = go_on();
        while more && outstanding.len() < depth {
            next += 1;
            connection.send(&format!(
                r#"{{"in": "ping", "params": "for {next}", "id": {next}}}"#
            ));
            tally.sent += 1;
            outstanding.push((next, Instant::now()));
        }
        if outstanding.is_empty() {
            return;
        }
        let body = match connection.recv() {
            Ok(body) => body,
            Err(error) => return tally.faults.push(error.to_string()),
        };
        let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
        let id = answer["id"].as_u64().unwrap_or(0);
        match outstanding.iter().position(|(it, _)| *it == id) {
            Some(at) if answer["result"] == format!("for {id}") => {
                let (_, since) = outstanding.swap_remove(at);
                tally.answered += 1;
                tally.latencies.push(since.elapsed());
            }
            // An answer that nobody waits for makes all the others doubtful.
            _ => return tally.faults.push(format!("not awaited: {answer}")),
        }
        if matches!(shape, Shape::PerCall) {
            connection = Client::connect(address);
        }
    }
}
