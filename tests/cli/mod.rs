//! Commands, documentation, the library, and measured bars.

mod bars;
mod bench;
mod call;
mod commands;
mod environment;
mod guard;
mod library;
mod manual;
mod readme;
