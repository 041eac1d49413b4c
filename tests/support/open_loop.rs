//! Runs an open loop: calls are sent at a fixed rate, and count only if their result arrives before the
//! caller's timeout. So it shows what an overloaded server still does; a closed loop would slow down with
//! the server.
//!
//! A test and a benchmark share it. It uses only the protocol.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long to wait for answers after the last call.
const PATIENCE: Duration = Duration::from_secs(10);

/// The offered calls.
#[derive(Debug, Clone, Copy)]
pub struct Offer<'a> {
    /// The number of connections, which send the calls in turn.
    pub connections: usize,
    pub method: &'a str,
    /// The params as JSON.
    pub params: &'a str,
    /// The timeout of a caller, which the call contains.
    pub patience: Duration,
}

/// The results.
#[derive(Debug, Default, Clone)]
pub struct Outcome {
    /// Calls that were due and sent.
    pub offered: u64,
    /// Results that arrived in time.
    pub in_time: u64,
    /// Results that arrived too late.
    pub late: u64,
    /// Errors, by name and `started`.
    pub errors: BTreeMap<String, u64>,
    /// The requested duration of the load.
    pub length: Duration,
}

impl Outcome {
    /// Returns the results in time per second.
    pub fn goodput(&self) -> f64 {
        self.in_time as f64 / self.length.as_secs_f64()
    }

    /// Returns the results in one line.
    pub fn line(&self) -> String {
        format!(
            "{} offered, {} in time ({:.0}/s), {} late, errors {:?}",
            self.offered,
            self.in_time,
            self.goodput(),
            self.late,
            self.errors
        )
    }
}

/// Sends calls at this rate for this time. It is an error if a call is not answered.
pub fn offer(
    address: SocketAddr,
    offer: Offer<'_>,
    rate: f64,
    length: Duration,
) -> io::Result<Outcome> {
    let mut streams = Vec::new();
    for _ in 0..offer.connections {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        streams.push(stream);
    }
    let begin = Instant::now() + Duration::from_millis(20);
    let calls = (rate * length.as_secs_f64()) as u64;
    let due = |number: u64| Duration::from_secs_f64(number as f64 / rate);
    thread::scope(|scope| {
        let mut readers = Vec::new();
        for (place, stream) in streams.iter().enumerate() {
            let own = (calls + (streams.len() - 1 - place) as u64) / streams.len() as u64;
            let mut stream = stream.try_clone()?;
            readers.push(scope.spawn(move || {
                let mut seen = Outcome::default();
                for _ in 0..own {
                    let answer = receive(&mut stream)?;
                    let number = answer["id"].as_u64().unwrap_or(0);
                    let took = begin.elapsed().saturating_sub(due(number));
                    if answer["out"] == "error" {
                        let error = &answer["result"];
                        let name = format!("{}, started {}", error["name"], error["started"]);
                        *seen.errors.entry(name.replace('"', "")).or_default() += 1;
                    } else if took <= offer.patience {
                        seen.in_time += 1;
                    } else {
                        seen.late += 1;
                    }
                }
                io::Result::Ok(seen)
            }));
        }
        let mut writers = streams.iter();
        for number in 0..calls {
            let wait = due(number).saturating_sub(begin.elapsed());
            if begin > Instant::now() || wait > Duration::from_millis(1) {
                let until_begin = begin.saturating_duration_since(Instant::now());
                thread::park_timeout(wait + until_begin);
            }
            let mut writer = match writers.next() {
                Some(writer) => writer,
                None => {
                    writers = streams.iter();
                    writers.next().ok_or(io::ErrorKind::InvalidInput)?
                }
            };
            let body = format!(
                r#"{{"in": "{}", "params": {}, "id": {number}, "timeout_ms": {}}}"#,
                offer.method,
                offer.params,
                offer.patience.as_millis()
            );
            let mut bytes = u32::try_from(body.len())
                .map_err(io::Error::other)?
                .to_le_bytes()
                .to_vec();
            bytes.extend_from_slice(body.as_bytes());
            writer.write_all(&bytes)?;
        }
        let mut outcome = Outcome {
            offered: calls,
            length,
            ..Outcome::default()
        };
        for reader in readers {
            let seen = reader
                .join()
                .map_err(|_| io::Error::other("a reader panicked"))??;
            outcome.in_time += seen.in_time;
            outcome.late += seen.late;
            for (name, count) in seen.errors {
                *outcome.errors.entry(name).or_default() += count;
            }
        }
        Ok(outcome)
    })
}

fn receive(stream: &mut TcpStream) -> io::Result<Value> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut body = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut body)?;
    serde_json::from_slice(&body).map_err(io::Error::other)
}
