//! Tests the state of an upgrade with files that an earlier version has written.

#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::super::children::workers::Children;
use super::super::policy::fleet::Fleet;
use super::super::policy::slots::SlotState;
use super::state::{FORMAT, UpgradeState};
use crate::config::{self, KeptVariables, Overrides};

/// Written by version 0.1.0 and completed by hand. Not to be changed.
const STORED: &str = include_str!("../../../tests/upgrade-state.json");

/// Written by version 0.1.0 with every member that it knows. Not to be changed.
const STORED_WHOLE: &str = include_str!("../../../tests/upgrade-state-2.json");

fn stored() -> Value {
    serde_json::from_str(STORED).unwrap()
}

fn read(table: &Value) -> Result<UpgradeState, String> {
    UpgradeState::of_json(table.to_string().as_bytes()).map_err(|error| error.to_string())
}

#[test]
fn a_table_of_the_version_before_is_read_and_means_the_same() {
    let state = read(&stored()).unwrap();
    assert_eq!(
        state.descriptors().into_iter().collect::<Vec<_>>(),
        [3, 4, 5, 6, 7, 18, 19, 20, 21, 22, 23]
    );
    Children::fits(&state.workers).unwrap();
    let origin = state.origin.clone();
    let settings =
        config::from_effective(state.served(), origin.file, &Overrides::default()).unwrap();
    let text = settings.to_toml();
    for line in state.settings.lines() {
        assert!(text.lines().any(|now| now == line), "{line:?} in {text}");
    }
    assert_eq!(settings.listen[1].mode, Some(0o660));

    // The time is before the first deadline in the state.
    let fleet = Fleet::import(state.fleet.clone(), 3_268_900).unwrap();
    assert_eq!(fleet.export(), state.fleet);
    assert_eq!(fleet.next_deadline(), Some(3_269_400));
    assert_eq!(fleet.deaths().total(), 102);
    assert!(fleet.can_reload());
    let holders: Vec<_> = fleet.table.slots.values().map(|slot| slot.state).collect();
    let until = 3_270_000;
    assert!(
        matches!(holders[..], [SlotState::Worker(_), SlotState::Throttled { until: at }] if at == until)
    );

    // This version writes the same members and values.
    let again: Value =
        serde_json::from_slice(&read(&stored()).unwrap().to_json().unwrap()).unwrap();
    let stored = stored();
    for (name, value) in stored.as_object().unwrap() {
        assert!(
            contains(&again[name], value),
            "{name}: {} for {value}",
            again[name]
        );
    }
}

#[test]
fn every_member_of_the_version_before_is_read_and_written_back() {
    for text in [STORED, STORED_WHOLE] {
        let stored: Value = serde_json::from_str(text).unwrap();
        let state = read(&stored).unwrap();
        let fleet = Fleet::import(state.fleet.clone(), 3_268_900).unwrap();
        assert_eq!(fleet.export(), state.fleet);
        let file = state.origin.file.clone();
        let settings = state.settings.clone();
        let settings = config::from_effective(
            (settings, KeptVariables::new()),
            file,
            &Overrides::default(),
        )
        .unwrap();
        let printed = settings.to_toml();
        for line in state.settings.lines() {
            assert!(
                printed.lines().any(|it| it == line),
                "{line:?} in {printed}"
            );
        }
        let again: Value = serde_json::from_slice(&state.to_json().unwrap()).unwrap();
        let lost = missing("", &again, &stored);
        assert!(lost.is_empty(), "read, and not written back: {lost:#?}");
    }
}

