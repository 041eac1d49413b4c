//! Tests what tells one call from another: its id, and its place in a trace.

mod call_ids;
mod trace_context;
mod trace_suite;

use serde_json::{Value, json};

use crate::support::{Client, Daemon};

/// Two workers of one thread each. The first has the connections, so a second call must run in the other.
pub fn one_sided(config: &str, count: usize) -> (Daemon, [i32; 2], Vec<Client>) {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    let daemon = Daemon::builder().config(config).start();
    let [home, other] = daemon.ready_workers()[..] else {
        panic!("two workers")
    };
    kill(Pid::from_raw(other), Signal::SIGSTOP).unwrap();
    let mut clients: Vec<Client> = (0..count).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.call(&json!({"in": "ping"}));
    }
    kill(Pid::from_raw(other), Signal::SIGCONT).unwrap();
    (daemon, [home, other], clients)
}

/// The result of a call.
fn result(client: &mut Client, method: &str, params: &Value) -> Value {
    client.call(&json!({"in": method, "params": params}))["result"].clone()
}
