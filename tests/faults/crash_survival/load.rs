//! Runs a load on lasting connections and counts the result of each call.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use serde_json::{Value, json};

use crate::support::{Client, Daemon};

/// The results of a load.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) attempts: AtomicU64,
    pub(super) ok: AtomicU64,
    pub(super) crashed: AtomicU64,
    /// Other answers, or answers to another call.
    pub(super) wrong: AtomicU64,
    /// Calls without an answer.
    pub(super) lost: AtomicU64,
    pub(super) closed: AtomicU64,
    pub(super) first_wrong: Mutex<String>,
}

impl Tally {
    pub(super) fn get(number: &AtomicU64) -> u64 {
        number.load(Ordering::Relaxed)
    }

    fn add(number: &AtomicU64, more: u64) {
        number.fetch_add(more, Ordering::Relaxed);
    }
}

pub(super) struct Load {
    stop: Arc<AtomicBool>,
    pub(super) tally: Arc<Tally>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts `clients` lasting connections with `depth` calls in flight each; with ids if there are
    /// several. Every fourth call is for a handler thread.
    pub(super) fn start(daemon: &Daemon, clients: usize, depth: u64) -> Self {
        let (stop, tally) = (Arc::new(AtomicBool::new(false)), Arc::new(Tally::default()));
        let address = daemon.address();
        let clients = (0..clients)
            .map(|_| {
                let (stop, tally) = (Arc::clone(&stop), Arc::clone(&tally));
                thread::spawn(move || {
                    let mut client = Client::connect(address);
                    let mut next = 0;
                    while !stop.load(Ordering::Relaxed) {
                        if !round(&mut client, next, depth, &tally) {
                            Tally::add(&tally.closed, 1);
                            client = Client::connect(address);
                        }
                        next += depth;
                    }
                })
            })
            .collect();
        Load {
            stop,
            tally,
            clients,
        }
    }

    pub(super) fn finish(self) -> Arc<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().unwrap();
        }
        self.tally
    }
}

/// Runs one round of calls; returns false if the connection ended.
fn round(client: &mut Client, first: u64, depth: u64, tally: &Tally) -> bool {
    Tally::add(&tally.attempts, depth);
    for number in first..first + depth {
        let method = if number.is_multiple_of(4) {
            "sleep"
        } else {
            "echo"
        };
        let params = if number.is_multiple_of(4) {
            json!(0.001)
        } else {
            json!(number)
        };
        let mut call = json!({"in": method, "params": params});
        if depth > 1 {
            call["id"] = number.into();
        }
        if client.try_send(&call.to_string()).is_err() {
            Tally::add(&tally.lost, depth);
            return false;
        }
    }
    let mut expected: Vec<u64> = (first..first + depth).collect();
    while !expected.is_empty() {
        let Ok(answer) = client.recv() else {
            Tally::add(&tally.lost, expected.len() as u64);
            return false;
        };
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        let number = answer["id"].as_u64().unwrap_or(first);
        let known = expected.iter().position(|&it| it == number);
        let result = if number.is_multiple_of(4) {
            json!(0.001)
        } else {
            json!(number)
        };
        let which = match known {
            Some(_) if answer["result"] == result => &tally.ok,
            Some(_) if answer["result"]["name"] == "crashed" => &tally.crashed,
            _ => {
                *tally.first_wrong.lock().unwrap() = answer.to_string();
                &tally.wrong
            }
        };
        Tally::add(which, 1);
        expected.retain(|&it| it != number);
    }
    true
}
