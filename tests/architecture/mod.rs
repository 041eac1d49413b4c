//! Checks the structure of the source: which module may use which, and where `unsafe`, `fork` and sleeping
//! are allowed. It also checks the length of files, and that the head of each file says what it does.
//!
//! It reads the source as text without comments and literals, which is enough for these rules. It does
//! not see what a macro hides; a reviewer has to. Where a rule is not satisfied yet, a list names the
//! exceptions. The lists only shrink: an unnecessary entry fails the test too.

mod imports;
mod source_file;

use std::collections::{BTreeMap, BTreeSet};

use imports::Imports;
use source_file::{calls_of, has_word, is_word, source_files};

use crate::support::source;

/// The layers, base first, each with those that it may use. A layer uses only layers above it in this
/// table, so every file can be read with knowledge of those layers only.
const LAYERS: [(&str, &[&str]); 17] = [
    // Safe wrappers of system calls; know nothing of preforkd.
    ("sys", &[]),
    ("error", &[]),
    // Pure: when to start a dead process again, and how often to log.
    ("throttle", &["sys"]),
    ("logging", &["sys"]),
    // Pure: bytes in, bytes out; no system call, so no sys.
    ("protocol", &["error"]),
    // What the processes of one server share.
    ("link", &["sys", "protocol"]),
    // sys, because a configuration check looks up accounts.
    ("config", &["sys", "error", "logging", "protocol"]),
    (
        "handler",
        &["sys", "logging", "throttle", "protocol", "config"],
    ),
    (
        "worker_init",
        &["sys", "logging", "config", "link", "handler"],
    ),
    // What operators see, from shared memory and the master's answers.
    (
        "observe",
        &[
            "sys",
            "logging",
            "protocol",
            "link",
            "config",
            "worker_init",
        ],
    ),
    // Worker and master use only link and worker_init in common, because they are two processes.
    (
        "worker",
        &[
            "sys",
            "logging",
            "throttle",
            "protocol",
            "link",
            "config",
            "handler",
            "worker_init",
        ],
    ),
    // forks processes that are workers with one connection
    (
        "acceptor",
        &[
            "sys",
            "logging",
            "throttle",
            "link",
            "config",
            "worker_init",
            "worker",
        ],
    ),
    (
        "master",
        &[
            "sys",
            "error",
            "logging",
            "throttle",
            "protocol",
            "link",
            "config",
            "handler",
            "worker_init",
        ],
    ),
    // Durable jobs: pure policy, the store, and the process that runs it. That process stands beside the others.
    (
        "jobs",
        &[
            "sys",
            "error",
            "logging",
            "throttle",
            "protocol",
            "link",
            "config",
            "handler",
            "worker_init",
            "worker",
        ],
    ),
    // The one module that joins the two.
    (
        "server",
        &[
            "sys",
            "error",
            "logging",
            "protocol",
            "config",
            "handler",
            "worker_init",
            "worker",
            "acceptor",
            "master",
            "jobs",
            "observe",
        ],
    ),
    // Knows a server only by the wire protocol.
    ("client", &["sys", "error", "protocol"]),
    (
        "cli",
        &[
            "sys", "error", "logging", "protocol", "link", "config", "jobs", "observe", "server",
            "client",
        ],
    ),
];

/// The most lines of a file without its tests.
const MAX_LINES: usize = 450;

/// Files that are still longer. The list only shrinks.
const LONG_FILES: [&str; 2] = ["src/sys/event/reactor.rs", "src/worker/call_dispatcher.rs"];

/// The most lines of a file on that list.
const MAX_LONG_LINES: usize = 620;

/// The most files of under 60 lines (`mod.rs` not counted). The number only shrinks, to 15.
const MAX_SHORT_FILES: usize = 34;

/// Types whose inherent methods are still in several files, and the number of files.
const SPREAD_TYPES: [(&str, usize); 11] = [
    ("CallDispatcher", 2),
    ("CallMembers", 3),
    ("ChildRecord", 2),
    ("Children", 2),
    ("Client", 3),
    ("EventLoop", 10),
    ("Fleet", 8),
    ("Pool", 3),
    ("ProgramSupervisor", 3),
    ("Server", 4),
    ("Settings", 2),
];

