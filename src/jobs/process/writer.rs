//! Runs the writing side of the store in a thread of its own: opens it, executes requests in groups, maintains it.
//!
//! Requests that arrive during a commit become the next group. A reply is sent only after its commit. If the store is
//! away, the requests wait here until it is back, or until the event loop withdraws them. [`super::health`] decides
//! when the store is tried again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError};

use super::health::{StoreHealth, StoreState};
use super::leftovers::Leftovers;
use super::pending::PendingRequests;
use super::reader::ReaderOrder;
use super::schedule::{MAINTENANCE_MS, WriterSchedule};
use super::store_event::{OpenedStore, StoreEvent, SubmittedRequest, WriterOrder};
use super::store_mark::StoreMark;
use crate::config::JobsConfig;
use crate::jobs::kill_point::{self, KillPoint};
use crate::jobs::open;
use crate::jobs::policy::retention::RetentionRules;
use crate::jobs::rules;
use crate::jobs::store::Engine;
use crate::jobs::store::error::{OpenFault, StoreError, StoreFault};
use crate::jobs::store::request::{InstanceInfo, StoreReply, StoreRequest};
use crate::logging::HumanDuration;
use crate::sys::process::{self, monotonic_ms, unix_time_ms};
use crate::sys::random::random_bytes;
use crate::sys::signal::with_signals_blocked;
use crate::sys::waker::Waker;
use crate::worker_init::JobsInstance;

/// The time between two checks of the processes of an earlier instance, and of the lock while another instance has it.
const LOOK_MS: u64 = 50;

/// What the thread needs at its start.
pub struct WriterInit {
    pub config: JobsConfig,
    pub info: InstanceInfo,
    pub instance: Arc<JobsInstance>,
    /// Whether a start or reload waits for the store. Then an unusable one ends the process.
    pub is_awaited: bool,
    pub mark: StoreMark,
    /// Returns whether there is another jobs process of the instance.
    pub is_shared: Box<dyn Fn() -> bool + Send>,
    pub orders: Receiver<WriterOrder>,
    pub events: Sender<StoreEvent>,
    pub reader: Sender<ReaderOrder>,
    pub waker: Arc<Waker>,
}

/// Starts the thread.
///
/// # Errors
/// If no thread can be started.
pub fn start(init: WriterInit) -> std::io::Result<()> {
    let writer = Writer {
        retention: rules::retention_rules(&init.config),
        health: StoreHealth::default(),
        stage: Stage::Closed,
        pending: PendingRequests::default(),
        is_closing: false,
        schedule: WriterSchedule::default(),
        leftovers: Leftovers::default(),
        broken_by: String::new(),
        init,
    };
    let (events, waker) = (writer.init.events.clone(), Arc::clone(&writer.init.waker));
    let body = move || {
        if catch_unwind(AssertUnwindSafe(|| writer.run())).is_err() {
            // The panic hook has logged it.
            let reason = "its writing thread panicked".to_owned();
            let _ = events.send(StoreEvent::Refused(reason));
            waker.wake();
        }
    };
    let builder = thread::Builder::new().name("jobs-write".into());
    with_signals_blocked(|| builder.spawn(body)).map(drop)
}

/// How far the store is open.
enum Stage {
    Closed,
    /// Open, but processes of an earlier instance may still run attempts.
    Joining(Box<dyn Engine>),
    Open(Box<dyn Engine>),
    Ended,
}

struct Writer {
    init: WriterInit,
    retention: RetentionRules,
    health: StoreHealth,
    stage: Stage,
    pending: PendingRequests,
    is_closing: bool,
    schedule: WriterSchedule,
    leftovers: Leftovers,
    /// Why the store is broken.
    broken_by: String,
}

impl Writer {
    fn run(mut self) {
        while !matches!(self.stage, Stage::Ended) {
            let was_open = matches!(self.stage, Stage::Joining(_) | Stage::Open(_));
            self.receive();
            match std::mem::replace(&mut self.stage, Stage::Closed) {
                Stage::Closed | Stage::Joining(..) if self.is_closing => self.end(None),
                Stage::Closed => self.open(),
                Stage::Joining(engine) => self.join(engine),
                Stage::Open(engine) => self.serve(engine),
                Stage::Ended => self.stage = Stage::Ended,
            }
            if was_open && matches!(self.stage, Stage::Closed | Stage::Ended) {
                self.init.mark.closed();
            }
        }
    }

