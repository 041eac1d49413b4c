//! What the measurements share: servers to measure, the load on them, and the figures.
//!
//! Each measurement is a crate of its own and uses a part of this.
#![allow(dead_code)]

pub mod bare;
pub mod cores;
pub mod figures;
pub mod instructions;
pub mod load;
pub mod server;

/// What every comparison can be told.
#[derive(clap::Args)]
pub struct Rounds {
    /// Rounds, each with all that is compared.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Seconds of load in each round, on each of them.
    #[arg(long, default_value_t = 3)]
    pub seconds: u64,
    /// Connections, with one outstanding call each.
    #[arg(long, default_value_t = 64)]
    pub connections: usize,
    /// Fail beyond the bar.
    #[arg(long)]
    pub bar: bool,
}

/// What ends a measurement early.
pub type Failure = Box<dyn std::error::Error>;

/// The words after the program's name, without what `cargo bench` adds on its own.
pub fn words() -> Vec<String> {
    std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect()
}
