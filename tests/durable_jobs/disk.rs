//! Models a disk below the files of a store, and what it may hold after a power loss.
//!
//! What was synced is on the disk. Of later changes the disk holds any part:
//!
//! - Each sector of 512 bytes of a file has the content that it had at some time since the last sync. So has the length.
//! - A sector that a file got by a longer length alone is zero, or has any bytes.
//! - What was cut off is gone with the length, and not before.
//! - Of the changes of each name since the directory was synced, the disk knows the first ones.

use crate::support::Dice;

/// The files, in the order of recorder.c. The directory stands behind them.
pub const NAMES: [&str; 3] = ["jobs.db", "jobs.db-wal", "jobs.db-journal"];
pub const DATABASE: usize = 0;
pub const LOG: usize = 1;
const DIRECTORY: usize = 3;

const SECTOR: usize = 512;

/// A change of a file.
#[derive(Debug, Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Cut(usize),
}

/// A record of recorder.c.
#[derive(Debug, Clone)]
pub enum Record {
    Write(usize, usize, Vec<u8>),
    Cut(usize, usize),
    Sync(usize),
    /// The file was opened, and created if it did not exist.
    Create(usize),
    Unlink(usize),
    /// A client appended this after an answer. The number says what was answered.
    Answer(usize, Vec<[u8; 16]>),
}

/// The length of the head of a record.
const HEAD: usize = 16;

/// Returns the bytes of a record of a client.
pub fn answer(kind: usize, jobs: &[[u8; 16]]) -> Vec<u8> {
    let mut bytes = vec![b'A', kind as u8, 0, 0];
    bytes.extend((jobs.len() as u32 * 16).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(jobs.concat());
    bytes
}

/// Reads all records.
pub fn records(mut bytes: &[u8]) -> Vec<Record> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_at(HEAD);
        let file = usize::from(head[1]);
        let length = u32::from_ne_bytes(head[4..8].try_into().unwrap()) as usize;
        let offset = u64::from_ne_bytes(head[8..].try_into().unwrap()) as usize;
        let (body, rest) = rest.split_at(length);
        bytes = rest;
        records.push(match head[0] {
            b'W' => Record::Write(file, offset, body.to_vec()),
            b'T' => Record::Cut(file, offset),
            b'S' => Record::Sync(file),
            b'C' => Record::Create(file),
            b'U' => Record::Unlink(file),
            b'A' => {
                let jobs = body.chunks(16).map(|job| job.try_into().unwrap());
                Record::Answer(file, jobs.collect())
            }
            op => panic!("the model has no operation {:?}", char::from(op)),
        });
    }
    records
}

/// A file, whatever its name is.
#[derive(Debug, Clone, Default)]
struct Inode {
    synced: Vec<u8>,
    /// What was changed since the last sync.
    changes: Vec<Change>,
}

/// The content of each file; `None` if its name does not exist.
pub type Image = [Option<Vec<u8>>; 3];

/// How much of the later changes is on the disk.
#[derive(Debug, Clone, Copy)]
pub enum Loss {
    /// All of it.
    Nothing,
    /// None of it.
    Everything,
    /// The changes are on the disk in their order, and the last one is torn.
    Tail,
    /// Each sector has a time of its own.
    Sectors,
    /// A few sectors were left out.
    FewSectors,
    /// A few sectors alone were written.
    MostSectors,
}

const LOSSES: [Loss; 6] = [
    Loss::Nothing,
    Loss::Everything,
    Loss::Tail,
    Loss::Sectors,
    Loss::FewSectors,
    Loss::MostSectors,
];

/// The disk after some of the records.
#[derive(Default)]
pub struct Disk {
    inodes: Vec<Inode>,
    names: [Option<usize>; 3],
    synced_names: [Option<usize>; 3],
    /// The changes of names since the directory was synced.
    name_changes: Vec<(usize, Option<usize>)>,
}