/// Names of types that are visible outside their file and still defined more than once.
const DUPLICATE_TYPES: [&str; 3] = ["Entry", "Millis", "Pool"];

/// Words and names that the project no longer uses, and how often they may still occur in
/// `src`, `docs`, `tests`, README and CHANGELOG. The numbers only shrink.
const OLD_WORDS: [(&str, usize); 16] = [
    ("desk", 0),
    ("ear", 0),
    ("everybody", 0),
    ("floor", 0),
    ("last words", 0),
    ("nobody", 40),
    ("pardon", 0),
    ("prisoner", 0),
    ("seat", 0),
    ("shelf", 0),
    ("somebody", 0),
    ("strikes", 0),
    ("wear", 1),
    ("whoever", 0),
    ("whomever", 0),
    ("witness", 0),
];

/// The public items of `lib.rs`.
const PUBLIC: [&str; 8] = [
    "pub mod client;",
    "pub use handler::handler_state::{StartError, Worker};",
    "pub use handler::job_attempt::JobAttempt;",
    "pub use handler::trace::Trace;",
    "pub use handler::{Context, Handler, Placement};",
    "pub use protocol::{CallId, Code, RpcError};",
    "pub use serde_json::value::RawValue;",
    "pub use server::Server;",
];

#[test]
fn imports_go_down_only() {
    let mut wrong = Vec::new();
    for file in source_files("src") {
        let Some(layer) = file.layer() else { continue };
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == layer) else {
            wrong.push(format!(
                "{}: {layer} is no layer; give it its row",
                file.name
            ));
            continue;
        };
        for used in file.uses() {
            if used == layer || allowed.contains(&used.as_str()) {
                continue;
            }
            let known = LAYERS.iter().any(|(name, _)| *name == used);
            wrong.push(if known {
                format!("{}: {layer} must not use {used}", file.name)
            } else {
                // The re-exports of lib.rs are for users of the library. Inside the crate a path through
                // them would hide the layer.
                format!("{}: crate::{used} names no layer", file.name)
            });
        }
    }
    assert_none(&wrong);
}

#[test]
fn the_table_of_layers_has_no_circle() {
    for (index, (layer, allowed)) in LAYERS.iter().enumerate() {
        for used in *allowed {
            let below = LAYERS[..index].iter().any(|(name, _)| name == used);
            assert!(
                below,
                "{layer} may use {used}, which does not stand above it"
            );
        }
    }
}

/// Outside of `sys`, unsafe code only calls an `unsafe fn` of `sys`, in these files and this many times.
#[test]
fn callers_of_unsafe_functions_are_listed() {
    let callers = [
        ("src/master/children/mark_reader.rs", 1),
        ("src/master/upgrade/exec_attempt.rs", 4),
        ("src/observe/post_fork.rs", 3),
        ("src/server.rs", 3),
        ("src/server/upgraded.rs", 1),
        ("src/worker/crash/keeper.rs", 3),
        ("src/worker/crash/unrecorded_sockets.rs", 1),
        ("src/worker/post_fork.rs", 2),
    ];
    let files: Vec<_> = source_files("src")
        .filter(|file| file.layer().as_deref() != Some("sys"))
        .collect();
    let count = |file: &source_file::SourceFile| {
        let words = file.code.split(|c| !is_word(c));
        words.filter(|word| *word == "unsafe").count()
    };
    let found: Vec<_> = files
        .iter()
        .map(|file| (file.name.as_str(), count(file)))
        .filter(|(_, count)| *count > 0)
        .collect();
    assert_listed("callers", &callers, &found);
}