    fn send(&self, event: StoreEvent) {
        // If the event loop is gone, the process is exiting.
        let _ = self.init.events.send(event);
        self.init.waker.wake();
    }

    /// Receives all orders that have arrived. Waits for the next one if there is nothing to do.
    fn receive(&mut self) {
        let now_ms = monotonic_ms();
        let wait_ms = match &self.stage {
            Stage::Open(_) if !self.health.may_try(now_ms) => self.health.wait_ms(now_ms),
            Stage::Open(_) => {
                let at_ms = self.schedule.next_ms(self.pending.is_empty());
                Some(at_ms.saturating_sub(now_ms))
            }
            Stage::Closed => self.health.wait_ms(now_ms),
            Stage::Joining(..) => Some(LOOK_MS),
            Stage::Ended => Some(0),
        };
        // A store that was never tried has no delay.
        let is_first = matches!(self.stage, Stage::Closed) && self.health.may_try(now_ms);
        let wait_ms = match wait_ms {
            _ if self.is_closing || is_first => 0,
            Some(wait_ms) => wait_ms,
            None => u64::MAX,
        };
        let limit = Duration::from_millis(wait_ms.min(MAINTENANCE_MS));
        let first = match wait_ms {
            0 => None,
            _ => Some(self.init.orders.recv_timeout(limit)),
        };
        match first {
            Some(Ok(order)) => self.obey(order),
            Some(Err(RecvTimeoutError::Disconnected)) => self.is_closing = true,
            Some(Err(RecvTimeoutError::Timeout)) | None => {}
        }
        while !self.is_closing {
            match self.init.orders.try_recv() {
                Ok(order) => self.obey(order),
                Err(TryRecvError::Disconnected) => self.is_closing = true,
                Err(TryRecvError::Empty) => return,
            }
        }
    }

    fn obey(&mut self, order: WriterOrder) {
        match order {
            WriterOrder::Execute(submitted) => self.admit(submitted),
            WriterOrder::Damaged(error) => {
                match std::mem::replace(&mut self.stage, Stage::Closed) {
                    Stage::Open(engine) => self.failed_open(engine, error),
                    other => self.stage = other,
                }
            }
            WriterOrder::Close => self.is_closing = true,
        }
    }

    /// Adds a request, or refuses it because the store cannot be written.
    fn admit(&mut self, submitted: SubmittedRequest) {
        let is_enqueue = matches!(submitted.request, StoreRequest::Enqueue(_));
        let refusal = match self.health.state() {
            StoreState::Broken => Some((StoreFault::Corrupt, self.broken_by.clone())),
            StoreState::Full if is_enqueue && !self.health.may_try(monotonic_ms()) => {
                Some((StoreFault::Full, "the disk of the store is full".to_owned()))
            }
            _ => None,
        };
        match refusal {
            // A withdrawn request has its answer.
            Some(_) if submitted.hold.as_ref().is_some_and(|hold| !hold.take()) => {}
            Some((fault, text)) => {
                let error = StoreError::new(fault, text);
                self.send(StoreEvent::Failed(submitted.ticket, error));
            }
            None => self.pending.push(submitted),
        }
    }

