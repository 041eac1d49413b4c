//! The `preforkd` command: the library's server with no method of its own.

fn main() {}
