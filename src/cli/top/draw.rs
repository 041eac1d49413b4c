//! Draws a frame of `top` into a buffer of any size.
//!
//! With little room there are fewer columns, then no header, and below 20 columns or 5 rows one line. Without a
//! terminal the same code writes the text of `top --once`.

use ratatui::buffer::Buffer;
use ratatui::layout::{Position, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;

use super::cells::{PaneCell, PaneRow, Tone};
use super::header::{self, HeaderItem};
use super::panes::{Pane, PaneColumn};
use super::text::rate;
use super::view::{Mode, View};
use crate::observe::content::Figures;

/// The gap between two columns, in columns of the screen.
const GAP: u16 = 2;
/// The smallest width of a column that gets the rest of the line.
const LEAST_ELASTIC: u16 = 12;
/// The largest width of any other column.
const MOST_FIXED: u16 = 40;
/// Below this size there is one line.
const LEAST_SIZE: (u16, u16) = (20, 5);
/// The rows around the rows of the table, without the figures of the header: title, tabs, heading and footer.
const AROUND: u16 = 4;

const HELP: &str = "1-6, Tab   pane\n\
    s S        sort by the next column, reverse the order\n\
    /          filter; Esc clears it\n\
    arrows     move; PgUp PgDn Home End too\n\
    Enter      details of the row; Esc back\n\
    Space      pause\n\
    + -        longer or shorter interval\n\
    q          quit\n\
    ● good     ▲ look at it     ✖ bad";

/// Draws a frame. `now` is in seconds since 1970. Returns how many rows of the table there is room for.
pub(super) fn draw(buffer: &mut Buffer, view: &View, figures: Option<&Figures>, now: u64) -> usize {
    let area = buffer.area;
    let Some(figures) = figures else {
        put(
            buffer,
            0,
            0,
            area.width,
            "waiting for the master",
            Style::new(),
        );
        return 0;
    };
    if area.width < LEAST_SIZE.0 || area.height < LEAST_SIZE.1 {
        put(buffer, 0, 0, area.width, &short_line(figures), Style::new());
        return 0;
    }
    let bold = Style::new().add_modifier(Modifier::BOLD);
    put(buffer, 0, 0, area.width, &header::title(figures), bold);
    let items = header::items(figures, now);
    // At most a third of the screen.
    let most = (area.height.saturating_sub(AROUND) / 3).min(4);
    let mut y = 1 + flow(buffer, &items, 1, most, view);
    tabs(buffer, y, view);
    y += 1;
    let rows = view.rows(view.pane, figures, now);
    let room = Rect::new(0, y, area.width, area.height.saturating_sub(y + 1));
    let chosen = view
        .of(view.pane)
        .selected
        .min(rows.len().saturating_sub(1));
    match view.mode {
        Mode::Help => lines(buffer, room, HELP.lines().map(str::to_owned)),
        Mode::Details => lines(buffer, room, details(view.pane, rows.get(chosen))),
        Mode::Browse | Mode::Filter { .. } => {
            table(buffer, room, view, (view.pane, &rows), Some(chosen))
        }
    }
    footer(buffer, area.height - 1, view, rows.len());
    usize::from(room.height.saturating_sub(1))
}

/// Returns the text of `--once`: the header and all rows of every pane.
pub(super) fn page(view: &View, figures: &Figures, now: u64, width: u16) -> String {
    let items = header::items(figures, now);
    let panes = Pane::ALL.map(|pane| (pane, view.rows(pane, figures, now)));
    let rows: usize = panes.iter().map(|(_, rows)| rows.len().max(1) + 3).sum();
    let height = u16::try_from(rows + items.len() + 1).unwrap_or(u16::MAX);
    let mut buffer = Buffer::empty(Rect::new(0, 0, width, height));
    put(
        &mut buffer,
        0,
        0,
        width,
        &header::title(figures),
        Style::new(),
    );
    let mut y = 1 + flow(&mut buffer, &items, 1, height, view);
    for (pane, rows) in &panes {
        let room = height.saturating_sub(y + 2);
        let used = u16::try_from(rows.len().max(1) + 1)
            .unwrap_or(room)
            .min(room);
        put(
            &mut buffer,
            0,
            y + 1,
            width,
            &format!("{}:", pane.title()),
            Style::new(),
        );
        table(
            &mut buffer,
            Rect::new(0, y + 2, width, used),
            view,
            (*pane, rows),
            None,
        );
        y += used + 2;
    }
    text_of(&buffer)
}

/// Writes a text at a place, at most `width` columns. A text that is cut ends with a mark.
fn put(buffer: &mut Buffer, x: u16, y: u16, width: u16, text: &str, style: Style) {
    if !buffer.area.contains(Position { x, y }) {
        return;
    }
    let width = width.min(buffer.area.width - x);
    let is_cut = Line::from(text).width() > usize::from(width);
    let room = width.saturating_sub(u16::from(is_cut));
    let (end, _) = buffer.set_stringn(x, y, text, room.into(), style);
    if is_cut && buffer.area.contains(Position { x: end, y }) {
        buffer.set_string(end, y, "…", style);
    }
}

fn style(tone: Tone, view: &View) -> Style {
    let color = match tone {
        Tone::Plain => return Style::new(),
        Tone::Good => Color::Green,
        Tone::Warn => Color::Yellow,
        Tone::Bad => Color::Red,
    };
    match view.colors {
        true => Style::new().fg(color),
        false => Style::new(),
    }
}

fn short_line(figures: &Figures) -> String {
    let status = &figures.facts.status;
    let calls = rate(figures.rates.total.calls_per_s);
    format!(
        "{}/{} {calls}/s",
        status.ready_workers(),
        status.master.target
    )
}

/// Writes the figures of the header into lines from `y` on, at most `most`. Returns the number of lines.
fn flow(buffer: &mut Buffer, items: &[HeaderItem], y: u16, most: u16, view: &View) -> u16 {
    let (mut x, mut line) = (0, 0);
    let dim = Style::new().add_modifier(Modifier::DIM);
    for item in items {
        let label = Line::from(item.label).width() as u16 + 1;
        let width = label + Line::from(&*item.value).width() as u16;
        if x > 0 && x + width > buffer.area.width {
            (x, line) = (0, line + 1);
        }
        if line >= most {
            return most;
        }
        put(buffer, x, y + line, label, item.label, dim);
        let room = buffer.area.width.saturating_sub(x + label);
        put(
            buffer,
            x + label,
            y + line,
            room,
            &item.value,
            style(item.tone, view),
        );
        x = (x + width).saturating_add(GAP);
    }
    line + 1
}

fn tabs(buffer: &mut Buffer, y: u16, view: &View) {
    let mut x = 0;
    for (index, pane) in Pane::ALL.into_iter().enumerate() {
        let is_open = pane == view.pane;
        let (left, right) = if is_open { ("[", "]") } else { (" ", " ") };
        let text = format!("{left}{} {}{right}", index + 1, pane.title());
        let style = match is_open {
            true => Style::new().add_modifier(Modifier::BOLD),
            false => Style::new(),
        };
        let room = buffer.area.width.saturating_sub(x);
        put(buffer, x, y, room, &text, style);
        x = x.saturating_add(text.len() as u16);
    }
}

fn footer(buffer: &mut Buffer, y: u16, view: &View, rows: usize) {
    let interval = humantime::format_duration(view.interval);
    let state = if view.is_paused { "paused" } else { "every" };
    let text = match &view.mode {
        Mode::Filter { .. } => format!("/{}_   Enter keep  Esc back", view.filter),
        Mode::Details | Mode::Help => "Esc back  q quit".to_owned(),
        Mode::Browse => {
            let filter = match view.filter.is_empty() {
                true => String::new(),
                false => format!("  filter \"{}\"", view.filter),
            };
            format!("{rows} rows{filter}  {state} {interval}  ? help  / filter  s sort  q quit")
        }
    };
    let dim = Style::new().add_modifier(Modifier::DIM);
    put(
        buffer,
        0,
        y,
        buffer.area.width,
        &super::text::escaped(&text).replace("\\\"", "\""),
        dim,
    );
}

fn lines(buffer: &mut Buffer, room: Rect, lines: impl IntoIterator<Item = String>) {
    let width = usize::from(room.width).max(1);
    let wrapped = lines.into_iter().flat_map(|line| wrap(&line, width));
    for (y, line) in wrapped.take(room.height.into()).enumerate() {
        put(
            buffer,
            0,
            room.y + y as u16,
            room.width,
            &line,
            Style::new(),
        );
    }
}

/// Cuts a line into pieces of at most this many columns. Some characters take two.
pub(super) fn wrap(line: &str, width: usize) -> Vec<String> {
    let (mut pieces, mut left) = (Vec::new(), 0);
    for character in line.chars() {
        let columns = Line::from(character.to_string()).width();
        if columns > left || pieces.is_empty() {
            pieces.push(String::new());
            left = width;
        }
        left = left.saturating_sub(columns);
        if let Some(piece) = pieces.last_mut() {
            piece.push(character);
        }
    }
    pieces
}

fn details(pane: Pane, row: Option<&PaneRow>) -> Vec<String> {
    let cells = row.into_iter().flatten();
    let columns = pane.columns().iter();
    columns
        .zip(cells)
        .map(|(column, cell)| format!("{}: {}", column.title, cell.text))
        .collect()
}

/// Draws a heading and as many rows as there is room for, so that the selected one is among them.
fn table(
    buffer: &mut Buffer,
    room: Rect,
    view: &View,
    (pane, rows): (Pane, &[PaneRow]),
    selected: Option<usize>,
) {
    if room.height == 0 {
        return;
    }
    let columns = fit(pane.columns(), rows, room.width);
    let chosen = view.of(pane);
    let mut x = room.x;
    for &(index, width) in &columns {
        let column = &pane.columns()[index];
        let mark = if chosen.is_descending { "▼" } else { "▲" };
        let title = match index == chosen.sort {
            true => format!("{}{mark}", column.title),
            false => column.title.to_owned(),
        };
        let bold = Style::new().add_modifier(Modifier::BOLD);
        cell(buffer, (x, room.y, width), &title, column.is_text, bold);
        x += width + GAP;
    }
    let height = usize::from(room.height) - 1;
    if rows.is_empty() && height > 0 {
        put(buffer, room.x, room.y + 1, room.width, "none", Style::new());
    }
    let first = selected.map_or(0, |selected| (selected + 1).saturating_sub(height));
    for (line, (number, row)) in rows.iter().enumerate().skip(first).take(height).enumerate() {
        let y = room.y + 1 + line as u16;
        let mut x = room.x;
        for &(index, width) in &columns {
            let PaneCell { text, tone, .. } = &row[index];
            cell(
                buffer,
                (x, y, width),
                text,
                pane.columns()[index].is_text,
                style(*tone, view),
            );
            x += width + GAP;
        }
        if selected == Some(number) {
            let row = Rect::new(room.x, y, room.width, 1);
            buffer.set_style(row, Style::new().add_modifier(Modifier::REVERSED));
        }
    }
}

fn cell(
    buffer: &mut Buffer,
    (x, y, width): (u16, u16, u16),
    text: &str,
    is_text: bool,
    style: Style,
) {
    let used = (Line::from(text).width() as u16).min(width);
    let x = if is_text { x } else { x + width - used };
    put(buffer, x, y, width.min(used.max(1)), text, style);
}

/// Chooses the columns that have room, with their widths.
fn fit(columns: &[PaneColumn], rows: &[PaneRow], room: u16) -> Vec<(usize, u16)> {
    let natural = |index: usize| {
        let cells = rows.iter().map(|row| Line::from(&*row[index].text).width());
        // One more for the mark of the sorted column.
        let title = columns[index].title.chars().count() + 1;
        cells
            .max()
            .unwrap_or_default()
            .max(title)
            .min(u16::MAX.into()) as u16
    };
    let natural: Vec<u16> = (0..columns.len()).map(natural).collect();
    let least = |index: usize| match columns[index].is_elastic {
        true => natural[index].min(LEAST_ELASTIC),
        false => natural[index].min(MOST_FIXED),
    };
    let mut kept: Vec<(usize, u16)> = (0..columns.len())
        .map(|index| (index, least(index)))
        .collect();
    let used = |kept: &[(usize, u16)]| {
        kept.iter()
            .map(|(_, width)| width + GAP)
            .sum::<u16>()
            .saturating_sub(GAP)
    };
    while kept.len() > 1 && used(&kept) > room {
        let worst = kept
            .iter()
            .enumerate()
            .max_by_key(|(_, (index, _))| columns[*index].rank);
        let Some((place, _)) = worst else { break };
        kept.remove(place);
    }
    let mut left = room.saturating_sub(used(&kept));
    for (index, width) in &mut kept {
        if columns[*index].is_elastic {
            let more = left.min(natural[*index] - *width);
            (*width, left) = (*width + more, left - more);
        }
    }
    kept
}

/// Returns the lines of a buffer, without spaces at their ends and without empty lines at the end.
pub(super) fn text_of(buffer: &Buffer) -> String {
    let mut text = String::new();
    for y in 0..buffer.area.height {
        let mut x = 0;
        let start = text.len();
        while x < buffer.area.width {
            let symbol = buffer[(x, y)].symbol();
            text.push_str(symbol);
            x += (Line::from(symbol).width() as u16).max(1);
        }
        text.truncate(start + text[start..].trim_end().len());
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}