/// fork(2) is safe only while a process has one thread. One wrapper asserts that. These call it:
///
/// - the master, for workers and observers (`fork_child`) and for mark readers
/// - an acceptor, for sessions
/// - `closer`, for a child that closes a descriptor
///
/// `daemon` detaches before there is a master.
#[test]
fn fork_is_called_in_listed_places() {
    let homes = ["src/sys/process.rs", "src/sys/daemon.rs"];
    let callers = [
        "src/acceptor/sessions.rs",
        "src/master/children/mark_reader.rs",
        "src/sys/closer.rs",
        "src/sys/signal.rs",
    ];
    let mut calls = Vec::new();
    for file in source_files("src").filter(|file| !homes.contains(&file.name.as_str())) {
        let found = calls_of(&file.code, &["fork", "vfork", "forkpty", "clone3"]);
        calls.extend(found.iter().map(|_| file.name.clone()));
    }
    let calls: Vec<&str> = calls.iter().map(String::as_str).collect();
    assert_listed("callers", &callers, &calls);
    assert_eq!(calls.len(), callers.len(), "one call each: {calls:?}");
    let callers = ["src/master/children/workers.rs", "src/master/core.rs"];
    let calls: Vec<String> = source_files("src")
        .filter(|file| !calls_of(&file.code, &["fork_child"]).is_empty())
        .map(|file| file.name)
        .collect();
    let calls: Vec<&str> = calls.iter().map(String::as_str).collect();
    assert_listed("callers", &callers, &calls);
}

/// A keeper is cloned in one place, after its worker has left everything of the master.
#[test]
fn a_keeper_is_cloned_in_one_place() {
    let mut wrong = Vec::new();
    for file in source_files("src") {
        let calls = calls_of(&file.code, &["clone_process"]);
        let clones = calls
            .iter()
            .filter(|(_, path)| path.ends_with("clone_files::"));
        let home = file.name == "src/worker/crash/keeper.rs";
        wrong.extend(
            clones
                .skip(usize::from(home))
                .map(|(line, _)| format!("{}:{line}", file.name)),
        );
    }
    assert_none(&wrong);
}

/// All waiting is for an event with a deadline. The builtin `sleep` is a method that sleeps.
#[test]
fn nothing_sleeps_for_timing() {
    let allowed = ["src/handler/builtin.rs", "tests/support/mod.rs"];
    let mut wrong = Vec::new();
    for file in source_files("src").chain(source_files("tests")) {
        if allowed.contains(&file.name.as_str()) {
            continue;
        }
        for (line, path) in calls_of(&file.code, &["sleep"]) {
            if path.ends_with("thread::") || path.ends_with("unistd::") {
                wrong.push(format!("{}:{line}", file.name));
            }
        }
    }
    assert_none(&wrong);
}

#[test]
fn files_stay_short_enough_to_be_read_whole() {
    let mut lines: Vec<(usize, String)> = source_files("src")
        .filter(|file| !file.is_test)
        .map(|file| (file.code.lines().count(), file.name))
        .collect();
    lines.sort();
    let total: usize = lines.iter().map(|(lines, _)| lines).sum();
    let is_short = |(lines, name): &&(usize, String)| *lines < 60 && !name.ends_with("/mod.rs");
    let short = lines.iter().filter(is_short).count();
    println!("src without tests: {total} lines in {} files", lines.len());
    println!(
        "median {}, {short} files under 60",
        lines[lines.len() / 2].0
    );
    let is_long = |(lines, _): &&(usize, String)| *lines > MAX_LINES;
    let mut long: Vec<&str> = lines
        .iter()
        .filter(is_long)
        .map(|(_, name)| &**name)
        .collect();
    long.sort_unstable();
    assert_listed("long files", &LONG_FILES, &long);
    let longest = lines.last().map_or(0, |(lines, _)| *lines);
    assert!(
        longest <= MAX_LONG_LINES,
        "the longest file has {longest} lines"
    );
    assert!(short <= MAX_SHORT_FILES, "{short} files of under 60 lines");
}

#[test]
fn no_two_files_import_each_other() {
    let files: Vec<_> = source_files("src").collect();
    let imports = Imports::of(&files);
    let circles = imports.circles();
    for circle in &circles {
        for file in circle {
            println!("{file} imports {}", imports.inside(circle, file).join(", "));
        }
        println!();
    }
    let found = circles
        .iter()
        .map(|circle| Vec::from_iter(circle.iter().map(String::as_str)).join(", "));
    assert_none(&Vec::from_iter(found));
}

