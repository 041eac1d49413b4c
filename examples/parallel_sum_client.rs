//! Calls the workers of `parallel_sum`. Arguments: ADDRESS, and UP_TO, where the range of the sum ends.

use std::error::Error;

use preforkd::client::{Options, Pool};

/// The number of pieces. There are more pieces than processors, so that no processor is idle while the
/// last piece is summed.
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