impl Disk {
    /// Does what a record says.
    pub fn apply(&mut self, record: &Record) {
        match record {
            Record::Write(file, offset, bytes) => {
                self.change(*file, Change::Write(*offset, bytes.clone()));
            }
            Record::Cut(file, length) => self.change(*file, Change::Cut(*length)),
            Record::Sync(DIRECTORY) => {
                self.synced_names = self.names;
                self.name_changes.clear();
            }
            Record::Sync(file) => {
                let inode = &mut self.inodes[self.names[*file].expect("it has a name")];
                for change in std::mem::take(&mut inode.changes) {
                    apply(&mut inode.synced, &change, 0);
                }
            }
            Record::Create(file) if self.names[*file].is_none() => {
                self.inodes.push(Inode::default());
                self.name(*file, Some(self.inodes.len() - 1));
            }
            Record::Unlink(file) => self.name(*file, None),
            Record::Create(_) | Record::Answer(..) => {}
        }
    }

    fn change(&mut self, file: usize, change: Change) {
        let inode = self.names[file].expect("a file that is written has a name");
        self.inodes[inode].changes.push(change);
    }

    fn name(&mut self, file: usize, inode: Option<usize>) {
        self.names[file] = inode;
        self.name_changes.push((file, inode));
    }

    /// Returns what a disk may hold if the power fails now.
    pub fn after_power_loss(&self, loss: Loss, dice: &mut Dice) -> Image {
        let mut names = self.synced_names;
        for (file, name) in names.iter_mut().enumerate() {
            let changes = self.name_changes.iter().filter(|(it, _)| *it == file);
            let changes: Vec<_> = changes.collect();
            let cut = match loss {
                Loss::Nothing => changes.len(),
                Loss::Everything => 0,
                _ => dice.roll(changes.len() + 1),
            };
            if let Some((_, last)) = changes[..cut].last() {
                *name = *last;
            }
        }
        let is_dirty = dice.roll(4) == 0;
        names.map(|inode| Some(content(&self.inodes[inode?], loss, is_dirty, dice)))
    }

    /// Returns what the system shows while nothing fails.
    pub fn now(&self) -> Image {
        let mut dice = Dice::new(1);
        self.names.map(|inode| {
            Some(content(
                &self.inodes[inode?],
                Loss::Nothing,
                false,
                &mut dice,
            ))
        })
    }
}

/// Returns a random loss.
pub fn any_loss(dice: &mut Dice) -> Loss {
    dice.pick(&LOSSES)
}

/// Does a change, and fills a part that the file gets in front of it with `filler`.
fn apply(bytes: &mut Vec<u8>, change: &Change, filler: u8) {
    match change {
        Change::Write(offset, written) => {
            let end = offset + written.len();
            if bytes.len() < end {
                bytes.resize(end, filler);
            }
            bytes[*offset..end].copy_from_slice(written);
        }
        Change::Cut(length) => bytes.resize(*length, filler),
    }
}

/// Returns the content of a file on the disk. If `is_dirty`, sectors that were never written have other bytes than 0.
fn content(inode: &Inode, loss: Loss, is_dirty: bool, dice: &mut Dice) -> Vec<u8> {
    let mut bytes = inode.synced.clone();
    let changes = &inode.changes[..];
    let all = changes.len();
    match loss {
        Loss::Everything => {}
        Loss::Nothing => changes.iter().for_each(|it| apply(&mut bytes, it, 0)),
        Loss::Tail => {
            let cut = dice.roll(all + 1);
            changes[..cut]
                .iter()
                .for_each(|it| apply(&mut bytes, it, 0));
            if let Some(Change::Write(offset, written)) = changes.get(cut) {
                // Up to the end of a sector.
                let end = (offset / SECTOR + dice.roll(9)) * SECTOR;
                let torn = &written[..end.saturating_sub(*offset).min(written.len())];
                if !torn.is_empty() {
                    apply(&mut bytes, &Change::Write(*offset, torn.to_vec()), 0);
                }
            }
        }
        Loss::Sectors | Loss::FewSectors | Loss::MostSectors => {
            let mut cut = || match loss {
                Loss::FewSectors if dice.roll(20) > 0 => all,
                Loss::MostSectors if dice.roll(20) > 0 => 0,
                _ => dice.roll(all + 1),
            };
            // A file is shortened as a whole, with its length.
            let last = cut();
            let length = lengths(inode)[last];
            let longest = lengths(inode).into_iter().max().unwrap_or(0);
            let filler = if is_dirty { 0xA5 } else { 0 };
            bytes.resize(longest.div_ceil(SECTOR) * SECTOR, filler);
            let cuts: Vec<usize> = (0..bytes.len() / SECTOR).map(|_| cut()).collect();
            for (number, change) in changes.iter().enumerate() {
                let (offset, written) = match change {
                    Change::Write(offset, written) => (*offset, written),
                    Change::Cut(length) if number < last => {
                        bytes[*length..].fill(0);
                        continue;
                    }
                    Change::Cut(_) => continue,
                };
                let end = offset + written.len();
                let sectors = cuts.iter().enumerate().take(end.div_ceil(SECTOR));
                for (sector, cut) in sectors.skip(offset / SECTOR) {
                    if *cut > number {
                        let from = offset.max(sector * SECTOR);
                        let to = end.min((sector + 1) * SECTOR);
                        bytes[from..to].copy_from_slice(&written[from - offset..to - offset]);
                    }
                }
            }
            bytes.truncate(length);
        }
    }
    bytes
}

