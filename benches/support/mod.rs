//! Shared code of the benchmarks: servers to measure, their load, and the figures.
//!
//! Each measurement is a crate of its own and uses a part of this.
#![allow(dead_code, clippy::print_stderr)]

pub mod bare;
pub mod cores;
pub mod figures;
pub mod http;
pub mod instructions;
pub mod load;
pub mod python_servers;
pub mod server;

/// The options of every comparison.
#[derive(clap::Args)]
pub struct Rounds {
    /// Rounds, each with everything that is compared
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Seconds of load in each round, on each server
    #[arg(long, default_value_t = 3)]
    pub seconds: u64,
    /// Connections, with one outstanding call each.
    #[arg(long, default_value_t = 64)]
    pub connections: usize,
    /// Fail beyond the bar
    #[arg(long)]
    pub bar: bool,
}

/// An error that ends a benchmark early.
pub type Failure = Box<dyn std::error::Error>;

/// Returns the arguments without the program's name and without those that `cargo bench` adds.
pub fn words() -> Vec<String> {
    std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect()
}
