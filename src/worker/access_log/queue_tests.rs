#![allow(clippy::unwrap_used)]
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

use super::super::line::LineProcess;
use super::*;
use crate::config::LogFormat;
use crate::link::metrics_board::layout::Block;
use crate::sys::shared_memory::array;

fn block() -> &'static Block {
    let (blocks, file) = array::<Block>(NonZeroUsize::MIN).unwrap();
    drop(file);
    &blocks[0]
}

fn queue(path: &Path, block: &'static Block) -> LineQueue {
    let file = AccessFile::open(path).unwrap().for_child(true).unwrap();
    let process = LineProcess {
        pid: 12,
        slot: 0,
        generation: 1,
    };
    let writer = LineWriter::new(process, LogFormat::Json);
    let sink = LineSink::File(Arc::new(AccessFile::received(file)));
    let counts = BlockWriter::new(block, false);
    LineQueue::new(LineOutput::new((sink, writer), counts, None))
}

fn lines(count: usize) -> Vec<AccessLine> {
    (0..count).map(|_| AccessLine::default()).collect()
}

fn counts(block: &Block) -> (u64, u64) {
    let access = &block.access;
    (access.written.load(Relaxed), access.lost.load(Relaxed))
}

#[test]
fn all_lines_of_several_batches_are_written_before_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    let block = block();
    let mut queue = queue(&path, block);
    queue.finish(Duration::from_secs(10));
    for count in [1, 700, 0, 300] {
        queue.send(lines(count));
    }
    queue.finish(Duration::from_secs(10));
    assert_eq!(
        std::fs::read_to_string(&path).unwrap().lines().count(),
        1001
    );
    assert_eq!(counts(block), (1001, 0));
}

#[test]
fn lines_without_room_are_lost_and_counted() {
    let directory = tempfile::tempdir().unwrap();
    let block = block();
    let mut full = queue(&directory.path().join("access.log"), block);
    full.send(lines(QUEUE + 7));
    full.finish(Duration::from_secs(10));
    assert_eq!(counts(block), (QUEUE as u64, 7));
    // There is room again.
    full.send(lines(5));
    full.finish(Duration::from_secs(10));
    assert_eq!(counts(block), (QUEUE as u64 + 5, 7));
}

#[test]
fn lines_that_cannot_be_written_are_lost_and_counted() {
    let block = block();
    let mut queue = queue(Path::new("/dev/full"), block);
    queue.send(lines(20));
    queue.finish(Duration::from_secs(10));
    assert_eq!(counts(block), (0, 20));
}
