//! What the measurements share: servers to measure, the load on them, and the figures.
//!
//! Each measurement is a crate of its own and uses a part of this.
#![allow(dead_code)]

pub mod bare;
pub mod figures;
pub mod load;
pub mod server;

/// What ends a measurement early.
pub type Failure = Box<dyn std::error::Error>;

/// The words after the program's name, without what `cargo bench` adds on its own.
pub fn words() -> Vec<String> {
    std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect()
}
