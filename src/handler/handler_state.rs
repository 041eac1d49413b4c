//! Keeps the state that a program provides for its handlers. It is made once in the master before the
//! fork, or once in each worker after it, and found by its type.
//!
//! The functions of the program make it (`on_master_start`, `on_worker_start`) and are called when a
//! worker ends (`on_worker_stop`). If one fails or panics, that is an error with its reason: the master
//! does not start, or the worker does not become ready.

use std::any::{Any, TypeId, type_name};
use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Why a function of the program could not make its state. Any error and any text are possible.
pub type StartError = Box<dyn std::error::Error + Send + Sync>;

type StateValue = Arc<dyn Any + Send + Sync>;
type OnMaster = Box<dyn Fn() -> Result<StateValue, StartError> + Send + Sync>;
type OnStart = Box<dyn Fn(&Worker) -> Result<StateValue, StartError> + Send + Sync>;
type OnStop = Box<dyn Fn(&Worker) + Send + Sync>;

/// The functions of a program that are called at the start and the end of its processes.
#[derive(Default)]
pub struct Hooks {
    master_start: Vec<OnMaster>,
    worker_start: Vec<OnStart>,
    worker_stop: Vec<OnStop>,
}

impl Hooks {
    /// Adds a function that is called in the master before the fork.
    pub fn on_master_start<T: Send + Sync + 'static>(
        &mut self,
        make: impl Fn() -> Result<T, StartError> + Send + Sync + 'static,
    ) {
        let make = move || Ok(Arc::new(make()?) as StateValue);
        self.master_start.push(Box::new(make));
    }

    /// Adds a function that is called in each worker before it is ready.
    pub fn on_worker_start<T: Send + Sync + 'static>(
        &mut self,
        make: impl Fn(&Worker) -> Result<T, StartError> + Send + Sync + 'static,
    ) {
        let make = move |worker: &Worker| Ok(Arc::new(make(worker)?) as StateValue);
        self.worker_start.push(Box::new(make));
    }

    /// Adds a function that is called in each worker that ends by a drain or a stop, and not at once or by a crash.
    pub fn on_worker_stop(&mut self, end: impl Fn(&Worker) + Send + Sync + 'static) {
        self.worker_stop.push(Box::new(end));
    }

    /// Returns whether there are functions to call when a worker ends.
    pub fn has_stop_hooks(&self) -> bool {
        !self.worker_stop.is_empty()
    }

    /// Makes the state of the master for all workers.
    ///
    /// # Errors
    /// The error of the first function that failed.
    pub fn start_master(&self) -> Result<HandlerState, String> {
        let mut kept = HandlerState::default();
        for make in &self.master_start {
            kept.things.push(guarded("on_master_start", make)?);
        }
        Ok(kept)
    }

    /// Makes a worker: the state of the master, then its own, in the order in which the functions were
    /// added. So a later function finds the state of an earlier one.
    ///
    /// # Errors
    /// The error of the first function that failed.
    pub fn start_worker(&self, slot: u16, kept: &HandlerState) -> Result<Worker, String> {
        let mut worker = Worker {
            slot,
            kept: kept.clone(),
        };
        for make in &self.worker_start {
            let thing = guarded("on_worker_start", || make(&worker))?;
            worker.kept.things.push(thing);
        }
        Ok(worker)
    }

    /// Calls the functions for the end of a worker, the last one first.
    pub fn stop_worker(&self, worker: &Worker) {
        for end in self.worker_stop.iter().rev() {
            // A panic is already logged. The other functions are called too.
            let _ = guarded("on_worker_stop", || {
                end(worker);
                Ok(Arc::new(()) as StateValue)
            });
        }
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks").finish_non_exhaustive()
    }
}

fn guarded(
    name: &str,
    make: impl FnOnce() -> Result<StateValue, StartError>,
) -> Result<StateValue, String> {
    match catch_unwind(AssertUnwindSafe(make)) {
        Ok(Ok(thing)) => Ok(thing),
        Ok(Err(error)) => Err(format!("{name} failed: {error}")),
        Err(payload) => {
            super::guard::discard(payload);
            Err(format!("{name} panicked, as logged above"))
        }
    }
}

