//! A reload as the master does it: read, check, bind, start, and tell who waits.
//!
//! Everything that can fail is tried before anything changes; what was changed is taken back when
//! the new generation does not come up. When and whether it comes up is `Fleet`'s to say.

use std::mem;
use std::rc::Rc;

use crate::config;
use crate::error::{Error, Result};
use crate::link::ids::Generation;
use crate::master::children::workers::{GenerationContext, GenerationInfo};
use crate::master::endpoints::listeners::{self, SocketOptions};
use crate::master::main_loop::{Master, now};
use crate::master::policy::event::Event;
use crate::master::start::limits;
use crate::protocol::control::{ControlResponse, LastReload, MOST_DRAINING_GENERATIONS};
use crate::sys::notify::NotifyState;
use crate::sys::process;

impl Master<'_> {
    /// Begins the reload that was asked for, once none is under way. Requests that come in a
    /// burst are one.
    pub(crate) fn reload_if_asked(&mut self) {
        if !self.reload_asked || self.upgrade.holds_reload() {
            return;
        }
        if !self.fleet.can_reload() {
            if self.fleet.drains_too_much() && !mem::replace(&mut self.reload_waits, true) {
                log::warn!(
                    "a reload waits: {MOST_DRAINING_GENERATIONS} generations before this one still \
                     drain; it begins when one of them has left"
                );
            }
            return;
        }
        self.reload_waits = false;
        self.reload_asked = false;
        self.verdict_for = mem::take(&mut self.next_verdict_for);
        let mut states = vec![NotifyState::Reloading];
        states.extend(NotifyState::monotonic_usec_now());
        self.notifier.tell(&states);
        log::info!("reload: reads the configuration");
        // Whatever the verdict will be: without them nobody can ask, or finds this master.
        if !self.upgrade.is_on_trial() {
            self.pid_file.renew();
            self.control.renew(now());
        }
        match self.prepare() {
            Ok(ground) => {
                let limits = limits(&ground.settings);
                self.next_context = Some(Rc::new(ground));
                self.handle_event(Event::Reload { limits });
            }
            Err(error) => {
                self.restore_log();
                self.finish_reload(Err(error.to_string()));
            }
        }
    }

    /// Reads and checks the new configuration and opens what it names.
    fn prepare(&mut self) -> Result<GenerationContext> {
        let settings =
            config::keep_restart_only_keys(self.setup.host.load()?, &self.serving_context.settings);
        if self.serving_context.settings.daemon && settings.log.file.is_none() {
            return Err(Error::Config {
                file: settings.file,
                position: None,
                key: "log.file".into(),
                problem: "it is gone, and a daemon has no terminal to log to".into(),
                remedy: "name a file".into(),
            });
        }
        self.previous_log = self.setup.host.configure_log(&settings)?;
        let listeners = listeners::open(
            &settings.listen,
            &self.serving_context.listeners,
            &self.passed,
            &SocketOptions::of(&settings),
        )?;
        let told = &self.serving_context.settings.warnings;
        for warning in settings.warnings.iter().filter(|it| !told.contains(it)) {
            log::warn!("{warning}");
        }
        let registry = self.setup.host.registry(&settings);
        Ok(GenerationContext {
            known: GenerationInfo::of(&settings, &registry),
            registry,
            settings: Rc::new(settings),
            listeners,
        })
    }

    /// The reload is over, one way or the other.
    pub(crate) fn finish_reload(&mut self, verdict: std::result::Result<Generation, String>) {
        let upcoming = self.next_context.take();
        self.workers.forget_words();
        let mut words = self.first_words.take();
        let before = Rc::clone(&self.serving_context);
        let response = match &verdict {
            Ok(generation) => {
                if let Some(ground) = upcoming {
                    remove_paths(&before, &ground);
                    // Only now, for a refused reload must not have touched what goes on.
                    listeners::tune(&ground.settings, &ground.listeners);
                    self.serving_context = ground;
                    let fleet = &self.fleet;
                    let is_used = |after| fleet.has_pools_before(after);
                    self.old_contexts.add(*generation, &before, is_used);
                }
                self.previous_log = None;
                self.strikes.reset(self.workers.quarantine());
                log::info!("reload: generation {generation} serves, the one before drains");
                words = String::new();
                let gone = self.serving_context.known.removed_methods(&before.known);
                if let Some(gone) = &gone {
                    log::warn!("reload: {gone}");
                }
                for word in [gone, self.serving_context.settings.restart_warning()]
                    .into_iter()
                    .flatten()
                {
                    words += &format!("; {word}");
                }
                let sources = self.sources();
                ControlResponse::said(format!("generation {generation} serves ({sources}){words}"))
            }
            Err(reason) => {
                if let Some(ground) = upcoming {
                    remove_paths(&ground, &before);
                    self.restore_log();
                }
                log::error!("reload refused, everything stays as it was: {reason}");
                // What its workers logged stands in the log; who waits elsewhere has only this.
                ControlResponse::refused(format!("reload refused: {reason}{words}"), 1)
            }
        };
        if self.upgrade_judged(&verdict, &words) {
            return;
        }
        self.last_reload = Some(LastReload {
            ok: verdict.is_ok(),
            at: process::unix_seconds(),
            // with what the log has most lately of its workers, where there is something
            error: verdict.err().map(|reason| match words.lines().last() {
                Some(word) => format!("{reason}; {}", word.trim()),
                None => reason,
            }),
        });
        for client in mem::take(&mut self.verdict_for) {
            self.control.answer(client, &response, now());
        }
        if !self.stopping {
            self.notifier.tell(&[NotifyState::Ready]);
        }
    }

    /// Tells everybody who waits for a verdict that there will be none.
    pub(crate) fn refuse_waiting(&mut self, reason: &str) {
        self.next_verdict_for.append(&mut self.verdict_for);
        self.refuse_next_reload(reason);
    }

    /// Gives up the reload that was asked for and has not begun, and tells who waits for it.
    pub(crate) fn refuse_next_reload(&mut self, reason: &str) {
        if mem::take(&mut self.reload_asked) && self.next_verdict_for.is_empty() {
            log::warn!("reload refused: {reason}");
        }
        for client in mem::take(&mut self.next_verdict_for) {
            let response = ControlResponse::refused(format!("reload refused: {reason}"), 1);
            self.control.answer(client, &response, now());
        }
    }

    /// Puts the log back to where it was, without opening anything.
    fn restore_log(&mut self) {
        if let Some(output) = self.previous_log.take() {
            self.setup
                .host
                .restore_log(&self.serving_context.settings, output);
        }
    }
}

/// Removes the paths of the listeners that `old` has and `new` has not.
fn remove_paths(old: &GenerationContext, new: &GenerationContext) {
    for listener in &old.listeners {
        if !new
            .listeners
            .iter()
            .any(|other| Rc::ptr_eq(other, listener))
        {
            listener.remove_path();
        }
    }
}
