//! What the master holds of its workers, as it crosses an upgrade.
//!
//! Plain numbers: descriptors, places, pids. Whoever takes them over believes none that is not so;
//! what can't be taken over is an error, and the program before goes on.

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::keepers::{DeadWorker, KeeperState, Keepers, is_plausible_keeper};
use super::links::Links;
use super::workers::{Children, GenerationInfo, WorkerHandle};
use crate::error::{Error, Result};
use crate::link::adoption_queue::AdoptionQueue;
use crate::link::channel::MasterEnd;
use crate::link::ids::{Generation, Pid, Slot};
use crate::link::quarantine::Quarantine;
use crate::link::scoreboard::{RECORDS, STRIDE, Scoreboard};
use crate::sys::process::{self, monotonic};

/// For how long a worker may take to send a request. It takes a few microseconds unless it is stopped just
/// then.
const MAX_SENDING: Duration = Duration::from_millis(20);

/// What the master holds of its workers, as it crosses an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkersState {
    /// The scoreboard's descriptor, its number of records, and the bytes from one to the next.
    pub board: RawFd,
    /// Likewise.
    pub records: usize,
    /// Likewise.
    pub stride: usize,
    /// The adoption queue's two ends.
    pub giving: RawFd,
    /// Likewise.
    pub taking: RawFd,
    pub living: Vec<WorkerState>,
    /// What is told of them, each once.
    pub known: Vec<GenerationInfo>,
    /// Keepers of workers that are gone.
    #[serde(default)]
    pub keepers: Vec<KeeperState>,
    /// Pool processes: they serve until nothing uses them, without a master.
    #[serde(default)]
    pub pools: Option<Vec<PoolState>>,
}

/// A pool process that a program before has forked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolState {
    pub pid: i32,
    /// Its record in the scoreboard, which it writes while it lives.
    pub record: usize,
}

/// One living worker, likewise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerState {
    pub pid: i32,
    pub generation: u32,
    pub slot: u16,
    pub record: usize,
    /// Its link's descriptor, while that stands.
    pub link: Option<RawFd>,
    /// The place of what is told of it.
    pub known: usize,
}

impl Children {
    /// A child was reaped that is no worker: its record may be used again.
    pub fn release_record(&mut self, pid: Pid) {
        if let Some(record) = self.reserved.remove(&pid) {
            self.board.record(record).clear_capacity();
            self.free.insert(record);
        }
    }

    /// All pool processes, those that the program before an upgrade has forked as well.
    pub fn pool_pids(&self) -> impl Iterator<Item = Pid> {
        let living = self.living.iter();
        let pools = living.filter(|(_, worker)| worker.slot.pool().is_some());
        pools
            .map(|(pid, _)| *pid)
            .chain(self.reserved.keys().copied())
    }

    /// From here on no worker sends a request, and all that were sent can be read: the next program may
    /// be of a version that does not know them.
    pub fn forbid_requests(&self) {
        for worker in self.living.values() {
            let end = monotonic() + MAX_SENDING;
            while !worker.record.forbid_requests() && monotonic() < end {
                thread::yield_now();
            }
            worker.record.cut_off_requests();
        }
    }

    /// The next program could not be executed, or this is the next program: requests are read.
    pub fn allow_requests(&self) {
        for worker in self.living.values() {
            worker.record.allow_requests();
        }
    }

    /// What the program after this one has to know.
    pub fn export(&self) -> WorkersState {
        let mut known: Vec<&Rc<GenerationInfo>> = Vec::new();
        let mut living = Vec::new();
        let mut pools: Vec<PoolState> = (self.reserved.iter())
            .map(|(pid, &record)| PoolState { pid: pid.0, record })
            .collect();
        for (pid, worker) in &self.living {
            if worker.slot.pool().is_some() {
                pools.push(PoolState {
                    pid: pid.0,
                    record: worker.record_index,
                });
                continue;
            }
            let there = known.iter().position(|one| Rc::ptr_eq(one, &worker.known));
            living.push(WorkerState {
                pid: pid.0,
                generation: worker.generation.0,
                slot: worker.slot.0,
                record: worker.record_index,
                link: worker.link.as_ref().map(AsRawFd::as_raw_fd),
                known: there.unwrap_or(known.len()),
            });
            if there.is_none() {
                known.push(&worker.known);
            }
        }
        WorkersState {
            board: self.board.file().as_raw_fd(),
            records: RECORDS,
            stride: STRIDE,
            giving: self.adoption.tx.as_raw_fd(),
            taking: self.adoption.rx.as_raw_fd(),
            living,
            known: known.into_iter().map(|known| (**known).clone()).collect(),
            keepers: self.keepers.export(),
            pools: Some(pools),
        }
    }

