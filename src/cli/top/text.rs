//! Formats figures for `top`, and escapes text that clients or the configuration chose. Pure.

use crate::cli::units;
use crate::logging::escape_unprintable;

/// What stands for a figure that is not known.
pub(super) const UNKNOWN: &str = "-";

/// Formats a rate per second or another small number: `0`, `0.25`, `12.5`, `1,234`.
pub(super) fn rate(per_s: f64) -> String {
    match per_s {
        0.0 => "0".to_owned(),
        0.0..1.0 => format!("{per_s:.2}"),
        1.0..100.0 => format!("{per_s:.1}"),
        _ => units::count(per_s.round() as u64),
    }
}

/// Formats microseconds: `96 us`, `1.2 ms`, `2.50 s`.
pub(super) fn micros(us: Option<u64>) -> String {
    match us {
        None => UNKNOWN.to_owned(),
        Some(us @ 0..1_000) => format!("{us} us"),
        Some(us @ 1_000..1_000_000) => format!("{:.1} ms", us as f64 / 1e3),
        Some(us) => format!("{:.2} s", us as f64 / 1e6),
    }
}

/// Formats a share: `0 %`, `0.10 %`.
pub(super) fn percent(part: f64, whole: f64) -> String {
    match part <= 0.0 || whole <= 0.0 {
        true => "0 %".to_owned(),
        false => format!("{:.2} %", part * 100.0 / whole),
    }
}

/// Joins parts of a cell; `none` stands for no part.
pub(super) fn joined(parts: &[String], none: &str) -> String {
    match parts.is_empty() {
        true => none.to_owned(),
        false => parts.join(", "),
    }
}

/// Draws counts as blocks of eighths, at most `width` of them, the latest last.
pub(super) fn sparkline(counts: &[u64], width: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let together = counts.len().div_ceil(width.max(1)).max(1);
    // From the end, so that a column keeps its seconds while the list is full.
    let mut sums: Vec<u64> = counts
        .rchunks(together)
        .map(|some| some.iter().sum())
        .collect();
    sums.reverse();
    let most = sums.iter().copied().max().unwrap_or_default().max(1);
    let block = |sum: &u64| BLOCKS[(sum.saturating_mul(7).div_ceil(most)).min(7) as usize];
    sums.iter().map(block).collect()
}

/// Escapes what could control a terminal or be taken for something else: unprintable characters, quotes and
/// backslashes.
pub(super) fn escaped(text: &str) -> String {
    let quoted = text.replace('\\', "\\\\").replace('"', "\\\"");
    escape_unprintable(&quoted, &[]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_as_many_digits_as_are_read() {
        let rates = [0.0, 0.254, 12.54, 99.94, 1_234.4].map(rate);
        assert_eq!(rates, ["0", "0.25", "12.5", "99.9", "1,234"]);
        let times = [None, Some(999), Some(1_249), Some(2_500_000)].map(micros);
        assert_eq!(times, ["-", "999 us", "1.2 ms", "2.50 s"]);
        assert_eq!(percent(1.0, 1_000.0), "0.10 %");
        assert_eq!(
            (percent(1.0, 0.0), percent(0.0, 9.0)),
            ("0 %".into(), "0 %".into())
        );
    }

    #[test]
    fn a_sparkline_has_at_most_its_width() {
        assert_eq!(sparkline(&[0, 1, 7], 10), "▁▂█");
        assert_eq!(sparkline(&[1, 1, 1, 1, 4], 3), "▃▄█");
        assert_eq!(sparkline(&[0; 60], 20).chars().count(), 20);
        assert_eq!(sparkline(&[], 20), "");
        assert_eq!(sparkline(&[u64::MAX], 1), "▂");
    }

    #[test]
    fn no_text_controls_the_terminal() {
        let text = "a\x1b[2J\u{9b}\u{202e}\u{2028}\"\\\tü";
        let shown = escaped(text);
        assert_eq!(shown, "a\\u{1b}[2J\\u{9b}\\u{202e}\\u{2028}\\\"\\\\\\tü");
    }
}
