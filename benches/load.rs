//! Runs only the load: `cargo bench --bench load -- ADDRESS [--connections N] [--seconds N] [--params
//! JSON]`.
#![allow(unsafe_code, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::time::Duration;

use clap::Parser;

use support::load::{Load, Until};
use support::{Failure, figures, words};

#[derive(Parser)]
struct Words {
    /// The address of the server
    address: Option<std::net::SocketAddr>,
    /// Connections, with one outstanding call each.
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// The length of the load in seconds
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// The params of each ping. (The bare server answers every call as if they were "hello")
    #[arg(long, default_value = "\"hello\"")]
    params: String,
}

fn main() -> Result<(), Failure> {
    let program = "load".to_owned();
    let words = Words::parse_from([program].into_iter().chain(words()));
    let Some(address) = words.address else {
        eprintln!("usage: cargo bench --bench load -- ADDRESS [--connections N] [--seconds N]");
        return Ok(());
    };
    let mut load = Load::open(address, words.connections, &words.params)?;
    let outcome = load.run(Until::Elapsed(Duration::from_secs(words.seconds)))?;
    println!("{}", figures::line(&outcome));
    Ok(())
}
