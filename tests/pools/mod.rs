//! Pools of programs, and the client pool of the library.

mod client;
mod leftovers;
mod programs;
mod supervision;
