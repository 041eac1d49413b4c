//! Clients that call all the time while a test does something to the daemon, and count.
//!
//! A call is lost when its bytes were taken and no valid answer came; a connection that was
//! refused counts too, for whoever listens without a break refuses nobody.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::client::Client;
use super::pause;

/// What became of the calls.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    /// Answered with what was sent.
    pub answered: u64,
    /// What became of each other one.
    pub lost: Vec<String>,
    /// The longest that an answer took.
    pub longest: Duration,
}

/// Clients at work.
pub struct Callers {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Tally>>,
}

impl Callers {
    /// So many clients, each with one connection that lasts.
    pub fn lasting(address: SocketAddr, clients: usize) -> Self {
        Self::start(clients, move |stop| {
            let mut tally = Tally::default();
            let mut client = Client::connect(address);
            while !stop.load(Ordering::Relaxed) {
                tally.count(|id| ping(&mut client, id));
                if !tally.lost.is_empty() {
                    break; // the connection tells nothing new any more
                }
                pause();
            }
            tally
        })
    }

    /// So many clients, each with a connection for every call.
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

    /// Ends it, and says how it went.
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

    /// Ends it, prints how it went, and fails the test when a call was lost.
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
        assert!(tally.answered > 0, "{what}: nobody called");
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

/// One call with a number of its own, which has to come back.
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
