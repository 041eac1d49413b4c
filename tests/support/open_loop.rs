//! An open loop: calls are due at a rate, whatever the server does, and count only if their result is
//! there before the caller has lost patience. So it is seen what a server does that is offered more
//! than it can do; a closed loop would slow down with it.
//!
//! Shared by a test and a measurement; it stands on the protocol alone.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long answers are waited for after the last call.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is offered.
#[derive(Debug, Clone, Copy)]
pub struct Offer<'a> {
    /// Connections that share the calls in turn.
    pub connections: usize,
    /// The method.
    pub method: &'a str,
    /// Its params, as JSON.
    pub params: &'a str,
    /// How long a caller waits, and says so in the call.
    pub patience: Duration,
}

/// What came of it.
#[derive(Debug, Default, Clone)]
pub struct Outcome {
    /// Calls that were due, and sent.
    pub offered: u64,
    /// Results that were there in time.
    pub in_time: u64,
    /// Results that came too late.
    pub late: u64,
    /// Errors, by name and `started`.
    pub errors: BTreeMap<String, u64>,
    /// From the first call's being due to the last one's.
    pub length: Duration,
}

impl Outcome {
    /// Results in time, a second.
    pub fn goodput(&self) -> f64 {
        self.in_time as f64 / self.length.as_secs_f64()
    }

    /// All of it in a line.
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

/// Offers so many calls a second for so long. Every call is answered, or it is an error here.
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
