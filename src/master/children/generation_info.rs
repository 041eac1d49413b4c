//! Holds what the workers of one generation are forked with, and what the master reports about them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::Settings;
use crate::handler::job_attempt::recorded_job;
use crate::handler::pool::Pool;
use crate::handler::pool::program_deaths::ProgramDeath;
use crate::handler::registry::Registry;
use crate::link::ids::{Generation, Slot};
use crate::link::scoreboard::RecordedCall;
use crate::logging::AccessFile;
use crate::master::endpoints::listeners::Listener;
use crate::master::policy::death_log::{Death, DeathReason, clean, clean_text};
use crate::master::policy::event::LastCall;
use crate::protocol::control::DeathKind;
use crate::worker_init::JobsInstance;

/// What the children of one generation are forked with.
#[derive(Debug, Clone)]
pub struct GenerationContext {
    pub settings: Rc<Settings>,
    pub registry: Arc<Registry>,
    pub listeners: Vec<Rc<Listener>>,
    /// The listener of the observer, if there is one.
    pub observe: Vec<Rc<Listener>>,
    /// What the master reports about its children.
    pub known: Rc<GenerationInfo>,
    /// The file of the access log, if there is one.
    pub access_file: Option<Arc<AccessFile>>,
}

impl GenerationContext {
    /// Returns a text about the listeners that were open `before` and are closed now; `None` if there are none.
    pub fn closed_listeners(&self, before: &Self) -> Option<String> {
        let is_open = |address: &&str| self.listeners.iter().any(|it| it.bound == *address);
        let before = before.listeners.iter().map(|it| it.bound.as_str());
        let closed: Vec<&str> = before.filter(|it| !is_open(it)).collect();
        (!closed.is_empty()).then(|| format!("no longer listening at {}", closed.join(", ")))
    }

    /// Returns a text about the address of the observer; empty if there is none.
    pub fn observer_text(&self) -> String {
        let text = |listener: &Rc<Listener>| format!("; the observer serves {}", listener.bound);
        self.observe.first().map_or_else(String::new, text)
    }

    /// Returns the file of the access log for the child in a slot; `None` if it writes no lines there.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn access_file_of(&self, slot: Slot) -> io::Result<Option<Arc<AccessFile>>> {
        let writes = slot.is_worker() || slot.acceptor().is_some();
        let Some(file) = self.access_file.as_ref().filter(|_| writes) else {
            return Ok(None);
        };
        // The sessions of an acceptor share a descriptor, and must not read what others have written.
        let own = file.for_child(slot.is_worker())?;
        Ok(Some(Arc::new(AccessFile::received(own))))
    }

    /// Returns what the child in a slot needs for durable jobs: the id of this server run and the lock of the store.
    /// `None` if the child has no part in jobs. An acceptor and its sessions run no attempts.
    pub fn instance_of(
        &self,
        slot: Slot,
        instance: Option<&Arc<JobsInstance>>,
    ) -> Option<Arc<JobsInstance>> {
        let has_part = self.settings.jobs.is_some() && slot.acceptor().is_none();
        instance.filter(|_| has_part).cloned()
    }

    /// Returns the listeners from which the child in a slot accepts.
    pub fn listeners_of(&self, slot: Slot) -> Vec<Rc<OwnedFd>> {
        let listeners = self.accepted_by(slot);
        let sockets = listeners.map(|(_, listener)| Rc::clone(&listener.fd));
        sockets.collect()
    }

    /// Returns the listeners from which the child in a slot accepts, with their indices in the configuration.
    pub fn accepted_by(&self, slot: Slot) -> impl Iterator<Item = (usize, &Listener)> {
        let isolated = self.settings.isolated();
        let own = slot
            .acceptor()
            .map(|number| isolated.map(|(index, _)| index).nth(number));
        let is_shared = move |index: usize| {
            let listen = self.settings.listen.get(index);
            listen.is_none_or(|listen| listen.isolation.is_none())
        };
        let listeners = self.listeners.iter().enumerate();
        let listeners = listeners.map(|(index, listener)| (index, &**listener));
        listeners.filter(move |(index, _)| match own {
            Some(own) => own == Some(*index),
            None => slot.is_worker() && is_shared(*index),
        })
    }
}

/// The contexts of earlier generations, without listeners. They are needed when a pool process of an
/// earlier generation has to be replaced.
#[derive(Debug, Default)]
pub struct OldContexts {
    /// The contexts by the number of the generation that followed each.
    contexts: BTreeMap<Generation, Rc<GenerationContext>>,
}

impl OldContexts {
    /// Returns the context of a generation, if it is an earlier one.
    pub fn of(&self, generation: Generation) -> Option<&Rc<GenerationContext>> {
        let mut later = self.contexts.range(generation.next()..);
        later.next().map(|(_, context)| context)
    }

