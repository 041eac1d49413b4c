//! Reads the lines of stdin in a thread.
//!
//! Each line comes with its number, from 1 on, and the number of input bytes read up to its end. The thread waits
//! while no line is taken. It ends at the end of the input, at an error, or when the receiver is dropped. If a read
//! never returns, the thread ends with the process.

use std::io::{self, BufRead};
use std::thread;

use crossbeam_channel::Sender;

use crate::error::{Error, Result};

pub(super) struct InputLine {
    /// From 1 on.
    pub(super) number: u64,
    /// The line without its end.
    pub(super) text: Vec<u8>,
    /// The number of input bytes read up to its end.
    pub(super) read: u64,
}

/// A line, or the error that ends the input.
pub(super) type Incoming = io::Result<InputLine>;

/// Starts a thread that reads stdin into `feed`.
pub(super) fn read(feed: Sender<Incoming>) -> Result<()> {
    thread::Builder::new()
        .name("stdin".into())
        .spawn(move || read_all(io::stdin().lock(), &feed))
        .map(drop)
        .map_err(|error| Error::system("start a thread for stdin", error))
}

fn read_all(mut from: impl BufRead, feed: &Sender<Incoming>) {
    let mut read = 0;
    for number in 1.. {
        let mut text = Vec::new();
        let incoming = match from.read_until(b'\n', &mut text) {
            Ok(0) => return,
            Ok(length) => {
                read += length as u64;
                if text.last() == Some(&b'\n') {
                    text.pop();
                }
                Ok(InputLine { number, text, read })
            }
            Err(error) => Err(error),
        };
        let last = incoming.is_err();
        if feed.send(incoming).is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crossbeam_channel::unbounded;

    #[test]
    fn lines_are_numbered_from_one_and_the_last_needs_no_end() {
        let (feed, lines) = unbounded();
        read_all(&b"1\n\n{\"a\": 2}"[..], &feed);
        drop(feed);
        let lines: Vec<InputLine> = lines.iter().map(|line| line.unwrap()).collect();
        let told: Vec<_> = lines
            .iter()
            .map(|line| (line.number, &line.text[..], line.read))
            .collect();
        assert_eq!(
            told,
            [(1, &b"1"[..], 2), (2, b"", 3), (3, b"{\"a\": 2}", 11)]
        );
    }
}
