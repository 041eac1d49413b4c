//! Runs load whose every answer is checked by its id. A call is lost if its bytes were sent and no valid
//! answer came.
//!
//! Closed loop: a client sends its next call when it has an answer. Each client is a thread and ends
//! after its last answer, so the end of the load loses no call. If a client's connection ends, the client
//! counts the lost calls and continues with another connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::wire::{Dialect, Wire};

/// How a client connects.
#[derive(Debug, Clone, Copy)]
pub enum Shape {
    /// A new connection for each call.
    PerCall,
    /// One connection for all calls.
    Lasting,
    /// One connection for all calls, with this many calls sent ahead.
    Pipelined(usize),
}

/// The results.
#[derive(Debug, Default)]
pub struct Tally {
    pub sent: u64,
    pub answered: u64,
    /// Connections that the server closed, or that could not be made.
    pub closed: u64,
    pub faults: Vec<Fault>,
    /// The latency of each answered call, from its send on.
    pub latencies: Vec<Duration>,
}

/// A failed call or connection.
#[derive(Debug, Clone)]
pub struct Fault {
    /// The client's port; 0 if it was not connected.
    pub port: u16,
    pub at: Instant,
    /// Calls on it without a valid answer.
    pub lost: u64,
    /// Whether the connection was lost too.
    pub closed: bool,
    pub what: String,
}

/// The most faults and latencies that are kept of one client.
const MOST_FAULTS: usize = 10_000;
const MOST_LATENCIES: usize = 1 << 20;

impl Tally {
    pub fn lost(&self) -> u64 {
        self.sent - self.answered
    }

    /// Returns a quantile of the latencies; 0.5 is the median.
    pub fn quantile(&self, quantile: f64) -> Duration {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let index = (sorted.len() as f64 * quantile) as usize;
        sorted
            .get(index.min(sorted.len().saturating_sub(1)))
            .copied()
            .unwrap_or_default()
    }

    pub fn add(&mut self, other: Tally) {
        self.sent += other.sent;
        self.answered += other.answered;
        self.closed += other.closed;
        self.latencies.extend(other.latencies);
        self.faults.extend(other.faults);
    }

    /// Records that a connection was lost with `lost` calls.
    pub fn ended(&mut self, port: u16, lost: usize, what: String) {
        self.closed += 1;
        self.fault(port, lost, true, what);
    }

    /// Records that `lost` calls have no valid answer.
    pub fn fault(&mut self, port: u16, lost: usize, closed: bool, what: String) {
        if self.faults.len() < MOST_FAULTS {
            self.faults.push(Fault {
                port,
                at: Instant::now(),
                lost: lost as u64,
                closed,
                what,
            });
        }
    }

    fn answer(&mut self, took: Duration) {
        // In a long run only the last ones are kept.
        match self.latencies.len() < MOST_LATENCIES {
            true => self.latencies.push(took),
            false => self.latencies[self.answered as usize % MOST_LATENCIES] = took,
        }
        self.answered += 1;
    }

    /// Returns the results in one line.
    pub fn line(&self) -> String {
        format!(
            "{} calls, {} answered, {} lost, {} connections closed, p50 {:?}, p99 {:?}, max {:?}",
            self.sent,
            self.answered,
            self.lost(),
            self.closed,
            self.quantile(0.5),
            self.quantile(0.99),
            self.quantile(1.0),
        )
    }

    /// Asserts that there was load, and that every call was answered.
    #[track_caller]
    pub fn assert_whole(&self, what: &str) {
        println!("{what}: {}", self.line());
        assert!(self.sent > 0, "{what}: nothing was sent");
        let shown = &self.faults[..self.faults.len().min(10)];
        assert_eq!((self.lost(), self.closed), (0, 0), "{what}: {shown:#?}");
    }
}

/// Running clients.
pub struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Tally>>,
}

/// The configuration of a load.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub address: SocketAddr,
    pub clients: usize,
    pub shape: Shape,
    pub dialect: Dialect,
    /// The pause between an answer and the next call.
    pub pause: Duration,
    /// The methods, called in turn.
    pub methods: &'static [&'static str],
}

impl Load {
    /// Starts `clients` clients that call `ping` in frames until they are stopped.
    pub fn start(address: SocketAddr, clients: usize, shape: Shape) -> Self {
        Self::paced(address, clients, shape, Duration::ZERO)
    }

    /// Does the same with a pause between an answer and the next call.
    pub fn paced(address: SocketAddr, clients: usize, shape: Shape, pause: Duration) -> Self {
        let dialect = Dialect::Frame;
        Self::of(Plan {
            address,
            clients,
            shape,
            dialect,
            pause,
            methods: &["ping"],
        })
    }