    /// Adds the context that served until the generation `after` replaced it. For each context, calls
    /// `is_used` with the generation that replaced it. Drops the context if that returns false.
    pub fn add(
        &mut self,
        after: Generation,
        context: &GenerationContext,
        is_used: impl Fn(Generation) -> bool,
    ) {
        let context = GenerationContext {
            listeners: Vec::new(),
            observe: Vec::new(),
            access_file: None,
            ..context.clone()
        };
        self.contexts.insert(after, Rc::new(context));
        self.contexts.retain(|after, _| is_used(*after));
    }
}

/// The contexts of all generations.
#[derive(Debug)]
pub struct Contexts {
    pub serving: Rc<GenerationContext>,
    /// The context of the generation that a reload starts.
    pub next: Option<Rc<GenerationContext>>,
    pub old: OldContexts,
    /// This run of the server, as its job store knows it. `Some` from the first generation with `[jobs]` on.
    pub jobs: Option<Arc<JobsInstance>>,
}

impl Contexts {
    pub fn new(serving: GenerationContext, jobs: Option<JobsInstance>) -> Self {
        Contexts {
            serving: Rc::new(serving),
            next: None,
            old: OldContexts::default(),
            jobs: jobs.map(Arc::new),
        }
    }

    /// Returns the context of a generation; `serving` is the serving one.
    pub fn of(&self, generation: Generation, serving: Generation) -> &Rc<GenerationContext> {
        let next = self.next.as_ref().filter(|_| generation > serving);
        let known = next.or_else(|| self.old.of(generation));
        known.unwrap_or(&self.serving)
    }
}

/// What the master reports about the workers of one generation, as long as one of them lives. It is a copy of a few
/// values, because after an upgrade the whole configuration may be of another version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationInfo {
    /// The names of the methods, by their numbers in the scoreboard.
    pub methods: Vec<String>,
    /// The number of handler threads of each worker.
    pub threads: usize,
    /// The number of programs in each worker. Always 0 in this version, because pools have processes of their own.
    #[serde(default)]
    pub programs: usize,
    /// The name and the number of programs of each pool, by the numbers of the pool slots.
    #[serde(default)]
    pub pools: Vec<(String, usize)>,
    /// The address and the limit of connections of each isolated listener, by the numbers of the acceptor slots.
    #[serde(default)]
    pub isolated: Vec<(String, usize)>,
}

impl GenerationInfo {
    /// Collects what can be reported about a configuration.
    pub fn of(settings: &Settings, registry: &Registry, listeners: &[Rc<Listener>]) -> Rc<Self> {
        let methods = registry.methods().iter();
        Rc::new(GenerationInfo {
            methods: methods.map(|method| method.name.clone()).collect(),
            threads: settings.workers.threads,
            programs: 0,
            pools: registry
                .pools()
                .iter()
                .map(|pool| (pool.name().to_owned(), pool.processes()))
                .collect(),
            isolated: (settings.isolated())
                .filter_map(|(index, isolation)| {
                    Some((listeners.get(index)?.bound.clone(), isolation.processes))
                })
                .collect(),
        })
    }

    /// Takes the deaths of a pool's programs that processes of this generation have reported, oldest first. `slot`
    /// and `generation` are those of the process, `now` is the wall clock in seconds since 1970.
    pub fn take_deaths(
        &self,
        pool: &Pool,
        (slot, generation): (Slot, Generation),
        now: u64,
    ) -> Vec<Death> {
        let death = |program: ProgramDeath| Death {
            kind: DeathKind::Program,
            name: Some(pool.name().to_owned()),
            slot,
            pid: program.pid,
            generation,
            how: program.exit,
            uptime: program.uptime_ms,
            method: (program.method).map(|method| clean(self.method(method))),
            call: program.call,
            job: recorded_job(program.job),
            rss_bytes: program.rss_bytes,
            reason: DeathReason::Text(clean_text(&program.reason)),
            at: program.at.min(now),
        };
        pool.take_deaths().into_iter().map(death).collect()
    }

    /// Returns what a process of this generation ran last.
    pub fn last_call(&self, last: RecordedCall) -> LastCall {
        LastCall {
            method: self.method(last.method).to_owned(),
            call: last.call,
            job: recorded_job(last.job),
        }
    }

    /// Returns the number of the pool with this name.
    pub fn pool_number(&self, name: &str) -> Option<usize> {
        self.pools.iter().position(|(pool, _)| pool == name)
    }

    /// Returns a text about the methods that were served `before` and are not served any more; `None` if
    /// there are none.
    pub fn removed_methods(&self, before: &GenerationInfo) -> Option<String> {
        let before = before.methods.iter();
        let gone: Vec<_> = before.filter(|name| !self.methods.contains(name)).collect();
        let shown: Vec<&str> = gone.iter().take(10).map(|name| name.as_str()).collect();
        let more = match gone.len() - shown.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let names = shown.join(", ");
        (!gone.is_empty()).then(|| format!("no longer served: {names}{more}"))
    }

    /// Returns the name of a method by its number; a question mark if there is none.
    pub fn method(&self, number: usize) -> &str {
        self.methods.get(number).map_or("?", String::as_str)
    }
}
