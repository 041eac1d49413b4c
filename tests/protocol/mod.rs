//! Tests what clients see on the wire: dialects, forms, limits, errors, overload.

mod accept;
mod accept_wait;
mod acknowledge;
mod backpressure;
mod clients;
pub mod errors;
mod fair_shares;
mod forwarding;
pub mod frames;
mod hostile;
mod http;
mod http_corpus;
mod idle;
mod json_suite;
mod jsonrpc;
mod lines;
mod overload;
mod shares;