/// The policy of the master only decides, so it can be tested without a process.
#[test]
fn the_policy_of_the_master_is_pure() {
    let allowed = [
        "crate::throttle",
        "crate::protocol::call_id",
        "crate::protocol::control",
        "crate::link::executor_end",
        "crate::link::ids",
        "crate::link::message::RebalanceOrder",
        "crate::sys::process::Exit",
        "crate::sys::signal::Fault",
        "crate::master::policy",
    ];
    assert_pure("src/master/policy", &allowed);
}

/// The policy of jobs only decides. An engine calls it inside a transaction.
#[test]
fn the_policy_of_jobs_is_pure() {
    let allowed = ["crate::jobs::policy", "crate::protocol"];
    assert_pure("src/jobs/policy", &allowed);
}

/// Other layers know a store only by the trait of an engine.
#[test]
fn only_the_sqlite_store_names_rusqlite() {
    let mut wrong = Vec::new();
    for file in source_files("src").chain(source_files("tests")) {
        let is_home = file.name.starts_with("src/jobs/store/sqlite/")
            || file.name.starts_with("tests/architecture");
        // Tests too: their code is not in `code`.
        if !is_home && has_word(&file.text, "rusqlite") {
            wrong.push(file.name);
        }
    }
    assert_none(&wrong);
}

/// Checks that the files under a directory use only `allowed` modules of the crate, no input or output and no
/// clock.
#[track_caller]
fn assert_pure(directory: &str, allowed: &[&str]) {
    let mut wrong = Vec::new();
    for file in source_files(directory).filter(|file| !file.is_test) {
        for path in imports::written_paths(&file.code) {
            let path = path.join("::");
            let is_allowed = allowed.iter().any(|prefix| path.starts_with(prefix));
            let std_module = path
                .strip_prefix("std::")
                .and_then(|rest| rest.split("::").next());
            // No `sync`: what the policy decides, its caller publishes in shared memory.
            let impure = ["fs", "io", "net", "process", "thread", "sync"];
            let is_impure = std_module.is_some_and(|module| impure.contains(&module));
            let is_foreign = path.starts_with("crate::") && !is_allowed;
            if is_impure || is_foreign {
                wrong.push(format!("{}: {path}", file.name));
            }
        }
        for clock in ["Instant", "SystemTime"] {
            if has_word(&file.code, clock) {
                wrong.push(format!("{}: {clock}", file.name));
            }
        }
    }
    assert_none(&wrong);
}

#[test]
fn the_methods_of_a_type_stand_in_one_file() {
    let mut files_of: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in source_files("src") {
        for name in inherent_impls(&file.code) {
            files_of.entry(name).or_default().insert(file.name.clone());
        }
    }
    let spread: Vec<_> = files_of
        .iter()
        .filter(|(_, files)| files.len() > 1)
        .map(|(name, files)| (name.as_str(), files.len()))
        .collect();
    assert_listed("types", &SPREAD_TYPES, &spread);
}

#[test]
fn a_type_name_that_others_see_is_defined_once() {
    let mut files_of: BTreeMap<String, usize> = BTreeMap::new();
    for file in source_files("src") {
        for name in visible_types(&file.code) {
            *files_of.entry(name).or_default() += 1;
        }
    }
    let twice: Vec<_> = files_of
        .iter()
        .filter(|(_, count)| **count > 1)
        .map(|(name, _)| name.as_str())
        .collect();
    assert_listed("type names", &DUPLICATE_TYPES, &twice);
}

#[test]
fn old_words_do_not_come_back() {
    let mut texts: Vec<String> = ["src", "tests"]
        .into_iter()
        .flat_map(source_files)
        .filter(|file| !file.name.starts_with("tests/architecture"))
        .map(|file| file.text.to_lowercase())
        .collect();
    let documents = ["README.md", "CHANGELOG.md"].map(|name| source().join(name));
    let docs = std::fs::read_dir(source().join("docs")).unwrap();
    let docs = docs.map(|entry| entry.unwrap().path());
    for path in documents.into_iter().chain(docs) {
        texts.push(std::fs::read_to_string(path).unwrap().to_lowercase());
    }
    let count = |word: &str| -> usize {
        let is_end = |c: Option<char>| !c.is_some_and(is_word);
        let in_text = |text: &String| {
            text.match_indices(word)
                .filter(|(at, _)| {
                    is_end(text[..*at].chars().next_back())
                        && is_end(text[at + word.len()..].chars().next())
                })
                .count()
        };
        texts.iter().map(in_text).sum()
    };
    let found: Vec<_> = OLD_WORDS
        .iter()
        .map(|(word, _)| (*word, count(word)))
        .collect();
    let more: Vec<_> = OLD_WORDS
        .iter()
        .zip(&found)
        .filter(|((_, most), (_, count))| count > most)
        .map(|((word, most), (_, count))| format!("{word}: {count}, at most {most}"))
        .collect();
    assert_none(&more);
}