    /// Starts a planned load.
    pub fn of(plan: Plan) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let clients = (0..plan.clients)
            .map(|number| {
                let mut caller = Caller {
                    plan,
                    stop: Arc::clone(&stop),
                    answered: Arc::clone(&answered),
                    next: (number as u64) << 40,
                    tally: Tally::default(),
                };
                std::thread::spawn(move || {
                    while !caller.stop.load(Ordering::Relaxed) {
                        caller.live();
                    }
                    caller.tally
                })
            })
            .collect();
        Load {
            stop,
            answered,
            clients,
        }
    }

    /// Returns the number of answered calls so far, of all clients.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Stops the load after the last answer of each client.
    pub fn stop(self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        for client in self.clients {
            all.add(client.join().unwrap());
        }
        all
    }
}

/// Runs a load for this time.
pub fn run(address: SocketAddr, clients: usize, shape: Shape, time: Duration) -> Tally {
    let load = Load::start(address, clients, shape);
    super::pass(time);
    load.stop()
}

struct Caller {
    plan: Plan,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    next: u64,
    tally: Tally,
}

impl Caller {
    /// Sends calls over one connection until it ends.
    fn live(&mut self) {
        let mut wire = match Wire::try_open(self.plan.address) {
            Ok(wire) => wire,
            Err(error) => {
                self.tally.ended(0, 0, format!("not connected: {error}"));
                return super::pass(Duration::from_millis(5));
            }
        };
        let depth = match self.plan.shape {
            Shape::Pipelined(depth) => depth,
            Shape::PerCall | Shape::Lasting => 1,
        };
        let mut outstanding = Vec::new();
        loop {
            super::pass(self.plan.pause);
            let more = !self.stop.load(Ordering::Relaxed);
            let mut batch = Vec::new();
            while more && outstanding.len() < depth {
                self.next += 1;
                batch.extend_from_slice(&self.call(self.next));
                self.tally.sent += 1;
                outstanding.push((self.next, Instant::now()));
            }
            if outstanding.is_empty() {
                return;
            }
            wire.send(&batch);
            let answer = match wire.try_answer(self.plan.dialect) {
                Ok(answer) => answer,
                // Answers before the end were checked already.
                Err(error) => {
                    let what = format!("{error}, with {} calls sent", outstanding.len());
                    return self.tally.ended(wire.port(), outstanding.len(), what);
                }
            };
            if !self.check(&answer, &mut outstanding, wire.port()) {
                // An unexpected answer makes all others doubtful.
                let what = format!("not awaited: {answer}");
                return self.tally.ended(wire.port(), outstanding.len(), what);
            }
            if matches!(self.plan.shape, Shape::PerCall) {
                return;
            }
        }
    }

    /// Returns whether it answers one of these calls, correctly or not.
    fn check(&mut self, answer: &str, outstanding: &mut Vec<(u64, Instant)>, port: u16) -> bool {
        let value: Value = serde_json::from_str(answer).unwrap_or_default();
        let id = value["id"].as_u64().unwrap_or(0);
        let Some(at) = outstanding.iter().position(|(it, _)| *it == id) else {
            return false;
        };
        let (_, since) = outstanding.swap_remove(at);
        if value["result"] == self.params(id) {
            self.tally.answer(since.elapsed());
            self.answered.fetch_add(1, Ordering::Relaxed);
        } else {
            self.tally.fault(port, 1, false, answer.to_owned());
        }
        true
    }

    fn method(&self, id: u64) -> &'static str {
        self.plan.methods[id as usize % self.plan.methods.len()]
    }

    /// The answer must contain these params; `sleep` returns them after a while.
    fn params(&self, id: u64) -> Value {
        match self.method(id) {
            "sleep" => json!(0.002),
            _ => json!(format!("for {id}")),
        }
    }

    /// Encodes one call. In HTTP its number is also in a header, for a server that does not read JSON.
    fn call(&self, id: u64) -> Vec<u8> {
        let (method, params) = (self.method(id), self.params(id));
        let body = format!(r#"{{"in": "{method}", "params": {params}, "id": {id}}}"#);
        match self.plan.dialect {
            Dialect::Frame => super::frame(body.as_bytes()),
            Dialect::Line => format!("{body}\n").into_bytes(),
            Dialect::Http => format!(
                "POST / HTTP/1.1\r\nHost: x\r\nX-Id: {id}\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .into_bytes(),
        }
    }
}
