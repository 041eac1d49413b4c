//! Formats durations, sizes and counts for people. Pure.
//!
//! A duration has at most two units. A size from 1 MiB on has one decimal place. A count has separators for thousands.

/// Formats seconds: `45s`, `3m 20s`, `2d 4h`.
pub(super) fn seconds(seconds: u64) -> String {
    let units = [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)];
    let Some(first) = units.iter().position(|(_, size)| seconds >= *size) else {
        return "0s".into();
    };
    let (name, size) = units[first];
    let mut text = format!("{}{name}", seconds / size);
    if let Some((name, smaller)) = units.get(first + 1) {
        let rest = seconds % size / smaller;
        if rest > 0 {
            text += &format!(" {rest}{name}");
        }
    }
    text
}

/// Formats milliseconds: `250ms`, `1.5s`, and from ten seconds on like [`seconds`].
pub(super) fn milliseconds(milliseconds: u64) -> String {
    match milliseconds {
        0..1_000 => format!("{milliseconds}ms"),
        1_000..10_000 => format!("{}.{}s", milliseconds / 1_000, milliseconds % 1_000 / 100),
        _ => seconds(milliseconds / 1_000),
    }
}

/// Formats bytes: `812 KiB`, `12.3 MiB`.
pub(super) fn bytes(bytes: u64) -> String {
    let (unit, name) = match bytes {
        0..0x10_0000 => return format!("{} KiB", bytes >> 10),
        0x10_0000..0x4000_0000 => (1 << 20, "MiB"),
        _ => (1 << 30, "GiB"),
    };
    format!("{}.{} {name}", bytes / unit, bytes % unit * 10 / unit)
}

/// Formats a count: `1,234,567`.
pub(super) fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Formats a count with its noun: `1 call`, `2 calls`.
pub(super) fn plural(number: u64, thing: &str) -> String {
    let ending = if number == 1 { "" } else { "s" };
    format!("{} {thing}{ending}", count(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_people_write_them() {
        for (number, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (200, "3m 20s"),
            (7_265, "2h 1m"),
            (187_200, "2d 4h"),
        ] {
            assert_eq!(seconds(number), text);
        }
        for (number, text) in [
            (0, "0ms"),
            (999, "999ms"),
            (1_550, "1.5s"),
            (10_000, "10s"),
            (61_000, "1m 1s"),
        ] {
            assert_eq!(milliseconds(number), text);
        }
        for (number, text) in [
            (0, "0 KiB"),
            (831_488, "812 KiB"),
            (1 << 20, "1.0 MiB"),
            (12_897_485, "12.3 MiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "17179869183.9 GiB"),
        ] {
            assert_eq!(bytes(number), text);
        }
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(count(number), text);
        }
        assert_eq!(
            (plural(1, "call"), plural(0, "call")),
            ("1 call".into(), "0 calls".into())
        );
    }
}