/// Returns the paths in `part` whose values are not in `whole`.
fn missing(path: &str, whole: &Value, part: &Value) -> Vec<String> {
    let members: Vec<(String, &Value)> = match part {
        Value::Object(members) => {
            let member = |(name, value)| (format!("/{name}"), value);
            members.iter().map(member).collect()
        }
        Value::Array(values) => {
            let value = |(number, value)| (format!("/{number}"), value);
            values.iter().enumerate().map(value).collect()
        }
        _ => Vec::new(),
    };
    if members.is_empty() {
        return (whole != part)
            .then(|| path.to_owned())
            .into_iter()
            .collect();
    }
    let member = |(name, value): (String, &Value)| {
        let path = format!("{path}{name}");
        match whole.pointer(&name) {
            Some(other) => missing(&path, other, value),
            None => vec![path],
        }
    };
    members.into_iter().flat_map(member).collect()
}

/// The old program sets these variables and waits for this line, so they must never change.
#[test]
fn the_words_of_an_upgrade_are_those_of_the_version_before() {
    use super::start_params::{PROBE_PASSED, REASON, VARIABLE};
    assert_eq!(
        (VARIABLE, REASON),
        ("PREFORKD_UPGRADE", "PREFORKD_UPGRADE_REASON")
    );
    assert_eq!(
        PROBE_PASSED,
        "preforkd: this program can take the running server over"
    );
    assert_eq!(FORMAT, 1);
}

/// Returns whether `whole` has everything of `part`. Additional members are allowed.
fn contains(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => part
            .iter()
            .all(|(name, value)| whole.get(name).is_some_and(|has| contains(has, value))),
        (Value::Array(whole), Value::Array(part)) => {
            whole.len() == part.len() && whole.iter().zip(part).all(|(a, b)| contains(a, b))
        }
        _ => whole == part,
    }
}

#[test]
fn members_of_a_later_version_are_passed_over_wherever_they_stand() {
    let mut table = stored();
    add_everywhere(&mut table);
    let (ours, theirs) = (read(&stored()).unwrap(), read(&table).unwrap());
    assert_eq!(ours, theirs);
}

fn add_everywhere(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.values_mut().for_each(add_everywhere);
            // In an OsString and in a stage the name of a member selects a variant, so no member can be added.
            if !members.contains_key("Unix") && !members.contains_key("draining") {
                members.insert("mood".into(), json!({"fine": true}));
            }
        }
        Value::Array(values) => values.iter_mut().for_each(add_everywhere),
        _ => {}
    }
}

#[test]
fn another_form_is_refused_by_its_number_alone() {
    for (table, reason) in [
        (json!({"format": FORMAT + 1, "version": "9.0.0"}), "9.0.0"),
        (json!({"format": FORMAT}), "missing field"),
        (json!({}), "missing field `format`"),
        (json!([]), "cannot read"),
    ] {
        let error = read(&table).unwrap_err();
        assert!(error.contains(reason), "{error}");
    }
    assert!(UpgradeState::of_json(b"\xff").is_err());
}

#[test]
fn a_table_that_contradicts_itself_is_an_error_and_no_panic() {
    type Break = fn(&mut Value);
    let break_it: [(&str, Break); 8] = [
        ("a worker that is not there", |f| {
            f["seats"][0]["worker"] = json!(5)
        }),
        ("a worker that drains", |f| {
            f["seats"][0]["worker"] = json!(1000)
        }),
        ("a slot twice", |f| f["seats"][1]["slot"] = json!(0)),
        ("a slot too many", |f| f["count"] = json!(1)),
        ("no worker at all", |f| f["count"] = json!(0)),
        ("a pid twice", |f| f["children"][0]["pid"] = json!(1001)),
        ("no pid", |f| f["children"][0]["pid"] = json!(-1)),
        ("a generation from the future", |f| {
            f["last_generation"] = json!(1)
        }),
    ];
    for (what, break_it) in break_it {
        let mut table = stored();
        break_it(&mut table["fleet"]);
        let state = read(&table).unwrap();
        assert!(Fleet::import(state.fleet, 3_268_900).is_err(), "{what}");
    }
    let mut table = stored();
    table["workers"]["stride"] = json!(128);
    let error = Children::fits(&read(&table).unwrap().workers).unwrap_err();
    assert!(error.to_string().contains("128"), "{error}");
}
