//! Holds what the user of `top` has chosen, and changes it by keys. Pure.

use std::time::Duration;

use crossterm::event::KeyCode;

use super::cells::PaneRow;
use super::panes::Pane;
use crate::observe::content::Figures;

/// The intervals that `+` and `-` step through, in milliseconds.
const INTERVALS: [u64; 8] = [100, 250, 500, 1_000, 2_000, 5_000, 10_000, 60_000];
/// The longest filter, in characters.
const LONGEST_FILTER: usize = 64;

/// The mode of the display. It decides what a key does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mode {
    Browse,
    /// The user types the filter. Esc restores the previous one.
    Filter {
        before: String,
    },
    /// The selected row is shown whole.
    Details,
    Help,
}

/// The sorting and the selected row of a pane.
#[derive(Debug, Clone, Copy)]
pub(super) struct PaneView {
    pub sort: usize,
    pub is_descending: bool,
    pub selected: usize,
}

#[derive(Debug)]
pub(super) struct View {
    pub pane: Pane,
    panes: [PaneView; Pane::ALL.len()],
    pub filter: String,
    pub mode: Mode,
    pub is_paused: bool,
    pub interval: Duration,
    /// Whether colors are wanted.
    pub colors: bool,
}

/// The result of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyOutcome {
    Continue,
    Quit,
}

impl View {
    pub(super) fn new(interval: Duration, colors: bool) -> Self {
        View {
            pane: Pane::Workers,
            panes: Pane::ALL.map(|pane| {
                let (sort, is_descending) = pane.first_sort();
                PaneView {
                    sort,
                    is_descending,
                    selected: 0,
                }
            }),
            filter: String::new(),
            mode: Mode::Browse,
            is_paused: false,
            interval,
            colors,
        }
    }

    /// Returns the sorting and the selected row of a pane.
    pub(super) fn of(&self, pane: Pane) -> PaneView {
        self.panes[pane as usize]
    }

    /// The rows of a pane that pass the filter, sorted.
    pub(super) fn rows(&self, pane: Pane, figures: &Figures, now: u64) -> Vec<PaneRow> {
        let mut rows = pane.rows(figures, now);
        let wanted = self.filter.to_lowercase();
        let has = |row: &PaneRow| {
            row.iter()
                .any(|cell| cell.text.to_lowercase().contains(&wanted))
        };
        rows.retain(|row| wanted.is_empty() || has(row));
        let PaneView {
            sort,
            is_descending,
            ..
        } = self.of(pane);
        rows.sort_by(|one, other| {
            let order = one[sort].key.compare(&other[sort].key);
            if is_descending {
                order.reverse()
            } else {
                order
            }
        });
        rows
    }

    /// Handles a key. `rows` is the number of rows of the pane, `page` that of the rows on the screen.
    pub(super) fn key(&mut self, key: KeyCode, rows: usize, page: usize) -> KeyOutcome {
        match self.mode.clone() {
            Mode::Filter { before } => self.filter_key(key, before),
            Mode::Browse => return self.browse_key(key, rows, page),
            Mode::Details | Mode::Help => match key {
                KeyCode::Char('q') => return KeyOutcome::Quit,
                KeyCode::Esc | KeyCode::Enter | KeyCode::Char('?') => self.mode = Mode::Browse,
                _ => {}
            },
        }
        KeyOutcome::Continue
    }

    fn filter_key(&mut self, key: KeyCode, before: String) {
        match key {
            KeyCode::Esc => {
                self.filter = before;
                self.mode = Mode::Browse;
            }
            KeyCode::Enter => self.mode = Mode::Browse,
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(character) if self.filter.chars().count() < LONGEST_FILTER => {
                self.filter.push(character);
            }
            _ => {}
        }
        self.panes[self.pane as usize].selected = 0;
    }

