use super::*;

const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

fn headers(lines: &[(&str, &str)]) -> ReceivedTrace {
    let mut fields = TraceFields::default();
    for (name, value) in lines {
        fields.add_header(name, value.as_bytes());
    }
    fields.received()
}

/// The state that goes with a valid parent and these values.
fn state(values: &[&str]) -> Option<String> {
    let parent = format!("00-{ID}-{PARENT}-01");
    let mut lines = vec![("traceparent", parent.as_str())];
    lines.extend(values.iter().map(|value| ("tracestate", *value)));
    let context = headers(&lines).valid().unwrap();
    assert_eq!(context.traceparent(), parent, "{values:?}");
    context.state.map(String::from)
}

#[test]
fn a_parent_is_decoded_by_the_rules_of_its_version() {
    for (text, flags) in [
        (format!("00-{ID}-{PARENT}-00"), "00"),
        (format!("00-{ID}-{PARENT}-01"), "01"),
        (format!("00-{ID}-{PARENT}-02"), "02"),
        // Unknown flags are sent as 0.
        (format!("00-{ID}-{PARENT}-fe"), "02"),
        (format!("00-{ID}-{PARENT}-ff"), "03"),
        // A later version is sent on as version 00.
        (format!("01-{ID}-{PARENT}-01"), "01"),
        (format!("cc-{ID}-{PARENT}-01"), "01"),
        (format!("cc-{ID}-{PARENT}-01-"), "01"),
        (
            format!("cc-{ID}-{PARENT}-01-what-the-future-will-be-like"),
            "01",
        ),
        (format!("fe-{ID}-{PARENT}-01"), "01"),
    ] {
        let sent = TraceContext::decode(text.as_bytes()).map(|it| it.traceparent());
        assert_eq!(sent, Some(format!("00-{ID}-{PARENT}-{flags}")), "{text}");
    }
}

#[test]
fn an_invalid_parent_is_none() {
    let zero = "0000000000000000";
    for text in [
        String::new(),
        "-".to_owned(),
        format!("00-{ID}-{PARENT}-0"),
        format!("00-{ID}-{PARENT}-"),
        format!("00-{ID}-{PARENT}"),
        format!("00-{ID}-{PARENT}-001"),
        format!("00-{ID}-{PARENT}-01-"),
        format!("00-{ID}-{PARENT}-01-more"),
        format!("00-{ID}-{PARENT}-01 "),
        format!(" 00-{ID}-{PARENT}-01"),
        format!("ff-{ID}-{PARENT}-01"),
        format!("cc-{ID}-{PARENT}-01.what"),
        format!("cc-{ID}-{PARENT}-0"),
        format!("0-{ID}-{PARENT}-01"),
        format!("000-{ID}-{PARENT}-01"),
        format!(".0-{ID}-{PARENT}-01"),
        format!("0x-{ID}-{PARENT}-01"),
        format!("00-{ID}-{PARENT}-.0"),
        format!("00-{ID}-{PARENT}-0A"),
        format!("00-{ID}1-{PARENT}-01"),
        format!("00-{}-{PARENT}-01", &ID[1..]),
        format!("00-{}.-{PARENT}-01", &ID[1..]),
        format!("00-{ID}-{PARENT}1-01"),
        format!("00-{ID}-{}-01", &PARENT[1..]),
        format!("00-{ID}-{}.-01", &PARENT[1..]),
        format!("00-{}-{PARENT}-01", ID.to_uppercase()),
        format!("00-{ID}-{}-01", PARENT.to_uppercase()),
        format!("CC-{ID}-{PARENT}-01"),
        format!("00-{zero}{zero}-{PARENT}-01"),
        format!("00-{ID}-{zero}-01"),
        format!("00_{ID}-{PARENT}-01"),
        format!("00-{ID}_{PARENT}-01"),
        format!("00-{ID}-{PARENT}_01"),
    ] {
        assert_eq!(TraceContext::decode(text.as_bytes()), None, "{text}");
    }
    assert_eq!(TraceContext::decode(&[0xFF; 55]), None);
}

