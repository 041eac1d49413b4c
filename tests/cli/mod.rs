//! Tests commands, documentation, the library, and measured limits.

mod bars;
mod bench;
mod call;
mod commands;
mod environment;
mod guard;
mod jobs;
mod library;
mod manual;
mod pages;
mod readme;