#[test]
fn only_the_documented_names_are_public() {
    let lib = source_files("src")
        .find(|file| file.name == "src/lib.rs")
        .unwrap();
    let end = lib.code.find("#[cfg(feature").unwrap_or(lib.code.len());
    let found: Vec<_> = lib.code[..end]
        .lines()
        .filter(|line| line.starts_with("pub"))
        .collect();
    assert_eq!(found, PUBLIC);
}

/// Compares the findings of a rule with its list of exceptions.
#[track_caller]
fn assert_listed<T: PartialEq + std::fmt::Debug>(what: &str, listed: &[T], found: &[T]) {
    let new: Vec<_> = found.iter().filter(|one| !listed.contains(one)).collect();
    let gone: Vec<_> = listed.iter().filter(|one| !found.contains(one)).collect();
    assert!(new.is_empty(), "{what} that break the rule:\n{new:#?}");
    assert!(
        gone.is_empty(),
        "{what} that keep the rule now: take them off the list:\n{gone:#?}"
    );
}

/// Returns the types that have an `impl` block in a file, without those of traits.
fn inherent_impls(code: &str) -> BTreeSet<String> {
    let heads = code.lines().filter_map(|line| line.strip_prefix("impl"));
    heads
        .filter(|head| !has_word(head, "for"))
        .map(|head| match head.strip_prefix('<') {
            Some(rest) => rest.split_once("> ").map_or("", |(_, name)| name),
            None => head,
        })
        .map(|head| head.trim().chars().take_while(|&c| is_word(c)).collect())
        .filter(|name: &String| !name.is_empty())
        .collect()
}

/// Returns the types of a file that other files can name.
fn visible_types(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in code
        .lines()
        .filter(|line| line.trim_start().starts_with("pub"))
    {
        let mut words = line.split(|c| !is_word(c)).filter(|word| !word.is_empty());
        if words.any(|word| matches!(word, "struct" | "enum" | "trait" | "type" | "union")) {
            found.extend(words.next().map(str::to_owned));
        }
    }
    found
}

#[test]
fn every_file_says_at_its_head_what_it_is_for() {
    let mut wrong = Vec::new();
    for file in ["src", "tests", "benches", "examples"]
        .into_iter()
        .flat_map(source_files)
    {
        // A test file beside its subject is explained by the subject.
        let explained_elsewhere = file.is_test && file.name.starts_with("src/");
        if !explained_elsewhere && !file.text.starts_with("//!") {
            wrong.push(file.name);
        }
    }
    assert_none(&wrong);
}

#[track_caller]
fn assert_none(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Users build `release` first, so it builds fast. Packages and comparisons with other servers use `dist`.
#[test]
fn the_first_build_is_fast_and_packages_are_optimized() {
    let read = |file: &str| std::fs::read_to_string(source().join(file)).unwrap();
    let manifest: toml::Table = toml::from_str(&read("Cargo.toml")).unwrap();
    let value = |profile: &str, key: &str| manifest["profile"][profile].get(key).cloned();
    let text = |text: &str| Some(toml::Value::from(text));
    assert_eq!(value("release", "lto"), None);
    let units = value("release", "codegen-units");
    assert!(units.is_none_or(|units| units.as_integer() == Some(16)));
    assert_eq!(value("dist", "inherits"), text("release"));
    assert_eq!(value("dist", "lto"), text("thin"));
    assert_eq!(
        value("dist", "codegen-units"),
        Some(toml::Value::Integer(1))
    );
    assert_eq!(value("bench", "inherits"), text("dist"));
    let readme = read("README.md");
    assert!(readme.contains("cargo run --release -- run"));
    assert!(readme.contains("cargo build --profile dist"));
}
