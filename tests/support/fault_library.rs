//! Builds a library that is loaded into a master (LD_PRELOAD) and makes it fail during an upgrade. A test gives
//! orders by creating files: `main-thread`, `thread`, `fork` and `memfd` act once, in the new program. `hold` stops
//! the old program at its start during a rollback, as long as the file exists.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Dir, source};

/// A master with a second thread panics instead of forking. `main-thread` starts a thread before `main`,
/// which the master detects before it forks. `thread` starts one when the master sets its title, after
/// that check. `fork` acts after the first worker was forked, and raises the signals whose numbers are in
/// the file. `memfd` raises them when the state table is about to be written.
const LIBRARY: &str = r#"
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
/// The pid of the new program's master. Orders do not act in its workers.
static ON_TRIAL: AtomicI32 = AtomicI32::new(0);
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;
fn place(name: &str) -> std::path::PathBuf {
    std::path::Path::new(&std::env::var_os("SABOTAGE").unwrap_or_default()).join(name)
}
fn stray_thread() {
    std::thread::spawn(|| loop { std::thread::park() });
}
extern "C" fn start() {
    let upgrade = std::env::var("PREFORKD_UPGRADE").unwrap_or_default();
    if upgrade.starts_with("exec") {
        ON_TRIAL.store(unsafe { getpid() }, SeqCst);
    }
    if upgrade.starts_with("exec") && std::fs::remove_file(place("main-thread")).is_ok() {
        stray_thread();
    }
    if upgrade.starts_with("back") && place("hold").exists() {
        let _ = std::fs::write(place("held"), "");
        while place("hold").exists() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}
const MEMFD_CREATE: std::ffi::c_long = if cfg!(target_arch = "x86_64") { 319 } else { 279 };
const PRCTL: std::ffi::c_long = if cfg!(target_arch = "x86_64") { 157 } else { 167 };
const PR_SET_NAME: i32 = 15;
unsafe extern "C" {
    fn __fork() -> i32;
    fn getpid() -> i32;
    fn kill(pid: i32, signal: i32) -> i32;
    fn syscall(number: std::ffi::c_long, ...) -> std::ffi::c_long;
}
/// If this order was given, raises its signals. Returns whether it was given.
fn obeyed(order: &str) -> bool {
    let me = unsafe { getpid() };
    if ON_TRIAL.load(SeqCst) != me {
        return false;
    }
    let Ok(signals) = std::fs::read_to_string(place(order)) else {
        return false;
    };
    let _ = std::fs::remove_file(place(order));
    for number in signals.split_whitespace().filter_map(|it| it.parse().ok()) {
        unsafe { kill(me, number) };
    }
    true
}
#[unsafe(no_mangle)]
extern "C" fn fork() -> i32 {
    let pid = unsafe { __fork() };
    if pid > 0 && obeyed("fork") {
        stray_thread();
    }
    pid
}
#[unsafe(no_mangle)]
extern "C" fn prctl(option: i32, a: u64, b: u64, c: u64, d: u64) -> i32 {
    if option == PR_SET_NAME && obeyed("thread") {
        stray_thread();
    }
    unsafe { syscall(PRCTL, option, a, b, c, d) as i32 }
}
#[unsafe(no_mangle)]
extern "C" fn memfd_create(name: *const std::ffi::c_char, flags: u32) -> i32 {
    obeyed("memfd");
    unsafe { syscall(MEMFD_CREATE, name, flags) as i32 }
}
"#;

/// The library, and the directory of its orders.
pub struct Sabotage {
    dir: Dir,
}

impl Sabotage {
    /// Builds the library, without an order.
    pub fn new() -> Self {
        let dir = Dir::new();
        let code = dir.write("library.rs", LIBRARY);
        let mut compiler = Command::new("rustc");
        compiler.args(["--edition=2024", "--crate-type=cdylib", "-Cpanic=abort"]);
        compiler.arg("-o").arg(dir.join("library.so")).arg(code);
        // rustc is in the toolchain of these tests.
        let compiled = compiler.current_dir(source()).output();
        let compiled = compiled.expect("rustc is where cargo is");
        assert!(compiled.status.success(), "{compiled:?}");
        fs::create_dir(dir.join("orders")).unwrap();
        Sabotage { dir }
    }

    /// Returns the value of LD_PRELOAD.
    pub fn library(&self) -> PathBuf {
        self.dir.join("library.so")
    }

    /// Returns the value of SABOTAGE.
    pub fn place(&self) -> PathBuf {
        self.dir.join("orders")
    }

    /// Gives an order.
    pub fn order(&self, name: &str, text: &str) {
        // Rename it into place, so that the library sees a whole file.
        let new = self.dir.write("new", text);
        fs::rename(new, self.place().join(name)).unwrap();
    }

    /// Returns whether the file `name` exists. The library creates `held` when it holds the program.
    pub fn did(&self, name: &str) -> bool {
        Path::exists(&self.place().join(name))
    }

    /// Releases the held program.
    pub fn let_go(&self) {
        for name in ["held", "hold"] {
            fs::remove_file(self.place().join(name)).unwrap();
        }
    }
}