/// Returns the length of a file after each number of its changes.
fn lengths(inode: &Inode) -> Vec<usize> {
    let mut length = inode.synced.len();
    let mut lengths = vec![length];
    for change in &inode.changes {
        length = match change {
            Change::Write(offset, written) => length.max(offset + written.len()),
            Change::Cut(cut) => *cut,
        };
        lengths.push(length);
    }
    lengths
}

#[test]
fn a_disk_holds_what_was_synced_and_any_part_of_later_writes() {
    let mut disk = Disk::default();
    let write = |at, byte, length| Record::Write(DATABASE, at, vec![byte; length]);
    for record in [
        Record::Create(DATABASE),
        write(0, 1, 2 * SECTOR),
        Record::Sync(DATABASE),
    ] {
        disk.apply(&record);
    }
    let mut dice = Dice::new(7);
    let nameless = (0..100).filter(|_| {
        let image = disk.after_power_loss(Loss::Tail, &mut dice);
        image[DATABASE].is_none()
    });
    assert!(
        (1..100).contains(&nameless.count()),
        "the directory is not synced"
    );
    disk.apply(&Record::Sync(DIRECTORY));
    disk.apply(&write(0, 2, 3 * SECTOR));
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..1_000 {
        let loss = any_loss(&mut dice);
        let image = disk.after_power_loss(loss, &mut dice);
        let bytes = image[DATABASE].clone().expect("its name is synced");
        assert!(
            bytes.len() == 2 * SECTOR || bytes.len() == 3 * SECTOR || matches!(loss, Loss::Tail)
        );
        let sectors = bytes.chunks(SECTOR).map(|sector| {
            assert!(
                sector.iter().all(|byte| *byte == sector[0]),
                "a sector is torn"
            );
            sector[0]
        });
        seen.insert(sectors.collect::<Vec<u8>>());
    }
    for possible in [
        [1, 1].as_slice(),
        &[2, 1],
        &[1, 2],
        &[2, 2, 2],
        &[1, 2, 0],
        &[2, 1, 0xA5],
    ] {
        assert!(seen.contains(possible), "{possible:?} of {seen:?}");
    }
    disk.apply(&Record::Sync(DATABASE));
    let image = disk.after_power_loss(Loss::Everything, &mut dice);
    assert_eq!(image[DATABASE].as_deref(), Some(&[2; 3 * SECTOR][..]));
    assert_eq!(disk.now(), image);
    disk.apply(&Record::Cut(DATABASE, 0));
    for _ in 0..100 {
        let loss = any_loss(&mut dice);
        let image = disk.after_power_loss(loss, &mut dice);
        let bytes = image[DATABASE].clone().expect("its name is synced");
        assert!(
            bytes.is_empty() || bytes == [2; 3 * SECTOR],
            "half of it is cut"
        );
    }
}
