//! Calls the workers of `parallel_sum`: ADDRESS, and up to where primes are summed.

use std::error::Error;

use preforkd::client::{Options, Pool};

/// Pieces: more than there are processors, so that none waits for the last one.
const PIECES: u64 = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [address, to] = &words[..] else {
        return Err("usage: parallel_sum_client ADDRESS UP_TO".into());
    };
    let to: u64 = to.parse()?;
    let cut = |piece: u64| to * piece / PIECES;
    let pool = Pool::new(address, Options::default())?;
    let mut sum = 0;
    for piece in pool.imap_unordered("sum_primes", (0..PIECES).map(|at| (cut(at), cut(at + 1)))) {
        let (_, part): (_, Result<u64, _>) = piece;
        sum += part?;
    }
    pool.join();
    #[allow(clippy::print_stdout)]
    {
        println!("{sum}");
    }
    Ok(())
}
