//! Makes random numbers, from seeds of the kernel.
//!
//! A generator that was seeded before a fork gives the same numbers in each child, and so does std's
//! `RandomState`. So a sequence is seeded in the process that uses it. Its numbers are for ids, not for
//! secrets: from one of them the others can be computed. [`random_bytes`] are for secrets too. Fails only on a kernel
//! without getrandom(2), or if a sandbox forbids it.

#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use nix::errno::Errno;
use nix::libc;

/// A sequence of random numbers, any of which can be computed at any time (splitmix64).
#[derive(Debug)]
pub struct RandomSequence(AtomicU64);

impl RandomSequence {
    /// Creates a sequence that is the same in every process until it is seeded.
    pub const fn unseeded() -> Self {
        RandomSequence(AtomicU64::new(0))
    }

    /// Seeds the sequence of this process. Call it after the fork.
    ///
    /// # Errors
    /// ENOSYS or EPERM.
    pub fn seed(&self) -> io::Result<()> {
        self.0.store(random_word()?, Relaxed);
        Ok(())
    }

    /// Returns the number at a place of the sequence; never 0.
    pub fn at(&self, place: u64) -> u64 {
        scatter(self.0.load(Relaxed).wrapping_add(place)).max(1)
    }
}

/// Spreads consecutive numbers over all values (the finalizer of splitmix64).
pub fn scatter(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn random_word() -> io::Result<u64> {
    random_bytes().map(u64::from_ne_bytes)
}

/// Returns random bytes of the kernel, at most 256. They are good enough for secrets. The call waits for the kernel's
/// generator, which is ready soon after the system has booted.
///
/// # Errors
/// ENOSYS or EPERM.
pub fn random_bytes<const N: usize>() -> io::Result<[u8; N]> {
    const { assert!(N <= 256) };
    let mut bytes = [0_u8; N];
    loop {
        // SAFETY: the kernel writes at most this many bytes into the array.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match Errno::result(got) {
            // A request of up to 256 bytes is never cut off (getrandom(2)).
            Ok(_) => return Ok(bytes),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_differ_by_their_seeds_and_are_the_same_at_each_look() -> io::Result<()> {
        let (one, other) = (RandomSequence::unseeded(), RandomSequence::unseeded());
        assert_eq!(one.at(1), other.at(1));
        one.seed()?;
        other.seed()?;
        let mut numbers: Vec<u64> = (0..1000)
            .flat_map(|at| [one.at(at), other.at(at)])
            .collect();
        assert_eq!(numbers[0], one.at(0));
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 2000);
        Ok(())
    }
}
