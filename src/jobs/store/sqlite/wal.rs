//! Finds out whether a write-ahead log has lost commits that were synced.
//!
//! SQLite ends its recovery at the first damaged frame, without an error. That is right for a group that was
//! being written when the power failed. But damage in front of synced groups would lose acknowledged jobs
//! silently. Each commit is synced before the next one is written, and each open begins with an empty log. So
//! behind the last good commit there is at most one other commit. If there are two, synced frames are damaged. Only an
//! intact frame counts as a commit, because a sector that was never written may have any content.
//!
//! The format is described in "WAL-mode File Format" of SQLite's documentation.

use std::io::{self, Read};

/// The length of the header of a log.
pub const HEADER: usize = 32;
const FRAME_HEADER: usize = 24;
/// The magic number without its last bit, which says how the words of the checksum are stored.
const MAGIC: u32 = 0x377f_0682;

/// What a log is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalState {
    /// All that was synced can be read.
    Whole,
    /// Frames that were synced cannot be read. The number is that of the first one, from 1; 0 is the header.
    Damaged { frame: u64 },
}

/// Reads a log to its end.
///
/// # Errors
/// It could not be read.
pub fn scan(log: &mut impl Read) -> io::Result<WalState> {
    let mut header = [0; HEADER];
    if read_up_to(log, &mut header)? < HEADER || header.iter().all(|byte| *byte == 0) {
        // It was being created.
        return Ok(WalState::Whole);
    }
    if word(&header, 0) & !1 != MAGIC {
        return without_header(log);
    }
    let is_big_endian = word(&header, 0) & 1 == 1;
    let page = word(&header, 8) as usize;
    let sums = checksum(&header[..24], (0, 0), is_big_endian);
    let is_page = (512..=65_536).contains(&page) && page.is_power_of_two();
    if sums != (word(&header, 24), word(&header, 28)) || !is_page {
        return without_header(log);
    }
    let salts = &header[16..24];
    let mut frame = vec![0; FRAME_HEADER + page];
    let (mut number, mut damaged, mut commits) = (0, None, 0);
    // The checksum of a frame continues that of the frame before it, as that frame has it.
    let mut last_stored = sums;
    while read_up_to(log, &mut frame)? == frame.len() {
        number += 1;
        let stored = (word(&frame, 16), word(&frame, 20));
        let before = std::mem::replace(&mut last_stored, stored);
        if &frame[8..16] != salts {
            // It is older than the log, which was begun again in the same file.
            damaged = damaged.or(Some(number));
            continue;
        }
        let head = checksum(&frame[..8], before, is_big_endian);
        let is_intact = checksum(&frame[FRAME_HEADER..], head, is_big_endian) == stored;
        if !is_intact {
            damaged = damaged.or(Some(number));
        } else if damaged.is_some() && word(&frame, 4) != 0 {
            // The size of the database is set in the last frame of a commit alone.
            commits += 1;
        }
    }
    Ok(match damaged {
        Some(frame) if commits > 1 => WalState::Damaged { frame },
        _ => WalState::Whole,
    })
}

/// Returns the state of a log whose header is damaged. SQLite syncs the header before it writes the first frame. So if
/// nothing is behind the header, the log was being created, and no commit is lost.
fn without_header(log: &mut impl Read) -> io::Result<WalState> {
    Ok(match read_up_to(log, &mut [0])? {
        0 => WalState::Whole,
        _ => WalState::Damaged { frame: 0 },
    })
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Continues the checksum of a log over `bytes`, whose length is a multiple of 8.
fn checksum(bytes: &[u8], (mut one, mut two): (u32, u32), is_big_endian: bool) -> (u32, u32) {
    for pair in bytes.chunks_exact(8) {
        let word = |at: usize| {
            let bytes = [pair[at], pair[at + 1], pair[at + 2], pair[at + 3]];
            match is_big_endian {
                true => u32::from_be_bytes(bytes),
                false => u32::from_le_bytes(bytes),
            }
        };
        one = one.wrapping_add(word(0)).wrapping_add(two);
        two = two.wrapping_add(word(4)).wrapping_add(one);
    }
    (one, two)
}

/// Fills the buffer unless the log ends before. Returns the number of bytes.
fn read_up_to(log: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match log.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
