//! Tests pools of programs, and the client pool of the library.

mod client;
mod health;
mod leftovers;
mod parallel;
mod programs;
mod python_helper;
mod supervision;