#[test]
fn headers_are_known_by_name_in_any_case_and_a_repeated_parent_is_invalid() {
    let parent = format!("00-{ID}-{PARENT}-01");
    let padded = format!("\t {parent} \t");
    for (name, value) in [
        ("TraceParent", &parent),
        ("TRACEPARENT", &parent),
        ("traceparent", &padded),
    ] {
        let context = headers(&[(name, value), ("TraceState", "a=1")])
            .valid()
            .unwrap();
        assert_eq!(context.traceparent(), parent);
        assert_eq!(context.state.as_deref(), Some("a=1"));
    }
    for other in ["trace-parent", "trace.parent", "traceparents"] {
        assert_eq!(headers(&[(other, &parent)]), ReceivedTrace::Absent);
    }
    let twice = [
        ("traceparent", parent.as_str()),
        ("Traceparent", parent.as_str()),
    ];
    assert_eq!(headers(&twice), ReceivedTrace::Invalid);
    assert_eq!(headers(&[("tracestate", "a=1")]), ReceivedTrace::Absent);
    let invalid = [("traceparent", "00"), ("tracestate", "a=1")];
    assert_eq!(headers(&invalid), ReceivedTrace::Invalid);
}

#[test]
fn a_valid_state_is_passed_unchanged() {
    let longest = "z".repeat(256);
    let all_keys = "abcdefghijklmnopqrstuvwxyz0123456789_-*/@=1";
    let value: String = (' '..='~').filter(|c| !",=".contains(*c)).collect();
    for text in [
        "a=1".to_owned(),
        "a=1,b=2".to_owned(),
        "a=1 \t , \t b=2".to_owned(),
        "a=1,,b=2, ,c=3".to_owned(),
        "0=1".to_owned(),
        "foo@=1,foo@@bar=2,foo@bar@baz=3".to_owned(),
        "a=1,a=2".to_owned(),
        "a= 1".to_owned(),
        all_keys.to_owned(),
        format!("a={value}"),
        format!("{longest}=1"),
        format!("a={longest}"),
    ] {
        assert_eq!(state(&[&text]), Some(text));
    }
    assert_eq!(state(&["\t a=1 \t"]).as_deref(), Some("a=1"));
    let longest: Vec<String> = (0..32)
        .map(|n| format!("{n:0>256}={}", "v".repeat(256)))
        .collect();
    assert_eq!(state(&[&longest.join(",")]), Some(longest.join(",")));
}

#[test]
fn several_fields_are_joined_in_their_order() {
    let joined = state(&["foo=1,bar=2", "", "rojo=1", " \t", "congo=2 "]);
    assert_eq!(joined.as_deref(), Some("foo=1,bar=2,rojo=1,congo=2"));
    let ten = |from: u32| {
        (from..from + 10)
            .map(|n| format!("b{n}={n}"))
            .collect::<Vec<_>>()
            .join(",")
    };
    let (one, two, three) = (ten(10), ten(20), ten(30));
    let whole = state(&[&one, &two, &three, "b40=40,b41=41"]);
    assert_eq!(whole.map(|it| it.split(',').count()), Some(32));
    assert_eq!(state(&[&one, &two, &three, "b40=40,b41=41,b42=42"]), None);
}

#[test]
fn an_invalid_state_is_dropped_alone() {
    for text in [
        "",
        ",",
        " ,\t,",
        "a",
        "=",
        "=1",
        "a=",
        "a=,b=3",
        "a= ",
        "a =1",
        "A=1",
        "a.b=1",
        "@a=1",
        "_a=1",
        "-a=1",
        "*a=1",
        "a=1=2",
        "a=1\n",
        "a=\u{7f}",
        "a=\u{1}",
        "a=\t1\t2",
        "a=é",
        "ä=1",
        "b=1,c",
        "b=1;c=2=3",
    ] {
        assert_eq!(state(&[text]), None, "{text:?}");
    }
    let long = "z".repeat(257);
    assert_eq!(state(&[&format!("{long}=1")]), None);
    assert_eq!(state(&["a=1", &format!("a={long}")]), None);
    assert_eq!(state(&[&format!("a=1{},b=2", " ".repeat(20_000))]), None);
}

#[test]
fn a_context_is_read_back_from_its_text() {
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let mut context = TraceContext::decode(parent.as_bytes()).unwrap();
    assert_eq!(context.to_text(), parent);
    for state in [None, Some("a=1, b=x y")] {
        context.state = state.map(Box::from);
        let read = TraceContext::from_text(&context.to_text());
        assert_eq!(read.as_ref(), Some(&context));
    }
    assert_eq!(TraceContext::from_text("x\na=1"), None);
}
