//! Runs clients that call continuously while a test acts on the daemon, and counts the results.
//!
//! A call is lost if its bytes were accepted and no valid answer came. A refused connection counts too,
//! because a server that never stops listening refuses none.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::client::Client;
use super::pause;

/// The results of the calls.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    /// The number of calls whose answer has the sent value.
    pub answered: u64,
    /// The result of each other call.
    pub lost: Vec<String>,
    /// The longest time until an answer.
    pub longest: Duration,
}

/// Running clients.
pub struct Callers {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Tally>>,
}

impl Callers {
    /// Starts this many clients, each with one lasting connection.
    pub fn lasting(address: SocketAddr, clients: usize) -> Self {
        Self::start(clients, move |stop| {
            let mut tally = Tally::default();
            let mut client = Client::connect(address);
            while !stop.load(Ordering::Relaxed) {
                tally.count(|id| ping(&mut client, id));
                if !tally.lost.is_empty() {
                    break; // no further answer can come from this connection
                }
                pause();
            }
            tally
        })
    }

    /// Starts this many clients, each with a new connection for every call.
    pub fn connecting(address: SocketAddr, clients: usize) -> Self {
        Self::start(clients, move |stop| {
            let mut tally = Tally::default();
            while !stop.load(Ordering::Relaxed) {
                tally.count(|id| {
                    let stream = TcpStream::connect(address);
                    let stream = stream.map_err(|error| format!("not connected: {error}"))?;
                    ping(&mut Client::over(stream), id)
                });
                pause();
            }
            tally
        })
    }

    fn start(
        clients: usize,
        client: impl Fn(&AtomicBool) -> Tally + Send + Clone + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let run = || {
            let (stop, client) = (Arc::clone(&stop), client.clone());
            std::thread::spawn(move || client(&stop))
        };
        let clients = (0..clients).map(|_| run()).collect();
        Callers { stop, clients }
    }

    /// Stops the clients and returns the results.
    pub fn stop(mut self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        for client in self.clients.drain(..) {
            let tally = client.join().expect("a client panicked");
            all.answered += tally.answered;
            all.lost.extend(tally.lost);
            all.longest = all.longest.max(tally.longest);
        }
        all
    }

    /// Stops the clients, prints the results, and fails the test if a call was lost.
    #[track_caller]
    pub fn stop_without_loss(self, what: &str) -> Tally {
        let tally = self.stop();
        println!(
            "{what}: {} calls answered, {} lost, the longest took {:?}",
            tally.answered,
            tally.lost.len(),
            tally.longest
        );
        assert!(tally.lost.is_empty(), "{what}: {:?}", tally.lost);
        assert!(tally.answered > 0, "{what}: no call was answered");
        tally
    }
}

impl Drop for Callers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Tally {
    fn count(&mut self, call: impl FnOnce(u64) -> Result<(), String>) {
        let begin = Instant::now();
        match call(self.answered) {
            Ok(()) => self.answered += 1,
            Err(reason) => self.lost.push(reason),
        }
        self.longest = self.longest.max(begin.elapsed());
    }
}

/// Sends one call with a unique number, which the answer must contain.
fn ping(client: &mut Client, id: u64) -> Result<(), String> {
    let call = format!(r#"{{"in":"ping","params":{id}}}"#);
    client
        .try_send(&call)
        .map_err(|error| format!("call {id} was not sent: {error}"))?;
    let answer = client.recv();
    let answer = answer.map_err(|error| format!("call {id} was not answered: {error}"))?;
    let expected = format!(r#"{{"out":"pong","result":{id}}}"#);
    match answer == expected.as_bytes() {
        true => Ok(()),
        false => Err(format!("call {id}: {}", String::from_utf8_lossy(&answer))),
    }
}
