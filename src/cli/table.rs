//! Formats tables with aligned columns and optional colours.
//!
//! A cell has its text and its style apart, so escape sequences do not count for its width.

use super::output::printable;

/// The style of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Bold,
    Dim,
    Red,
    Green,
    Yellow,
    Cyan,
}

impl Style {
    /// Returns the parameter of ECMA-48's SGR sequence.
    fn code(self) -> Option<u8> {
        match self {
            Style::Plain => None,
            Style::Bold => Some(1),
            Style::Dim => Some(2),
            Style::Red => Some(31),
            Style::Green => Some(32),
            Style::Yellow => Some(33),
            Style::Cyan => Some(36),
        }
    }

    /// Returns the text in this style, if colours are wanted.
    pub(super) fn on(self, text: &str, colours: bool) -> String {
        match self.code() {
            Some(code) if colours => format!("\x1b[{code}m{text}\x1b[0m"),
            _ => text.to_owned(),
        }
    }
}

/// The alignment of a cell: text to the left, numbers to the right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// One field.
pub(super) struct Cell {
    text: String,
    paint: Style,
}

impl Cell {
    pub(super) fn new(text: impl AsRef<str>) -> Self {
        // A line feed in a field would break the table.
        let text = printable(text.as_ref()).replace(['\n', '\t'], " ");
        Cell {
            text,
            paint: Style::Plain,
        }
    }

    pub(super) fn painted(text: impl AsRef<str>, paint: Style) -> Self {
        Cell {
            paint,
            ..Cell::new(text)
        }
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

/// Rows below a heading.
pub(super) struct TextTable {
    heading: Vec<(&'static str, Align)>,
    rows: Vec<Vec<Cell>>,
}

impl TextTable {
    pub(super) fn new(heading: &[(&'static str, Align)]) -> Self {
        TextTable {
            heading: heading.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row with a cell for each column.
    pub(super) fn row<const N: usize>(&mut self, cells: [Cell; N]) {
        debug_assert_eq!(N, self.heading.len());
        self.rows.push(cells.into());
    }

    /// Writes the heading and the rows.
    pub(super) fn render(mut self, out: &mut String, colours: bool) {
        let heading: Vec<Cell> = self
            .heading
            .iter()
            .map(|(name, _)| Cell::painted(name, Style::Bold))
            .collect();
        self.rows.insert(0, heading);
        let widths: Vec<usize> = (0..self.heading.len())
            .map(|column| {
                let widths = self.rows.iter().filter_map(|row| row.get(column));
                widths.map(Cell::width).max().unwrap_or(0)
            })
            .collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, (_, align)), width) in row.iter().zip(&self.heading).zip(&widths) {
                if !line.is_empty() {
                    line += "  ";
                }
                let gap = " ".repeat(width - cell.width());
                let text = cell.paint.on(&cell.text, colours);
                line += &match align {
                    Align::Left => text + &gap,
                    Align::Right => gap + &text,
                };
            }
            *out += line.trim_end();
            out.push('\n');
        }
    }
}