    /// Opens the store, if this instance has the lock and a try is due.
    fn open(&mut self) {
        if !self.health.may_try(monotonic_ms()) {
            return;
        }
        let away = |text: String| StoreError::new(StoreFault::Away, text);
        let secret = match (self.init.instance.lock.try_lock(), random_bytes()) {
            (Ok(true), Ok(secret)) => secret,
            (Ok(false), _) => {
                let text = "processes of a server that was killed still use it";
                self.failed(away(text.to_owned()));
                return self.health.try_at(monotonic_ms() + LOOK_MS);
            }
            (Err(error), _) => {
                return self.failed(away(format!("its lock cannot be taken: {error}")));
            }
            (_, Err(error)) => return self.failed(away(format!("no random bytes: {error}"))),
        };
        let limits = rules::store_limits(&self.init.config);
        let Some(opening) = self.init.mark.begin(self.init.instance.was_opened.is_set()) else {
            // Another jobs process of this server is opening it, which does not take long.
            return self.health.try_at(monotonic_ms() + LOOK_MS);
        };
        match open::store(&self.init.config.store, limits, opening, secret) {
            Ok(engine) => {
                self.init.mark.opened();
                self.init.instance.was_opened.set();
                self.stage = Stage::Joining(engine);
            }
            Err(error) if self.init.is_awaited && error.fault != OpenFault::Away => {
                self.init.mark.closed();
                self.stage = Stage::Ended;
                self.send(StoreEvent::Refused(error.to_string()));
            }
            Err(error) => {
                self.init.mark.closed();
                let fault = match error.fault {
                    OpenFault::Damaged => StoreFault::Corrupt,
                    OpenFault::Away | OpenFault::Unusable => StoreFault::Away,
                };
                let text = format!("{}; {}", error.problem, error.remedy);
                self.failed(StoreError::new(fault, text));
            }
        }
    }

    /// Waits for the processes that may run attempts of an earlier instance, and then registers this instance.
    fn join(&mut self, mut engine: Box<dyn Engine>) {
        let left = match engine.leftovers(self.init.info.id) {
            Ok(left) => left,
            Err(error) => return self.failed(error),
        };
        let now_ms = monotonic_ms();
        if !self.leftovers.are_gone(left, now_ms) {
            // Calls do not wait for these processes. The log says already that they are awaited.
            if self.health.failed(StoreFault::Away, now_ms, 0) {
                self.send(StoreEvent::State(self.health.state()));
            }
            self.health.try_at(now_ms);
            self.stage = Stage::Joining(engine);
            return;
        }
        let join = StoreRequest::Join(self.init.info.clone());
        let freed = match engine.execute(&[join]) {
            Ok(replies) => match replies.into_iter().next() {
                Some(StoreReply::Joined(freed)) => freed,
                _ => Vec::new(),
            },
            Err(error) => return self.failed(error),
        };
        let reader = match engine.reader() {
            Ok(reader) => reader,
            Err(error) => return self.failed(error),
        };
        let _ = self.init.reader.send(ReaderOrder::Use(reader));
        self.came_up();
        let facts = engine.facts().clone();
        let (major, minor) = facts.schema;
        log::info!(
            "job store opened: {} waiting, {} running store={} schema={major}.{minor} durable={}",
            facts.waiting,
            facts.running,
            facts.location,
            facts.is_durable
        );
        let opened = OpenedStore {
            secret: engine.secret().to_vec(),
            facts,
            freed,
        };
        self.stage = Stage::Open(engine);
        self.send(StoreEvent::Opened(Box::new(opened)));
    }

    /// Executes the next group and maintains the store.
    fn serve(&mut self, mut engine: Box<dyn Engine>) {
        let now_ms = monotonic_ms();
        let may_try = self.health.may_try(now_ms) && self.schedule.may_write(now_ms);
        if !may_try && !self.is_closing {
            self.stage = Stage::Open(engine);
            return;
        }
        if !self.pending.is_empty() {
            if let Err(error) = self.execute(&mut *engine) {
                return self.failed_open(engine, error);
            }
            // The replies are on their way, so a checkpoint delays none of them.
            if let Err(error) = engine.after_commit() {
                return self.failed_open(engine, error);
            }
            if (self.init.is_shared)() {
                self.schedule.share(now_ms, monotonic_ms());
            }
        } else if self.is_closing {
            return self.end(Some(engine));
        }
        if self.schedule.is_maintenance_due(now_ms) {
            match engine.maintain(&self.retention) {
                Ok(maintained) => {
                    self.came_up();
                    self.schedule.maintained(now_ms, maintained.is_complete);
                    self.send(StoreEvent::Maintained(maintained));
                }
                Err(error) => return self.failed_open(engine, error),
            }
        }
        match engine.next_event_ms(&[]) {
            Ok(expiry) => (self.schedule).expires(expiry, unix_time_ms(), monotonic_ms()),
            Err(error) => return self.failed_open(engine, error),
        }
        self.stage = Stage::Open(engine);
    }

