//! Checks the totals that cross to a board of another version, and a stored board.
#![allow(clippy::unwrap_used)]
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;

use super::layout::{HandlerKind, NAMES, STRIDE};
use super::{BlockWriter, BoardReader, MetricsBoard, count};
use crate::protocol::Code;
use crate::sys::shared_memory::growing_file;

#[test]
fn totals_become_the_base_of_another_board() {
    let mut board = MetricsBoard::new(50).unwrap();
    let names = [("a/b", HandlerKind::Function), ("c", HandlerKind::Pool)];
    for record in [0, 3] {
        let access = board.access(record, names.into_iter(), ["p"].into_iter());
        let access = access.unwrap();
        let writer = BlockWriter::new(access.block, false);
        writer.add(&access.block.calls[1], 5);
        writer.add(&access.block.calls[NAMES], 2);
        writer.observe(&access.block.methods[1].duration, 70_000, 5);
        writer.observe(&access.block.runs[1], 60_000, 4);
        writer.raise(&access.block.methods[1].longest_ns, 70_000 + record as u64);
        writer.count_error(1, Code::Timeout as usize, true);
        writer.add(&access.block.program_exits[0][2], 1);
        writer.add(&access.block.closed[7], 4);
        writer.add(&access.block.cpu_ns[9], 11);
    }
    count(&board.header().worker_exits[3], 8);
    board.header().slots.store(10, Relaxed);
    let totals = board.totals();
    let json = serde_json::to_string(&totals).unwrap();
    let mut next = MetricsBoard::new(50).unwrap();
    // Numbers of methods differ from generation to generation.
    next.add_base(&serde_json::from_str(&json).unwrap())
        .unwrap();
    let access = next.access(2, [("c", HandlerKind::Pool)].into_iter(), ["p"].into_iter());
    assert_eq!(access.unwrap().method(0), 1);
    assert_eq!(next.totals(), totals);
    let readers = [board, next].map(|board| BoardReader::new(board.file().try_clone().unwrap()));
    let [old, new] = readers.map(Result::unwrap);
    assert_eq!(old.methods(true), new.methods(true));
    assert_eq!(new.methods(true)[1].calls, 10);
    assert_eq!(old.pool_programs(), new.pool_programs());
    assert_eq!(old.cpu_ns(), new.cpu_ns());
}

/// `tests/metrics-board-1.txt` was written by a server of version 1 of the board. Every later version reads it.
#[test]
fn a_stored_board_of_version_1_is_read_and_continued() {
    let text = include_str!("../../../tests/metrics-board-1.txt");
    let file = File::from(growing_file(STRIDE).unwrap());
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (offset, value) = line.split_once(' ').unwrap();
        let [offset, value] = [offset, value].map(|it| u64::from_str_radix(it, 16).unwrap());
        file.write_all_at(&value.to_le_bytes(), offset).unwrap();
    }
    // The master first makes the file as long as the blocks of its version.
    let board = MetricsBoard::of(file.try_clone().unwrap().into());
    let mut board = board.unwrap().unwrap();
    let reader = BoardReader::new(file.into()).unwrap();
    let methods = reader.methods(true);
    let calls: Vec<_> = methods
        .iter()
        .map(|it| (it.name.as_str(), it.calls))
        .collect();
    let expected = [
        ("cat", 0),
        ("fails", 1),
        ("ping", 3),
        ("sleep", 1),
        ("_OTHER", 1),
    ];
    assert_eq!(calls, expected);
    assert_eq!(methods[1].errors[Code::CommandFailed as usize], [0, 1]);
    assert_eq!(methods[4].errors[Code::MethodNotFound as usize], [1, 0]);
    assert_eq!(
        (methods[2].duration.count(), methods[3].kind),
        (3, Some("builtin"))
    );
    assert_eq!(methods[3].duration.quantile_us(0.5).unwrap() / 1_000, 16);
    assert_eq!(reader.sum(|block| &block.accepted), 6);
    assert_eq!(reader.pool_programs()[0].starts, 1);
    assert_eq!(reader.header().worker_starts.load(Relaxed), 1);
    let access = board.access(
        0,
        [("ping", HandlerKind::Builtin)].into_iter(),
        [].into_iter(),
    );
    let access = access.unwrap();
    BlockWriter::new(access.block, false).add(&access.block.calls[access.method(0)], 1);
    assert_eq!(reader.methods(false)[2].calls, 4);
}

#[test]
fn the_counts_of_a_method_are_read_again_after_a_further_call() {
    let mut board = MetricsBoard::new(1).unwrap();
    let access = board.access(
        0,
        [("a", HandlerKind::Function)].into_iter(),
        [].into_iter(),
    );
    let access = access.unwrap();
    let (writer, place) = (BlockWriter::new(access.block, false), access.method(0));
    let reader = BoardReader::new(board.file().try_clone().unwrap()).unwrap();
    let durations = || reader.methods(false)[0].duration.count();
    writer.observe(&access.block.methods[place].duration, 70_000, 1);
    writer.count_calls(place, 1);
    assert_eq!(durations(), 1);
    writer.observe(&access.block.methods[place].duration, 70_000, 1);
    assert_eq!(durations(), 1, "the second call is not counted yet");
    writer.count_calls(place, 1);
    assert_eq!(durations(), 2);
    writer.observe(&access.block.runs[place], 60_000, 2);
    assert_eq!(reader.methods(true)[0].run.count(), 2);
    // What belongs to no call is always read.
    writer.add(&access.block.command_cpu_ns[place], 5);
    assert_eq!(reader.methods(true)[0].command_cpu_ns, 5);
}