/// Values, each found by its type.
#[derive(Clone, Default)]
pub struct HandlerState {
    things: Vec<StateValue>,
    /// The descriptors that the program has opened before the fork.
    descriptors: BTreeSet<RawFd>,
}

impl HandlerState {
    /// Adds the descriptors that the program has opened before the fork.
    #[must_use]
    pub fn with_descriptors(self, descriptors: BTreeSet<RawFd>) -> Self {
        HandlerState {
            descriptors,
            ..self
        }
    }

    /// Returns the descriptors that the program has opened before the fork for its handlers.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.descriptors.iter().copied()
    }

    /// Returns the last value of this type.
    fn find<T: 'static>(&self) -> Option<&T> {
        let wanted = TypeId::of::<T>();
        let mut things = self.things.iter().rev();
        things
            .find(|thing| (***thing).type_id() == wanted)?
            .downcast_ref()
    }
}

impl fmt::Debug for HandlerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerState").finish_non_exhaustive()
    }
}

/// A worker, as the functions of a program see it.
#[derive(Debug)]
pub struct Worker {
    slot: u16,
    kept: HandlerState,
}

impl Worker {
    /// Returns its slot, from 0 to `workers.count` - 1. The worker that replaces it takes the same slot. Two
    /// generations use the same slots while the older one drains.
    pub fn slot(&self) -> u16 {
        self.slot
    }

    /// Returns what `on_worker_start` made in this worker or `on_master_start` in the master, by its
    /// type.
    ///
    /// # Panics
    /// If there is nothing of that type: a mistake in the program, which its first call shows.
    pub fn state<T: 'static>(&self) -> &T {
        self.kept.find().unwrap_or_else(|| {
            panic!(
                "there is no state of the type {}: return it from on_worker_start or \
                 on_master_start",
                type_name::<T>()
            )
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Debug, PartialEq)]
    struct Words(Vec<&'static str>);

    #[test]
    fn a_worker_finds_its_own_state_before_the_one_of_the_master() {
        let mut hooks = Hooks::default();
        hooks.on_master_start(|| Ok(Words(vec!["of", "all"])));
        hooks.on_master_start(|| Ok(7_u8));
        hooks.on_worker_start(|worker| {
            Ok(format!(
                "{:?} in {}",
                worker.state::<Words>(),
                worker.slot()
            ))
        });
        hooks.on_worker_start(|worker| Ok(worker.state::<u8>() + 1));
        let kept = hooks.start_master().unwrap();
        let worker = hooks.start_worker(3, &kept).unwrap();
        assert_eq!(worker.state::<String>(), "Words([\"of\", \"all\"]) in 3");
        assert_eq!(*worker.state::<u8>(), 8);
        assert!(
            std::ptr::eq(worker.state::<Words>(), kept.find().unwrap()),
            "no copy"
        );
        let missing = catch_unwind(AssertUnwindSafe(|| *worker.state::<u64>())).unwrap_err();
        let text = missing.downcast_ref::<String>().unwrap();
        assert!(text.contains("no state of the type u64"), "{text}");
    }

    #[test]
    fn a_failed_function_gives_its_reason_and_later_ones_are_not_called() {
        let mut hooks = Hooks::default();
        hooks.on_worker_start(|worker| match worker.slot() {
            0 => Err("the database is away".into()),
            1 => panic!("on purpose"),
            _ => Ok(()),
        });
        let fails = |slot| {
            hooks
                .start_worker(slot, &HandlerState::default())
                .unwrap_err()
        };
        assert_eq!(fails(0), "on_worker_start failed: the database is away");
        assert_eq!(fails(1), "on_worker_start panicked, as logged above");
        assert!(hooks.start_worker(2, &HandlerState::default()).is_ok());
    }

    #[test]
    fn stop_functions_are_called_last_to_first_even_after_a_panic() {
        let stopped = Arc::new(Mutex::new(Vec::new()));
        let mut hooks = Hooks::default();
        for number in 0..3 {
            let stopped = Arc::clone(&stopped);
            hooks.on_worker_stop(move |_| {
                assert_ne!(number, 1, "on purpose");
                stopped.lock().unwrap().push(number);
            });
        }
        hooks.stop_worker(&hooks.start_worker(0, &HandlerState::default()).unwrap());
        assert_eq!(*stopped.lock().unwrap(), [2, 0]);
    }
}
