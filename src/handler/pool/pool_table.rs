//! Carries the methods and the table of a pool to its process, at a reload at which that process stays.
//!
//! Method numbers differ from generation to generation. A pool process has numbers of its own, and a map for
//! each generation that it serves. The master assigns the same numbers, so that it can name the method of a number.
//! Methods are only added: one that comes back unchanged gets the number that it had.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::definition::Pooled;
use crate::config::PoolConfig;
use crate::handler::Placement;
use crate::handler::registry::{Method, Registry};

/// A method as a pool process needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolMethod {
    /// Its number in the generation that it comes from.
    pub number: usize,
    pub name: String,
    pub timeout: Duration,
    pub kills_abandoned: bool,
}

/// The table that the master sends to a pool process, as JSON.
#[derive(Debug, Serialize, Deserialize)]
pub struct PoolTable {
    /// The number of the pool's call queue in the next generation.
    pub lane: usize,
    /// The methods of the pool in the next generation.
    pub methods: Vec<PoolMethod>,
    /// The generations that are still served, without the next one.
    pub served: Vec<u32>,
    /// How its programs are started from then on; `None`: they stay as they are.
    pub config: Option<PoolConfig>,
}

/// Returns the methods of the pool with this number.
pub fn methods_of(registry: &Registry, pool: usize) -> Vec<PoolMethod> {
    let methods = registry.methods().iter().enumerate();
    let own = methods.filter(|(_, method)| method.handler.placement() == Placement::Pool(pool));
    own.map(|(number, method)| PoolMethod {
        number,
        name: method.name.clone(),
        timeout: method.timeout,
        kills_abandoned: method.kills_abandoned,
    })
    .collect()
}

/// The numbers that methods have in a pool process.
#[derive(Debug, Clone, Default)]
pub struct MethodNumbers {
    /// Its methods, each with its number in the process.
    methods: Vec<PoolMethod>,
    /// How many numbers there are, including those of methods that do not belong to the pool.
    count: usize,
    /// For each generation, the number in the process of each method number of that generation.
    maps: BTreeMap<u32, BTreeMap<usize, usize>>,
}

impl MethodNumbers {
    /// Creates the numbers of a pool process that is started with the registry of a generation.
    pub fn new(generation: u32, registry: &Registry, pool: usize) -> Self {
        let mut numbers = MethodNumbers {
            methods: methods_of(registry, pool),
            count: registry.methods().len(),
            maps: BTreeMap::new(),
        };
        numbers.add(generation, &numbers.methods.clone());
        numbers
    }

    /// Adds the methods that the pool has in a generation.
    pub fn add(&mut self, generation: u32, methods: &[PoolMethod]) {
        let mut map = BTreeMap::new();
        for method in methods {
            let is_same = |own: &&PoolMethod| {
                (&own.name, own.timeout, own.kills_abandoned)
                    == (&method.name, method.timeout, method.kills_abandoned)
            };
            let number = match self.methods.iter().find(is_same) {
                Some(own) => own.number,
                None => {
                    let number = self.count;
                    self.count += 1;
                    self.methods.push(PoolMethod {
                        number,
                        ..method.clone()
                    });
                    number
                }
            };
            map.insert(method.number, number);
        }
        self.maps.insert(generation, map);
    }

    /// Forgets the numbers of all generations but these.
    pub fn retain(&mut self, served: &[u32]) {
        self.maps
            .retain(|generation, _| served.contains(generation));
    }

    /// Returns the number in the process of a method of a generation; `None` if it has none.
    pub fn number(&self, generation: u32, method: usize) -> Option<usize> {
        self.maps.get(&generation)?.get(&method).copied()
    }

    /// Returns the methods that were added after the first `count` numbers, in the order of their numbers.
    fn added(&self, count: usize) -> impl Iterator<Item = &PoolMethod> {
        let added = self.methods.iter();
        added.filter(move |method| method.number >= count)
    }

    /// Returns the names of all numbers. `known` are the names of the first ones.
    pub fn names(&self, known: &[String]) -> Vec<String> {
        let added = self.added(known.len()).map(|method| method.name.clone());
        known.iter().cloned().chain(added).collect()
    }

    /// Returns `registry` with the methods of this pool that it lacks; `None` if it has them all. `pool` is the number
    /// of the pool in `registry`.
    pub fn complete(&self, registry: &Registry, pool: usize) -> Option<Arc<Registry>> {
        let added = self.added(registry.methods().len()).map(|method| Method {
            name: method.name.clone(),
            handler: Arc::new(Pooled { number: pool }),
            timeout: method.timeout,
            concurrency: 0,
            rate: 0,
            kills_abandoned: method.kills_abandoned,
        });
        let added: Vec<Method> = added.collect();
        (!added.is_empty()).then(|| Arc::new(registry.with_more(added)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn registry(methods: &[(&str, usize, u64)]) -> Registry {
        let method = |&(name, pool, seconds): &(&str, usize, u64)| Method {
            name: name.to_owned(),
            handler: Arc::new(Pooled { number: pool }),
            timeout: Duration::from_secs(seconds),
            concurrency: 0,
            rate: 0,
            kills_abandoned: false,
        };
        Registry::new(methods.iter().map(method).collect())
    }

    #[test]
    fn the_methods_of_each_generation_have_a_number_in_the_process() {
        let first = registry(&[("a", 0, 1), ("b", 1, 1), ("c", 1, 1)]);
        let mut numbers = MethodNumbers::new(1, &first, 1);
        assert_eq!(
            (numbers.number(1, 1), numbers.number(1, 0)),
            (Some(1), None)
        );
        // "b" moves, "c" has another timeout, "d" is new, and "a" still belongs to another pool
        let second = registry(&[("a", 1, 1), ("c", 0, 2), ("d", 0, 1), ("b", 0, 1)]);
        numbers.add(2, &methods_of(&second, 0));
        let number = |generation, method| numbers.number(generation, method);
        assert_eq!((number(2, 3), number(2, 0)), (Some(1), None));
        assert_eq!((number(2, 1), number(2, 2)), (Some(3), Some(4)));
        assert_eq!(number(1, 2), Some(2));
        let complete = numbers.complete(&first, 1).unwrap();
        let names = numbers.names(&["a".into(), "b".into(), "c".into()]);
        assert_eq!(names, ["a", "b", "c", "c", "d"]);
        assert_eq!((complete.name(3), complete.name(4)), ("c", "d"));
        assert_eq!(complete.methods()[3].timeout, Duration::from_secs(2));
        assert!(numbers.complete(&complete, 1).is_none());
        // what was there before gets no second number
        numbers.add(3, &methods_of(&first, 1));
        assert_eq!(numbers.number(3, 2), Some(2));
        assert!(numbers.complete(&complete, 1).is_none());
        // the second reload has failed, or its workers have left
        numbers.retain(&[1, 3]);
        let number = |generation, method| numbers.number(generation, method);
        assert_eq!((number(1, 2), number(2, 3)), (Some(2), None));
        assert_eq!(numbers.maps.len(), 2);
    }
}