    /// Whether the scoreboard of the program before this one has this version's form.
    ///
    /// # Errors
    /// If not.
    pub fn fits(state: &WorkersState) -> Result<()> {
        if (state.records, state.stride) == (RECORDS, STRIDE) {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "the scoreboard has {} records of {} bytes, and this version {RECORDS} of {STRIDE}; \
             restart the server to get from one to the other",
            state.records, state.stride
        )))
    }

    /// What the program before this one has left; `take` gives the descriptors. To be called once it
    /// is known which children are workers.
    ///
    /// # Errors
    /// Those of `take`; a scoreboard of another form; a record that is none, or two workers'.
    pub fn import(
        state: WorkersState,
        mut take: impl FnMut(RawFd) -> Result<OwnedFd>,
    ) -> Result<Self> {
        let refuse = |text: String| Error::Refused(text);
        Children::fits(&state)?;
        let board = Scoreboard::of(take(state.board)?)
            .map_err(|error| Error::system("map the scoreboard", error))?;
        let known: Vec<Rc<GenerationInfo>> = state.known.into_iter().map(Rc::new).collect();
        let mut free: BTreeSet<usize> = (0..RECORDS).collect();
        let mut claim = |index: usize| free.take(&index);
        let quarantine = Quarantine::new().map_err(|error| Error::system("share memory", error))?;
        let mut keepers = Keepers::default();
        for keeper in state.keepers {
            let (pid, worker) = (Pid(keeper.pid), Pid(keeper.worker));
            // One that is no child any more was reaped by a program that gave up.
            if is_plausible_keeper(pid) && claim(keeper.record).is_some() {
                // What ran in its worker was judged before, or is by nobody: the reload that
                // follows an upgrade releases what is in quarantine.
                let left = DeadWorker::new(
                    worker,
                    (board.record(keeper.record), keeper.record),
                    quarantine.evidence(keeper.record),
                    Rc::default(),
                    false,
                );
                keepers.import(pid, left);
            }
        }
        let mut reserved = HashMap::new();
        for pool in state.pools.into_iter().flatten() {
            let pid = Pid(pool.pid);
            // One that is no child any more writes no record.
            if process::is_child(pid) && claim(pool.record).is_some() {
                reserved.insert(pid, pool.record);
            }
        }
        let mut living = HashMap::new();
        for worker in state.living {
            let pid = Pid(worker.pid);
            let (Some(_), Some(known)) = (claim(worker.record), known.get(worker.known)) else {
                return Err(refuse(format!("worker {pid} has no record of its own")));
            };
            let link = match worker.link {
                Some(number) => Some(MasterEnd::of(take(number)?)),
                None => None,
            };
            let before = living.insert(
                pid,
                WorkerHandle {
                    generation: Generation(worker.generation),
                    known: Rc::clone(known),
                    record: board.record(worker.record),
                    record_index: worker.record,
                    // Not the memory that it writes into: that does not cross.
                    stuck: quarantine.stuck(worker.record),
                    link,
                    is_unheard: false,
                    slot: Slot(worker.slot),
                    // The pool processes of its generation have no link to this program.
                    is_ready: true,
                    pool: None,
                    // No verdict is open.
                    startup_log: None,
                    keeper_is_lost: Cell::new(false),
                },
            );
            if before.is_some() {
                return Err(refuse(format!("worker {pid} is there twice")));
            }
        }
        // Those that the program before this one did not know of.
        for (index, record) in board.records().iter().enumerate() {
            let pid = Pid(record.pool_pid.load(Relaxed));
            let is_pool = pid.0 > 0 && !living.contains_key(&pid) && process::is_child(pid);
            if is_pool && claim(index).is_some() {
                reserved.insert(pid, index);
            }
        }
        Ok(Children {
            board,
            free,
            living,
            reserved,
            links: Links::default(),
            keepers,
            quarantine,
            adoption: AdoptionQueue {
                tx: Rc::new(take(state.giving)?),
                rx: Rc::new(take(state.taking)?),
            },
        })
    }
}
