//! Shows state for functions. The master reads the prices once, and all workers share them. Each worker
//! opens its own ledger.
//!
//! Run `LEDGER=/tmp/ledger cargo run --example state -- run`, then
//! `preforkd call shop.order '{"item": "tea", "count": 2}'`. After a stop, the ledger has a line for
//! each order and a line for each worker.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use preforkd::{Context, RpcError, Server, StartError, Worker};
use serde::{Deserialize, Serialize};

/// Created in the master before the fork. No process writes to it, so all workers share its memory.
struct Prices {
    by_item: BTreeMap<&'static str, u64>,
    made_by: u32,
}

/// Opened by each worker after the fork. If two processes share a database handle, each can get the
/// answers of the other.
struct Ledger {
    file: Mutex<File>,
    orders: Mutex<u64>,
}

impl Ledger {
    fn open() -> io::Result<Self> {
        let path = std::env::var_os("LEDGER").unwrap_or("/dev/null".into());
        let file = File::options().create(true).append(true).open(path)?;
        Ok(Ledger {
            file: Mutex::new(file),
            orders: Mutex::new(0),
        })
    }

    fn write(&self, line: &str) -> io::Result<()> {
        // Ignore the poisoning: if another call panicked while it held the lock, it left nothing
        // half written here.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(format!("{line}\n").as_bytes())
    }

    fn count(&self) -> u64 {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        *orders += 1;
        *orders
    }
}

#[derive(Deserialize)]
struct Order {
    item: String,
    count: u64,
}

/// The information that a function has about its call.
#[derive(Serialize)]
struct About {
    method: String,
    id: Option<String>,
    peer: Option<String>,
    worker: u16,
    remaining_ms: u128,
    pids: [u32; 2],
}

fn main() -> ExitCode {
    Server::new()
        .on_master_start(prices)
        .on_worker_start(|_| Ok(Ledger::open()?))
        .on_worker_stop(closing)
        .namespace("shop", |shop| {
            shop.method_with("order", order).inline_with(
                "price",
                |call: &Context<'_>, item: String| {
                    let prices = call.state::<Prices>();
                    Ok(prices.by_item.get(&*item).copied())
                },
            )
        })
        .method_with("about", |call: &Context<'_>, ()| Ok(about(call)))
        .inline_with("about_inline", |call: &Context<'_>, ()| Ok(about(call)))
        // Returns early if the caller no longer waits.
        .method_with("wait", |call: &Context<'_>, seconds: f64| {
            let gone = call.pause(Duration::from_secs_f64(seconds));
            let ledger = call.state::<Ledger>();
            let line = if gone { "not waited for" } else { "waited for" };
            ledger.write(line).map_err(trouble)
        })
        // Panics while it holds the lock.
        .method_with("tear", |call: &Context<'_>, ()| -> Result<(), RpcError> {
            let _page = call.state::<Ledger>().file.lock();
            panic!("torn on purpose")
        })
        .run()
}

fn prices() -> Result<Prices, StartError> {
    Ok(Prices {
        by_item: BTreeMap::from([("tea", 3), ("coffee", 4)]),
        made_by: std::process::id(),
    })
}

fn order(call: &Context<'_>, order: Order) -> Result<u64, RpcError> {
    let prices = call.state::<Prices>();
    let price = prices.by_item.get(&*order.item).ok_or_else(|| {
        let items: Vec<_> = prices.by_item.keys().collect();
        RpcError::new(404, format!("there is no {} here", order.item))
            .with_name("no-such-item")
            .with_data(items)
    })?;
    let total = (price.checked_mul(order.count))
        .ok_or_else(|| RpcError::invalid_params("the total is no 64-bit number"))?;
    let ledger = call.state::<Ledger>();
    let line = format!("{} {} for {total}", order.count, order.item);
    ledger.write(&line).map_err(trouble)?;
    ledger.count();
    Ok(total)
}

fn trouble(error: io::Error) -> RpcError {
    RpcError::new(500, format!("the ledger can't be written: {error}"))
}

fn about(call: &Context<'_>) -> About {
    About {
        method: call.method.to_owned(),
        id: call.id().map(str::to_owned),
        peer: call.peer().map(|peer| peer.to_string()),
        worker: call.slot,
        remaining_ms: call.remaining().as_millis(),
        pids: [call.state::<Prices>().made_by, std::process::id()],
    }
}

fn closing(worker: &Worker) {
    let ledger = worker.state::<Ledger>();
    let line = format!(
        "worker {} closes after {}",
        worker.slot(),
        ledger.count() - 1
    );
    if let Err(error) = ledger.write(&line) {
        log::error!("{line}, and can't say so in the ledger: {error}");
    }
}