    fn browse_key(&mut self, key: KeyCode, rows: usize, page: usize) -> KeyOutcome {
        let place = self.pane as usize;
        let last = rows.saturating_sub(1);
        let chosen = &mut self.panes[place];
        let page = page.max(1);
        match key {
            KeyCode::Char('q') => return KeyOutcome::Quit,
            KeyCode::Char(digit @ '1'..='6') => {
                self.pane = Pane::ALL[digit as usize - '1' as usize]
            }
            KeyCode::Tab => self.pane = Pane::ALL[(place + 1) % Pane::ALL.len()],
            KeyCode::BackTab => {
                self.pane = Pane::ALL[(place + Pane::ALL.len() - 1) % Pane::ALL.len()];
            }
            KeyCode::Char('s') => chosen.sort = (chosen.sort + 1) % self.pane.columns().len(),
            KeyCode::Char('S') => chosen.is_descending = !chosen.is_descending,
            KeyCode::Char('/') => {
                self.mode = Mode::Filter {
                    before: self.filter.clone(),
                }
            }
            KeyCode::Up => chosen.selected = chosen.selected.min(last).saturating_sub(1),
            KeyCode::Down => chosen.selected = (chosen.selected + 1).min(last),
            KeyCode::PageUp => chosen.selected = chosen.selected.min(last).saturating_sub(page),
            KeyCode::PageDown => chosen.selected = (chosen.selected + page).min(last),
            KeyCode::Home => chosen.selected = 0,
            KeyCode::End => chosen.selected = last,
            KeyCode::Enter if rows > 0 => self.mode = Mode::Details,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char(' ') => self.is_paused = !self.is_paused,
            KeyCode::Char('+') => {
                let now = self.interval.as_millis();
                self.set_interval(INTERVALS.into_iter().find(|step| u128::from(*step) > now));
            }
            KeyCode::Char('-') => {
                let now = self.interval.as_millis();
                self.set_interval(INTERVALS.into_iter().rfind(|step| u128::from(*step) < now));
            }
            KeyCode::Char('?') => self.mode = Mode::Help,
            _ => {}
        }
        KeyOutcome::Continue
    }

    fn set_interval(&mut self, millis: Option<u64>) {
        self.interval = millis.map_or(self.interval, Duration::from_millis);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view_after(keys: &[KeyCode]) -> (View, KeyOutcome) {
        let mut view = View::new(Duration::from_secs(1), false);
        let mut outcome = KeyOutcome::Continue;
        for key in keys {
            outcome = view.key(*key, 30, 10);
        }
        (view, outcome)
    }

    fn typed(text: &str) -> Vec<KeyCode> {
        text.chars().map(KeyCode::Char).collect()
    }

    #[test]
    fn keys_choose_pane_order_and_row() {
        let (view, outcome) = view_after(&typed("2sS"));
        assert_eq!((view.pane, outcome), (Pane::Methods, KeyOutcome::Continue));
        assert_eq!(
            (
                view.of(Pane::Methods).sort,
                view.of(Pane::Methods).is_descending
            ),
            (3, false)
        );
        use KeyCode::{BackTab, Down, End, PageDown, PageUp, Tab, Up};
        let (view, _) = view_after(&[Tab, Tab, BackTab, PageDown, PageDown, Down, Up, Up]);
        assert_eq!(
            (view.pane, view.of(Pane::Methods).selected),
            (Pane::Methods, 19)
        );
        let (view, _) = view_after(&[End, PageUp]);
        assert_eq!(view.of(Pane::Workers).selected, 19);
        assert_eq!(view_after(&typed("q")).1, KeyOutcome::Quit);
        assert!(view_after(&typed(" ")).0.is_paused);
    }

    #[test]
    fn the_interval_has_steps_and_ends() {
        let millis = |keys: &str| view_after(&typed(keys)).0.interval.as_millis();
        assert_eq!(
            (millis("+"), millis("-"), millis("+-")),
            (2_000, 500, 1_000)
        );
        assert_eq!((millis("----------"), millis("++++++++++")), (100, 60_000));
    }

    #[test]
    fn a_filter_is_typed_kept_and_given_up() {
        let (view, outcome) = view_after(&typed("/q s"));
        assert_eq!(
            (view.filter.as_str(), outcome),
            ("q s", KeyOutcome::Continue)
        );
        let mut keys = typed("/ab");
        keys.extend([
            KeyCode::Backspace,
            KeyCode::Enter,
            KeyCode::Char('/'),
            KeyCode::Char('x'),
        ]);
        let (mut view, _) = view_after(&keys);
        assert_eq!(view.filter, "ax");
        view.key(KeyCode::Esc, 1, 1);
        assert_eq!((view.filter.as_str(), &view.mode), ("a", &Mode::Browse));
        view.key(KeyCode::Esc, 1, 1);
        assert_eq!(view.filter, "");
    }

    #[test]
    fn help_and_details_are_left_with_escape() {
        for key in [KeyCode::Char('?'), KeyCode::Enter] {
            let (mut view, _) = view_after(&[key]);
            assert_ne!(view.mode, Mode::Browse);
            view.key(KeyCode::Esc, 1, 1);
            assert_eq!(view.mode, Mode::Browse);
        }
    }
}
