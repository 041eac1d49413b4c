//! Spreading lasting connections, as the master does it: counts them on the scoreboard and gives the
//! orders that [`super::policy::rebalancer`] has planned. A worker that does not obey is asked again.

use std::sync::atomic::Ordering::Relaxed;

use super::main_loop::{Master, now};
use super::policy::rebalancer::Share;
use crate::link::message::{Order, RebalanceOrder};

impl Master<'_> {
    /// Looks, if it is time to.
    pub(super) fn spread(&mut self) {
        let now = now();
        self.spread.note(self.fleet.pids(), now);
        let (fleet, workers) = (&self.fleet, &self.workers);
        let held = |pid| {
            let record = workers.get(pid)?.record;
            Some((pid, record.connections.load(Relaxed) as usize))
        };
        let counts = || fleet.settled().filter_map(held).collect();
        let orders = self.spread.plan(counts, now);
        if !orders.is_empty() {
            log::debug!("lasting connections are spread: {orders:?}");
        }
        for Share { pid, give, take } in orders {
            let most = |count| u32::try_from(count).unwrap_or(u32::MAX);
            let shares = RebalanceOrder {
                give: most(give),
                take: most(take),
                after_change: self.spread.is_after_change(now),
            };
            self.workers.order(pid, Order::Rebalance(shares), None);
        }
    }
}
