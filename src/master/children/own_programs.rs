//! Knows the programs that belong to connections (`scope = "connection"`), for `status` and the death records.
//!
//! The sessions of a generation write their programs and the deaths of programs into memory that they share with the
//! master. Sessions are not trusted: a program counts only if its process is a child of a session. The memory of an
//! earlier generation is read as long as one of its sessions lives.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use super::generation_info::{GenerationContext, GenerationInfo};
use crate::handler::pool::Pool;
use crate::handler::pool::program_record::{ProgramRecord, ProgramState, ProgramView};
use crate::link::ids::{Generation, Pid, Slot};
use crate::master::policy::death_log::Death;
use crate::sys::process::unix_seconds;
use crate::sys::process_tree;

/// The pools with `scope = "connection"` of all generations that have sessions.
#[derive(Debug, Default)]
pub struct OwnPrograms {
    generations: Vec<PoolsOfGeneration>,
}

#[derive(Debug)]
struct PoolsOfGeneration {
    generation: Generation,
    pools: Vec<Arc<Pool>>,
    known: Rc<GenerationInfo>,
}

/// A pool and its living programs.
pub struct PoolOfConnections<'a> {
    pub name: &'a str,
    pub generation: Generation,
    pub programs: Vec<ProgramView>,
}

impl OwnPrograms {
    /// Adds the generation that serves now. Forgets the generations for which `is_used` returns false.
    pub fn add(
        &mut self,
        generation: Generation,
        context: &GenerationContext,
        is_used: impl Fn(Generation) -> bool,
    ) {
        self.generations.retain(|it| is_used(it.generation));
        let shared = context.registry.pools().len();
        let pools = &context.registry.all_pools()[shared..];
        self.generations.push(PoolsOfGeneration {
            generation,
            pools: pools.to_vec(),
            known: Rc::clone(&context.known),
        });
    }

    /// Returns the generation that was added last.
    pub fn latest(&self) -> Option<Generation> {
        self.generations.last().map(|it| it.generation)
    }

    /// Returns the deaths of programs since the last call, oldest first in each pool.
    pub fn take_deaths(&self) -> Vec<Death> {
        let now = unix_seconds();
        let pools = self.generations.iter().flat_map(|it| {
            let pools = it.pools.iter();
            pools.map(move |pool| (pool, (Slot::of_session(0), it.generation), &it.known))
        });
        pools
            .flat_map(|(pool, of, known)| known.take_deaths(pool, of, now))
            .collect()
    }

    /// Returns all pools, also those without a program. `sessions` has the pid and the generation of each session.
    pub fn pools<'a>(
        &'a self,
        sessions: &'a BTreeMap<Pid, Generation>,
    ) -> impl Iterator<Item = PoolOfConnections<'a>> {
        self.generations.iter().flat_map(move |it| {
            let is_its = |view: &ProgramView| {
                let owner = Pid(view.owner);
                let program = view.pid.filter(|_| view.state != ProgramState::Vacant);
                sessions.get(&owner) == Some(&it.generation)
                    && program.is_some_and(|pid| process_tree::parent(Pid(pid)) == Some(owner))
            };
            it.pools.iter().map(move |pool| PoolOfConnections {
                name: pool.name(),
                generation: it.generation,
                programs: (pool.records().iter().map(ProgramRecord::view))
                    .filter(is_its)
                    .collect(),
            })
        })
    }
}