    /// Executes the next group, and sends its replies after the commit.
    fn execute(&mut self, engine: &mut dyn Engine) -> Result<(), StoreError> {
        let (requests, members) = self.pending.take_group();
        if requests.is_empty() {
            return Ok(());
        }
        let begun = process::monotonic();
        match engine.execute(&requests) {
            Ok(replies) => {
                kill_point::reached(KillPoint::AfterCommit);
                let took = process::monotonic().saturating_sub(begun);
                self.came_up();
                let _ = self.init.events.send(StoreEvent::Committed(took));
                let tickets = members.into_iter().map(|(ticket, _)| ticket);
                for ((ticket, reply), request) in tickets.zip(replies).zip(&requests) {
                    let event = StoreEvent::of_reply(ticket, reply, request, engine);
                    let _ = self.init.events.send(event);
                }
                self.init.waker.wake();
                Ok(())
            }
            Err(error) => {
                for ticket in self.pending.put_group_back(requests, members, &error) {
                    self.send(StoreEvent::Failed(ticket, error.clone()));
                }
                Err(error)
            }
        }
    }

    /// Handles a fault of an open store.
    fn failed_open(&mut self, engine: Box<dyn Engine>, error: StoreError) {
        match error.fault {
            // The connection is tried again. Opening the store again beside the reader would close descriptors of its
            // files, and the kernel would release all locks that this process has on them (fcntl(2)).
            StoreFault::Full | StoreFault::Away if !self.is_closing => {
                self.stage = Stage::Open(engine);
            }
            _ => drop(engine),
        }
        self.failed(error);
    }

    /// Records a fault: logs it, and lets the event loop know.
    fn failed(&mut self, error: StoreError) {
        if error.fault == StoreFault::SyncFailed {
            log::error!(
                "job store: a sync failed, so the jobs process exits and the next one opens the store afresh; \
                 nothing is acknowledged until then store={} error={error}",
                self.init.config.path().display()
            );
            self.stage = Stage::Ended;
            return self.send(StoreEvent::SyncFailed(error.detail));
        }
        let jitter = random_bytes().map_or(0, u16::from_ne_bytes);
        let now_ms = monotonic_ms();
        if self.health.failed(error.fault, now_ms, jitter) {
            self.log_fault(&error, self.health.wait_ms(now_ms));
            self.send(StoreEvent::State(self.health.state()));
        }
        // While the store is away, clients continue to send, and their requests are withdrawn one by one.
        self.pending.drop_withdrawn();
        if self.health.state() == StoreState::Broken {
            self.broken_by.clone_from(&error.detail);
            for submitted in self.pending.take_all() {
                self.send(StoreEvent::Failed(submitted.ticket, error.clone()));
            }
        }
    }

    fn log_fault(&self, error: &StoreError, wait_ms: Option<u64>) {
        let store = self.init.config.path().display();
        match self.health.state() {
            StoreState::Broken => log::error!(
                "job store broken: nothing more is written; stop the server, then run preforkd job check \
                 store={store} error={error}"
            ),
            state => log::warn!(
                "job store {}: enqueues are answered with unavailable, calls continue; next try in {} store={store} \
                 error={error}",
                state.name(),
                HumanDuration(wait_ms.unwrap_or_default())
            ),
        }
    }

    /// Records that the store works.
    fn came_up(&mut self) {
        let was_up = self.health.state() == StoreState::Up;
        if let Some(down_ms) = self.health.succeeded(monotonic_ms()) {
            log::info!("job store back after {}", HumanDuration(down_ms));
        }
        if !was_up {
            self.send(StoreEvent::State(StoreState::Up));
        }
    }

    /// Closes the store and ends the thread.
    fn end(&mut self, engine: Option<Box<dyn Engine>>) {
        // A process that stays writes the log into the store. A checkpoint would keep it from storing jobs.
        let engine = engine.filter(|_| !(self.init.is_shared)());
        if let Some(engine) = engine
            && let Err(error) = engine.close()
        {
            log::warn!("job store: {error}; nothing that was committed is lost");
        }
        self.stage = Stage::Ended;
        self.send(StoreEvent::Closed);
    }
}
