//! Tests pools of programs, and the client pool of the library.

mod client;
mod health;
mod leftovers;
mod parallel;
mod programs;
mod python_helper;
mod supervision;

/// Returns the key for one program in the pool, unless these keys say how many there are.
fn one_program(keys: &str) -> &'static str {
    match keys.contains("processes =") {
        true => "",
        false => "processes = 1\n",
    }
}
