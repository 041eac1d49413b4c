//! Holds the pools whose programs run below this process: in a pool process its own pool, in a session the pools that
//! belong to its connection.
//!
//! The program of a connection is started for the first call. If it ends, no other program is started: its state is
//! lost, so the connection must be closed.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::dispatcher::{Dispatcher, Place};
use super::entry::ServingProgram;
use super::{Hurry, Pools, Stage};
use crate::handler::call_state::{CallKey, Done, HandlerCall, Reports};
use crate::handler::registry::Registry;
use crate::sys::waker::Waker;

/// The pools of this process.
#[derive(Debug)]
pub struct ProcessPools {
    /// The pool of a pool process. In other processes it has no program.
    main: Pools,
    /// The pools of the connection that were started, with their numbers in the registry.
    own: Vec<(usize, Pools)>,
    registry: Arc<Registry>,
    reports: Reports,
    waker: Arc<Waker>,
}

impl ProcessPools {
    /// Starts the programs of the pool with this number, or none without a number.
    ///
    /// # Errors
    /// Those of [`Pools::start`].
    pub fn start(
        registry: &Arc<Registry>,
        pool: Option<usize>,
        reports: &Reports,
        waker: &Arc<Waker>,
    ) -> io::Result<Self> {
        Ok(ProcessPools {
            main: Pools::start(registry, pool, reports, waker)?,
            own: Vec::new(),
            registry: Arc::clone(registry),
            reports: reports.clone(),
            waker: Arc::clone(waker),
        })
    }

    /// Returns the pool of a pool process.
    pub fn main(&self) -> &Pools {
        &self.main
    }

    /// Returns the pool of a pool process, to be changed.
    pub fn main_mut(&mut self) -> &mut Pools {
        &mut self.main
    }

    /// Returns the numbers of the pools of a connection.
    pub fn numbers(&self) -> std::ops::Range<usize> {
        self.registry.pools().len()..self.registry.all_pools().len()
    }

    /// Starts the program of a pool of the connection, unless it was started before.
    ///
    /// # Errors
    /// Those of [`Pools::start`].
    pub fn start_own(&mut self, number: usize) -> io::Result<()> {
        if !self.has_started(number) {
            self.registry.all_pools()[number].claim_record();
            let pools = Pools::start(&self.registry, Some(number), &self.reports, &self.waker)?;
            self.own.push((number, pools));
        }
        Ok(())
    }

    fn has_started(&self, number: usize) -> bool {
        self.own.iter().any(|(it, _)| *it == number)
    }

    /// Returns whether a program keeps, or kept, state for the connection.
    pub fn has_own(&self) -> bool {
        !self.own.is_empty()
    }

    /// Returns the number of calls that the program of a pool may have now; 0 if no program serves.
    pub fn available_own(&self, number: usize) -> usize {
        let found = self.own.iter().find(|(it, _)| *it == number);
        let serving = found.filter(|(_, pools)| !is_over(pools));
        serving.map_or(0, |(_, pools)| pools.available())
    }

    /// Gives a call to the program of a pool that was started.
    pub fn put_own(&mut self, number: usize, call: HandlerCall) {
        if let Some((_, pools)) = self.own.iter_mut().find(|(it, _)| *it == number) {
            pools.put(call);
        }
    }

    /// Returns a pool whose program has ended: its number, its name, and the reason if it was never ready.
    pub fn ended(&self) -> Option<(usize, &str, Option<String>)> {
        let (number, pools) = self.own.iter().find(|(_, pools)| is_over(pools))?;
        let reason = match pools.stage() {
            Stage::Failed(reason) => Some(reason),
            Stage::Starting | Stage::Ready => None,
        };
        Some((*number, self.registry.all_pools()[*number].name(), reason))
    }

    fn all(&self) -> impl Iterator<Item = &Pools> {
        std::iter::once(&self.main).chain(self.own.iter().map(|(_, pools)| pools))
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Pools> {
        std::iter::once(&mut self.main).chain(self.own.iter_mut().map(|(_, pools)| pools))
    }

    /// As [`Pools::attend`]. A pool of a connection has one program, whose number is the index of the pool in `own`.
    pub fn attend(&mut self, program: usize) {
        match self.own.get_mut(program) {
            Some((_, pools)) => pools.attend(0),
            None => self.main.attend(program),
        }
    }

    /// As [`Pools::settle`].
    pub fn settle(
        &mut self,
        mut watch: impl FnMut(usize, Option<(BorrowedFd<'_>, bool)>) -> io::Result<()>,
    ) {
        self.main.settle(&mut watch);
        for (place, (_, pools)) in self.own.iter_mut().enumerate() {
            pools.settle(|_, wire| watch(place, wire));
        }
    }

    /// As [`Pools::receive_events`].
    pub fn receive_events(&mut self) {
        self.all_mut().for_each(Pools::receive_events);
    }

    /// As [`Pools::has_done`].
    pub fn has_done(&self) -> bool {
        self.all().any(Pools::has_done)
    }

    /// As [`Pools::take_done`].
    pub fn take_done(&mut self, done: &mut Vec<Done>) {
        self.all_mut().for_each(|pools| pools.take_done(done));
    }

    /// Returns the program that runs a call.
    pub fn program_of(&self, key: CallKey) -> Option<ServingProgram> {
        let mut places =
            (self.all()).flat_map(|pools| pools.queue.iter().flat_map(|it| &it.places));
        places.find_map(|place| match place {
            Place::Taken(connection) => connection.runs(key),
            Place::Empty | Place::Asleep | Place::Down(..) | Place::Vacant => None,
        })
    }

    /// As [`Pools::next_overdue`].
    pub fn next_overdue(&self) -> Option<u64> {
        self.all().filter_map(Pools::next_overdue).min()
    }

    /// As [`Pools::give_up`].
    pub fn give_up(&mut self) {
        self.all_mut().for_each(Pools::give_up);
    }

    /// As [`Pools::release_all_programs`].
    pub fn release_all_programs(&mut self) {
        self.all_mut().for_each(Pools::release_all_programs);
    }

    /// As [`Pools::leave`].
    pub fn leave(&mut self, hurry: Hurry, mut beat: impl FnMut()) {
        self.all_mut()
            .for_each(|pools| pools.leave(hurry, &mut beat));
    }
}

/// Returns whether no program serves and none will be started.
fn is_over(pools: &Pools) -> bool {
    pools.queue.as_ref().is_some_and(Dispatcher::is_vacant)
}
