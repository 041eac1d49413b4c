//! Runs only the bare epoll server: `cargo bench --bench bare_epoll -- serve ADDRESS WORKERS`.
#![allow(unsafe_code, clippy::print_stderr)]

mod support;

use support::{Failure, bare, load, words};

fn main() -> Result<(), Failure> {
    let words = words();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", address, workers] => {
            let answer = load::frame(bare::PONG);
            bare::serve(address.parse()?, workers.parse()?, &answer)
        }
        _ => {
            eprintln!("usage: cargo bench --bench bare_epoll -- serve ADDRESS WORKERS");
            Ok(())
        }
    }
}
