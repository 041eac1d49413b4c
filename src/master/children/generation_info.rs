//! Holds what the workers of one configuration are started from, and what the master tells of them.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::Settings;
use crate::handler::registry::Registry;
use crate::link::ids::Generation;
use crate::master::endpoints::listeners::Listener;

/// What the workers of one configuration are started from.
#[derive(Debug)]
pub struct GenerationContext {
    /// The configuration.
    pub settings: Rc<Settings>,
    /// Its methods.
    pub registry: Arc<Registry>,
    pub listeners: Vec<Rc<Listener>>,
    /// What is told of its workers.
    pub known: Rc<GenerationInfo>,
}

/// What earlier generations run on, without listeners: one of their pool processes may have to be
/// replaced.
#[derive(Debug, Default)]
pub struct OldContexts {
    /// By the generation that came after.
    contexts: BTreeMap<Generation, Rc<GenerationContext>>,
}

impl OldContexts {
    /// What a generation runs on, if it is an earlier one.
    pub fn of(&self, generation: Generation) -> Option<&Rc<GenerationContext>> {
        let mut later = self.contexts.range(generation.next()..);
        later.next().map(|(_, context)| context)
    }

    /// Adds what ran until the generation `after`, and forgets those before which no generation `is_used`.
    pub fn add(
        &mut self,
        after: Generation,
        context: &GenerationContext,
        is_used: impl Fn(Generation) -> bool,
    ) {
        let context = GenerationContext {
            settings: Rc::clone(&context.settings),
            registry: Arc::clone(&context.registry),
            listeners: Vec::new(),
            known: Rc::clone(&context.known),
        };
        self.contexts.insert(after, Rc::new(context));
        self.contexts.retain(|after, _| is_used(*after));
    }
}

/// What the master tells of the workers of one configuration, for as long as one of them lives:
/// less than the configuration, for that may be another version's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationInfo {
    /// The names of the methods, by the numbers that the scoreboard has.
    pub methods: Vec<String>,
    /// Handler threads of each worker.
    pub threads: usize,
    /// Programs of all pools of each worker; 0 since pools have processes of their own.
    #[serde(default)]
    pub programs: usize,
    /// The names of the pools and their programs, by the numbers that their slots have.
    #[serde(default)]
    pub pools: Vec<(String, usize)>,
}

impl GenerationInfo {
    /// What there is to tell of these.
    pub fn of(settings: &Settings, registry: &Registry) -> Rc<Self> {
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
        })
    }

    /// What is to be told of methods that there were `before` and that nobody serves any more.
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

    /// The name of a method by its number; a question mark for a number that is none.
    pub fn method(&self, number: usize) -> &str {
        self.methods.get(number).map_or("?", String::as_str)
    }
}
