//! Checks a daemon's log for lines that a test must announce.

/// Returns the errors, panics and kills in `log`, except lines that contain one of `expected`.
pub fn unexpected<'a>(log: &'a str, expected: &[String]) -> Vec<&'a str> {
    log.lines()
        .filter(|line| is_alarming(line))
        .filter(|line| !expected.iter().any(|text| line.contains(text.as_str())))
        .collect()
}

/// Returns the expected texts that did not appear.
pub fn missing<'a>(log: &str, expected: &'a [String]) -> Vec<&'a str> {
    expected
        .iter()
        .map(String::as_str)
        .filter(|text| !log.contains(text))
        .collect()
}

fn is_alarming(line: &str) -> bool {
    // The priority of journald, for a log that goes to systemd: <3> is an error, lower numbers are worse.
    let worst_priorities = ["<0>", "<1>", "<2>", "<3>"];
    line.split(|c: char| !c.is_ascii_alphanumeric())
        .any(|word| matches!(word, "ERROR" | "KILL" | "SIGKILL" | "panicked"))
        || worst_priorities.iter().any(|it| line.starts_with(it))
}

#[test]
fn an_alarming_line_is_excused_only_by_its_own_text() {
    let log = "INFO master: ready\nERROR worker 0: disk gone\nWARN sent KILL to 7\n<3>no\n";
    assert_eq!(unexpected(log, &[]).len(), 3);
    let expected = ["disk gone".to_owned(), "sent KILL".to_owned()];
    assert_eq!(unexpected(log, &expected), ["<3>no"]);
    assert_eq!(missing(log, &["disk gone".into(), "x".into()]), ["x"]);
}
